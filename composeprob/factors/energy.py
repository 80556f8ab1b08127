"""A user-defined log-density as a factor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from numpy.typing import ArrayLike

from composeprob.arguments import check_finite
from composeprob.errors import NetworkError, WrongTypeError
from composeprob.factors.categorical import CategoricalEnergy, token_arguments
from composeprob.factors.equations import calls_host
from composeprob.factors.factor import (
    Factor,
    LeafFactor,
    OrOfTokens,
    Traits,
    check_leaf,
    is_factor,
)
from composeprob.factors.networks import as_network
from composeprob.schedule import Noise, Schedule
from composeprob.user_code import called

LogDensity = Callable[[Array, Array], ArrayLike]
"""(x, level) → log f up to a constant, a scalar."""


class Energy(LeafFactor, metaclass=OrOfTokens):
    """log f(x, k) = fn(x, k), for a user-defined function.

    Of tokens, ``cp.Energy(fn, length=L, num_values=V)``, it is log f = fn(tokens,
    visible): the log-potential of the tokens that are visible, with both arguments of
    shape (L,). With all of them visible it is the one that the program promises; with
    fewer it guides the chains there, and 0 is a valid value.

    Args:
        fn: ``fn(x, level)``, x of shape ``event_shape``, level an integer index into
            ``schedule``; returns a scalar. A function, whose variables from outside of
            it have the values of the time when a program is compiled, or an Equinox
            module whose arrays then are leaves of the factor. Of tokens ``fn(tokens,
            visible)``.
        schedule: the levels that ``level`` counts.
        event_shape: shape of one event.
        top_power: at the noisiest level f must be close to N(0, σ²I) raised to this
            power. 1 for a density that is noised with the level; 0 for a bounded
            potential multiplied onto other factors.
        label: the name to show.
        length, num_values: in the place of a schedule and a shape, for L tokens with
            values 0 … V − 1.

    Raises:
        WrongTypeError: fn cannot be called.
        NetworkError: fn(x, level) fails, or is not a scalar.

    Example:
        >>> import composeprob as cp, jax.numpy as jnp
        >>> schedule = cp.Schedule.cosine(50)
        >>> def up(x, level):
        ...     return -jnp.logaddexp(0.0, -20 * x[1])
        >>> upper_half = cp.Energy(up, schedule, event_shape=(2,), top_power=0.0)
        >>> ring = cp.load("ring2d")
        >>> ring * upper_half
        ring2d * up
    """

    fn: LogDensity
    power_at_top: float = eqx.field(static=True)

    def __init__(
        self,
        fn: LogDensity,
        schedule: Schedule,
        *,
        event_shape: tuple[int, ...],
        top_power: float = 1.0,
        label: str = "",
    ):
        if not callable(fn) or is_factor(fn):
            raise WrongTypeError(
                f"fn must be callable as fn(x, level); got {type(fn).__name__}.",
                fix="pass a function that returns a log-density up to a constant, a "
                "scalar.",
            )
        # The name of a lambda is "<lambda>".
        self.label = label or getattr(fn, "__name__", type(fn).__name__).strip("<>")
        self.fn = check_finite(as_network(fn), f"The function of factor '{self.label}'")
        self.schedule = schedule
        self.event_shape = check_leaf(schedule, event_shape)
        self.power_at_top = float(top_power)
        self.fixed = {}
        self._check_function()

    @classmethod
    def of_tokens(cls, *args: object, **kwargs: object) -> Factor | None:
        """Return the energy of tokens for calls with a length and a number of
        values."""
        arguments = token_arguments("Energy", "fn", args, kwargs)
        return None if arguments is None else CategoricalEnergy(**arguments)

    def _check_function(self) -> None:
        """Refuse a function that cannot be called, or returns anything but a real
        scalar."""
        x = jax.ShapeDtypeStruct(self.event_shape, jnp.result_type(float))
        level = jax.ShapeDtypeStruct((), jnp.int32)
        given: list[object] = []

        def call(x: Array, level: Array) -> object:
            given.append(self.fn(x, level))
            return given[-1]

        traced, returned, _ = called(
            f"The energy '{self.label}'",
            f"fn(x, level) with x of shape {self.event_shape}",
            lambda: eqx.filter_make_jaxpr(call)(x, level),  # type: ignore[arg-type]
            "it must accept one event (no batch axis) and an integer level.",
            " For the noise of the level write schedule.at(level).sigma, not "
            "schedule.sigma[level].",
        )
        if calls_host(traced):
            raise NetworkError(
                f"The energy '{self.label}' calls the host (jax.pure_callback), which "
                "has no gradient.",
                fix="leave it to the run as a criterion of the site: "
                "cp.factor(name, cp.Reward(fn), at=x), with fn of a batch.",
            )
        if given[0] is None or isinstance(given[0], str):
            raise NetworkError(
                f"The energy '{self.label}' returned {given[0]!r}, no number.",
                fix="return log f of the event, a real number.",
            )
        shape = jnp.shape(returned)
        if shape != ():
            raise NetworkError(
                f"The energy '{self.label}' returned shape {shape} instead of a "
                "scalar.",
                fix="sum over the event.",
            )
        dtype = jnp.result_type(returned)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise NetworkError(
                f"The energy '{self.label}' returned {dtype} numbers, which have no "
                "gradient.",
                fix="return a real number, log f of the event: "
                "jnp.where(inside, 0.0, -jnp.inf) of a condition.",
            )

    @property
    def traits(self) -> Traits:
        # A function of the level is not the noised marginal of its level 0, and it has
        # the levels of its schedule alone.
        return Traits(
            Traits.ENERGY | {"mode_depth"},
            "own",
            top_power=self.power_at_top,
            user_defined=True,
        )

    def evaluate(
        self, x: Float[Array, "*event"], noise: Noise, conditions: Mapping[str, Array]
    ) -> tuple[Float[Array, ""] | None, Float[Array, "*event"]]:
        # A function may return a Python number.
        def log_density(point: Array) -> Array:
            return jnp.asarray(self.fn(point, noise.index)).reshape(())

        return jax.value_and_grad(log_density)(x)
