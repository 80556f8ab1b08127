"""What a kernel is: hyper-parameters with `init`, `relevel` and `step`, its state, and what it reports."""

from __future__ import annotations

import abc
import dataclasses
from typing import Generic, TypeVar

import equinox as eqx
from jax import Array

from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.errors import CapabilityError
from composeprob.kernels.step_size import Adaptive, StepSizeLike, as_step_size, check_step_size, describe

State = TypeVar("State", bound="KernelState")


class KernelState(eqx.Module):
    """What the next transition of ONE chain needs.

    The evaluation is cached so that no density is evaluated twice at one place. It belongs to one level: after a
    change of level, or of position by hand, call `Kernel.relevel`.

    Attributes:
        position: x, a pytree of floating arrays.
        evaluation: what the current level's density gave at x.
    """

    position: Position
    evaluation: Evaluation


class Info(eqx.Module):
    """What one transition of one chain reports, all scalars; of a `Gibbs` one entry for each block.

    Attributes:
        acceptance: probability with which the proposal is accepted, in [0, 1]; 1 for an unadjusted kernel.
        accepted: whether it was.
        non_finite: whether the proposal (its position, log-density, score, …) had a NaN or an infinity; it was then
            rejected, by unadjusted kernels too. A log-density of −∞ does not count: there the density is 0, and the
            proposal is rejected like any other. Neither does a trajectory that diverged, see `metropolis`.
        log_reversal: log T(x|x') − log T(x'|x) of the move from x to x' that was made, 0 where the chain stayed: how
            much likelier the kernel (of a `Gibbs`, its `reversal`) goes back than it went. Under detailed balance that
            is log π(x) − log π(x').
        quadrature_error: estimate of |error| of the log-ratio that decided; 0 where it is no quadrature, NaN where the
            quadrature has no estimate or the proposal was non-finite.
    """

    acceptance: Array
    accepted: Array
    non_finite: Array
    log_reversal: Array
    quadrature_error: Array | float = 0.0


class Kernel(eqx.Module, Generic[State]):
    """A Markov transition that leaves π_k invariant, or nearly so (unadjusted kernels).

    A kernel sees a level's density only as a `Target`, position → `Evaluation`, and works on ONE chain: the driver
    maps it over chains. Contract, for every target π and every step size h > 0:

    - if `state` ~ π (with its cached evaluation, and momentum ~ N(0, I) where it has one), then `step(...)[0]` ~ π;
      unadjusted kernels keep this only as h → 0;
    - `state.evaluation == target(state.position)` before and after every `step`;
    - `init` and `relevel` call `target` once, `step` calls it `evaluations_per_step` times;
    - numbers are pytree leaves, so another step size does not compile again.

    Attributes:
        step_size: h: a number, one per level (K,), a rule schedule → (K,), or `Adaptive`. It describes what to run;
            the value in force is handed to `step`. None of a `Gibbs`, whose blocks have their own.
        requires: capabilities that the density must have (``"score"``, ``"energy"``).
        evaluations_per_step: calls of the target in one transition.
        optimal_acceptance: the mean acceptance that `Adaptive` aims for; None where nothing is ever rejected.
        scale_exponent: p in h_k = c·σ_k^p: 2 where h is a squared length (Langevin), 1 where it is a length.
    """

    step_size: StepSizeLike = eqx.field(converter=as_step_size)

    def __check_init__(self) -> None:
        name = type(self).__name__
        if self.step_size is None:  # the blocks have their own
            return
        if isinstance(self.step_size, Adaptive) and self.optimal_acceptance is None:
            raise CapabilityError(
                f"{name} cannot use an Adaptive step size: it is unadjusted, so there is no acceptance to adapt to",
                fix=f"give {name} a number, one step per level, or a rule such as `lambda s: 0.1 * s.sigma"
                f"{'**2' if self.scale_exponent == 2 else ''}`; or use MALA or HMC with Adaptive",
            )
        check_step_size(as_step_size(self.step_size), name)

    def __repr__(self) -> str:
        fields = {f: getattr(self, f.name) for f in dataclasses.fields(self)}
        shown = {f.name: value for f, value in fields.items() if f.repr or describe(value) != describe(f.default)}
        return f"{type(self).__name__}({', '.join(f'{name}={describe(value)}' for name, value in shown.items())})"

    @property
    @abc.abstractmethod
    def requires(self) -> frozenset[str]:
        """Capabilities that the density must have."""

    @property
    @abc.abstractmethod
    def evaluations_per_step(self) -> int:
        """Calls of the target in one transition."""

    @property
    @abc.abstractmethod
    def optimal_acceptance(self) -> float | None:
        """The mean acceptance that `Adaptive` aims for, None if unadjusted. A plain class attribute will do."""

    @property
    @abc.abstractmethod
    def scale_exponent(self) -> int:
        """p in h_k = c·σ_k^p. A plain class attribute will do."""

    @abc.abstractmethod
    def init(self, key: Array, position: Position, target: Target) -> State:
        """The state of a chain at `position`; one evaluation.

        Args:
            key: typed random key, for what the state draws (momentum).
            position: pytree of floating arrays, no chain axis.
            target: the density at the level where the chain starts.
        """

    def relevel(self, state: State, target: Target) -> State:
        """The same chain under another level's density; exactly one evaluation.

        Without it the first transition at a new level would compare the new density with a cached value of the old.
        """
        return dataclasses.replace(state, evaluation=target(state.position))

    @abc.abstractmethod
    def step(self, key: Array, state: State, target: Target, step_size: Array) -> tuple[State, Info]:
        """One transition.

        Args:
            key: typed random key.
            state: the chain, evaluated under `target`.
            target: the density at the current level.
            step_size: h, a scalar array; of a `Gibbs` one for each block. `self.step_size` is not read here.

        Returns:
            The next state and its `Info`.
        """


def log_density_of(evaluation: Evaluation) -> Array:
    """log π(x) of an evaluation, a scalar.

    Raises:
        CapabilityError: where the density offers its score only; raised while tracing, before anything runs.
    """
    value = evaluation.log_density
    if value is None:
        raise CapabilityError(
            "an accept test needs `energy`, but this density offers only `score`",
            fix="use ULA or UHMC, which need scores only, or MALA or HMC with log_ratio=cp.LineIntegral()",
        )
    return value
