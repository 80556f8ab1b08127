"""What a folder's network is to a factor: its skeleton, its events, conditions and time, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from composeprob.errors import InvalidValueError
from composeprob.json_data import JSON
from composeprob.pretrained.tensors import Arrays, Loaded, shaped


@dataclass(frozen=True)
class Network:
    """A network's skeleton with what must be known to call it.

    Attributes:
        module: called as ``module(x, t, **conditions)`` on one event; its arrays are not read yet.
        outputs: channels of the output; twice ``channels`` where the variance is learned too.
        sample_size: height and width of events, or one number for both; None where the file has none.
        channels: of events.
        multiple: height and width must be multiples of it.
        time: what it takes of the noise, as `Diffusion`'s ``time``.
        conditions: the shape of each condition.
        classes: how many labels there are; None where labels are not numbered.
        null_label: the label that means "no label"; None where there is none.
    """

    module: Loaded
    outputs: int
    sample_size: JSON
    channels: int
    multiple: int
    time: str = "real_level"
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    classes: int | None = None
    null_label: int | None = None

    @classmethod
    def traced(
        cls,
        form: Callable[..., Array],
        arrays: Arrays,
        sample_size: JSON,
        channels: int,
        multiple: int,
        time: str = "real_level",
        conditions: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        **labels: int | None,
    ) -> Network:
        """The network of a form and its arrays, traced once; arguments as the attributes.

        Raises:
            LoadError: arrays that are missing, do not fit together, or are no part of such a network.
        """
        side = max(multiple, 2 ** len(arrays.items("down_blocks")))
        given = {  # a label is whole, and prompts have any length
            name: shaped(*(n or 1 for n in shape), dtype=jnp.float32 if shape else jnp.int32)
            for name, shape in conditions.items()
        }
        t = shaped(dtype=jnp.int32 if time == "level" else jnp.float32)
        *_, outputs = arrays.trace(form, shaped(side, side, channels), t, **given)
        return cls(arrays.finish(form), outputs, sample_size, channels, multiple, time, conditions, **labels)


class Adapted(eqx.Module):
    """A network whose output has the variance beside, or that takes another time than the factor's.

    Attributes:
        network: the network itself.
        known: log-SNR of the levels that it was trained on, from the noisiest to the cleanest, where it is evaluated by
            log-SNR; else None.
        channels: of events: the first of the output's.
        pooled: width of the vector in the prompt's last row; None without.
        flow: times of flow matching: this number times σ/(σ + α); None for others.
    """

    network: Callable[..., Array]
    known: Array | None
    channels: int = eqx.field(static=True)
    pooled: int | None = eqx.field(static=True)
    flow: float | None = eqx.field(static=True)

    def __call__(self, x: Array, t: Array, /, **conditions: Array) -> Array:
        if self.pooled is not None:
            prompt = conditions["prompt"]
            conditions = {**conditions, "prompt": prompt[:-1], "pooled": prompt[-1, : self.pooled]}
        if self.known is not None:
            levels = jnp.arange(self.known.shape[0], dtype=jnp.float32)[::-1]
            t = jnp.interp(t, self.known, levels)
        if self.flow is not None:
            t = self.flow * t / (1 + t)
        return self.network(x, t, **conditions)[..., : self.channels]


class Preconditioned(eqx.Module):
    """x̂_0 = c_skip·x + c_out·F(c_in·x, ¼·log σ), for a network F of unit inputs and outputs.

    c_skip = s²/(σ² + s²), c_in = 1/√(σ² + s²), c_out = ±σ·s/√(σ² + s²), with s the data's standard deviation.

    Attributes:
        network: F.
        scale: s.
        sign: of c_out, −1 where F gives a velocity.

    References:
        Karras et al. 2022, *Elucidating the design space*, table 1.
    """

    network: Callable[..., Array]
    scale: float = eqx.field(static=True)
    sign: float = eqx.field(static=True, default=1.0)

    def __call__(self, x: Array, sigma: Array, /, **conditions: Array) -> Array:
        total = sigma**2 + self.scale**2
        inner = self.network(x / jnp.sqrt(total), 0.25 * jnp.log(sigma), **conditions)
        return self.scale**2 / total * x + self.sign * sigma * self.scale / jnp.sqrt(total) * inner


Foreign = Any
"""An object of another package, known by its attributes only."""


class Reading(NamedTuple):
    """What a package's file finds in its estimator.

    Attributes:
        denoise: E[u | u + s·ε = y] as ``denoise(arrays, y, s, x)``, for one y in the units that the network was trained
            in, one noise s > 0 and one condition as ``adapt`` makes it.
        arrays: the weights, and whatever else is no code.
        event_shape: of u.
        sigmas: the least and greatest s that the network was trained on.
        adapt: the network's conditions of the user's data, (n, …), by the package's own rules.
        location, scale: θ = location + scale·u, of ``event_shape``.
    """

    denoise: Callable[[PyTree[Array], Array, Array, Array], Array]
    arrays: PyTree[Array]
    event_shape: tuple[int, ...]
    sigmas: tuple[float, float]
    adapt: Callable[..., Array]
    location: ArrayLike = 0.0
    scale: ArrayLike = 1.0


Call = Callable[[Array, Array], Array]
"""The network's output at (its own input, its own time)."""
Mean = Callable[[Call, Array, Array], Array]
"""The mean of u given y = u + s·ε, by the network's output, y and s."""
Pair = tuple[float, float]
"""Two numbers: what stands for a₀ + a₁·t, or the two ends of a range."""


def by_velocity(velocity: Call, y: Array, s: Array, signal: Pair, noise: Pair) -> Array:
    """E[u | u + s·ε = y] by the velocity v of a·u + b·ε along the straight path a = a₀ + a₁·t, b = b₀ + b₁·t.

    At s = b/a, v is learned of a₁·u + b₁·ε, whose mean is linear in that of u, as ε = (y − u)/s.
    """
    (a0, a1), (b0, b1) = signal, noise
    t = (a0 * s - b0) / (b1 - a1 * s)
    return (b1 * y - s * velocity((a0 + a1 * t) * y, t)) / (b1 - a1 * s)


def by_score(score: Call, y: Array, s: Array, m: Array, t: Array) -> Array:
    """E[u | u + s·ε = y] by the score of m·u + m·s·ε at time t, by Tweedie's formula."""
    return y + m * s**2 * score(m * y, t)


def by_equation(exploding: bool, low: float, high: float, ends: Pair) -> tuple[Mean, Pair]:
    """By the score under a VE or VP equation, as `spreads` has them, and the range of s for times between the ends."""

    def mean(score: Call, y: Array, s: Array) -> Array:
        if exploding:
            return by_score(score, y, s, jnp.ones_like(s), jnp.log(s / low) / jnp.log(high / low))
        total = jnp.log1p(s**2)
        t = 2 * total / (low + jnp.sqrt(low**2 + 2 * (high - low) * total))
        return by_score(score, y, s, jnp.exp(-0.5 * total), t)

    return mean, spreads(exploding, low, high, ends)


def spreads(exploding: bool, low: float, high: float, times: Pair) -> Pair:
    """The noise s relative to the signal at two times, where noise explodes or variance is preserved.

    s = low·(high/low)ᵗ for VE; for VP 1 + s² = e^total, total = ∫₀ᵗ β = low·t + (high − low)·t²/2 (Song et al. 2021).
    """
    t = np.asarray(times, float)
    s = low * (high / low) ** t if exploding else np.sqrt(np.expm1(low * t + 0.5 * (high - low) * t**2))
    return float(s[0]), float(s[1])


def unreadable(estimator: object, what: str) -> InvalidValueError:
    """The error for an estimator of a known package that has no noised law of this form."""
    return InvalidValueError(
        f"{type(estimator).__name__} {what}.",
        fix="train a diffusion or flow-matching network whose noise is Gaussian; of θ with a bounded or skewed prior "
        "transform it before training, and write the program in the same coordinates.",
    )
