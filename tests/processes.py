"""Python in a process of its own: devices are made when JAX starts, and imports and
compiled code are new there."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def environment(devices: int | None = None, **variables: str) -> dict[str, str]:
    """Variables of this process, with the tests on Python's path, and for JAX this
    number of virtual devices."""
    places = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    inherited = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    if devices:
        flags = inherited.get("XLA_FLAGS", "")
        inherited["XLA_FLAGS"] = (
            f"{flags} --xla_force_host_platform_device_count={devices}"
        )
        inherited["JAX_PLATFORMS"] = "cpu"
    return inherited | variables


HASTE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "True"}
"""For a process that compiles as quick tests do, without LLVM's optimisations."""


def said(
    script: str,
    *arguments: Any,
    devices: int | None = None,
    timeout: int = 1800,
    **variables: str,
) -> list[str]:
    """Lines that a script prints; it must end without an error."""
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment(devices, **variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()
