"""The log-ratio of a Metropolis test from scores alone: a line integral of the score between the two points."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import pytree
from composeprob.density.evaluation import Position, Target
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels.base import Kernel, KernelState
from composeprob.kernels.step_size import check_count

ORDERS = {"trapezoid": 2, "simpson": 4}
"""Order p of each rule: its error falls as the p-th power of the distance between nodes."""


@dataclasses.dataclass(frozen=True)
class LineIntegral:
    r"""How MALA and HMC get log π(x') − log π(x) where a density offers only its score.

    A gradient field's integral along a path is the difference of its potential at the ends, whatever the path:

    $$\log\pi(x') - \log\pi(x) = \int_0^1 \langle \nabla\log\pi(\gamma(t)),\, \dot\gamma(t)\rangle\,dt .$$

    The integral is a quadrature on a few nodes. Both ends' scores are cached, and the same nodes serve the way there
    and the way back: the estimate is antisymmetric in (x, x'), so that no move is favoured over its reversal. What is
    left invariant is π up to the quadrature's error, which each transition estimates by a coarser rule on a part of the
    nodes (`result.quadrature_error`). A score that is not a gradient has no π: `infer` measures the curl of every
    factor that does not promise a gradient.

    Args:
        num_points: n equidistant nodes on the straight line from x to x', both ends among them: n − 2 evaluations more
            a transition. None, for HMC only: the path is the trajectory itself and its nodes the leapfrog's own, at no
            evaluation more, and with nodes as far apart as leapfrog steps take the chain.
        rule: ``"trapezoid"``, of second order, or ``"simpson"``, of fourth order, which needs an odd number of nodes
            (for the trajectory an even number of leapfrogs). Simpson's rule is the better one where the score is smooth
            at the scale of a step.

    Raises:
        InvalidValueError: fewer than 2 nodes, an unknown rule, or an even number of nodes for Simpson's rule.
        WrongTypeError: `num_points` is neither a whole number nor None.

    Example:
        >>> from composeprob.kernels import MALA, LineIntegral
        >>> kernel = MALA(0.01, log_ratio=LineIntegral(num_points=5, rule="simpson"))
        >>> kernel.evaluations_per_step, sorted(kernel.requires)
        (4, ['score'])

    References:
        Sjöberg, Lindqvist, Önnheim, Jirstrand and Svensson (2023), MCMC-correction of score-based diffusion models for
        model composition (arXiv 2307.14012).
    """

    num_points: int | None = 3
    rule: Literal["trapezoid", "simpson"] = "trapezoid"

    def __post_init__(self) -> None:
        if self.rule not in ORDERS:
            raise InvalidValueError(f"Unknown rule {self.rule!r}.", fix=f"use one of: {', '.join(ORDERS)}.")
        if self.num_points is None:
            return
        check_count(self.num_points, "LineIntegral(num_points=)", minimum=2)
        if self.rule == "simpson" and self.num_points % 2 == 0:
            raise InvalidValueError(
                f"Simpson's rule needs an odd number of points; got {self.num_points}.",
                fix=f"use {self.num_points + 1} points, or rule='trapezoid'.",
            )

    @property
    def extra_evaluations(self) -> int:
        """Evaluations that one transition needs beside its own."""
        return 0 if self.num_points is None else self.num_points - 2

    def straight(self, start: KernelState, end: KernelState, target: Target) -> tuple[Array, Array]:
        """log π(end) − log π(start) along the straight line; n − 2 evaluations, one after the other.

        Args:
            start, end: states whose evaluations belong to `target`.
            target: the level's density.

        Returns:
            The difference, NaN where a score on the way is not finite, and the estimate of its error; scalars.
        """
        assert self.num_points is not None
        moved = pytree.axpy(-1.0, start.position, end.position)
        here, there = (pytree.vdot(state.evaluation.score, moved) for state in (start, end))
        intervals = self.num_points - 1
        t = jnp.asarray(np.arange(self.num_points) / intervals, here.dtype)

        def slope(_: None, weight: Array) -> tuple[None, Array]:
            between = jax.tree.map(
                lambda a, b: ((1 - weight) * a + weight * b).astype(a.dtype), start.position, end.position
            )
            return None, pytree.vdot(target(between).score, moved)

        inner = jax.lax.scan(slope, None, t[1:-1])[1] if intervals > 1 else t[1:-1]
        slopes = jnp.concatenate([here[None], inner.astype(here.dtype), there[None]])
        return self.along(t, slopes)

    def along(self, positions: Position, scores: Position) -> tuple[Array, Array]:
        """log π(last) − log π(first) along a path given by its nodes, with scores at hand.

        Args:
            positions: nodes at equal distances of the path's parameter, stacked on a leading axis, (n + 1, …) leaves.
            scores: ∇ log π at each of them.

        Returns:
            As `straight`.
        """
        intervals = jax.tree.leaves(positions)[0].shape[0] - 1
        fine = _RULES[self.rule](positions, scores)
        error = jnp.full_like(fine, jnp.nan)
        stride = coarse_stride(self.rule, intervals)
        if stride is not None:
            coarse = _RULES[self.rule](_every(positions, stride), _every(scores, stride))
            error = jnp.abs(fine - coarse) / (stride ** ORDERS[self.rule] - 1)
        elif self.rule == "simpson":
            error = jnp.abs(fine - trapezoid(positions, scores))
        return jnp.where(jnp.isfinite(fine), fine, jnp.nan), error


def integrates_score(kernel: Kernel) -> bool:
    """Whether a kernel's accept test integrates the score, which means something only where that is a gradient."""
    return isinstance(getattr(kernel, "log_ratio", None), LineIntegral)


LogRatio = Literal["exact"] | LineIntegral
"""How a kernel gets log π(x') − log π(x): from the density's own values, or from its scores."""


def check_log_ratio(log_ratio: object, owner: str) -> None:
    """Raises unless `log_ratio` is ``"exact"`` or a `LineIntegral`."""
    if isinstance(log_ratio, LineIntegral) or (isinstance(log_ratio, str) and log_ratio == "exact"):
        return
    raise WrongTypeError(
        f"{owner}(log_ratio=) is {log_ratio!r}", fix='give "exact", or cp.LineIntegral() for densities without energy'
    )


def coarse_stride(rule: str, intervals: int) -> int | None:
    """The smallest r > 1 such that the rule also fits on every r-th node; None where there is none.

    The trapezoid needs that r divides the number of intervals, Simpson's rule that it leaves an even number of them.
    """
    unit = 2 if rule == "simpson" else 1
    return next((r for r in range(2, intervals + 1) if intervals % (r * unit) == 0), None)


def trapezoid(x: Position, s: Position) -> Array:
    r"""Σᵢ ½⟨sᵢ + sᵢ₊₁, xᵢ₊₁ − xᵢ⟩ over nodes stacked on the leading axis, a scalar."""
    moved = jax.tree.map(lambda a: a[1:] - a[:-1], x)
    return 0.5 * pytree.vdot(jax.tree.map(lambda a: a[1:] + a[:-1], s), moved)


def simpson(x: Position, s: Position) -> Array:
    r"""Simpson's rule along the parabolas through three nodes each, a scalar.

    On a parabola through $x_0, x_1, x_2$ at t = 0, 1, 2 the velocity at the nodes is $\tfrac12(-3x_0+4x_1-x_2)$,
    $\tfrac12(x_2-x_0)$ and $\tfrac12(x_0-4x_1+3x_2)$, so that

    $$\tfrac13\big(\langle s_0, \dot x_0\rangle + 4\langle s_1, \dot x_1\rangle + \langle s_2, \dot x_2\rangle\big)$$

    is of fourth order along the parabola itself: bent paths lose nothing, unlike with chords in place of velocities.
    """

    def weighted(a: Array) -> Array:
        first, middle, last = a[:-1:2], a[1::2], a[2::2]
        velocities = (4 * middle - 3 * first - last, 4 * (last - first), first - 4 * middle + 3 * last)
        return jnp.stack(velocities) / 6

    def panels(a: Array) -> Array:
        return jnp.stack((a[:-1:2], a[1::2], a[2::2]))

    return pytree.vdot(jax.tree.map(panels, s), jax.tree.map(weighted, x))


_RULES = {"trapezoid": trapezoid, "simpson": simpson}


def _every(nodes: Position, stride: int) -> Position:
    return jax.tree.map(lambda a: a[::stride], nodes)
