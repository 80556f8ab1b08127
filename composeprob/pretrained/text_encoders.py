"""Text encoders (CLIP: Radford et al. 2021) with their tokenizers: a prompt to the
array that a network takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob.errors import ConditionError, InvalidValueError, LoadError, ShapeError
from composeprob.factors.equations import fingerprint
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
from composeprob.pretrained.tensors import Arrays, Loaded, Shaped

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Tokenizers


@dataclass(frozen=True)
class CLIPText:
    """A text encoder over one sequence of token ids; its methods are those of
    `TextEncoder`."""

    length: int  # the most tokens of a sequence
    vocabulary: int  # how many ids there are
    heads: int
    activation: str  # of the feed-forward layers
    eps: float  # of the norms
    end: int  # the id at whose first place the pooled vector is read

    def states(self, arrays: Arrays, ids: Array) -> list[Array]:
        """The hidden states before the first layer and after each, (length, width)
        each, before the last norm."""
        below = arrays / "embeddings"
        places = below.take("position_embedding.weight", None, None)
        states = [
            below.take("token_embedding.weight", None, places.shape[1])[ids]
            + places[: ids.shape[0]]
        ]
        for layer in arrays.items("encoder.layers"):
            normed = layer_norm(layer / "norm1", states[-1], self.eps)
            x = (
                attention(layer / "attn1", normed, self.heads, bias=True, causal=True)
                + states[-1]
            )
            states.append(
                feed_forward(
                    layer / "ff",
                    layer_norm(layer / "norm3", x, self.eps),
                    self.activation,
                )
                + x
            )
        return states

    def last(self, arrays: Arrays, ids: Array) -> Array:
        return layer_norm(
            arrays / "final_layer_norm", self.states(arrays, ids)[-1], self.eps
        )

    def pooled(self, arrays: Arrays, ids: Array) -> Array:
        # Old files have 2 in the place of the end token's id: there the end is the
        # greatest id of a sequence.
        place = jnp.argmax(ids) if self.end == 2 else jnp.argmax(ids == self.end)
        found = self.last(arrays, ids)[place]
        return (
            linear(arrays / "text_projection", found, bias=False)
            if "text_projection" in arrays
            else found
        )

    def check(self, ids: ArrayLike) -> Array:
        """Token ids as an array, or an `InvalidValueError`: no integers, too many, or
        ids that it does not have."""
        array = jnp.asarray(ids)
        if not jnp.issubdtype(array.dtype, jnp.integer) or array.ndim not in (1, 2):
            raise InvalidValueError(
                f"Token ids are whole numbers, (length,) or (n, length); got {array.dtype}{list(array.shape)}.",
                fix="pass what a tokenizer returns as input_ids.",
            )
        if not 1 <= array.shape[-1] <= self.length:
            raise InvalidValueError(
                f"The text encoder takes 1 to {self.length} tokens; got {array.shape[-1]}.",
                fix=f"cut the prompt to {self.length} tokens, the first and last of which mark its ends.",
            )
        if (
            array.size
            and not 0 <= int(array.min()) <= int(array.max()) < self.vocabulary
        ):
            raise InvalidValueError(
                f"Token ids go from {int(array.min())} to {int(array.max())}, but the text encoder has 0 to "
                f"{self.vocabulary - 1}.",
                fix="use the tokenizer that lies beside the model.",
            )
        return array


def clip(config: JSONObject, arrays: Arrays, where: str) -> Loaded:
    """A CLIP text encoder, with a projection where its class has one."""
    o = Options(
        config, where, num_attention_heads=(8, whole), hidden_act=("quick_gelu", *ACTIVATIONS),
        layer_norm_eps=(1e-5, positive), eos_token_id=(49407, whole_from_0), architectures=(None, text_list),
    )  # fmt: skip
    vocabulary, width = arrays.shape("embeddings.token_embedding.weight", 2)
    length = arrays.shape("embeddings.position_embedding.weight", 2)[0]
    layers, projected = (
        arrays.items("encoder.layers"),
        "CLIPTextModelWithProjection" in (o.architectures or ()),
    )
    if projected != ("text_projection" in arrays):
        raise arrays.foreign(
            f"it {'lacks' if projected else 'has'} text_projection.weight"
        )
    o.agree(
        others=True,  # of generating text
        vocab_size=vocabulary, hidden_size=width, max_position_embeddings=length, num_hidden_layers=len(layers),
        intermediate_size=layers[0].shape("ff.net.2.weight", 2)[1] if layers else None,
        projection_dim=arrays.shape("text_projection.weight", 2)[0] if projected else None,
    )  # fmt: skip
    form = CLIPText(
        length,
        vocabulary,
        o.num_attention_heads,
        o.hidden_act,
        float(o.layer_norm_eps),
        o.eos_token_id,
    )
    arrays.trace(form.pooled, Shaped((1,), jnp.int32))
    return arrays.finish(form)


class Tokenizer:
    """A `Tokenizer` makes token ids of a text: start, the text's own, end, and padding
    up to a fixed length.

    Its folder has tokenizer.json, or vocab.json and merges.txt.
    """

    def __init__(self, folder: Path, length: int):
        self.length = length
        files = [
            folder / name
            for name in ("special_tokens_map.json", "tokenizer_config.json")
        ]
        notes = {
            name: note
            for file in files
            if file.exists()
            for name, note in read_json(file).items()
        }
        defaults = {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        }
        notes = {
            name: note.get("content") if isinstance(note, dict) else note
            for name, note in notes.items()
        }
        given = [(notes.get(name), default) for name, default in defaults.items()]
        start, end, padding = (
            default if token is None else str(token) for token, default in given
        )
        self._tokenizer = _read(folder, start, end)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        if unknown := [token for token in (end, padding) if token not in vocabulary]:
            fix = "fetch its files again from one source."
            raise LoadError(
                f"The tokenizer in {folder} has no token {unknown[0]!r}.", fix=fix
            )
        self.end, self.padding = vocabulary[end], vocabulary[padding]

    def __call__(self, text: str) -> np.ndarray:
        """Token ids, shape (length,); a text that is too long loses its end."""
        ids = self._tokenizer.encode(text).ids
        if len(ids) > self.length:
            ids = [*ids[: self.length - 1], self.end]
        return np.asarray(ids + [self.padding] * (self.length - len(ids)), np.int32)


def _read(folder: Path, start: str, end: str) -> Tokenizers:
    try:
        import tokenizers
        from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    except ImportError as error:
        raise LoadError(
            "Texts are made into tokens by the package tokenizers, which is not installed.",
            fix="pip install 'composeprob[text]', or give token ids: model.given(prompt=token_ids).",
        ) from error
    whole, vocabulary, merges = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    if not whole.exists() and not (vocabulary.exists() and merges.exists()):
        raise LoadError(
            f"There is no tokenizer in {folder}: neither tokenizer.json nor vocab.json and merges.txt.",
            fix="fetch the whole folder, or give token ids: model.given(prompt=token_ids).",
        )
    try:
        if whole.exists():
            found = tokenizers.Tokenizer.from_file(str(whole))
            found.no_padding()
            found.no_truncation()
            return found
        bpe = models.BPE.from_file(
            str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token=end
        )
        found = tokenizers.Tokenizer(bpe)
    except (
        Exception
    ) as error:  # the package raises plain exceptions, and files may hold anything
        fix = "fetch its files again: they are damaged."
        raise LoadError(
            f"The tokenizer in {folder} cannot be read: {error}", fix=fix
        ) from error
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    found.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()]
    )
    # Cut, before bytes are paired, into endings, words, single digits and other signs.
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    pieces = pre_tokenizers.Split(pattern, "removed", invert=True)
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ids = found.get_vocab()
    if start in ids and end in ids:
        found.add_special_tokens([start, end])
        found.post_processor = processors.RobertaProcessing(
            (end, ids[end]), (start, ids[start]), False, False
        )
    return found


class TextEncoder:
    """A `TextEncoder` makes hidden states of token ids: ``encoder(token_ids)``, by the
    network of one sequence.

    Its ``tokenizer`` makes token ids of a text, and is None where the folder has none.
    """

    def __init__(self, network: Loaded, tokenizer: Tokenizer | None):
        self.network, self.tokenizer = network, tokenizer

    def __call__(self, token_ids: ArrayLike) -> Array:
        """The last hidden states, after the last norm, (length, width) or (n, length,
        width), of as many token ids.

        Raises:
            InvalidValueError: no token ids of this encoder.
        """
        return self._encoded("last", token_ids)

    def pooled(self, token_ids: ArrayLike) -> Array:
        """The state of the end token, projected where the encoder has a projection:
        (width,) or (n, width)."""
        return self._encoded("pooled", token_ids)

    def states(self, token_ids: ArrayLike, layer: int = -1) -> Array:
        """The hidden states after a layer, before the last norm; −2 is the one that
        Stable Diffusion XL takes."""
        return self._encoded("states", token_ids, layer)

    def tokens(self, text: str) -> np.ndarray:
        """The token ids of a text; a `ConditionError` where the folder has no
        tokenizer."""
        if self.tokenizer is None:
            fix = "add the folder tokenizer/ to it, or give token ids: model.given(prompt=token_ids)."
            raise ConditionError(
                f"The prompt {text!r} is a text, but the model's folder has no tokenizer.",
                fix=fix,
            )
        return self.tokenizer(text)

    def _encoded(
        self, what: str, token_ids: ArrayLike, layer: int | None = None
    ) -> Array:
        ids = self.network.form.check(token_ids)
        found = self.network.mapped(what, jnp.atleast_2d(ids))
        states = (found if layer is None else found[layer]).astype(jnp.float32)
        return states if ids.ndim == 2 else states[0]


class Prompts:
    """`Prompts` makes of a prompt the one array that a network takes: hidden states of
    a width, by one or two encoders.

    Where the network takes a pooled vector beside, of the width ``pooled``, that is the
    last row.
    """

    def __init__(
        self, encoders: tuple[TextEncoder, ...], width: int, pooled: int | None
    ):
        self.encoders, self.width, self.pooled = encoders, width, pooled
        self._texts: dict[str, str] = {}

    def text_of(self, value: Array | np.ndarray) -> str | None:
        """The text that an encoded prompt was made of; None where that is not known."""
        known = not isinstance(value, jax.core.Tracer) and jnp.shape(value)[-1:] == (
            self.width,
        )
        return self._texts.get(fingerprint(value)) if known else None

    def __call__(self, prompt: str | ArrayLike) -> Array:
        """The prompt of a text, of token ids or of hidden states, (length, width)."""
        if not isinstance(prompt, str):
            prompt = self._array(jnp.asarray(prompt))
            if prompt.ndim == 2:
                return prompt
        if not self.encoders:
            raise ConditionError(
                f"The prompt {prompt!r} needs a text encoder, and the model's folder has none that is supported.",
                fix=f"pass hidden states of shape (length, {self.width}).",
            )
        ids = [
            encoder.tokens(prompt) if isinstance(prompt, str) else prompt
            for encoder in self.encoders
        ]
        if self.pooled is None:
            found = self.encoders[0](ids[0])
        else:
            states = [
                encoder.states(tokens, -2)
                for encoder, tokens in zip(self.encoders, ids, strict=True)
            ]
            found = with_pooled(
                jnp.concatenate(states, axis=-1), self.encoders[-1].pooled(ids[-1])
            )
        if isinstance(prompt, str):
            self._texts[fingerprint(found)] = prompt
        return found

    def _array(self, array: Array) -> Array:
        """Token ids (length,), or hidden states (length, width)."""
        whole = jnp.issubdtype(array.dtype, jnp.integer)
        rank = 1 if whole else 2
        if (
            array.ndim == rank + 1 and array.shape[0] == 1
        ):  # as tokenizers and encoders return one prompt
            array = array[0]
        if whole and array.ndim != 1:
            fix = 'give one prompt at a time, or run over several: cp.product(model, over={"prompt": all_ids}).'
            raise ShapeError(
                f"A prompt's token ids have shape (length,); got {array.shape}.",
                fix=fix,
            )
        if not whole and (array.ndim != 2 or array.shape[-1] != self.width):
            row = (
                f", its last row the pooled vector's {self.pooled} numbers and zeros"
                if self.pooled
                else ""
            )
            raise ShapeError(
                f"A prompt's hidden states have shape (length, {self.width}){row}; got {array.shape}.",
                fix="pass a text, token ids, or what model.text_encoder(token_ids) gives for ONE prompt.",
            )
        return array


def with_pooled(hidden: Array, vector: Array) -> Array:
    """Hidden states with a pooled vector as a last row: (length + 1, width)."""
    return jnp.concatenate(
        [hidden, jnp.pad(vector, (0, hidden.shape[-1] - vector.shape[-1]))[None]]
    )
