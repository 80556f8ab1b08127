"""What a user gets: the wheel holds the zoo, and `make` explains itself where no suitable Python is found."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_holds_the_zoo_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    weights = {path.relative_to(ROOT / "models") for path in (ROOT / "models").glob("*/*.safetensors")}
    assert {f"composeprob/_models/{path.as_posix()}" for path in weights} <= names
    assert {name.split("/")[0] for name in names} == {"composeprob", f"composeprob-{version('composeprob')}.dist-info"}
    assert not [name for name in names if "checkpoints" in name or "__pycache__" in name]


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
