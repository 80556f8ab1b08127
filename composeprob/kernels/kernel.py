"""The contract of a kernel: hyper-parameters, state, places where a transition
evaluates the density, and report."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Key, PyTree

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
    """The state of ONE chain between transitions.

    The evaluation is cached so that no density is evaluated twice at one place. It
    belongs to one level: after a change of level, or of position by hand, call
    `Kernel.relevel`.

    Attributes:
        position: x, a pytree of floating arrays.
        evaluation: of the current level's density at x.
    """

    position: Position
    evaluation: Evaluation


class Trajectory(eqx.Module, Generic[State]):
    """A transition in progress: arrays, whose structure, shapes and precisions stay the
    same from `begin` to `finish`.

    Attributes:
        start: the current state, after a momentum's refreshment.
        position: x', the end of the trajectory so far.
        step_size: h, in the position's precision.
        spare_noise: normals that are not used yet.
        path: the line integral from x to x', of kernels that have one.
    """

    start: State
    position: Position
    step_size: Float[Array, ""]
    spare_noise: Float[Array, " rest"]
    path: PyTree[Array]


class Info(eqx.Module):
    """Report of one transition of one chain, all scalars; of a `Gibbs` one entry for
    each block.

    Attributes:
        acceptance: probability with which the proposal is accepted, in [0, 1]; 1 for an
            unadjusted kernel.
        accepted: True if it was.
        non_finite: True if the proposal (its position, log-density, score, …) had a NaN
            or an infinity; it was then rejected, by unadjusted kernels too. A
            log-density of −∞ does not count: there the density is 0, and the proposal
            is rejected like any other. Neither does a trajectory that diverged, see
            `metropolis`.
        log_reversal: log T(x|x') − log T(x'|x) of the move from x to x' that was made,
            0 where the chain stayed: the log-ratio of the kernel's way back (of a
            `Gibbs`, its `reversal`'s) to its way forth. Under detailed balance that is
            log π(x) − log π(x').
        quadrature_error: estimate of |error| of the log-ratio that decided; 0 where it
            is not a quadrature, NaN where the quadrature has no estimate or the
            proposal was non-finite.
    """

    acceptance: Float[Array, "*blocks"]
    accepted: Bool[Array, "*blocks"]
    non_finite: Bool[Array, "*blocks"]
    log_reversal: Float[Array, "*blocks"]
    quadrature_error: Float[Array, "*blocks"] | float = 0.0


class Kernel(eqx.Module, Generic[State]):
    """A Markov transition that leaves π_k invariant, or nearly so (unadjusted kernels).

    A kernel sees a level's density only as a `Target`, position → `Evaluation`, and
    works on ONE chain: the driver maps it over chains. Contract, for every target π and
    every step size h > 0:

    - if `state` ~ π (with its cached evaluation, and momentum ~ N(0, I) where it has
      one), then the next state ~ π; unadjusted kernels keep this only as h → 0;
    - `state.evaluation == target(state.position)` before and after every `step`;
    - `init` and `relevel` call `target` once, `step` calls it `evaluations_per_step`
      times;
    - numbers are pytree leaves, so another step size does not compile again.

    A transition names the points where it needs the density and leaves the evaluation
    to its driver, so that a compiled loop holds the networks of a density once,
    whatever kernels it runs::

        trajectory, x = kernel.begin(noise, state, step_size)
        for i in range(kernel.evaluations_per_step - 1):
            trajectory, x = kernel.advance(i, trajectory, target(x))
        state, info = kernel.finish(trajectory, target(x))

    `step` is this loop. A kernel that cannot be cut at its evaluations overrides `step`
    instead.

    Attributes:
        step_size: h: a number, one per level (K,), a rule schedule → (K,), or
            `Adaptive`. It is a setting; the value in force is an argument of `step`.
            None for a `Gibbs`, whose blocks have step sizes.
    """

    step_size: StepSizeLike = eqx.field(converter=as_step_size)

    # True if a transition is given the whole vector of a chain, and changes entries of
    # its own sites alone.
    sees_whole: ClassVar[bool] = False
    # True if log-densities of factors that chains carry follow its moves.
    carries: ClassVar[bool] = True

    def __check_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.step_size, Adaptive) and self.optimal_acceptance is None:
            rule = "0.1 * s.sigma**2" if self.scale_exponent == 2 else "0.1 * s.sigma"
            raise CapabilityError(
                f"{name} cannot use an Adaptive step size: it is unadjusted, so there "
                "is no acceptance to adapt to",
                fix=f"give {name} a number, one step per level, or a rule such as "
                f"`lambda s: {rule}`; or use MALA or HMC with Adaptive",
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
        """Capabilities that the density must have (``"score"``, ``"energy"``). A class
        attribute will do."""

    @property
    @abc.abstractmethod
    def evaluations_per_step(self) -> int:
        """Calls of the target in one transition. A class attribute will do."""

    @property
    @abc.abstractmethod
    def optimal_acceptance(self) -> float | None:
        """Mean acceptance that `Adaptive` aims for; None for a kernel that never
        rejects. A class attribute will do."""

    @property
    @abc.abstractmethod
    def scale_exponent(self) -> int:
        """Exponent p in h_k = c·σ_k^p: 2 where h is a squared length (Langevin), 1
        where it is a length. A class attribute will do."""

    def init(self, key: Key[Array, ""], position: Position, target: Target) -> State:
        """Return the state of a chain at `position`; one evaluation. A `KernelState` if
        not overridden.

        Args:
            key: typed random key, for random parts of a state (momentum).
            position: pytree of floating arrays, no chain axis.
            target: the density at the level where the chain starts.
        """
        metric = getattr(self, "metric", None)
        if isinstance(metric, Metric):
            metric.check(position, type(self).__name__)
        return KernelState(position, target(position))  # type: ignore[return-value]

    def relevel(self, state: State, target: Target) -> State:
        """Return the chain under another level's density; exactly one evaluation.

        Without it the first transition at a new level would compare the new density
        with a cached value of the old.
        """
        return dataclasses.replace(state, evaluation=target(state.position))

    @property
    def longest(self) -> float:
        """The greatest step size that `Adaptive` comes to."""
        return math.inf

    def resolved(self, sites: tuple[str, ...], density: PyTree[Array]) -> Kernel:
        """Return the kernel of these sites of a density, before anything is compiled;
        refuse sites or densities that it cannot move."""
        return self

    def under(self, density: PyTree[Array], noise: PyTree[Array]) -> Kernel:
        """Return the kernel for one level of a density: for kernels that need more of
        the density than `step`'s target."""
        return self

    @property
    def resumable(self) -> bool:
        """True if `begin`, `advance` and `finish` may drive a transition: not where a
        class overrides `step`."""
        return type(self).step is Kernel.step

    def noise_size(self, position: Position) -> int:
        """Return the number of standard normals for one transition from ``position``:
        its dimension d, if not overridden."""
        return pytree.size(position)

    def begin(
        self,
        noise: Float[Array, " noise_size"],
        state: State,
        step_size: Float[Array, ""],
    ) -> tuple[PyTree[Array], Position]:
        """Begin a transition.

        Args:
            noise: independent standard normals, (noise_size,). All of a transition's
                randomness.
            state: the chain, evaluated under the current level's density.
            step_size: h, a scalar.

        Returns:
            The trajectory, a `Trajectory` or another pytree of arrays, and the point of
                the first evaluation.
        """
        raise NotImplementedError(
            f"{type(self).__name__} overrides neither `begin` and `finish` nor `step`"
        )

    def advance(
        self, i: Array | int, trajectory: PyTree[Array], evaluation: Evaluation
    ) -> tuple[PyTree[Array], Position]:
        """Continue after an evaluation that is not the last; kernels of one evaluation
        have no use for it.

        Args:
            i: the evaluation's number, from 0 to `evaluations_per_step` − 2; may be
                traced.
            trajectory: what `begin` or `advance` returned.
            evaluation: of the density at the point that they returned.

        Returns:
            A trajectory of the same structure, shapes and precisions, and the point of
                the next evaluation.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has several evaluations a step, and overrides "
            "neither `advance` nor `step`"
        )

    def finish(
        self, trajectory: PyTree[Array], evaluation: Evaluation
    ) -> tuple[State, Info]:
        """Accept or reject after the last evaluation; for the arguments see `advance`.

        Returns:
            The next state and its `Info`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} overrides neither `finish` nor `step`"
        )

    def step(
        self,
        key: Key[Array, ""],
        state: State,
        target: Target,
        step_size: Float[Array, ""],
    ) -> tuple[State, Info]:
        """Make one transition; the target is traced once.

        Args:
            key: typed random key.
            state: the chain, evaluated under `target`.
            target: the density at the current level.
            step_size: h; of a `Gibbs` one for each block. `self.step_size` is not read
                here.

        Returns:
            The next state and its `Info`.
        """
        # All of a transition's randomness, in at least single precision.
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
            advanced = self.advance(i, trajectory, evaluation)
            # After the last evaluation the trajectory stays as it is, for `finish`: one
            # loop, one trace of the target.
            trajectory, position = pytree.where(
                i < last, advanced, (trajectory, position)
            )
            return trajectory, position, evaluation

        trajectory, _, evaluation = jax.lax.fori_loop(
            0, last + 1, evaluate, (trajectory, position, state.evaluation)
        )
        return self.finish(trajectory, evaluation)


def as_kernel(given: Any) -> Any:
    """Return the kernel that an object is among the moves of a sampler, by its method
    ``as_kernel``; anything else as it is."""
    made = getattr(given, "as_kernel", None)
    if isinstance(given, type) or made is None:
        return given
    return made()


def log_density_of(evaluation: Evaluation) -> Float[Array, ""]:
    """Return log π(x) of an evaluation; raise, while tracing, if the density offers
    only its score."""
    value = evaluation.log_density
    if value is None:
        raise CapabilityError(
            "an accept test needs `energy`, but this density offers only `score`",
            fix="use ULA or UHMC, which need scores only, or MALA or HMC with "
            "log_ratio=cp.LineIntegral()",
        )
    return value
