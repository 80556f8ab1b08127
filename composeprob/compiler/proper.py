"""Whether a site can be normalised at every level: exactly, where the tails of its factors are those of Gaussians.

It can if and only if uᵀP(u)u > 0 in every direction u (`tails`). A direction where it is not is sought by turns: the
components that are widest along u, then the u along which the sum of their precisions is least. What is refused has
been shown to be improper; among mixtures of many unequal widths one may be missed.
"""

from __future__ import annotations

import math

import numpy as np

from composeprob.compiler.tails import Tail, Undecided, known_parts, square, tail_of
from composeprob.compiler.top import top_of
from composeprob.compiler.unroll import unrolled
from composeprob.errors import ImproperError
from composeprob.factors.nodes import walk
from composeprob.ir.nodes import Graph, Site, leaves
from composeprob.schedule import Schedule


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
            worst = least(tail_of(root, parts, site.shape, schedule, int(level)), size)
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
        power = float(top_of(root, site.shape).power.min())
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
