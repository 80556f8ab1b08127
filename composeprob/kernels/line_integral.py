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
from jaxtyping import Float

from composeprob import pytree, tuning
from composeprob.arguments import check_count
from composeprob.density.evaluation import Position
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels.kernel import KernelState

StateT = TypeVar("StateT", bound=KernelState)


class Path(eqx.Module, Generic[StateT]):
    """Nodes of a line integral, as far as they have been evaluated, stacked on a
    leading axis of length n."""

    # Of a straight line, x' with its evaluation once there is one; None for a path
    # along the trajectory itself.
    end: StateT | None
    positions: Position  # of the nodes; on the straight line t, from 0 to 1
    # At each of them ∇ log π, and the score of each tracked factor; on the straight
    # line their slopes ⟨∇ log π, x' − x⟩.
    scores: tuple[Position, ...]


@dataclasses.dataclass(frozen=True)
class LineIntegral:
    r"""Estimate of log π(x') − log π(x), for MALA and HMC, where a density offers only
    its score.

    A gradient field's integral along a path is the difference of its potential at the
    ends, whatever the path:

    $$\log\pi(x') - \log\pi(x)
      = \int_0^1 \langle \nabla\log\pi(\gamma(t)),\, \dot\gamma(t)\rangle\,dt .$$

    Where only one term of log π is unknown, such as a learned factor beside
    observations, the integral is over the score of that term, and the other terms give
    their values. It is a quadrature on a few nodes. Both ends' scores are cached, and
    the same nodes serve the way there and the way back: the estimate is antisymmetric
    in (x, x'), so that no move is favoured over its reversal. The kernel leaves π
    invariant up to the quadrature's error, which each transition estimates by a coarser
    rule on a subset of the nodes (``result.levels["quadrature_error"]``). A score that
    is not a gradient has no π: `infer` measures the curl of every factor that does not
    promise a gradient.

    Args:
        num_points: n equidistant nodes on the straight line from x to x', both ends
            among them: n − 2 further evaluations a transition. None, for HMC only: the
            path is the trajectory itself and its nodes the leapfrog's own, at no
            further evaluation, and with nodes as far apart as leapfrog steps take the
            chain.
        rule: ``"trapezoid"``, of second order, or ``"simpson"``, of fourth order, which
            needs an odd number of nodes (for the trajectory an even number of
            leapfrogs). Simpson's rule is the better one where the score is smooth at
            the scale of a step.
        tolerance: the greatest estimated error of log π(x') − log π(x), in nats, of a
            move that is accepted. The way back has the same estimate, so that this
            favours none. Without a bound, moves between modes whose valley contains no
            node change the invariant density.

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
        """Refuse a tolerance on a path that is too short to estimate its error."""
        if self.tolerance < math.inf and intervals < 2:
            raise InvalidValueError(
                f"LineIntegral(tolerance={self.tolerance!r}) has no estimate of the "
                "error between two nodes.",
                fix=f"{fix}, or leave tolerance out.",
            )

    @property
    def shares(self) -> Float[Array, " nodes"]:
        """Values of t at the nodes of the straight line, from 0 to 1."""
        assert self.num_points is not None
        t = np.arange(self.num_points) / (self.num_points - 1)
        return jnp.asarray(t, jnp.result_type(float))

    @property
    def extra_evaluations(self) -> int:
        """Evaluations that one transition needs for the integral alone."""
        return 0 if self.num_points is None else self.num_points - 2

    def begin(self, start: StateT, length: int) -> Path[StateT]:
        """Return the path of a proposal with its start x as the only node so far; the
        last of its ``length`` evaluations is at the end of the path."""
        if self.num_points is not None:
            # x stands for x' until that is known: arrays keep their shapes.
            slopes = tuple(jnp.zeros_like(self.shares) for _ in _integrands(start))
            return Path(start, self.shares, slopes)

        def first_node(x: Array) -> Array:
            nodes = jnp.zeros((length + 1, *jnp.shape(x)), jnp.result_type(x))
            return nodes.at[0].set(x)

        positions = jax.tree.map(first_node, start.position)
        scores = jax.tree.map(first_node, _integrands(start))
        return Path(None, positions, scores)

    def record(
        self,
        i: Array | int,
        length: int,
        path: Path[StateT],
        start: StateT,
        point: StateT,
    ) -> Path[StateT]:
        """Return the path with evaluation i of a transition, at ``point``.

        The first ``length`` evaluations lead to x', the others are at the inner nodes
        of the straight line: of those only the evaluation of ``point`` is read.
        """
        if path.end is None:

            def set_node(nodes: Array, x: Array) -> Array:
                return nodes.at[i + 1].set(x)

            positions = jax.tree.map(set_node, path.positions, point.position)
            scores = jax.tree.map(set_node, path.scores, _integrands(point))
            return Path(None, positions, scores)
        # The chord is known once x' is; the slopes that were set along earlier ones are
        # overwritten.
        inner = i - (length - 1)
        end = pytree.where(jnp.asarray(inner <= 0), point, path.end)
        chord = pytree.axpy(-1.0, start.position, end.position)
        last = len(path.positions) - 1
        node = jnp.where(inner <= 0, last, inner)
        scores = []
        for slopes, first, score in zip(
            path.scores, _integrands(start), _integrands(point), strict=True
        ):
            slopes = slopes.at[0].set(pytree.vdot(first, chord))
            scores.append(slopes.at[node].set(pytree.vdot(score, chord)))
        return Path(end, path.positions, tuple(scores))

    def node(self, j: Array | int, path: Path[StateT], start: StateT) -> Position:
        """Return node j of the straight line."""
        assert path.end is not None
        t = path.positions[j]

        def between(a: Array, b: Array) -> Array:
            return ((1 - t) * a + t * b).astype(a.dtype)

        return jax.tree.map(between, start.position, path.end.position)

    def finish(
        self, length: int, path: Path[StateT], start: StateT, point: StateT
    ) -> tuple[StateT, Float[Array, ""], Float[Array, ""]]:
        """Return the end of a path.

        Args:
            length: evaluations that lead to x'.
            path: with all evaluations but the last.
            start: the state at x.
            point: of the last evaluation.

        Returns:
            The proposal x' with its evaluation, in which log f of tracked factors is
            carried from x by the same integral; log π(x') − log π(x), −∞ beyond
            the tolerance; and the estimate of its error.
        """
        last = length - 1 + self.extra_evaluations
        path = self.record(last, length, path, start, point)
        # The last evaluation is at x' along a trajectory, but at an inner node of a
        # straight line, whose end was kept.
        proposed = point if path.end is None else path.end
        of_density, *of_factors = path.scores
        log_ratio, error = self.along(path.positions, of_density)
        rises = [self.along(path.positions, scores)[0] for scores in of_factors]
        proposed = _carried(start, proposed, rises)
        # The integral is over the score of unknown terms; the others have values.
        there = proposed.evaluation
        here = start.evaluation
        if there.closed_form is not None and here.closed_form is not None:
            closed_form = there.closed_form.value - here.closed_form.value
            # Where both are beyond a wall, chains move as if there were none.
            both = there.zero & here.zero
            log_ratio = log_ratio + jnp.where(both, 0.0, closed_form)
        return proposed, jnp.where(error > self.tolerance, -jnp.inf, log_ratio), error

    def along(
        self, positions: Position, scores: Position
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Return log π(last) − log π(first) along a path, and the estimate of its
        error; NaN where a score on the way is not finite.

        Args:
            positions: nodes at equal distances of the path's parameter, (n + 1, …).
            scores: ∇ log π at each of them.
        """
        intervals = jax.tree.leaves(positions)[0].shape[0] - 1
        integral, order = _RULES[self.rule]
        fine = integral(positions, scores)
        error = jnp.full_like(fine, jnp.nan)
        stride = coarse_stride(self.rule, intervals)
        if stride is not None:
            # Richardson's estimate, by the same rule on every r-th node.
            coarse = integral(_thinned(positions, stride), _thinned(scores, stride))
            error = jnp.abs(fine - coarse) / (stride**order - 1)
        elif self.rule == "simpson":
            # Two intervals are too few for a coarser Simpson's rule.
            error = jnp.abs(fine - trapezoid(positions, scores))
        return jnp.where(jnp.isfinite(fine), fine, jnp.nan), error


def bounded(samples: int = 1) -> LineIntegral:
    """Return the integral of default runs, for densities that offer only their score.

    An error of so many nats in every move shifts means by as many standard deviations.
    The tolerance is no more than what is left to chance: 1/√samples of independent
    ones.
    """
    tolerance = min(tuning.BY_SCORE.tolerance, 1 / math.sqrt(samples))
    return LineIntegral(tuning.BY_SCORE.nodes, "simpson", tolerance)


LogRatio = Literal["exact"] | LineIntegral
"""Source of log π(x') − log π(x): the density's values, or its scores."""


def check_log_ratio(log_ratio: object, owner: str) -> None:
    """Raise unless `log_ratio` is ``"exact"`` or a `LineIntegral`."""
    if isinstance(log_ratio, LineIntegral):
        return
    if isinstance(log_ratio, str) and log_ratio == "exact":
        return
    raise WrongTypeError(
        f"{owner}(log_ratio=) is {log_ratio!r}",
        fix='give "exact", or cp.LineIntegral() for densities without energy',
    )


def needed_by(log_ratio: LogRatio) -> frozenset[str]:
    """Return the capabilities that a density must have for this log-ratio."""
    if isinstance(log_ratio, LineIntegral):
        return frozenset({"score"})
    return frozenset({"energy", "score"})


def extra_evaluations(log_ratio: LogRatio) -> int:
    """Return the evaluations that one transition needs for its log-ratio alone."""
    if isinstance(log_ratio, LineIntegral):
        return log_ratio.extra_evaluations
    return 0


def coarse_stride(rule: str, intervals: int) -> int | None:
    """Return the smallest r > 1 such that the rule also fits on every r-th node, None
    where there is none: r divides the number of intervals, and leaves Simpson's rule an
    even number of them."""
    unit = 2 if rule == "simpson" else 1
    for stride in range(2, intervals + 1):
        if intervals % (stride * unit) == 0:
            return stride
    return None


def trapezoid(x: Position, s: Position) -> Float[Array, ""]:
    r"""Return Σᵢ ½⟨sᵢ + sᵢ₊₁, xᵢ₊₁ − xᵢ⟩ over nodes stacked on the leading axis."""
    steps = jax.tree.map(lambda a: a[1:] - a[:-1], x)
    sums = jax.tree.map(lambda a: a[1:] + a[:-1], s)
    return 0.5 * pytree.vdot(sums, steps)


def simpson(x: Position, s: Position) -> Float[Array, ""]:
    r"""Return the integral by Simpson's rule along the parabolas through three nodes
    each.

    On a parabola through $x_0, x_1, x_2$ at t = 0, 1, 2 the velocity at the nodes is
    $\tfrac12(-3x_0+4x_1-x_2)$, $\tfrac12(x_2-x_0)$ and $\tfrac12(x_0-4x_1+3x_2)$, so
    that

    $$\tfrac13\big(\langle s_0, \dot x_0\rangle + 4\langle s_1, \dot x_1\rangle
      + \langle s_2, \dot x_2\rangle\big)$$

    is of fourth order along the parabola itself: bent paths lose nothing, unlike with
    chords in place of velocities.
    """

    def weighted(a: Array) -> Array:
        first = a[:-1:2]
        middle = a[1::2]
        last = a[2::2]
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


def _integrands(state: KernelState) -> tuple[Position, ...]:
    """Return the gradient of the term of log π that has no closed form, and those of
    log f of tracked factors."""
    closed_form = state.evaluation.closed_form
    score = state.evaluation.score if closed_form is None else closed_form.score
    tracked = state.evaluation.tracked
    if tracked is None:
        return (score,)
    return (score, *tracked.scores)


def _carried(start: StateT, proposed: StateT, rises: list[Array]) -> StateT:
    """Return the proposal with log f of each tracked factor: that of the start, and its
    rise on the way."""
    here = start.evaluation.tracked
    there = proposed.evaluation.tracked
    if here is None or there is None:
        return proposed
    tracked = there.with_values(here.values + jnp.stack(rises))
    evaluation = dataclasses.replace(proposed.evaluation, tracked=tracked)
    return dataclasses.replace(proposed, evaluation=evaluation)


def _thinned(nodes: Position, stride: int) -> Position:
    """Return every ``stride``-th node."""
    return jax.tree.map(lambda a: a[::stride], nodes)
