"""A diffusion model as a factor: the meaning of its network's output, and the score or
log-density that follows from it.

With x = α·x_0 + σ·ε, and ε̂ the network's estimate of the noise, the score is −ε̂/σ.
The energy forms (Du et al. 2023, section 4) are trained so that ∇ₓE matches ε, hence
log f(x) = −E(x)/σ up to a constant of the level.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jaxtyping import Float, PyTree
from numpy.typing import ArrayLike

from composeprob.arguments import as_condition, check_choice, check_finite
from composeprob.errors import InvalidValueError, NetworkError
from composeprob.factors.factor import (
    LeafFactor,
    Levels,
    Traits,
    abstract_arguments,
    check_leaf,
)
from composeprob.factors.networks import Network, as_network, check_deterministic
from composeprob.schedule import Noise, Schedule
from composeprob.user_code import called


# The energy E of the output s and the event x, log f = −E/σ (Du et al. 2023): a scalar,
# or the contribution of each entry to it.
def _scalar_energy(output: Array, x: Array) -> Float[Array, ""]:
    return output.reshape(())


def _residual_energy(output: Array, x: Array) -> Array:
    """½‖x − s‖², the form of a denoising autoencoder."""
    return 0.5 * (x - output) ** 2


def _norm_energy(output: Array, x: Array) -> Array:
    """½‖s‖²."""
    return 0.5 * output**2


def _inner_energy(output: Array, x: Array) -> Array:
    """⟨x, s⟩."""
    return x * output


ENERGIES: dict[str, Callable[[Array, Array], Array]] = {
    "energy": _scalar_energy,
    "energy_residual": _residual_energy,
    "energy_norm": _norm_energy,
    "energy_inner": _inner_energy,
}
"""Energy of (output, x), by name: a scalar, or the contribution of each entry."""


# The score −ε̂/σ, with ε̂ of the output and the event.
def _score_of_noise(output: Array, x: Array, noise: Noise) -> Array:
    """The output is ε̂."""
    return -output / noise.sigma


def _score_of_clean_event(output: Array, x: Array, noise: Noise) -> Array:
    """The output is the clean event x̂_0: ε̂ = (x − α·x̂_0)/σ."""
    return (noise.alpha * output - x) / noise.sigma**2


def _score_of_v(output: Array, x: Array, noise: Noise) -> Array:
    """The output is v = (α·ε − σ·x_0)/√(α²+σ²) (Salimans & Ho 2022): ε̂ = (σ·x +
    α·√(α²+σ²)·v)/(α²+σ²)."""
    squared = noise.alpha**2 + noise.sigma**2
    scaled_noise = noise.sigma * x + noise.alpha * jnp.sqrt(squared) * output
    return -scaled_noise / (squared * noise.sigma)


def _score_of_velocity(output: Array, x: Array, noise: Noise) -> Array:
    """The output is the velocity u = ε − x_0 of flow matching (Lipman et al. 2023): ε̂ =
    (x + α·u)/(α + σ)."""
    return -(x + noise.alpha * output) / ((noise.alpha + noise.sigma) * noise.sigma)


def _score_itself(output: Array, x: Array, noise: Noise) -> Array:
    return output


SCORES: dict[str, Callable[[Array, Array, Noise], Array]] = {
    "epsilon": _score_of_noise,
    "x0": _score_of_clean_event,
    "v": _score_of_v,
    "flow": _score_of_velocity,
    "score": _score_itself,
}
"""Score of (output, x, noise), by name."""


def with_number(output: Array | tuple[Array, Array]) -> tuple[Array, Array | float]:
    """Split the output of an energy network into the array that the energy is computed
    from, and the scalar that is added to log f: 0 unless the network returns a pair."""
    if isinstance(output, tuple) and len(output) == 2:
        return output
    return output, 0.0


class Time(NamedTuple):
    """Meaning of a network's argument t.

    Attributes:
        levels: the levels that a network with this t can be evaluated at.
        at: t at a noise.
    """

    levels: Levels
    at: Callable[[Noise], Array]


TIMES: dict[str, Time] = {
    "level": Time("own", lambda noise: noise.index),
    "log_snr": Time("range", lambda noise: noise.log_snr),
    "sigma": Time("range", lambda noise: noise.sigma / noise.alpha),
    "real_level": Time(
        "real", lambda noise: jnp.asarray(noise.index, noise.sigma.dtype)
    ),
}
"""Meanings of t, by name."""

WEIGHTS = "weights of entries"
"""A condition that `tapestry` adds: the weight of each entry of an event, of the
event's shape. It lies among the conditions so that all windows of one network stay one
batched evaluation."""

Encoder = Callable[[Any], ArrayLike]
"""Encodes a user's value of a condition as an array, or raises where it has no
meaning."""


def costly(primitive: Primitive, *_: object, **parameters: Any) -> bool:
    """Return whether a result is stored for a gradient. The others are computed again,
    products in batches (attention) too."""
    product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, **parameters
    )
    return product or primitive.name == "conv_general_dilated"


class Diffusion(LeafFactor):
    """A trained diffusion model: log f(x, k) = −E_θ(x, t_k)/σ_k, or only its score.

    Args:
        network: called on ONE event as ``network(x, t, **conditions)``: an Equinox
            module, a Flax NNX module, a Flax Linen ``(module, variables)`` pair, or a
            function. It returns an array of shape ``event_shape``, or a scalar for
            ``parameterization="energy"``. With an energy it may return a pair: that,
            and a scalar to add to log f, for a term of the whole event, such as the
            fit of a caption.
        schedule: the levels that it was trained on.
        event_shape: shape of one event.
        parameterization: the meaning of the output. Energies: ``"energy"`` (a scalar
            E), ``"energy_residual"`` (½‖x−s‖²), ``"energy_norm"`` (½‖s‖²),
            ``"energy_inner"`` (⟨x, s⟩), each with ∇ₓE matched to the noise ε.
            Score-only: ``"epsilon"``, ``"x0"``, ``"v"``, ``"flow"`` (u = ε − x_0),
            ``"score"``.
        time: the network's argument ``t``: ``"level"``, the level's index in
            ``schedule`` (an integer); ``"log_snr"``, λ = log(α²/σ²); ``"sigma"``, σ/α;
            ``"real_level"``, the level as a real number, interpolated in log-SNR
            between the schedule's levels, for an embedding that is smooth in it (sines
            and cosines, trained on many levels). With the last three the factor can be
            evaluated on any schedule inside the log-SNR range that it was trained on.
        conditions: names of the network's conditions. A mapping ``{name: value}`` also
            states the value that means "no condition" (as trained with dropout of the
            condition); with names alone, or the value None, the network's own default
            is used where a condition is not given.
        log_snr_range: (least, greatest) log-SNR that the network was trained on, where
            that is more than the range of ``schedule``; only for a continuous ``time``,
            and a variance-preserving or -exploding schedule.
        mode_depth: the energy has the relative height of separated modes. Matching
            scores does not teach that; a cross-level loss does
            (``cp.training.CrossLevel``).
        remat: whether gradients of the network, which energies and denoised
            observations take, store only the results of its layers and convolutions,
            and compute again the values between them and within attention. The values
            are the same up to rounding; of a UNet a fifth is stored, for a little more
            time.
        label: the name to show; a compiled program shows the user's variable name
            instead where it finds one.
        encoders: ``{condition: function}``; `given` passes a condition's value through
            the function, which encodes it as an array (text becomes tokens) or refuses
            it (a position outside of the image). The value that means "no condition",
            and values known only when the program runs, are not encoded.

    Raises:
        InvalidValueError, WrongTypeError: an unknown parameterization or time,
            ``mode_depth`` without an energy, a network with NaN weights.
        NetworkError: a network that cannot be called so, or returns an output of
            another shape.

    References:
        Du et al. 2023, *Reduce, Reuse, Recycle*, section 4. Salimans & Ho 2022 for
        ``"v"``, Lipman et al. 2023 for ``"flow"``.

    Example:
        >>> import composeprob as cp
        >>> schedule = cp.Schedule.cosine(100)
        >>> def standard_normal(x, t):  # the score of N(0, I), whatever the level
        ...     return -x
        >>> f = cp.Diffusion(
        ...     standard_normal, schedule, event_shape=(2,), parameterization="score"
        ... )
        >>> sorted(f.capabilities)
        ['exact_marginals', 'score']
    """

    network: Network
    parameterization: str = eqx.field(static=True)
    time: str = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    defaults: dict[str, Array]
    trained: tuple[float, float] | None = eqx.field(static=True)
    mode_depth: bool = eqx.field(static=True)
    remat: bool = eqx.field(static=True)
    encoders: tuple[tuple[str, Encoder], ...] = eqx.field(static=True)
    declared: ClassVar[bool] = False

    def __init__(
        self,
        network: object,
        schedule: Schedule,
        *,
        event_shape: tuple[int, ...],
        parameterization: str = "epsilon",
        time: str = "level",
        conditions: tuple[str, ...] | Mapping[str, object] = (),
        log_snr_range: tuple[float, float] | None = None,
        mode_depth: bool = False,
        remat: bool = False,
        label: str = "",
        encoders: Mapping[str, Encoder] | None = None,
    ):
        check_choice("parameterization", parameterization, (*ENERGIES, *SCORES))
        check_choice("time", time, TIMES)
        if mode_depth and parameterization not in ENERGIES:
            raise InvalidValueError(
                f"mode_depth=True was given with parameterization {parameterization!r},"
                " which has no energy.",
                fix="leave it out: a score does not contain the heights of modes.",
            )
        if isinstance(conditions, str):
            conditions = (conditions,)
        defaults = dict(conditions) if isinstance(conditions, Mapping) else {}
        # Of a Flax Linen pair (module, variables) the module has a name.
        module = network[0] if isinstance(network, tuple) and network else network
        name = getattr(module, "__name__", type(module).__name__)
        self.label = label or name.strip("<>")
        self.network = check_finite(
            as_network(network), f"The network of factor '{self.label}'"
        )
        self.schedule = schedule
        self.event_shape = check_leaf(schedule, event_shape)
        self.parameterization = parameterization
        self.time = time
        self.mode_depth = mode_depth
        self.remat = bool(remat)
        self.names = tuple(conditions)
        self.trained = None
        self.fixed = {}
        if log_snr_range is not None:
            self.trained = self._check_range(log_snr_range)
        self.defaults = {
            name: as_condition(name, value)
            for name, value in defaults.items()
            if value is not None
        }
        self.encoders = tuple((encoders or {}).items())
        # A network that needs no further conditions can be called, so it is checked.
        if set(self.names) == set(self.defaults):
            self.check_network()

    @property
    def traits(self) -> Traits:
        offers = {"score"}
        if self.parameterization in ENERGIES:
            offers |= Traits.ENERGY
        # An energy with weights of entries keeps its gradient, but it is no longer the
        # log-density of a noised marginal.
        if WEIGHTS not in self.fixed:
            offers.add("exact_marginals")
            if self.mode_depth:
                offers.add("mode_depth")
        return Traits(
            frozenset(offers),
            TIMES[self.time].levels,
            self.names,
            entry_powers=self.fixed.get(WEIGHTS),
            declared=self.declared,
            log_snr_range=self.trained,
        )

    def call_conditions(self) -> dict[str, Array]:
        return {**self.defaults, **self.fixed}

    def given(self, **conditions: object) -> LeafFactor:
        for name, encode in self.encoders:
            if name not in conditions or name in self.fixed:
                continue
            if not self._is_encoded(name, conditions[name]):
                conditions[name] = encode(conditions[name])
        return super().given(**conditions)

    def _is_encoded(self, name: str, value: object) -> bool:
        """Return whether a condition's value needs no encoding: it is traced, or means
        "no condition"."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            return True
        if name not in self.defaults:
            return False
        return np.array_equal(np.asarray(value), np.asarray(self.defaults[name]))

    def _check_range(self, log_snr_range: tuple[float, float]) -> tuple[float, float]:
        low, high = (float(end) for end in log_snr_range)
        # A schedule's ends are rounded to single precision.
        lowest_level, highest_level = self.log_snr_range
        if not low <= lowest_level + 1e-3 or not highest_level - 1e-3 <= high:
            raise InvalidValueError(
                f"log_snr_range {(low, high)} does not hold the schedule's levels, "
                f"{lowest_level:.3g} to {highest_level:.3g}.",
                fix="the network must have been trained on every level that it offers.",
            )
        if self.time in ("level", "real_level"):
            raise InvalidValueError(
                f"log_snr_range is given with time={self.time!r}: such a network knows "
                "only the range of its levels.",
                fix="leave it out, or train the network with time='log_snr'.",
            )
        return low, high

    def check_network(self) -> None:
        _check_order_of_arguments(self.label, self.network)
        conditions = self.call_conditions()
        conditions.pop(WEIGHTS, None)  # not an argument of the network
        output = self._traced_output(conditions)
        if self.parameterization in ENERGIES:
            output, beside = with_number(output)
            if jnp.shape(beside) != ():
                raise NetworkError(
                    f"The network of factor '{self.label}' returned a pair whose "
                    f"second part has shape {jnp.shape(beside)}.",
                    fix="it is added to log f, so it must be a scalar for one event.",
                )
        if not hasattr(output, "shape"):
            raise NetworkError(
                f"The network of factor '{self.label}' returned a "
                f"{type(output).__name__}; parameterization "
                f"{self.parameterization!r} needs one array.",
                fix="return the array alone; of a network that returns it first write "
                "lambda x, t: network(x, t)[0].",
            )
        if jnp.issubdtype(output.dtype, jnp.complexfloating):
            raise NetworkError(
                f"The network of factor '{self.label}' returned {output.dtype} "
                "numbers, and densities and scores are real.",
                fix="return real numbers, such as output.real.",
            )
        shape = output.shape
        if self.parameterization == "energy":
            expected: tuple[int, ...] = ()
            is_expected = shape in ((), (1,))
        else:
            expected = self.event_shape
            is_expected = shape == expected
        if not is_expected:
            raise NetworkError(
                f"The network of factor '{self.label}' returned shape {shape}; "
                f"parameterization {self.parameterization!r} needs {expected}.",
                fix="change the network's last layer, event_shape or parameterization; "
                "a network for batches needs its batch axis removed (the library maps "
                "over chains itself). A condition with a value for each member of a "
                "plate belongs to evidence: give x a prior there, and write "
                "cp.factor(name, f, at=x).",
            )

    def _traced_output(self, conditions: dict[str, Array]) -> PyTree:
        """Trace the network for one event; return its output without numbers."""
        x, noise = abstract_arguments(self)
        arguments = "".join(f", {name}=…" for name in conditions)
        how = f"network(x, t{arguments}) with x of shape {self.event_shape}, a scalar t"
        if conditions:
            shapes = ", ".join(
                f"{name} {jax.tree.map(jnp.shape, value)}"
                for name, value in conditions.items()
            )
            how += f" and conditions of shapes {shapes}"
        missing = [f"{name}=…" for name in self.names if name not in conditions]
        if missing:
            fix = (
                "give the conditions that are missing: "
                f"factor.given({', '.join(missing)}), or where guidance is to leave "
                "them out a value that means none: "
                f"Diffusion(…, conditions={{{self.names[0]!r}: null}})."
            )
        else:
            fix = (
                "it must accept ONE event (no batch axis) and the conditions by name, "
                "each of one value, as over= gives them in turn; a condition that may "
                "be left out needs a default."
            )
        who = f"The network of factor '{self.label}'"

        def traced(factor: Diffusion) -> tuple[Any, PyTree]:
            make = eqx.filter_make_jaxpr(lambda f, x, n, c: f.output(x, n, c))
            code, output, _ = make(factor, x, noise, conditions)
            return code, output

        try:
            code, output = called(who, how, lambda: traced(self), fix)
        except NetworkError:
            if self._takes_time_first(traced):
                raise NetworkError(
                    f"{who} can be called with its arguments in the order (t, x), and "
                    "networks are called as network(x, t).",
                    fix=TIME_FIRST,
                ) from None
            raise
        check_deterministic(code.jaxpr, self.label)
        return output

    def _takes_time_first(
        self, traced: Callable[[Diffusion], tuple[Any, PyTree]]
    ) -> bool:
        """Return whether the network returns an event of (t, x)."""
        try:
            _, output = traced(time_first(self))
        except Exception:  # of the user's function, which takes neither order
            return False
        shape = getattr(output, "shape", None)
        return shape == self.event_shape

    def evaluate(
        self, x: Float[Array, "*event"], noise: Noise, conditions: Mapping[str, Array]
    ) -> tuple[Float[Array, ""] | None, Float[Array, "*event"]]:
        given = dict(conditions)
        weights = given.pop(WEIGHTS, 1.0)  # of a tapestry, else 1
        if self.parameterization in SCORES:
            score = SCORES[self.parameterization]
            return None, weights * score(self.output(x, noise, given), x, noise)
        energy = ENERGIES[self.parameterization]

        def log_density(point: Array) -> Array:
            output, beside = with_number(self.output(point, noise, given))
            # log f = −E/σ, as ∇ₓE matches the noise ε and the score is −ε/σ.
            return -jnp.sum(weights * energy(output, point)) / noise.sigma + beside

        return jax.value_and_grad(log_density)(x)

    def output(
        self, x: Float[Array, "*event"], noise: Noise, conditions: Mapping[str, Array]
    ) -> PyTree[Array]:
        """Return the network's output for one event at this noise."""
        network = self.network
        # Gradients then store what is costly alone, and compute the rest again.
        if self.remat:
            network = eqx.filter_checkpoint(network, policy=costly)
        return network(x, self.time_at(noise), **conditions)

    def time_at(self, noise: Noise) -> Array:
        """Return the network's argument t."""
        return TIMES[self.time].at(noise)


TIME_FIRST = "write lambda x, t: network(t, x) for a function network(t, x)."
"""Fix for a network that takes its time first."""


class _TimeFirst(eqx.Module):
    """A network that is called with its arguments in the other order."""

    network: Network

    def __call__(self, x: Array, t: Array, /, **conditions: Array) -> PyTree[Array]:
        return self.network(t, x, **conditions)


def time_first(factor: Diffusion) -> Diffusion:
    """Return the factor with a network that is called as network(t, x)."""
    return eqx.tree_at(
        lambda f: f.network,
        factor,
        _TimeFirst(factor.network),
        is_leaf=lambda node: node is factor.network,
    )


TIME_NAMES = frozenset({"t", "time", "timestep", "sigma", "noise_level", "log_snr"})
"""Names by which a network's time is called."""


def _check_order_of_arguments(label: str, network: object) -> None:
    """Refuse a network whose parameters are named (t, x): where shapes broadcast, it
    would be evaluated with a time in the place of an event."""
    function: Any = getattr(network, "function", network)
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # without a signature
        return
    if len(parameters) < 2:
        return
    first, second = parameters[:2]
    if first in TIME_NAMES and second not in TIME_NAMES:
        raise NetworkError(
            f"The network of factor '{label}' takes ({first}, {second}), and networks "
            "are called as network(x, t).",
            fix=f"write lambda x, t: network(t, x), or rename {first} if it is the "
            "event.",
        )
