"""Networks in parts: the samples of whole ones, bit for bit, and arrays that are whole
only while they are used.

On eight virtual devices, in separate processes.
"""

import json

import blackjax
import jax
import numpy as np
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.runtime import compiled
from composeprob.samplers.spread import AXES, Spread, everywhere
from processes import said
from refusals import refused
from sampling_cases import run

SCRIPT = """
import json, re, sys, tempfile
import jax, jax.numpy as jnp, numpy as np, numpyro.distributions as dist, pytest
import composeprob as cp
from benchmarks import ahead
from composeprob import tuning
from composeprob.runtime import compiled
from composeprob.runtime.progress import Progress
from same_bits import bits_of
from sampling_cases import Layers, both, learned, measured, normal, stop_after

task = json.loads(sys.argv[1])
N = 64
WIDTH = 32
SCHEDULE = cp.Schedule.log_snr(6, min=-6.0, max=4.0)
ABOVE = 4 * WIDTH * 2  # bytes: the two square matrices are larger, all else is not

network = learned(Layers(2, WIDTH, WIDTH, WIDTH), "energy", SCHEDULE, time="sigma")
gaussian = normal([0.3, -0.2], [0.5, 1.0], SCHEDULE)

def law(x):
    return dist.Normal(jnp.sum(x**2), 0.5)

densities = {
    "product": cp.compile(both, network, gaussian),
    "seen": cp.compile(measured, network, law, 1.0, "denoised"),
}
samplers = {
    "SMC": cp.SMC(cp.MALA(cp.Adaptive())),
    "HMC": cp.AnnealedMCMC(cp.HMC(0.1, num_leapfrog=2), 2),
    "MALA": cp.AnnealedMCMC(cp.MALA(0.01), 2),
}
meshes = {
    "whole": (jax.make_mesh((8,), ("i",)), 0),
    "parts": (jax.make_mesh((2, 4), ("i", "j")), ABOVE),
    "all": (jax.make_mesh((1, 8), ("i", "j")), 0),
}

def run(density, sampler, how, **options):
    mesh, above = meshes[how]
    tuning.ROOM = tuning.ROOM._replace(parts_bytes=above)
    result = cp.infer(
        densities[density],
        jax.random.key(3),
        num_chains=N,
        sampler=samplers[sampler],
        mesh=mesh,
        chunk=4,
        progress=False,
        **options,
    )
    return bits_of(result)

# Densities as the compiled loop gets them.
seen_densities = []
visit = compiled.advance

def advance(sampler, run, density, *rest):
    seen_densities.append(density)
    return visit(sampler, run, density, *rest)

compiled.advance = advance

def cut():
    leaves = jax.tree.leaves(seen_densities[-1], is_leaf=compiled._is_shard)
    shapes = []
    for part in filter(compiled._is_shard, leaves):
        on_devices = {shard.data.shape for shard in part.array.addressable_shards}
        shapes.append((list(part.array.shape), sorted(on_devices)))
    return shapes

def one_device_for_all(part, after):
    copies = [part.array] * jax.lax.axis_size("model")
    return jnp.concatenate(copies, axis=part.axis)

told = {}
for density, sampler, hows, options in task["runs"]:
    reference = run(density, sampler, "whole", **options)
    for how in hows:
        same = run(density, sampler, how, **options) == reference
        told[f"{density} {sampler} {how}"] = [same, cut()]
if task["broken"]:
    whole = compiled.Shard.gathered
    compiled.Shard.gathered = one_device_for_all
    jax.clear_caches()
    told["broken"] = run("product", "MALA", "parts") == run("product", "MALA", "whole")
    compiled.Shard.gathered = whole
    jax.clear_caches()
if task["resumes"]:
    folder = tempfile.mkdtemp()
    Progress.pause = 1e-9
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        run("product", "MALA", "parts", checkpoint_dir=folder)
    reference = run("product", "MALA", "whole")
    goes_on = cp.Checkpoint(folder, resume=True)
    resumed = run("product", "MALA", "whole", checkpoint_dir=goes_on)
    told["resumed"] = resumed == reference

def compiled_ahead(above):
    texts = []
    count = ahead.collectives

    def noting(text):
        texts.append(text)
        return count(text)

    ahead.collectives = noting
    devices = np.array(jax.devices()).reshape(2, 4)
    tuning.ROOM = tuning.ROOM._replace(parts_bytes=above)
    result = ahead.compile_ahead(
        densities["product"], samplers["MALA"], N, devices, diagnostics=False
    )
    ahead.collectives = count
    computations = re.split(r"\\n\\n", texts[0])
    (entry,) = [c for c in computations if c.lstrip().startswith("ENTRY")]
    return result.collectives, count(entry), result.arguments

if task["compiles"]:
    told["compiled"] = [compiled_ahead(ABOVE), compiled_ahead(2**30)]
    compiled.jax.lax.optimization_barrier = lambda values: values
    jax.clear_caches()
    told["without barrier"] = compiled_ahead(ABOVE)
print(json.dumps(told))
"""


def told(**task):
    nothing = {"runs": [], "broken": False, "resumes": False, "compiles": False}
    return json.loads(said(SCRIPT, json.dumps({**nothing, **task}), devices=8)[-1])


SQUARE = [[32, 32], [[8, 32]]]
"""A matrix and the parts of it that four devices have."""


def test_on_one_device_everything_is_one_part(product, monkeypatch):
    sampler = cp.AnnealedMCMC(cp.MALA(0.01), 1)
    mesh = jax.make_mesh((1, 1), ("i", "j"))
    one = compiled.partitioned(product, 1, 0)
    assert any(place != everywhere for place in jax.tree.leaves(compiled.places(one)))
    # A second axis of 1 shares nothing.
    spread = Spread.checked(mesh, None, 4)
    assert compiled.in_parts(product, spread, sampler) is product

    def samples(density):
        monkeypatch.setattr(compiled, "in_parts", lambda *_: density)
        return run(product, chains=4, sampler=sampler, mesh=mesh, chunk=4)["x"]

    np.testing.assert_array_equal(samples(product), samples(one))


@pytest.mark.slow
def test_samples_are_those_of_whole_networks():
    found = told(runs=[("product", "MALA", ["parts"], {})], broken=True)
    assert found["product MALA parts"] == [True, [SQUARE] * 2]
    assert not found["broken"]  # parts put together wrongly are found out


@pytest.mark.slow
def test_every_sampler_in_parts_and_going_on_with_whole_networks():
    """With draws, likelihoods that differentiate a network twice, and every array in
    parts whose length allows it."""
    runs = [
        ("product", "SMC", ["parts", "all"], {}),
        ("seen", "HMC", ["parts"], {"draws": 3, "thin": 2}),
    ]
    found = told(runs=runs, resumes=True)
    assert found.pop("resumed")
    assert all(same for same, _ in found.values()), found
    assert found["product SMC all"][1].count([[32, 32], [[4, 32]]]) == 2
    assert len(found["product SMC all"][1]) > 2  # (32, 2) too
    # In the factor, and among the program's arguments.
    assert found["seen HMC parts"][1] == [SQUARE] * 4


@pytest.mark.slow
def test_arrays_are_whole_only_while_they_are_used():
    found = told(compiles=True)
    (kinds, outside, arguments), (none, _, all_arguments) = found["compiled"]
    # Two matrices, at the one place where a level evaluates; none before the loops.
    assert kinds == {"all-gather": 2}
    assert outside == {}
    assert none == {}
    assert all_arguments - arguments == 2 * (32 * 32 * 4) * 3 // 4
    # Without the barrier they would be gathered for the whole run.
    assert found["without barrier"][1] == {"all-gather": 2}


class AbstractRow:
    """A spread of chains over rows of so many devices, which need not be there."""

    def __init__(self, columns):
        self.mesh = jax.sharding.AbstractMesh((1, columns), AXES)


def test_refusals(product, monkeypatch):
    mesh = jax.make_mesh((1, 1, 1), tuple("abc"))
    refused(
        lambda: run(product, mesh=mesh),
        cp.errors.WrongTypeError,
    )
    table = AbstractRow(2)
    nuts = cp.AnnealedMCMC(cp.BlackJAX(blackjax.nuts, 0.1), 1).prepare(product)
    # Its arrays are all small.
    assert compiled.in_parts(product, table, nuts) is product
    monkeypatch.setattr(tuning, "ROOM", tuning.ROOM._replace(parts_bytes=0))
    refused(
        lambda: compiled.in_parts(product, table, nuts),
        cp.errors.CapabilityError,
    )
