"""The same samples, bit for bit, on few devices and on eight, in processes of their
own: devices are made at start-up.

On one device too, but for the step that `cp.SMC` fits over all chains, whose last bits
differ there.

A network with a matrix product is among the factors, since its rounding depends on the
size of the batch. The number of chains is not a multiple of the number of devices, nor
of the chunk.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import same_bits
from composeprob.samplers.spread import Spread
from processes import HASTE, said
from registry import FACTORS, KERNELS

SCRIPT = """
import json, sys, tempfile
import jax, jax.numpy as jnp, numpy as np, pytest, composeprob as cp
from composeprob.runtime import compiled
from benchmarks.ahead import compile_ahead
from composeprob.runtime.progress import Progress
from composeprob.samplers.spread import AXES, Spread
from same_bits import bits_of
from sampling_cases import Layers, both, learned, normal, squared, stop_after
assert jax.device_count() == 8
task = json.loads(sys.argv[1])
N = 250
SCHEDULE = cp.Schedule.log_snr(8, min=-6.0, max=4.0)
network = learned(Layers(2, 32, 2), "energy", SCHEDULE, time="sigma")
density = cp.compile(both, network, normal([0.3, -0.2], [0.5, 1.0], SCHEDULE))
unfitted = cp.ReverseStep(order=1, control="none")
# Its log-density is tracked: it is an energy without the heights of its modes.
densities = {"SMC, tracked": cp.compile(squared, network)}
samplers = {
    "SMC, tracked": cp.SMC(cp.MALA(cp.Adaptive()), step=unfitted, resample=0.99),
    "Ancestral": cp.Ancestral(),
    "AnnealedMCMC": cp.AnnealedMCMC(
        cp.HMC(cp.Adaptive(), num_leapfrog=2), 2, reverse_step=True
    ),
    "SMC": cp.SMC(cp.MALA(cp.Adaptive())),
    "SMC, nothing fitted": cp.SMC(cp.MALA(cp.Adaptive()), step=unfitted),
}
independent = cp.AnnealedMCMC(cp.MALA(0.01), 2)

def run(name, devices, chunk=32, **options):
    # 0 devices: one without a mesh; None: whatever there is.
    mesh = None
    if devices:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("any name",))
    only = jax.devices()[0] if devices == 0 else None
    options |= {"sampler": samplers[name], "mesh": mesh, "chunk": chunk}
    with jax.default_device(only):
        result = cp.infer(
            densities.get(name, density),
            jax.random.key(3),
            num_chains=N,
            progress=False,
            **options,
        )
    on = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(ran[-1].chains)}
    number = 8 if devices is None else max(devices, 1)
    assert on == {number} == {result.about.devices}, on
    assert len(result["x"]) == N
    many = f"{number}, all of which" in str(result.summary())
    assert many == (number > 1)
    return bits_of(result), result

def keys_that_depend_on_the_device(spread, function, *batch):
    def moved(leaf):
        if spread.mesh is None or leaf.dtype != jnp.uint32:
            return leaf
        return leaf + jax.lax.axis_index(AXES).astype(leaf.dtype)

    def of_moved(*one):
        return function(*jax.tree.map(moved, one))

    return unbroken["map"](spread, of_moved, *batch)

def ancestors_from_the_next_device(spread, chains, ancestors):
    if spread.mesh is not None:
        ancestors = jnp.roll(ancestors, 1)
    return unbroken["exchange"](spread, chains, ancestors)

ran = []
visit = compiled.advance
def advance(*arguments):
    ran.append(visit(*arguments))
    return ran[-1]
compiled.advance = advance

unbroken = {name: getattr(Spread, name) for name in ("map", "total", "exchange")}
BROKEN = {
    "map": keys_that_depend_on_the_device,
    # Each device adapts by its own chains only.
    "total": lambda spread, counts: counts.sum(0) * spread.devices,
    "exchange": ancestors_from_the_next_device,
}
same = {}
for name in task["samplers"]:
    reference, _ = run(name, task["devices"][0])
    same[name] = {d: run(name, d)[0] == reference for d in task["devices"][1:]}
    if name in task["broken"]:
        same[name]["broken"] = {}
        for method, broken in BROKEN.items():
            setattr(Spread, method, broken)
            jax.clear_caches()
            same[name]["broken"][method] = run(name, 2)[0] == reference
            setattr(Spread, method, unbroken[method])
        jax.clear_caches()
def stopped_on(devices, name, folder):
    Progress.pause = 1e-9
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert run(name, devices, checkpoint_dir=folder)[1].status.has("interrupted")

def gone_on(devices, name, folder):
    return run(name, devices, checkpoint_dir=cp.Checkpoint(folder, resume=True))[0]

if task["resumes"]:
    (name,) = task["samplers"]
    folder = tempfile.mkdtemp()
    few = task["devices"][0]
    whole = run(name, few)[0]
    stopped_on(8, name, folder)
    same["resumed"] = gone_on(few, name, folder) == whole
    stopped_on(few, name, folder + "again")
    same["spread"] = gone_on(8, name, folder + "again") == whole
if task["collectives"]:
    devices = jax.devices()
    of_name = {"fitted": cp.SMC(cp.MALA(0.01)), "chains": independent}
    for name, sampler in of_name.items():
        ahead = compile_ahead(density, sampler, N, devices, diagnostics=False)
        same[name] = ahead.collectives
    normals = [normal(np.zeros(2000), np.ones(2000), SCHEDULE) for _ in range(2)]
    wide = cp.compile(both, *normals)
    unfitted = samplers["SMC, nothing fitted"]
    same["memory"] = []
    for d in (2, 8):
        ahead = compile_ahead(wide, unfitted, 16 * d, devices[:d], diagnostics=False)
        memory = ahead.arguments + ahead.outputs + ahead.temporaries
        same["memory"].append(memory)
    same["unfitted"] = ahead.collectives
print(json.dumps(same))
"""


def by_eight(haste=False, **task):
    """Results of the script in a process with eight devices; in haste it goes without
    LLVM's optimisations, as quick tests do."""
    task = {"broken": [], "collectives": False, "resumes": False, **task}
    variables = {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(haste)}
    lines = said(SCRIPT, json.dumps(task), devices=8, **variables)
    return json.loads(lines[-1])


@pytest.mark.parametrize(
    "name", ["SMC, nothing fitted", pytest.param("SMC", marks=pytest.mark.slow)]
)
def test_eight_devices_give_the_samples_of_two_with_the_fewest_collectives(name):
    found = by_eight(
        haste=True, samplers=[name], devices=[2, 8], collectives=True, resumes=True
    )
    assert found.pop(name) == {"8": True}
    # A run that was stopped on eight goes on on two, and the other way round.
    assert found.pop("resumed")
    assert found.pop("spread")
    two, eight = found.pop("memory")
    assert eight < 1.02 * two  # 16 chains on each device, which never sees all
    # SMC takes one all-gather of weights, and one exchange of chains, in which each
    # device's chains go round all of them. A fit over all chains takes one all-gather
    # more, in the one place that fits both ends of a step.
    exchange = {"all-gather": 1, "collective-permute": 1}
    assert found == {
        "unfitted": {**exchange, "all-reduce": 1},
        "fitted": {**exchange, "all-gather": 2},
        "chains": {},
    }


@pytest.mark.slow
def test_eight_devices_track_log_densities_as_two_do():
    """Values are resampled and resumed with the chains that carry them."""
    name = "SMC, tracked"
    found = by_eight(haste=True, samplers=[name], devices=[2, 8], resumes=True)
    assert found == {name: {"8": True}, "resumed": True, "spread": True}


@pytest.mark.slow
def test_samples_do_not_depend_on_the_number_of_devices():
    """On one without a mesh, on 1, 2, 4 and 8 with one, and on all there are; broken
    communication changes the samples."""
    names = ["Ancestral", "AnnealedMCMC", "SMC, nothing fitted"]
    found = by_eight(samplers=names, devices=[0, 1, 2, 4, 8, None], broken=names[-1:])
    broken = found[names[-1]].pop("broken")
    assert broken == {"map": False, "total": False, "exchange": False}
    counts = ("1", "2", "4", "8", "null")
    assert found == {name: dict.fromkeys(counts, True) for name in names}


# ── shares of chains ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("number", "chunk", "copies"), [(10, 4, 2), (12, 4, 0), (3, 4, 1), (10, None, 0)]
)
def test_copies_fill_the_last_chunk_and_count_nowhere(number, chunk, copies):
    spread = Spread.checked(None, chunk, number)

    @jax.jit
    def results(chains):
        padded = spread.padded(chains)
        two = jnp.stack([padded["x"], 0 * padded["x"]], 1)
        return (
            padded["x"],
            spread.cut(padded)["y"],
            spread.gather(padded["y"]),
            spread.total(two),
            spread.exchange(padded, jnp.full(number, number - 1))["x"],
            spread.map(lambda x: 2 * x, padded["x"]),
        )

    chains = {
        "x": jnp.arange(number) + 1,
        "y": jnp.arange(2.0 * number).reshape(number, 2),
    }
    padded, cut, gathered, total, exchanged, doubled = results(chains)
    assert spread.copies == copies
    assert len(padded) == number + copies == spread.number_of(padded) + copies
    np.testing.assert_array_equal(padded[number:], chains["x"][:copies])
    np.testing.assert_array_equal(cut, chains["y"])
    np.testing.assert_array_equal(gathered, chains["y"])
    np.testing.assert_array_equal(total, [number * (number + 1) // 2, 0])
    np.testing.assert_array_equal(exchanged, number)
    np.testing.assert_array_equal(doubled, 2 * padded)


# ── every row of the registry ─────────────────────────────────────────────────────────

RUN = "import json, sys, same_bits; same_bits.main(**json.loads(sys.argv[1]))"
CLOSED = [name for name in same_bits.EXPRESSIONS if name not in FACTORS]


def same_samples(cases, devices, **variables):
    """For each case, a list: True where samples on another number of devices are those
    on the first; in a process of its own."""
    task = json.dumps({"cases": cases, "devices": devices})
    lines = said(RUN, task, devices=same_bits.DEVICES, timeout=3600, **variables)
    return json.loads(lines[-1])


def test_weighted_models_and_full_covariances_have_the_same_samples_on_one_and_eight():
    """The rows whose last bits depended on the number of devices while XLA merged equal
    expressions."""
    case = "Ancestral: Weighted + mixture of MultivariateNormal"
    assert same_samples([case], [1, 8], **HASTE) == {case: [True]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [list(FACTORS), CLOSED], ids=["factors", "closed forms"]
)
def test_every_factor(rows):
    """Reverse diffusion with MALA, and SMC where the factor has a rate."""
    cases = [f"MALA: {row}" for row in rows]
    cases += [f"SMC: {row}" for row in rows if same_bits.has_rate(row)]
    assert same_samples(cases, [2, 8]) == {case: [True] for case in cases}


@pytest.mark.slow
def test_every_kernel_and_an_exactly_annealed_observation():
    cases = [
        *KERNELS,
        "observed",
        "SMC, metric: mixture of Normal",
        "global moves: mixture of Normal",
    ]
    assert same_samples(cases, [2, 8]) == {case: [True] for case in cases}
