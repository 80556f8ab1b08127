"""A small encoder of captions, in Flax NNX.

A network that takes its vector can take any other embedding of text.
"""

from __future__ import annotations

from flax import nnx
from jax import Array


class TextEncoder(nnx.Module):
    """Encoder W₂·swish(W₁·e) of tokens, e the embeddings of the words side by side.

    Token 0 is no word. The order of words matters, as every place has its own columns
    of W₁. Tokens have shape (length,), the vector (size,).

    Args:
        vocabulary: number of tokens, 0 included.
        length: tokens of a text.
        size: length of the vector.
        embedding: length of a word's embedding.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        size: int,
        *,
        embedding: int = 32,
        rngs: nnx.Rngs,
    ):
        self.table = nnx.Embed(vocabulary, embedding, rngs=rngs)
        self.enter = nnx.Linear(length * embedding, size, rngs=rngs)
        self.leave = nnx.Linear(size, size, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Return the vector of one text."""
        embeddings = self.table(tokens).reshape(-1)
        return self.leave(nnx.swish(self.enter(embeddings)))
