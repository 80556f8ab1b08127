"""Measures of samples of a posterior, for any method."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp
from scipy.stats import chi2_contingency, wasserstein_distance


def coverage(samples: np.ndarray, truth: np.ndarray) -> float:
    """The share of entries of the truth (d,) inside the central 90 % of the samples (n,
    d)."""
    low, high = np.quantile(samples, [0.05, 0.95], axis=0)
    return float(np.mean((low <= truth) & (truth <= high)))


def crps(samples: np.ndarray, truth: np.ndarray) -> float:
    """E|x − truth| − ½E|x − x′|, the mean over entries: the smaller the better, and
    least of the right law."""
    ordered = np.sort(samples, axis=0)
    n = len(samples)
    ranks = (2 * np.arange(1, n + 1) - n - 1)[:, None]
    between = 2 * (ranks * ordered).sum(0) / (n * (n - 1))
    return float(np.mean(np.abs(samples - truth).mean(0) - 0.5 * between))


def apart(samples: np.ndarray, reference: np.ndarray) -> float:
    """Wasserstein's distance of an entry's law from that of the reference, over the
    latter's standard deviation, the mean over entries."""
    columns = zip(samples.T, reference.T, strict=True)
    return float(
        np.mean([wasserstein_distance(a, b) / max(b.std(), 1e-12) for a, b in columns])
    )


def sinkhorn(x: np.ndarray, y: np.ndarray, blur: float = 0.01) -> float:
    """The debiased Sinkhorn distance of equal numbers of points, √(S(x, y) − ½S(x, x) −
    ½S(y, y)) with S the entropic transport cost of ½‖·‖² under a regularisation of
    blur² (Feydy et al. 2019)."""
    value = _transport(x, y, blur**2) - 0.5 * (
        _transport(x, x, blur**2) + _transport(y, y, blur**2)
    )
    return float(np.sqrt(max(value, 0.0)))


def _transport(x: np.ndarray, y: np.ndarray, epsilon: float) -> float:
    costs = 0.5 * ((x[:, None] - y) ** 2).sum(-1)
    f = np.zeros(len(x))
    g = np.zeros(len(y))
    log_n = np.log(len(x))
    for heat in [
        *np.geomspace(max(costs.max(), epsilon), epsilon, 30),
        *[epsilon] * 100,
    ]:
        new_f = -heat * (logsumexp((g - costs) / heat, axis=1) - log_n)
        new_g = -heat * (logsumexp((f[:, None] - costs) / heat, axis=0) - log_n)
        f, g = (f + new_f) / 2, (g + new_g) / 2
    return float(f.mean() + g.mean())


def pqmass(
    x: np.ndarray, y: np.ndarray, seed: int = 0, regions: int = 20, repeats: int = 50
) -> float:
    """PQMass (Lemos et al. 2024, arXiv 2402.04355): χ² of the counts of two samples in
    Voronoi cells of randomly chosen points of both, over its degrees of freedom, the
    mean over choices: 1 where the laws are the same."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        both = np.concatenate([x, y])
        chosen = rng.permutation(len(both))[:regions]
        centres = both[chosen]
        left = np.ones(len(both), bool)
        left[chosen] = False
        cell = ((both[:, None] - centres) ** 2).sum(-1).argmin(1)
        first = np.arange(len(both)) < len(x)
        counts = np.array(
            [
                np.bincount(cell[left & which], minlength=regions)
                for which in (first, ~first)
            ]
        )
        counts = counts[:, counts.sum(0) > 0]
        statistic = chi2_contingency(counts)
        found.append(statistic.statistic / statistic.dof)
    return float(np.mean(found))
