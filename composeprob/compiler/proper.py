"""Whether a site can be normalised at every level: exactly, where the tails of its
factors are those of Gaussians.

In a direction u and far out a mixture of Gaussians is its widest component there, so
log f ~ −½·r²·uᵀP(u)u with P(u) that component's precision. A product adds its factors'
precisions times their powers, a mixture takes the least. The site can be normalised if
and only if uᵀP(u)u > 0 in every direction u. One where it is not is sought by turns:
the components that are widest along u, then the u along which the sum of their
precisions is least. What is refused has been shown to be improper; among mixtures of
many unequal widths one may be missed.

Of a program with functions of the user's the log-density at level 0 is followed out
along rays (`check_growth`).

For factors that are mixtures of Gaussians `check_signal` asks whether level 0 is clean,
and the noisiest level noise alone. Chains start there from N(0, σ²). Were the way down
exact, they would arrive at ∫ p(x₀ | x)·N(x; 0, σ²) dx, which is the factor's
distribution only where x does not depend on x₀. How far that is from the distribution
is known in closed form: the shares of the components, and the mean and variance of
every entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial, reduce

import equinox as eqx
import jax
import numpy as np

from composeprob import tuning
from composeprob.compiler.conjugate import NotGaussian, mixtures_of, refuse
from composeprob.compiler.expressions import project
from composeprob.compiler.top import top_of, unrolled
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position, over_chains
from composeprob.density.points import log_densities
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


def square(matrix: np.ndarray, u: np.ndarray) -> float:
    """uᵀMu of a diagonal or a whole matrix."""
    return float(u @ (matrix * u if matrix.ndim == 1 else matrix @ u))


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of diagonals or whole matrices."""
    if a.ndim == b.ndim:
        return a + b
    return (np.diag(a) if a.ndim == 1 else a) + (np.diag(b) if b.ndim == 1 else b)


def widest(precisions: Iterable[np.ndarray], u: np.ndarray) -> np.ndarray:
    """The least of diagonals or whole matrices along u."""
    return min(precisions, key=lambda matrix: square(matrix, u))


tail_of = Pass[Tail]("tail", refuse)
"""The tail of an expression over a site of this shape, under a schedule, at a level;
`NotGaussian` if none is known."""


@tail_of.rule(Leaf)
def _leaf_tail(
    leaf: Leaf, _: list[Tail], shape: tuple[int, ...], schedule: Schedule, level: int
) -> Tail:
    parts, size = known_parts(leaf), math.prod(shape)
    noise = schedule if leaf.own_noise is None else leaf.own_noise
    alpha, sigma = float(noise.alpha[level]), float(noise.sigma[level])
    ratio = alpha / float(schedule.alpha[level])
    whole = leaf.averaged > 1 or any(part.covariances.ndim == 3 for part in parts)
    if whole and size > 1024:  # no matrix over so many entries is made
        raise NotGaussian("it has too many entries")
    entries = leaf.entries
    projection = (
        np.eye(size)[entries] if whole else None
    )  # takes the flattened site to the flattened event
    if leaf.averaged > 1:
        units: np.ndarray = np.eye(size).reshape(-1, *shape)  # on the host
        projection = np.stack([project(unit, leaf.region, (-1,)) for unit in units], 1)
    choices: list[
        list[np.ndarray]
    ] = []  # for each part the precisions of its components
    for part in parts:
        choices.append([])
        for covariance in np.unique(part.covariances, axis=0):
            if projection is None:
                matrix = np.zeros(size)
                matrix[entries[part.entries]] = ratio**2 / (
                    alpha**2 * covariance + sigma**2
                )
            else:
                full = np.diag(covariance) if covariance.ndim == 1 else covariance
                precision = ratio**2 * np.linalg.inv(
                    alpha**2 * full + sigma**2 * np.eye(len(full))
                )
                rows = projection[part.entries]
                matrix = rows.T @ precision @ rows
            choices[-1].append(matrix)
    nothing = np.zeros((size, size) if whole else size)
    fixed = all(len(each) == 1 for each in choices)
    return Tail(
        lambda u: reduce(add, [widest(each, u) for each in choices], nothing), fixed
    )


@tail_of.rule(Product)
def _product_tail(node: Product, tails: list[Tail], *_: object) -> Tail:
    pairs, fixed = node.each(tails), all(tail.fixed for tail in tails)
    return Tail(
        lambda u: reduce(add, [power * tail.along(u) for power, tail in pairs]), fixed
    )


@tail_of.rule(Mixture)
def _mixture_tail(node: Mixture, tails: list[Tail], *_: object) -> Tail:
    return Tail(lambda u: widest((tail.along(u) for tail in tails), u))


def known_parts(leaf: Leaf) -> list[Gaussians]:
    """The mixtures of Gaussians over different entries that a leaf is without noise;
    `NotGaussian` where it is none, or where its numbers are not known. Logits, which
    grow no faster than x, have no entries."""
    if isinstance(leaf.factor, Classifier) and leaf.latent is None:
        return []
    return mixtures_of(leaf, boxes=True)


def check_tails(graph: Graph) -> None:
    """Refuse a site that cannot be normalised at some level, as far as the tails of its
    factors are known. Nothing is asked where no power is negative, nor where
    observations depend on the site and may make it proper."""
    observed = frozenset[str]().union(*(o.depends_on for o in graph.observations))
    for site in graph.sites:
        divides = any(
            isinstance(node, Product) and min(node.powers) < 0
            for node in walk(site.root)
        )
        if divides and site.name not in observed:
            _check_site(site, graph.levels)


def _check_site(site: Site, schedule: Schedule) -> None:
    root, last, size = (
        unrolled(site.root),
        schedule.num_levels - 1,
        math.prod(site.shape),
    )
    for level in np.unique(np.linspace(0, last, 9).round().astype(int)):
        try:
            here = at_noise(root, _variance(schedule, int(level)))
            worst = least(tail_of(here, site.shape, schedule, int(level)), size)
        except NotGaussian:
            return
        if worst <= 0:
            raise ImproperError(
                f"Site {site.name!r} is improper at level {level} of {last}: along some direction the precisions of "
                f"its factors, times their powers, add up to {worst:.3g}, so its density does not fall there.",
                where=site.where,
                fix="what divides must be wider than what it divides: N(0, s²) ** v / N(0, t²) ** w needs v/s² > w/t². "
                "Make the negative powers smaller, or multiply a narrower factor.",
            )
        power = float(
            top_of(at_noise(root, _variance(schedule, last)), site.shape).power.min()
        )
        sd = float(schedule.alpha[0]) / math.sqrt(worst)
        noise = (
            float(schedule.sigma[last]) / float(schedule.alpha[last]) / math.sqrt(power)
        )
        if level == 0 and sd > 0.5 * noise:
            raise ImproperError(
                f"Site {site.name!r} is almost improper: its standard deviation is {sd:.3g} along some direction, "
                f"which the noisiest level, of standard deviation {noise:.3g} in the data's units, does not hide.",
                where=site.where,
                fix="make the negative powers smaller, or use a schedule with a noisier last level: a lower min= in "
                "cp.Schedule.log_snr, a larger sigma_max= in cp.Schedule.edm.",
            )


def _variance(schedule: Schedule, level: int) -> float:
    return float(schedule.sigma[level] / schedule.alpha[level]) ** 2


def least(tail: Tail, size: int) -> float:
    """The least uᵀP(u)u that was found over unit vectors u."""
    # Where the precision depends on u: directions to start from, and how often each is
    # improved.
    tries, turns = (1, 1) if tail.fixed else (6, 4)
    found = math.inf
    for u in np.random.default_rng(0).standard_normal((tries, size)):
        for _ in range(turns):
            u = narrowest(tail.along(u))
            found = min(found, square(tail.along(u), u))
    return found


def narrowest(precision: np.ndarray) -> np.ndarray:
    """The unit vector along which a symmetric matrix is least."""
    if precision.ndim == 1:
        return np.eye(1, len(precision), int(precision.argmin()))[0]
    return np.linalg.eigh(precision)[1][:, 0]


def check_signal(graph: Graph) -> None:
    """Refuse levels that end in noise, or whose noisiest one still depends on a
    factor's data, with what would come out wrong."""
    clean = 2 * math.log(float(graph.levels.alpha[0]) / float(graph.levels.sigma[0]))
    if clean < 0 and len(graph.levels.alpha) > 1:
        raise ImproperError(
            f"Level 0 is more noise than data: its log-SNR is {clean:.3g}, and samples would be as noisy.",
            fix="end at a clean level: cp.Schedule.log_snr(60, max=8), or levels=np.linspace(8, -8, 60).",
        )
    for site in graph.sites:
        for leaf in {
            leaf.slot: leaf for leaf in leaves(site.root)
        }.values():  # equal leaves are one
            with contextlib.suppress(NotGaussian):
                for part in known_parts(leaf):
                    _check_part(part, leaf, site, graph.levels)


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
    """The distance of the farthest component's middle from 0, and its greatest standard
    deviation, together."""
    distance = np.sum(part.means**2, 1)
    widths = (
        part.covariances.max(1)
        if part.covariances.ndim == 2
        else np.linalg.eigvalsh(part.covariances)[:, -1]
    )
    return float(np.sqrt((distance + widths).max()))


def bias(
    part: Gaussians, alpha: float, sigma: float, num_draws: int = 1024
) -> tuple[float, str]:
    """What is most off where antithetic draws of N(0, σ²) at the noisiest level are
    taken for draws of α·x₀ + σ·ε, x₀ from ``part``: (how far, in parts of what is
    tolerated, and what)."""
    part = _fewer(part.normalised(), 2**24 // num_draws)
    weights, (count, n) = np.exp(part.log_weights), part.means.shape
    half = np.random.default_rng(0).standard_normal((num_draws // 2, n))
    x = sigma * np.concatenate([half, -half])
    log_p, means, variances = (
        np.empty((num_draws, count)),
        np.empty((num_draws, count, n)),
        np.empty((count, n)),
    )
    for j, (mean, covariance) in enumerate(
        zip(part.means, part.covariances, strict=True)
    ):
        widths, basis = (
            (covariance, None) if covariance.ndim == 1 else np.linalg.eigh(covariance)
        )
        away = x - alpha * mean
        away = away if basis is None else away @ basis
        spread = alpha**2 * widths + sigma**2
        log_p[:, j] = part.log_weights[j] - 0.5 * np.sum(
            away**2 / spread + np.log(spread), 1
        )
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
        shifted = np.nan_to_num(
            np.abs(first - own_first) / np.sqrt(own_variance), posinf=0.0
        )
        widened = np.nan_to_num(
            np.abs((second - first**2) / own_variance - 1), posinf=0.0
        )
    j, a, b = (
        int(np.abs(share - weights).argmax()),
        int(shifted.argmax()),
        int(widened.argmax()),
    )
    variance = second - first**2
    moved = float(np.abs(share - weights)[j])
    return max(
        (
            moved / tuning.SIGNAL.share,
            f"component {j} a share of {share[j]:.3g}, not {weights[j]:.3g}",
        ),
        (
            float(shifted[a]) / tuning.SIGNAL.mean,
            f"a mean of {first[a]:.3g}, not {own_first[a]:.3g}",
        ),
        (
            float(widened[b]) / tuning.SIGNAL.variance,
            f"a variance of {variance[b]:.3g}, not {own_variance[b]:.3g}",
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
    function of the user's does, or is flat, where there is nothing else. It is followed
    out along rays from 0, from a quarter of the noise of the noisiest level, beyond
    which no data can lie, to four times that. Only where the user's functions rise all
    the way is anything else evaluated."""
    plain = [
        leaf.factor.traits.user_defined
        for site in graph.sites
        for leaf in leaves(site.root)
    ]
    if not any(plain) and not any(o.soft for o in graph.observations):
        return
    if not graph.sites or any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(density)
    ):
        return
    noise = float(density.schedule.sigma[-1] / density.schedule.alpha[-1])
    entries = sum(math.prod(site.shape) for site in graph.sites)
    number = tuning.SHARES.block // len(tuning.SIGNAL.radii)
    axes = np.eye(entries)[: number // 4]
    others = np.random.default_rng(0).standard_normal((number - 2 * len(axes), entries))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    rays = np.concatenate([axes, -axes, others])
    ends = np.cumsum([0, *(math.prod(site.shape) for site in graph.sites)])
    shape = len(tuning.SIGNAL.radii), number

    def along(radii: tuple[float, ...]) -> Position:
        points = (
            (np.array(radii)[:, None, None] * rays)
            .reshape(-1, entries)
            .astype(np.float32)
        )
        positions = {
            name: np.zeros((len(points), *s.shape), np.float32)
            for name, s in density.sites.items()
        }
        parts = zip(graph.sites, ends[:-1], ends[1:], strict=True)
        return positions | {
            site.name: points[:, a:b].reshape(-1, *site.shape) for site, a, b in parts
        }

    # What the user's functions are worth, without a network.
    potential = partial(
        over_chains, eqx.Partial(density.evaluator.user_potential, level=0)
    )
    positions = along(tuple(noise * radius for radius in tuning.SIGNAL.radii))
    potentials = np.asarray(potential(positions), float).reshape(shape)
    if (
        np.isnan(potentials).all()
        and np.isnan(potential(along(tuning.SIGNAL.radii))).all()
    ):
        raise NetworkError(
            f"The program's functions are NaN at all of {2 * potentials.size} points, near and far.",
            where=graph.sites[0].where,
            fix="evaluate each at one event: a logarithm or a root of what is negative, 0/0, or data that hold NaN.",
        )
    if not _improper(potentials, all(plain)).any():
        return
    values = log_densities(density, positions).reshape(shape)
    improper = _improper(values, all(plain))
    if not improper.any():
        return
    worst = int(np.argmax(np.where(improper, values[-1] - values[0], -np.inf)))
    entry = int(np.argmax(np.abs(rays[worst])))
    site = graph.sites[int(np.searchsorted(ends, entry, side="right")) - 1]
    near, far = (
        noise * radius for radius in (tuning.SIGNAL.radii[0], tuning.SIGNAL.radii[-1])
    )
    raise ImproperError(
        f"The density rises without bound, or nowhere falls: on a ray along which {site.name!r} changes most, log π at "
        f"level 0 is {values[0, worst]:.3g} at a distance of {near:.3g}, and {values[-1, worst]:.3g} at {far:.3g}.",
        where=site.where,
        fix="an energy is log f: cp.Energy and cp.factor take a function that falls far out, such as −½|x|², or rises "
        "more slowly than what it is multiplied with falls. Look at its sign.",
    )


def _improper(values: np.ndarray, whole: bool) -> np.ndarray:
    """Along which rays values, (radii, rays), rise by more than a nat from each radius
    to the next, (rays,); or are all the same, where they are the ``whole``
    density's."""
    with np.errstate(invalid="ignore"):
        steps = np.diff(values, axis=0)
        return np.all(steps > 1, axis=0) | (whole & np.all(steps == 0, axis=0))
