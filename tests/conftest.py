"""What keeps compiled code from one run of the tests to the next, and one process that runs many of them alive."""

import os
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
SETTINGS = {
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
"""Four fifths of the suite's time is XLA's. In the environment, so that the processes which tests start have them too;
before JAX is imported, which reads them then."""
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402

MAPS = 40_000
"""Memory maps (Linux allows 65,530) from which on compiled code is let go: every executable of XLA's CPU backend holds
some, and a process that runs out of them dies."""


@pytest.fixture(scope="module", autouse=True)
def _let_go_of_compiled_code():
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and len(maps.read_bytes().splitlines()) > MAPS:
        jax.clear_caches()
