"""Python in a process of its own: devices are made when JAX starts, and what is
imported or compiled is new there."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def environment(devices: int | None = None, **variables: str) -> dict[str, str]:
    """This process's, with the tests on Python's path, and for JAX this number of
    virtual devices."""
    path = os.pathsep.join(
        [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    )
    known = {**os.environ, "PYTHONPATH": path}
    if devices:
        flags = f"{known.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        known |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return known | variables


HASTE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "True"}
"""For a process that compiles as quick tests do, without LLVM's optimisations."""


def said(
    script: str,
    *arguments: Any,
    devices: int | None = None,
    timeout: int = 1800,
    **variables: str,
) -> list[str]:
    """The lines that a script prints, which must end without an error."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    known = environment(devices, **variables)
    run = subprocess.run(
        command, env=known, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()
