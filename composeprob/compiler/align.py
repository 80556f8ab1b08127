"""Choose the program's levels, and match each factor's own levels of equal noise.

Two schedules agree where their log-SNR agrees. With own noise (α, σ) and the program's
(α', σ') at one log-SNR, x' = x·α'/α, so log f'(x') = log f(x'·α/α') + d·log(α/α'),
without the last term for factors that are not densities (classifiers).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from composeprob import tuning
from composeprob.errors import AlignmentError
from composeprob.factors.factor import Factor
from composeprob.factors.nodes import rewrite_leaves
from composeprob.ir.leaves import Graph, Leaf, Site, leaves
from composeprob.schedule import Noise, Schedule, check_schedule, log_snr_of


def align(graph: Graph, schedule: Schedule | None = None) -> Graph:
    """Evaluate every leaf at the program's levels.

    These are the levels of ``schedule``; without one, those of the first factor that
    can be evaluated at its own levels only; else those of the first factor. A factor
    that has no level of the same log-SNR, or was not trained there, is refused.
    """
    if schedule is not None:
        check_schedule(schedule)
    levels = schedule or _default(graph)

    def aligned_root(root: Factor, site: Site) -> Factor:
        return rewrite_leaves(root, lambda leaf: _aligned(leaf, levels, site))

    aligned = graph.map_roots(aligned_root)
    moved = []
    for site in aligned.sites:
        moved += [leaf.name for leaf in leaves(site.root) if leaf.own_noise is not None]
    sentence = "every factor at its own levels"
    if moved:
        names = ", ".join(dict.fromkeys(moved))
        sentence = f"{names} evaluated at matching log-SNR"
    return replace(aligned, schedule=levels).noted("align", sentence)


def _default(graph: Graph) -> Schedule:
    """The levels of the first factor that can be evaluated at its own levels only;
    without such a factor, those of the first."""
    factors = [leaf.factor for site in graph.sites for leaf in leaves(site.root)]
    if not factors:
        # Nothing is noised: one level, in units of 1.
        return Schedule.from_arrays([1.0], [1.0])
    for factor in factors:
        if factor.traits.levels == "own":
            return factor.schedule
    return factors[0].schedule


def _aligned(leaf: Leaf, schedule: Schedule, site: Site) -> Leaf:
    levels = leaf.factor.traits.levels
    averaged = leaf.averaged
    has_levels = levels == "any" or leaf.factor.schedule.same_levels(schedule)
    if averaged == 1 and has_levels:
        return leaf
    if levels == "any":
        # A mean of n entries has the noise variance σ²/n.
        alpha = np.asarray(schedule.alpha, np.float64)
        sigma = np.asarray(schedule.sigma, np.float64) / math.sqrt(averaged)
        noise = noise_on_host(np.arange(len(alpha)), alpha, sigma)
    else:
        # Averaging n entries divides the noise variance by n: the event's log-SNR is
        # higher by log n.
        wanted = log_snr_of(schedule.alpha, schedule.sigma) + math.log(averaged)
        match = _discrete if levels == "own" else _continuous
        noise = match(leaf, wanted, site)
    return replace(leaf, own_noise=noise)


def _continuous(leaf: Leaf, wanted: Float[np.ndarray, " levels"], site: Site) -> Noise:
    """The noise, at each wanted log-SNR, of a factor that was trained on a range of
    log-SNR."""
    low, high = leaf.factor.log_snr_range
    above = wanted > high + tuning.SAME_LOG_SNR
    below = wanted < low - tuning.SAME_LOG_SNR
    outside = above | below
    if np.any(outside):
        k = int(np.argmax(outside))
        raise AlignmentError(
            f"Factor '{leaf.name}' at site {site.name!r} was trained for log-SNR "
            f"{low:.3g} to {high:.3g}, but level {k} of the program's schedule has "
            f"{wanted[k]:.3g}.",
            where=site.where,
            fix=_schedule_inside(leaf, low, high, wanted),
        )
    trained = leaf.factor.schedule
    index = np.arange(len(wanted))
    if leaf.factor.traits.levels == "real":
        # Its network takes a real number between two indices of its own levels.
        index = trained.level_at(wanted)
    return noise_on_host(index, *trained.noise_at(wanted))


def _schedule_inside(
    leaf: Leaf, low: float, high: float, wanted: Float[np.ndarray, " levels"]
) -> str:
    """The fix that names a schedule inside the leaf's range of log-SNR, rounded
    inwards; for a window, in the log-SNR of the canvas."""
    shift = math.log(leaf.averaged)
    low = math.ceil((max(low, wanted[-1]) - shift) * 100) / 100
    high = math.floor((min(high, wanted[0]) - shift) * 100) / 100
    if low >= high:
        return (
            "use a factor that was trained on these levels, or compile with another "
            "schedule."
        )
    return (
        "compile with a schedule inside that range: cp.compile(program, …, "
        f"schedule=cp.Schedule.log_snr({len(wanted)}, min={low:g}, max={high:g}))."
    )


def _discrete(leaf: Leaf, wanted: Float[np.ndarray, " levels"], site: Site) -> Noise:
    """The noise of the factor's own levels that have the wanted log-SNR."""
    trained = leaf.factor.schedule
    own = log_snr_of(trained.alpha, trained.sigma)
    nearest = np.abs(own[None, :] - wanted[:, None]).argmin(axis=1)
    distance = np.abs(own[nearest] - wanted)
    if np.any(distance > tuning.SAME_LOG_SNR):
        k = int(np.argmax(distance > tuning.SAME_LOG_SNR))
        fix = _subset(leaf, len(wanted))
        if leaf.averaged > 1:
            fix = (
                "use a factor trained with time='log_snr': a window that averages "
                "needs other levels than the canvas."
            )
        raise AlignmentError(
            f"Factor '{leaf.name}' at site {site.name!r} knows only the "
            f"{trained.num_levels} levels of its training, and none has the log-SNR "
            f"{wanted[k]:.4g} of the program's level {k}; its nearest is level "
            f"{nearest[k]} with {own[nearest[k]]:.4g}.",
            where=site.where,
            fix=fix,
        )
    alpha = np.asarray(trained.alpha)[nearest]
    sigma = np.asarray(trained.sigma)[nearest]
    return noise_on_host(nearest, alpha, sigma)


def _subset(leaf: Leaf, levels: int) -> str:
    """A schedule of levels that the leaf knows, about as many as were wanted."""
    trained = leaf.factor.schedule
    name = leaf.label
    # At least two of its levels stay.
    longest = max(trained.num_levels - 1, 1)
    step = min(max(1, round(trained.num_levels / levels)), longest)
    others = "Other levels need a factor that is trained with time='log_snr'."
    if step == 1:
        return (
            f"compile with the levels that '{name}' knows: schedule=factor.schedule. "
            f"{others}"
        )
    kept = trained.every(step).num_levels
    return (
        f"compile with some of the levels that '{name}' knows, cp.compile(program, …, "
        f"schedule=factor.schedule.every({step})): {kept} of its "
        f"{trained.num_levels}. {others}"
    )


def noise_on_host(index: object, alpha: object, sigma: object) -> Noise:
    """Noise of NumPy's numbers or arrays, in double precision until the density is
    lowered."""
    return Noise(index, alpha, sigma)  # type: ignore[arg-type]
