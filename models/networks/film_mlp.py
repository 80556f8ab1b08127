"""A residual MLP of small images, in Flax NNX, with time and a class by FiLM.

Every pixel is an input.
"""

from __future__ import annotations

from flax import nnx
from jax import Array

from .film import Embedded, FiLMBlock


def block(width: int, embedding: int, rngs: nnx.Rngs) -> FiLMBlock:
    """Return a block with LayerNorm and dense layers."""

    def layer(zero: bool) -> nnx.Linear:
        start = {"kernel_init": nnx.initializers.zeros} if zero else {}
        return nnx.Linear(width, width, **start, rngs=rngs)

    def norm() -> nnx.LayerNorm:
        return nnx.LayerNorm(width, rngs=rngs)

    return FiLMBlock(norm, layer, width, embedding, rngs=rngs)


class FiLMMLP(Embedded):
    """Network from an event of n numbers, of any shape, to a vector, zero at first.

    Args:
        size: n.
        outputs: length of the result.
        vector: length of a vector that joins the time in the embedding; 0 without one.
        width, blocks: width and number of the residual blocks.
        embedding: length of the embedding of time and vector.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        size: int,
        outputs: int,
        *,
        vector: int = 0,
        width: int = 256,
        blocks: int = 4,
        embedding: int = 128,
        rngs: nnx.Rngs,
    ):
        super().__init__(vector, embedding, rngs=rngs)
        self.first = nnx.Linear(size, width, rngs=rngs)
        self.blocks = nnx.List(block(width, embedding, rngs) for _ in range(blocks))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.last = nnx.Linear(
            width, outputs, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(self, x: Array, t: Array, vector: Array | None = None) -> Array:
        """Return (outputs,) for one event x at log-SNR t, with ``vector`` (v,)."""
        embedding = self.embed(t, vector)
        h = self.first(x.reshape(-1))
        for residual in self.blocks:
            h = residual(h, embedding)
        return self.last(nnx.swish(self.norm(h)))
