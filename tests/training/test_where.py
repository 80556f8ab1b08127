"""Where training writes: a folder of its own, and over nothing that is there unless told to."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import composeprob as cp
from composeprob import model_zoo
from composeprob.models import making
from composeprob.models.making import calibrate_model, train_model
from composeprob.training import TrainingRun
from refusals import refused

WEIGHTS = {0: "weights.safetensors", 2: "weights-2.safetensors"}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Training and measuring that take no time; the folders that were written to, relative to where it was started."""
    folders = []
    network = cp.load("ring2d-sharp-score")  # only a score, so that nothing is calibrated

    def write(folder, *_):
        assert folder.is_dir()
        folders.append(folder)
        return [folder / WEIGHTS[0]]

    def train(*_, **__):
        return TrainingRun(network, np.zeros(3), np.zeros(2), np.zeros(1), 0.0, finished=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(making, "write_model", write)
    monkeypatch.setattr(making, "train", train)
    return folders


def trained(folder, number=0, finished=True):
    """A folder with the weights of a training."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS[number]).touch()
    row = {"retraining": number, "finished": finished}
    (folder / "metrics.json").write_text(json.dumps({"retrainings": [row]} if number else {"training": row}))


def test_by_default_it_writes_beside_and_not_into_the_zoo(written):
    run = train_model("ring2d-sharp-score")
    assert written == [Path("out/ring2d-sharp-score")]
    assert run.written == (Path("out/ring2d-sharp-score/weights.safetensors"),)


@pytest.mark.parametrize("number", WEIGHTS)
def test_weights_are_replaced_only_where_that_is_asked_for(number, written, monkeypatch):
    folder = Path("elsewhere")
    trained(folder, number)

    def never(*_, **__):
        raise AssertionError("it was trained")

    with monkeypatch.context() as patch:
        patch.setattr(making, "train", never)
        with pytest.raises(cp.errors.InvalidValueError, match=f"{WEIGHTS[number]} is there already") as caught:
            train_model("ring2d-sharp-score", out=folder, retraining=number)
        with pytest.raises(cp.errors.InvalidValueError):
            train_model("ring2d-sharp-score", out=folder, retraining=number, checkpoint_dir="checkpoints")
    assert "--replace" in caught.value.fix
    assert "--out" in caught.value.fix
    assert written == []
    train_model("ring2d-sharp-score", out=folder, retraining=number, replace=True)
    other = 2 - number
    train_model("ring2d-sharp-score", out=folder, retraining=other)  # another retraining replaces nothing
    assert written == [folder, folder]


def test_the_zoo_itself_is_kept(written):
    with pytest.raises(cp.errors.InvalidValueError, match="is there already"):
        train_model("ring2d", out=model_zoo.models_folder() / "ring2d")


@pytest.mark.parametrize("number", WEIGHTS)
def test_a_run_that_was_stopped_goes_on(number, written):
    folder = Path("elsewhere")
    trained(folder, number, finished=False)
    with pytest.raises(cp.errors.InvalidValueError):  # without checkpoints it would start again
        train_model("ring2d-sharp-score", out=folder, retraining=number)
    train_model("ring2d-sharp-score", out=folder, retraining=number, checkpoint_dir="checkpoints")
    assert written == [folder]


def test_a_calibration_is_kept_too(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(making, "calibrate", lambda factor, *_, **__: calls.append(factor) or cp.load("ring2d"))
    own = model_zoo.models_folder() / "ring2d"
    shutil.copy(own / "weights.safetensors", tmp_path)
    calibrate_model("ring2d", out=tmp_path)
    assert (tmp_path / "calibration.safetensors").exists()
    with pytest.raises(cp.errors.InvalidValueError, match=r"calibration\.safetensors is there already") as caught:
        calibrate_model("ring2d", out=tmp_path)
    assert "--replace" in caught.value.fix
    assert len(calls) == 1
    calibrate_model("ring2d", out=tmp_path, replace=True)
    assert len(calls) == 2


def test_a_model_is_loaded_from_where_it_was_written(tmp_path):
    """The weights of another model of the same network, so that the zoo's own would be noticed."""
    zoo = model_zoo.models_folder()
    shutil.copy(zoo / "bar2d" / "weights.safetensors", tmp_path)
    shutil.copy(zoo / "bar2d" / "calibration.safetensors", tmp_path)
    model = cp.load("ring2d", folder=tmp_path)
    wanted, zoos = cp.load("bar2d"), cp.load("ring2d")
    arrays, expected, others = (jax.tree.leaves(each.base.network) for each in (model, wanted, zoos))
    for array, other in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, other)
    assert any((array != other).any() for array, other in zip(arrays, others, strict=True))
    assert model.label == "ring2d"
    np.testing.assert_array_equal(model.log_normaliser, wanted.log_normaliser)
    caught = refused(lambda: cp.load("ring2d", retraining=1, folder=tmp_path), cp.errors.LoadError, "no retraining 1")
    assert f"--out {tmp_path} --retraining 1" in caught.fix
