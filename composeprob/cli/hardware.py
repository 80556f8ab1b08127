"""The devices that are here, and compilation for TPUs that are not."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from composeprob.cli.programs import compiled
from composeprob.errors import InvalidValueError, LoadError

if TYPE_CHECKING:
    import jax
    from jax import Array

    from composeprob.density.annealed import AnnealedDensity
    from composeprob.factors.factor import LeafFactor
    from composeprob.samplers.sampler import Sampler


def devices_table() -> Table:
    """Makes a table of JAX's devices, their memory, and the precision that numbers have
    on them."""
    import jax

    table = Table("device", "kind", "memory")
    for device in jax.devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = main_memory() if limit is None and device.platform == "cpu" else limit
        shown = "unknown" if memory is None else readable(memory)
        table.add_row(str(device), f"{device.platform}, {device.device_kind}", shown)
    number = jax.dtypes.canonicalize_dtype(float)
    products = (
        getattr(jax.config, "jax_default_matmul_precision", None) or "the device's own"
    )
    host = f"JAX {jax.__version__}, {os.cpu_count()} CPU cores"
    table.caption = f"{host}; {number}, precision of matrix products: {products}"
    return table


def join() -> None:
    """Joins the devices of all processes of this run, as JAX finds them or the
    environment gives them."""
    import jax

    given = {
        name: os.environ.get(f"JAX_{name.upper()}")
        for name in ("num_processes", "process_id")
    }
    try:
        numbers = {name: int(value) for name, value in given.items() if value}
        jax.distributed.initialize(
            **numbers, local_device_ids=slurm_devices(os.environ)
        )  # type: ignore[arg-type]
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidValueError(
            f"--distributed was given, but JAX cannot join other processes: {str(error).splitlines()[0]}",
            fix="start it with srun, mpirun or on every host of a pod; or set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
            "JAX_NUM_PROCESSES and, in each process, JAX_PROCESS_ID=0, 1, ….",
        ) from error


def slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """All GPUs of a node for the one process on it, where JAX would give it one; None
    where JAX's way is right."""
    visible, tasks = (
        environment.get("CUDA_VISIBLE_DEVICES"),
        environment.get("SLURM_STEP_NUM_TASKS"),
    )
    if not visible or tasks is None or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    return (
        list(range(len(visible.split(","))))
        if tasks == environment.get("SLURM_STEP_NUM_NODES")
        else None
    )


def arranged_devices(
    devices: Sequence[jax.Device], mesh: str | None
) -> np.ndarray | None:
    """Arranges the devices in rows as ``--mesh`` says, such as ``2x4``; None where it
    is left out."""
    if mesh is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", mesh)
    if not found:
        raise InvalidValueError(
            f"{mesh!r} is no mesh of ROWSxCOLUMNS devices.",
            fix="for example --mesh 2x4.",
        )
    rows, columns = map(int, found.groups())
    if rows * columns > len(devices):
        fix = "composeprob devices shows what there is."
        raise InvalidValueError(
            f"A mesh of {mesh} needs {rows * columns} devices; there are {len(devices)}.",
            fix=fix,
        )
    return np.asarray(devices[: rows * columns]).reshape(rows, columns)


def main_memory() -> int | None:
    """Returns the bytes of main memory, None where the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def tpu_compiler() -> Path | None:
    """Finds libtpu: ``TPU_LIBRARY_PATH``, the installed package, or where `make tpu`
    put it."""
    places = [
        os.environ.get("TPU_LIBRARY_PATH"),
        Path(sys.prefix) / "libtpu/libtpu/libtpu.so",
    ]
    spec = importlib.util.find_spec("libtpu")
    if spec is not None and spec.origin:
        places.insert(1, Path(spec.origin).with_name("libtpu.so"))
    return next(
        (Path(place) for place in places if place and Path(place).is_file()), None
    )


def prepare_tpu_compiler() -> None:
    """Sets what JAX and the TPU compiler read from the environment; before JAX starts
    its devices."""
    library = tpu_compiler()
    if library is None:
        raise LoadError(
            "The TPU compiler, libtpu, is not installed.",
            fix="pip install 'composeprob[tpu]'.",
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
    """Compiles a program's run for TPUs, and tabulates what the compiler reports of
    each chip."""
    from composeprob.runtime.compiled import compile_ahead
    from composeprob.samplers.choose import choose

    listed = tpu_chips(topology)
    table_of_chips = arranged_devices(listed, mesh)
    chips = listed if table_of_chips is None else table_of_chips
    num_chains = chains_per_chip * np.size(chips)
    if sampler is None:
        sampler, _ = choose(density, num_chains)
    made = compile_ahead(density, sampler, num_chains, chips, diagnostics)
    title = f"{topology}: {np.size(chips)} chips × {chains_per_chip} chains"
    table = Table("on each chip", "", title=title, title_justify="left")
    for name in ("arguments", "outputs", "temporaries"):
        table.add_row(f"memory for {name}", readable(getattr(made, name)))
    table.add_row("floating-point operations, loops once", f"{made.flops:.3g}")
    table.add_row("bytes moved, loops once", readable(made.bytes_accessed))
    seconds = "unknown" if np.isnan(made.seconds) else f"{made.seconds:.3g} s"
    table.add_row("the compiler's estimate of time, loops once", seconds)
    kinds = ", ".join(f"{number} {kind}" for kind, number in made.collectives.items())
    table.add_row("collectives in the program", kinds or "0")
    table.caption = f"Compiled, not run: {sampler.prepare(density).describe()}"
    return table


def tpu_chips(topology: str) -> list[jax.Device]:
    """Returns the devices of a TPU topology, one for each chip."""
    from jax.experimental import topologies

    # The two cores of a v4 work as one device only if asked to.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as error:  # of many kinds
        message = str(error).splitlines()[0]
        if not message.startswith(("INVALID_ARGUMENT", "NOT_FOUND")):
            fix = "install the libtpu that jax[tpu] asks for."
            raise LoadError(
                f"The TPU compiler does not start: {message}", fix=fix
            ) from error
        fix = "for example v5e:4x4, v6e:16x16, v4:4x4x4 or v5p:8x8x4: the grid of chips, in whole hosts of 2x2."
        raise InvalidValueError(
            f"The TPU compiler knows no topology {topology!r}: {message}", fix=fix
        ) from error
    return list(found.devices)


def program(target: str | None) -> tuple[AnnealedDensity, Sampler | None]:
    """Compiles the program of a file, with the file's sampler and precision, or ring ×
    bar."""
    from composeprob import api

    if target is not None:
        density, _, settings = compiled(target)
        return density, settings.get("sampler")

    @api.program
    def product(ring: LeafFactor, bar: LeafFactor) -> Array:
        return api.sample("x", ring * bar)

    return api.compile(product, api.load("ring2d"), api.load("bar2d")), None


def readable(size: float) -> str:
    """Formats a number of bytes in the largest unit that leaves it above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
