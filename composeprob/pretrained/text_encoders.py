"""Text encoders (CLIP: Radford et al. 2021) with their tokenizers: from a prompt to the
array that a network takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Int32
from numpy.typing import ArrayLike

from composeprob.errors import ConditionError, InvalidValueError, LoadError, ShapeError
from composeprob.json_data import JSONObject
from composeprob.pretrained.config import (
    Options,
    positive,
    read_json,
    text_list,
    whole,
    whole_from_0,
)
from composeprob.pretrained.layers import (
    ACTIVATIONS,
    attention,
    feed_forward,
    layer_norm,
    linear,
)
from composeprob.pretrained.tensors import Arrays, Loaded, ShapeDtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Tokenizers

Ids = Int[Array, " length"]
States = Float[Array, "length width"]


@dataclass(frozen=True)
class CLIPText:
    """A text encoder over one sequence of token ids; its methods are those of
    `TextEncoder`.

    Attributes:
        length: most tokens of a sequence.
        vocabulary: number of ids.
        heads: heads of attention.
        activation: activation of the feed-forward layers.
        eps: ε of the norms.
        end: id of the end token, whose state is the pooled vector.
    """

    length: int
    vocabulary: int
    heads: int
    activation: str
    eps: float
    end: int

    def states(self, arrays: Arrays, ids: Ids) -> list[States]:
        """Hidden states before the first layer and after each layer, before the last
        norm."""
        embeddings = arrays / "embeddings"
        places = embeddings.take("position_embedding.weight", None, None)
        tokens = embeddings.take("token_embedding.weight", None, places.shape[1])
        x = tokens[ids] + places[: ids.shape[0]]
        states = [x]
        for layer in arrays.items("encoder.layers"):
            # Norms stand before their layers, so that the sum x is never normed itself.
            normed = layer_norm(layer / "norm1", x, self.eps)
            x = (
                attention(layer / "attn1", normed, self.heads, bias=True, causal=True)
                + x
            )
            normed = layer_norm(layer / "norm3", x, self.eps)
            x = feed_forward(layer / "ff", normed, self.activation) + x
            states.append(x)
        return states

    def last(self, arrays: Arrays, ids: Ids) -> States:
        states = self.states(arrays, ids)[-1]
        return layer_norm(arrays / "final_layer_norm", states, self.eps)

    def pooled(self, arrays: Arrays, ids: Ids) -> Float[Array, " features"]:
        # Old files have 2 for the end token's id: there the end is the greatest id of a
        # sequence.
        ends = ids if self.end == 2 else ids == self.end
        state = self.last(arrays, ids)[jnp.argmax(ends)]
        if "text_projection" in arrays:
            return linear(arrays / "text_projection", state, bias=False)
        return state

    def check(self, ids: ArrayLike) -> Int[Array, "*batch length"]:
        """Return token ids as an array; refuse other values, too many tokens, and ids
        that the encoder does not have."""
        array = jnp.asarray(ids)
        if not jnp.issubdtype(array.dtype, jnp.integer) or array.ndim not in (1, 2):
            raise InvalidValueError(
                "Token ids are whole numbers, (length,) or (n, length); "
                f"got {array.dtype}{list(array.shape)}.",
                fix="pass a tokenizer's input_ids.",
            )
        if not 1 <= array.shape[-1] <= self.length:
            raise InvalidValueError(
                f"The text encoder takes 1 to {self.length} tokens; "
                f"got {array.shape[-1]}.",
                fix=f"cut the prompt to {self.length} tokens, the first and last of "
                "which mark its ends.",
            )
        if array.size == 0:
            return array
        low = int(array.min())
        high = int(array.max())
        if low < 0 or high >= self.vocabulary:
            raise InvalidValueError(
                f"Token ids go from {low} to {high}, but the text encoder has 0 to "
                f"{self.vocabulary - 1}.",
                fix="use the tokenizer that lies beside the model.",
            )
        return array


def clip(config: JSONObject, arrays: Arrays, where: str) -> Loaded:
    """A CLIP text encoder, with a projection where its class has one."""
    o = Options(
        config,
        where,
        num_attention_heads=(8, whole),
        hidden_act=("quick_gelu", *ACTIVATIONS),
        layer_norm_eps=(1e-5, positive),
        eos_token_id=(49407, whole_from_0),
        architectures=(None, text_list),
    )
    vocabulary, width = arrays.shape("embeddings.token_embedding.weight", 2)
    length = arrays.shape("embeddings.position_embedding.weight", 2)[0]
    layers = arrays.items("encoder.layers")
    projected = "CLIPTextModelWithProjection" in (o.architectures or ())
    if projected != ("text_projection" in arrays):
        verb = "lacks" if projected else "has"
        raise arrays.foreign(f"it {verb} text_projection.weight")
    # None leaves a size open.
    inner = layers[0].shape("ff.net.2.weight", 2)[1] if layers else None
    projection = arrays.shape("text_projection.weight", 2)[0] if projected else None
    o.agree(
        others=True,  # files also have options of the generation of text
        vocab_size=vocabulary,
        hidden_size=width,
        max_position_embeddings=length,
        num_hidden_layers=len(layers),
        intermediate_size=inner,
        projection_dim=projection,
    )
    form = CLIPText(
        length=length,
        vocabulary=vocabulary,
        heads=o.num_attention_heads,
        activation=o.hidden_act,
        eps=float(o.layer_norm_eps),
        end=o.eos_token_id,
    )
    arrays.trace(form.pooled, ShapeDtype((1,), jnp.int32))
    return arrays.finish(form)


class Tokenizer:
    """A `Tokenizer` makes token ids of a text: start, those of the text, end, and
    padding up to a fixed length.

    Its folder has tokenizer.json, or vocab.json and merges.txt.
    """

    def __init__(self, folder: Path, length: int):
        self.length = length
        notes: JSONObject = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).exists():
                notes |= read_json(folder / name)
        start = _token(notes, "bos_token", "<|startoftext|>")
        end = _token(notes, "eos_token", "<|endoftext|>")
        padding = _token(notes, "pad_token", "<|endoftext|>")
        self._tokenizer = _read(folder, start, end)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        for token in (end, padding):
            if token not in vocabulary:
                raise LoadError(
                    f"The tokenizer in {folder} has no token {token!r}.",
                    fix="fetch its files again from one source.",
                )
        self.end = vocabulary[end]
        self.padding = vocabulary[padding]

    def __call__(self, text: str) -> Int32[np.ndarray, " length"]:
        """Token ids of a text; one that is too long loses its end."""
        ids = self._tokenizer.encode(text).ids
        if len(ids) > self.length:
            ids = [*ids[: self.length - 1], self.end]
        return np.asarray(ids + [self.padding] * (self.length - len(ids)), np.int32)


def _token(notes: JSONObject, name: str, default: str) -> str:
    """A special token of a tokenizer's notes: a text, or an object with its content."""
    token = notes.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return default if token is None else str(token)


_FIX_OF_TOKENS = "or give token ids: model.given(prompt=token_ids)."


def _read(folder: Path, start: str, end: str) -> Tokenizers:
    """Read a tokenizer from its one file, or make CLIP's of its vocabulary and
    merges."""
    try:
        import tokenizers
        from tokenizers import models
    except ImportError as error:
        raise LoadError(
            "Texts are made into tokens by the package tokenizers, which is not "
            "installed.",
            fix="pip install tokenizers, in a clone of composeprob pip install "
            f"'.[text]', {_FIX_OF_TOKENS}",
        ) from error
    complete = folder / "tokenizer.json"
    vocabulary = folder / "vocab.json"
    merges = folder / "merges.txt"
    if not complete.exists() and not (vocabulary.exists() and merges.exists()):
        raise LoadError(
            f"There is no tokenizer in {folder}: neither tokenizer.json nor vocab.json "
            "and merges.txt.",
            fix=f"fetch the whole folder, {_FIX_OF_TOKENS}",
        )
    try:
        if complete.exists():
            tokenizer = tokenizers.Tokenizer.from_file(str(complete))
            # `Tokenizer` does both itself.
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return tokenizer
        bpe = models.BPE.from_file(
            str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token=end
        )
        tokenizer = tokenizers.Tokenizer(bpe)
    # The package raises bare exceptions, and files may hold anything.
    except Exception as error:
        raise LoadError(
            f"The tokenizer in {folder} cannot be read: {error}",
            fix="fetch its files again: they are damaged.",
        ) from error
    _add_steps_of_clip(tokenizer, start, end)
    return tokenizer


def _add_steps_of_clip(tokenizer: Tokenizers, start: str, end: str) -> None:
    """Add the steps of CLIP's tokenizer before and after its pairing of bytes."""
    from tokenizers import Regex, normalizers, pre_tokenizers, processors

    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()]
    )
    # Contractions' endings, words, single digits and other signs.
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    pieces = pre_tokenizers.Split(pattern, "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # Start and end enclose each text, and are never split.
    ids = tokenizer.get_vocab()
    if start in ids and end in ids:
        tokenizer.add_special_tokens([start, end])
        tokenizer.post_processor = processors.RobertaProcessing(
            (end, ids[end]), (start, ids[start]), False, False
        )


class TextEncoder:
    """A `TextEncoder` makes hidden states of token ids: ``encoder(token_ids)``.

    Its ``tokenizer`` makes token ids of a text, and is None where the folder has none.
    """

    def __init__(self, network: Loaded, tokenizer: Tokenizer | None):
        self.network = network
        self.tokenizer = tokenizer

    def __call__(self, token_ids: ArrayLike) -> Float[Array, "... width"]:
        """Last hidden states, after the last norm: (length, width), or (n, length,
        width) for n sequences of token ids.

        Raises:
            InvalidValueError: the values are not token ids of this encoder.
        """
        return self._encoded("last", token_ids)

    def pooled(self, token_ids: ArrayLike) -> Float[Array, "... features"]:
        """State of the end token, projected where the encoder has a projection:
        (features,) or (n, features)."""
        return self._encoded("pooled", token_ids)

    def states(
        self, token_ids: ArrayLike, layer: int = -1
    ) -> Float[Array, "... width"]:
        """Hidden states after a layer, before the last norm; Stable Diffusion XL takes
        those of layer −2."""
        return self._encoded("states", token_ids, layer)

    def tokens(self, text: str) -> Int32[np.ndarray, " length"]:
        """Token ids of a text.

        Raises:
            ConditionError: the folder has no tokenizer.
        """
        if self.tokenizer is None:
            raise ConditionError(
                f"The prompt {text!r} is a text, but the model's folder has no "
                "tokenizer.",
                fix=f"add the folder tokenizer/ to it, {_FIX_OF_TOKENS}",
            )
        return self.tokenizer(text)

    def _encoded(
        self, method: str, token_ids: ArrayLike, layer: int | None = None
    ) -> Array:
        """Output of a method of the network, for each sequence of token ids."""
        ids = self.network.form.check(token_ids)
        outputs = self.network.mapped(method, jnp.atleast_2d(ids))
        # `states` has an output for each layer, other methods have one.
        if layer is not None:
            outputs = outputs[layer]
        outputs = outputs.astype(jnp.float32)
        return outputs if ids.ndim == 2 else outputs[0]


def _digest(value: Array | np.ndarray) -> bytes:
    """Return a hash of an array's numbers."""
    return hashlib.sha256(np.asarray(value).tobytes()).digest()


class Prompts:
    """`Prompts` makes the one array of a prompt that a network takes: hidden states of
    one or two encoders.

    Where the network takes a pooled vector beside them, it is the last row.

    Attributes:
        encoders: the text encoders.
        width: width of the hidden states, of all encoders together.
        pooled: width of the pooled vector; None for a network without.
    """

    def __init__(
        self, encoders: tuple[TextEncoder, ...], width: int, pooled: int | None
    ):
        self.encoders = encoders
        self.width = width
        self.pooled = pooled
        self._texts: dict[bytes, str] = {}  # by the numbers of their arrays

    def text_of(self, value: Array | np.ndarray) -> str | None:
        """Text of an encoded prompt; None for one that was not made of a text here."""
        if isinstance(value, jax.core.Tracer):
            return None
        if jnp.shape(value)[-1:] != (self.width,):
            return None
        return self._texts.get(_digest(value))

    def __call__(self, prompt: str | ArrayLike) -> States:
        """Prompt of a text, of token ids or of hidden states."""
        if isinstance(prompt, str):
            self._require_encoder(prompt)
            encoded = self._encoded(lambda encoder: encoder.tokens(prompt))
            self._texts[_digest(encoded)] = prompt
            return encoded
        if is_texts(prompt):
            raise ShapeError(
                f"A prompt is one text; got {prompt!r}.",
                fix=f"{ONE_PROMPT[:-1]}, with all_ids = jnp.stack([model.text_encoder."
                "tokens(text) for text in texts]).",
            )
        array = self._array(jnp.asarray(prompt))
        if array.ndim == 2:
            return array
        self._require_encoder(array)
        return self._encoded(lambda encoder: array)

    def _require_encoder(self, prompt: str | Array) -> None:
        if not self.encoders:
            raise ConditionError(
                f"The prompt {prompt!r} needs a text encoder, and the model's folder "
                "has none that is supported.",
                fix=f"pass hidden states of shape (length, {self.width}).",
            )

    def _encoded(self, tokens_for: Callable[[TextEncoder], ArrayLike]) -> States:
        """Prompt by the token ids for each encoder, which may differ."""
        ids = [tokens_for(encoder) for encoder in self.encoders]
        if self.pooled is None:
            return self.encoders[0](ids[0])
        pairs = zip(self.encoders, ids, strict=True)
        states = [encoder.states(tokens, -2) for encoder, tokens in pairs]
        # Stable Diffusion XL pools the last encoder's end token alone.
        pooled = self.encoders[-1].pooled(ids[-1])
        return with_pooled(jnp.concatenate(states, axis=-1), pooled)

    def _array(self, array: Array) -> Array:
        """Check token ids (length,), or hidden states (length, width)."""
        integers = jnp.issubdtype(array.dtype, jnp.integer)
        rank = 1 if integers else 2
        # Tokenizers and encoders return one prompt with an axis of length 1.
        if array.ndim == rank + 1 and array.shape[0] == 1:
            array = array[0]
        if integers:
            if array.ndim != 1:
                raise ShapeError(
                    f"A prompt's token ids have shape (length,); got {array.shape}.",
                    fix=ONE_PROMPT,
                )
            return array
        if array.ndim != 2 or array.shape[-1] != self.width:
            last = ""
            if self.pooled:
                last = (
                    f", its last row the pooled vector's {self.pooled} numbers and "
                    "zeros"
                )
            raise ShapeError(
                f"A prompt's hidden states have shape (length, {self.width}){last}; "
                f"got {array.shape}.",
                fix="pass a text, token ids, or the output of "
                "model.text_encoder(token_ids) for ONE prompt.",
            )
        return array


def is_texts(prompt: object) -> bool:
    """Return whether a prompt is a list of texts."""
    if not isinstance(prompt, list | tuple):
        return False
    return bool(prompt) and all(isinstance(text, str) for text in prompt)


ONE_PROMPT = (
    "give one prompt at a time, or run over several: "
    'cp.product(model, over={"prompt": all_ids}).'
)
"""Fix for several prompts in the place of one."""


def with_pooled(
    hidden: Float[Array, "length width"], vector: Float[Array, " features"]
) -> Float[Array, "length+1 width"]:
    """Hidden states with a pooled vector as a last row."""
    padding = hidden.shape[-1] - vector.shape[-1]
    return jnp.concatenate([hidden, jnp.pad(vector, (0, padding))[None]])
