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

ROOT = Path(__file__).parents[1]


def test_wheel_holds_the_zoo_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    weights = {path.relative_to(ROOT / "models") for path in (ROOT / "models").glob("*/*.safetensors")}
    assert {f"composeprob/models/{path.as_posix()}" for path in weights} <= names
    assert {name.split("/")[0] for name in names} == {"composeprob", f"composeprob-{version('composeprob')}.dist-info"}
    assert not [name for name in names if "checkpoints" in name or "__pycache__" in name]
    (told,) = [name for name in names if name.endswith("dist-info/METADATA")]
    shown = zipfile.ZipFile(wheel).read(told).decode()
    assert "pip install composeprob" in shown
    assert "_static" not in shown  # the picture, which is nowhere but in the repository
    assert not re.search(r"\]\((?!https?:)", shown)


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


@pytest.mark.parametrize(("folder", "extras"), [("composeprob", ("hub", "text")), ("models", ("digits",))])
def test_every_import_is_a_declared_dependency(folder, extras):
    """A package that only the development environment brings would be missing for someone who installs the wheel.

    What only the training of a model needs, an extra brings.
    """
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / folder).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module}
    imported = (
        {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"composeprob", "IPython"}
    )  # IPython: only inside a notebook
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
