"""The residual MLP of Du et al. 2023 (their 2D experiments) in Flax NNX.

Its maths are those of `residual_mlp_eqx`.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import Array

from .conditioning import OutputScale, log_snr_features


class Block(nnx.Module):
    """Residual block x + W₃·swish(W₂·swish(W₁·swish(LayerNorm(x)) + V·e)).

    e is the embedding of time; W₃ = 0 at first.
    """

    def __init__(self, hidden: int, widen: int, embedding: int, *, rngs: nnx.Rngs):
        wide = hidden * widen
        self.norm = nnx.LayerNorm(
            hidden, epsilon=1e-5, use_fast_variance=False, rngs=rngs
        )
        self.enter = nnx.Linear(hidden, wide, rngs=rngs)
        self.time = nnx.Linear(embedding, wide, rngs=rngs)
        self.middle = nnx.Linear(wide, wide, rngs=rngs)
        self.leave = nnx.Linear(
            wide, hidden, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(self, x: Array, embedding: Array) -> Array:
        h = self.enter(nnx.swish(self.norm(x))) + self.time(embedding)
        return x + self.leave(nnx.swish(self.middle(nnx.swish(h))))


class ResidualMLP(nnx.Module):
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
        rngs: for the initial weights.
    """

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
        rngs: nnx.Rngs,
    ):
        outputs = size if outputs is None else outputs
        # Flax takes an attribute that is first None for a static one, for good.
        if num_levels is None:
            self.table: Any = None
        else:
            self.table = nnx.Embed(num_levels, embedding, rngs=rngs)
        self.first = nnx.Linear(size, hidden, rngs=rngs)
        self.blocks = nnx.List(
            Block(hidden, widen, embedding, rngs=rngs) for _ in range(blocks)
        )
        self.last = nnx.Linear(
            hidden, outputs, kernel_init=nnx.initializers.zeros, rngs=rngs
        )
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
