"""`CLIPTextModel` and `CLIPTextModelWithProjection`: token ids to hidden states (Radford et al. 2021)."""

from __future__ import annotations

from types import SimpleNamespace

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from numpy.typing import ArrayLike

from composeprob.errors import InvalidValueError
from composeprob.json_data import JSONObject
from composeprob.pretrained.attention import attend
from composeprob.pretrained.config import options
from composeprob.pretrained.layers import ACTIVATIONS, Embedding, LayerNorm, Linear


class Tokens(eqx.Module):
    """The sum of a token's and its place's embeddings."""

    token_embedding: Embedding
    position_embedding: Embedding

    def __call__(self, ids: Array) -> Array:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[0]]


class SelfAttention(eqx.Module):
    """Attention to this token and those before."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int):
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class MLP(eqx.Module):
    """Two layers."""

    fc1: Linear
    fc2: Linear
    activation: str = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(eqx.Module):
    """Attention and two layers, each after a norm and added."""

    layer_norm1: LayerNorm
    self_attn: SelfAttention
    layer_norm2: LayerNorm
    mlp: MLP

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Layers(eqx.Module):
    """The layers, under the name that the files have."""

    layers: tuple[Layer, ...]


class CLIPText(eqx.Module):
    """A text encoder over one sequence of token ids.

    Attributes:
        length: the most tokens of a sequence.
        vocabulary: how many ids there are.
        end: the id at whose first place the pooled vector is read.
    """

    embeddings: Tokens
    encoder: Layers
    final_layer_norm: LayerNorm
    text_projection: Linear | None
    length: int = eqx.field(static=True)
    vocabulary: int = eqx.field(static=True)
    end: int = eqx.field(static=True)

    def states(self, ids: Array) -> list[Array]:
        """The hidden states before the first layer and after each, (length, width) each, before the last norm."""
        states = [self.embeddings(ids)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states

    def last(self, ids: Array) -> Array:
        """The last hidden states, after the last norm, (length, width)."""
        return self.final_layer_norm(self.states(ids)[-1])

    def pooled(self, ids: Array) -> Array:
        """The state of the end token, projected where the network has a projection."""
        # Old files have 2 in the place of the end token's id: there the end is the greatest id of a sequence.
        place = jnp.argmax(ids) if self.end == 2 else jnp.argmax(ids == self.end)
        found = self.last(ids)[place]
        return found if self.text_projection is None else self.text_projection(found)

    def check(self, ids: ArrayLike) -> Array:
        """Token ids as an array.

        Raises:
            InvalidValueError: no integers, too many of them, or ids that the network does not have.
        """
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
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < self.vocabulary:
            raise InvalidValueError(
                f"Token ids go from {int(array.min())} to {int(array.max())}, but the text encoder has 0 to "
                f"{self.vocabulary - 1}.",
                fix="use the tokenizer that lies beside the model.",
            )
        return array


def _options(config: JSONObject, where: str) -> SimpleNamespace:
    """The options of a CLIP text encoder, with the original's defaults."""
    return options(
        config,
        where,
        defaults={
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "projection_dim": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "initializer_range": 0.02,
            "initializer_factor": 1.0,
            "pad_token_id": 1,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        supported={"hidden_act": tuple(ACTIVATIONS)},
        others=True,  # of generating text
    )


def build(config: JSONObject, where: str) -> CLIPText:
    """The skeleton of a CLIP text encoder from its config.json, with a projection where its class has one.

    Raises:
        LoadError: an option that is not supported.
    """
    o = _options(config, where)
    width, eps = o.hidden_size, o.layer_norm_eps
    layers = tuple(
        Layer(
            LayerNorm(width, eps),
            SelfAttention(width, o.num_attention_heads),
            LayerNorm(width, eps),
            MLP(Linear(width, o.intermediate_size), Linear(o.intermediate_size, width), o.hidden_act),
        )
        for _ in range(o.num_hidden_layers)
    )
    projected = "CLIPTextModelWithProjection" in (config.get("architectures") or [])
    projection = Linear(width, o.projection_dim, bias=False) if projected else None
    tokens = Tokens(Embedding(o.vocab_size, width), Embedding(o.max_position_embeddings, width))
    return CLIPText(
        tokens,
        Layers(layers),
        LayerNorm(width, eps),
        projection,
        o.max_position_embeddings,
        o.vocab_size,
        o.eos_token_id,
    )
