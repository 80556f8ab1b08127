"""Draws at level 0: their law, thinning, where they are kept, and that a stopped run
goes on with the same ones."""

import errno
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.errors import (
    CapabilityError,
    InvalidValueError,
    LoadError,
    WrongTypeError,
)
from composeprob.results.status import Code
from composeprob.results.store import Store
from composeprob.runtime.progress import Progress
from composeprob.samplers.run import begin
from messages import check_finding
from processes import said
from refusals import refused
from sampling_cases import run, stop_after

CHAINS, DRAWS, THIN = 64, 12, 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Five draws a block, so that a run has several and ends within one; at most two of
    them a call."""
    room = tuning.ROOM._replace(block_bytes=5 * CHAINS * 8, draws_bytes=2 * CHAINS * 8)
    monkeypatch.setattr(tuning, "ROOM", room)


def drawn(density, draws=DRAWS, thin=THIN, store=None, resume=None, **options):
    if resume is not None:
        options["checkpoint_dir"] = cp.Checkpoint(options["checkpoint_dir"], resume)
    defaults = {"chains": CHAINS, "draws": cp.Draws(draws, thin, store)}
    return run(density, **(defaults | options))


@pytest.fixture(scope="module")
def whole(product):
    return run(product, chains=CHAINS, draws=DRAWS, thin=THIN)


def test_step_sizes_are_fixed_from_the_first_draw_on(product):
    """While they adapt to the chains these have no invariant law; down the levels they
    have come from elsewhere."""
    sampler = cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 1).prepare(product)
    first = sampler.first_level(product)
    begun = begin(jax.random.key(0), CHAINS, sampler.visits(product, None))
    begun = sampler.start(begun, product, first)
    runs = [sampler.advance(begun, product, jnp.int32(first + 1))]
    draw = jax.jit(lambda run, i: sampler.draw(run, product, i, jnp.int32(1)))
    for i in range(3):
        runs.append(draw(runs[-1], jnp.int32(i)))
    scales = [float(run.tuning[0].log_scale) for run in runs]
    assert scales[0] != scales[1]
    assert scales[1] == scales[2] == scales[3]
    # There was something to adapt to.
    assert len({float(run.records.acceptance[0, 0]) for run in runs[1:]}) == 3


def test_draws_are_an_axis_that_arviz_sees(product, whole):
    plain = run(product, chains=CHAINS)
    assert whole["x"].shape == (CHAINS, DRAWS, 2)
    assert (whole.about.draws, whole.about.thin, plain.about.draws) == (
        DRAWS,
        THIN,
        None,
    )
    assert (
        whole.evaluations == plain.evaluations + tuning.WARM_UP.settling + DRAWS * THIN
    )
    assert whole.log_evidence == plain.log_evidence
    np.testing.assert_array_equal(whole.step_size[1:], plain.step_size[1:])
    np.testing.assert_array_equal(whole.acceptance[1:], plain.acceptance[1:])
    assert (
        plain.acceptance[0] > 0.9
    )  # steps that shrank with the noise are too small at level 0
    assert 0.45 < whole.acceptance[0] < 0.7
    assert whole.step_size[0] > 5 * plain.step_size[0]
    assert whole.status.ok
    assert (
        len(np.unique(np.round(whole["x"][0, :, 0], 6))) > DRAWS / 2
    )  # the chains move
    data = whole.to_arviz()
    assert data.posterior["x"].shape == (CHAINS, DRAWS, 2)
    table = whole.to_pandas()
    assert table.index.names == ["chain", "draw"]
    np.testing.assert_array_equal(table.loc[(3, 1)], whole["x"][3, 1])
    assert data.sample_stats["log_weight"].shape == (CHAINS, DRAWS)
    np.testing.assert_array_equal(whole.unweighted()["x"], whole["x"].reshape(-1, 2))
    assert re.search(rf"draws +{DRAWS} .* {THIN} ", str(whole.summary()))
    np.testing.assert_allclose(
        whole.summary().rows["x[0]"][0], whole["x"][..., 0].mean(), rtol=1e-5
    )


def test_every_thin_th_draw_is_kept(product, whole):
    every = drawn(product, draws=DRAWS * THIN, thin=1)
    np.testing.assert_array_equal(every["x"][:, THIN - 1 :: THIN], whole["x"])


def test_a_store_holds_the_same_and_opens_lazily(product, whole, tmp_path):
    result = drawn(product, store=tmp_path / "a" / "draws.zarr")
    assert not isinstance(result["x"], np.ndarray)
    np.testing.assert_array_equal(np.asarray(result["x"]), whole["x"])
    opened = cp.Result.load(tmp_path / "a" / "draws.zarr")
    x = opened["x"]
    assert (x.shape, x.ndim, x.dtype, len(x)) == (
        (CHAINS, DRAWS, 2),
        3,
        np.float32,
        CHAINS,
    )
    s = np.s_
    for index in (
        3,
        -1,
        s[:, -3:],
        s[2:9:3, 7],
        s[::-5, ::4, 1],
        s[..., 0],
        s[:, [1, 4]],
        s[5:5],
        s[2:5:-1],
    ):
        np.testing.assert_array_equal(x[index], whole["x"][index])
    assert (
        str(opened.summary()).split("time")[0] == str(whole.summary()).split("time")[0]
    )
    assert opened.numbers()["draws"] == DRAWS
    np.testing.assert_array_equal(opened.acceptance, whole.acceptance)
    np.testing.assert_array_equal(
        cp.Result.load(opened.save(tmp_path / "all"))["x"], whole["x"]
    )
    again = drawn(
        product, seed=1, store=tmp_path / "a" / "draws.zarr"
    )  # in place of the earlier one
    assert not np.array_equal(np.asarray(again["x"]), whole["x"])
    last = run(product, chains=CHAINS, draws=cp.Draws(None, store=tmp_path / "last"))
    assert last["x"].shape == (CHAINS, 2)
    np.testing.assert_array_equal(
        np.asarray(last["x"]), run(product, chains=CHAINS)["x"]
    )


def test_a_slice_with_a_step_reads_no_more_than_it_returns(
    product, whole, tmp_path, monkeypatch
):
    x = drawn(product, store=tmp_path / "draws.zarr")["x"]
    read = []
    whole_part = type(x)._read

    def counted(stored, part):
        array = whole_part(stored, part)
        read.append(array.shape)
        return array

    monkeypatch.setattr(type(x), "_read", counted)
    for index in (np.s_[:, ::4], np.s_[::-3]):
        expected = whole["x"][index]
        np.testing.assert_array_equal(x[index], expected)
        assert read.pop() == expected.shape


@pytest.mark.parametrize("stored", [True, False])
def test_a_stopped_run_goes_on_with_the_same_draws(
    product, whole, tmp_path, monkeypatch, stored
):
    folder = tmp_path / "c"
    options = {"checkpoint_dir": folder}
    if stored:
        options["store"] = tmp_path / "s"
    monkeypatch.setattr(Progress, "pause", 1e-9)
    for draws in (3, 8):
        with monkeypatch.context() as patch:
            stop_after(patch, draws, "draws")
            part = drawn(product, **options)
        assert part.status.code is Code.INTERRUPTED
        message = check_finding(part.status, Code.INTERRUPTED)
        assert f"{draws} of {DRAWS} draws" in message
        assert "checkpoint" in message
        np.testing.assert_array_equal(np.asarray(part["x"]), whole["x"][:, :draws])
    resumed = drawn(product, **options, resume=True)
    np.testing.assert_array_equal(np.asarray(resumed["x"]), whole["x"])
    np.testing.assert_array_equal(resumed.acceptance, whole.acceptance)
    assert resumed.evaluations == whole.evaluations
    assert resumed.status.ok
    more = drawn(product, **options, draws=DRAWS + 4)  # a finished run goes on
    np.testing.assert_array_equal(np.asarray(more["x"])[:, :DRAWS], whole["x"])
    assert more["x"].shape == (CHAINS, DRAWS + 4, 2)
    assert isinstance(more["x"], np.ndarray) is not stored
    fewer = drawn(product, **options, draws=5)
    np.testing.assert_array_equal(np.asarray(fewer["x"]), whole["x"][:, :5])
    refused(lambda: drawn(product, **options, thin=2), LoadError, "3, not 2")
    refused(
        lambda: run(product, chains=CHAINS, checkpoint_dir=folder),
        LoadError,
        "3, not 'none'",
    )
    if stored:

        def elsewhere():
            drawn(product, checkpoint_dir=folder, store=tmp_path / "elsewhere")

        refused(elsewhere, LoadError)


def test_a_full_disk_keeps_the_draws_that_are_written(
    product, whole, tmp_path, monkeypatch
):
    put = Store.put

    def full(self, name, index, values):
        if index[1].start >= 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(self, name, index, values)

    options = {"checkpoint_dir": tmp_path / "c", "store": tmp_path / "s"}
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", full)
        result = drawn(product, **options)
    assert "No space left" in check_finding(result.status, Code.NOT_SAVED)
    np.testing.assert_array_equal(np.asarray(result["x"]), whole["x"][:, :5])
    with_room_again = drawn(product, **options)
    np.testing.assert_array_equal(np.asarray(with_room_again["x"]), whole["x"])


def test_refusals(product, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for fact, error, options in [
        ("draws", InvalidValueError, {"draws": 0}),
        ("thin", WrongTypeError, {"thin": 2.5}),
        ("thin=3", InvalidValueError, {"draws": None}),
        ("2147483647", InvalidValueError, {"draws": 2**20, "thin": 2**12}),
        ("store", WrongTypeError, {"store": 3}),
        ("Ancestral", CapabilityError, {"sampler": cp.Ancestral()}),
        ("mine", InvalidValueError, {"store": tmp_path / "mine"}),
        ("store", InvalidValueError, {"store": tmp_path / "file" / "s"}),
    ]:
        refused(lambda: drawn(product, **options), error, fact)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    refused(lambda: cp.Result.load(tmp_path / "mine"), LoadError)


SCRIPT = """
import resource, sys
import jax, composeprob as cp
from sampling_cases import both, normal
density = cp.compile(both, normal([0.0] * 64, 1.0), normal([1.0] * 64, 0.5))
sampler = cp.AnnealedMCMC(cp.ULA(0.01), 1)
def run(draws):
    result = cp.infer(
        density,
        jax.random.key(0),
        num_chains=256,
        sampler=sampler,
        progress=False,
        draws=cp.Draws(draws, thin=2, store=sys.argv[2]),
    )
    assert result["x"].shape == (256, draws, 64)
    assert result["x"][0, -1].std() > 0
run(int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_draws(tmp_path):
    """Ten times the draws, 655 MB instead of 66: peak memory of a separate process."""

    def peak(draws):
        return int(said(SCRIPT, draws, tmp_path / "draws.zarr")[-1])

    few = peak(1_000)
    many = peak(10_000)
    assert many < 1.05 * few, f"{few} KB for 1,000 draws, {many} KB for 10,000"
