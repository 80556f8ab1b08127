"""Factors, their leaves, and the operators that combine them."""

from __future__ import annotations

import dataclasses
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    Self,
    SupportsIndex,
    TypeGuard,
)

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from composeprob.arguments import as_condition
from composeprob.errors import (
    ConditionError,
    NetworkError,
    ShapeError,
    WrongTypeError,
    unknown_name,
)
from composeprob.factors import show
from composeprob.factors.values import refuse, refused
from composeprob.schedule import Noise, Schedule, check_schedule, log_snr_of
from composeprob.text import clipped, spoken_shape
from composeprob.user_code import called, is_own


class Factor(eqx.Module):
    """A non-negative function f(x, k) of one event x at a noise level k, given by its
    logarithm or only by its score.

    Factors multiply (``f * g``), divide (``f / g``) and take powers (``f ** w``); none
    of these evaluates anything. A factor is a pytree: the arrays of its network are
    leaves.

    Attributes:
        event_shape: the shape of one event, no chain axis.
    """

    event_shape: eqx.AbstractVar[tuple[int, ...]]

    @property
    def children(self) -> tuple[Factor, ...]:
        """The factors that it combines."""
        return ()

    def with_children(self, children: tuple[Factor, ...]) -> Factor:
        """The same node of an expression over other factors."""
        return self

    def split(self) -> list[tuple[Factor, float]]:
        """The factor as a product of (factor, power) pairs, at its outermost level. A
        product over data is one factor."""
        return [(self, 1.0)]

    @property
    def uncalibrated(self) -> Factor:
        """The factor without the constants that `calibrate` added."""
        return self

    @property
    def sealed(self) -> bool:
        """True if rescaling its factors would make it another function of x, as for a
        mixture: constants in it must then stay."""
        return False

    @property
    def normalised(self) -> bool:
        """True if it integrates to 1 at every level."""
        return False

    @abstractmethod
    def given(self, **conditions: object) -> Factor:
        """The same factor with conditions fixed: f(x | c).

        Raises:
            ConditionError: a name that the factor does not have, or a condition given
                twice.
        """

    def terms(self) -> list[tuple[str, float]]:
        """The factor as a product, for printing: the name of what is multiplied, and
        its power."""
        return [(type(self).__name__.lower(), 1.0)]

    def __repr__(self) -> str:
        return show.formula(self.terms())

    def __mul__(self, other: Factor) -> Factor:
        from composeprob.factors.algebra import product

        if not is_factor(other):
            refuse("*", self, other)
        return product(self, other)

    def __truediv__(self, other: Factor) -> Factor:
        from composeprob.factors.algebra import power, product

        if not is_factor(other):
            refuse("/", self, other)
        return product(self, power(other, -1.0))

    def __pow__(self, exponent: float) -> Factor:
        from composeprob.factors.algebra import power

        return power(self, exponent)

    def __getitem__(self, index: object) -> NoReturn:
        refuse("[…]", self, index)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        refuse("(…)", self, args)

    if not TYPE_CHECKING:  # a type checker that saw this would believe in every name

        def __getattr__(self, name: str) -> NoReturn:
            raise unknown_name("Factor", name, dir(self))

    # Operators that densities do not have raise errors that say what to write instead.
    __neg__ = refused("-", alone=True)
    __invert__ = refused("~", alone=True)
    __pos__ = refused("+", alone=True)
    __abs__ = refused("abs ", alone=True)
    __bool__ = refused("The truth of ", alone=True)  # `f and g` would be g alone
    __array_ufunc__ = None  # NumPy leaves `array * factor` to the methods below
    __rmul__ = refused("*", reflected=True)
    __rtruediv__ = refused("/", reflected=True)
    __rpow__ = refused("**", reflected=True)
    __add__ = refused("+")
    __sub__ = refused("-")
    __or__ = refused("|")
    __and__ = refused("&")
    __xor__ = refused("^")
    __matmul__ = refused("@")
    __radd__ = refused("+", reflected=True)
    __rsub__ = refused("-", reflected=True)
    __ror__ = refused("|", reflected=True)
    __rand__ = refused("&", reflected=True)


class Around(Factor):
    """A node of an expression that wraps one factor.

    Attributes:
        factor: the wrapped factor.
    """

    factor: eqx.AbstractVar[Factor]

    @property
    def children(self) -> tuple[Factor, ...]:
        return (self.factor,)

    def with_children(self, children: tuple[Factor, ...]) -> Factor:
        return dataclasses.replace(self, factor=children[0])

    def given(self, **conditions: object) -> Factor:
        return self.with_children((self.factor.given(**conditions),))


Levels = Literal["range", "real", "own", "any"]


@dataclasses.dataclass(frozen=True)
class Traits:
    """Properties that a leaf declares, so that no module tests for its class.

    Attributes:
        offers: among ``score``, ``energy``, ``conservative``, ``normalised``,
            ``exact_marginals``, ``mode_depth`` (its log-density has the relative height
            of separated modes).
        levels: the levels that it takes: ``"any"`` α and σ, at which it is exact, so
            that no schedule needs aligning; those in a ``"range"`` of log-SNR; there
            also a ``"real"`` number between two of its schedule's in `Noise.index`; or
            its ``"own"`` schedule's only (a discrete time embedding).
        conditions: names of the conditions that `given` takes.
        top_power: the factor is close to N(0, σ²I) raised to this power at the noisiest
            level: 1 for a diffusion, 0 for a bounded potential such as a classifier.
        entry_powers: the top power of each entry of the event, where entries count
            differently.
        dimension: the number of entries that it is a density of, as Feynman–Kac rates
            count them; None for those of the event.
        constant: whether it depends on the level alone.
        user_defined: whether it is a user-defined function of x, which calls no
            network.
        declared: whether the files of its training state the meaning of its output:
            then a mismatch is reported and not refused.
        log_snr_range: the least and greatest log-SNR that it is defined for; None for
            those of its levels.
        pictures: makes images with values from 0 to 1 of a stack of events; None for
            events that are not images.
    """

    offers: frozenset[str]
    levels: Levels = "range"
    conditions: tuple[str, ...] = ()
    top_power: float = 1.0
    entry_powers: ArrayLike | None = None
    dimension: float | None = None
    constant: bool = False
    user_defined: bool = False
    declared: bool = False
    log_snr_range: tuple[float, float] | None = None
    pictures: Callable[[object], np.ndarray] | None = None

    ENERGY: ClassVar[frozenset[str]] = frozenset({"score", "energy", "conservative"})
    """Capabilities of a log-density."""
    EXACT: ClassVar[frozenset[str]] = ENERGY | {
        "normalised",
        "exact_marginals",
        "mode_depth",
    }
    """Capabilities of a log-density whose noised marginals are known with their
    constants."""


class OrOfTokens(type(Factor)):  # type: ignore[misc]  # Equinox's metaclass
    """The class of leaves that have a categorical form, which a call makes where its
    arguments are those of one: ``cp.Energy(fn, length=8, num_values=4)``."""

    def __call__(cls, *args: object, **kwargs: object) -> object:
        of_tokens = cls.of_tokens(*args, **kwargs)
        if of_tokens is not None:
            return of_tokens
        return super().__call__(*args, **kwargs)


class LeafFactor(Factor):
    """A factor that is evaluated itself: a network, a closed form, a user-defined
    function.

    Subclasses are final, and set the fields below.

    Attributes:
        schedule: the levels that the factor is defined on.
        fixed: the conditions given so far, ``{name: array}``.
        label: how the factor is called in print-outs and errors.
    """

    schedule: Schedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    fixed: Mapping[str, Array]
    label: str = eqx.field(static=True)

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """Properties that the leaf declares."""

    @property
    def capabilities(self) -> frozenset[str]:
        """Capabilities of the leaf, as `Traits.offers`."""
        return self.traits.offers

    @property
    def normalised(self) -> bool:
        return "normalised" in self.traits.offers

    def terms(self) -> list[tuple[str, float]]:
        return [(show.named(self.label, self.shown_conditions), 1.0)]

    @property
    def shown_conditions(self) -> dict[str, str]:
        """The conditions given so far, as they are printed."""
        # A calibration's tables and a tapestry's weights lie in `fixed` too.
        return {
            name: show.short(value)
            for name, value in self.fixed.items()
            if name in self.traits.conditions
        }

    def __repr__(self) -> str:
        return clipped(f"{self.terms()[0][0]} ({', '.join(self._about())})")

    def _about(self) -> tuple[str, ...]:
        """Words that are printed beside the leaf's name: its kind, and the shape of its
        events."""
        if "energy" in self.traits.offers:
            kind = "energy"
        else:
            kind = "score"
        return kind, spoken_shape(self.event_shape)

    def check_network(self) -> None:
        """Refuse a factor that cannot be evaluated with the conditions given so far.

        Raises:
            NetworkError: its network cannot be called, or its output has the wrong
                shape.
            ConditionError: a condition is missing.
        """
        if is_own(self):
            self._check_own()

    def _check_own(self) -> None:
        """Refuse a factor of a user's class whose `evaluate` returns no log-density and
        gradient of one event."""
        name = f"The factor '{self.label}' of class {type(self).__name__}"
        if not isinstance(self.traits.offers, frozenset):
            raise WrongTypeError(
                f"{name} offers {self.traits.offers!r}, which is no frozenset.",
                fix="give Traits(Traits.ENERGY), Traits(frozenset({'score'})) or the "
                "like.",
            )
        returned = called(
            name,
            f"evaluate(x, noise, conditions) with x of shape {self.event_shape}",
            lambda: jax.eval_shape(
                self.evaluate,
                self.abstract_event(),
                self.schedule.at(0),
                self.call_conditions(),
            ),
            "it takes one event, a Noise, and a mapping of conditions.",
        )
        shapes = [getattr(part, "shape", None) for part in jax.tree.leaves(returned)]
        is_pair = isinstance(returned, tuple) and len(returned) == 2
        of_score = [self.event_shape]
        if not (is_pair and shapes in (of_score, [(), *of_score])):
            raise NetworkError(
                f"{name} returns arrays of shapes {shapes} from evaluate.",
                fix="return (log f(x), its gradient): a number, or None where only the "
                f"score is known, and an array of shape {self.event_shape}.",
            )

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """The least and greatest log-SNR that the factor is defined for; by default
        those of its levels."""
        if self.traits.log_snr_range is not None:
            return self.traits.log_snr_range
        log_snr = log_snr_of(self.schedule.alpha, self.schedule.sigma)
        return float(log_snr[-1]), float(log_snr[0])

    def abstract_event(self) -> Any:
        """Return an event without numbers, to trace an evaluation with."""
        return jax.ShapeDtypeStruct(self.event_shape, jnp.result_type(float))

    def call_conditions(self) -> dict[str, Array]:
        """Every condition with the value that one evaluation receives: the fixed one,
        else its default."""
        return dict(self.fixed)

    @abstractmethod
    def evaluate(
        self, x: Float[Array, "*event"], noise: Noise, conditions: Mapping[str, Array]
    ) -> tuple[Float[Array, ""] | None, Float[Array, "*event"]]:
        """log f(x) at this noise (None for a score-only factor) and ∇ₓ log f(x), from
        ONE network evaluation.

        Args:
            x: one event, of shape `event_shape`.
            noise: the level in the factor's own schedule.
            conditions: as returned by `call_conditions`, possibly with other values.
        """

    def given(self, **conditions: object) -> LeafFactor:
        check_conditions(self, conditions)
        given = {name: as_condition(name, value) for name, value in conditions.items()}
        return self.holding({**self.fixed, **given})

    def holding(self, fixed: Mapping[str, Array]) -> Self:
        """Replace the conditions that the factor holds by ``fixed``."""
        # An empty dict is not a leaf of a pytree by itself, hence `is_leaf`.
        return eqx.tree_at(
            lambda f: f.fixed, self, fixed, is_leaf=lambda node: node is self.fixed
        )


def is_factor(value: object) -> TypeGuard[Factor]:
    """Return whether a value that a user has passed is a factor."""
    return isinstance(value, Factor)


def abstract_arguments(leaf: LeafFactor) -> tuple[Any, Noise]:
    """Return an event and a noise without numbers, to trace an evaluation of the leaf
    with."""
    level = jax.ShapeDtypeStruct((), jnp.result_type(int))
    noise: Noise = jax.eval_shape(leaf.schedule.at, level)
    return leaf.abstract_event(), noise


def check_conditions(leaf: LeafFactor, conditions: Mapping[str, object]) -> None:
    """Refuse names that the leaf does not have, and conditions given twice."""
    names = leaf.traits.conditions
    for name in conditions:
        if name not in names:
            listed = ", ".join(map(repr, names)) or "none"
            if names:
                fix = f"use one of: {listed}."
            else:
                fix = "build the factor with conditions=(…,)."
            raise ConditionError(
                f"Factor '{leaf.label}' has no condition {name!r}; its conditions are: "
                f"{listed}.",
                fix=fix,
            )
        if name in leaf.fixed:
            raise ConditionError(
                f"Condition {name!r} of factor '{leaf.label}' is given twice.",
                fix="keep the unconditioned factor in a variable and call .given on it "
                "once per condition.",
            )


def check_leaf(
    schedule: object, event_shape: Iterable[SupportsIndex]
) -> tuple[int, ...]:
    """Return the event's shape as a tuple of ints; refuse anything but a shape of at
    least one entry, and anything but a schedule."""
    check_schedule(
        schedule,
        "for example cp.Schedule.cosine(100), with the levels that the factor was "
        "trained on.",
    )
    shape = check_shape("event_shape", event_shape)
    if min(shape, default=1) < 1:
        raise ShapeError(
            f"An event of shape {shape} has no entries, so there is nothing to sample.",
            fix="leave the factor out where it has no entries; one number has the "
            "shape ().",
        )
    return shape


def check_shape(what: str, shape: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Return a shape or an offset as a tuple of ints, or raise a `WrongTypeError`."""
    try:
        return tuple(operator.index(n) for n in shape)
    except TypeError as error:
        raise WrongTypeError(
            f"{what} must be a tuple of whole numbers; got {shape!r}.",
            fix="one number per axis, such as (2,).",
        ) from error
