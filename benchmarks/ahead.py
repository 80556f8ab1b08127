"""A run compiled ahead of time, for devices that this machine need not have: its
memory, operations and collectives.

`benchmarks.tpu` compiles for TPUs by it; tests count the collectives of virtual
devices.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from composeprob.density.annealed import AnnealedDensity
from composeprob.pytree import is_array
from composeprob.records import NoRecords
from composeprob.runtime.compiled import in_parts, on_devices, places
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.run import Run, begin, placed
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import Spread, chain_mesh, chains, everywhere


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiler's report of a whole run, start and every level, as one program; sizes
    and costs are those of one chip."""

    arguments: int  # bytes of memory, as the next two
    outputs: int
    temporaries: int
    # The compiler's own estimates, NaN where it gives none; the body of a loop counts
    # once.
    flops: float
    bytes_accessed: float
    seconds: float
    # Number of operations of each kind in the compiled program.
    collectives: dict[str, int]


def compile_ahead(
    density: AnnealedDensity,
    sampler: Sampler,
    num_chains: int,
    devices: Sequence[jax.Device] | np.ndarray,
    diagnostics: bool = True,
) -> Compiled:
    """Compile a run of N chains that are spread over devices, which this machine need
    not have.

    Args:
        density, sampler, num_chains: as for `infer`; arrays of networks may be shapes
            (`jax.ShapeDtypeStruct`).
        devices: such as ``jax.experimental.topologies.get_topology_desc(…).devices``; a
            table is a mesh of two axes.
        diagnostics: whether the program also computes a `Result`'s diagnostics of each
            level: means over all chains, which take collectives even where the chains
            themselves need none.
    """
    check_capabilities(sampler, density)
    sampler = sampler.prepare(density)
    first = sampler.first_level(density)
    mesh = chain_mesh(devices)
    spread = Spread.checked(mesh, None, num_chains)
    # A run begins on this machine, where the devices need not be.
    on_host = dataclasses.replace(spread, mesh=None)
    visits = sampler.visits(density, None)
    run = placed(begin(jax.random.key(0), num_chains, visits), on_host)
    records = run.records if diagnostics else NoRecords.empty(density.num_levels)
    run = dataclasses.replace(run, records=records, spread=spread)
    arguments = (sampler, run, in_parts(density, spread, sampler))

    def descent(sampler: Sampler, run: Run, density: AnnealedDensity) -> PyTree[Array]:
        run = sampler.advance(sampler.start(run, density, first), density, first + 1)
        positions = sampler.positions(run, density)
        return positions, run.log_weights, (run.log_evidence, run.records)

    def struct(place: PartitionSpec, part: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
        sharding = NamedSharding(mesh, place)

        def of_leaf(leaf: Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(of_leaf, part)

    arrays, static = eqx.partition(arguments, is_array)
    structs = jax.tree.map(struct, tuple(map(places, arguments)), arrays)
    mapped = on_devices(descent, out=(chains, chains, everywhere))

    def program(arrays: PyTree[Array]) -> PyTree[Array]:
        return mapped(*eqx.combine(arrays, static))

    compiled: Any = jax.jit(program).lower(structs).compile()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    seconds = cost.get("optimal_seconds", math.nan)
    if not seconds > 0:  # of large programs it is negative
        seconds = math.nan
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=cost.get("flops", math.nan),
        bytes_accessed=cost.get("bytes accessed", math.nan),
        seconds=seconds,
        collectives=collectives(compiled.as_text()),
    )


def collectives(text: str) -> dict[str, int]:
    """Number of collective operations of each kind in the text of a compiled program;
    an asynchronous one counts where it starts."""
    kinds = (
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "all-to-all",
        "collective-permute",
    )
    operations = re.findall(rf"\s({'|'.join(kinds)})(?:-start)?\(", text)
    return dict(sorted(Counter(operations).items()))
