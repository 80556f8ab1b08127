"""Networks in parts: the samples of whole ones, bit for bit, and arrays that are whole
only while they are used.

On eight virtual devices, in processes of their own.
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
import jax, jax.numpy as jnp, numpy as np, numpyro.distributions as dist, pytest, composeprob as cp
from composeprob import tuning
from composeprob.runtime import compiled
from composeprob.runtime.progress import Progress
from same_bits import bits_of
from sampling_cases import Layers, both, learned, measured, normal, stop_after
task = json.loads(sys.argv[1])
N, WIDTH, SCHEDULE = 64, 32, cp.Schedule.log_snr(6, min=-6.0, max=4.0)
ABOVE = 4 * WIDTH * 2  # bytes: the two square matrices are larger, all else is not

network = learned(Layers(2, WIDTH, WIDTH, WIDTH), "energy", SCHEDULE, time="sigma")
densities = {"product": cp.compile(both, network, normal([0.3, -0.2], [0.5, 1.0], SCHEDULE)),
             "seen": cp.compile(measured, network, lambda x: dist.Normal(jnp.sum(x**2), 0.5), 1.0, "denoised")}
samplers = {"SMC": cp.SMC(cp.MALA(cp.Adaptive())), "HMC": cp.AnnealedMCMC(cp.HMC(0.1, num_leapfrog=2), 2),
            "MALA": cp.AnnealedMCMC(cp.MALA(0.01), 2)}
meshes = {"whole": (jax.make_mesh((8,), ("i",)), 0), "parts": (jax.make_mesh((2, 4), ("i", "j")), ABOVE),
          "all": (jax.make_mesh((1, 8), ("i", "j")), 0)}

def run(density, sampler, how, **options):
    mesh, above = meshes[how]
    tuning.ROOM = tuning.ROOM._replace(parts_bytes=above)
    result = cp.infer(densities[density], jax.random.key(3), num_chains=N, sampler=samplers[sampler], mesh=mesh,
                      chunk=4, progress=False, **options)
    return bits_of(result)

seen_densities, visit = [], compiled.advance
def advance(sampler, run, density, *rest):
    seen_densities.append(density)
    return visit(sampler, run, density, *rest)
compiled.advance = advance

def cut():
    found = [p for p in jax.tree.leaves(seen_densities[-1], is_leaf=compiled._is_shard) if compiled._is_shard(p)]
    return [(list(p.array.shape), sorted({s.data.shape for s in p.array.addressable_shards})) for p in found]

def one_device_for_all(part, after):
    return jnp.concatenate([part.array] * jax.lax.axis_size("model"), axis=part.axis)

told = {}
for density, sampler, hows, options in task["runs"]:
    reference = run(density, sampler, "whole", **options)
    for how in hows:
        told[f"{density} {sampler} {how}"] = [run(density, sampler, how, **options) == reference, cut()]
if task["broken"]:
    whole, compiled.Shard.gathered = compiled.Shard.gathered, one_device_for_all
    jax.clear_caches()
    told["broken"] = run("product", "MALA", "parts") == run("product", "MALA", "whole")
    compiled.Shard.gathered = whole
    jax.clear_caches()
if task["resumes"]:
    folder, Progress.pause = tempfile.mkdtemp(), 1e-9
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        run("product", "MALA", "parts", checkpoint_dir=folder)
    reference = run("product", "MALA", "whole")
    told["resumed"] = run("product", "MALA", "whole", checkpoint_dir=cp.Checkpoint(folder, resume=True)) == reference

def compiled_ahead(above):
    texts = []
    count, compiled.collectives = compiled.collectives, lambda text: (texts.append(text), count(text))[1]
    devices = np.array(jax.devices()).reshape(2, 4)
    what = densities["product"], samplers["MALA"], N, devices
    tuning.ROOM = tuning.ROOM._replace(parts_bytes=above)
    result = compiled.compile_ahead(*what, diagnostics=False)
    compiled.collectives = count
    (entry,) = [c for c in re.split(r"\\n\\n", texts[0]) if c.lstrip().startswith("ENTRY")]
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
    sampler, mesh = cp.AnnealedMCMC(cp.MALA(0.01), 1), jax.make_mesh((1, 1), ("i", "j"))
    one, spread = compiled.partitioned(product, 1, 0), Spread.checked(mesh, None, 4)
    assert any(place != everywhere for place in jax.tree.leaves(compiled.places(one)))
    assert (
        compiled.in_parts(product, spread, sampler) is product
    )  # a second axis of 1 shares nothing
    runs = []
    for cut in (lambda density, *_: density, lambda *_: one):
        monkeypatch.setattr(compiled, "in_parts", cut)
        runs.append(run(product, chains=4, sampler=sampler, mesh=mesh, chunk=4))
    np.testing.assert_array_equal(runs[0]["x"], runs[1]["x"])


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
    assert (
        found["seen HMC parts"][1] == [SQUARE] * 4
    )  # in the factor, and among the program's arguments


@pytest.mark.slow
def test_arrays_are_whole_only_while_they_are_used():
    found = told(compiles=True)
    (kinds, outside, arguments), (none, _, all_arguments) = found["compiled"]
    # Two matrices, at the one place where a level evaluates; none before the loops.
    assert kinds == {"all-gather": 2}
    assert outside == {}
    assert none == {}
    assert all_arguments - arguments == 2 * (32 * 32 * 4) * 3 // 4
    assert found["without barrier"][1] == {
        "all-gather": 2
    }  # gathered for the whole run: what the barrier is for


class AbstractRow:
    """Where chains are spread over rows of so many devices, which need not be there."""

    def __init__(self, columns):
        self.mesh = jax.sharding.AbstractMesh((1, columns), AXES)


def test_refusals(product, monkeypatch):
    mesh = jax.make_mesh((1, 1, 1), tuple("abc"))
    refused(
        lambda: run(product, mesh=mesh),
        cp.errors.WrongTypeError,
        "one axis or two; got one with the axes",
    )
    table = AbstractRow(2)
    nuts = cp.AnnealedMCMC(cp.BlackJAX(blackjax.nuts, 0.1), 1).prepare(product)
    assert (
        compiled.in_parts(product, table, nuts) is product
    )  # whose arrays are all small
    monkeypatch.setattr(tuning, "ROOM", tuning.ROOM._replace(parts_bytes=0))
    words = "may evaluate some chains more often"
    refused(
        lambda: compiled.in_parts(product, table, nuts),
        cp.errors.CapabilityError,
        words,
    )
