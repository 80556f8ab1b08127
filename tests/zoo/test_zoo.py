"""The zoo: models by name, from a checkout or a wheel, as good as their cards say."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from composeprob import model_zoo as zoo
from composeprob import models
from composeprob.errors import LoadError
from composeprob.models.making import losses_by_log_snr, table, train_model
from composeprob.training import score_errors
from refusals import refused
from sampling_cases import slow
from test_one_line import line

MODELS = Path(__file__).parents[2] / "models"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/weights.safetensors"))
QUICK = ("ring2d", "ring2d-score")
"""Models whose quality is measured again in every run of the tests; each takes a
compilation."""

RETRAINED = [
    (name, number)
    for name in NAMES
    for number in zoo.retrainings(MODELS / name)
    if number > 0
]

TINY = """
from __future__ import annotations
import composeprob as cp
import numpyro.distributions as dist
from ..networks.residual_mlp_eqx import ResidualMLP

def reference():
    return dist.Normal(0.0, 0.5).expand([2]).to_event(1)

RECIPE = cp.training.Recipe(
    network=lambda key: ResidualMLP(2, hidden=8, blocks=1, embedding=4, key=key),
    data=lambda key, n: reference().sample(key, (n,)),
    schedule=cp.Schedule.log_snr(5, min=-4.0, max=2.0), log_snr=(-4.0, 2.0),
    iterations=5, batches=8,
)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A zoo elsewhere, with one tiny model that has not been trained."""
    shutil.copytree(
        MODELS / "networks",
        tmp_path / "networks",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "train.py").write_text(TINY)
    (tmp_path / "tiny" / "card.md").write_text("# tiny\n\nA Gaussian.\n\nMore of it.\n")
    for name in imported_models():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(models, "__path__", [str(tmp_path)])
    yield tmp_path
    for name in imported_models():
        del sys.modules[name]


def imported_models():
    return [name for name in sys.modules if name.startswith("composeprob.models.")]


EXACT = [name for name in NAMES if zoo.reference(name) is not None]
HELD_OUT = [name for name in NAMES if zoo.defined(name, "held_out") is not None]


@pytest.mark.parametrize("name", NAMES)
def test_every_model_loads_and_has_its_card(name):
    """Both print as one short line. Models without an exact law have pictures too."""
    factor = zoo.load(name)
    card = zoo.zoo(name)
    assert factor.label == name
    assert factor.capabilities == card.capabilities
    size = "×".join(map(str, factor.event_shape))
    if card.parameterization == "masked":
        assert line(factor) == f"{name} ({factor.num_values} values, {size})"
        start = f"{name} (masked, {size}"
    else:
        offers = "energy" if "energy" in factor.capabilities else "score"
        start = f"{name} ({offers}, {size}"
        assert line(factor).startswith(start)
    assert line(card).startswith(start)
    assert card.title[:20] in line(card)
    metrics = json.loads((card.folder / "metrics.json").read_text())
    assert table(metrics) in card.text  # the card shows what was measured
    if name not in EXACT:
        for picture in card.folder.glob("*.png"):
            assert f"({picture.name})" in card.text
        assert (card.folder / "training.png").exists()


@pytest.mark.parametrize("name", ["ring2d", "bar2d"])
def test_data_of_the_models_of_readme_compile_nothing(name):
    """JAX compiles a program for each operation on its arrays, NumPyro's checks of
    arguments among them: some twenty for a first `cp.load`."""
    parameters = jax.tree.leaves(zoo.reference(name))
    assert parameters
    for parameter in parameters:
        assert isinstance(parameter, np.ndarray)
        assert parameter.dtype == np.float32  # in double precision, too


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in EXACT if name in QUICK),
        *(slow(name) for name in EXACT if name not in QUICK),
    ],
)
def test_every_model_is_as_good_as_its_card_says(name):
    factor = zoo.load(name)
    card = zoo.zoo(name)
    stated = {row["log_snr"]: row["error"] for row in card.quality["by_log_snr"]}
    rows = score_errors(factor, zoo.reference(name), jax.random.key(11), num=2000)
    # A few events at an edge, or between a bar and its floor, make most of one
    # log-SNR's error: over keys it varies by a factor of 2, but the mean over log-SNR
    # by a few tenths.
    for row in rows:
        assert row["error"] < 3 * stated[row["log_snr"]] + 1e-4, row
    mean_error = np.mean([row["error"] for row in rows])
    assert mean_error < 1.3 * card.quality["score_error"] + 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD_OUT)
def test_losses_on_data_held_out_are_those_of_the_card(name):
    recipe = zoo.recipe(name)
    card = zoo.zoo(name)
    factor, _ = zoo.uncalibrated(name)
    held_out = zoo.defined(name, "held_out")
    rows = losses_by_log_snr(recipe, factor, held_out, jax.random.key(11))
    for stated, row in zip(card.quality["losses"], rows, strict=True):
        for column in ("loss", "held_out"):
            assert row[column] == pytest.approx(stated[column], rel=0.1, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "retraining"), RETRAINED)
def test_every_retraining_is_as_good_as_the_card_says(name, retraining):
    factor = zoo.load(name, retraining=retraining)
    card = zoo.zoo(name)
    metrics = json.loads((card.folder / "metrics.json").read_text())
    (row,) = (row for row in metrics["retrainings"] if row["retraining"] == retraining)
    errors = score_errors(factor, zoo.reference(name), jax.random.key(11), num=2000)
    mean_error = np.mean([each["error"] for each in errors])
    assert mean_error < 1.3 * row["score_error"] + 1e-4
    assert row["added_by_rounding"] < 0.2 * row["score_error"] + 1e-5


def test_all_models_are_trained_and_small():
    assert set(NAMES) >= {
        "ring2d",
        "bar2d",
        "ring2d-score",
        "bar2d-score",
        "ring2d-paper",
    }
    kinds = {".py", ".md", ".json", ".safetensors", ".png", ".toml"}
    for file in MODELS.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert file.suffix in kinds, f"{file}: no pickles, no checkpoints"
            assert file.stat().st_size < 8_000_000


def test_the_table_of_models():
    cards = zoo.zoo()
    assert sorted(cards) == NAMES
    text = repr(cards)
    for name in NAMES:
        assert name in text
        assert cards[name].title in text
        assert len(cards[name].title) < 120


def test_an_unknown_model_an_unknown_retraining_and_no_zoo_at_all(
    monkeypatch, tmp_path
):
    refused(
        lambda: zoo.load("ring"),
        LoadError,
    )
    refused(
        lambda: zoo.load("ring2d", retraining=3),
        LoadError,
        r"'ring2d'.* 3.* 0\.",
        "train ring2d --out .*ring2d --retraining 3",
    )
    refused(lambda: zoo.load("ring2d", retraining=-1), LoadError)
    monkeypatch.setattr(models, "__path__", [str(tmp_path / "models")])
    refused(lambda: zoo.zoo(), LoadError)


@pytest.mark.slow
def test_an_installed_zoo_trains_and_loads(installed, tmp_path):
    refused(lambda: zoo.load("tiny"), LoadError)
    with pytest.raises(LoadError, match="train it first: composeprob train tiny"):
        train_model("tiny", retraining=1, progress=False)
    result = train_model("tiny", out=installed / "tiny", progress=False)
    names = ["card.md", "metrics.json", "weights.safetensors"]
    assert sorted(file.name for file in result.written) == names
    assert {file.name for file in (installed / "tiny").iterdir()} >= {
        "weights.safetensors",
        "metrics.json",
    }
    factor = zoo.load("tiny")
    assert factor.label == "tiny"
    x = np.ones(2, np.float32)
    noise = factor.schedule.at(1)
    _, score = factor.evaluate(x, noise, {})
    _, trained_score = result.factor.evaluate(x, noise, {})
    np.testing.assert_array_equal(score, trained_score)

    card = zoo.zoo()["tiny"]
    assert card.title == "A Gaussian."
    assert card.training["iterations"] == 5
    assert card.quality["samples"]["log_density_gap"] != 0
    assert "More of it." in card.text
    assert "| log-SNR |" in card.text
    # A retraining has another key, has a file in half precision, and adds a row.
    other = train_model("tiny", retraining=1, out=installed / "tiny", progress=False)
    assert zoo.retrainings(installed / "tiny") == (0, 1)
    assert zoo.zoo()["tiny"].retrainings == (0, 1)
    again = zoo.load("tiny", retraining=1)
    np.testing.assert_allclose(
        again.network.first.weight,
        other.factor.network.first.weight,
        rtol=1e-3,
        atol=1e-4,
    )
    assert np.abs(again.network.first.weight - factor.network.first.weight).max() > 0.1
    metrics = json.loads((installed / "tiny" / "metrics.json").read_text())
    assert [row["retraining"] for row in metrics["retrainings"]] == [1]
    assert metrics["quality"] == card.quality
    assert table(metrics) in zoo.zoo("tiny").text
    # Training again, elsewhere, leaves the zoo's folder as it is, and replaces the
    # card's measured part.
    before = (installed / "tiny" / "weights.safetensors").read_bytes()
    train_model("tiny", out=tmp_path / "elsewhere", iterations=2, progress=False)
    elsewhere = tmp_path / "elsewhere"
    assert (elsewhere / "card.md").read_text().count("| log-SNR |") == 1
    metrics = json.loads((elsewhere / "metrics.json").read_text())
    assert metrics["training"]["iterations"] == 2
    assert (elsewhere / "weights.safetensors").read_bytes() != before
    assert (installed / "tiny" / "weights.safetensors").read_bytes() == before


def test_a_broken_model_is_explained(installed):
    (installed / "tiny" / "train.py").write_text("RECIPE = 3\n")
    refused(lambda: zoo.load("tiny"), LoadError)
    (installed / "tiny" / "metrics.json").write_text("{}")
    refused(lambda: zoo.zoo(), LoadError)


def test_weights_that_are_in_the_other_distribution(installed):
    """As after ``pip install composeprob``: all but the weights is there."""
    for file in ("metrics.json", "card.md"):
        shutil.copy(MODELS / "box2d" / file, installed / "tiny")
    refused(
        lambda: zoo.load("tiny"),
        LoadError,
    )
    assert "not installed" in repr(zoo.zoo("tiny"))
    assert "not installed" in repr(zoo.zoo())
