"""The command `composeprob`: what it runs, what it writes, and how it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import composeprob as cp
from composeprob.cli import app
from composeprob.cli.programs import arguments, load_program
from composeprob.cli.samplers import KernelName, LogRatioName, SamplerName, make_sampler

NORMAL = """
import jax.numpy as jnp
import numpyro.distributions as dist
import composeprob as cp

schedule = cp.Schedule.log_snr(12, min=-6.0, max=6.0)
f = cp.Analytic(dist.Normal(jnp.array([0.0, 1.0]), 0.5), schedule)


@cp.program
def first(f, scale=1.0):
    return cp.sample("x", f**scale)
"""
SECOND = """

@cp.program
def second(f):
    return cp.sample("y", f * f)
"""
SCORE_ONLY = """
import composeprob as cp

g = cp.Diffusion(lambda x, t: -x, cp.Schedule.cosine(10), event_shape=(2,), parameterization="score")


@cp.program
def scored(g):
    return cp.sample("x", g)
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="scene.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def command(*arguments):
    # wide, so that no message is wrapped
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})


def refused(*arguments):
    """The message of a command that must end with exit code 2 and no traceback."""
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "Fix:" in result.output
    return " ".join(result.output.split())


def test_run_prints_and_writes(write, tmp_path):
    out = tmp_path / "out"
    # the file's settings, as the command names none
    own = "\nnum_chains, sampler = 300, cp.SMC(cp.MALA(0.1), check_levels=False, step=cp.ReverseStep(order=1))\n"
    result = command("run", write(NORMAL + own), "--seed", 3, "--out", out)
    assert result.exit_code == 0, result.output
    for part in ("AnnealedDensity of program 'first'", "x[0]", "SMC", "evaluations", "OK", "results.json"):
        assert part in result.output
    assert sorted(p.name for p in out.iterdir()) == [
        "results.json",
        "samples.png",
        "samples.safetensors",
        "summary.txt",
    ]
    saved = cp.Result.load(out / "samples.safetensors")
    assert saved["x"].shape == (300, 2)
    np.testing.assert_allclose(saved["x"].mean(0), [0.0, 1.0], atol=0.2)
    assert str(saved.summary()) in (out / "summary.txt").read_text(encoding="utf-8")
    numbers = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert numbers["program"] == "first"
    assert numbers["seed"] == 3
    assert numbers["num_chains"] == 300
    assert len(numbers["levels"]["acceptance"]) == 12
    assert numbers["summary"]["x[1]"]["mean"] == pytest.approx(saved["x"][:, 1].mean(), abs=1e-4)


@pytest.mark.slow
def test_run_with_kernel_and_levels(write, tmp_path):
    result = command(
        "run", write(NORMAL + SECOND) + ":second", "--kernel", "hmc", "--num-leapfrog", 2, "--steps-per-level", 2,
        "--levels", 6, "--chains", 50, "--out", tmp_path, "--mesh", "1x1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = cp.Result.load(tmp_path / "samples.safetensors")
    assert "AnnealedMCMC(HMC" in saved.sampler
    assert saved["y"].shape == (50, 2)
    assert saved.evaluations == 6 * (1 + 2 * 2)
    np.testing.assert_allclose(saved.log_snr, np.linspace(6, -6, 6), atol=1e-4)  # over the program's own range


def test_a_file_of_other_meaning_is_not_taken_for_settings(write):
    message = refused("run", write(NORMAL + "\nsampler = 3\n"))
    assert "variable sampler, which composeprob run uses, is of type int" in message


def test_of_several_programs_one_must_be_named(write):
    message = refused("run", write(NORMAL + SECOND))
    assert "2 programs: first, second" in message
    assert "scene.py:first" in message
    assert "its programs are: first, second" in refused("run", write(NORMAL + SECOND) + ":third")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "has no program"),
        ("import composeprob as cp\n@cp.program\ndef p(f): pass", "needs a value for its parameter 'f'"),
        ("import composeprob as cp\nprecision = 1\n@cp.program\ndef p(precision): pass", "a parameter 'precision'"),
    ],
)
def test_files_without_a_program_or_arguments(write, text, words):
    assert words in refused("run", write(text))


def test_meshes_that_are_none(write):
    file = write(NORMAL)
    assert "'8' is no mesh of ROWSxCOLUMNS devices" in refused("run", file, "--mesh", "8")
    assert "A mesh of 9x100 needs 900 devices" in refused("run", file, "--mesh", "9x100")


def test_no_such_file(tmp_path, write):
    assert "There is no file" in refused("run", tmp_path / "absent.py")
    assert "must end in .py" in refused("run", write("x = 1", "notes.txt"))


def test_capability_error_is_clean_and_names_the_place(write, tmp_path):
    message = refused("run", write(SCORE_ONLY), "--kernel", "hmc", "--out", tmp_path)
    assert "CapabilityError: HMC needs `energy`" in message
    assert "scene.py:9" in message


def test_error_in_the_users_own_file_keeps_its_traceback(write):
    result = command("run", write("1 / 0"))
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sampler", "ancestral", "--kernel", "hmc"], "runs no kernel, but --kernel"),
        (["--steps-per-level", "3"], "without the kernel that it is for"),
        (["--kernel", "mala", "--step-size", "small"], "--step-size is 'small'"),
        (["--kernel", "ula", "--step-size", "adaptive"], "ULA cannot use an Adaptive step size"),
        (["--kernel", "mala", "--step-size", "-1"], "-1"),
        (["--kernel", "ula", "--log-ratio", "line-integral"], "--kernel ula has no accept test, but --log-ratio"),
        (["--kernel", "uhmc", "--num-points", "3"], "--kernel uhmc has no accept test, but --num-points"),
        (["--kernel", "mala", "--num-points", "3"], "add --log-ratio line-integral"),
        (["--kernel", "mala", "--log-ratio", "line-integral", "--num-points", "1"], "at least 2"),
        (["--sampler", "ancestral", "--log-ratio", "exact"], "runs no kernel, but --log-ratio"),
        (["--chains", "0"], "at least 1"),
        (["--levels", "1"], "at least 2 levels"),
        (["--precision", "half"], "Unknown precision 'half'"),
        (["--resume"], "--resume was given, but no folder of checkpoints"),
        (["--no-resume"], "add --checkpoint-dir FOLDER"),
        (["--resume", "--checkpoint-dir", "absent"], "There is no checkpoint in"),
        (["--thin", "3"], "no draws to thin"),
        (["--sampler", "ancestral", "--draws", "3"], "Ancestral without a kernel cannot go on"),
        (["--distributed"], "start it with srun"),
    ],
)
def test_bad_options(write, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused("run", write(NORMAL), "--out", tmp_path, *options)


def test_a_finished_run_is_resumed_at_once_and_a_bad_out_loses_no_samples(write, tmp_path):
    options = ["--chains", 20, "--kernel", "ula", "--checkpoint-dir", tmp_path / "checkpoints"]
    first = command("run", write(NORMAL), *options, "--out", tmp_path / "a")
    assert first.exit_code == 0, first.output
    (tmp_path / "b").mkdir()
    other = refused("run", write(NORMAL), *options, "--seed", 1, "--out", tmp_path / "a")
    assert "belongs to another run" in other
    assert "choose another --checkpoint-dir, or start again: --no-resume" in other
    (tmp_path / "b" / "samples.png").mkdir()  # what is to be a file cannot be written
    again = command("run", write(NORMAL), *options, "--resume", "--out", tmp_path / "b")
    assert again.exit_code == 1, again.output
    spare = re.search(r"The samples are in (\S+samples.safetensors)", again.output)[1]
    np.testing.assert_array_equal(
        cp.Result.load(spare)["x"], cp.Result.load(tmp_path / "a" / "samples.safetensors")["x"]
    )


def test_options_make_the_sampler():
    def made(sampler="auto", kernel=None, steps=None, size=None):
        return make_sampler(SamplerName(sampler), KernelName(kernel) if kernel else None, steps, size, 4, 0.7)

    assert made() is None
    assert isinstance(made("ancestral"), cp.Ancestral)
    assert isinstance(made("smc").kernel, cp.MALA)
    assert made("smc").steps_per_level == 1
    hmc = made(kernel="hmc", steps=7, size="0.03")
    assert isinstance(hmc, cp.AnnealedMCMC)
    assert hmc.steps_per_level == 7
    assert (hmc.kernel.num_leapfrog, float(hmc.kernel.damping), float(hmc.kernel.step_size)) == pytest.approx(
        (4, 0.7, 0.03)
    )
    assert isinstance(made(kernel="mala").kernel.step_size, cp.Adaptive)
    schedule = cp.Schedule.cosine(5)
    for name, rule in (("ula", 0.1 * schedule.sigma**2), ("uhmc", 0.2 * schedule.sigma)):
        np.testing.assert_allclose(made(kernel=name).kernel.step_size.function(schedule), rule)


def test_options_make_the_log_ratio():
    def made(kernel, *options):
        return make_sampler(SamplerName.auto, KernelName(kernel), None, None, 3, 0.5, *options).kernel.log_ratio

    line = LogRatioName.line_integral
    assert made("hmc") == made("mala", LogRatioName.exact) == "exact"
    assert made("mala", line) == cp.LineIntegral(3, "simpson")
    assert made("hmc", line, 10) == cp.LineIntegral(10, "trapezoid")


@pytest.mark.slow
def test_a_line_integral_runs_on_scores_only(write, tmp_path):
    options = ["--kernel", "mala", "--log-ratio", "line-integral", "--chains", 50, "--out", tmp_path]
    result = command("run", write(SCORE_ONLY), *options)
    assert result.exit_code == 0, result.output
    assert "LineIntegral(num_points=3" in result.output
    assert json.loads((tmp_path / "results.json").read_text())["curl"] == {"g(x)": 0.0}


def test_arguments_come_from_defaults_and_variables(write):
    program, module = load_program(write(NORMAL))
    assert arguments(program, module) == {"f": module.f}  # scale keeps its default


def test_a_program_may_import_its_neighbours(write):
    write("value = 3", "neighbour.py")
    program, module = load_program(write("import neighbour\n" + NORMAL))
    assert module.neighbour.value == 3
    assert program.name == "first"


def test_imported_programs_do_not_make_a_choice_necessary(write):
    write(NORMAL + SECOND, "parts.py")
    own = "from parts import cp, f, first, second\n\n@cp.program\ndef whole(f):\n    return first(f)\n"
    program, _ = load_program(write(own))
    assert program.name == "whole"


def test_new_writes_a_project_and_no_file_over_another(tmp_path):
    folder = tmp_path / "mine"
    made = command("new", folder)
    assert made.exit_code == 0, made.output
    names = ["README.md", "network.py", "program.py", "test_program.py"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert (folder / "README.md").read_text().startswith("# mine\n")
    assert "composeprob run program.py" in made.output
    assert "exists and is not an empty folder" in refused("new", folder)


@pytest.mark.slow
def test_a_new_project_runs_with_one_command_and_passes_its_test(tmp_path, monkeypatch):
    command("new", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    shell = ["-c", "from composeprob.cli import app; app()"]
    for line in ([*shell, "run", "program.py", "--chains", "100"], ["-m", "pytest", "-q"]):
        environment = {**os.environ, "PYTHONPATH": str(Path(cp.__file__).parents[1])}
        subprocess.run([sys.executable, *line], env=environment, check=True, timeout=600)
    assert (tmp_path / "mine" / "weights.safetensors").exists()


@pytest.mark.parametrize("name", ["new", "run", "trust", "zoo", "train", "calibrate"])
def test_help_has_examples(name):
    text = command(name, "--help").output
    assert "Examples" in text
    assert f"composeprob {name}" in text


def test_zoo_lists_models_and_shows_cards():
    table = command("zoo").output
    for name in cp.zoo():
        assert name in table
    name = next(iter(cp.zoo()))
    card = command("zoo", name)
    assert card.exit_code == 0
    assert cp.zoo(name).text.splitlines()[0].lstrip("# ") in card.output
    assert "did you mean" in refused("zoo", "rong2d")


def test_calibrate_prints_what_it_found(monkeypatch):
    monkeypatch.setattr("composeprob.calibration.calibrate_model", lambda name, **options: f"{name} {options}")
    assert "ring2d {'retraining': 2, " in command("calibrate", "ring2d", "--retraining", 2).output
    assert "'conditions': {'label': 3}" in command("calibrate", "digits", "--given", "label=3").output
    assert "write it as --given label=3" in refused("calibrate", "digits", "--given", "label")


def test_train_passes_its_options_on(monkeypatch, tmp_path):
    seen = {}

    def train_model(name, **options):
        seen.update(name=name, **options)
        files = (tmp_path / "weights.safetensors", tmp_path / "metrics.json")
        return SimpleNamespace(finished=False, loss=[0.0] * 3, written=files)

    monkeypatch.setattr("composeprob.training.train_model", train_model)
    result = command("train", "ring2d", "--iterations", 5, "--out", tmp_path)
    assert result.exit_code == 0
    assert seen == {
        "name": "ring2d", "iterations": 5, "out": tmp_path, "checkpoint_dir": None, "retraining": 0, "replace": False,
    }  # fmt: skip
    assert f"wrote weights.safetensors, metrics.json into {tmp_path}\n" in result.output
    assert f'cp.load("ring2d", folder="{tmp_path}") loads it' in result.output
    assert "stopped after 3 steps; with --checkpoint-dir it could go on" in result.output
    other = command("train", "ring2d", "--retraining", 2, "--replace", "--checkpoint-dir", tmp_path)
    assert (seen["out"], seen["replace"], seen["retraining"]) == (None, True, 2)
    assert f'cp.load("ring2d", retraining=2, folder="{tmp_path}") loads it' in other.output
    assert "the same command goes on" in other.output
    assert "no model" in refused("zoo", "nothing")


def test_version():
    result = command("--version")
    assert result.exit_code == 0
    assert result.output == f"composeprob {cp.__version__}\n"
