"""A bidirectional transformer of partly visible tokens, in Equinox."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array


class MaskedBlock(eqx.Module):
    """Self-attention and an MLP, each x + f(LayerNorm(x))."""

    before_attention: eqx.nn.LayerNorm
    attend: eqx.nn.Linear
    gather: eqx.nn.Linear
    before_mlp: eqx.nn.LayerNorm
    enter: eqx.nn.Linear
    leave: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, *, key: Array):
        keys = jax.random.split(key, 4)
        self.heads = heads
        self.before_attention = eqx.nn.LayerNorm(width)
        self.attend = eqx.nn.Linear(width, 3 * width, key=keys[0])
        self.gather = eqx.nn.Linear(width, width, key=keys[1])
        self.before_mlp = eqx.nn.LayerNorm(width)
        self.enter = eqx.nn.Linear(width, 4 * width, key=keys[2])
        self.leave = eqx.nn.Linear(4 * width, width, key=keys[3])

    def __call__(self, h: Array) -> Array:
        both = jax.vmap(self.attend)(jax.vmap(self.before_attention)(h))
        by_head = both.reshape(len(h), 3, self.heads, -1)
        query, key, value = jnp.moveaxis(by_head, 1, 0)
        mixed = jax.nn.dot_product_attention(query, key, value)
        h = h + jax.vmap(self.gather)(mixed.reshape(h.shape))
        inner = jax.nn.gelu(jax.vmap(self.enter)(jax.vmap(self.before_mlp)(h)))
        return h + jax.vmap(self.leave)(inner)


class MaskedTransformer(eqx.Module):
    """Network of the logits of all positions given the visible tokens.

    A hidden position has the embedding of one more value, so that no output depends on
    a hidden token.

    Args:
        length, num_values: L and V.
        width, blocks, heads: of the transformer.
        key: for the initial weights.
    """

    tokens: Array
    positions: Array
    blocks: list[MaskedBlock]
    norm: eqx.nn.LayerNorm
    leave: eqx.nn.Linear
    num_values: int = eqx.field(static=True)

    def __init__(
        self,
        length: int,
        num_values: int,
        *,
        width: int = 64,
        blocks: int = 3,
        heads: int = 4,
        key: Array,
    ):
        keys = jax.random.split(key, blocks + 3)
        self.num_values = num_values
        self.tokens = 0.1 * jax.random.normal(keys[0], (num_values + 1, width))
        self.positions = 0.1 * jax.random.normal(keys[1], (length, width))
        self.blocks = [MaskedBlock(width, heads, key=k) for k in keys[3:]]
        self.norm = eqx.nn.LayerNorm(width)
        leave = eqx.nn.Linear(width, num_values, key=keys[2])
        # Uniform over the values at first.
        self.leave = eqx.tree_at(lambda layer: layer.weight, leave, replace_fn=_zeros)

    def __call__(self, tokens: Array, visible: Array) -> Array:
        """Return logits (L, V) of tokens (L,) with truth values visible (L,)."""
        seen = jnp.where(visible, tokens, self.num_values)
        h = self.tokens[seen] + self.positions
        for block in self.blocks:
            h = block(h)
        return jax.vmap(self.leave)(jax.vmap(self.norm)(h))


def _zeros(weight: Array) -> Array:
    return jnp.zeros_like(weight)
