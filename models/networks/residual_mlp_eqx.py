"""The residual MLP of Du et al. 2023 (their 2D experiments) in Equinox."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

import composeprob as cp

from .conditioning import OutputScale, log_snr_features


class Block(eqx.Module):
    """Residual block x + W₃·swish(W₂·swish(W₁·swish(LayerNorm(x)) + V·e)).

    e is the embedding of time; W₃ = 0 at first.
    """

    norm: eqx.nn.LayerNorm
    enter: eqx.nn.Linear
    time: eqx.nn.Linear
    middle: eqx.nn.Linear
    leave: eqx.nn.Linear

    def __init__(self, hidden: int, widen: int, embedding: int, *, key: Array):
        keys = jax.random.split(key, 4)
        wide = hidden * widen
        self.norm = eqx.nn.LayerNorm(hidden, eps=1e-5)
        self.enter = linear(hidden, wide, keys[0])
        self.time = linear(embedding, wide, keys[1])
        self.middle = linear(wide, wide, keys[2])
        self.leave = linear(wide, hidden, keys[3], zero=True)

    def __call__(self, x: Array, embedding: Array) -> Array:
        h = self.enter(jax.nn.swish(self.norm(x))) + self.time(embedding)
        return x + self.leave(jax.nn.swish(self.middle(jax.nn.swish(h))))


class ResidualMLP(eqx.Module):
    """Linear layer, residual blocks with the embedding of time, linear layer.

    The last layer is zero at first.

    Args:
        size: length d of one event.
        num_levels: number of levels, where t is a level and its embedding a learned
            table (the paper's); None where t is a log-SNR, embedded by sines and
            cosines.
        hidden, widen, blocks, embedding: widths and depth; the paper's by default.
        outputs: d by default; 1 for a scalar energy.
        output_scale: see `OutputScale`; needs t to be a log-SNR.
        key: for the initial weights.
    """

    table: eqx.nn.Embedding | None
    first: eqx.nn.Linear
    blocks: tuple[Block, ...]
    last: eqx.nn.Linear
    embedding: int = eqx.field(static=True)
    output_scale: OutputScale | None = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        *,
        num_levels: int | None = None,
        hidden: int = 128,
        widen: int = 2,
        blocks: int = 4,
        embedding: int = 32,
        outputs: int | None = None,
        output_scale: OutputScale | None = None,
        key: Array,
    ):
        keys = jax.random.split(key, blocks + 3)
        self.table = None
        if num_levels is not None:
            self.table = eqx.nn.Embedding(num_levels, embedding, key=keys[0])
        self.first = linear(size, hidden, keys[1])
        self.blocks = tuple(Block(hidden, widen, embedding, key=k) for k in keys[3:])
        outputs = size if outputs is None else outputs
        self.last = linear(hidden, outputs, keys[2], zero=True)
        self.embedding = embedding
        self.output_scale = output_scale

    def __call__(self, x: Array, t: Array) -> Array:
        """Return (outputs,) for one event x of shape (d,) at time t, a scalar."""
        if self.output_scale is None:
            return self.unscaled(x, t)
        return self.output_scale.apply(self.unscaled, x, t)

    def unscaled(self, x: Array, t: Array) -> Array:
        """Return F(x, t), the output without its scale."""
        if self.table is None:
            embedding = log_snr_features(t, self.embedding)
        else:
            embedding = self.table(t)
        h = self.first(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(h)


def linear(inputs: int, outputs: int, key: Array, *, zero: bool = False) -> Any:
    """Return a linear layer with LeCun-normal weights, or zero ones, and zero bias."""
    layer = cp.batched_linear(eqx.nn.Linear(inputs, outputs, key=key))
    shape = (outputs, inputs)
    if zero:
        weight = jnp.zeros(shape)
    else:
        initializer = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        weight = initializer(key, shape)
    weights = (weight, jnp.zeros(outputs))
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, weights)
