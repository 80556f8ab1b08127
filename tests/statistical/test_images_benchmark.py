"""The benchmark of image models: intervals, cells that are kept, and checks that can fail."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import images
from pictures.cells import Cell, Kept, share
from pictures.drawn import draw


def placed(objects, sampler, successes, trials=100):
    found = share(np.arange(trials) < successes)
    return {"part": "placed", "objects": objects, "sampler": sampler, "w": 2.0, "form": "energy", "all_placed": found}


def test_the_interval_of_a_share():
    found = share([True] * 95 + [False] * 5)
    assert found["share"] == 0.95
    np.testing.assert_allclose(found["interval"], [0.8872, 0.9836], atol=1e-4)  # Clopper and Pearson's
    assert share([True] * 20)["interval"][1] == 1.0


def test_cells_are_kept_and_other_processes_may_add_some(tmp_path):
    file = tmp_path / "cells.json"
    ours, theirs = Kept(file, tmp_path / "images"), Kept(file, tmp_path / "images")
    one, other = (Cell("placed", {"objects": k, "sampler": "MALA"}, lambda: None) for k in (1, 3))
    assert one not in ours
    ours.put(one, {"scenes": 4}, np.zeros((2, 8, 8, 3)))
    theirs.put(other, {"scenes": 5}, np.ones((2, 8, 8, 3)))
    assert one in theirs
    cell = ours.cells["placed objects=3 sampler=MALA"]
    assert set(cell.pop("made_at")) == {"commit", "paths", "changed"}  # by which code
    assert cell == {
        "part": "placed",
        "objects": 3,
        "sampler": "MALA",
        "scenes": 5,
    }
    assert np.load(ours.images_of(other.name)).mean() == 1


def test_checks_fail_where_they_should():
    good = images.checks([placed(3, "reverse", 88), placed(3, "MALA", 90)])
    assert all(good.values())
    assert len(good) == 2
    few = images.checks([placed(3, "reverse", 60), placed(3, "MALA", 70)])
    assert [holds for text, holds in few.items() if "at least" in text] == [False]
    worse = images.checks([placed(3, "reverse", 99), placed(3, "HMC", 86)])
    assert [holds for text, holds in worse.items() if "not worse" in text] == [False]
    mixed = {"part": "mixed", "classes": "3 and 8", "sampler": "SMC", "first": share(np.arange(1000) < 250)}
    assert list(images.checks([mixed]).values()) == [False]
    for successes in (90, 97):
        told = {"part": "told", "wrong": "circle or square", "by_log_snr": {"6": share(np.arange(100) < successes)}}
        assert list(images.checks([told]).values()) == [successes == 97]


def test_panels_say_what_they_show():
    assert images.title(placed(3, "MALA", 90)) == "3 objects, w = 2, MALA: 0.90"
    told = {"sampler": "SMC", "satisfied": share([True, False])}
    assert images.title({"part": "captions", "formula": "AND", **told}) == "AND, SMC: 0.50"
    assert images.title({"part": "tapestry", "counted": "once", **told}) == "counted once, SMC: 0.50"


def test_one_image_of_each_density():
    @cp.program
    def image(f):
        return cp.sample("x", f)

    schedule = cp.Schedule.log_snr(8)
    near = [cp.Analytic(dist.Normal(jnp.full((4, 4, 3), mean), 0.01), schedule) for mean in (0.0, 1.0, 2.0)]
    drawn = draw((cp.compile(image, f) for f in near), cp.AnnealedMCMC(cp.MALA(0.0001), 1, reverse_step=True), chains=2)
    assert drawn.images.shape == (3, 4, 4, 3)
    np.testing.assert_allclose(drawn.images.mean((1, 2, 3)), [0.0, 1.0, 2.0], atol=0.2)
    assert 0 < drawn.acceptance <= 1
    assert drawn.seconds > 0
    assert draw([cp.compile(image, near[0])], cp.Ancestral()).acceptance is None
