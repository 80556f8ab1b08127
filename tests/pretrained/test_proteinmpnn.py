"""ProteinMPNN: what its network must and must not depend on, with random weights; the
original's numbers, where its weights are; and files that are refused."""

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import (
    ConditionError,
    InvalidValueError,
    LoadError,
    ShapeError,
)
from composeprob.pretrained import proteinmpnn
from composeprob.pretrained.backbone import HELIX, STRAND, ideal
from messages import check_wording
from refusals import rows
from tools.convert_proteinmpnn import convert
from zscores import assert_agrees, z_scores

LENGTH = 12
WIDTH = 8
NEIGHBOURS = 6


def weights(seed=0):
    """Random arrays of a small network, by the names of the original."""
    rng = np.random.default_rng(seed)
    arrays = {}

    def linear(name, inputs, outputs, bias=True):
        scale = 1.5 / np.sqrt(inputs)
        arrays[f"{name}.weight"] = scale * rng.normal(size=(outputs, inputs))
        if bias:
            arrays[f"{name}.bias"] = 0.1 * rng.normal(size=outputs)

    def norm(name):
        arrays[f"{name}.weight"] = 1 + 0.1 * rng.normal(size=WIDTH)
        arrays[f"{name}.bias"] = 0.1 * rng.normal(size=WIDTH)

    def layer(name, seen, messages):
        for first, second, third in messages:
            linear(f"{name}.{first}", (1 + seen) * WIDTH, WIDTH)
            linear(f"{name}.{second}", WIDTH, WIDTH)
            linear(f"{name}.{third}", WIDTH, WIDTH)
        linear(f"{name}.dense.W_in", WIDTH, 4 * WIDTH)
        linear(f"{name}.dense.W_out", 4 * WIDTH, WIDTH)
        norm(f"{name}.norm1")
        norm(f"{name}.norm2")

    linear("features.embeddings.linear", 66, 16)
    linear("features.edge_embedding", 16 + 16 * 25, WIDTH, bias=False)
    norm("features.norm_edges")
    linear("W_e", WIDTH, WIDTH)
    for i in range(2):
        name = f"encoder_layers.{i}"
        layer(name, 2, [("W1", "W2", "W3"), ("W11", "W12", "W13")])
        norm(f"{name}.norm3")
        layer(f"decoder_layers.{i}", 3, [("W1", "W2", "W3")])
    arrays["W_s.weight"] = rng.normal(size=(21, WIDTH))
    linear("W_out", WIDTH, 21)
    return {name: np.float32(array) for name, array in arrays.items()}


def small_model():
    form = proteinmpnn.ProteinMPNN(NEIGHBOURS)
    stored = {name: jnp.asarray(array) for name, array in weights().items()}
    return proteinmpnn.ProteinModel(proteinmpnn.skeleton(form, stored, "test"), "m")


@pytest.fixture(scope="module")
def network():
    return small_model().network


@pytest.fixture(scope="module")
def backbone():
    """A chain that bends at random, with neighbours that are not the next ones."""
    rng = np.random.default_rng(1)
    residues = ideal(HELIX, LENGTH)
    return jnp.float32(residues + 0.5 * rng.normal(size=residues.shape))


TOKENS = jnp.arange(LENGTH) * 7 % 20
RANK = jnp.arange(LENGTH) * 5 % LENGTH


@jax.jit
def logits(network, tokens, rank, backbone):
    return network(tokens, rank, backbone=backbone)


def test_turning_and_shifting_a_backbone_changes_nothing(network, backbone):
    found = logits(network, TOKENS, RANK, backbone)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    moved = backbone @ jnp.float32(rotation.T) + jnp.array([30.0, -20.0, 10.0])
    again = logits(network, TOKENS, RANK, moved)
    np.testing.assert_allclose(found, again, atol=2e-3)
    # Its mirror image is another molecule: CB lies on the other side.
    mirrored = logits(network, TOKENS, RANK, backbone * jnp.array([1.0, 1.0, -1.0]))
    assert float(jnp.max(jnp.abs(found - mirrored))) > 0.05


def test_residues_see_earlier_neighbours_and_nothing_else(network, backbone):
    found = logits(network, TOKENS, RANK, backbone)
    neighbours = np.asarray(proteinmpnn.nearest(backbone[:, 1], NEIGHBOURS))
    for changed in range(0, LENGTH, 3):
        tokens = TOKENS.at[changed].set((TOKENS[changed] + 5) % 20)
        other = logits(network, tokens, RANK, backbone)
        moved = np.asarray(jnp.max(jnp.abs(found - other), axis=1)) > 0
        later = np.asarray(RANK[changed] < RANK)
        assert not moved[~later].any()
        sees = (neighbours == changed).any(axis=1)
        assert moved[later & sees].all()


def test_only_the_order_of_ranks_matters(network, backbone):
    found = logits(network, TOKENS, RANK, backbone)
    stretched = logits(network, TOKENS, 10 * RANK - 7, backbone)
    np.testing.assert_array_equal(found, stretched)
    reversed_order = logits(network, TOKENS, -RANK, backbone)
    assert float(jnp.max(jnp.abs(found - reversed_order))) > 0.01


def test_ideal_backbones_have_the_shape_of_their_kind():
    rises = {}
    for name, torsions in (("helix", HELIX), ("strand", STRAND)):
        atoms = ideal(torsions, 30)
        bonds = np.linalg.norm(atoms[1:, 0] - atoms[:-1, 2], axis=-1)
        np.testing.assert_allclose(bonds, 1.329, atol=1e-6)
        ends = np.linalg.norm(atoms[-1, 1] - atoms[0, 1])
        rises[name] = ends / 29
    # Ångström a residue along the axis, as textbooks have them.
    assert rises["helix"] == pytest.approx(1.5, abs=0.1)
    assert rises["strand"] == pytest.approx(3.3, abs=0.2)


ORIGINAL = {
    "helix": [
        -2.0524,
        -4.0004,
        -3.1317,
        -4.3342,
        -3.7351,
        -4.1960,
        -4.4411,
        -5.6561,
        -3.5067,
        -3.8711,
        -2.4721,
        -2.8010,
        -2.8672,
        -2.1832,
        -4.8821,
        -2.2055,
        -3.5766,
        -3.4545,
        -2.1652,
        -3.4929,
    ],
    "strand": [
        -2.2870,
        -4.1446,
        -1.7632,
        -3.1391,
        -3.0526,
        -4.3462,
        -5.3823,
        -5.7653,
        -2.9437,
        -3.1207,
        -3.5057,
        -5.2531,
        -5.1478,
        -2.7971,
        -4.4097,
        -5.6009,
        -5.0155,
        -4.3897,
        -3.0065,
        -2.4529,
    ],
}
"""log q of the tokens (7·i + 3) mod 20 by ranks (3·i + 1) mod 20, as the original with
the weights v_48_020 gives them."""
FOLDER = os.environ.get("COMPOSEPROB_PROTEINMPNN", "")


@pytest.mark.skipif(
    not FOLDER, reason="COMPOSEPROB_PROTEINMPNN names no folder of converted v_48_020"
)
@pytest.mark.parametrize("name", ORIGINAL)
def test_conditionals_are_those_of_the_original(name):
    model = proteinmpnn.from_folder(Path(FOLDER))
    torsions = {"helix": HELIX, "strand": STRAND}[name]
    place = jnp.arange(20)
    tokens = (7 * place + 3) % 20
    backbone = jnp.float32(ideal(torsions, 20))
    found = logits(model.network, tokens, (3 * place + 1) % 20, backbone)
    log_q = jax.nn.log_softmax(found)[place, tokens]
    np.testing.assert_allclose(log_q, ORIGINAL[name], atol=1e-3)


def test_one_sequence_for_two_backbones_has_the_law_of_its_paths():
    """All sequences of two residues, in both orders, are enumerated."""
    model = small_model()
    backbones = [jnp.float32(ideal(torsions, 2)) for torsions in (HELIX, STRAND)]
    first, second = (model.given(backbone=backbone) for backbone in backbones)
    both = cp.program(lambda f, g: cp.sample("s", f * g))
    density = cp.compile(both, first, second)
    result = cp.infer(density, jax.random.key(0), num_chains=2000, progress=False)

    letters = len(proteinmpnn.LETTERS)
    pairs = jnp.stack(jnp.indices((letters, letters)), axis=-1).reshape(-1, 2)
    ranks = jnp.array([[0, 1], [1, 0]])

    @jax.jit
    def log_path(tokens, rank):
        total = 0.0
        for backbone in backbones:
            of_backbone = model.network(tokens, rank, backbone=backbone)
            log_q = jax.nn.log_softmax(of_backbone)
            total += jnp.sum(jnp.take_along_axis(log_q, tokens[:, None], axis=1))
        return total

    over_pairs = jax.vmap(log_path, (0, None))
    log_paths = np.asarray(jax.vmap(over_pairs, (None, 0))(pairs, ranks), float)
    # Orders are equally likely; each has its own sum over sequences.
    log_z = np.logaddexp.reduce(log_paths, axis=None) - np.log(2)
    error = float(result.log_evidence_error)
    assert abs(float(result.log_evidence) - log_z) < 4 * error + 1e-3
    weights = np.exp(log_paths - log_z - np.log(2)).sum(0).reshape(letters, letters)
    expected = {str(v): share for v, share in enumerate(weights.sum(1)) if share > 0.02}
    drawn = np.asarray(result["s"])[:, 0]
    samples = {name: drawn == int(name) for name in expected}
    assert_agrees(z_scores(samples, expected))


# Files


class Storages(pickle.Pickler):
    """Writes arrays as torch.save does, without torch."""

    def __init__(self, stream):
        super().__init__(stream, protocol=2)
        self.arrays = []

    def persistent_id(self, value):
        if not isinstance(value, Numbers):
            return None
        self.arrays.append(value.array)
        number = str(len(self.arrays) - 1)
        return ("storage", FloatStorage, number, "cpu", value.array.size)


class Numbers:
    """The numbers of one array."""

    def __init__(self, array):
        self.array = array


class Tensor:
    """An array that is pickled as a tensor."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        strides = [stride // 4 for stride in self.array.strides]
        arguments = (0, self.array.shape, tuple(strides), False, {})
        return _rebuild_tensor_v2, (Numbers(self.array), *arguments)


class FloatStorage:
    __module__ = "torch"


def _rebuild_tensor_v2(*_):
    raise AssertionError("only its name is pickled")


_rebuild_tensor_v2.__module__ = "torch._utils"


class Harmful:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def saved(path, content, patch):
    """Write a .pt file."""
    for name, value in (
        ("torch", FloatStorage),
        ("torch._utils", _rebuild_tensor_v2),
    ):
        module = ModuleType(name)
        setattr(module, value.__name__, value)
        patch.setitem(sys.modules, name, module)
    stream = io.BytesIO()
    pickler = Storages(stream)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        for i, array in enumerate(pickler.arrays):
            archive.writestr(f"archive/data/{i}", array.tobytes())
    for name in ("torch", "torch._utils"):
        patch.delitem(sys.modules, name)


def as_saved(arrays, **others):
    """The contents of the original's files, with arrays as tensors."""
    state = {name: Tensor(array) for name, array in arrays.items()}
    return {"num_edges": NEIGHBOURS, "noise_level": 0.2, "model_state_dict": state} | (
        others
    )


def test_a_file_becomes_a_folder_with_the_same_network(
    tmp_path, monkeypatch, network, backbone
):
    saved(tmp_path / "small.pt", as_saved(weights()), monkeypatch)
    convert(tmp_path / "small.pt", tmp_path / "small")
    model = cp.load(str(tmp_path / "small"))
    assert repr(model) == "small (21 values, of any length)"
    factor = model.given(backbone=backbone)
    assert factor.event_shape == (LENGTH,)
    with pytest.raises(ConditionError):
        model.given(structure=backbone)
    expected = logits(network, TOKENS, RANK, backbone)
    found = logits(model.network, TOKENS, RANK, backbone)
    np.testing.assert_array_equal(found, expected)
    assert model.letters(model.tokens("ACDYX")) == "ACDYX"


def converted(content):
    """A conversion of a file with this content."""

    def call(tmp_path, monkeypatch):
        saved(tmp_path / "file.pt", content, monkeypatch)
        convert(tmp_path / "file.pt", tmp_path / "folder")

    return call


def damaged(tmp_path, monkeypatch):
    saved(tmp_path / "file.pt", as_saved(weights()), monkeypatch)
    content = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    convert(tmp_path / "cut.pt", tmp_path / "folder")


def there_already(tmp_path, monkeypatch):
    saved(tmp_path / "file.pt", as_saved(weights()), monkeypatch)
    convert(tmp_path / "file.pt", tmp_path)


def without(name):
    arrays = weights()
    del arrays[name]
    return arrays


REFUSALS = {
    LoadError: {
        "a pickle that runs a command": converted(as_saved({}, harm=Harmful())),
        "no dict": converted([1, 2]),
        "no state dict": converted({"num_edges": 48}),
        "a model of CA atoms": converted(
            as_saved(weights() | {"W_v.weight": np.zeros((8, 8), np.float32)})
        ),
        "a layer that is missing": converted(as_saved(without("W_out.weight"))),
        "an array too much": converted(
            as_saved(weights() | {"more": np.zeros(3, np.float32)})
        ),
        "a file that is cut short": damaged,
        "no file": lambda tmp_path, _: convert(tmp_path / "none.pt", tmp_path / "f"),
        "a letter that is none": lambda *_: small_model().tokens("ABC"),
    },
    InvalidValueError: {
        "a folder with files": there_already,
        "an atom that is missing": lambda *_: proteinmpnn.check_backbone(
            np.full((3, 4, 3), np.nan)
        ),
    },
    ShapeError: {
        "CA atoms alone": lambda *_: proteinmpnn.check_backbone(np.zeros((9, 3))),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSALS))
def test_refusals_of_proteinmpnn(kind, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as caught:
        call(Path(), monkeypatch)
    assert caught.value.fix
    check_wording(str(caught.value))
    assert not Path("harmed").exists()
    assert not Path("folder").exists()
