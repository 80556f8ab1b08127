"""A diffusion model as a factor: what its network's output means, and where that is a
score or a log-density.

With x = α·x_0 + σ·ε, and ε̂ the network's estimate of the noise, the score is −ε̂/σ.
The energy forms (Du et al. 2023, section 4) are trained so that ∇ₓE matches ε, hence
log f(x) = −E(x)/σ up to a constant of the level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jaxtyping import PyTree
from numpy.typing import ArrayLike

from composeprob.errors import InvalidValueError, NetworkError
from composeprob.factors.concrete import called
from composeprob.factors.factor import (
    LeafFactor,
    Levels,
    Traits,
    abstract_arguments,
    check_leaf,
)
from composeprob.factors.networks import Network, as_network, check_deterministic
from composeprob.factors.values import as_condition, check_choice, check_finite
from composeprob.schedule import Noise, Schedule


def _v(output: Array, x: Array, noise: Noise) -> Array:
    """The output is v = (α·ε − σ·x_0)/√(α²+σ²) (Salimans & Ho 2022): ε̂ = (σ·x +
    α·√(α²+σ²)·v)/(α²+σ²)."""
    squared = noise.alpha**2 + noise.sigma**2
    return -(noise.sigma * x + noise.alpha * jnp.sqrt(squared) * output) / (
        squared * noise.sigma
    )


ENERGIES: dict[str, Callable[[Array, Array], Array]] = {
    "energy": lambda output, x: output.reshape(()),  # the network's own scalar
    "energy_residual": lambda output, x: (
        0.5 * (x - output) ** 2
    ),  # ½‖x − s‖², the form of a denoising autoencoder
    "energy_norm": lambda output, x: 0.5 * output**2,  # ½‖s‖²
    "energy_inner": lambda output, x: x * output,  # ⟨x, s⟩
}
"""By name, the energy of (output, x): a scalar, or what each entry adds to it."""

SCORES: dict[str, Callable[[Array, Array, Noise], Array]] = {
    "epsilon": lambda output, x, noise: -output / noise.sigma,  # the output is ε̂
    "x0": lambda output, x, noise: (
        (noise.alpha * output - x) / noise.sigma**2
    ),  # it is the clean event x̂_0
    "v": _v,
    # The velocity u = ε − x_0 of flow matching (Lipman et al. 2023): ε̂ = (x + α·u)/(α
    # + σ).
    "flow": lambda output, x, noise: (
        -(x + noise.alpha * output) / ((noise.alpha + noise.sigma) * noise.sigma)
    ),
    "score": lambda output, x, noise: output,
}
"""By name, the score of (output, x, noise)."""


def with_number(output: Array | tuple[Array, Array]) -> tuple[Array, Array | float]:
    """What an energy is made of, and the number beside it: 0 unless the network returns
    a pair."""
    return output if isinstance(output, tuple) and len(output) == 2 else (output, 0.0)


TIMES: dict[str, tuple[Levels, Callable[[Noise], Array]]] = {
    "level": ("own", lambda noise: noise.index),
    "log_snr": ("range", lambda noise: noise.log_snr),
    "sigma": ("range", lambda noise: noise.sigma / noise.alpha),
    "real_level": ("real", lambda noise: jnp.asarray(noise.index, noise.sigma.dtype)),
}
"""What a network may receive as t: the levels that it takes then, and t at a noise."""

WEIGHTS = "weights of entries"
"""A condition that `tapestry` adds: how much each entry of an event counts, of the
event's shape. It lies among the conditions so that all windows of one network stay one
batched evaluation."""

Encoder = Callable[[Any], ArrayLike]
"""Turns what a user gives as a condition into an array, or raises where it means
nothing."""


def costly(primitive: Primitive, *_: object, **parameters: Any) -> bool:
    """Which results are stored for a gradient. The others are computed again, products
    in batches (attention) too."""
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
            and a scalar to add to log f, for what is known of the whole event, such as
            how well a caption fits.
        schedule: the levels that it was trained on.
        event_shape: shape of one event.
        parameterization: what the output means. Energies: ``"energy"`` (a scalar E),
            ``"energy_residual"`` (½‖x−s‖²), ``"energy_norm"`` (½‖s‖²),
            ``"energy_inner"`` (⟨x, s⟩), each with ∇ₓE matched to the noise ε.
            Score-only: ``"epsilon"``, ``"x0"``, ``"v"``, ``"flow"`` (u = ε − x_0),
            ``"score"``.
        time: what the network receives as ``t``: ``"level"``, the level's index in
            ``schedule`` (an integer); ``"log_snr"``, λ = log(α²/σ²); ``"sigma"``, σ/α;
            ``"real_level"``, the level as a real number, interpolated in log-SNR
            between the schedule's levels, for an embedding that is smooth in it (sines
            and cosines, trained on many levels). With the last three the factor can be
            evaluated on any schedule inside the log-SNR range that it was trained on.
        conditions: names of the network's conditions. A mapping ``{name: value}`` also
            states which value means "no condition" (as trained with dropout of the
            condition); with plain names, or the value None, the network's own default
            is used where a condition is not given.
        log_snr_range: (least, greatest) log-SNR that the network was trained on, where
            that is more than the range of ``schedule``; only for a continuous ``time``,
            and a variance-preserving or -exploding schedule.
        mode_depth: the energy has the relative height of separated modes. Matching
            scores does not teach that; a cross-level loss does
            (``cp.training.CrossLevel``).
        remat: whether gradients of what the network returns, which energies and
            denoised observations take, store only what its layers and convolutions
            return, and compute again what lies between them and within attention. The
            values are the same up to rounding; of a UNet a fifth is stored, for a
            little more time.
        label: the name to show; a compiled program shows the user's variable name
            instead where it finds one.
        encoders: ``{condition: function}``; `given` passes a condition's value through
            the function, which makes an array of it (text becomes tokens) or refuses it
            (a position outside of the image). The value that means "no condition", and
            values known only when the program runs, are taken as they are.

    Raises:
        InvalidValueError, WrongTypeError: an unknown parameterization or time,
            ``mode_depth`` without an energy, a network with NaN weights.
        NetworkError: a network that cannot be called so, or returns something of
            another shape.

    References:
        Du et al. 2023, *Reduce, Reuse, Recycle*, section 4. Salimans & Ho 2022 for
        ``"v"``, Lipman et al. 2023 for ``"flow"``.

    Example:
        >>> import composeprob as cp
        >>> schedule = cp.Schedule.cosine(100)
        >>> def standard_normal(x, t):  # the score of N(0, I), whatever the level
        ...     return -x
        >>> f = cp.Diffusion(standard_normal, schedule, event_shape=(2,), parameterization="score")
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
                f"mode_depth=True was given with parameterization {parameterization!r}, which has no energy.",
                fix="leave it out: a score does not contain the heights of modes.",
            )
        if isinstance(conditions, str):
            conditions = (conditions,)
        defaults = dict(conditions) if isinstance(conditions, Mapping) else {}
        bare = network[0] if isinstance(network, tuple) and network else network
        self.label = label or getattr(bare, "__name__", type(bare).__name__).strip("<>")
        self.network = check_finite(
            as_network(network), f"The network of factor '{self.label}'"
        )
        self.schedule = schedule
        self.event_shape = check_leaf(schedule, event_shape)
        self.parameterization, self.time, self.mode_depth = (
            parameterization,
            time,
            mode_depth,
        )
        self.remat = bool(remat)
        self.names, self.trained, self.fixed = tuple(conditions), None, {}
        if log_snr_range is not None:
            self.trained = self._check_range(log_snr_range)
        self.defaults = {
            name: as_condition(name, value)
            for name, value in defaults.items()
            if value is not None
        }
        self.encoders = tuple((encoders or {}).items())
        if set(self.names) == set(
            self.defaults
        ):  # callable without further conditions: check it at once
            self.check_network()

    @property
    def traits(self) -> Traits:
        offers = set(Traits.ENERGY if self.parameterization in ENERGIES else {"score"})
        if (
            WEIGHTS not in self.fixed
        ):  # of an energy with weights its gradient remains, but no noised marginal
            offers |= {"exact_marginals"} | (
                {"mode_depth"} if self.mode_depth else set()
            )
        return Traits(
            frozenset(offers), TIMES[self.time][0], self.names, entry_powers=self.fixed.get(WEIGHTS),
            declared=self.declared, log_snr_range=self.trained,
        )  # fmt: skip

    def call_conditions(self) -> dict[str, Array]:
        return {**self.defaults, **self.fixed}

    def given(self, **conditions: object) -> LeafFactor:
        for name, encode in self.encoders:
            if (
                name in conditions
                and name not in self.fixed
                and not self._is_array(name, conditions[name])
            ):
                conditions[name] = encode(conditions[name])
        return super().given(**conditions)

    def _is_array(self, name: str, value: object) -> bool:
        """Whether a condition's value needs no encoding: it is traced, or means "no
        condition"."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            return True
        return name in self.defaults and np.array_equal(
            np.asarray(value), np.asarray(self.defaults[name])
        )

    def _check_range(self, log_snr_range: tuple[float, float]) -> tuple[float, float]:
        low, high = (float(end) for end in log_snr_range)
        own_low, own_high = self.log_snr_range
        if not low <= own_low + 1e-3 or not own_high - 1e-3 <= high:
            raise InvalidValueError(
                f"log_snr_range {(low, high)} does not hold the schedule's levels, {own_low:.3g} to {own_high:.3g}.",
                fix="the network must have been trained on every level that it offers.",
            )
        if self.time in ("level", "real_level"):
            raise InvalidValueError(
                f"log_snr_range is given with time={self.time!r}: such a network knows only the range of its levels.",
                fix="leave it out, or train the network with time='log_snr'.",
            )
        return low, high

    def check_network(self) -> None:
        expected = () if self.parameterization == "energy" else self.event_shape
        x, noise = abstract_arguments(self)
        conditions = {
            name: value
            for name, value in self.call_conditions().items()
            if name != WEIGHTS
        }
        given = "".join(f", {name}=…" for name in conditions)
        shapes = "".join(
            f", {name} {jax.tree.map(jnp.shape, value)}"
            for name, value in conditions.items()
        )
        missing = ", ".join(
            f"{name}=…" for name in self.names if name not in conditions
        )
        traced, output, _ = called(
            f"The network of factor '{self.label}'",
            f"network(x, t{given}) with x of shape {self.event_shape}, a scalar t"
            + (f" and conditions of shapes{shapes[1:]}" if shapes else ""),
            lambda: eqx.filter_make_jaxpr(lambda f, x, n, c: f.output(x, n, c))(
                self, x, noise, conditions
            ),
            f"give the conditions that are missing: factor.given({missing})."
            if missing
            else "it must accept ONE event (no batch axis) and the conditions by name, each of one value, as over= "
            "gives them in turn; a condition that may be left out needs a default.",
        )
        check_deterministic(traced.jaxpr, self.label)
        if self.parameterization in ENERGIES:
            output, beside = with_number(output)
            if jnp.shape(beside) != ():
                raise NetworkError(
                    f"The network of factor '{self.label}' returned a pair whose second part has shape "
                    f"{jnp.shape(beside)}.",
                    fix="it is added to log f, so it must be a scalar for one event.",
                )
        shape = getattr(output, "shape", type(output).__name__)
        if shape != expected and not (
            self.parameterization == "energy" and shape == (1,)
        ):
            raise NetworkError(
                f"The network of factor '{self.label}' returned shape {shape}; parameterization "
                f"{self.parameterization!r} needs {expected}.",
                fix="change the network's last layer, event_shape or parameterization; a network for batches "
                "needs its batch axis removed (the library maps over chains itself). A condition with a value for each "
                "member of a plate belongs to evidence: give x a prior there, and write cp.factor(name, f, at=x).",
            )

    def evaluate(
        self, x: Array, noise: Noise, conditions: Mapping[str, Array]
    ) -> tuple[Array | None, Array]:
        given = dict(conditions)
        weights = given.pop(WEIGHTS, 1.0)
        if self.parameterization in SCORES:
            return None, weights * SCORES[self.parameterization](
                self.output(x, noise, given), x, noise
            )
        energy = ENERGIES[self.parameterization]

        def log_density(point: Array) -> Array:
            output, beside = with_number(self.output(point, noise, given))
            return -jnp.sum(weights * energy(output, point)) / noise.sigma + beside

        return jax.value_and_grad(log_density)(x)

    def output(
        self, x: Array, noise: Noise, conditions: Mapping[str, Array]
    ) -> PyTree[Array]:
        """What the network returns for one event at this noise."""
        network = (
            eqx.filter_checkpoint(self.network, policy=costly)
            if self.remat
            else self.network
        )
        return network(x, self.time_at(noise), **conditions)

    def time_at(self, noise: Noise) -> Array:
        """What the network receives as t."""
        return TIMES[self.time][1](noise)
