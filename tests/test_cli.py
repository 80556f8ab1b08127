"""The command `composeprob`: its runs, its files, and its refusals."""

import inspect
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
import refusals
from composeprob import settings
from composeprob.cli import app
from composeprob.cli.programs import arguments, compiled, load_program, presets
from composeprob.errors import InvalidValueError
from messages import check_wording
from processes import HASTE, environment
from tools.calibrate import main as calibrate

SHELL = [sys.executable, "-c", "from composeprob.cli import app; app()"]

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

FEW_PROGRAMS = "cp.SMC(cp.MALA(0.1), step=cp.ReverseStep(order=1), check_levels=False)"


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="scene.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def command(*arguments):
    # wide, so that no message is wrapped
    return CliRunner().invoke(
        app,
        [str(a) for a in arguments],
        env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"},
    )


def refused(*arguments):
    """The message of a command that must end with exit code 2 and no traceback."""
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "Fix:" in result.output
    message = " ".join(result.output.split())
    check_wording(message)
    return message


def test_run_prints_and_writes(write, tmp_path):
    out = tmp_path / "out"
    # The command has no such options: the file's settings count.
    settings = """
num_chains = 300
sampler = cp.SMC(cp.MALA(0.1), check_levels=False, step=cp.ReverseStep(order=1))
"""
    file = write(NORMAL + settings)
    result = command("run", file, "--seed", 3, "--out", out, "--no-cache")
    assert result.exit_code == 0, result.output
    for text in (
        "AnnealedDensity of program 'first'",
        "x[0]",
        "SMC",
        "evaluations",
        "OK",
        "results.json",
    ):
        assert text in result.output
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
    mean = saved["x"][:, 1].mean()
    assert numbers["summary"]["x[1]"]["mean"] == pytest.approx(mean, abs=1e-4)


SETTINGS = """
import numpy as np

sampler = cp.AnnealedMCMC(cp.HMC(0.1, num_leapfrog=2), steps_per_level=2)
num_chains, levels, chunk, precision = 50, np.linspace(6, -6, 6), 25, "bfloat16"
draws = cp.Draws(3, thin=2)
"""


def test_a_file_says_how_it_is_sampled(write, tmp_path, monkeypatch):
    """Variables reach `infer` and `compile`; options of the command replace them."""
    seen = {}
    infer = cp.infer
    compiled = cp.compile

    def recorded_infer(*args, **kwargs):
        seen.update(kwargs)
        return infer(*args, **kwargs)

    def recorded_compile(*args, **kwargs):
        seen.update(kwargs)
        return compiled(*args, **kwargs)

    monkeypatch.setattr("composeprob.api.infer", recorded_infer)
    monkeypatch.setattr("composeprob.api.compile", recorded_compile)
    target = f"{write(NORMAL + SECOND + SETTINGS)}:second"
    options = ("--chains", 30, "--out", tmp_path, "--mesh", "1x1", "--no-cache")
    result = command("run", target, *options)
    assert result.exit_code == 0, result.output
    assert seen["num_chains"] == 30
    assert seen["chunk"] == 25
    assert seen["precision"] == "bfloat16"
    assert seen["draws"].number == 3
    assert seen["draws"].thin == 2
    saved = cp.Result.load(tmp_path / "samples.safetensors")
    assert "AnnealedMCMC(HMC" in saved.about.sampler
    assert saved["y"].shape == (30, 3, 2)
    levels = np.linspace(6, -6, 6)
    np.testing.assert_allclose(saved.levels["log_snr"], levels, atol=1e-4)


def test_run_has_few_options():
    """A program's settings are in its file; options depend on machine or moment."""
    (run,) = (c for c in app.registered_commands if c.callback.__name__ == "run")
    options = inspect.signature(run.callback).parameters.keys() - {"target"}
    assert options == {
        "model",
        "chains",
        "seed",
        "out",
        "checkpoint_dir",
        "mesh",
        "distributed",
        "no_cache",
    }


def test_compiled_code_is_kept_in_a_private_folder_unless_told_not_to(
    monkeypatch, tmp_path
):
    set_to = {}
    monkeypatch.setattr("jax.config.update", set_to.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(settings, "default_cache", lambda: tmp_path / "composeprob")
    from composeprob.cli.app import keep_compiled

    keep_compiled(True)
    assert set_to == {}
    keep_compiled(False)
    assert set_to["jax_compilation_cache_dir"] == str(tmp_path / "composeprob")
    assert (tmp_path / "composeprob").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    refusals.refused(
        lambda: cp.cache(tmp_path / "open"), InvalidValueError, "Others may write into"
    )
    (tmp_path / "file").write_text("")
    refusals.refused(
        lambda: cp.cache(tmp_path / "file"), InvalidValueError, "cannot be kept in"
    )
    for age, name in enumerate(("new", "old", "oldest")):
        (tmp_path / f"{name}-cache").write_bytes(b"12345")
        os.utime(tmp_path / f"{name}-cache", (1e9 - age, 1e9 - age))
    settings.cut(tmp_path, 10)
    assert sorted(file.name for file in tmp_path.glob("*-cache")) == [
        "new-cache",
        "old-cache",
    ]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    set_to.clear()
    assert cp.cache() == tmp_path / "mine"
    assert set_to == {}, "JAX reads its own settings"


def test_the_first_run_says_where_compiled_code_is_kept(write, tmp_path, monkeypatch):
    """It says so once; the next process finds all code that the first one kept."""
    # JAX's log has the cache hits, however fast the machine is.
    home = tmp_path / "home"
    variables = environment(XDG_CACHE_HOME=str(home), JAX_LOG_COMPILES="1", **HASTE)
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    file = write(NORMAL + f"sampler = {FEW_PROGRAMS}")
    call = [*SHELL, "run", file, "--chains", "8", "--out", str(tmp_path / "out")]

    def errors_of_a_run(seed):
        """Standard error of a run; the order of sets depends on the seed."""
        run = subprocess.run(
            call,
            env={**variables, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return run.stderr

    first = errors_of_a_run("0")
    files = (home / "composeprob").glob("*-cache")
    kept = {file.name.removesuffix("-cache") for file in files}
    second = errors_of_a_run("1")
    assert "Compiled code is kept in" in first
    assert "Compiled code is kept in" not in second
    assert kept
    hits = re.findall(r"compilation cache hit for .* with key '(.*?)'", second)
    assert set(hits) >= kept, "the second run found all code of the first"


def test_error_in_the_users_own_file_keeps_its_traceback(write):
    result = command("run", write("1 / 0"))
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


PROGRAM = "import composeprob as cp\n@cp.program\n"
BY_SCORE = """
f = cp.Diffusion(
    lambda x, t: -x, schedule, event_shape=(2,), parameterization='score'
)
sampler = cp.SMC(cp.HMC())
"""
# Text of the file; the rest of the command after the file; names and numbers of the
# message.
REFUSED = [
    (NORMAL + SECOND, "", "first, second.*scene.py:first"),
    (NORMAL + SECOND, ":third", "first, second"),
    ("x = 1", "", "scene.py"),
    (PROGRAM + "def p(f): pass", "", "'f'"),
    (PROGRAM + "def p(precision): pass\nprecision = 1", "", "'precision'"),
    (NORMAL + BY_SCORE, "", r"CapabilityError: HMC.*`energy`.*\(scene.py:12\)"),
    (NORMAL, " --chains 0", " 1"),
    (NORMAL, " --distributed", "srun"),
    (NORMAL, " --mesh 8", "'8'"),
    (NORMAL, " --mesh 9x100", "9x100.* 900 "),
    (
        NORMAL + "sampler = 3",
        "",
        "sampler.* int",
    ),
    (NORMAL + "sampler = cp.Ancestral", "", "sampler.* the class Ancestral"),
    (NORMAL + "thin = 0.5", "", "thin.* float"),
    (
        NORMAL + "levels = 60",
        "",
        'levels.* int.*"adaptive"',
    ),
    (NORMAL + "num_chains = 'many'", "", "num_chains.* str"),
    (NORMAL + "chunk = 2.5", "", "chunk.* float"),
    (NORMAL + "precision = 'half'", "", "'half'"),
    (
        NORMAL + "checkpoint_dir = cp.Checkpoint('absent', resume=True)",
        "",
        "absent",
    ),
    (
        NORMAL + "sampler, draws = cp.Ancestral(), 3",
        "",
        "Ancestral",
    ),
    (
        NORMAL + "draws = [3]",
        "",
        r"cp.Draws\(1000, thin=5\)",
    ),
]


@pytest.mark.parametrize(("text", "rest", "facts"), REFUSED)
def test_what_cannot_be_run_is_refused(write, tmp_path, monkeypatch, text, rest, facts):
    monkeypatch.chdir(tmp_path)
    arguments = (write(text) + rest).split()
    assert re.search(facts, refused("run", *arguments, "--out", tmp_path, "--no-cache"))


def test_no_such_file(tmp_path, write):
    assert "absent.py" in refused("run", tmp_path / "absent.py")
    assert "notes.txt" in refused("run", write("x = 1", "notes.txt"))


def test_a_finished_run_is_resumed_at_once_and_a_bad_out_loses_no_samples(
    write, tmp_path
):
    options = [
        "--chains",
        20,
        "--checkpoint-dir",
        tmp_path / "checkpoints",
        "--no-cache",
    ]
    file = write(NORMAL + "\nsampler = cp.AnnealedMCMC(cp.ULA(0.1), 3)\n")
    first = command("run", file, *options, "--out", tmp_path / "a")
    assert first.exit_code == 0, first.output
    (tmp_path / "b").mkdir()
    other = refused("run", file, *options, "--seed", 1, "--out", tmp_path / "a")
    assert "belongs to another run" in other
    advice = (
        "choose another --checkpoint-dir, or in the file "
        "cp.Checkpoint(folder, resume=False)"
    )
    assert advice in other
    (tmp_path / "b" / "samples.png").mkdir()  # what is to be a file cannot be written
    again = command("run", file, *options, "--out", tmp_path / "b")
    assert again.exit_code == 1, again.output
    spare = re.search(r"(\S+samples\.safetensors)", again.output)[1]
    rescued = cp.Result.load(spare)
    saved = cp.Result.load(tmp_path / "a" / "samples.safetensors")
    np.testing.assert_array_equal(rescued["x"], saved["x"])


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(write, tmp_path):
    blocked = Path(write("", "file")) / "out"
    file = write(NORMAL)
    message = refused("run", file, "--out", blocked)
    assert f"No result can be written to --out {blocked}" in message
    message = refused("train", "ring2d", "--out", blocked, "--no-cache")
    assert f"No model can be written to {blocked}" in message


def test_arguments_come_from_defaults_and_variables_and_modules_from_beside_a_program(
    write,
):
    write("value = 3", "neighbour.py")
    program, module = load_program(write("import neighbour\n" + NORMAL))
    assert module.neighbour.value == 3
    assert program.name == "first"
    assert arguments(program, module, {}) == {"f": module.f}  # scale keeps its default


def test_imported_programs_do_not_make_a_choice_necessary(write):
    write(NORMAL + SECOND, "parts.py")
    whole = """
from parts import cp, f, first, second

@cp.program
def whole(f):
    return first(f)
"""
    program, _ = load_program(write(whole))
    assert program.name == "whole"


def test_new_writes_a_project_and_no_file_over_another(tmp_path):
    folder = tmp_path / "mine"
    made = command("new", folder)
    assert made.exit_code == 0, made.output
    names = ["README.md", "network.py", "program.py", "test_program.py"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert (folder / "README.md").read_text().startswith("# mine\n")
    assert "composeprob run program.py" in made.output
    assert folder.name in refused("new", folder)
    # The command that is printed is one of a shell.
    assert "cd '" in command("new", tmp_path / "two words").output


@pytest.mark.slow
def test_a_new_project_runs_with_one_command_and_passes_its_test(tmp_path, monkeypatch):
    command("new", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    for line in (
        [*SHELL, "run", "program.py", "--chains", "100"],
        [sys.executable, "-m", "pytest", "-q"],
    ):
        subprocess.run(line, env=environment(), check=True, timeout=600)
    assert (tmp_path / "mine" / "weights.safetensors").exists()


@pytest.mark.parametrize("name", ["new", "run", "zoo", "train", "devices"])
def test_help_has_examples(name):
    size = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "LINES": "50"}
    bare = {"NO_COLOR": "1", "TERM": "dumb"}
    text = CliRunner().invoke(app, [name, "--help"], env=size | bare).output
    assert text.count(f"composeprob {name}") > 1  # in its usage and in its examples
    check_wording(text)


def test_zoo_lists_models_and_shows_cards():
    table = command("zoo").output
    for name in cp.zoo():
        assert name in table
    narrow = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    page = CliRunner().invoke(app, ["zoo"], env=narrow).output.splitlines()
    assert max(map(len, page)) <= 80
    names = tuple(cp.zoo())
    lines = [line for line in page if line.startswith(names)]
    assert len(lines) == len(names), "a line each"
    assert "score error" not in "\n".join(page), "no legend of columns that are hidden"
    titles = {card.name: card.title for card in cp.zoo().values()}
    for line in lines:
        shown = line.split(maxsplit=2)[2].strip().removesuffix(" …")
        words = titles[line.split()[0]].split()
        assert shown.split() == words[: len(shown.split())], "whole words"
    name = next(iter(cp.zoo()))
    card = command("zoo", name)
    assert card.exit_code == 0
    assert cp.zoo(name).text.splitlines()[0].lstrip("# ") in card.output
    assert "'ring2d'" in refused("zoo", "rong2d")


def test_calibrate_prints_what_it_found(monkeypatch, capsys):
    monkeypatch.setattr(
        "tools.calibrate.calibrate_model", lambda name, **options: f"{name} {options}"
    )
    assert calibrate(["ring2d", "--retraining", "2"]) == 0
    assert "ring2d {'retraining': 2, " in capsys.readouterr().out
    assert calibrate(["digits", "--given", "label=3"]) == 0
    assert "'conditions': {'label': 3}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        calibrate(["digits", "--given", "label"])
    assert "write --given label=3" in capsys.readouterr().err


def test_train_passes_its_options_on(monkeypatch, tmp_path):
    seen = {}

    def train_model(name, **options):
        seen.update(name=name, **options)
        files = (tmp_path / "weights.safetensors", tmp_path / "metrics.json")
        return SimpleNamespace(finished=False, loss=[0.0] * 3, written=files)

    monkeypatch.setattr("composeprob.models.making.train_model", train_model)
    result = command(
        "train", "ring2d", "--iterations", 5, "--out", tmp_path, "--no-cache"
    )
    assert result.exit_code == 0
    assert seen == {
        "name": "ring2d",
        "iterations": 5,
        "out": tmp_path,
        "checkpoint_dir": None,
        "retraining": 0,
        "replace": False,
    }
    assert f"weights.safetensors, metrics.json into {tmp_path}\n" in result.output
    assert f'cp.load("ring2d", folder="{tmp_path}")' in result.output
    assert re.search(" 3 .*--checkpoint-dir", result.output)
    check_wording(result.output)
    other = command(
        "train",
        "ring2d",
        "--retraining",
        2,
        "--replace",
        "--checkpoint-dir",
        tmp_path,
        "--no-cache",
    )
    assert (seen["out"], seen["replace"], seen["retraining"]) == (None, True, 2)
    assert (
        f'cp.load("ring2d", retraining=2, folder="{tmp_path}") loads it' in other.output
    )
    assert "the same command goes on" in other.output
    assert "no model" in refused("zoo", "nothing")


def test_version():
    result = command("--version")
    assert result.exit_code == 0
    assert result.output == f"composeprob {cp.__version__}\n"


def test_a_variable_named_nearly_as_a_setting_is_told(tmp_path):
    module = SimpleNamespace(num_chain=16, levels_of_care=3, sampler=None)
    with pytest.warns(UserWarning, match="num_chain is no setting .* num_chains"):
        assert presets(module) == {"num_chains": 1000}


def test_a_schedule_beside_the_levels_of_a_run_is_told(write):
    """Its name is that of an argument of `compile`, which the run does not pass on."""
    file = write(NORMAL + "schedule = cp.Schedule.log_snr(7)")
    with pytest.warns(UserWarning, match=r"schedule is no setting .* levels = "):
        compiled(file)
    file = write(NORMAL + "levels = cp.Schedule.log_snr(7).log_snr\nthin = 3")
    assert compiled(file).settings["thin"] == 3


def test_the_package_is_a_command_too_and_its_names_start_no_devices():
    """Processes that meet, and settings of devices, come before these."""
    shown = subprocess.run(
        [sys.executable, "-m", "composeprob", "--help"],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    assert "zoo" in shown.stdout
    code = (
        "from composeprob import api; from jax._src import xla_bridge; "
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
