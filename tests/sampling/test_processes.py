"""Two processes that run as one give the samples of one process, bit for bit, each
writing its own share."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

import composeprob as cp
from processes import environment

PROGRAM = """
import jax.numpy as jnp
import numpyro.distributions as dist
import composeprob as cp

schedule = cp.Schedule.log_snr(24, min=-6.0, max=6.0)
f = cp.Analytic(dist.Normal(jnp.array([0.0, 1.0]), 0.5), schedule)
g = cp.Analytic(dist.Normal(jnp.array([0.5, 0.0]), 1.0), schedule)
step = cp.ReverseStep(order=1, control="none")  # the same bits on one device
sampler = cp.SMC(cp.MALA(cp.Adaptive()), step=step, then=cp.GlobalMoves(3))
chunk, draws = 8, cp.Draws(3, thin=2)


@cp.program
def product(f, g):
    return cp.sample("x", f * g)
"""


def start(folder, name, *options, **variables):
    """Start a process that runs the scene of a folder."""
    python = (sys.executable, "-c", "from composeprob.cli import app; app()")
    scene = ("run", folder / "scene.py", "--no-cache", "--chains", 62)
    command = (*python, *scene, "--out", folder / name, *options)
    return subprocess.Popen(
        [str(word) for word in command],
        env=environment(JAX_PLATFORMS="cpu", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process):
    """The output of a process that must succeed."""
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    return output


NETWORK = """
from composeprob import tuning
tuning.ROOM = tuning.ROOM._replace(parts_bytes=1000)
import composeprob as cp
from sampling_cases import Layers, learned

schedule = cp.Schedule.log_snr(12, min=-6.0, max=4.0)
f = learned(Layers(2, 32, 32), "energy", schedule, time="sigma")
sampler = cp.SMC(cp.MALA(0.1), step=cp.ReverseStep(order=1, control="none"))
chunk, draws = 8, cp.Draws(3, thin=2)


@cp.program
def squared(f):
    return cp.sample("x", f * f)
"""


def together(folder, *options):
    """Outputs of two processes that work as one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = []
    for i in range(2):
        variables["JAX_PROCESS_ID"] = str(i)
        processes.append(start(folder, "two", "--distributed", *options, **variables))
    return [ended(process) for process in processes]


@pytest.mark.slow
def test_two_processes_hold_a_sharded_network_and_round_alike(tmp_path):
    """4 KiB of weights in two halves, a process with each; products of matrices are
    rounded to bfloat16."""
    (tmp_path / "scene.py").write_text(NETWORK + 'precision = "bfloat16"\n')
    together(tmp_path, "--mesh", "1x2")
    ended(start(tmp_path, "one"))
    (tmp_path / "scene.py").write_text(NETWORK)
    ended(start(tmp_path, "exact"))
    two = cp.Result.load(tmp_path / "two" / "samples.zarr")
    one = cp.Result.load(tmp_path / "one/samples.safetensors")
    np.testing.assert_array_equal(np.asarray(two["x"]), np.asarray(one["x"]))
    assert two.log_evidence == one.log_evidence
    exact = cp.Result.load(tmp_path / "exact/samples.safetensors")
    assert not np.array_equal(np.asarray(exact["x"]), np.asarray(one["x"]))


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    (tmp_path / "scene.py").write_text(PROGRAM)
    options = ("--checkpoint-dir", tmp_path / "checkpoints")
    outputs = together(tmp_path, *options)
    assert "status" in outputs[0]
    assert "status" not in outputs[1]  # one of them prints
    ended(start(tmp_path, "one"))
    two = cp.Result.load(tmp_path / "two" / "samples.zarr")
    one = cp.Result.load(tmp_path / "one/samples.safetensors")
    assert two["x"].shape == (62, 3, 2)
    np.testing.assert_array_equal(np.asarray(two["x"]), np.asarray(one["x"]))
    np.testing.assert_array_equal(two.log_weights, one.log_weights)
    for name in ("acceptance", "step_size", "ess"):
        np.testing.assert_array_equal(two.levels[name], one.levels[name])
    assert two.log_evidence == one.log_evidence
    draws = tmp_path / "two" / "samples.zarr" / "samples" / "x" / "c"
    written = {path.name for path in draws.iterdir()}
    assert written == {"0", "1"}  # a file of draws from each process
    assert json.loads((tmp_path / "two" / "results.json").read_text())["draws"] == 3

    # And on, in one process, from the checkpoint that two have written.
    store = str(tmp_path / "two/samples.zarr")
    checkpoints = str(tmp_path / "checkpoints")
    settings = (
        f"draws = cp.Draws(3, thin=2, store={store!r})\n"
        f"checkpoint_dir = cp.Checkpoint({checkpoints!r}, resume=True)\n"
    )
    (tmp_path / "scene.py").write_text(PROGRAM + settings)
    more = ended(start(tmp_path, "two"))
    assert "status" in more
    again = cp.Result.load(tmp_path / "two" / "samples.zarr")
    np.testing.assert_array_equal(np.asarray(again["x"]), np.asarray(one["x"]))
