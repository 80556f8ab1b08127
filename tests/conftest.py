"""What keeps one process that runs many tests alive and cheap, and checks of shapes
that signatures promise."""

import gc
import os

import jax
import pytest
from jaxtyping import install_import_hook

SHAPES = ("composeprob.results.estimates", "composeprob.metrics.distances")
"""Modules whose annotations, shapes included, are checked at every call."""
install_import_hook(SHAPES, "typechecked.typechecked")

MAPS = 40_000
"""Memory maps from which on compiled code is let go: tests compile outside of
`cp.infer` too, which sees to that."""

HASTE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""XLA compiles for a processor in half the time so, by LLVM directly instead of MLIR
first, in one piece."""

jax.config.update(
    "jax_disable_most_optimizations", True
)  # for fixtures of modules, which come before the next one
jax.config.update(
    "jax_traceback_in_locations_limit", 0
)  # writing down where operations stand is a fifth of all


def pytest_configure(config: pytest.Config) -> None:
    """Where only quick tests run, XLA compiles in haste in this process and in those
    that tests start; `make test-all` runs the same tests with the code that users
    get."""
    if config.option.markexpr == "not slow":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {HASTE}"


def pytest_collection_finish() -> None:
    """What modules hold is there to stay: garbage is not looked for in it each time
    anew."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _compile_in_haste(request: pytest.FixtureRequest):
    """Quick tests compile more than they compute: they go without LLVM's optimisations,
    which slow tests, examples and subprocesses have. XLA's passes over the program as a
    whole are the same."""
    jax.config.update(
        "jax_disable_most_optimizations",
        request.node.get_closest_marker("slow") is None,
    )


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
