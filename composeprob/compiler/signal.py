"""Whether level 0 is clean, and the noisiest level noise alone, for factors that are mixtures of Gaussians.

Chains start there from N(0, σ²). Were the way down exact, they would arrive at ∫ p(x₀ | x)·N(x; 0, σ²) dx, which is the
factor's distribution only where x does not depend on x₀. How far that is from the distribution is known in closed form:
the shares of the components, and the mean and variance of every entry.
"""

from __future__ import annotations

import math

import numpy as np

from composeprob import tuning
from composeprob.compiler.tails import known_parts
from composeprob.errors import ImproperError
from composeprob.factors.gaussians import Gaussians
from composeprob.ir.nodes import Graph, Leaf, Site, leaves
from composeprob.schedule import Schedule


def check_signal(graph: Graph) -> None:
    """Refuse levels that end in noise, or whose noisiest one still depends on a factor's data.

    Raises:
        ImproperError: with the factor, and what would come out wrong.
    """
    assert graph.schedule is not None
    clean = 2 * math.log(float(graph.schedule.alpha[0]) / float(graph.schedule.sigma[0]))
    if clean < 0 and len(graph.schedule.alpha) > 1:
        raise ImproperError(
            f"Level 0 is more noise than data: its log-SNR is {clean:.3g}, and samples would be as noisy.",
            fix="end at a clean level: cp.Schedule.log_snr(60, max=8), or levels=np.linspace(8, -8, 60).",
        )
    for site in graph.sites:
        checked: list[tuple[int, ...]] = []
        for leaf in leaves(site.root):
            if leaf.slot is None or leaf.slot in checked:  # equal leaves are one
                continue
            checked.append(leaf.slot)
            for part in known_parts(leaf) or []:
                _check_part(part, leaf, site, graph.schedule)


def _check_part(part: Gaussians, leaf: Leaf, site: Site, schedule: Schedule) -> None:
    noise = schedule if leaf.own_noise is None else leaf.own_noise
    alpha, sigma = float(noise.alpha[-1]), float(noise.sigma[-1])
    signal = alpha / sigma * reach(part)
    if signal <= tuning.SIGNAL.hidden:
        return
    error, what = bias(part, alpha, sigma)
    if error <= 1:
        return
    log_snr = 2 * math.log(alpha / sigma)
    better = math.floor(log_snr - 2 * math.log(signal / tuning.SIGNAL.hidden))
    raise ImproperError(
        f"The noisiest level is not noise alone for factor '{leaf.name}' at site {site.name!r}: its log-SNR is "
        f"{log_snr:.3g}, and started from noise even an exact sampler would give {what}.",
        where=site.where,
        fix=f"compile with a noisier last level: cp.compile(…, schedule=cp.Schedule.log_snr({len(noise.alpha)}, "
        f"min={better:g})), or bring the data to a scale of about 1 around 0.",
    )


def reach(part: Gaussians) -> float:
    """The distance of the farthest component's middle from 0, and its greatest standard deviation, together."""
    distance = np.sum(part.means**2, 1)
    widths = part.covariances.max(1) if part.covariances.ndim == 2 else np.linalg.eigvalsh(part.covariances)[:, -1]
    return float(np.sqrt((distance + widths).max()))


def bias(part: Gaussians, alpha: float, sigma: float, num_draws: int = 1024) -> tuple[float, str]:
    """What is most off where draws of N(0, σ²) at the noisiest level are taken for draws of α·x₀ + σ·ε: (how far, in
    parts of what is tolerated, and what).

    Args:
        part: the distribution of x₀.
        alpha, sigma: the noise of that level.
        num_draws: antithetic draws of N(0, σ²).
    """
    part = _fewer(part.normalised(), 2**24 // num_draws)
    weights, (count, n) = np.exp(part.log_weights), part.means.shape
    half = np.random.default_rng(0).standard_normal((num_draws // 2, n))
    x = sigma * np.concatenate([half, -half])
    log_p, means, variances = np.empty((num_draws, count)), np.empty((num_draws, count, n)), np.empty((count, n))
    for j, (mean, covariance) in enumerate(zip(part.means, part.covariances, strict=True)):
        widths, basis = (covariance, None) if covariance.ndim == 1 else np.linalg.eigh(covariance)
        away = x - alpha * mean
        away = away if basis is None else away @ basis
        spread = alpha**2 * widths + sigma**2
        log_p[:, j] = part.log_weights[j] - 0.5 * np.sum(away**2 / spread + np.log(spread), 1)
        back, left = alpha * widths / spread * away, widths * sigma**2 / spread
        means[:, j] = mean + (back if basis is None else back @ basis.T)
        variances[j] = left if basis is None else basis**2 @ left
    shares = np.exp(log_p - log_p.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    first = np.einsum("sj,sjn->n", shares, means) / num_draws
    second = np.einsum("sj,sjn->n", shares, means**2 + variances) / num_draws
    own_first, own_variance = part.moments
    share = shares.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shifted = np.nan_to_num(np.abs(first - own_first) / np.sqrt(own_variance), posinf=0.0)
        widened = np.nan_to_num(np.abs((second - first**2) / own_variance - 1), posinf=0.0)
    j, a, b = int(np.abs(share - weights).argmax()), int(shifted.argmax()), int(widened.argmax())
    variance = second - first**2
    moved = float(np.abs(share - weights)[j])
    return max(
        (moved / tuning.SIGNAL.share, f"component {j} a share of {share[j]:.3g}, not {weights[j]:.3g}"),
        (float(shifted[a]) / tuning.SIGNAL.mean, f"a mean of {first[a]:.3g}, not {own_first[a]:.3g}"),
        (float(widened[b]) / tuning.SIGNAL.variance, f"a variance of {variance[b]:.3g}, not {own_variance[b]:.3g}"),
    )


def _fewer(part: Gaussians, numbers: int) -> Gaussians:
    """Components chosen at random, with at most ``numbers`` entries in all their means."""
    count, n = part.means.shape
    kept = max(2, numbers // n)
    if count <= kept:
        return part
    chosen = np.random.default_rng(0).choice(count, kept, replace=False)
    return Gaussians(part.entries, part.log_weights[chosen], part.means[chosen], part.covariances[chosen]).normalised()
