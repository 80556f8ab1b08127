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
from composeprob.results.store import Store
from refusals import refused
from sampling_cases import normal, single

KEY = jax.random.key(0)
DENSITY = cp.compile(single, normal([0.0, 0.0]))
RUN = {"num_chains": 8, "sampler": cp.AnnealedMCMC(cp.ULA(0.1), 1), "progress": False}


NESTED = "[" * 200_000
"""JSON that exhausts Python's stack where it is read."""


@cp.program
def pair(f, g):
    cp.sample("x", f)
    cp.sample("y", g)


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

    def store_array(self, name, **metadata):
        """The store whose array of this name says something else of itself."""

        def edit(folder):
            about = json.loads((folder / name / "zarr.json").read_text())
            (folder / name / "zarr.json").write_text(json.dumps(about | metadata))

        return self.store(edit)

    def store_of_another_program(self):
        """The description of one store beside the arrays of another program's."""
        other = self.folder / "other"
        density = cp.compile(pair, normal([0.0, 0.0]), normal(0.0))
        cp.infer(density, KEY, draws=cp.Draws(3, store=other), **RUN)
        about = (other / "zarr.json").read_text()
        shutil.rmtree(other)
        return self.store(lambda folder: (folder / "zarr.json").write_text(about))

    def store_about(self, attributes=(), **about):
        whole = Store.format | about
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


def blocks(folder, name="samples/x"):
    """Files of an array's blocks."""
    return [path for path in (folder / name / "c").rglob("*") if path.is_file()]


def truncate(folder):
    for path in blocks(folder):
        path.write_bytes(path.read_bytes()[:7])


def flip_a_bit(folder):
    for path in blocks(folder):
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(content)


def lose_a_block(folder):
    blocks(folder)[0].unlink()


def make_folders_of_blocks(folder):
    for path in blocks(folder):
        path.unlink()
        path.mkdir()


def make_a_file_of_samples(folder):
    shutil.rmtree(folder / "samples")
    (folder / "samples").write_text("x")


def make_a_folder_of_the_description(folder):
    (folder / "zarr.json").unlink()
    (folder / "zarr.json").mkdir()


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
    "nested facts": lambda g: g.file(metadata=g.metadata | {"facts": NESTED}),
    "no sites": lambda g: g.file(sites=[]),
    "no draws": lambda g: g.file(draws=0),
    "fewer than no evaluations": lambda g: g.file(evaluations=-3),
    "a time before it began": lambda g: g.file(seconds=-1.0),
    "levels that are NaN": lambda g: g.file(
        arrays={"log_snr": np.full(len(g.arrays["log_snr"]), np.nan)}
    ),
    "levels in disorder": lambda g: g.file(
        arrays={"log_snr": g.arrays["log_snr"][::-1].copy()}
    ),
    "samples of no numbers": lambda g: g.file(
        arrays={"samples/x": np.zeros((8, 3, 0))}
    ),
    "a store of integers": lambda g: g.store_array("samples/x", data_type="int32"),
    "no devices": lambda g: g.file(devices=0),
    "a site twice": lambda g: g.file(sites=["x", "x"]),
    "an array too many": lambda g: g.file(arrays={"samples/y": np.zeros((8, 3))}),
    "ancestors that are fractions": lambda g: g.file(
        arrays={"families": np.full(8, 0.5)}
    ),
    "plates of too many axes": lambda g: g.file(dims={"x": ["m", "n", None]}),
    "weights of two axes": lambda g: g.file(arrays={"log_weights": np.zeros((8, 1))}),
    "a header of any length": lambda g: g.raw(b"\xff" * 8 + g.path.read_bytes()[8:]),
    "a header of nested JSON": lambda g: g.raw(
        len(NESTED).to_bytes(8, "little") + NESTED.encode()
    ),
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
    "a store whose draws are gone": lambda g: g.store(
        lambda f: shutil.rmtree(f / "samples/x/c")
    ),
    "a store that lost a block": lambda g: g.store(lose_a_block),
    "a store of empty blocks": lambda g: g.store(
        lambda f: [path.write_bytes(b"") for path in blocks(f)]
    ),
    "a store of other bits": lambda g: g.store(flip_a_bit),
    "a store with folders for blocks": lambda g: g.store(make_folders_of_blocks),
    "a store whose weights are gone": lambda g: g.store(
        lambda f: shutil.rmtree(f / "log_weights/c")
    ),
    "a store whose diagnostics are gone": lambda g: g.store(
        lambda f: shutil.rmtree(f / "non_finite/c")
    ),
    "a store without checksums": lambda g: g.store_array(
        "samples/x", codecs=[{"name": "bytes", "configuration": {"endian": "little"}}]
    ),
    "a store of wider numbers": lambda g: g.store_array(
        "samples/x", data_type="float64"
    ),
    "a store of other numbers": lambda g: g.store_array(
        "samples/x", data_type="complex64", fill_value=[0, 0]
    ),
    "a store of more chains": lambda g: g.store_array("samples/x", shape=[9, 3, 2]),
    "a store of more numbers": lambda g: g.store_array("samples/x", shape=[8, 3, 4]),
    "a store of fewer draws": lambda g: g.store_array("samples/x", shape=[8, 2, 2]),
    "a store of flat samples": lambda g: g.store_array("samples/x", shape=[48]),
    "a store of endless weights": lambda g: g.store_array(
        "log_weights", shape=[10**15]
    ),
    "a store of endless blocks": lambda g: g.store_array(
        "log_weights",
        shape=[10**15],
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": [10**15]}},
    ),
    "a store of nested arrays": lambda g: g.store(
        lambda f: (f / "samples/x/zarr.json").write_text(NESTED)
    ),
    "a store of nested JSON": lambda g: g.store(
        lambda f: (f / "zarr.json").write_text(NESTED)
    ),
    "a store of an empty description": lambda g: g.store(
        lambda f: (f / "zarr.json").write_bytes(b"")
    ),
    "a store of no text": lambda g: g.store(
        lambda f: (f / "zarr.json").write_bytes(b"\xff\xfe\x00")
    ),
    "a store with a folder for its description": lambda g: g.store(
        make_a_folder_of_the_description
    ),
    "a store with a file for its samples": lambda g: g.store(make_a_file_of_samples),
    "a store of another program": lambda g: g.store_of_another_program(),
    "a store of a site twice": lambda g: g.store_with(sites=["x", "x"]),
    "a store of no site": lambda g: g.store_with(sites=[]),
    "a store of no draws": lambda g: g.store_with(draws=0),
    "another zarr folder": lambda g: g.store(
        lambda f: (f / "zarr.json").write_text(
            json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}})
        )
    ),
    "an array of a store": lambda g: g.store(lambda f: None) / "samples/x",
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


@pytest.mark.parametrize("name", ["trust", "calls"])
def test_files_older_than_a_fact_are_read(good, name):
    loaded = cp.Result.load(good.file(no_fact=name))
    assert not {"trust": loaded.trust, "calls": loaded.about.calls}[name]


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
