"""ProteinMPNN: residues of a protein given its backbone, in any order.

Of each residue the network sees the nearest ones. An encoder makes features of residues
and of pairs from the distances of their atoms; a decoder adds the letters of those that
come earlier in the order (Dauparas et al. 2022, *Robust deep learning-based protein
sequence design using ProteinMPNN*).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from composeprob.arguments import check_finite
from composeprob.core import LeafFactor, MaskedDiffusion, check_conditions
from composeprob.errors import LoadError, ShapeError
from composeprob.json_data import JSONObject
from composeprob.pretrained import layers, tensors
from composeprob.pretrained.config import read_json
from composeprob.pretrained.tensors import Arrays

LETTERS = "ACDEFGHIKLMNPQRSTVWYX"
"""Amino acids by their tokens; X is an unknown one."""
CLASS = "ProteinMPNN"
"""The class in a folder's config.json."""
WEIGHTS = "model.safetensors"

N, CA, C, O, CB = range(5)  # noqa: E741 - the atoms' names
PAIRS = (
    *((CA, CA), (N, N), (C, C), (O, O), (CB, CB)),
    *((CA, N), (CA, C), (CA, O), (CA, CB), (N, C)),
    *((N, O), (N, CB), (CB, C), (CB, O), (O, C)),
    *((N, CA), (C, CA), (O, CA), (CB, CA), (C, N)),
    *((O, N), (CB, N), (C, CB), (O, CB), (C, O)),
)
"""Atoms, of a residue and of its neighbour, whose distances are features, in the order
in which the weights take them."""
NUM_BASES = 16
RANGE = (2.0, 22.0)
"""Centres of the first and of the last radial basis function, in ångström."""
FARTHEST = 32
"""Offset along the chain from which on all are alike."""
MESSAGES = 30.0
"""Number that sums of messages are divided by."""
TINY = 1e-6
"""Squared ångström, added to squared distances."""

Backbone = Float[Array, "length 4 3"]
Residues = Float[Array, "length width"]
Pairs = Float[Array, "length neighbours width"]
Neighbours = Int[Array, "length neighbours"]


class Encoded(NamedTuple):
    """Features of a backbone.

    Attributes:
        residues: features of residues.
        pairs: features of residues and their neighbours.
        neighbours: the neighbours of each residue, itself among them.
    """

    residues: Residues
    pairs: Pairs
    neighbours: Neighbours


@dataclass(frozen=True)
class ProteinMPNN:
    """The form of the network: numbers that the weights do not have.

    Attributes:
        neighbours: number of residues that each residue sees.
    """

    neighbours: int

    def __call__(
        self, arrays: Arrays, tokens: Array, rank: Array, backbone: Backbone
    ) -> Float[Array, "length letters"]:
        """Logits of each residue's letter given the letters of lower rank."""
        return self.decode(arrays, self.encode(arrays, backbone), tokens, rank)

    def encode(self, arrays: Arrays, backbone: Backbone) -> Encoded:
        """Features of a backbone."""
        atoms = with_beta(backbone)
        neighbours = nearest(atoms[:, CA], self.neighbours)
        below = arrays / "features"
        offsets = jnp.arange(len(atoms))[:, None] - neighbours
        places = jnp.clip(offsets + FARTHEST, 0, 2 * FARTHEST)
        # One more class, of other chains, follows the offsets.
        one_hot = jax.nn.one_hot(places, 2 * FARTHEST + 2)
        position = layers.linear(below / "embeddings" / "linear", one_hot)
        features = jnp.concatenate([position, distances(atoms, neighbours)], axis=-1)
        pairs = layers.linear(below / "edge_embedding", features, bias=False)
        pairs = layers.layer_norm(below / "norm_edges", pairs)
        pairs = layers.linear(arrays / "W_e", pairs)
        residues = jnp.zeros((len(atoms), pairs.shape[-1]), pairs.dtype)
        for layer in arrays.items("encoder_layers"):
            first = seen_by_encoder(layer / "W1", residues, pairs, neighbours)
            residues = updated(layer, residues, first)
            first = seen_by_encoder(layer / "W11", residues, pairs, neighbours)
            change = message(layer, first, ("W12", "W13"))
            pairs = layers.layer_norm(layer / "norm3", pairs + change)
        return Encoded(residues, pairs, neighbours)

    def decode(
        self,
        arrays: Arrays,
        encoded: Encoded,
        tokens: Int[Array, " length"],
        rank: Int[Array, " length"],
    ) -> Float[Array, "length letters"]:
        """Logits of each residue's letter, from a backbone's features and the letters
        of lower rank."""
        backbone, pairs, neighbours = encoded
        letters = arrays.take("W_s.weight", None, None)[tokens]
        earlier = (rank[neighbours] < rank[:, None])[..., None]
        residues = backbone
        for layer in arrays.items("decoder_layers"):
            own, of_pairs, of_letter, of_residue = columns(layer / "W1", 4)
            # Neighbours that come later are what the encoder knows of them.
            before = letters @ of_letter + residues @ of_residue
            after = backbone @ of_residue
            seen = jnp.where(earlier, before[neighbours], after[neighbours])
            first = (residues @ own)[:, None] + pairs @ of_pairs + seen
            first = first + bias(layer / "W1")
            residues = updated(layer, residues, first)
        return layers.linear(arrays / "W_out", residues)


def with_beta(backbone: Backbone) -> Float[Array, "length 5 3"]:
    """Atoms N, CA, C, O of a backbone and CB, at its ideal place beside them."""
    to_alpha = backbone[:, CA] - backbone[:, N]
    to_carbon = backbone[:, C] - backbone[:, CA]
    normal = jnp.cross(to_alpha, to_carbon)
    beta = -0.58273431 * normal + 0.56802827 * to_alpha - 0.54067466 * to_carbon
    beta = beta + backbone[:, CA]
    return jnp.concatenate([backbone, beta[:, None]], axis=1)


def nearest(alpha: Float[Array, "length 3"], number: int) -> Neighbours:
    """Return the residues whose CA are nearest to each one's, itself first."""
    difference = alpha[:, None] - alpha
    squared = jnp.sum(difference**2, axis=-1)
    _, neighbours = jax.lax.top_k(-squared, min(number, len(alpha)))
    return neighbours


def distances(
    atoms: Float[Array, "length 5 3"], neighbours: Neighbours
) -> Float[Array, "length neighbours features"]:
    """Radial basis functions of the distances of all pairs of atoms."""
    own = jnp.array([pair[0] for pair in PAIRS])
    other = jnp.array([pair[1] for pair in PAIRS])
    difference = atoms[:, None, own] - atoms[neighbours][:, :, other]
    distance = jnp.sqrt(jnp.sum(difference**2, axis=-1) + TINY)
    centres = jnp.linspace(*RANGE, NUM_BASES)
    width = (RANGE[1] - RANGE[0]) / NUM_BASES
    bases = jnp.exp(-(((distance[..., None] - centres) / width) ** 2))
    return bases.reshape(*neighbours.shape, -1)


def columns(arrays: Arrays, number: int) -> list[Float[Array, "width width"]]:
    """Return the parts of a linear layer's matrix that act on the parts of its input.

    The first layer of a message acts on a pair and on both of its residues. What it
    makes of a residue is computed once, not for each pair, and what it makes of a pair
    does not depend on letters: with many sequences it is computed once for all.
    """
    return jnp.split(arrays.take("weight", None, None).T, number)


def bias(arrays: Arrays) -> Float[Array, " width"]:
    """Return a linear layer's bias."""
    return arrays.take("bias", None)


def seen_by_encoder(
    arrays: Arrays, residues: Residues, pairs: Pairs, neighbours: Neighbours
) -> Pairs:
    """Return the first layer of a message of the encoder."""
    own, of_pairs, of_residue = columns(arrays, 3)
    seen = (residues @ of_residue)[neighbours]
    first = (residues @ own)[:, None] + pairs @ of_pairs + seen
    return first + bias(arrays)


def message(
    arrays: Arrays, first: Pairs, names: tuple[str, str] = ("W2", "W3")
) -> Pairs:
    """Return an MLP of each residue and what it sees of each neighbour, from its first
    layer."""
    second, third = names
    hidden = gelu(layers.linear(arrays / second, gelu(first)))
    return layers.linear(arrays / third, hidden)


def updated(arrays: Arrays, residues: Residues, first: Pairs) -> Residues:
    """Return the residues after the messages of their neighbours and an MLP."""
    total = jnp.sum(message(arrays, first), axis=1) / MESSAGES
    residues = layers.layer_norm(arrays / "norm1", residues + total)
    inner = gelu(layers.linear(arrays / "dense" / "W_in", residues))
    change = layers.linear(arrays / "dense" / "W_out", inner)
    return layers.layer_norm(arrays / "norm2", residues + change)


def gelu(x: Array) -> Array:
    """x·Φ(x), exactly."""
    return jax.nn.gelu(x, approximate=False)


class ProteinModel(MaskedDiffusion):
    """ProteinMPNN with its weights, made by ``cp.load(FOLDER)``: a masked diffusion of
    the residues of a protein, once it is given a backbone.

    ``network(tokens, rank, backbone=X)`` returns logits (L, 21) of each residue's
    letter, one of `LETTERS`, given those of lower rank. Conditionals depend on the
    order, and not on the visible letters alone. Neighbours of a residue at the same
    distance from it, at the end of those that it sees, are told apart by rounding.
    """

    def __init__(self, network: tensors.Loaded, label: str):
        # Its length is that of the backbone, which `given` gives it.
        super().__init__(
            network,
            length=2,
            num_values=len(LETTERS),
            conditions=("backbone",),
            label=label,
        )

    def given(self, **conditions: object) -> LeafFactor:
        check_conditions(self, conditions)
        if "backbone" not in conditions:
            return self
        backbone = check_backbone(cast(ArrayLike, conditions["backbone"]))
        of_length = MaskedDiffusion(
            self.network,
            length=len(backbone),
            num_values=self.num_values,
            conditions=self.names,
            label=self.label,
        )
        return of_length.given(backbone=backbone)

    def tokens(self, sequence: str) -> Int[np.ndarray, " length"]:
        """Return the tokens of letters.

        Raises:
            LoadError: a letter that is not one of `LETTERS`.
        """
        unknown = sorted(set(sequence) - set(LETTERS))
        if unknown:
            raise LoadError(
                f"{unknown[0]!r} is not a letter of ProteinMPNN.",
                fix=f"use {LETTERS}; X is an unknown residue.",
            )
        return np.array([LETTERS.index(letter) for letter in sequence], np.int32)

    def letters(self, tokens: ArrayLike) -> str:
        """Return the letters of the tokens of one sequence."""
        return "".join(LETTERS[token] for token in np.asarray(tokens))

    def _about(self) -> tuple[str, ...]:
        return f"{self.num_values} values", "of any length"


def check_backbone(backbone: ArrayLike) -> Backbone:
    """Return a backbone as an array; refuse another shape, and missing atoms."""
    atoms = jnp.asarray(backbone, jnp.result_type(float))
    if atoms.ndim != 3 or atoms.shape[1:] != (4, 3) or len(atoms) < 2:
        raise ShapeError(
            f"A backbone has shape (length, 4, 3), the atoms N, CA, C and O of each "
            f"residue in ångström; got {atoms.shape}.",
            fix="stack the four atoms of each residue in this order.",
        )
    return check_finite(atoms, "The backbone")


def from_folder(folder: Path) -> ProteinModel:
    """Read a folder that ``tools/convert_proteinmpnn.py`` has written."""
    form = form_of(read_json(folder / "config.json"), folder)
    stored = tensors.header(folder / WEIGHTS)
    network = skeleton(form, stored, str(folder))
    return ProteinModel(tensors.fill(network, jnp.float32), folder.name)


def form_of(config: JSONObject, folder: Path) -> ProteinMPNN:
    """Return the form that a configuration describes."""
    neighbours = config.get("num_edges")
    if config.get("_class_name") != CLASS or not isinstance(neighbours, int):
        raise LoadError(
            f"{folder} is not a folder of ProteinMPNN: its config.json names neither "
            "the class nor the number of edges.",
            fix="write it by tools/convert_proteinmpnn.py.",
        )
    return ProteinMPNN(neighbours)


def skeleton(
    form: ProteinMPNN, stored: dict[str, tensors.Stored], where: str
) -> tensors.Loaded:
    """Return the network of arrays that are not read yet; refuse arrays that do not fit
    together."""
    arrays = Arrays(stored, where)
    length = 3
    whole = jax.ShapeDtypeStruct((length,), jnp.int32)
    atoms = jax.ShapeDtypeStruct((length, 4, 3), jnp.float32)
    outputs = arrays.trace(form, whole, whole, backbone=atoms)
    if outputs != (length, len(LETTERS)):
        raise arrays.foreign(f"it has {outputs[-1]} letters")
    return arrays.finish(form)


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder of ProteinMPNN."""
    config = path / "config.json"
    if not config.is_file():
        return False
    return read_json(config).get("_class_name") == CLASS


def write_config(folder: Path, neighbours: int) -> None:
    """Write the configuration that `from_folder` reads."""
    config = {"_class_name": CLASS, "num_edges": neighbours}
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
