"""Cost of the progress bar: runs with and without it, in one process.

The terminal is simulated.

    python -m benchmarks progress-bar

Runs alternate, so that whatever else the machine does hits both; the ratio is that of
the medians. Exits with 1 if the bar costs 1 % or more.
"""

from __future__ import annotations

import io
import statistics
import sys
import time

import jax
from mode_weights import ring_product
from report import publish
from rich.console import Console

import composeprob as cp
from composeprob.runtime import progress as bar

PAIRS, CHAINS = 15, 4000


class Terminal(bar.Progress):
    """A bar that draws as on a terminal, into memory."""

    def __init__(self, total: int = 0, enabled: bool = True, description: str = ""):
        super().__init__(total, enabled, description)
        if enabled:
            self._console = Console(file=io.StringIO(), force_terminal=True, width=100)
            self._kind = "terminal"


def main() -> int:
    from composeprob.runtime import stages as driver

    driver.Progress = Terminal  # type: ignore[misc]
    density = ring_product().compile(cp.Schedule.log_snr(200))
    sampler = cp.AnnealedMCMC(cp.HMC(0.03, num_leapfrog=3), 3)

    def seconds(progress: bool) -> float:
        began = time.process_time()
        cp.infer(
            density,
            jax.random.key(0),
            num_chains=CHAINS,
            sampler=sampler,
            progress=progress,
        )
        return time.process_time() - began

    seconds(True)
    seconds(False)  # both compiled
    pairs = [(seconds(False), seconds(True)) for _ in range(PAIRS)]
    without, with_bar = (
        statistics.median(column) for column in zip(*pairs, strict=True)
    )
    ratio = statistics.median(b / a for a, b in pairs)
    rows = [
        ["without", f"{without:.3f}"],
        ["with", f"{with_bar:.3f}"],
        ["ratio, median of pairs", f"{ratio:.4f}"],
    ]
    checks = {"the bar costs less than 1 % of processor time": ratio < 1.01}
    details = {
        "without": [a for a, _ in pairs],
        "with": [b for _, b in pairs],
        "ratio": ratio,
    }
    title = f"The progress bar: {CHAINS} chains, 200 levels, processor seconds of a run"
    return publish(
        "progress_bar", title, ["progress", "seconds"], rows, checks, details
    )


if __name__ == "__main__":
    sys.exit(main())
