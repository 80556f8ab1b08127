"""Processor time and compilations by file of tests:

    python -m pytest -p processor_times -m "not slow and core" tests/sampling

`--durations` has wall time, which other work on the machine prolongs.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import pytest

COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass
class Spent:
    """Processor seconds and compiled programs of the tests of a file.

    Attributes:
        seconds: processor seconds, those of processes that have ended too.
        programs: programs that XLA compiled, or that were read from the cache.
    """

    seconds: float = 0.0
    programs: int = 0


_files: defaultdict[str, Spent] = defaultdict(Spent)
_programs = 0


def _count(event: str, duration: float, **_: object) -> None:
    """Count a program."""
    global _programs
    _programs += event == COMPILED


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def pytest_configure() -> None:
    """Listen to JAX."""
    jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Add what a test takes, its fixtures included, to its file."""
    seconds = _processor_seconds()
    programs = _programs
    result = yield
    file = _files[item.nodeid.partition("::")[0]]
    file.seconds += _processor_seconds() - seconds
    file.programs += _programs - programs
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the files, the longest first."""
    terminalreporter.section("processor seconds, programs")
    for name, spent in sorted(_files.items(), key=lambda item: -item[1].seconds):
        line = f"{spent.seconds:8.1f} {spent.programs:6d}  {name}"
        terminalreporter.write_line(line)
    total = sum(spent.seconds for spent in _files.values())
    terminalreporter.write_line(f"{total:8.1f} in all")
