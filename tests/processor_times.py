"""Processor time and compilations by file of tests, and of the costliest tests:

    python -m pytest -p processor_times -m "not slow and core" tests/sampling

`--durations` has wall time, which other work on the machine prolongs. With
PROCESSOR_TIMES=FILE each test that has ended is a line of this file as well: its id,
its processor seconds and its programs, between tabs.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import pytest

COMPILED = "/jax/core/compile/backend_compile_duration"
COSTLIEST = 40
"""Tests that are printed."""


@dataclass
class Spent:
    """Processor seconds and compiled programs of a test, or of those of a file.

    Attributes:
        seconds: processor seconds, those of processes that have ended too.
        programs: programs that XLA compiled, or that were read from the cache.
    """

    seconds: float = 0.0
    programs: int = 0


_files: defaultdict[str, Spent] = defaultdict(Spent)
_tests: dict[str, Spent] = {}
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
    spent = Spent(_processor_seconds() - seconds, _programs - programs)
    _tests[item.nodeid] = spent
    file = _files[item.nodeid.partition("::")[0]]
    file.seconds += spent.seconds
    file.programs += spent.programs
    _write(item.nodeid, spent)
    return result


def _write(test: str, spent: Spent) -> None:
    """Add a line to the file that PROCESSOR_TIMES names."""
    path = os.environ.get("PROCESSOR_TIMES")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{test}\t{spent.seconds:.2f}\t{spent.programs}\n")


def _lines(spent: Mapping[str, Spent]) -> list[str]:
    """Return a line for each name, the longest first."""
    names = sorted(spent, key=lambda name: -spent[name].seconds)
    lines = []
    for name in names:
        one = spent[name]
        lines.append(f"{one.seconds:8.1f} {one.programs:6d}  {name}")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the files and the costliest tests, the longest first."""
    terminalreporter.section("processor seconds, programs")
    for line in _lines(_files):
        terminalreporter.write_line(line)
    total = sum(spent.seconds for spent in _files.values())
    terminalreporter.write_line(f"{total:8.1f} in all, of which")
    for line in _lines(_tests)[:COSTLIEST]:
        terminalreporter.write_line(line)
