"""The log-ratio of a Metropolis test from scores alone: a line integral of the score
between the two points."""

from __future__ import annotations

import dataclasses
import math
from typing import Generic, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import pytree, tuning
from composeprob.arguments import check_count
from composeprob.density.evaluation import Position
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels.kernel import KernelState

StateT = TypeVar("StateT", bound=KernelState)


class Path(eqx.Module, Generic[StateT]):
    """The nodes of a line integral, as far as they have been evaluated, stacked on a
    leading axis of length n."""

    end: (
        StateT | None
    )  # x' with its evaluation, once there is one, of a straight line; None of the trajectory itself
    positions: Position  # of the nodes; on the straight line t, from 0 to 1
    # ∇ log π at each of them; on the straight line their slopes ⟨∇ log π, x' − x⟩
    scores: Position


@dataclasses.dataclass(frozen=True)
class LineIntegral:
    r"""How MALA and HMC get log π(x') − log π(x) where a density offers only its score.

    A gradient field's integral along a path is the difference of its potential at the
    ends, whatever the path:

    $$\log\pi(x') - \log\pi(x) = \int_0^1 \langle \nabla\log\pi(\gamma(t)),\, \dot\gamma(t)\rangle\,dt .$$

    Where only a part of log π is not known, as that of a learned factor beside
    observations, the integral is over the score of that part, and the other parts give
    their values. It is a quadrature on a few nodes. Both ends' scores are cached, and
    the same nodes serve the way there and the way back: the estimate is antisymmetric
    in (x, x'), so that no move is favoured over its reversal. What is left invariant is
    π up to the quadrature's error, which each transition estimates by a coarser rule on
    a part of the nodes (``result.levels["quadrature_error"]``). A score that is not a
    gradient has no π: `infer` measures the curl of every factor that does not promise a
    gradient.

    Args:
        num_points: n equidistant nodes on the straight line from x to x', both ends
            among them: n − 2 evaluations more a transition. None, for HMC only: the
            path is the trajectory itself and its nodes the leapfrog's own, at no
            evaluation more, and with nodes as far apart as leapfrog steps take the
            chain.
        rule: ``"trapezoid"``, of second order, or ``"simpson"``, of fourth order, which
            needs an odd number of nodes (for the trajectory an even number of
            leapfrogs). Simpson's rule is the better one where the score is smooth at
            the scale of a step.
        tolerance: the greatest estimated error of log π(x') − log π(x), in nats, of a
            move that is accepted. The way back has the same estimate, so that this
            favours none; without a bound, moves between modes whose valley no node
            meets make what is left invariant another density.

    Raises:
        InvalidValueError: fewer than 2 nodes, an unknown rule, an even number of nodes
            for Simpson's rule, a tolerance that is not above 0, or one beside 2 nodes,
            whose error nothing estimates.
        WrongTypeError: `num_points` is neither a whole number nor None.

    Example:
        >>> from composeprob.kernels import MALA, LineIntegral
        >>> kernel = MALA(0.01, log_ratio=LineIntegral(num_points=5, rule="simpson"))
        >>> kernel.evaluations_per_step, sorted(kernel.requires)
        (4, ['score'])

    References:
        Sjöberg, Lindqvist, Önnheim, Jirstrand and Svensson (2023), MCMC-correction of
        score-based diffusion models for model composition (arXiv 2307.14012).
    """

    num_points: int | None = 3
    rule: Literal["trapezoid", "simpson"] = "trapezoid"
    tolerance: float = math.inf

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise InvalidValueError(
                f"LineIntegral(tolerance={self.tolerance!r}) accepts no move.",
                fix="use 0.1 nats.",
            )
        if self.rule not in _RULES:
            raise InvalidValueError(
                f"Unknown rule {self.rule!r}.", fix=f"use one of: {', '.join(_RULES)}."
            )
        if self.num_points is None:
            return
        check_count(self.num_points, "LineIntegral(num_points=)", least=2)
        self.check_tolerance(self.num_points - 1, "use 3 points")
        if self.rule == "simpson" and self.num_points % 2 == 0:
            raise InvalidValueError(
                f"Simpson's rule needs an odd number of points; got {self.num_points}.",
                fix=f"use {self.num_points + 1} points, or rule='trapezoid'.",
            )

    def check_tolerance(self, intervals: int, fix: str) -> None:
        """Raises where errors are to be bounded, and a path of so many intervals has
        none to estimate them by."""
        if self.tolerance < math.inf and intervals < 2:
            raise InvalidValueError(
                f"LineIntegral(tolerance={self.tolerance!r}) has no estimate of the error between two nodes.",
                fix=f"{fix}, or leave tolerance out.",
            )

    @property
    def shares(self) -> Array:
        """t at the nodes of the straight line, from 0 to 1."""
        assert self.num_points is not None
        return jnp.asarray(
            np.arange(self.num_points) / (self.num_points - 1), jnp.result_type(float)
        )

    @property
    def extra_evaluations(self) -> int:
        """Evaluations that one transition needs beside its own."""
        return 0 if self.num_points is None else self.num_points - 2

    def begin(self, start: StateT, length: int) -> Path[StateT]:
        """The path of a proposal whose way has ``length`` evaluations, its end the last
        of them; only x is known."""
        if self.num_points is not None:
            return Path(start, self.shares, jnp.zeros_like(self.shares))
        nodes = jax.tree.map(
            lambda x: (
                jnp.zeros((length + 1, *jnp.shape(x)), jnp.result_type(x)).at[0].set(x)
            ),
            (start.position, _integrand(start)),
        )
        return Path(None, *nodes)

    def record(
        self,
        i: Array | int,
        length: int,
        path: Path[StateT],
        start: StateT,
        point: StateT,
    ) -> Path[StateT]:
        """The path with evaluation i of a transition, which found ``point``. The first
        ``length`` evaluations lead to x', the others are at the inner nodes of the
        straight line: of those only the evaluation of ``point`` is read.
        """
        if path.end is None:
            nodes = jax.tree.map(
                lambda stacked, x: stacked.at[i + 1].set(x),
                (path.positions, path.scores),
                (point.position, _integrand(point)),
            )
            return Path(None, *nodes)
        inner = i - (length - 1)
        end = pytree.where(jnp.asarray(inner <= 0), point, path.end)
        chord = pytree.axpy(-1.0, start.position, end.position)
        last = len(path.scores) - 1
        slopes = path.scores.at[0].set(pytree.vdot(_integrand(start), chord))
        slopes = slopes.at[jnp.where(inner <= 0, last, inner)].set(
            pytree.vdot(_integrand(point), chord)
        )
        return Path(end, path.positions, slopes)

    def node(self, j: Array | int, path: Path[StateT], start: StateT) -> Position:
        """Node j of the straight line."""
        assert path.end is not None
        t = path.positions[j]
        return jax.tree.map(
            lambda a, b: ((1 - t) * a + t * b).astype(a.dtype),
            start.position,
            path.end.position,
        )

    def finish(
        self, length: int, path: Path[StateT], start: StateT, point: StateT
    ) -> tuple[StateT, Array, Array]:
        """The proposal x' with its evaluation, log π(x') − log π(x), −∞ beyond the
        tolerance, and the estimate of its error, both scalars: of a path with all
        evaluations but the last, which found ``point``."""
        path = self.record(
            length - 1 + self.extra_evaluations, length, path, start, point
        )
        proposed = point if path.end is None else path.end
        log_ratio, error = self.along(path.positions, path.scores)
        there, here = proposed.evaluation, start.evaluation
        if there.closed_form is not None and here.closed_form is not None:
            # Where both are beyond a wall, chains move as if there were none.
            log_ratio = log_ratio + jnp.where(
                there.zero & here.zero,
                0.0,
                there.closed_form.value - here.closed_form.value,
            )
        return proposed, jnp.where(error > self.tolerance, -jnp.inf, log_ratio), error

    def along(self, positions: Position, scores: Position) -> tuple[Array, Array]:
        """log π(last) − log π(first) along a path, NaN where a score on the way is not
        finite, and the estimate of its error, scalars, by nodes at equal distances of
        the path's parameter, (n + 1, …), and ∇ log π at each of them."""
        intervals = jax.tree.leaves(positions)[0].shape[0] - 1
        integral, order = _RULES[self.rule]
        fine = integral(positions, scores)
        error = jnp.full_like(fine, jnp.nan)
        stride = coarse_stride(self.rule, intervals)
        if stride is not None:
            coarse = integral(_thinned(positions, stride), _thinned(scores, stride))
            error = jnp.abs(fine - coarse) / (stride**order - 1)
        elif self.rule == "simpson":
            error = jnp.abs(fine - trapezoid(positions, scores))
        return jnp.where(jnp.isfinite(fine), fine, jnp.nan), error


def bounded(samples: int = 1) -> LineIntegral:
    """That of default runs, for densities that offer only their score. What an error of
    so many nats in every move does to means, in standard deviations, must be no more
    than is left to chance: 1/√samples of independent ones."""
    tolerance = min(tuning.BY_SCORE.tolerance, 1 / math.sqrt(samples))
    return LineIntegral(tuning.BY_SCORE.nodes, "simpson", tolerance)


LogRatio = Literal["exact"] | LineIntegral
"""How a kernel gets log π(x') − log π(x): from the density's own values, or from its
scores."""


def check_log_ratio(log_ratio: object, owner: str) -> None:
    """Raises unless `log_ratio` is ``"exact"`` or a `LineIntegral`."""
    if isinstance(log_ratio, LineIntegral) or (
        isinstance(log_ratio, str) and log_ratio == "exact"
    ):
        return
    raise WrongTypeError(
        f"{owner}(log_ratio=) is {log_ratio!r}",
        fix='give "exact", or cp.LineIntegral() for densities without energy',
    )


def coarse_stride(rule: str, intervals: int) -> int | None:
    """The smallest r > 1 such that the rule also fits on every r-th node, None where
    there is none: r divides the number of intervals, and leaves Simpson's rule an even
    number of them."""
    unit = 2 if rule == "simpson" else 1
    return next(
        (r for r in range(2, intervals + 1) if intervals % (r * unit) == 0), None
    )


def trapezoid(x: Position, s: Position) -> Array:
    r"""Σᵢ ½⟨sᵢ + sᵢ₊₁, xᵢ₊₁ − xᵢ⟩ over nodes stacked on the leading axis, a scalar."""
    moved = jax.tree.map(lambda a: a[1:] - a[:-1], x)
    return 0.5 * pytree.vdot(jax.tree.map(lambda a: a[1:] + a[:-1], s), moved)


def simpson(x: Position, s: Position) -> Array:
    r"""Simpson's rule along the parabolas through three nodes each, a scalar.

    On a parabola through $x_0, x_1, x_2$ at t = 0, 1, 2 the velocity at the nodes is
    $\tfrac12(-3x_0+4x_1-x_2)$, $\tfrac12(x_2-x_0)$ and $\tfrac12(x_0-4x_1+3x_2)$, so
    that

    $$\tfrac13\big(\langle s_0, \dot x_0\rangle + 4\langle s_1, \dot x_1\rangle + \langle s_2, \dot x_2\rangle\big)$$

    is of fourth order along the parabola itself: bent paths lose nothing, unlike with
    chords in place of velocities.
    """

    def weighted(a: Array) -> Array:
        first, middle, last = a[:-1:2], a[1::2], a[2::2]
        velocities = (
            4 * middle - 3 * first - last,
            4 * (last - first),
            first - 4 * middle + 3 * last,
        )
        return jnp.stack(velocities) / 6

    def panels(a: Array) -> Array:
        return jnp.stack((a[:-1:2], a[1::2], a[2::2]))

    return pytree.vdot(jax.tree.map(panels, s), jax.tree.map(weighted, x))


_RULES = {"trapezoid": (trapezoid, 2), "simpson": (simpson, 4)}
"""Each rule and its order p: its error falls as the p-th power of the distance between
nodes."""


def _integrand(state: KernelState) -> Position:
    """∇ of the part of log π whose value is not known."""
    known = state.evaluation.closed_form
    return state.evaluation.score if known is None else known.score


def _thinned(nodes: Position, stride: int) -> Position:
    return jax.tree.map(lambda a: a[::stride], nodes)
