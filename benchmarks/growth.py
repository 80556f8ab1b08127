"""Growth of compilation with levels and with factors, and of peak memory with chains.

    python -m benchmarks growth

Compilation is everything from the program to the samples of a first run, less a second
run; JAX's caches are cleared before each. Memory is the peak of a process that runs a
program once, a process of its own for each number of chains. Exits with 1 if
compilation at 1000 levels takes more than 1.1 times what it takes at 10.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from price.cases import Case, conditioned, perturbed, plane
from price.clock import CLOCKS, Times, ratio
from report import publish

import composeprob as cp
from composeprob import model_zoo

LEVELS, FACTORS, CHAINS = (10, 100, 1000), (1, 2, 4, 8, 16), (1000, 4000, 16000)
FEW = 10
"""Levels where something else is what grows."""
LIMIT = 1.1
"""Most that compilation at the most levels may take, over that at the fewest."""
SAMPLER = cp.AnnealedMCMC(cp.MALA(lambda s: 0.05 * s.sigma**2), 1)
"""One object: a rule is a function, and another one is compiled anew."""


def run(density: Any, chains: int) -> None:
    """MALA, one transition a level."""
    cp.infer(
        density, jax.random.key(0), num_chains=chains, sampler=SAMPLER, progress=False
    )


def compilation(case: Case, levels: int, now: Callable[[], float]) -> float:
    """Seconds from a case to its first samples, less those of a second run."""
    jax.clear_caches()
    began = now()
    density = case.compile(levels)
    run(density, case.num_chains)
    first = now() - began
    began = now()
    run(density, case.num_chains)
    return first - (now() - began)


def alternate(
    tasks: dict[Any, tuple[Case, int]], repeats: int, clock: str
) -> dict[Any, Times]:
    """`compilation` of each case and number of levels, in turn, forwards and
    backwards."""
    seconds: dict[Any, list[float]] = {name: [] for name in tasks}
    for repeat in range(repeats):
        for name in list(tasks)[:: 1 if repeat % 2 == 0 else -1]:
            seconds[name].append(compilation(*tasks[name], CLOCKS[clock]))
    return {name: Times(np.asarray(values)) for name, values in seconds.items()}


def different(number: int) -> Case:
    """Networks of one kind, each with its own weights."""
    ring, _ = model_zoo.uncalibrated("ring2d")
    settings = {
        name: getattr(ring, name)
        for name in ("event_shape", "parameterization", "time")
    }
    networks = [
        perturbed(ring.network, key, 0.01)
        for key in jax.random.split(jax.random.key(0), number)
    ]
    return Case(
        "",
        [cp.Diffusion(n, ring.schedule, **settings) for n in networks],
        2,
        0.02,
        0.1,
        1,
        None,
    )


KINDS = {
    "conditions of one network": partial(conditioned, chains=2),
    "networks": different,
}


def peak(chains: int) -> int:
    """Bytes of a process that runs ring × bar with so many chains."""
    command = [sys.executable, __file__, "--one-run", str(chains)]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="how often each number of levels is compiled",
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="processor: for a machine that is busy",
    )
    parser.add_argument(
        "--one-run",
        type=int,
        metavar="CHAINS",
        help="run once, and print the peak of memory in bytes",
    )
    options = parser.parse_args()
    if options.one_run is not None:
        run(plane().compile(num_levels=2), options.one_run)
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        return 0
    memory = {chains: peak(chains) for chains in CHAINS}
    small = Case("", plane().factors, 2, 0.05, 0.2, 1, None)
    levels = alternate({k: (small, k) for k in LEVELS}, options.repeats, options.clock)
    tasks = {(name, k): (make(k), FEW) for name, make in KINDS.items() for k in FACTORS}
    factors = alternate(tasks, 1, options.clock)

    rows = [
        ["compilation (s)", f"{k} levels", f"{t.median:.2f}"] for k, t in levels.items()
    ]
    rows += [
        ["compilation (s)", f"product of {k} {name}", f"{t.median:.2f}"]
        for (name, k), t in factors.items()
    ]
    rows += [
        ["peak memory (MB)", f"{chains} chains", f"{value / 1e6:.0f}"]
        for chains, value in memory.items()
    ]
    each = (memory[CHAINS[-1]] - memory[CHAINS[0]]) / (CHAINS[-1] - CHAINS[0])
    rows.append(["peak memory (kB)", "each chain more", f"{each / 1e3:.0f}"])
    grown, error = ratio(levels[LEVELS[-1]], levels[LEVELS[0]])
    text = (
        f"compilation at {LEVELS[-1]} levels takes {grown:.3f} ± {error:.3f} ≤ "
        f"{LIMIT} times that at {LEVELS[0]}"
    )
    details = {
        "clock": options.clock,
        "levels": {k: t.seconds.tolist() for k, t in levels.items()},
        "factors": {f"{k} {name}": t.median for (name, k), t in factors.items()},
        "peak memory": memory,
    }
    notes = (
        f"Ring × bar, MLP energies, MALA. Compilation: {options.clock} seconds, for "
        "levels the median of "
    )
    notes += (
        f"{options.repeats} repeats in turns, for factors ({FEW} levels) one "
        "measurement each. Memory: a whole "
    )
    notes += "process, compiler and weights in it."
    title = "What grows with levels, factors and chains"
    return publish(
        "growth",
        title,
        ["what", "with", "is"],
        rows,
        {text: grown <= LIMIT},
        details,
        notes,
    )


if __name__ == "__main__":
    sys.exit(main())
