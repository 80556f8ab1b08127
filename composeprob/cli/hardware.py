"""Devices of this machine, and compilation for TPUs elsewhere."""

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
    """Return a table of JAX's devices with their memory.

    The caption has the precision of numbers on them.
    """
    import jax

    table = Table("device", "kind", "memory")
    for device in jax.devices():
        kind = f"{device.platform}, {device.device_kind}"
        memory = _memory(device)
        shown = "unknown" if memory is None else readable(memory)
        table.add_row(str(device), kind, shown)
    number = jax.dtypes.canonicalize_dtype(float)
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    host = f"JAX {jax.__version__}, {os.cpu_count()} CPU cores"
    products = precision or "the device's own"
    table.caption = f"{host}; {number}, precision of matrix products: {products}"
    return table


def _memory(device: jax.Device) -> int | None:
    """Return a device's memory in bytes; of a CPU without a limit the main memory."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu":
        return main_memory()
    return limit


def join() -> None:
    """Join the devices of all processes of this run.

    JAX finds the processes, or the environment names them.
    """
    import jax

    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            local_device_ids=slurm_devices(os.environ),
        )
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidValueError(
            f"--distributed was given, but JAX cannot join other processes: {reason}",
            fix="start it with srun, mpirun or on every host of a pod; or set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and, in each "
            "process, JAX_PROCESS_ID=0, 1, ….",
        ) from error


def _number(variable: str) -> int | None:
    """Return the number in an environment variable; None where JAX has to find it."""
    value = os.environ.get(variable)
    return int(value) if value else None


def slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Return all GPUs of a node for the only process on it; None for JAX's own choice.

    Under SLURM JAX takes one GPU a process, even where a process has the node alone.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    tasks = environment.get("SLURM_STEP_NUM_TASKS")
    if not visible or tasks is None or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    if tasks != environment.get("SLURM_STEP_NUM_NODES"):
        return None
    return list(range(len(visible.split(","))))


def arranged_devices(
    devices: Sequence[jax.Device], mesh: str | None
) -> np.ndarray | None:
    """Return the devices in rows, as ``--mesh`` has them; None without a mesh.

    ``mesh`` has the form ROWSxCOLUMNS, such as ``2x4``.
    """
    if mesh is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", mesh)
    if not match:
        raise InvalidValueError(
            f"{mesh!r} is not a mesh of ROWSxCOLUMNS devices.",
            fix="for example --mesh 2x4.",
        )
    rows, columns = map(int, match.groups())
    if rows * columns > len(devices):
        raise InvalidValueError(
            f"A mesh of {mesh} needs {rows * columns} devices; there are "
            f"{len(devices)}.",
            fix="composeprob devices shows what there is.",
        )
    return np.asarray(devices[: rows * columns]).reshape(rows, columns)


def main_memory() -> int | None:
    """Return the bytes of main memory; None where the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


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
            fix="pip install 'jax[tpu]'.",
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
    from composeprob.runtime.compiled import compile_ahead
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

    if target is not None:
        density, _, settings = compiled(target)
        return density, settings.get("sampler")

    @api.program
    def product(ring: LeafFactor, bar: LeafFactor) -> Array:
        return api.sample("x", ring * bar)

    return api.compile(product, api.load("ring2d"), api.load("bar2d")), None


def readable(size: float) -> str:
    """Format a number of bytes, in the largest unit that leaves it above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
