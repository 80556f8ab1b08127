"""A run compiled for devices that this machine need not have."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from composeprob.density.annealed import AnnealedDensity
from composeprob.pytree import is_array
from composeprob.runtime.compiled import advance, compiler_options, start
from composeprob.runtime.parts import in_parts, places
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.run import NoRecords, Run, begin, placed
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import Spread, chain_mesh, everywhere
from composeprob.samplers.visits import Visits


class Compiled(eqx.Module):
    """What a compiler reports of a whole run, start and every level, as one program. Sizes and costs are each chip's.

    Attributes:
        arguments, outputs, temporaries: bytes of memory.
        flops, bytes_accessed, seconds: the compiler's own estimates, NaN where it gives none; the body of a loop counts
            once, whatever the number of levels and steps.
        collectives: how many operations of each kind the compiled program has, ``{kind: number}``.
    """

    arguments: int
    outputs: int
    temporaries: int
    flops: float
    bytes_accessed: float
    seconds: float
    collectives: dict[str, int]


def compile_ahead(
    density: AnnealedDensity,
    sampler: Sampler,
    num_chains: int,
    devices: Sequence[jax.Device] | np.ndarray,
    diagnostics: bool = True,
    chunk: int | None = None,
) -> Compiled:
    """Compile a run with its chains spread over ``devices``.

    Args:
        density: from `compile`; the arrays of its networks may be shapes (`jax.ShapeDtypeStruct`).
        sampler: how chains travel.
        num_chains: N, at least the number of devices.
        devices: such as ``jax.experimental.topologies.get_topology_desc(…).devices``; a table of them keeps large
            arrays in parts along its rows, as a mesh of two axes does for `infer`.
        diagnostics: whether the program also gives what a `Result` reports of each level: means over all chains, which
            take collectives even where the chains themselves need none.
        chunk: as for `infer`.

    Raises:
        CapabilityError: the sampler needs what a factor does not offer.
    """
    check_capabilities(sampler, density)
    sampler = sampler.prepare(density)
    first = sampler.first_level(density)
    mesh = chain_mesh(devices)
    spread = Spread.checked(mesh, chunk, num_chains)
    here = dataclasses.replace(spread, mesh=None)  # where the devices are not
    run = placed(begin(jax.random.key(0), num_chains, Visits.every(first, density.num_levels)), here)
    records = run.records if diagnostics else NoRecords.empty(density.num_levels)
    run = dataclasses.replace(run, records=records, spread=spread)
    density = in_parts(density, spread, sampler)
    arrays, static = eqx.partition((sampler, run, density), is_array)

    def struct(place: PartitionSpec, part: Any) -> Any:
        sharding = NamedSharding(mesh, place)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part)

    def program(arrays: PyTree[Array]) -> PyTree[Array]:
        sampler, run, density = eqx.combine(arrays, static)
        run = start(sampler, run, density, first)
        run = advance(sampler, run, density, jnp.int32(first + 1))
        return sampler.positions(run, density), run.log_weights, (run.log_evidence, run.records)

    where = (everywhere, Run.places(), places(density))
    structs = jax.tree.map(struct, where, arrays, is_leaf=lambda node: isinstance(node, PartitionSpec))
    return measured(jax.jit(program).lower(structs).compile(compiler_options(spread)))


def measured(compiled: Any) -> Compiled:
    """The numbers of a `jax.stages.Compiled`."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        cost.get("flops", math.nan),
        cost.get("bytes accessed", math.nan),
        seconds if (seconds := cost.get("optimal_seconds", math.nan)) > 0 else math.nan,  # of large programs below 0
        collectives(compiled.as_text()),
    )


def collectives(text: str) -> dict[str, int]:
    """The collective operations in the text of a compiled program, by kind; an asynchronous one counts where it
    starts."""
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    found = re.findall(rf"\s({'|'.join(kinds)})(?:-start)?\(", text)
    return dict(sorted(Counter(found).items()))
