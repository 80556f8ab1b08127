"""A network of a folder as a factor calls it: given its kind of time, its output only what a score is made of."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax import Array


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
