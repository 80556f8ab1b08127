"""Text encoders with their tokenizers: a prompt to the array that a network takes."""

from __future__ import annotations

import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob.errors import ConditionError, ShapeError
from composeprob.pretrained.clip import CLIPText
from composeprob.pretrained.tokenizer import Tokenizer


class TextEncoder:
    """A `TextEncoder` makes hidden states of token ids: ``encoder(token_ids)``.

    Attributes:
        network: the encoder of one sequence.
        tokenizer: makes token ids of a text; None where the folder has none.
    """

    def __init__(self, network: CLIPText, tokenizer: Tokenizer | None):
        self.network, self.tokenizer = network, tokenizer

    def __call__(self, token_ids: ArrayLike) -> Array:
        """The last hidden states, after the last norm.

        Args:
            token_ids: (length,) or (n, length), whole numbers.

        Returns:
            (length, width) or (n, length, width).

        Raises:
            InvalidValueError: no token ids of this encoder.
        """
        return self._mapped("last", token_ids)

    def pooled(self, token_ids: ArrayLike) -> Array:
        """The state of the end token, projected where the encoder has a projection: (width,) or (n, width)."""
        return self._mapped("pooled", token_ids)

    def states(self, token_ids: ArrayLike, layer: int = -1) -> Array:
        """The hidden states after a layer, before the last norm; −2 is the one that Stable Diffusion XL takes."""
        return self._mapped("states", token_ids, layer)

    def tokens(self, text: str) -> np.ndarray:
        """The token ids of a text.

        Raises:
            ConditionError: the folder has no tokenizer.
        """
        if self.tokenizer is None:
            raise ConditionError(
                f"The prompt {text!r} is a text, but the model's folder has no tokenizer.",
                fix="add the folder tokenizer/ to it, or give token ids: model.given(prompt=token_ids).",
            )
        return self.tokenizer(text)

    def _mapped(self, what: str, token_ids: ArrayLike, layer: int | None = None) -> Array:
        ids = self.network.check(token_ids)
        return _encoded(self.network, ids, what, layer)


@eqx.filter_jit
def _encoded(network: CLIPText, ids: Array, what: str, layer: int | None) -> Array:
    def states(ids: Array) -> Array:
        found = getattr(network, what)(ids)
        return (found if layer is None else found[layer]).astype(jnp.float32)

    return states(ids) if ids.ndim == 1 else jax.vmap(states)(ids)


class Prompts:
    """`Prompts` makes of a prompt the one array that a network takes.

    Args:
        encoders: the text encoders, one or two.
        shape: of the network's hidden states, (0, width).
        pooled: width of the pooled vector that it takes beside, as a last row; None without.
    """

    def __init__(self, encoders: tuple[TextEncoder, ...], shape: tuple[int, ...], pooled: int | None):
        self.encoders, self.width, self.pooled = encoders, shape[-1], pooled
        self._texts: dict[bytes, str] = {}

    def text_of(self, value: Array | np.ndarray) -> str | None:
        """The text that an encoded prompt was made of; None where that is not known."""
        known = not isinstance(value, jax.core.Tracer) and jnp.shape(value)[-1:] == (self.width,)
        return self._texts.get(_digest(value)) if known else None

    def __call__(self, prompt: str | ArrayLike) -> Array:
        """The prompt of a text, of token ids or of hidden states, (length, width); a last row holds the pooled vector
        where the network has one.

        Raises:
            ConditionError: a text without a tokenizer, or no text encoder.
            ShapeError: an array of another shape.
            InvalidValueError: token ids that the encoder does not have.
        """
        if not isinstance(prompt, str):
            array = jnp.asarray(prompt)
            whole = 1 if jnp.issubdtype(array.dtype, jnp.integer) else 2
            if array.ndim == whole + 1 and array.shape[0] == 1:  # as tokenizers and encoders return one prompt
                array = array[0]
            if not jnp.issubdtype(array.dtype, jnp.integer):
                if array.ndim != 2 or array.shape[-1] != self.width:
                    row = f", its last row the pooled vector's {self.pooled} numbers and zeros" if self.pooled else ""
                    raise ShapeError(
                        f"A prompt's hidden states have shape (length, {self.width}){row}; got {array.shape}.",
                        fix="pass a text, token ids, or what model.text_encoder(token_ids) gives for ONE prompt.",
                    )
                return array
            if array.ndim != 1:
                raise ShapeError(
                    f"A prompt's token ids have shape (length,); got {array.shape}.",
                    fix='give one prompt at a time, or run over several: cp.product(model, over={"prompt": all_ids}).',
                )
            prompt = array
        if not self.encoders:
            raise ConditionError(
                f"The prompt {prompt!r} needs a text encoder, and the model's folder has none that is supported.",
                fix=f"pass hidden states of shape (length, {self.width}).",
            )
        found = self._encoded([e.tokens(prompt) if isinstance(prompt, str) else prompt for e in self.encoders])
        if isinstance(prompt, str):
            self._texts[_digest(found)] = prompt
        return found

    def _encoded(self, ids: list[ArrayLike]) -> Array:
        if self.pooled is None:
            return self.encoders[0](ids[0])
        pairs = list(zip(self.encoders, ids, strict=True))
        hidden = jnp.concatenate([encoder.states(i, -2) for encoder, i in pairs], axis=-1)
        vector = pairs[-1][0].pooled(pairs[-1][1])
        return with_pooled(hidden, vector)


def _digest(value: ArrayLike) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).digest()


def with_pooled(hidden: Array, vector: Array) -> Array:
    """Hidden states with a pooled vector as a last row: (length + 1, width)."""
    return jnp.concatenate([hidden, jnp.pad(vector, (0, hidden.shape[-1] - vector.shape[-1]))[None]])
