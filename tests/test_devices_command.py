"""`composeprob devices`: this machine's devices, and compilation for TPUs elsewhere."""

import json

import jax
import pytest
from typer.testing import CliRunner

import composeprob as cp
from composeprob.cli import app, hardware
from composeprob.runtime.compiled import collectives, compile_ahead
from messages import check_wording
from processes import said
from sampling_cases import both, normal

INDEPENDENT = cp.AnnealedMCMC(cp.MALA(0.01), 2)


def command(*arguments):
    return CliRunner().invoke(
        app, list(arguments), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        ((), 0, (str(jax.devices()[0]), f"JAX {jax.__version__}", "float32")),
        (("scene.py",), 2, ("--compile",)),
        (
            ("--compile", "v5e:4x4"),
            2,
            ("libtpu", "pip install 'jax[tpu]'"),
        ),
    ],
)
def test_it_shows_what_is_here_and_refuses_what_is_not(
    monkeypatch, arguments, exit_code, words
):
    monkeypatch.setattr(hardware, "tpu_compiler", lambda: None)
    result = command("devices", *arguments)
    assert result.exit_code == exit_code, result.output
    for word in words:
        assert word in result.output
    if exit_code == 2:
        check_wording(result.output)


def test_collectives_are_counted_where_they_start():
    text = """
      %r = f32[] all-reduce(%x), to_apply=%add
      %s = (f32[4], f32[16]) all-gather-start(%y), dimensions={0}
      %d = f32[16] all-gather-done(%s)
      %t = f32[] add(%all-reduce.1, %d)
      ROOT %p = f32[4] collective-permute(%y), channel_id=1
    """
    assert collectives(text) == {
        "all-gather": 1,
        "all-reduce": 1,
        "collective-permute": 1,
    }


def test_one_device_needs_no_collectives():
    factors = (normal([0.0, 0.0], [1.0, 0.5]), normal([1.0, -1.0], [0.5, 1.0]))
    density = cp.compile(both, *factors)
    compiled = compile_ahead(density, INDEPENDENT, 32, jax.devices()[:1])
    assert compiled.collectives == {}
    assert compiled.arguments > 32 * 8  # the keys, at least
    assert compiled.outputs >= 32 * 2 * 4


def test_sizes_are_readable():
    assert hardware.readable(12) == "12 B"
    assert hardware.readable(4096) == "4 KiB"
    assert hardware.readable(3 * 2**30) == "3 GiB"
    assert hardware.readable(5 * 2**40) == "5 TiB"


def test_one_process_on_a_node_of_slurm_takes_all_gpus_of_it():
    step = {
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
    }
    assert hardware.slurm_devices(step) == [0, 1, 2, 3]
    for other in (
        {"SLURM_STEP_NUM_TASKS": "8"},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"JAX_LOCAL_DEVICE_IDS": "0"},
    ):
        assert hardware.slurm_devices(step | other) is None
    assert hardware.slurm_devices({}) is None


SCRIPT = """
import json
from composeprob.cli import hardware
hardware.prepare_tpu_compiler()
import composeprob as cp
from composeprob.errors import InvalidValueError
from composeprob.runtime.compiled import compile_ahead
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
    chips = hardware.tpu_chips(topology)
    c = compile_ahead(density, samplers[name], 64 * len(chips), chips, diagnostics)
    memory = [c.arguments, c.outputs, c.temporaries]
    case = f"{name} {topology} {diagnostics}"
    reports[case] = [*memory, c.collectives, c.flops, c.seconds]
reports["v4 chips"] = len(hardware.tpu_chips("v4:2x2x4"))
try:
    hardware.tpu_chips("v5e:3x5")
except InvalidValueError as error:
    reports["refused"] = str(error)
print(json.dumps(reports))
"""


SPLIT = """
import json
from composeprob.cli import hardware
hardware.prepare_tpu_compiler()
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
import composeprob as cp
from composeprob import tuning
from composeprob.runtime.compiled import compile_ahead
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
chips = np.array(hardware.tpu_chips("v5e:2x4")).reshape(2, 4)
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
    hardware.tpu_compiler() is None,
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
