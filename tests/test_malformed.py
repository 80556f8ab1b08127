"""Files and folders that are not a result, or not a whole one: each is refused by its
name, and nothing else is read."""

import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

import composeprob as cp
from composeprob.errors import (
    ComposeProbError,
    InvalidValueError,
    LoadError,
    WrongTypeError,
)
from refusals import refused
from sampling_cases import normal, single

KEY = jax.random.key(0)
DENSITY = cp.compile(single, normal([0.0, 0.0]))
RUN = {"num_chains": 8, "sampler": cp.AnnealedMCMC(cp.ULA(0.1), 1), "progress": False}


class Good:
    """A saved result, a stored one and a checkpoint, with methods that damage them."""

    def __init__(self, folder):
        self.folder = folder
        draws = cp.Draws(3, store=folder / "store")
        options = {"draws": draws, "checkpoint_dir": folder / "checkpoint"}
        self.result = cp.infer(DENSITY, KEY, **options, **RUN)
        self.path = self.result.save(folder / "good")
        with safe_open(self.path, "numpy") as file:
            self.metadata = file.metadata()
            self.arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.facts = json.loads(self.metadata["facts"])

    def raw(self, content):
        path = self.folder / "bad.safetensors"
        path.write_bytes(content)
        return path

    def file(self, *, without=(), metadata=None, no_fact=None, arrays=None, **facts):
        kept = self.arrays | (arrays or {})
        for name in without:
            del kept[name]
        facts = self.facts | facts
        facts.pop(no_fact, None)
        if metadata is None:
            metadata = self.metadata | {"facts": json.dumps(facts)}
        return self.raw(save(kept, metadata=metadata))

    def store(self, edit):
        shutil.copytree(self.folder / "store", self.folder / "bad")
        edit(self.folder / "bad")
        return self.folder / "bad"

    def store_with(self, **facts):
        def edit(folder):
            about = json.loads((folder / "zarr.json").read_text())
            about["attributes"]["facts"] |= facts
            (folder / "zarr.json").write_text(json.dumps(about))

        return self.store(edit)

    def store_about(self, attributes=(), **about):
        whole = {"format": "composeprob.draws", "version": 1} | about
        text = json.dumps({"attributes": list(attributes) or whole})
        return self.store(lambda folder: (folder / "zarr.json").write_text(text))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return Good(tmp_path_factory.mktemp("results"))


@pytest.fixture(autouse=True)
def no_bad_ones_are_left(good):
    yield
    shutil.rmtree(good.folder / "bad", ignore_errors=True)
    (good.folder / "bad.safetensors").unlink(missing_ok=True)


def empty_folder(good):
    (good.folder / "bad").mkdir()
    return good.folder / "bad"


def link_outwards(folder):
    shutil.rmtree(folder / "samples/x")
    (folder / "samples/x").symlink_to(
        folder.parent / "store/samples/x", target_is_directory=True
    )


def truncate(folder):
    for path in (folder / "samples/x/c").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:7])


NAN = {"log_weights": np.full(8, np.nan)}
# By name: a function that makes the file or folder of a good one.
CASES = {
    "nothing": lambda g: g.folder / "nothing",
    "an empty file": lambda g: g.raw(b""),
    "the beginning of a file": lambda g: g.raw(g.path.read_bytes()[:300]),
    "a file without its end": lambda g: g.raw(g.path.read_bytes()[:-10]),
    "a pickle": lambda g: g.raw(pickle.dumps({"x": 1})),
    "text": lambda g: g.raw(b"hello world, hello world"),
    "weights of a model": lambda g: g.file(metadata={"format": "pt"}),
    "arrays without metadata": lambda g: g.raw(save(g.arrays)),
    "another version": lambda g: g.file(metadata=g.metadata | {"version": "3"}),
    "no facts": (
        lambda g: g.file(metadata={n: v for n, v in g.metadata.items() if n != "facts"})
    ),
    "facts that are not JSON": lambda g: g.file(metadata=g.metadata | {"facts": "{"}),
    "facts that are a list": lambda g: g.file(metadata=g.metadata | {"facts": "[]"}),
    "a fact that lacks": lambda g: g.file(no_fact="evaluations"),
    "no list of sites": lambda g: g.file(no_fact="sites"),
    "a fact too many": lambda g: g.file(more=3),
    "draws in words": lambda g: g.file(draws="many"),
    "evaluations that are true": lambda g: g.file(evaluations=True),
    "plates that are a number": lambda g: g.file(dims=3),
    "blocks that are a number": lambda g: g.file(blocks=4),
    "a status of one word": lambda g: g.file(status="ok"),
    "an unknown finding": lambda g: g.file(status=[["great", "x"]]),
    "a site without samples": lambda g: g.file(sites=["x", "y"]),
    "samples that lack": lambda g: g.file(without=("samples/x",)),
    "weights that lack": lambda g: g.file(without=("log_weights",)),
    "weights that are NaN": lambda g: g.file(arrays=NAN),
    "weights of another number": lambda g: g.file(arrays={"log_weights": np.zeros(9)}),
    "weights that are true": lambda g: g.file(arrays={"log_weights": np.ones(8, bool)}),
    "ancestors out of range": lambda g: g.file(arrays={"families": np.full(8, 99)}),
    "samples of other chains": lambda g: g.file(
        arrays={"samples/x": np.zeros((5, 3, 2))}
    ),
    "samples of other draws": lambda g: g.file(draws=7),
    "one number as samples": lambda g: g.file(arrays={"samples/x": np.zeros(1)}),
    "other levels": lambda g: g.file(arrays={"ess": np.zeros(3)}),
    "no levels": lambda g: g.file(arrays={"log_snr": np.zeros(0)}),
    "an empty folder": empty_folder,
    "a checkpoint": lambda g: g.folder / "checkpoint",
    "a store of no zarr.json": lambda g: g.store(lambda f: (f / "zarr.json").unlink()),
    "a store of half a zarr.json": lambda g: g.store(
        lambda f: (f / "zarr.json").write_text("{")
    ),
    "a store of a list": lambda g: g.store(
        lambda f: (f / "zarr.json").write_text("[]")
    ),
    "a store of no attributes": lambda g: g.store_about([1]),
    "a store of another version": lambda g: g.store_about(version=0),
    "a store that has not ended": lambda g: g.store_about(),
    "a store of no facts": lambda g: g.store_about(facts=[]),
    "a store without a site": lambda g: g.store(
        lambda f: shutil.rmtree(f / "samples/x")
    ),
    "a store of another site": lambda g: g.store(
        lambda f: (f / "samples/x/zarr.json").write_text("{}")
    ),
    "a store without weights": lambda g: g.store(
        lambda f: shutil.rmtree(f / "log_weights")
    ),
    "a store of too many draws": lambda g: g.store_with(draws=99),
    "a store of numbered sites": lambda g: g.store_with(sites=[3]),
    "a store of sites elsewhere": lambda g: g.store_with(
        sites=["../../store/samples/x"]
    ),
    "a store of absolute paths": lambda g: g.store_with(
        sites=[str(g.folder / "store/samples/x")]
    ),
    "a store with a link outwards": lambda g: g.store(link_outwards),
    "a store of damaged draws": lambda g: g.store(truncate),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused_by_its_name(good, case):
    path = CASES[case](good)
    error = refused(lambda: np.asarray(cp.Result.load(path)["x"]), LoadError)
    assert path.name in error.found


def test_the_good_ones_load(good):
    for path in (
        good.path,
        good.file(),
        good.folder / "store",
        good.store(lambda folder: None),
    ):
        np.testing.assert_array_equal(
            np.asarray(cp.Result.load(path)["x"]), np.asarray(good.result["x"])
        )


def test_a_path_is_a_path(good):
    refused(lambda: cp.Result.load(3), WrongTypeError)
    for path in (
        good.path / "below",
        empty_folder(good).rename(good.folder / "folder.safetensors"),
    ):
        refused(lambda: good.result.save(path), InvalidValueError)


@pytest.mark.parametrize("kind", ["of another program", "a file", "damaged"])
def test_a_checkpoint_of_another_run_is_refused(good, kind, tmp_path):
    density = cp.compile(single, normal(jnp.zeros(3)))
    if kind == "a file":
        folder = good.path
    else:
        folder = shutil.copytree(good.folder / "checkpoint", tmp_path / "checkpoint")
    if kind == "damaged":
        density = DENSITY
        for path in folder.rglob("*"):
            if path.is_file():
                path.write_bytes(b"damaged")
    with pytest.raises(ComposeProbError) as caught:
        cp.infer(density, KEY, draws=3, checkpoint_dir=folder, **RUN)
    assert folder.name in caught.value.found
    assert caught.value.fix
