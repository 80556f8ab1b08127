"""`CLIPTextModel` and `CLIPTextModelWithProjection`: token ids to hidden states (Radford et al. 2021)."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from numpy.typing import ArrayLike

from composeprob.errors import InvalidValueError
from composeprob.json_data import JSONObject
from composeprob.pretrained.attention import Attention
from composeprob.pretrained.config import Options, positive, text_list, whole, whole_from_0
from composeprob.pretrained.layers import ACTIVATIONS, Embedding, LayerNorm, Linear
from composeprob.pretrained.tensors import Arrays


class Tokens(eqx.Module):
    """The sum of a token's and its place's embeddings."""

    token_embedding: Embedding
    position_embedding: Embedding

    def __call__(self, ids: Array) -> Array:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[0]]


class Layer(eqx.Module):
    """Attention to this token and those before, and two layers, each after a norm and added."""

    layer_norm1: LayerNorm
    self_attn: Attention
    layer_norm2: LayerNorm
    fc1: Linear
    fc2: Linear
    activation: str = eqx.field(static=True)

    def __init__(self, arrays: Arrays, width: int, heads: int, eps: float, activation: str):
        self.layer_norm1, self.layer_norm2 = (LayerNorm(arrays / f"layer_norm{i}", width, eps) for i in (1, 2))
        self.self_attn = Attention(arrays / "self_attn", width, heads, bias=True, causal=True)
        self.fc1 = Linear(arrays / "mlp" / "fc1", width)
        self.fc2 = Linear(arrays / "mlp" / "fc2", self.fc1.outputs, width)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.layer_norm2(x))))


class CLIPText(eqx.Module):
    """A text encoder over one sequence of token ids.

    Attributes:
        end: the id at whose first place the pooled vector is read.
    """

    embeddings: Tokens
    layers: tuple[Layer, ...]
    final_layer_norm: LayerNorm
    text_projection: Linear | None
    end: int = eqx.field(static=True)

    @property
    def length(self) -> int:
        """The most tokens of a sequence."""
        return self.embeddings.position_embedding.weight.shape[0]

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return self.embeddings.token_embedding.weight.shape[0]

    def states(self, ids: Array) -> list[Array]:
        """The hidden states before the first layer and after each, (length, width) each, before the last norm."""
        states = [self.embeddings(ids)]
        for layer in self.layers:
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


def clip(config: JSONObject, arrays: Arrays, where: str) -> CLIPText:
    """A CLIP text encoder, with a projection where its class has one.

    Raises:
        LoadError: an option that is not supported, or weights of another network.
    """
    o = Options(
        config, where, num_attention_heads=(8, whole), hidden_act=("quick_gelu", *ACTIVATIONS),
        layer_norm_eps=(1e-5, positive), eos_token_id=(49407, whole_from_0), architectures=(None, text_list),
    )  # fmt: skip
    tokens = Tokens(*(Embedding(arrays / "embeddings" / f"{name}_embedding") for name in ("token", "position")))
    width, eps = tokens.token_embedding.weight.shape[1], o.layer_norm_eps
    below = arrays.items("encoder.layers")
    layers = tuple(Layer(each, width, o.num_attention_heads, eps, o.hidden_act) for each in below)
    norm = LayerNorm(arrays / "final_layer_norm", width, eps)
    projected = "CLIPTextModelWithProjection" in (o.architectures or ())
    projection = Linear(arrays / "text_projection", width, bias=False) if projected else None
    arrays.finish()
    o.agree(
        others=True,  # of generating text
        vocab_size=tokens.token_embedding.weight.shape[0], hidden_size=width,
        max_position_embeddings=tokens.position_embedding.weight.shape[0], num_hidden_layers=len(layers),
        intermediate_size=layers[0].fc1.outputs if layers else None,
        projection_dim=None if projection is None else projection.outputs,
    )  # fmt: skip
    return CLIPText(tokens, layers, norm, projection, o.eos_token_id)
