"""What a kernel is: hyper-parameters, its state, where a transition evaluates the
density, and what it reports."""

from __future__ import annotations

import abc
import dataclasses
from typing import Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from composeprob import pytree
from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.errors import CapabilityError, ShapeError
from composeprob.kernels.metric import Metric
from composeprob.kernels.step_size import (
    Adaptive,
    StepSizeLike,
    as_step_size,
    check_range,
    settings,
)

State = TypeVar("State", bound="KernelState")


class KernelState(eqx.Module):
    """What the next transition of ONE chain needs.

    The evaluation is cached so that no density is evaluated twice at one place. It
    belongs to one level: after a change of level, or of position by hand, call
    `Kernel.relevel`.

    Attributes:
        position: x, a pytree of floating arrays.
        evaluation: what the current level's density gave at x.
    """

    position: Position
    evaluation: Evaluation


class Trajectory(eqx.Module, Generic[State]):
    """A transition under way: arrays, whose structure, shapes and precisions stay the
    same from `begin` to `finish`.

    Attributes:
        start: the current state; with a momentum that is refreshed, after that.
        position: x', where the transition leads, as far as is known.
        step_size: h, in the position's precision.
        spare_noise: the normals that have not been used.
        path: the line integral from x to x', of kernels that have one.
    """

    start: State
    position: Position
    step_size: Array
    spare_noise: Array
    path: PyTree[Array]


class Info(eqx.Module):
    """What one transition of one chain reports, all scalars; of a `Gibbs` one entry for
    each block.

    Attributes:
        acceptance: probability with which the proposal is accepted, in [0, 1]; 1 for an
            unadjusted kernel.
        accepted: whether it was.
        non_finite: whether the proposal (its position, log-density, score, …) had a NaN
            or an infinity; it was then rejected, by unadjusted kernels too. A
            log-density of −∞ does not count: there the density is 0, and the proposal
            is rejected like any other. Neither does a trajectory that diverged, see
            `metropolis`.
        log_reversal: log T(x|x') − log T(x'|x) of the move from x to x' that was made,
            0 where the chain stayed: how much likelier the kernel (of a `Gibbs`, its
            `reversal`) goes back than it went. Under detailed balance that is log π(x)
            − log π(x').
        quadrature_error: estimate of |error| of the log-ratio that decided; 0 where it
            is no quadrature, NaN where the quadrature has no estimate or the proposal
            was non-finite.
    """

    acceptance: Array
    accepted: Array
    non_finite: Array
    log_reversal: Array
    quadrature_error: Array | float = 0.0


class Kernel(eqx.Module, Generic[State]):
    """A Markov transition that leaves π_k invariant, or nearly so (unadjusted kernels).

    A kernel sees a level's density only as a `Target`, position → `Evaluation`, and
    works on ONE chain: the driver maps it over chains. Contract, for every target π and
    every step size h > 0:

    - if `state` ~ π (with its cached evaluation, and momentum ~ N(0, I) where it has one), then the next state ~ π;
      unadjusted kernels keep this only as h → 0;
    - `state.evaluation == target(state.position)` before and after every `step`;
    - `init` and `relevel` call `target` once, `step` calls it `evaluations_per_step` times;
    - numbers are pytree leaves, so another step size does not compile again.

    A transition says where it needs the density and leaves the evaluating to its
    driver, so that a compiled loop holds the networks of a density once, whatever
    kernels it runs::

        trajectory, x = kernel.begin(noise, state, step_size)
        for i in range(kernel.evaluations_per_step - 1):
            trajectory, x = kernel.advance(i, trajectory, target(x))
        state, info = kernel.finish(trajectory, target(x))

    `step` is this loop. A kernel that cannot be cut at its evaluations overrides `step`
    instead.

    Attributes:
        step_size: h: a number, one per level (K,), a rule schedule → (K,), or
            `Adaptive`. It describes what to run; the value in force is handed to
            `step`. None of a `Gibbs`, whose blocks have their own.
    """

    step_size: StepSizeLike = eqx.field(converter=as_step_size)

    def __check_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.step_size, Adaptive) and self.optimal_acceptance is None:
            raise CapabilityError(
                f"{name} cannot use an Adaptive step size: it is unadjusted, so there is no acceptance to adapt to",
                fix=f"give {name} a number, one step per level, or a rule such as `lambda s: 0.1 * s.sigma"
                f"{'**2' if self.scale_exponent == 2 else ''}`; or use MALA or HMC with Adaptive",
            )
        if isinstance(self.step_size, Array):
            if self.step_size.ndim > 1:
                raise ShapeError(
                    f"{name} got a step size of shape {self.step_size.shape}",
                    fix="give one number, or one per level: shape (K,)",
                )
            check_range(
                self.step_size, f"{name}(step_size=)", fix="positive, finite numbers"
            )

    __repr__ = settings

    @property
    @abc.abstractmethod
    def requires(self) -> frozenset[str]:
        """Capabilities that the density must have (``"score"``, ``"energy"``). A plain
        class attribute will do."""

    @property
    @abc.abstractmethod
    def evaluations_per_step(self) -> int:
        """Calls of the target in one transition. A plain class attribute will do."""

    @property
    @abc.abstractmethod
    def optimal_acceptance(self) -> float | None:
        """The mean acceptance that `Adaptive` aims for, None where nothing is ever
        rejected. A plain class attribute will do."""

    @property
    @abc.abstractmethod
    def scale_exponent(self) -> int:
        """p in h_k = c·σ_k^p: 2 where h is a squared length (Langevin), 1 where it is a
        length. A plain class attribute will do."""

    def init(self, key: Array, position: Position, target: Target) -> State:
        """The state of a chain at `position`; one evaluation. A plain `KernelState` if
        not overridden.

        Args:
            key: typed random key, for what the state draws (momentum).
            position: pytree of floating arrays, no chain axis.
            target: the density at the level where the chain starts.
        """
        metric = getattr(self, "metric", None)
        if isinstance(metric, Metric):
            metric.check(position, type(self).__name__)
        return KernelState(position, target(position))  # type: ignore[return-value]

    def relevel(self, state: State, target: Target) -> State:
        """The same chain under another level's density; exactly one evaluation.

        Without it the first transition at a new level would compare the new density
        with a cached value of the old.
        """
        return dataclasses.replace(state, evaluation=target(state.position))

    def under(self, density: PyTree[Array], noise: PyTree[Array]) -> Kernel:
        """The kernel for one level of a density, for those that take more of it than
        `step`'s target."""
        return self

    @property
    def resumable(self) -> bool:
        """Whether `begin`, `advance` and `finish` may drive a transition: not where a
        class has a `step` of its own."""
        return type(self).step is Kernel.step

    def noise_size(self, position: Position) -> int:
        """How many standard normals one transition from ``position`` needs: d, its
        numbers, if not overridden."""
        return pytree.size(position)

    def begin(
        self, noise: Array, state: State, step_size: Array
    ) -> tuple[PyTree[Array], Position]:
        """Starts a transition.

        Args:
            noise: independent standard normals, (noise_size,). All of a transition's
                randomness.
            state: the chain, evaluated under the current level's density.
            step_size: h, a scalar.

        Returns:
            The trajectory, a `Trajectory` or another pytree of arrays, and where the
                first evaluation is wanted.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has neither `begin` and `finish` nor a `step` of its own"
        )

    def advance(
        self, i: Array | int, trajectory: PyTree[Array], evaluation: Evaluation
    ) -> tuple[PyTree[Array], Position]:
        """Goes on after an evaluation that is not the last; kernels of one evaluation
        have no use for it.

        Args:
            i: the evaluation's number, from 0 to `evaluations_per_step` − 2; may be
                traced.
            trajectory: what `begin` or `advance` returned.
            evaluation: the density where they wanted it.

        Returns:
            A trajectory of the same structure, shapes and precisions, and where the
                next evaluation is wanted.
        """
        raise NotImplementedError

    def finish(
        self, trajectory: PyTree[Array], evaluation: Evaluation
    ) -> tuple[State, Info]:
        """Accepts or rejects after the last evaluation; arguments as of `advance`.

        Returns:
            The next state and its `Info`.
        """
        raise NotImplementedError

    def step(
        self, key: Array, state: State, target: Target, step_size: Array
    ) -> tuple[State, Info]:
        """One transition; the target is traced once.

        Args:
            key: typed random key.
            state: the chain, evaluated under `target`.
            target: the density at the current level.
            step_size: h, a scalar array; of a `Gibbs` one for each block.
                `self.step_size` is not read here.

        Returns:
            The next state and its `Info`.
        """
        precision = jnp.result_type(jnp.float32, *jax.tree.leaves(state.position))
        noise = jax.random.normal(key, (self.noise_size(state.position),), precision)
        trajectory, position = self.begin(noise, state, step_size)
        last = self.evaluations_per_step - 1
        if last == 0:
            return self.finish(trajectory, target(position))

        def evaluate(
            i: Array, carry: tuple[PyTree[Array], Position, Evaluation]
        ) -> tuple[PyTree[Array], Position, Evaluation]:
            trajectory, position, _ = carry
            evaluation = target(position)
            # After the last evaluation the trajectory stays as it is, for `finish`: one
            # loop, one trace of the target.
            after = pytree.where(
                i < last,
                self.advance(i, trajectory, evaluation),
                (trajectory, position),
            )
            return *after, evaluation

        trajectory, _, evaluation = jax.lax.fori_loop(
            0, last + 1, evaluate, (trajectory, position, state.evaluation)
        )
        return self.finish(trajectory, evaluation)


def log_density_of(evaluation: Evaluation) -> Array:
    """log π(x) of an evaluation, a scalar; raises while tracing where the density
    offers its score only."""
    value = evaluation.log_density
    if value is None:
        raise CapabilityError(
            "an accept test needs `energy`, but this density offers only `score`",
            fix="use ULA or UHMC, which need scores only, or MALA or HMC with log_ratio=cp.LineIntegral()",
        )
    return value
