"""Memory of a chip and collectives of a run on 4 to 256 TPUs, by their own compiler.

    python -m benchmarks tpu
    python -m benchmarks tpu --family v5e --family v4

Learned ring × bar with as many chains on every chip. Nothing runs: the numbers are the
compiler's, which `make tpu` fetches.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from composeprob.cli import hardware

hardware.prepare_tpu_compiler()  # before JAX starts

from report import publish  # noqa: E402

import composeprob as cp  # noqa: E402
from composeprob.runtime.compiled import Compiled, compile_ahead  # noqa: E402
from composeprob.samplers.choose import choose  # noqa: E402

PLANE = ("2x2", "4x4", "8x8", "16x16")
SOLID = ("2x2x1", "2x2x4", "4x4x4", "4x8x8")
TOPOLOGIES = {"v5e": PLANE, "v6e": PLANE, "v4": SOLID, "v5p": SOLID}
CHAINS = 64
"""On every chip."""
INDEPENDENT = cp.AnnealedMCMC(cp.MALA(0.001), 3)
MEETINGS = 3
"""Collectives of SMC: for weights, for the exchange of chains, and for the acceptance
that step sizes adapt to."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tpu")
    parser.add_argument(
        "--family",
        action="append",
        choices=TOPOLOGIES,
        help="only these; once for each",
    )
    families = parser.parse_args().family or list(TOPOLOGIES)
    density, _ = hardware.program(None)
    found: dict[str, dict[str, Any]] = {}
    for topology in (
        f"{family}:{grid}" for family in families for grid in TOPOLOGIES[family]
    ):
        try:
            chips = hardware.tpu_chips(topology)
            default, _ = choose(density, CHAINS * len(chips))
            alone = compile_ahead(
                density, INDEPENDENT, CHAINS * len(chips), chips, diagnostics=False
            )
            smc = compile_ahead(density, default, CHAINS * len(chips), chips)
        # A compiler that gives up has a row in the table, and fails a check.
        except Exception as error:
            found[topology] = {"failed": str(error).splitlines()[0]}
        else:
            found[topology] = {
                "chips": len(chips),
                "independent": as_json(alone),
                "default": as_json(smc),
            }
        print(topology, found[topology], file=sys.stderr)
    passed = {topology: one for topology, one in found.items() if "failed" not in one}
    rows = [row(topology, one) for topology, one in found.items()]
    default, _ = choose(density, CHAINS * 4)
    checks = {
        "every topology compiles": len(passed) == len(found),
        "independent chains have no collectives": all(
            not one["independent"]["collectives"] for one in passed.values()
        ),
        "a chip's memory for independent chains is the same on 4 and on 256 chips of "
        "a family": all(
            len(set(memories(passed, family, "independent"))) == 1
            for family in families
        ),
        "a chip's memory for SMC on 256 chips is at most 1.02 of that on 4 of a "
        "family": all(
            sizes[-1] <= 1.02 * sizes[0]
            for family in families
            if (sizes := memories(passed, family, "default"))
        ),
        "SMC has a collective for weights, one for the exchange of chains, one for "
        "its step sizes, and no other": all(
            sum(one["default"]["collectives"].values()) == MEETINGS
            for one in passed.values()
        ),
    }
    columns = [
        "TPUs",
        "chips",
        "independent chains: memory",
        "collectives",
        "SMC: memory",
        "collectives",
    ]
    notes = (
        "Memory is what one chip needs for arguments, results and temporaries of a "
        f"whole run. Independent chains: {INDEPENDENT.prepare(density).describe()}, "
        "without the means over all chains that a result reports. SMC, which "
        f"`cp.infer` chooses here, with them: {default.prepare(density).describe()}. "
        "From 64 chips on the compiler makes an all-reduce of the all-gather of "
        "weights. Chains that are exchanged travel around the ring of chips."
    )
    title = (
        f"Compiled for TPUs, not run: learned ring × bar, {CHAINS} chains on every chip"
    )
    return publish("tpu", title, columns, rows, checks, {"topologies": found}, notes)


def memories(passed: dict[str, Any], family: str, name: str) -> list[int]:
    """Bytes of a chip, by the number of chips."""
    return [
        one[name]["memory"]
        for topology, one in passed.items()
        if topology.startswith(family)
    ]


def as_json(compiled: Compiled) -> dict[str, Any]:
    memory = compiled.arguments + compiled.outputs + compiled.temporaries
    return {
        "memory": memory,
        "collectives": compiled.collectives,
        "estimated_seconds": compiled.seconds,
    }


def row(topology: str, one: dict[str, Any]) -> list[str]:
    if "failed" in one:
        return [topology, "", one["failed"], "", "", ""]
    cells = [topology, str(one["chips"])]
    for name in ("independent", "default"):
        kinds = ", ".join(
            f"{number} {kind}" for kind, number in one[name]["collectives"].items()
        )
        cells += [hardware.readable(one[name]["memory"]), kinds or "0"]
    return cells


if __name__ == "__main__":
    sys.exit(main())
