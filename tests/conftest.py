"""Settings that keep one process of many tests alive and cheap, and checks of the
shapes in signatures."""

import gc
import os

import jax
import pytest
from families import marks
from jaxtyping import install_import_hook

from failures import pytest_runtest_makereport as pytest_runtest_makereport
from messages import _message_snapshots as _message_snapshots

SHAPES = ("composeprob.results.estimates", "composeprob.metrics.distances")
"""Modules whose annotations, shapes included, are checked at every call."""
install_import_hook(SHAPES, "typechecked.typechecked")

MAPS = 40_000
"""Memory maps from which on compiled code is released: `cp.infer` does so, and tests
also compile outside of it."""

HASTE = "--xla_cpu_parallel_codegen_split_count=1"
"""With this flag XLA compiles for a processor in one piece, which is faster. A version
of XLA that does not know a flag ends the process."""

# For fixtures of modules, which run before `_compile_in_haste`.
jax.config.update("jax_disable_most_optimizations", True)
# A fifth of the time would go into writing down the places of operations.
jax.config.update("jax_traceback_in_locations_limit", 0)


def pytest_configure(config: pytest.Config) -> None:
    """Let XLA compile in haste where only quick tests run, in this process and in those
    that tests start.

    `make test-all` runs the same tests with the code that users get.
    """
    if "not slow" in config.option.markexpr:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {HASTE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its family, or as one of the core."""
    for item in items:
        for mark in marks(item.nodeid):
            item.add_marker(mark)


def pytest_collection_finish() -> None:
    """Exclude the objects of imported modules from garbage collection: they stay."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _compile_in_haste(request: pytest.FixtureRequest):
    """Compile quick tests without LLVM's optimisations, as they compile more than they
    compute.

    Slow tests, examples and subprocesses have them. XLA's passes over the program as a
    whole are the same.
    """
    quick = request.node.get_closest_marker("slow") is None
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="module")
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def double_alone():
    """Double precision for one test of a module."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def _let_go_of_compiled_code():
    yield
    from composeprob.runtime.compiled import make_room  # not before XLA's flags are set

    make_room(MAPS)
