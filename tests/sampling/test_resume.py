"""Interrupted runs go on from their checkpoint and give the very samples of the
uninterrupted run."""

import contextlib
import errno
import functools
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import xarray

import composeprob as cp
from composeprob.checkpoint import CheckpointFolder
from composeprob.errors import InvalidValueError, LoadError, WrongTypeError
from composeprob.results.status import Code
from composeprob.runtime.progress import Progress
from messages import check_finding, check_wording
from processes import environment, said
from refusals import refused
from sampling_cases import (
    SCHEDULE,
    Calls,
    Counted,
    both,
    normal,
    run,
    single,
    stop_after,
)


@pytest.fixture(scope="module")
def whole(product):
    return run(product)


def same(result, other):
    np.testing.assert_array_equal(result["x"], other["x"])
    np.testing.assert_array_equal(result.log_weights, other.log_weights)
    xarray.testing.assert_identical(result.levels, other.levels)
    assert result.log_evidence == other.log_evidence
    assert result.evaluations == other.evaluations


@pytest.fixture
def stopped(monkeypatch, every_level):
    """Runs that are interrupted after so many levels, with a checkpoint after each."""

    def run_until(levels, *args, **options):
        with monkeypatch.context() as patch:
            stop_after(patch, levels)
            return run(*args, **options)

    return run_until


def test_a_resumed_run_gives_the_same_samples(product, whole, tmp_path, stopped):
    part = stopped(7, product, checkpoint_dir=tmp_path)
    assert part.status.code is Code.INTERRUPTED
    assert "checkpoint" in check_finding(part.status, Code.INTERRUPTED)
    stopped(19, product, checkpoint_dir=tmp_path)  # and once more, from the middle
    resumed = run(product, checkpoint_dir=cp.Checkpoint(tmp_path, resume=True))
    same(resumed, whole)
    assert resumed.status.ok
    assert resumed.about.seconds > part.about.seconds  # the sum over all sittings
    same(run(product, checkpoint_dir=tmp_path), whole)  # a finished run is only read


def test_the_damaged_last_checkpoint_is_passed_over(product, whole, tmp_path, stopped):
    stopped(7, product, checkpoint_dir=tmp_path)
    steps = sorted(
        (p for p in tmp_path.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
    )
    assert [p.name for p in steps][-1] == "7"
    assert len(steps) == 2
    truncate(steps[-1])
    # The rest of the message is Orbax's.
    with pytest.warns(UserWarning, match="Checkpoint 7 .*checkpoint"):
        same(run(product, checkpoint_dir=tmp_path), whole)


def truncate(checkpoint):
    """Cut every file of the state in half, as a full disk or a crash of the machine
    may."""
    for file in (checkpoint / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_refusals(product, whole, tmp_path):
    """The folder of another run, of none, of a damaged one, and one that cannot be."""
    a = tmp_path / "a"
    # Too short for a checkpoint before its end
    same(run(product, checkpoint_dir=a), whole)
    other = cp.compile(
        both, normal([0.0, 0.0], [1.0, 0.5]), normal([1.0, -1.5], [0.5, 1.0])
    )

    def sampler(resample):
        step = cp.ReverseStep(order=1)
        return cp.SMC(cp.MALA(cp.Adaptive()), resample=resample, step=step)

    # By names and numbers in which each differs
    for facts, change in {
        "64, not 32": {"chains": 32},
        r"0\]', not .*1\]'": {"seed": 1},
        r"resample=0.5.*resample=0.6": {"sampler": sampler(0.6)},
        "sampler": {"sampler": sampler(0.50001)},
    }.items():
        another_run = functools.partial(run, product, checkpoint_dir=a, **change)
        refused(another_run, LoadError, facts, "resume=False")
    refused(
        lambda: run(other, checkpoint_dir=a),
        LoadError,
    )
    alone = cp.compile(single, normal([0.0, 0.0]))
    absent = cp.Checkpoint(tmp_path / "b", resume=True)
    refused(
        lambda: run(alone, checkpoint_dir=a),
        LoadError,
    )
    folder = re.escape(str(tmp_path / "b"))
    refused(lambda: run(product, checkpoint_dir=absent), LoadError, folder)
    (checkpoint,) = (p for p in a.iterdir() if p.name.isdigit())
    truncate(checkpoint)
    refused(
        lambda: run(product, checkpoint_dir=a),
        LoadError,
    )
    same(run(product, checkpoint_dir=cp.Checkpoint(a, resume=False)), whole)
    file = tmp_path / "file"
    file.write_text("")
    refused(
        lambda: run(product, checkpoint_dir=file / "c"),
        InvalidValueError,
        re.escape(str(file)),
    )
    refused(
        lambda: cp.Checkpoint(a, resume="yes"),
        WrongTypeError,
    )
    refused(
        lambda: run(product, checkpoint_dir=3),
        WrongTypeError,
    )


def test_another_function_with_the_same_numbers_is_another_program(tmp_path):
    def go_on(power, checkpoint_dir=tmp_path):
        def network(x, t):
            return x**power

        factor = cp.Diffusion(
            network, SCHEDULE, event_shape=(2,), parameterization="epsilon", label="f"
        )
        run(
            cp.compile(single, factor),
            chains=4,
            sampler=cp.Ancestral(),
            checkpoint_dir=checkpoint_dir,
        )

    go_on(1)
    go_on(1, cp.Checkpoint(tmp_path, resume=True))  # an equal one
    refused(lambda: go_on(2), LoadError)


@pytest.mark.usefixtures("every_level")
def test_a_full_disk_stops_nothing(product, whole, tmp_path, monkeypatch):
    save = CheckpointFolder.save

    def full(self, step, state):
        if step > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "save", full)
        patch.setattr(CheckpointFolder, "writing", False)
        with pytest.warns(UserWarning, match="No space left") as caught:
            result = run(product, checkpoint_dir=tmp_path)
    (warning,) = caught
    check_wording(str(warning.message))
    same(result, whole)
    assert result.status.code is Code.NOT_SAVED
    message = check_finding(result.status, Code.NOT_SAVED)
    assert "No space left" in message
    assert "result.save" in message
    same(
        run(product, checkpoint_dir=cp.Checkpoint(tmp_path, resume=True)), whole
    )  # with room again, from level 3


@pytest.mark.filterwarnings("ignore:No checkpoint could be written")
@pytest.mark.usefixtures("every_level")
def test_a_folder_that_goes_away_stops_nothing(product, whole, tmp_path, monkeypatch):
    """Errors of the thread that writes arrive too, by whatever way Orbax chooses; and
    none is left that the process would wait for at its end."""
    before = set(threading.enumerate())
    folder = tmp_path / "checkpoints"
    update = Progress.update

    def pull_the_disk(self, done, **facts):
        update(self, done, **facts)
        while (
            done == 3 and not folder.is_file()
        ):  # the thread may make it anew in between
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.write_text("no folder any more")

    monkeypatch.setattr(Progress, "update", pull_the_disk)
    result = run(product, checkpoint_dir=folder)
    same(result, whole)
    assert result.status.code is Code.NOT_SAVED
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(timeout=20)
            assert not thread.is_alive(), thread.name


def test_a_run_that_goes_on_compiles_nothing(tmp_path, stopped):
    calls = Calls()
    density = cp.compile(single, cp.Energy(Counted(calls), SCHEDULE, event_shape=(2,)))
    options = {
        "chains": 2,
        "sampler": cp.AnnealedMCMC(cp.MALA(0.01), 1),
        "checkpoint_dir": tmp_path,
    }
    stopped(7, density, **options)
    calls.reset()
    run(density, **options | {"checkpoint_dir": cp.Checkpoint(tmp_path, resume=True)})
    assert calls.run > 0
    assert calls.traced == 1  # of one level: `fingerprint` looks at its code


SCRIPT = """
import sys
import jax, numpy as np, composeprob as cp
from composeprob.runtime.progress import Progress
from composeprob import tuning
from sampling_cases import SAMPLER, both, normal
Progress.pause = 1e-9
tuning.CHECKPOINTS = tuning.CHECKPOINTS._replace(seconds=0.0, share=1e9)
factors = normal([0.0, 0.0], [1.0, 0.5]), normal([1.0, -1.0], [0.5, 1.0])
density = cp.compile(both, *factors)
print("ready", flush=True)
result = cp.infer(
    density,
    jax.random.key(0),
    num_chains=64,
    sampler=SAMPLER,
    progress=False,
    checkpoint_dir=sys.argv[1],
)
np.save(sys.argv[2], result["x"])
"""


@pytest.mark.slow
def test_kill_and_resume(tmp_path):
    """`kill -9` when some checkpoint is there, at whatever level that is; then the same
    command again."""
    places = tmp_path / "checkpoints", tmp_path / "x.npy"
    # In a process of its own too: this one may have compiled the same code in haste,
    # which rounds otherwise.
    said(SCRIPT, tmp_path / "whole", tmp_path / "whole.npy", timeout=600)
    command = [sys.executable, "-c", SCRIPT, *map(str, places)]
    process = subprocess.Popen(command, env=environment(PYTHONHASHSEED="1"))
    level = int(
        np.random.default_rng(time.time_ns()).integers(1, 25)
    )  # samples may not depend on it
    while process.poll() is None and newest(tmp_path / "checkpoints") < level:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "x.npy").exists()
    said(SCRIPT, *places, timeout=600, PYTHONHASHSEED="2")
    whole = np.load(tmp_path / "whole.npy")
    np.testing.assert_array_equal(
        np.load(tmp_path / "x.npy"), whole, err_msg=f"killed at {level}"
    )


def newest(folder):
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)
