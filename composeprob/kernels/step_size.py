"""Step sizes: numbers, one per level, rules of the schedule, and adaptation to an
acceptance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.evaluation import Position
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.schedule import Schedule

if TYPE_CHECKING:
    from composeprob.kernels.kernel import Kernel


class Rule(eqx.Module):
    """A step size per level computed from the schedule; made from any function given as
    a `step_size`."""

    function: Callable[[Schedule], ArrayLike] = eqx.field(static=True)


class Adaptive(eqx.Module):
    r"""A step size that follows the acceptance of all chains together, level by level.

    The step at level k is $h_k = c\,\sigma_k^p$, with p the kernel's `scale_exponent`
    (2 for MALA, 1 for HMC). After each adapting transition, with $\bar a$ the mean
    acceptance over chains,

    $$\log c \leftarrow \log c + \text{gain}\,(\bar a - a^\star).$$

    c, not h, is carried from one level to the next: what is left to learn at a level is
    only how its geometry differs from its neighbour's, so one transition a level keeps
    the acceptance at its target.

    Args:
        target_acceptance: a*, in (0, 1); None takes the kernel's own (MALA 0.574, HMC
            0.75).
        initial: c at the first level, > 0, without unit (in units of σ_k^p). Left out,
            at most 0.5 and what suits a normal law of d numbers that a product of P
            factors has where noise is all there is, N(0, I·σ²/P): 1.36/(P·d^⅓) where p
            = 2, 1.6/(√P·d^¼) where p = 1.
        gain: > 0. The acceptance of MALA and HMC near its optimum falls by 0.3 to 0.6
            when log h grows by 1, so gains of 1 to 2 remove most of an error in one
            transition and stay stable up to about 3. The average of N chains has an
            error of about 0.4/√N: below some thirty chains take a gain of 0.1 to 0.5.
        warmup: 0 adapts online, after every transition: the chains' average enters
            their own step size, which vanishes with many chains. n > 0 makes n adapting
            transitions at each level, which are counted as evaluations, then freezes
            the step for that level's own transitions: these are then exactly invariant.

    Raises:
        InvalidValueError: for a number out of its range.

    Example:
        >>> from composeprob.kernels import Adaptive, MALA
        >>> MALA(Adaptive(target_acceptance=0.6)).step_size.warmup
        0

    References:
        Roberts and Rosenthal (1998), optimal scaling of Langevin algorithms; Andrieu
        and Thoms (2008), a tutorial on adaptive MCMC.
    """

    target_acceptance: Array | float | None = eqx.field(
        default=None,
        converter=lambda a: (
            a if a is None else as_scalar(a, "Adaptive(target_acceptance=)")
        ),
        repr=False,
    )
    initial: Array | float | None = eqx.field(
        default=None,
        converter=lambda c: c if c is None else as_scalar(c, "Adaptive(initial=)"),
        repr=False,
    )
    gain: Array | float = eqx.field(
        default=1.5, converter=lambda gain: as_scalar(gain, "Adaptive(gain=)")
    )
    warmup: int = eqx.field(default=0, static=True)

    def __check_init__(self) -> None:
        check_range(
            self.target_acceptance,
            "Adaptive(target_acceptance=)",
            1.0,
            fix="a number in (0, 1)",
        )
        check_range(
            self.initial, "Adaptive(initial=)", fix="a positive number such as 0.5"
        )
        check_range(self.gain, "Adaptive(gain=)", fix="a positive number such as 1.5")
        check_count(self.warmup, "Adaptive(warmup=)", least=0)

    def __repr__(self) -> str:
        return settings(self)

    @property
    def log_scale(self) -> Array:
        """log c before any adaptation, a scalar."""
        return jnp.log(
            tuning.STEP_SIZE.longest if self.initial is None else self.initial
        )

    def starting(self, kernel: Kernel, size: int, power: float) -> Adaptive:
        """The same, with a number for `initial`: the one given, or that for d numbers
        and P factors; of a kernel with another p nothing is known, and it is
        `tuning.STEP_SIZE.longest`."""
        if self.initial is not None:
            return self
        length, decay = tuning.STEP_SIZE.lengths.get(
            kernel.scale_exponent, (math.inf, 0.0)
        )
        start = min(
            tuning.STEP_SIZE.longest,
            (length * size**-decay / math.sqrt(power)) ** kernel.scale_exponent,
        )
        return Adaptive(self.target_acceptance, start, self.gain, self.warmup)

    def target(self, kernel: Kernel) -> Array:
        """a*: the acceptance to aim for with this kernel, a scalar."""
        goal = (
            kernel.optimal_acceptance
            if self.target_acceptance is None
            else self.target_acceptance
        )
        return jnp.asarray(goal, dtype=float)


StepSize = Array | Rule | Adaptive
"""A kernel's `step_size` after construction: a scalar or (K,) array, a rule, or
adaptation."""
StepSizeLike = StepSize | ArrayLike | Callable[[Schedule], ArrayLike]
"""What may be given as one."""


def as_step_size(value: object) -> StepSize:
    """What a user may give as a step size, in one of three forms."""
    if isinstance(value, Adaptive | Rule):
        return value
    if callable(value) and not isinstance(value, type):
        return Rule(value)
    return as_numbers(
        value,
        "a step size",
        "a number, one number per level, a function of the schedule, or Adaptive()",
    )


def resolve(step_size: StepSize, schedule: Schedule, kernel: Kernel) -> Array:
    """The step size of every level, (K,), before any adaptation: of `kernel.step_size`
    on the levels of a schedule."""
    name, num_levels = type(kernel).__name__, schedule.num_levels
    if isinstance(step_size, Adaptive):
        return scaled_step(step_size.log_scale, schedule.sigma, kernel)
    if isinstance(step_size, Rule):
        what = f"the step-size rule of {name}"
        try:
            given = step_size.function(schedule)
        except (AttributeError, TypeError) as error:
            raise WrongTypeError(
                f"{what} failed: {error}",
                fix="let it take the levels, which have sigma and alpha, (K,), such as `lambda s: 0.1 * s.sigma**2`",
            ) from error
        steps = as_numbers(given, f"what {what} returned", "an array of shape (K,)")
        if steps.shape != (num_levels,):
            raise ShapeError(
                f"{what} returned shape {steps.shape} for a schedule of {num_levels} levels",
                fix="return one step per level, such as `lambda s: 0.1 * s.sigma**2`",
            )
        check_range(
            steps, what, fix="a rule that gives positive, finite steps at every level"
        )
        return steps
    if step_size.ndim == 0:
        return jnp.full((num_levels,), step_size)
    if step_size.shape != (num_levels,):
        raise ShapeError(
            f"{name} has {step_size.shape[0]} step sizes, but the schedule has {num_levels} levels",
            fix="give one step per level (index 0 is the cleanest), a single number, or a rule such as "
            "`lambda s: 0.1 * s.sigma**2`, which fits any schedule",
        )
    return step_size


def scaled_step(log_scale: Array, sigma: Array, kernel: Kernel) -> Array:
    """h = c·σ^p with p the kernel's `scale_exponent`; the shape of `sigma`."""
    return jnp.exp(log_scale) * sigma**kernel.scale_exponent


def adapt(
    log_scale: Array, mean_acceptance: Array, target: Array | float, gain: Array | float
) -> Array:
    """log c + gain·(mean acceptance − target): one Robbins–Monro step of constant
    gain."""
    return log_scale + gain * (mean_acceptance - target)


def mean_acceptance(
    acceptance: Array,
    total: Callable[[Array], Array] = lambda units: jnp.sum(units, axis=0),
    num_chains: int | None = None,
) -> Array:
    """The mean of probabilities over the chains that lead, the same however these are
    spread over devices: a sum of floats depends on its order, one of integers, to which
    1024 times each is rounded, does not. Exact for up to two million chains (int32).

    Args:
        acceptance: of the chains that are here, (n, …).
        total: adds up integers over all chains, those of other devices too.
        num_chains: N over all devices, n if left out.
    """
    unit = tuning.STEP_SIZE.acceptance_units
    units = total(jnp.round(acceptance * unit).astype(jnp.int32))
    return units.astype(jnp.result_type(float)) / (
        unit * (num_chains or acceptance.shape[0])
    )


def match_precision(number: Array | float, position: Position) -> Array:
    """A scalar in the precision of the position, so that a float64 step never promotes
    a float32 chain."""
    return jnp.asarray(number, jnp.result_type(*jax.tree.leaves(position)))


def check_range(
    value: ArrayLike | None,
    what: str,
    high: float = np.inf,
    *,
    fix: str,
    closed: bool = False,
) -> None:
    """Raises unless every number lies in (0, high), or [0, high) if `closed`; traced
    values are not looked at."""
    if value is None or isinstance(value, jax.core.Tracer):
        return
    numbers = np.asarray(value)
    good = (numbers >= 0 if closed else numbers > 0) & (numbers < high)
    if not np.all(good):
        found = numbers if numbers.ndim == 0 else numbers[~good][0]
        raise InvalidValueError(f"{what} is {found:.6g}", fix=f"give {fix}")


def as_scalar(value: object, what: str) -> Array:
    """A number as a scalar array of the default precision; raises for anything else."""
    number = as_numbers(value, what, "a number")
    if number.ndim:
        raise ShapeError(f"{what} has shape {number.shape}", fix="give one number")
    return number


def describe(value: object) -> str:
    """A hyper-parameter as short text: numbers as numbers, arrays by their shape."""
    if isinstance(value, Rule):
        return getattr(value.function, "__qualname__", repr(value.function))
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        return f"{float(value):.6g}" if value.ndim == 0 else f"array{value.shape}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return repr(value)


def settings(module: eqx.Module) -> str:
    """A module with its fields as short text, those of ``repr=False`` where they are
    not the default."""
    fields = {f: getattr(module, f.name) for f in dataclasses.fields(module)}
    shown = {
        f.name: value
        for f, value in fields.items()
        if f.repr or describe(value) != describe(f.default)
    }
    return f"{type(module).__name__}({', '.join(f'{name}={describe(value)}' for name, value in shown.items())})"


def as_numbers(value: object, what: str, expected: str) -> Array:
    """Numbers as an array of the default precision; raises for anything else."""
    try:
        # Of what the user wrote the host makes an array, which compiles nothing.
        numbers = (
            jnp.asarray(value) if isinstance(value, jax.Array) else np.asarray(value)
        )
        real = jnp.issubdtype(numbers.dtype, jnp.floating) or jnp.issubdtype(
            numbers.dtype, jnp.integer
        )
    except (TypeError, ValueError):
        real = False
    if not real:
        raise WrongTypeError(
            f"{what} cannot be {value!r}, of type {type(value).__name__}",
            fix=f"give {expected}",
        )
    return jnp.asarray(numbers.astype(jnp.result_type(float)))
