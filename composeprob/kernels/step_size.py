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
from jaxtyping import Float
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

    c, not h, is carried from one level to the next: at a level only the difference of
    its geometry from its neighbour's is left to learn, so one transition a level keeps
    the acceptance at its target.

    Args:
        target_acceptance: a*, in (0, 1); None takes the kernel's own (MALA 0.574, HMC
            0.75).
        initial: c at the first level, > 0, in units of σ_k^p. Left out, at most 0.5,
            and the optimum for the law of a product of P factors under noise alone,
            N(0, I·σ²/P) over d numbers: 1.36/(P·d^⅓) where p = 2, 1.6/(√P·d^¼) where p
            = 1.
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
        converter=lambda a: _as_optional_scalar(a, "Adaptive(target_acceptance=)"),
        repr=False,
    )
    initial: Array | float | None = eqx.field(
        default=None,
        converter=lambda c: _as_optional_scalar(c, "Adaptive(initial=)"),
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
    def log_scale(self) -> Float[Array, ""]:
        """Logarithm of c before any adaptation."""
        scale = tuning.STEP_SIZE.longest if self.initial is None else self.initial
        return jnp.log(scale)

    def starting(self, kernel: Kernel, size: int, power: float) -> Adaptive:
        """Return the rule with a number for `initial`: the one given, or the optimum
        for ``size`` numbers and the ``power`` of the factors.

        Of a kernel with another p than 1 or 2 nothing is known, and it is
        `tuning.STEP_SIZE.longest`.
        """
        if self.initial is not None:
            return self
        # Optimal scaling in units of the width σ/√P: a length ℓ·d^−(1/6) for Langevin,
        # whose step is its square, and ℓ·d^−(1/4) for HMC.
        exponent = kernel.scale_exponent
        length, decay = tuning.STEP_SIZE.lengths.get(exponent, (math.inf, 0.0))
        optimum = (length * size**-decay / math.sqrt(power)) ** exponent
        initial = min(tuning.STEP_SIZE.longest, optimum)
        return Adaptive(self.target_acceptance, initial, self.gain, self.warmup)

    def target(self, kernel: Kernel) -> Float[Array, ""]:
        """Return a*, the acceptance to aim for with this kernel."""
        goal = self.target_acceptance
        if goal is None:
            goal = kernel.optimal_acceptance
        return jnp.asarray(goal, dtype=float)


StepSize = Array | Rule | Adaptive
"""A kernel's `step_size` after construction: a scalar or (K,) array, a rule, or
adaptation."""
StepSizeLike = StepSize | ArrayLike | Callable[[Schedule], ArrayLike]
"""Values that may be given as a step size."""


def as_step_size(value: object) -> StepSize:
    """Return a user's step size in one of three forms."""
    if isinstance(value, Adaptive | Rule):
        return value
    # A class, such as `Adaptive` without its parentheses, is callable too: refused
    # below.
    if callable(value) and not isinstance(value, type):
        return Rule(value)
    return as_numbers(
        value,
        "a step size",
        "a number, one number per level, a function of the schedule, or Adaptive()",
    )


def resolve(
    step_size: StepSize, schedule: Schedule, kernel: Kernel
) -> Float[Array, " levels"]:
    """Return the step size of every level, before any adaptation."""
    if isinstance(step_size, Adaptive):
        return scaled_step(step_size.log_scale, schedule.sigma, kernel)
    name = type(kernel).__name__
    if isinstance(step_size, Rule):
        return _by_rule(step_size, schedule, name)
    num_levels = schedule.num_levels
    if step_size.ndim == 0:
        return jnp.full((num_levels,), step_size)
    if step_size.shape != (num_levels,):
        raise ShapeError(
            f"{name} has {step_size.shape[0]} step sizes, but the schedule has "
            f"{num_levels} levels",
            fix="give one step per level (index 0 is the cleanest), a single number, "
            "or a rule such as `lambda s: 0.1 * s.sigma**2`, which fits any schedule",
        )
    return step_size


def _by_rule(rule: Rule, schedule: Schedule, name: str) -> Float[Array, " levels"]:
    """Return the step sizes by the rule of the kernel of this ``name``."""
    what = f"the step-size rule of {name}"
    try:
        # A user's code: an error in it is reported as one of the rule.
        given = rule.function(schedule)
    except (AttributeError, TypeError, ValueError) as error:
        raise WrongTypeError(
            f"{what} failed: {error}",
            fix="let it take the levels, which have sigma and alpha, (K,), such as "
            "`lambda s: 0.1 * s.sigma**2`",
        ) from error
    steps = as_numbers(
        given, f"the value that {what} returned", "an array of shape (K,)"
    )
    if steps.shape != (schedule.num_levels,):
        raise ShapeError(
            f"{what} returned shape {steps.shape} for a schedule of "
            f"{schedule.num_levels} levels",
            fix="return one step per level, such as `lambda s: 0.1 * s.sigma**2`",
        )
    check_range(
        steps, what, fix="a rule that gives positive, finite steps at every level"
    )
    return steps


def scaled_step(
    log_scale: Float[Array, ""], sigma: Float[Array, "*levels"], kernel: Kernel
) -> Float[Array, "*levels"]:
    """Return h = c·σ^p with p the kernel's `scale_exponent`."""
    return jnp.exp(log_scale) * sigma**kernel.scale_exponent


def adapt(
    log_scale: Float[Array, "*rungs"],
    mean_acceptance: Float[Array, "*rungs"],
    target: Array | float,
    gain: Array | float,
) -> Float[Array, "*rungs"]:
    """Return log c + gain·(mean acceptance − target): one Robbins–Monro step of
    constant gain."""
    return log_scale + gain * (mean_acceptance - target)


def mean_acceptance(
    acceptance: Float[Array, "chains ..."],
    total: Callable[[Array], Array] = lambda units: jnp.sum(units, axis=0),
    num_chains: int | None = None,
) -> Float[Array, ...]:
    """Return the mean of probabilities over the chains, the first axis, the same
    however these are spread over devices.

    A sum of floats depends on its order; a sum of integers, to which 1024 times each is
    rounded, does not. It is exact for up to two million chains (int32).

    Args:
        acceptance: of the chains that are here.
        total: adds up integers over all chains, those of other devices too.
        num_chains: N over all devices, n if left out.
    """
    # Sums of integers are exact, so that any number of devices has the same bits.
    unit = tuning.STEP_SIZE.acceptance_units
    units = total(jnp.round(acceptance * unit).astype(jnp.int32))
    whole = unit * (num_chains or acceptance.shape[0])
    return units.astype(jnp.result_type(float)) / whole


def match_precision(number: Array | float, position: Position) -> Array:
    """Return a scalar in the precision of the position, so that a float64 step never
    promotes a float32 chain."""
    return jnp.asarray(number, jnp.result_type(*jax.tree.leaves(position)))


def check_range(
    value: ArrayLike | None,
    what: str,
    high: float = np.inf,
    *,
    fix: str,
    closed: bool = False,
) -> None:
    """Raise unless every number lies in (0, high), or [0, high) if `closed`; traced
    values are not looked at."""
    if value is None or isinstance(value, jax.core.Tracer):
        return
    numbers = np.asarray(value)
    above = numbers >= 0 if closed else numbers > 0
    good = above & (numbers < high)
    if not np.all(good):
        # Of a scalar the only one; NaN is not good either.
        bad = numbers if numbers.ndim == 0 else numbers[~good][0]
        raise InvalidValueError(f"{what} is {bad:.6g}", fix=f"give {fix}")


def as_scalar(value: object, what: str) -> Float[Array, ""]:
    """Return a number as a scalar array of the default precision; raises for anything
    else."""
    number = as_numbers(value, what, "a number")
    if number.ndim:
        raise ShapeError(f"{what} has shape {number.shape}", fix="give one number")
    return number


def _as_optional_scalar(value: object, what: str) -> Float[Array, ""] | None:
    """Return a number `as_scalar`, and None as it is."""
    if value is None:
        return None
    return as_scalar(value, what)


def describe(value: object) -> str:
    """Return a hyper-parameter as short text: numbers as numbers, arrays by their
    shape."""
    if isinstance(value, Rule):
        return getattr(value.function, "__qualname__", repr(value.function))
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        return f"{float(value):.6g}" if value.ndim == 0 else f"array{value.shape}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return repr(value)


def settings(module: eqx.Module) -> str:
    """Return a module with its fields as short text, those of ``repr=False`` where they
    are not the default."""
    shown = []
    for field in dataclasses.fields(module):
        text = describe(getattr(module, field.name))
        if field.repr or text != describe(field.default):
            shown.append(f"{field.name}={text}")
    return f"{type(module).__name__}({', '.join(shown)})"


def as_numbers(value: object, what: str, expected: str) -> Array:
    """Return numbers as an array of the default precision; raises for anything else."""
    try:
        # The host makes an array of a user's numbers: that compiles nothing.
        as_array = jnp.asarray if isinstance(value, jax.Array) else np.asarray
        numbers = as_array(value)
        kinds = (jnp.floating, jnp.integer)
        real = any(jnp.issubdtype(numbers.dtype, kind) for kind in kinds)
    except (TypeError, ValueError):
        real = False
    if not real:
        raise WrongTypeError(
            f"{what} cannot be {value!r}, of type {type(value).__name__}",
            fix=f"give {expected}",
        )
    return jnp.asarray(numbers.astype(jnp.result_type(float)))
