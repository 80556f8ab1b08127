"""Memory of a chip and collectives of a run on 4 to 256 TPUs, by their own compiler.

    python -m benchmarks tpu
    python -m benchmarks tpu --family v5e --family v4
    python -m benchmarks tpu scene.py:two_cubes --topology v5p:4x4x4
    python -m benchmarks tpu benchmarks/sizes.py:sd15 --topology v5e:4x4 --chains 1

Learned ring × bar with as many chains on every chip. Nothing runs: the numbers are the
compiler's, which `make tpu` fetches. With a topology, one program is compiled for it,
and the table is printed only; the file's variable `sampler` counts, as for
`composeprob run`. Costs are the compiler's estimates, which count the body of a loop
once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from composeprob.errors import InvalidValueError, LoadError

if TYPE_CHECKING:
    import jax
    from jax import Array
    from rich.table import Table

    from benchmarks.ahead import Compiled
    from composeprob.density.annealed import AnnealedDensity
    from composeprob.factors.factor import LeafFactor
    from composeprob.samplers.sampler import Sampler

# JAX and what imports it are imported inside of functions: `prepare_tpu_compiler` sets
# their environment first.
PLANE = ("2x2", "4x4", "8x8", "16x16")
SOLID = ("2x2x1", "2x2x4", "4x4x4", "4x8x8")
TOPOLOGIES = {"v5e": PLANE, "v6e": PLANE, "v4": SOLID, "v5p": SOLID}
CHAINS = 64
"""On every chip."""
MEETINGS = 3
"""Collectives of SMC: for weights, for the exchange of chains, and for the acceptance
that step sizes adapt to."""


def main() -> int:
    options = parsed()
    prepare_tpu_compiler()
    if options.topology is None:
        return grids(options.family or list(TOPOLOGIES))
    from rich.console import Console

    density, sampler = program(options.program)
    table = ahead(
        options.topology,
        density,
        options.chains,
        sampler,
        not options.no_diagnostics,
        options.mesh,
    )
    Console(width=120).print(table)
    return 0


def parsed() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "program",
        nargs="?",
        metavar="FILE[:PROGRAM]",
        help="program to compile; by default ring × bar",
    )
    parser.add_argument("--topology", help="such as v5e:4x4 or v4:4x4x4")
    parser.add_argument(
        "--chains", type=int, default=CHAINS, help="chains on each chip"
    )
    parser.add_argument(
        "--no-diagnostics",
        action="store_true",
        help="leave out the means over all chains that a result reports at each level",
    )
    parser.add_argument("--mesh", metavar="ROWSxCOLUMNS", help="as for composeprob run")
    parser.add_argument(
        "--family",
        action="append",
        choices=TOPOLOGIES,
        help="only these; once for each",
    )
    options = parser.parse_args()
    if options.program and not options.topology:
        parser.error("a program is compiled for a topology: add --topology v5e:4x4")
    return options


def grids(families: list[str]) -> int:
    """Compile ring × bar for grids of each family, and publish the table."""
    from report import publish

    import composeprob as cp
    from benchmarks.ahead import compile_ahead
    from composeprob.samplers.choose import choose

    independent = cp.AnnealedMCMC(cp.MALA(0.001), 3)
    density, _ = program(None)
    found: dict[str, dict[str, Any]] = {}
    for topology in (
        f"{family}:{grid}" for family in families for grid in TOPOLOGIES[family]
    ):
        try:
            chips = tpu_chips(topology)
            default, _ = choose(density, CHAINS * len(chips))
            alone = compile_ahead(
                density, independent, CHAINS * len(chips), chips, diagnostics=False
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
        f"whole run. Independent chains: {independent.prepare(density).describe()}, "
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
    from composeprob.cli.hardware import readable

    if "failed" in one:
        return [topology, "", one["failed"], "", "", ""]
    cells = [topology, str(one["chips"])]
    for name in ("independent", "default"):
        kinds = ", ".join(
            f"{number} {kind}" for kind, number in one[name]["collectives"].items()
        )
        cells += [readable(one[name]["memory"]), kinds or "0"]
    return cells


def tpu_compiler() -> Path | None:
    """Return the file of libtpu, or None.

    It is ``TPU_LIBRARY_PATH``, in the installed package, or in the folder of `make
    tpu`, in this order.
    """
    places: list[str | Path | None] = [os.environ.get("TPU_LIBRARY_PATH")]
    spec = importlib.util.find_spec("libtpu")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).with_name("libtpu.so"))
    places.append(Path(sys.prefix) / "libtpu/libtpu/libtpu.so")
    for place in places:
        if place and Path(place).is_file():
            return Path(place)
    return None


def prepare_tpu_compiler() -> None:
    """Set the environment of JAX and the TPU compiler, before JAX starts devices."""
    library = tpu_compiler()
    if library is None:
        raise LoadError(
            "The TPU compiler, libtpu, is not installed.",
            fix="in a clone, make tpu fetches it; or pip install 'jax[tpu]'.",
        )
    os.environ["TPU_LIBRARY_PATH"] = str(library)
    # Without these the TPU compiler looks for a cloud around it, and JAX for a TPU.
    settings = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # no TPU is touched
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": "none",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def ahead(
    topology: str,
    density: AnnealedDensity,
    chains_per_chip: int,
    sampler: Sampler | None,
    diagnostics: bool,
    mesh: str | None,
) -> Table:
    """Compile a program's run for TPUs; return the compiler's figures for a chip."""
    from rich.table import Table

    from benchmarks.ahead import compile_ahead
    from composeprob.cli.hardware import arranged_devices, readable
    from composeprob.samplers.choose import choose

    chips = tpu_chips(topology)
    grid = arranged_devices(chips, mesh)
    # A grid may take fewer chips than the topology has.
    used = chips if grid is None else grid
    number = np.size(used)
    num_chains = chains_per_chip * number
    if sampler is None:
        sampler, _ = choose(density, num_chains)
    report = compile_ahead(density, sampler, num_chains, used, diagnostics)
    title = f"{topology}: {number} chips × {chains_per_chip} chains"
    table = Table("on each chip", "", title=title, title_justify="left")
    for name in ("arguments", "outputs", "temporaries"):
        table.add_row(f"memory for {name}", readable(getattr(report, name)))
    table.add_row("floating-point operations, loops once", f"{report.flops:.3g}")
    table.add_row("bytes moved, loops once", readable(report.bytes_accessed))
    seconds = "unknown" if np.isnan(report.seconds) else f"{report.seconds:.3g} s"
    table.add_row("the compiler's estimate of time, loops once", seconds)
    kinds = [f"{count} {kind}" for kind, count in report.collectives.items()]
    table.add_row("collectives in the program", ", ".join(kinds) or "0")
    table.caption = f"Compiled, not run: {sampler.prepare(density).describe()}"
    return table


def tpu_chips(topology: str) -> list[jax.Device]:
    """Return the devices of a TPU topology, one for each chip."""
    from jax.experimental import topologies

    # The two cores of a v4 work as one device only with this option.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as error:  # of many kinds
        message = str(error).splitlines()[0]
        if not message.startswith(("INVALID_ARGUMENT", "NOT_FOUND")):
            raise LoadError(
                f"The TPU compiler does not start: {message}",
                fix="install the libtpu that jax[tpu] asks for.",
            ) from error
        raise InvalidValueError(
            f"The TPU compiler has no topology {topology!r}: {message}",
            fix="for example v5e:4x4, v6e:16x16, v4:4x4x4 or v5p:8x8x4: the grid of "
            "chips, in whole hosts of 2x2.",
        ) from error
    return list(description.devices)


def program(target: str | None) -> tuple[AnnealedDensity, Sampler | None]:
    """Compile the program of a file, or ring × bar, and return the file's sampler."""
    from composeprob import api
    from composeprob.cli.programs import compiled

    if target is not None:
        density, _, settings = compiled(target)
        return density, settings.get("sampler")

    @api.program
    def product(ring: LeafFactor, bar: LeafFactor) -> Array:
        return api.sample("x", ring * bar)

    return api.compile(product, api.load("ring2d"), api.load("bar2d")), None


if __name__ == "__main__":
    sys.exit(main())
