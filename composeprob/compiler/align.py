"""Chooses the program's levels, and finds for each factor the level of its own that
carries as much noise.

Two schedules agree where their log-SNR agrees. With own noise (α, σ) and the program's
(α', σ') at one log-SNR, x' = x·α'/α, so log f'(x') = log f(x'·α/α') + d·log(α/α'),
without the last term for what is no density (classifiers).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from composeprob import tuning
from composeprob.errors import AlignmentError
from composeprob.factors.nodes import rewrite_leaves
from composeprob.ir.leaves import Graph, Leaf, Site, leaves
from composeprob.schedule import Noise, Schedule, check_schedule, log_snr_of


def align(graph: Graph, schedule: Schedule | None = None) -> Graph:
    """Every leaf evaluated at the program's levels: those of ``schedule``, else of the
    first factor that knows only its own levels, else of the first factor. A factor that
    has no level of the same log-SNR, or was not trained there, is refused."""
    if schedule is not None:
        check_schedule(schedule)
    chosen = schedule or _default(graph)
    aligned = graph.map_roots(
        lambda root, site: rewrite_leaves(root, lambda leaf: _leaf(leaf, chosen, site))
    )
    moved = [
        leaf
        for site in aligned.sites
        for leaf in leaves(site.root)
        if leaf.own_noise is not None
    ]
    sentence = "every factor at its own levels"
    if moved:
        sentence = f"{', '.join(dict.fromkeys(leaf.name for leaf in moved))} evaluated at matching log-SNR"
    return replace(aligned, schedule=chosen).noted("align", sentence)


def _default(graph: Graph) -> Schedule:
    factors = [leaf.factor for site in graph.sites for leaf in leaves(site.root)]
    if not factors:
        return Schedule.from_arrays(
            [1.0], [1.0]
        )  # nothing is noised: one level, in units of 1
    return next((f for f in factors if f.traits.levels == "own"), factors[0]).schedule


def _leaf(leaf: Leaf, schedule: Schedule, site: Site) -> Leaf:
    levels, averaged = leaf.factor.traits.levels, leaf.averaged
    if averaged == 1 and (
        levels == "any" or leaf.factor.schedule.same_levels(schedule)
    ):
        return leaf
    if levels == "any":
        alpha = np.asarray(schedule.alpha, np.float64)
        sigma = np.asarray(schedule.sigma, np.float64) / math.sqrt(averaged)
        noise = noise_on_host(np.arange(len(alpha)), alpha, sigma)
    else:
        # Averaging n entries divides the noise variance by n: the event's log-SNR is
        # higher by log n.
        wanted = log_snr_of(schedule.alpha, schedule.sigma) + math.log(averaged)
        noise = (_discrete if levels == "own" else _continuous)(leaf, wanted, site)
    return replace(leaf, own_noise=noise)


def _continuous(leaf: Leaf, wanted: np.ndarray, site: Site) -> Noise:
    low, high = leaf.factor.log_snr_range
    outside = (wanted > high + tuning.SAME_LOG_SNR) | (
        wanted < low - tuning.SAME_LOG_SNR
    )
    if np.any(outside):
        k = int(np.argmax(outside))
        raise AlignmentError(
            f"Factor '{leaf.name}' at site {site.name!r} was trained for log-SNR {low:.3g} to {high:.3g}, "
            f"but level {k} of the program's schedule has {wanted[k]:.3g}.",
            where=site.where,
            fix=_schedule_inside(leaf, low, high, wanted),
        )
    trained = leaf.factor.schedule
    index = (
        trained.level_at(wanted)
        if leaf.factor.traits.levels == "real"
        else np.arange(len(wanted))
    )
    return noise_on_host(index, *trained.noise_at(wanted))


def _schedule_inside(leaf: Leaf, low: float, high: float, wanted: np.ndarray) -> str:
    """A schedule that the leaf can follow, rounded inwards; for a window, in the
    log-SNR of the canvas."""
    shift = math.log(leaf.averaged)
    low = math.ceil((max(low, wanted[-1]) - shift) * 100) / 100
    high = math.floor((min(high, wanted[0]) - shift) * 100) / 100
    if low >= high:
        return "use a factor that was trained on these levels, or compile with another schedule."
    return (
        "compile with a schedule inside that range: cp.compile(program, …, "
        f"schedule=cp.Schedule.log_snr({len(wanted)}, min={low:g}, max={high:g}))."
    )


def _discrete(leaf: Leaf, wanted: np.ndarray, site: Site) -> Noise:
    trained = leaf.factor.schedule
    known = log_snr_of(trained.alpha, trained.sigma)
    nearest = np.abs(known[None, :] - wanted[:, None]).argmin(axis=1)
    distance = np.abs(known[nearest] - wanted)
    if np.any(distance > tuning.SAME_LOG_SNR):
        k = int(np.argmax(distance > tuning.SAME_LOG_SNR))
        raise AlignmentError(
            f"Factor '{leaf.name}' at site {site.name!r} knows only the {trained.num_levels} levels of its training, "
            f"and none has the log-SNR {wanted[k]:.4g} of the program's level {k}; its nearest is level {nearest[k]} "
            f"with {known[nearest[k]]:.4g}.",
            where=site.where,
            fix="use a factor trained with time='log_snr': a window that averages needs other levels than the canvas."
            if leaf.averaged > 1
            else _subset(leaf, len(wanted)),
        )
    return noise_on_host(
        nearest, np.asarray(trained.alpha)[nearest], np.asarray(trained.sigma)[nearest]
    )


def _subset(leaf: Leaf, levels: int) -> str:
    """A schedule of levels that the leaf knows, about as many as were wanted."""
    trained, name = leaf.factor.schedule, leaf.label
    step = min(
        max(1, round(trained.num_levels / levels)), max(trained.num_levels - 1, 1)
    )
    others = "Other levels need a factor that is trained with time='log_snr'."
    if step == 1:
        return f"compile with the levels that '{name}' knows: schedule=factor.schedule. {others}"
    return (
        f"compile with some of the levels that '{name}' knows, cp.compile(program, …, "
        f"schedule=factor.schedule.every({step})): {trained.every(step).num_levels} of its {trained.num_levels}. "
        f"{others}"
    )


def noise_on_host(index: object, alpha: object, sigma: object) -> Noise:
    """Of NumPy's numbers or arrays, in double precision until the density is
    lowered."""
    return Noise(index, alpha, sigma)  # type: ignore[arg-type]
