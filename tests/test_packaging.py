"""The package of a user: its wheel holds the zoo, imports load little, and a type
checker says something true."""

import ast
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from packaging.specifiers import SpecifierSet

import composeprob
import composeprob as cp
from composeprob.extras import EXTRAS
from composeprob.results.estimates import Genealogy
from tools.dependencies import closure, compatible
from tools.dependencies import main as dependencies

ROOT = Path(__file__).parents[1]


def built(project: Path, folder: Path) -> tuple[Path, set[str]]:
    """The wheel of a project and the names of its files."""
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(project),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return wheel, set(zipfile.ZipFile(wheel).namelist())


def weights_in(names: set[str]) -> set[str]:
    """Files of weights in a wheel, by their names in models/."""
    weights = {name for name in names if re.search("/weights.*safetensors$", name)}
    return {name.removeprefix("composeprob/models/") for name in weights}


def test_the_wheels_hold_every_model_and_nothing_else(tmp_path):
    wheel, names = built(ROOT, tmp_path / "library")
    _, zoo = built(ROOT / "models", tmp_path / "zoo")
    models = ROOT / "models"
    files = {file.relative_to(models).as_posix() for file in models.glob("*/*.*")}
    weights = {file for file in files if re.search("/weights.*safetensors$", file)}
    assert weights_in(names) | weights_in(zoo) == weights
    # Both are installed into one folder.
    assert not names & zoo
    # README's program needs these.
    of_readme = {"ring2d/weights.safetensors", "bar2d/weights.safetensors"}
    assert of_readme <= weights_in(names)
    assert wheel.stat().st_size <= 25_000_000
    assert {name.split("/")[0] for name in names} == {
        "composeprob",
        f"composeprob-{version('composeprob')}.dist-info",
    }
    # Cards, recipes, calibrations.
    assert {f"composeprob/models/{file}" for file in files - weights} <= names
    assert {"composeprob/py.typed", "composeprob/cli/template/program.py"} <= names
    unwanted = re.compile(r"checkpoints|__pycache__|pyproject")
    assert not [name for name in names if unwanted.search(name)]
    in_zoo = {name for name in zoo if ".dist-info/" not in name}
    beside = {name for name in in_zoo if "/weights" not in name}
    assert beside == {"composeprob/models/LICENSE"}
    (metadata,) = [name for name in names if name.endswith("dist-info/METADATA")]
    shown = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "pip install ." in shown
    assert "_static" not in shown  # the picture, which is nowhere but in the repository
    assert not re.search(r"\]\((?!https?:)", shown)


def digests(project: Path, folder: Path) -> dict[str, str]:
    """SHA-256 of the wheel and the sdist that a clone builds, by their names."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    subprocess.run(
        [*command, str(project)], check=True, capture_output=True, timeout=120
    )
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
    }


def test_two_clones_build_the_same_files(tmp_path):
    """Bit for bit, so that whoever builds a release can compare it with ours."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a clone")
    of_clones = []
    source = ROOT
    for name in ("one", "another"):
        clone = tmp_path / name
        command = ["git", "clone", "--quiet", "--depth=1", f"file://{source}"]
        command.append(str(clone))
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        # Of another time than the other clone's, which must not matter.
        os.utime(clone / "composeprob" / "__init__.py", (0, len(of_clones)))
        of_clones.append(digests(clone, tmp_path / f"dist-{name}"))
        # Here a commit may be made meanwhile.
        source = clone
    first, second = of_clones
    assert len(first) == 2
    assert first == second


def test_actions_are_pinned_to_commits():
    """A tag can be moved to other code by whoever owns an action; a commit cannot."""
    files = list((ROOT / ".github" / "workflows").glob("*.yml"))
    used = [
        line.split("uses:")[1].strip()
        for file in files
        for line in file.read_text().splitlines()
        if "uses:" in line
    ]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", action), action


def test_everything_is_of_one_version():
    current = version("composeprob")
    assert f"version: {current}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{current}]" in (ROOT / "CHANGELOG.md").read_text()
    for project, other in ((ROOT, "composeprob-zoo"), (ROOT / "models", "composeprob")):
        text = (project / "pyproject.toml").read_text()
        bounds = re.search(rf'"{other}([<>=.,0-9]+)"', text)[1]
        assert current in SpecifierSet(bounds)


def test_what_comes_along_is_named_and_free():
    """docs/dependencies.md gives a reason for all that the extra `all` brings."""
    assert {"jaxlib", "numpyro", "xarray"} <= set(closure("composeprob"))
    assert dependencies("composeprob[all]") == 0
    for licence in ("GPL-3.0-only", "MIT AND LGPL-2.1", "not stated", "Proprietary"):
        assert not compatible(licence)
    assert compatible("(MIT OR GPL-2.0) AND 0BSD")


def test_make_names_the_python_it_cannot_use(tmp_path):
    old = tmp_path / "python"
    old.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n'
    )
    old.chmod(0o755)
    command = [
        "make",
        "-C",
        str(ROOT),
        "env",
        f"VENV={tmp_path / 'venv'}",
        f"PYTHON={old}",
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode != 0
    assert "needs Python >= 3.12" in run.stderr
    assert "Python 3.9.2" in run.stderr
    assert not (tmp_path / "venv").exists()


def test_constraints_are_versions_only():
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        assert line.count("==") == 1
        assert "/" not in line
        assert " " not in line


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("composeprob", tuple(EXTRAS)), ("models", ("flax", "train"))],
)
def test_every_import_is_a_declared_dependency(folder, extras):
    """A package that only the development environment brings would be missing for
    someone who installs the wheel.

    An extra brings packages that only the training of a model needs.
    """
    # IPython is imported inside of a notebook only; arviz_stats is a part of ArviZ 1.0.
    others = {"composeprob", "IPython", "arviz_stats"}
    imported = imported_packages(ROOT / folder) - sys.stdlib_module_names - others
    declared = declared_packages(extras)
    providers = packages_distributions()
    undeclared = []
    for name in imported:
        distributions = {each.replace("_", "-") for each in providers.get(name, [])}
        if not declared & distributions:
            undeclared.append(name)
    assert not undeclared, (
        "declare these in pyproject.toml, and say why in docs/dependencies.md"
    )


def imported_packages(folder: Path) -> set[str]:
    """Top-level packages that the modules of a folder import anywhere."""
    packages = set()
    for file in folder.rglob("*.py"):
        if file.parent.name == "template":  # a project by itself
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                packages |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                packages.add(node.module.split(".")[0])
    return packages


def declared_packages(extras: tuple[str, ...]) -> set[str]:
    """Distributions that composeprob requires, alone and with some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {re.split(r"[^\w-]", line)[0] for line in lines}


# ── imports ───────────────────────────────────────────────────────────────────────────

USED = "import composeprob; composeprob.program"
KERNEL = """import sys, types
shell = types.SimpleNamespace(config={'IPKernelApp': 1})
sys.modules['ipywidgets'] = None
sys.modules['ipykernel.zmqshell'] = types.ModuleType('zmqshell')
sys.modules['IPython'] = types.SimpleNamespace(get_ipython=lambda: shell)"""
HEAVY = [
    "arviz",
    "blackjax",
    "flax",
    "matplotlib",
    "optax",
    "orbax",
    "scipy.optimize",
    "scipy.spatial",
    "tensorstore",
]


def warned(code, **variables):
    """A process that shows every warning, with its output."""
    command = [sys.executable, "-W", "default", "-c", code]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize(
    ("statement", "unwanted", "heard"),
    [
        ("import composeprob.cli", ["jax", "numpy"], False),
        (USED, HEAVY, False),
        ("import tqdm.auto", [], True),
    ],
)
def test_what_is_not_loaded_and_what_a_notebook_without_widgets_does_not_hear(
    statement, unwanted, heard
):
    loaded = f"[name for name in {unwanted} if name in sys.modules]"
    done = warned(f"{KERNEL}; {statement}; print({loaded})")
    assert done.stdout.strip() == "[]"
    assert ("IProgress not found" in done.stderr) == heard


def test_arviz_has_no_word_of_its_own_in_a_first_run(tmp_path):
    """It keeps the day of its last message in the user's cache, which is empty
    here."""
    code = "from composeprob.results.estimates import quiet_arviz; quiet_arviz()"
    assert "ArviZ" not in warned(code, XDG_CACHE_HOME=str(tmp_path)).stderr


def test_unknown_names():
    with pytest.raises(
        AttributeError, match=r"(?s)has no 'progam'.*did you mean 'program'"
    ):
        _ = composeprob.progam


def test_dir_lists_public_names_and_dunders_alone():
    """Neither the imports of the package's first module nor its submodules."""
    names = set(dir(composeprob))
    assert {"SMC", "program", "__version__"} <= names
    dunders = {name for name in names if name.startswith("__")}
    assert names - dunders == set(composeprob.__all__)
    assert all(name.endswith("__") for name in dunders)


def test_shapes_of_signatures_are_checked_in_the_tests():
    with pytest.raises(TypeCheckError):
        Genealogy(np.ones(3), np.zeros(2, int))


# ── types ─────────────────────────────────────────────────────────────────────────────

PROGRAM = """
import jax
import numpyro.distributions as dist

import composeprob as cp

ring, bar = cp.load("ring2d"), cp.load("bar2d")


@cp.program
def program(ring: cp.Factor, bar: cp.Factor, y: float = 0.3) -> None:
    x = cp.sample("x", ring * bar**0.5 / ring)
    cp.observe("y", dist.Normal(x[0], 0.1), y)


density = cp.compile(program, ring, bar, y=0.2)
sampler = cp.SMC(cp.MALA(cp.Adaptive()), steps_per_level=2)
result = cp.infer(density, jax.random.key(0), num_chains=100, sampler=sampler)
if result.status.ok:
    print(result.summary(), result.mean(lambda sample: sample["x"]).interval(0.9))
result.plot().savefig("samples.png")
ula = cp.ULA(lambda levels: 0.1 * levels.sigma**2)
kernels = [cp.MALA(0.1), ula, cp.HMC(metric={"x": 0.1})]
"""
WRONG = {
    'cp.infer(density, jax.random.key(0), num_chains="many")': "arg-type",
    "cp.infer(density, jax.random.key(0))": "call-arg",
    "cp.infer(density, jax.random.key(0), num_chains=9, sampler=cp.MALA())": "arg-type",
    "cp.smc()": "attr-defined",
    "result.plott()": "attr-defined",
    'cp.Schedule.cosine("100")': "arg-type",
    'cp.MALA({"x": 0.1})': "arg-type",
    'cp.zoo("bar2d").sigma': "attr-defined",
}
ANY = 1 / 400
"""Lines of the package that say `Any`, of all: less is better, more needs a reason."""


def test_few_lines_say_any():
    """`Any` tells neither a reader nor a type checker anything."""
    lines = set()
    total = 0
    for path in Path(cp.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        total += text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Name) and node.id == "Any":
                lines.add((path, node.lineno))
    assert 0 < len(lines) <= ANY * total


@pytest.mark.slow
def test_a_users_program_is_checked(tmp_path):
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(PROGRAM)
    wrong.write_text(PROGRAM + "\n".join(WRONG) + "\n")
    options = [
        "--check-untyped-defs",
        "--ignore-missing-imports",
        "--follow-imports=silent",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(right), str(wrong)],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in run.stdout.splitlines() if "error:" in line]
    first = len(PROGRAM.splitlines()) + 1
    for line, (statement, code) in enumerate(WRONG.items(), first):
        of_line = [error for error in errors if error.startswith(f"wrong.py:{line}:")]
        assert any(f"[{code}]" in error for error in of_line), statement
    # And no error of the program, which is right.
    assert len(errors) == len(WRONG), errors
