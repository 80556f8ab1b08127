"""TPUs that are not here: programs compiled for them, by their own compiler."""

import json

import jax
import pytest

import composeprob as cp
from benchmarks import tpu
from composeprob.errors import LoadError
from processes import said
from sampling_cases import both, normal


def test_it_refuses_to_start_without_the_compiler(monkeypatch):
    monkeypatch.setattr(tpu, "tpu_compiler", lambda: None)
    with pytest.raises(LoadError, match="make tpu"):
        tpu.prepare_tpu_compiler()


def test_one_program_has_a_table_of_its_costs(monkeypatch):
    """Compiled for this processor, in the place of a chip."""
    monkeypatch.setattr(tpu, "tpu_chips", lambda topology: jax.devices()[:1])
    density = cp.compile(both, normal([0.0, 0.0]), normal([1.0, -1.0]))
    sampler = cp.AnnealedMCMC(cp.MALA(0.01), 1)
    table = tpu.ahead("v5e:1x1", density, 8, sampler, False, None)
    names, values = (list(column.cells) for column in table.columns)
    assert table.title == "v5e:1x1: 1 chips × 8 chains"
    assert dict(zip(names, values, strict=True))["collectives in the program"] == "0"


SCRIPT = """
import json
from benchmarks import tpu
tpu.prepare_tpu_compiler()
import composeprob as cp
from composeprob.errors import InvalidValueError
from benchmarks.ahead import compile_ahead
from sampling_cases import both, normal
factors = (normal([0.0, 0.0], [1.0, 0.5]), normal([1.0, -1.0], [0.5, 1.0]))
density = cp.compile(both, *factors)
samplers = {
    "independent": cp.AnnealedMCMC(cp.MALA(0.01), 2),
    "smc": cp.SMC(cp.MALA(0.01), weights="density"),
}
reports = {}
for name, topology, diagnostics in [
    ("independent", "v5e:2x2", False),
    ("independent", "v5e:4x4", False),
    ("independent", "v5e:2x2", True),
    ("smc", "v5e:2x2", False),
    ("smc", "v5e:4x4", False),
]:
    chips = tpu.tpu_chips(topology)
    c = compile_ahead(density, samplers[name], 64 * len(chips), chips, diagnostics)
    memory = [c.arguments, c.outputs, c.temporaries]
    case = f"{name} {topology} {diagnostics}"
    reports[case] = [*memory, c.collectives, c.flops, c.seconds]
reports["v4 chips"] = len(tpu.tpu_chips("v4:2x2x4"))
try:
    tpu.tpu_chips("v5e:3x5")
except InvalidValueError as error:
    reports["refused"] = str(error)
print(json.dumps(reports))
"""


SPLIT = """
import json
from benchmarks import tpu
tpu.prepare_tpu_compiler()
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
import composeprob as cp
from composeprob import tuning
from benchmarks.ahead import compile_ahead
from sampling_cases import both, normal
schedule = cp.Schedule.log_snr(8, min=-6.0, max=4.0)

class Network(eqx.Module):
    squares: tuple[jax.Array, ...]

    def __call__(self, x, t):
        h = jnp.full(2048, jnp.sum(x))
        for square in self.squares:
            h = jnp.tanh(square @ h)
        return 0.5 * jnp.sum(x**2) + jnp.sum(h)

squares = tuple(jax.random.normal(jax.random.key(i), (2048, 2048)) for i in range(2))
learned = cp.Diffusion(
    Network(squares),
    schedule,
    event_shape=(2,),
    parameterization="energy",
    time="sigma",
)
density = cp.compile(both, learned, normal([1.0, -1.0], [0.5, 1.0], schedule))
chips = np.array(tpu.tpu_chips("v5e:2x4")).reshape(2, 4)
sampler = cp.AnnealedMCMC(cp.MALA(0.01), 2)
reports = {}
for above in (2**30, 2**20):
    tuning.ROOM = tuning.ROOM._replace(parts_bytes=above)
    c = compile_ahead(density, sampler, 256, chips, diagnostics=False)
    memory = c.arguments + c.outputs + c.temporaries
    reports[str(above)] = [c.arguments, memory, c.collectives]
print(json.dumps(reports))
"""
WITH_COMPILER = pytest.mark.skipif(
    tpu.tpu_compiler() is None,
    reason="there is no TPU compiler: make tpu fetches it",
)


def reports_of(script):
    """Reports that a script prints in another process.

    The compiler reads its settings when it is loaded, and refuses flags of CPUs.
    """
    return json.loads(said(script, XLA_FLAGS="")[-1])


@WITH_COMPILER
def test_tpus_that_are_not_here():
    reports = reports_of(SCRIPT)
    four = reports["independent v5e:2x2 False"]
    sixteen = reports["independent v5e:4x4 False"]
    assert four[3] == sixteen[3] == {}
    # Every device has the first ancestor of every chain; otherwise a chip's memory is
    # the same for any number of chips.
    genealogy = 4 * 64 * (16 - 4)
    assert [four[0] + genealogy, *four[1:3]] == sixteen[:3]
    assert four[4] > 0
    assert four[5] > 0
    # The means that are reported.
    assert set(reports["independent v5e:2x2 True"][3]) == {"all-reduce"}
    # Weights, and the chains that change places.
    collectives = {"all-gather": 1, "collective-permute": 1}
    assert reports["smc v5e:2x2 False"][3] == collectives
    assert reports["smc v5e:4x4 False"][3] == collectives
    assert reports["v4 chips"] == 16  # one device a chip, not two
    assert "no topology 'v5e:3x5'" in reports["refused"]


@WITH_COMPILER
@pytest.mark.slow
def test_networks_in_parts_leave_room_on_tpus():
    """Each of the four chips in a row holds a quarter of 32 MiB of weights.

    Gathered weights are not kept.
    """
    reports = reports_of(SPLIT)
    whole, all_whole, no_collectives = reports[str(2**30)]
    split, all_split, collectives = reports[str(2**20)]
    assert no_collectives == {}
    assert set(collectives) == {"all-gather"}
    assert whole - split == 3 * 2**25 // 4
    assert all_split < 0.4 * all_whole
