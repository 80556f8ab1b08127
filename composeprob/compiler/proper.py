"""Whether a site can be normalised at every level: exactly, where the tails of its factors are those of Gaussians.

It can if and only if uᵀP(u)u > 0 in every direction u (`tails`). A direction where it is not is sought by turns: the
components that are widest along u, then the u along which the sum of their precisions is least. What is refused has
been shown to be improper; among mixtures of many unequal widths one may be missed.

Of a program with functions of the user's the log-density at level 0 is followed out along rays (`check_growth`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.compiler.tails import Tail, Undecided, known_parts, square, tail_of
from composeprob.compiler.top import top_of
from composeprob.compiler.unroll import unrolled
from composeprob.density.barriers import log_densities
from composeprob.errors import ImproperError
from composeprob.factors.nodes import at_noise, walk
from composeprob.ir.nodes import Graph, Site, leaves
from composeprob.schedule import Schedule

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity
    from composeprob.density.evaluation import Position


def check_tails(graph: Graph) -> None:
    """Refuse a site that cannot be normalised at some level, as far as the tails of its factors are known.

    Nothing is asked where no power is negative, nor where observations depend on the site and may make it proper.

    Raises:
        ImproperError: with the level and the precision found there.
    """
    assert graph.schedule is not None
    observed = frozenset[str]().union(*(o.depends_on for o in graph.observations))
    for site in graph.sites:
        divides = any(node.divides for node in walk(site.root))
        if divides and site.name not in observed:
            _check_site(site, graph.schedule)


def _check_site(site: Site, schedule: Schedule) -> None:
    root = unrolled(site.root)
    known = {id(leaf): known_parts(leaf) for leaf in leaves(root)}
    parts = {leaf: found for leaf, found in known.items() if found is not None}
    if len(parts) < len(known):
        return
    last, size = schedule.num_levels - 1, math.prod(site.shape)
    for level in np.unique(np.linspace(0, last, 9).round().astype(int)):
        try:
            here = at_noise(root, _variance(schedule, int(level)))
            worst = least(tail_of(here, parts, site.shape, schedule, int(level)), size)
        except Undecided:
            return
        if worst <= 0:
            raise ImproperError(
                f"Site {site.name!r} is improper at level {level} of {last}: along some direction the precisions of "
                f"its factors, times their powers, add up to {worst:.3g}, so its density does not fall there.",
                where=site.where,
                fix="what divides must be wider than what it divides: N(0, s²) ** v / N(0, t²) ** w needs v/s² > w/t². "
                "Make the negative powers smaller, or multiply a narrower factor.",
            )
        power = float(top_of(at_noise(root, _variance(schedule, last)), site.shape).power.min())
        sd = float(schedule.alpha[0]) / math.sqrt(worst)
        noise = float(schedule.sigma[last]) / float(schedule.alpha[last]) / math.sqrt(power)
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
    # Where the precision depends on u: directions to start from, and how often each is improved.
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


def check_growth(density: AnnealedDensity, graph: Graph) -> None:
    """Refuse a program whose log-density at level 0 rises without bound, where a function of the user's does.

    It is followed out along rays from 0, from a quarter of the noise of the noisiest level, beyond which no data can
    lie, to four times that. Only where the user's functions rise all the way is anything else evaluated.

    Raises:
        ImproperError: with by how much it rises, and along which entry most.
    """
    energies = any(leaf.factor.traits.plain for site in graph.sites for leaf in leaves(site.root))
    if not energies and not any(o.soft for o in graph.observations):
        return
    if not graph.sites or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(density)):
        return
    noise = float(density.schedule.sigma[-1] / density.schedule.alpha[-1])
    entries = sum(math.prod(site.shape) for site in graph.sites)
    number = tuning.SHARES.block // len(tuning.SIGNAL.radii)
    axes = np.eye(entries)[: number // 4]
    others = np.random.default_rng(0).standard_normal((number - 2 * len(axes), entries))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    rays = np.concatenate([axes, -axes, others])
    positions = {
        name: np.zeros((number * len(tuning.SIGNAL.radii), *s.shape), np.float32) for name, s in density.sites.items()
    }
    points = (np.array(tuning.SIGNAL.radii)[:, None, None] * noise * rays).reshape(-1, entries)
    ends = np.cumsum([0, *(math.prod(site.shape) for site in graph.sites)])
    for site, begin, end in zip(graph.sites, ends[:-1], ends[1:], strict=True):
        positions[site.name] = points[:, begin:end].reshape(-1, *site.shape).astype(np.float32)
    shape = len(tuning.SIGNAL.radii), number
    if not _rising(np.asarray(_potentials(density, positions), float).reshape(shape)).any():
        return
    values = log_densities(density, positions).reshape(shape)
    rising = _rising(values)
    if not rising.any():
        return
    worst = int(np.argmax(np.where(rising, values[-1] - values[0], -np.inf)))
    entry = int(np.argmax(np.abs(rays[worst])))
    site = graph.sites[int(np.searchsorted(ends, entry, side="right")) - 1]
    near, far = (noise * radius for radius in (tuning.SIGNAL.radii[0], tuning.SIGNAL.radii[-1]))
    raise ImproperError(
        f"The density rises without bound: on a ray along which {site.name!r} changes most, log π at level 0 grows "
        f"from {values[0, worst]:.3g} at a distance of {near:.3g} to {values[-1, worst]:.3g} at {far:.3g}.",
        where=site.where,
        fix="an energy is log f: cp.Energy and cp.factor take a function that falls far out, such as −½|x|², or rises "
        "more slowly than what it is multiplied with falls. Look at its sign.",
    )


def _rising(values: np.ndarray) -> np.ndarray:
    """Along which rays values, (radii, rays), rise by more than a nat from each radius to the next, (rays,)."""
    with np.errstate(invalid="ignore"):
        return np.all(np.diff(values, axis=0) > 1, axis=0)


@eqx.filter_jit
def _potentials(density: AnnealedDensity, positions: Position) -> Array:
    """What the user's functions are worth, without a network, (M,)."""
    return jax.vmap(lambda position: density.evaluator.plain_potential(position, 0))(positions)
