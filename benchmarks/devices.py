"""Cost of `chunk=`, with which samples are the same on any number of devices.

Learned ring × bar runs on one and on eight devices.

    python -m benchmarks devices

Eight virtual devices share the cores of this machine with the one, so what they cost
more is what spreading costs. Processor time of three levels, alternating in one
process; ratios are medians over the repeats.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import sys
import time
from typing import Any

import jax
import numpy as np
from plane.tasks import product
from report import publish

import composeprob as cp
from composeprob.runtime.compiled import advance, start
from composeprob.samplers.run import Visits, begin, placed
from composeprob.samplers.spread import Spread, everywhere

CHAINS, REPEATS, LEVELS = 2000, 9, 3
CASES = [(1, None), (1, 1000), (1, 250), (1, 125), (8, None), (8, 250), (8, 125)]
"""(devices, chains in one evaluation); the first is what the others are compared
with."""
LIMIT = 1.10


def main() -> int:
    density = cp.compile(product, cp.load("ring2d"), cp.load("bar2d"))
    sampler = cp.AnnealedMCMC(cp.MALA(0.001), 5).prepare(density)
    first = sampler.first_level(density)

    def prepared(devices: int, chunk: int | None) -> Any:
        mesh = None
        if devices > 1:
            mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("chains",))
        spread = Spread.checked(mesh, chunk, CHAINS)
        visits = Visits.every(first, density.num_levels)
        run = placed(begin(jax.random.key(0), CHAINS, visits, spread), spread)
        placed_sampler, placed_density = spread.place((sampler, density), everywhere)
        run = start(placed_sampler, run, placed_density, first)

        def levels(end: int) -> float:
            nonlocal run
            began = time.process_time()
            number = spread.number
            run = jax.block_until_ready(
                advance(placed_sampler, run, placed_density, number(end), number(0))
            )
            return time.process_time() - began

        levels(1)  # compiled
        return levels

    runs = {case: prepared(*case) for case in CASES}
    seconds = np.array(
        [[run(1 + (r + 1) * LEVELS) for run in runs.values()] for r in range(REPEATS)]
    )
    medians = np.median(seconds, axis=0)
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    rows = []
    for (devices, chunk), median, ratio in zip(CASES, medians, ratios, strict=True):
        chains = "all that a device has" if chunk is None else str(chunk)
        rows.append([str(devices), chains, f"{median:.2f}", f"{ratio:.3f}"])
    ratio_of = dict(zip(CASES, ratios, strict=True))
    one = f"chunks of 250 on one device cost at most {LIMIT:.2f} of no chunks"
    eight = f"eight devices with chunks of 250 cost at most {LIMIT:.2f} of one without"
    checks = {
        one: bool(ratio_of[1, 250] <= LIMIT),
        eight: bool(ratio_of[8, 250] <= LIMIT),
    }
    columns = [
        "devices",
        "chains in one evaluation",
        "processor seconds",
        "ratio to the first row",
    ]
    title = (
        f"Chunks and devices: {CHAINS} chains of MALA, {LEVELS} levels of 5 steps, "
        "learned ring × bar"
    )
    return publish(
        "devices", title, columns, rows, checks, {"seconds": seconds.tolist()}
    )


if __name__ == "__main__":
    sys.exit(main())
