"""Programs that a failing test had compiled, printed beside its error."""

import pytest
from _pytest._code import Traceback


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Print the programs that a failing test had compiled."""
    report = yield
    if report.failed and call.excinfo is not None:
        for number, text in enumerate(programs(call.excinfo.traceback)):
            report.sections.append((f"program {number}", text))
    return report


def programs(traceback: Traceback) -> list[str]:
    """Return the compiled densities among the variables of a traceback, printed."""
    from composeprob.density.annealed import AnnealedDensity  # not before XLA's flags

    shown: dict[str, None] = {}
    for entry in traceback:
        for value in entry.frame.f_locals.values():
            density = getattr(value, "density", value)
            if isinstance(density, AnnealedDensity):
                shown[str(density)] = None
    return list(shown)
