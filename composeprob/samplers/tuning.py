"""What adapts of a kernel as chains go down the levels: the step size and the metric of each block."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.kernels import Adaptive, Estimated, Gibbs, Kernel, Metric
from composeprob.kernels.gibbs import GibbsState, with_field, with_parts
from composeprob.kernels.metric import EUCLIDEAN
from composeprob.samplers.cloud import flattened
from composeprob.samplers.preconditioning import kind_of, measured, unmeasured
from composeprob.samplers.spread import Spread

Sites = tuple[str, ...]


class Tuning(eqx.Module):
    """What adapts of one block.

    Attributes:
        log_scale: log c, a scalar.
        metric: the metric in force; None where none is estimated.
    """

    log_scale: Array
    metric: Metric | None


Tunings = tuple[Tuning, ...]
"""One for each block."""


def untuned(kernel: Gibbs, positions: dict[str, Array], num_chains: int) -> Tunings:
    """log c where it starts, and no metric known, for N chains at these positions."""

    def of(part: Kernel, sites: Sites) -> Tuning:
        like, rule = _like(positions, sites), part.step_size
        kind = _kind(part, like, num_chains)
        metric = None if kind == "none" else unmeasured(kind, like)
        return Tuning(rule.log_scale if isinstance(rule, Adaptive) else jnp.zeros(()), metric)

    return tuple(map(of, kernel.kernels, kernel.sites))


def log_scales(tuning: Tunings) -> list[Array]:
    """log c of each block."""
    return [of.log_scale for of in tuning]


def with_log_scales(tuning: Tunings, new: Sequence[Array]) -> Tunings:
    """The same metrics with another log c of each block."""
    return tuple(dataclasses.replace(of, log_scale=c) for of, c in zip(tuning, new, strict=True))


def in_metrics(kernel: Gibbs, tuning: Tunings, units: dict[str, Array]) -> Gibbs:
    """The kernel in the metrics that are in force.

    Args:
        kernel: each block with a metric of its own, given or to be measured, or without any.
        tuning: what was measured.
        units: lengths that some sites are measured in while the transitions of a level last.
    """

    def of(part: Kernel, tuning: Tuning, sites: Sites) -> Kernel:
        given, own = getattr(part, "metric", None), {name: units[name] for name in sites if name in units}
        if given is None or (isinstance(given, Metric) and not own):
            return part
        metric = given if isinstance(given, Metric) else tuning.metric or EUCLIDEAN
        return with_field(part, "metric", metric.scaled(own))

    parts = list(map(of, kernel.kernels, tuning, kernel.sites))
    return with_parts(kernel, parts)  # type: ignore[return-value]


def with_metrics(
    tuning: Tunings, kernel: Gibbs, spread: Spread, began: GibbsState, ended: GibbsState, scale: dict[str, Array]
) -> Tunings:
    """The metrics that the moves of all chains at a level tell, for the transitions that follow.

    Args:
        tuning: as it was while they moved.
        kernel: whose blocks moved.
        spread: which chains these are.
        began, ended: every chain before and after its transitions, under one density.
        scale: the length in whose units each site is measured.
    """

    def of(known: Tuning, part: Kernel, sites: Sites) -> Tuning:
        if known.metric is None:
            return known

        def gained(before: dict[str, Array], after: dict[str, Array]) -> Array:
            old, new = (flattened({name: tree[name] for name in sites}) for tree in (before, after))
            return spread.gather(new - old)

        moved = gained(began.position, ended.position)
        changed = gained(began.evaluation.score, ended.evaluation.score)
        like = _like(ended.position, sites)
        scales = {n: jax.tree.map(lambda leaf, n=n: jnp.full(leaf.shape, scale[n]), x) for n, x in like.items()}
        solve = partial(measured, _kind(part, like, len(moved)), known.metric, scales)
        return dataclasses.replace(known, metric=spread.alone(solve, moved, changed))

    return tuple(map(of, tuning, kernel.kernels, kernel.sites))


def _like(positions: dict[str, Array], sites: Sites) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one chain's position at some sites."""
    own = {name: positions[name] for name in sites}
    return jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), own)


def _kind(part: Kernel, like: dict[str, jax.ShapeDtypeStruct], num_chains: int) -> str:
    """The metric that is measured for a block, ``"none"`` if none is."""
    given = getattr(part, "metric", None)
    if not isinstance(given, Estimated):
        return "none"
    return kind_of(given.kind, sum(leaf.size for leaf in jax.tree.leaves(like)), num_chains)
