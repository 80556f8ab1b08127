"""Files of weights, bit for bit, and the folders that training writes into.

It replaces nothing unless told to.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import composeprob as cp
from composeprob import model_zoo
from composeprob.errors import InvalidValueError, LoadError
from composeprob.models import making
from composeprob.models.making import calibrate_model, train_model
from composeprob.models.networks import residual_mlp_nnx
from composeprob.training import TrainingRun, load_weights, save_weights
from refusals import refused
from training.recipes import tiny, untrained

KEY = jax.random.key(0)


def nnx_network(key):
    return residual_mlp_nnx.ResidualMLP(
        2, hidden=8, blocks=1, embedding=4, rngs=nnx.Rngs(params=key)
    )


def arrays_of(network):
    return jax.tree.leaves(eqx.filter(network, eqx.is_array))


@pytest.mark.parametrize("kind", ["equinox", "nnx"])
def test_round_trip(tmp_path, kind):
    recipe = tiny()
    name = "blocks.0.enter.weight"
    if kind == "nnx":
        recipe = dataclasses.replace(recipe, network=nnx_network)
        name = "state.blocks.0.enter.kernel"
    network = untrained(recipe, KEY)
    path = tmp_path / "w.safetensors"
    save_weights(network, path)
    loaded = load_weights(eqx.filter_eval_shape(recipe.untrained, KEY), path)
    for one, other in zip(arrays_of(network), arrays_of(loaded), strict=True):
        np.testing.assert_array_equal(one, other)
    x = np.ones(2, np.float32)
    t = np.float32(1.0)
    call = eqx.filter_jit(lambda network: network(x, t))
    np.testing.assert_array_equal(call(network), call(loaded))
    assert name in load_file(path)


def test_a_scalar_keeps_its_shape(tmp_path):
    path = tmp_path / "scalar.safetensors"
    save_weights({"scale": np.array(2.0, np.float32)}, path)
    scalar = load_weights({"scale": jax.ShapeDtypeStruct((), np.float32)}, path)
    assert scalar["scale"].shape == ()


def test_weights_of_single_precision_load_where_double_is_the_default(tmp_path):
    shapes = eqx.filter_eval_shape(tiny().untrained, KEY)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    save_weights(zeros, tmp_path / "w.safetensors")
    double = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, np.float64), shapes)
    loaded = load_weights(double, tmp_path / "w.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


def test_half_precision_is_read_as_single(tmp_path):
    network = untrained(tiny(), KEY)
    path = tmp_path / "w.safetensors"
    save_weights(network, path, half=True)
    assert {array.dtype for array in load_file(path).values()} == {np.dtype(np.float16)}
    loaded = load_weights(eqx.filter_eval_shape(tiny().untrained, KEY), path)
    for one, other in zip(arrays_of(network), arrays_of(loaded), strict=True):
        assert other.dtype == one.dtype
        np.testing.assert_allclose(one, other, rtol=2.0**-11, atol=1e-7)
    large = eqx.tree_at(lambda n: n.last.bias, network, np.full(2, 1e5, np.float32))
    facts = r"'last.bias'.*1e\+05"
    refused(lambda: save_weights(large, path, half=True), InvalidValueError, facts)


def test_what_does_not_fit_is_named(tmp_path):
    network = untrained(tiny(), KEY)
    path = tmp_path / "w.safetensors"
    save_weights(network, path)
    good = load_file(path)

    def refuses(tensors, facts):
        save_file(tensors, path)
        refused(lambda: load_weights(network, path), LoadError, facts)

    fewer = dict(good)
    del fewer["last.bias"]
    refuses(fewer, r"last\.bias")
    refuses(
        {**good, "extra": np.zeros(3, np.float32)},
        "extra",
    )
    refuses(
        {**good, "last.bias": np.zeros(3, np.float32)},
        r"'last.bias'.*float32\[3\].*float32\[2\]",
    )
    refuses({**good, "last.bias": np.zeros(2, np.float64)}, r"float64\[2\]")
    path.write_bytes(b"not safetensors")
    refused(lambda: load_weights(network, path), LoadError)
    refused(
        lambda: load_weights(network, tmp_path / "missing.safetensors"),
        LoadError,
    )


WEIGHTS = {0: "weights.safetensors", 2: "weights-2.safetensors"}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The folders that were written to, where training and measuring take no time.

    They are relative to the working directory.
    """
    folders = []
    # It has only a score, so that nothing is calibrated.
    network = cp.load("ring2d-sharp-score")

    def write(folder, *_):
        assert folder.is_dir()
        folders.append(folder)
        return [folder / WEIGHTS[0]]

    def train(*_, **__):
        return TrainingRun(
            network, np.zeros(3), np.zeros(2), np.zeros(1), 0.0, finished=True
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(making, "write_model", write)
    monkeypatch.setattr(making, "train", train)
    return folders


def trained(folder, number=0, finished=True):
    """Make a folder with the weights of a training."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS[number]).touch()
    row = {"retraining": number, "finished": finished}
    metrics = {"retrainings": [row]} if number else {"training": row}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_by_default_it_writes_beside_and_not_into_the_zoo(written):
    run = train_model("ring2d-sharp-score")
    assert written == [Path("out/ring2d-sharp-score")]
    assert run.written == (Path("out/ring2d-sharp-score/weights.safetensors"),)


@pytest.mark.parametrize("number", WEIGHTS)
def test_weights_are_replaced_only_where_that_is_asked_for(
    number, written, monkeypatch
):
    folder = Path("elsewhere")
    trained(folder, number)

    def never(*_, **__):
        raise AssertionError("it was trained")

    with monkeypatch.context() as patch:
        patch.setattr(making, "train", never)
        for options in ({}, {"checkpoint_dir": "checkpoints"}):
            arguments = {"out": folder, "retraining": number, **options}
            error = refused(
                lambda arguments=arguments: train_model(
                    "ring2d-sharp-score", **arguments
                ),
                InvalidValueError,
                WEIGHTS[number],
                "--replace",
            )
            assert "--out" in error.fix
    assert written == []
    train_model("ring2d-sharp-score", out=folder, retraining=number, replace=True)
    # Another retraining replaces nothing.
    train_model("ring2d-sharp-score", out=folder, retraining=2 - number)
    assert written == [folder, folder]


def test_the_zoo_itself_is_kept(written):
    own = model_zoo.models_folder() / "ring2d"
    refused(lambda: train_model("ring2d", out=own), InvalidValueError)


@pytest.mark.parametrize("number", WEIGHTS)
def test_a_run_that_was_stopped_goes_on(number, written):
    folder = Path("elsewhere")
    trained(folder, number, finished=False)

    def again(**options):
        options = {"out": folder, "retraining": number, **options}
        return train_model("ring2d-sharp-score", **options)

    # Without checkpoints it would start again.
    refused(again, InvalidValueError)
    again(checkpoint_dir="checkpoints")
    assert written == [folder]


def test_a_calibration_is_kept_too(monkeypatch, tmp_path):
    calls = []

    def calibrate(factor, *_, **__):
        calls.append(factor)
        return cp.load("ring2d")

    monkeypatch.setattr(making, "calibrate", calibrate)
    own = model_zoo.models_folder() / "ring2d"
    shutil.copy(own / "weights.safetensors", tmp_path)
    calibrate_model("ring2d", out=tmp_path)
    assert (tmp_path / "calibration.safetensors").exists()
    refused(
        lambda: calibrate_model("ring2d", out=tmp_path),
        InvalidValueError,
        "calibration.safetensors",
        "--replace",
    )
    assert len(calls) == 1
    calibrate_model("ring2d", out=tmp_path, replace=True)
    assert len(calls) == 2


def test_a_model_is_loaded_from_where_it_was_written(tmp_path):
    """The weights are of another model of the same network, unlike the zoo's own."""
    zoo = model_zoo.models_folder()
    shutil.copy(zoo / "bar2d" / "weights.safetensors", tmp_path)
    shutil.copy(zoo / "bar2d" / "calibration.safetensors", tmp_path)
    model = cp.load("ring2d", folder=tmp_path)
    bar = cp.load("bar2d")
    ring = cp.load("ring2d")
    arrays = jax.tree.leaves(model.base.network)
    of_bar = jax.tree.leaves(bar.base.network)
    of_ring = jax.tree.leaves(ring.base.network)
    for array, other in zip(arrays, of_bar, strict=True):
        np.testing.assert_array_equal(array, other)
    assert any(
        (array != other).any() for array, other in zip(arrays, of_ring, strict=True)
    )
    assert model.label == "ring2d"
    np.testing.assert_array_equal(model.log_normaliser, bar.log_normaliser)
    error = refused(
        lambda: cp.load("ring2d", retraining=1, folder=tmp_path),
        cp.errors.LoadError,
    )
    assert f"--out {tmp_path} --retraining 1" in error.fix
