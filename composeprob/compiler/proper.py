"""Propriety: check that a site can be normalised at every level, exactly where the
tails of its factors are those of Gaussians.

In a direction u and far out a mixture of Gaussians is its widest component there, so
log f ~ −½·r²·uᵀP(u)u with P(u) that component's precision. A product adds its factors'
precisions times their powers, a mixture takes the least. The site can be normalised if
and only if uᵀP(u)u > 0 in every direction u. A direction where it is not is sought by
turns: the components that are widest along u, then the u along which the sum of their
precisions is least. A site that is refused has been shown to be improper; among
mixtures of many unequal widths an improper one may be missed.

For a program with functions of the user's, `check_growth` follows the log-density at
level 0 outwards along rays.

For factors that are mixtures of Gaussians, `check_signal` checks that level 0 is clean
and that the noisiest level is noise alone. Chains start there from N(0, σ²). An exact
sampler would carry them to ∫ p(x₀ | x)·N(x; 0, σ²) dx, which is the factor's
distribution only where x does not depend on x₀. The difference of both distributions is
known in closed form: in the shares of the components, and in the mean and variance of
every entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Bool, Float

from composeprob import tuning
from composeprob.compiler.conjugate import NotGaussian, mixtures_of, refuse
from composeprob.compiler.expressions import project
from composeprob.compiler.top import top_of, unrolled
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position, over_chains
from composeprob.density.points import integrated, log_densities, slopes
from composeprob.errors import ImproperError, NetworkError
from composeprob.factors.classifier import Classifier
from composeprob.factors.gaussians import Gaussians
from composeprob.factors.nodes import Mixture, Product, at_noise, walk
from composeprob.factors.passes import Pass
from composeprob.ir.leaves import Graph, Leaf, Site, leaves
from composeprob.schedule import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Tail:
    """A precision that depends on the direction.

    Attributes:
        along: P(u) of a unit vector u: its diagonal (D,) over the flattened site, or
            the whole, (D, D).
        fixed: whether it is the same in every direction.
    """

    along: Callable[[np.ndarray], np.ndarray]
    fixed: bool = False


def square(matrix: np.ndarray, u: Float[np.ndarray, " d"]) -> float:
    """uᵀMu of a diagonal or a whole matrix."""
    if matrix.ndim == 1:
        return float(u @ (matrix * u))
    return float(u @ (matrix @ u))


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of diagonals or whole matrices."""
    if a.ndim == b.ndim:
        return a + b
    return whole_matrix(a) + whole_matrix(b)


def whole_matrix(matrix: np.ndarray) -> Float[np.ndarray, "d d"]:
    """A matrix that may be given by its diagonal."""
    return np.diag(matrix) if matrix.ndim == 1 else matrix


def widest(precisions: Iterable[np.ndarray], u: np.ndarray) -> np.ndarray:
    """The least uᵀMu of diagonals or whole matrices M."""
    return min(precisions, key=lambda matrix: square(matrix, u))


tail_of = Pass[Tail]("tail", refuse)
"""The tail of an expression over a site of this shape, under a schedule, at a level;
`NotGaussian` if none is known."""


@tail_of.rule(Leaf)
def _leaf_tail(
    leaf: Leaf, _: list[Tail], shape: tuple[int, ...], schedule: Schedule, level: int
) -> Tail:
    parts = known_parts(leaf)
    size = math.prod(shape)
    noise = schedule if leaf.own_noise is None else leaf.own_noise
    alpha = float(noise.alpha[level])
    sigma = float(noise.sigma[level])
    # The leaf sees x on the scale of its own schedule.
    ratio = alpha / float(schedule.alpha[level])
    whole = leaf.averaged > 1 or any(part.covariances.ndim == 3 for part in parts)
    if whole and size > 1024:
        # A matrix over so many entries would be too large.
        raise NotGaussian("it has too many entries")
    projection = _projection(leaf, shape) if whole else None
    # For each part the precisions of its components, over the whole site.
    choices: list[list[np.ndarray]] = []
    for part in parts:
        precisions = []
        # Components of one covariance have one tail, whatever their means are.
        for covariance in np.unique(part.covariances, axis=0):
            if projection is None:
                matrix = np.zeros(size)
                precision = ratio**2 / (alpha**2 * covariance + sigma**2)
                matrix[leaf.entries[part.entries]] = precision
            else:
                full = whole_matrix(covariance)
                noised = alpha**2 * full + sigma**2 * np.eye(len(full))
                rows = projection[part.entries]
                matrix = rows.T @ (ratio**2 * np.linalg.inv(noised)) @ rows
            precisions.append(matrix)
        choices.append(precisions)
    nothing = np.zeros((size, size)) if whole else np.zeros(size)

    def along(u: np.ndarray) -> np.ndarray:
        return reduce(add, [widest(precisions, u) for precisions in choices], nothing)

    fixed = all(len(precisions) == 1 for precisions in choices)
    return Tail(along, fixed)


def _projection(
    leaf: Leaf, shape: tuple[int, ...]
) -> Float[np.ndarray, "entries size"]:
    """The matrix from a flattened site to the leaf's flattened event."""
    identity: np.ndarray = np.eye(math.prod(shape))
    if leaf.averaged == 1:
        return identity[leaf.entries]
    # Block averages of every unit vector; in NumPy, so that nothing is compiled.
    units = identity.reshape(-1, *shape)
    return np.stack([project(unit, leaf.region, (-1,)) for unit in units], 1)


@tail_of.rule(Product)
def _product_tail(node: Product, tails: list[Tail], *_: object) -> Tail:
    # ∏ f_i^w_i falls as exp(−½·r²·Σ w_i·uᵀP_i(u)u).
    pairs = node.each(tails)

    def along(u: np.ndarray) -> np.ndarray:
        return reduce(add, [power * tail.along(u) for power, tail in pairs])

    return Tail(along, all(tail.fixed for tail in tails))


@tail_of.rule(Mixture)
def _mixture_tail(node: Mixture, tails: list[Tail], *_: object) -> Tail:
    return Tail(lambda u: widest((tail.along(u) for tail in tails), u))


def known_parts(leaf: Leaf) -> list[Gaussians]:
    """Gaussian mixtures over different entries that make up the density of a leaf
    without noise.

    `NotGaussian` is raised for a leaf of another form, or of unknown numbers. Logits,
    which grow no faster than x, have no entries.
    """
    if isinstance(leaf.factor, Classifier) and leaf.latent is None:
        return []
    return mixtures_of(leaf, boxes=True)


def check_tails(graph: Graph) -> None:
    """Refuse a site that cannot be normalised at some level, as far as the tails of its
    factors are known. Sites without negative powers pass, and so do sites that
    observations depend on, as these may make them proper."""
    observed = frozenset[str]().union(*(o.depends_on for o in graph.observations))
    for site in graph.sites:
        products = [node for node in walk(site.root) if isinstance(node, Product)]
        divides = any(min(node.powers) < 0 for node in products)
        if divides and site.name not in observed:
            _check_site(site, graph.levels)


def _check_site(site: Site, schedule: Schedule) -> None:
    """Refuse a site that is improper at one of about nine levels, or almost improper at
    level 0."""
    root = unrolled(site.root)
    last = schedule.num_levels - 1
    size = math.prod(site.shape)
    for level in np.unique(np.linspace(0, last, 9).round().astype(int)):
        try:
            here = at_noise(root, _variance(schedule, int(level)))
            worst = least(tail_of(here, site.shape, schedule, int(level)), size)
        except NotGaussian:
            return
        if worst <= 0:
            raise ImproperError(
                f"Site {site.name!r} is improper at level {level} of {last}: along "
                "some direction the precisions of its factors, times their powers, add "
                f"up to {worst:.3g}, so its density does not fall there.",
                where=site.where,
                fix="a factor that divides must be wider than the one it divides: "
                "N(0, s²) ** v / N(0, t²) ** w needs v/s² > w/t². Make the negative "
                "powers smaller, or multiply a narrower factor.",
            )
        top = top_of(at_noise(root, _variance(schedule, last)), site.shape)
        power = float(top.power.min())
        # Both in the data's units, x/α.
        sd = float(schedule.alpha[0]) / math.sqrt(worst)
        noise = (
            float(schedule.sigma[last]) / float(schedule.alpha[last]) / math.sqrt(power)
        )
        if level == 0 and sd > 0.5 * noise:
            raise ImproperError(
                f"Site {site.name!r} is almost improper: its standard deviation is "
                f"{sd:.3g} along some direction, which the noisiest level, of standard "
                f"deviation {noise:.3g} in the data's units, does not hide.",
                where=site.where,
                fix="make the negative powers smaller, or use a schedule with a "
                "noisier last level: a lower min= in cp.Schedule.log_snr, a larger "
                "sigma_max= in cp.Schedule.edm.",
            )


def _variance(schedule: Schedule, level: int) -> float:
    return float(schedule.sigma[level] / schedule.alpha[level]) ** 2


def least(tail: Tail, size: int) -> float:
    """The least uᵀP(u)u over the unit vectors u that a search visits."""
    # Where the precision depends on u, the search starts from several directions and
    # improves each several times.
    starts = 1 if tail.fixed else 6
    turns = 1 if tail.fixed else 4
    smallest = math.inf
    for u in np.random.default_rng(0).standard_normal((starts, size)):
        for _ in range(turns):
            u = narrowest(tail.along(u))
            smallest = min(smallest, square(tail.along(u), u))
    return smallest


def narrowest(precision: np.ndarray) -> np.ndarray:
    """The unit vector along which a symmetric matrix is least."""
    if precision.ndim == 1:
        return np.eye(1, len(precision), int(precision.argmin()))[0]
    return np.linalg.eigh(precision)[1][:, 0]


def check_signal(graph: Graph) -> None:
    """Refuse a level 0 of more noise than data, and a noisiest level that still depends
    on a factor's data, with the statistics that would come out wrong."""
    clean = 2 * math.log(float(graph.levels.alpha[0]) / float(graph.levels.sigma[0]))
    if clean < 0 and len(graph.levels.alpha) > 1:
        raise ImproperError(
            f"Level 0 is more noise than data: its log-SNR is {clean:.3g}, and samples "
            "would be as noisy.",
            fix="end at a clean level: cp.Schedule.log_snr(60, max=8), or "
            "levels=np.linspace(8, -8, 60).",
        )
    for site in graph.sites:
        # Equal leaves have one slot, and are examined once.
        by_slot = {leaf.slot: leaf for leaf in leaves(site.root)}
        for leaf in by_slot.values():
            with contextlib.suppress(NotGaussian):
                for part in known_parts(leaf):
                    _check_part(part, leaf, site, graph.levels)


def _check_part(part: Gaussians, leaf: Leaf, site: Site, schedule: Schedule) -> None:
    """Refuse a noisiest level that depends on the data of one mixture of a leaf."""
    noise = schedule if leaf.own_noise is None else leaf.own_noise
    alpha = float(noise.alpha[-1])
    sigma = float(noise.sigma[-1])
    signal = alpha / sigma * reach(part)
    if signal <= tuning.SIGNAL.hidden:
        return
    # Data that reach far need not show: only statistics that come out wrong do.
    error, what = bias(part, alpha, sigma)
    if error <= 1:
        return
    log_snr = 2 * math.log(alpha / sigma)
    # The signal is proportional to the square root of the SNR.
    better = math.floor(log_snr - 2 * math.log(signal / tuning.SIGNAL.hidden))
    count = len(noise.alpha)
    raise ImproperError(
        f"The noisiest level is not noise alone for factor '{leaf.name}' at site "
        f"{site.name!r}: its log-SNR is {log_snr:.3g}, and started from noise even an "
        f"exact sampler would give {what}.",
        where=site.where,
        fix="compile with a noisier last level: cp.compile(…, "
        f"schedule=cp.Schedule.log_snr({count}, min={better:g})), or bring the data to "
        "a scale of about 1 around 0.",
    )


def reach(part: Gaussians) -> float:
    """√(‖μ‖² + λ) of a component of mean μ and greatest variance λ, the maximum over
    components: data lie within this distance from 0."""
    distance = np.sum(part.means**2, 1)
    if part.covariances.ndim == 2:
        widths = part.covariances.max(1)
    else:
        widths = np.linalg.eigvalsh(part.covariances)[:, -1]
    return float(np.sqrt((distance + widths).max()))


class _Posterior(NamedTuple):
    """The distribution of x₀ given each of several x, as a mixture of Gaussians.

    Attributes:
        shares: responsibilities of the components.
        means: their means.
        variances: their variances, which do not depend on x.
    """

    shares: Float[np.ndarray, "draws components"]
    means: Float[np.ndarray, "draws components d"]
    variances: Float[np.ndarray, "components d"]


def _posterior(
    part: Gaussians, x: Float[np.ndarray, "draws d"], alpha: float, sigma: float
) -> _Posterior:
    """p(x₀ | x) of x = α·x₀ + σ·ε.

    Component N(μ, C) has S = α²·C + σ²·I, log p(x) = log N(x; α·μ, S), and given x the
    mean μ + α·C·S⁻¹·(x − α·μ) and the covariance σ²·C·S⁻¹.
    """
    count, n = part.means.shape
    draws = len(x)
    log_p = np.empty((draws, count))
    means = np.empty((draws, count, n))
    variances = np.empty((count, n))
    for j, mean in enumerate(part.means):
        covariance = part.covariances[j]
        away = x - alpha * mean
        # In the basis of eigenvectors of C everything is diagonal.
        widths = covariance
        basis = None
        if covariance.ndim == 2:
            widths, basis = np.linalg.eigh(covariance)
            away = away @ basis
        spread = alpha**2 * widths + sigma**2
        log_p[:, j] = part.log_weights[j] - 0.5 * np.sum(
            away**2 / spread + np.log(spread), 1
        )
        shift = alpha * widths / spread * away
        left = widths * sigma**2 / spread
        if basis is not None:
            shift = shift @ basis.T
            left = basis**2 @ left
        means[:, j] = mean + shift
        variances[j] = left
    shares = np.exp(log_p - log_p.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return _Posterior(shares, means, variances)


def bias(
    part: Gaussians, alpha: float, sigma: float, num_draws: int = 1024
) -> tuple[float, str]:
    """The greatest bias of antithetic draws of N(0, σ²) at the noisiest level in place
    of draws of α·x₀ + σ·ε, with x₀ from ``part``: its size in units of the tolerated
    error, and the statistic in words."""
    part = _fewer(part.normalised(), 2**24 // num_draws)
    weights = np.exp(part.log_weights)
    n = part.means.shape[1]
    # Antithetic draws have the mean 0 exactly, so that no error of it is theirs.
    half = np.random.default_rng(0).standard_normal((num_draws // 2, n))
    x = sigma * np.concatenate([half, -half])
    shares, means, variances = _posterior(part, x, alpha, sigma)
    mean = np.einsum("sj,sjn->n", shares, means) / num_draws
    second = np.einsum("sj,sjn->n", shares, means**2 + variances) / num_draws
    variance = second - mean**2
    share = shares.mean(0)
    true_mean, true_variance = part.moments
    # An entry without variance has infinite errors, and is left out.
    with np.errstate(divide="ignore", invalid="ignore"):
        shifted = np.nan_to_num(
            np.abs(mean - true_mean) / np.sqrt(true_variance), posinf=0.0
        )
        widened = np.nan_to_num(np.abs(variance / true_variance - 1), posinf=0.0)
    moved = np.abs(share - weights)
    j = int(moved.argmax())
    a = int(shifted.argmax())
    b = int(widened.argmax())
    return max(
        (
            float(moved[j]) / tuning.SIGNAL.share,
            f"component {j} a share of {share[j]:.3g}, not {weights[j]:.3g}",
        ),
        (
            float(shifted[a]) / tuning.SIGNAL.mean,
            f"a mean of {mean[a]:.3g}, not {true_mean[a]:.3g}",
        ),
        (
            float(widened[b]) / tuning.SIGNAL.variance,
            f"a variance of {variance[b]:.3g}, not {true_variance[b]:.3g}",
        ),
    )


def _fewer(part: Gaussians, numbers: int) -> Gaussians:
    """Components chosen at random, with at most ``numbers`` entries in all their
    means."""
    count, n = part.means.shape
    kept = max(2, numbers // n)
    if count <= kept:
        return part
    chosen = np.random.default_rng(0).choice(count, kept, replace=False)
    return Gaussians(
        part.entries,
        part.log_weights[chosen],
        part.means[chosen],
        part.covariances[chosen],
    ).normalised()


def check_growth(density: AnnealedDensity, graph: Graph) -> None:
    """Refuse a program whose log-density at level 0 rises without bound, where a
    function of the user's does, or is flat, where there is nothing else.

    It is followed along rays from 0, from a quarter of the noise of the noisiest level,
    beyond which no data can lie, to four times that. Networks are evaluated only where
    the user's functions rise all the way.
    """
    factors = [leaf.factor for site in graph.sites for leaf in leaves(site.root)]
    energies = [factor.traits.user_defined for factor in factors]
    soft = any(o.soft for o in graph.observations)
    if not graph.sites or not (any(energies) or soft):
        return
    arrays = jax.tree.leaves(density)
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return
    radii = tuning.SIGNAL.radii
    noise = float(density.schedule.sigma[-1] / density.schedule.alpha[-1])
    rays = _rays(sum(math.prod(site.shape) for site in graph.sites))
    shape = (len(radii), len(rays))

    # Values of the user's functions alone, which take no network. Only where these
    # rise can their product with densities rise.
    potential = partial(
        over_chains, eqx.Partial(density.evaluator.user_potential, level=0)
    )
    positions = _positions(density, graph, rays, tuple(noise * r for r in radii))
    potentials = np.asarray(potential(positions), float).reshape(shape)
    if np.isnan(potentials).all():
        near = potential(_positions(density, graph, rays, radii))
        if np.isnan(near).all():
            raise NetworkError(
                "The program's functions are NaN at all of "
                f"{2 * potentials.size} points, near and far.",
                where=graph.sites[0].where,
                fix="evaluate each at one event, and look for logarithms or roots of "
                "negative numbers, for 0/0, and for NaN in the data.",
            )
    if not _improper(potentials, all(energies)).any():
        return
    if "energy" in density.capabilities:
        values = log_densities(density, positions).reshape(shape)
    else:
        outwards = _positions(density, graph, rays, (1.0,) * len(radii))
        along = slopes(density, positions, outwards).reshape(shape)
        values = integrated(along, noise * np.diff(radii)[:, None])
    improper = _improper(values, all(energies))
    if not improper.any():
        return
    # The ray that rises most is named, by the entry that changes most along it.
    worst = int(np.argmax(np.where(improper, values[-1] - values[0], -np.inf)))
    site = _site_of(graph, int(np.argmax(np.abs(rays[worst]))))
    start = noise * radii[0]
    end = noise * radii[-1]
    raise ImproperError(
        f"The log-density is unbounded or flat along a direction in {site.name!r}, so "
        f"it cannot be normalised: from a distance of {start:.3g} to {end:.3g} log π "
        f"at level 0 changes by {values[-1, worst] - values[0, worst]:.3g}.",
        where=site.where,
        fix="check the sign: cp.Energy and cp.factor take log f, which falls far out, "
        "such as −½|x|², or rises more slowly than the other factors fall.",
    )


def _rays(entries: int) -> Float[np.ndarray, "rays entries"]:
    """Unit vectors: at most half of them both ways along axes, the others in random
    directions."""
    number = tuning.SHARES.block // len(tuning.SIGNAL.radii)
    axes = np.eye(entries)[: number // 4]
    others = np.random.default_rng(0).standard_normal((number - 2 * len(axes), entries))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    return np.concatenate([axes, -axes, others])


def _positions(
    density: AnnealedDensity,
    graph: Graph,
    rays: Float[np.ndarray, "rays entries"],
    radii: tuple[float, ...],
) -> Position:
    """The points at these distances from 0 along rays in the noised sites, with static
    sites at 0; radii vary slowest."""
    entries = rays.shape[1]
    points = (np.array(radii)[:, None, None] * rays).reshape(-1, entries)
    points = points.astype(np.float32)
    positions = {
        name: np.zeros((len(points), *site.shape), np.float32)
        for name, site in density.sites.items()
    }
    start = 0
    for site in graph.sites:
        end = start + math.prod(site.shape)
        positions[site.name] = points[:, start:end].reshape(-1, *site.shape)
        start = end
    return positions


def _site_of(graph: Graph, entry: int) -> Site:
    """The site of an entry, with the entries of all sites counted one site after
    another."""
    ends = np.cumsum([math.prod(site.shape) for site in graph.sites])
    return graph.sites[int(np.searchsorted(ends, entry, side="right"))]


def _improper(values: np.ndarray, whole: bool) -> Bool[np.ndarray, " rays"]:
    """True for rays along which values, (radii, rays), rise by more than a nat from
    each radius to the next; of the ``whole`` density also for rays of constant values.
    """
    with np.errstate(invalid="ignore"):
        steps = np.diff(values, axis=0)
        rises = np.all(steps > 1, axis=0)
        flat = np.all(steps == 0, axis=0)
    return rises | (whole & flat)
