"""Devices of this machine, in a table or in rows, and those of other processes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from composeprob.errors import InvalidValueError

if TYPE_CHECKING:
    import jax


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


def readable(size: float) -> str:
    """Format a number of bytes, in the largest unit that leaves it above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
