"""`composeprob devices`: this machine's devices; and programs compiled ahead of
time."""

import jax
from typer.testing import CliRunner

import composeprob as cp
from benchmarks.ahead import collectives, compile_ahead
from composeprob.cli import app, hardware
from sampling_cases import both, normal

INDEPENDENT = cp.AnnealedMCMC(cp.MALA(0.01), 2)


def command(*arguments):
    return CliRunner().invoke(
        app, list(arguments), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    )


def test_it_shows_what_is_here():
    result = command("devices")
    assert result.exit_code == 0, result.output
    for word in (str(jax.devices()[0]), f"JAX {jax.__version__}", "float32"):
        assert word in result.output


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
