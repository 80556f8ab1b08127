"""What a user gets: the wheel holds the zoo, and `make` explains itself where no suitable Python is found."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tools.dependencies import closure, compatible
from tools.dependencies import main as dependencies

ROOT = Path(__file__).parents[1]


def built(project: Path, folder: Path) -> tuple[Path, set[str]]:
    """The wheel of a project and the names of its files."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(project)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return wheel, set(zipfile.ZipFile(wheel).namelist())


def test_the_wheels_hold_every_model_and_nothing_else(tmp_path):
    wheel, names = built(ROOT, tmp_path / "library")
    _, zoo = built(ROOT / "models", tmp_path / "zoo")
    weights = {
        file.relative_to(ROOT / "models").as_posix() for file in (ROOT / "models").glob("*/weights*.safetensors")
    }
    of = lambda files: {
        name.removeprefix("composeprob/models/")
        for name in files
        if name.endswith(".safetensors") and "/weights" in name
    }
    assert of(names) | of(zoo) == weights
    assert not names & zoo  # both are installed into one folder
    assert {"ring2d/weights.safetensors", "bar2d/weights.safetensors"} <= of(names)  # README's program
    assert wheel.stat().st_size <= 25_000_000
    assert {name.split("/")[0] for name in names} == {"composeprob", f"composeprob-{version('composeprob')}.dist-info"}
    others = {file.relative_to(ROOT / "models").as_posix() for file in (ROOT / "models").glob("*/*.*")} - weights
    assert {f"composeprob/models/{file}" for file in others} <= names  # cards, recipes, calibrations
    assert {"composeprob/py.typed", "composeprob/cli/template/program.py"} <= names
    assert not [name for name in names if re.search(r"checkpoints|__pycache__|pyproject", name)]
    assert {name for name in zoo if "/weights" not in name and ".dist-info/" not in name} == {
        "composeprob/models/LICENSE"
    }
    (told,) = [name for name in names if name.endswith("dist-info/METADATA")]
    shown = zipfile.ZipFile(wheel).read(told).decode()
    assert "pip install composeprob" in shown
    assert "_static" not in shown  # the picture, which is nowhere but in the repository
    assert not re.search(r"\]\((?!https?:)", shown)


def test_everything_is_of_one_version():
    own = version("composeprob")
    assert f"version: {own}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{own}]" in (ROOT / "CHANGELOG.md").read_text()
    for project, other in ((ROOT, "composeprob-zoo"), (ROOT / "models", "composeprob")):
        bounds = re.search(rf'"{other}([<>=.,0-9]+)"', (project / "pyproject.toml").read_text())[1]
        assert own in SpecifierSet(bounds)


def test_what_comes_along_is_named_and_free():
    """`pip install composeprob` brings nothing that docs/dependencies.md gives no reason for."""
    assert {"jaxlib", "numpyro", "xarray"} <= set(closure("composeprob"))
    assert dependencies("composeprob") == 0
    for licence in ("GPL-3.0-only", "MIT AND LGPL-2.1", "not stated", "Proprietary"):
        assert not compatible(licence)
    assert compatible("(MIT OR GPL-2.0) AND 0BSD")


def test_make_names_the_python_it_cannot_use(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), "env", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode != 0
    assert "needs Python >= 3.11" in run.stderr
    assert "Python 3.9.2" in run.stderr
    assert not (tmp_path / "venv").exists()


def test_constraints_are_versions_only():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert all(line.count("==") == 1 and "/" not in line and " " not in line for line in lines)


@pytest.mark.parametrize(("folder", "extras"), [("composeprob", ("hub", "text")), ("models", ())])
def test_every_import_is_a_declared_dependency(folder, extras):
    """A package that only the development environment brings would be missing for someone who installs the wheel.

    What only the training of a model needs, an extra brings.
    """
    files = [file for file in (ROOT / folder).rglob("*.py") if file.parent.name != "template"]  # of a project by itself
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module}
    imported = (
        {module.split(".")[0] for module in modules}
        - sys.stdlib_module_names
        - {"composeprob", "IPython", "arviz_stats"}
    )  # IPython: only inside a notebook; arviz_stats: a part of ArviZ 1.0
    required = [
        line
        for line in requires("composeprob") or []
        if "extra ==" not in line or any(re.search(rf"extra == .{extra}.$", line) for extra in extras)
    ]
    declared = {re.split(r"[^\w-]", line)[0].replace("_", "-") for line in required}
    providers = packages_distributions()
    by = lambda name: {provider.replace("_", "-") for provider in providers.get(name, [])}
    undeclared = {name for name in imported if not declared & by(name)}
    assert not undeclared, "declare these in pyproject.toml, and say why in docs/dependencies.md"
