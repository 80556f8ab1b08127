"""The same samples, bit for bit, on few devices and on eight, in processes of their
own: devices are made at start-up.

On one device too, but for the step that `cp.SMC` fits over all chains, whose last bits
differ there.

A network with a matrix product is among the factors, since its rounding depends on the
size of the batch. The number of chains is no multiple of the number of devices, nor of
the chunk.
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
from composeprob.runtime.compiled import compile_ahead
from composeprob.runtime.progress import Progress
from composeprob.samplers.spread import AXES, Spread
from same_bits import bits_of
from sampling_cases import Layers, both, learned, normal, stop_after
assert jax.device_count() == 8
task = json.loads(sys.argv[1])
N, SCHEDULE = 250, cp.Schedule.log_snr(8, min=-6.0, max=4.0)
network = learned(Layers(2, 32, 2), "energy", SCHEDULE, time="sigma")
density = cp.compile(both, network, normal([0.3, -0.2], [0.5, 1.0], SCHEDULE))
unfitted = cp.ReverseStep(order=1, control="none")
samplers = {
    "Ancestral": cp.Ancestral(),
    "AnnealedMCMC": cp.AnnealedMCMC(cp.HMC(cp.Adaptive(), num_leapfrog=2), 2, reverse_step=True),
    "SMC": cp.SMC(cp.MALA(cp.Adaptive())),
    "SMC, nothing fitted": cp.SMC(cp.MALA(cp.Adaptive()), step=unfitted),
}
independent = cp.AnnealedMCMC(cp.MALA(0.01), 2)

def run(name, devices, chunk=32, **options):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("any name",)) if devices else None
    with jax.default_device(jax.devices()[0] if devices == 0 else None):  # None: on whatever there is
        result = cp.infer(density, jax.random.key(3), num_chains=N, sampler=samplers[name], mesh=mesh, chunk=chunk,
                          progress=False, **options)
    on = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(ran[-1].chains)}
    assert on == {8 if devices is None else max(devices, 1)} == {result.about.devices}, on
    assert len(result["x"]) == N
    assert (f"{result.about.devices}, all of which" in str(result.summary())) == (result.about.devices > 1)
    return bits_of(result), result

def words_that_count_the_device(spread, function, *batch):
    moved = lambda leaf: (leaf + jax.lax.axis_index(AXES).astype(leaf.dtype)
                          if spread.mesh is not None and leaf.dtype == jnp.uint32 else leaf)
    return unbroken["map"](spread, lambda *one: function(*jax.tree.map(moved, one)), *batch)

def survivors_from_the_next_device(spread, chains, chosen):
    return unbroken["exchange"](spread, chains, jnp.roll(chosen, 1) if spread.mesh is not None else chosen)

ran = []
visit = compiled.advance
def advance(*arguments):
    ran.append(visit(*arguments))
    return ran[-1]
compiled.advance = advance

unbroken = {name: getattr(Spread, name) for name in ("map", "total", "exchange")}
BROKEN = {
    "map": words_that_count_the_device,
    "total": lambda spread, counts: counts.sum(0) * spread.devices,  # adapts by its own chains only
    "exchange": survivors_from_the_next_device,
}
told = {}
for name in task["samplers"]:
    reference, _ = run(name, task["devices"][0])
    told[name] = {d: run(name, d)[0] == reference for d in task["devices"][1:]}
    if name in task["broken"]:
        told[name]["broken"] = {}
        for method, broken in BROKEN.items():
            setattr(Spread, method, broken)
            jax.clear_caches()
            told[name]["broken"][method] = run(name, 2)[0] == reference
            setattr(Spread, method, unbroken[method])
        jax.clear_caches()
def stopped_on(devices, name, folder):
    Progress.pause = 1e-9
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert run(name, devices, checkpoint_dir=folder)[1].status.has("interrupted")

if task["resumes"]:
    (name,), folder, few = task["samplers"], tempfile.mkdtemp(), task["devices"][0]
    stopped_on(8, name, folder)
    told["resumed"] = run(name, few, checkpoint_dir=cp.Checkpoint(folder, resume=True))[0] == run(name, few)[0]
    stopped_on(few, name, folder + "again")
    told["spread"] = run(name, 8, checkpoint_dir=cp.Checkpoint(folder + "again", resume=True))[0] == run(name, few)[0]
if task["collectives"]:
    for name, sampler in {"fitted": cp.SMC(cp.MALA(0.01)), "chains": independent}.items():
        told[name] = compile_ahead(density, sampler, N, jax.devices(), diagnostics=False).collectives
    wide = cp.compile(both, *(normal(np.zeros(2000), np.ones(2000), SCHEDULE) for _ in range(2)))
    unfitted = samplers["SMC, nothing fitted"]
    ahead = [compile_ahead(wide, unfitted, 16 * d, jax.devices()[:d], diagnostics=False) for d in (2, 8)]
    told["memory"] = [a.arguments + a.outputs + a.temporaries for a in ahead]
    told["unfitted"] = ahead[1].collectives
print(json.dumps(told))
"""


def told(haste=False, **task):
    """What a process with eight devices finds; in haste it goes without LLVM's
    optimisations, as quick tests do."""
    task = {"broken": [], "collectives": False, "resumes": False, **task}
    return json.loads(
        said(
            SCRIPT,
            json.dumps(task),
            devices=8,
            JAX_DISABLE_MOST_OPTIMIZATIONS=str(haste),
        )[-1]
    )


@pytest.mark.parametrize(
    "name", ["SMC, nothing fitted", pytest.param("SMC", marks=pytest.mark.slow)]
)
def test_eight_devices_give_the_samples_of_two_and_speak_as_little_as_can_be(name):
    found = told(
        haste=True, samplers=[name], devices=[2, 8], collectives=True, resumes=True
    )
    assert found.pop(name) == {"8": True}
    # A run that was stopped on eight goes on on two, and the other way round.
    assert found.pop("resumed")
    assert found.pop("spread")
    two, eight = found.pop("memory")
    assert eight < 1.02 * two  # 16 chains on each device, which never sees all
    # Of SMC one all-gather of weights, and one exchange of chains, in which each
    # device's go round all of them. What is fitted over all chains takes one more, in
    # the one place that fits both ends of a step.
    exchange = {"all-gather": 1, "collective-permute": 1}
    assert found == {
        "unfitted": {**exchange, "all-reduce": 1},
        "fitted": {**exchange, "all-gather": 2},
        "chains": {},
    }


@pytest.mark.slow
def test_samples_do_not_depend_on_the_number_of_devices():
    """On one without a mesh, on 1, 2, 4 and 8 with one, and on all there are; what is
    no such run is found out."""
    names = ["Ancestral", "AnnealedMCMC", "SMC, nothing fitted"]
    found = told(samplers=names, devices=[0, 1, 2, 4, 8, None], broken=names[-1:])
    assert found[names[-1]].pop("broken") == {
        "map": False,
        "total": False,
        "exchange": False,
    }
    counts = ("1", "2", "4", "8", "null")
    assert found == {name: dict.fromkeys(counts, True) for name in names}


# ── shares of chains ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("number", "chunk", "copies"), [(10, 4, 2), (12, 4, 0), (3, 4, 1), (10, None, 0)]
)
def test_copies_fill_the_last_chunk_and_count_nowhere(number, chunk, copies):
    spread = Spread.checked(None, chunk, number)

    @jax.jit
    def asked(chains):
        padded = spread.padded(chains)
        two = jnp.stack([padded["x"], 0 * padded["x"]], 1)
        cut, gathered = spread.cut(padded)["y"], spread.gather(padded["y"])
        exchanged = spread.exchange(padded, jnp.full(number, number - 1))["x"]
        return (
            padded["x"],
            cut,
            gathered,
            spread.total(two),
            exchanged,
            spread.map(lambda x: 2 * x, padded["x"]),
        )

    chains = {
        "x": jnp.arange(number) + 1,
        "y": jnp.arange(2.0 * number).reshape(number, 2),
    }
    padded, cut, gathered, total, exchanged, doubled = asked(chains)
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


def found(cases, devices, **variables):
    """Whether each case's samples on the other numbers of devices are those on the
    first; in a process of its own."""
    task = json.dumps({"cases": cases, "devices": devices})
    return json.loads(
        said(RUN, task, devices=same_bits.DEVICES, timeout=3600, **variables)[-1]
    )


def test_weighted_models_and_full_covariances_have_the_same_samples_on_one_device_and_on_eight():
    """The rows whose last bits depended on the number of devices while XLA merged equal
    expressions."""
    case = "Ancestral: Weighted + mixture of MultivariateNormal"
    assert found([case], [1, 8], **HASTE) == {case: [True]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [list(FACTORS), CLOSED], ids=["factors", "closed forms"]
)
def test_every_factor(rows):
    """By reverse diffusion and MALA, and where the factor has a rate by SMC."""
    cases = [f"MALA: {row}" for row in rows] + [
        f"SMC: {row}" for row in rows if same_bits.has_rate(row)
    ]
    assert found(cases, [2, 8]) == {case: [True] for case in cases}


@pytest.mark.slow
def test_every_kernel_and_what_is_annealed_exactly():
    cases = [
        *KERNELS,
        "observed",
        "SMC, metric: mixture of Normal",
        "global moves: mixture of Normal",
    ]
    assert found(cases, [2, 8]) == {case: [True] for case in cases}
