"""Benchmark E, the positive control: factors of disjoint coordinates.

Every sampler must be right on them.

    python -m benchmarks disjoint

There the noised product IS the product of the noised factors, so plain reverse
diffusion has no bias to show. Exits with 1 if a sampler misses TV ≤ 0.03.
"""

from __future__ import annotations

import dataclasses
import sys

from mode_weights import (
    COLUMNS,
    OVER,
    SPREAD,
    Measured,
    N,
    as_text,
    disjoint,
    measure,
    samplers,
)
from report import publish

LIMIT = 0.03


TOO_SMALL = "MALA, paper (0.001), 10 a level"
"""Its steps are too small to follow the levels, here as on benchmark A (acceptance
0.999): listed, not judged."""


def checks(rows: dict[str, Measured]) -> dict[str, bool]:
    """Checks of benchmark E."""
    judged = {name: row for name, row in rows.items() if name != TOO_SMALL}
    return {
        f"{name}: mean TV ≤ {LIMIT}": row.mean <= LIMIT for name, row in judged.items()
    }


def main() -> int:
    rows = {}
    for name, row in samplers().items():
        rows[name] = measure(disjoint(), row)
        print("  ".join(as_text(rows[name])), flush=True)
    notes = (
        f"Four modes of weights 0.21, 0.14, 0.39, 0.26. TV as in benchmark A: {N} "
        f"chains, {OVER}; {SPREAD} "
    )
    notes += (
        "MALA at the paper's step is listed, not judged: its steps are too small to "
        "follow the levels."
    )
    details = {
        "num_chains": N,
        "rows": [dataclasses.asdict(m) | {"mean_tv": m.mean} for m in rows.values()],
    }
    title = "Benchmark E: two mixtures on disjoint coordinates, exact factors"
    return publish(
        "disjoint",
        title,
        COLUMNS,
        [as_text(m) for m in rows.values()],
        checks(rows),
        details,
        notes,
    )


if __name__ == "__main__":
    sys.exit(main())
