"""Output of every benchmark: a table on the screen, the same table as Markdown, and
its numbers as JSON.

Each file names the command, the machine, the date and the versions, which give the
seconds their meaning, and the commit, from which `python -m benchmarks --stale` tells
the results that are older than the code.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jax
from ages import STAMP, Code
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
CODE = Code.now(Path(__file__).resolve().parents[1])
"""Read before anything is measured: a long run may see later commits."""


def machine() -> dict[str, Any]:
    """Cores, processor, devices and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        cpu = names[0] if names else cpu
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return {
        "cpu": cpu,
        "cores": cores,
        # Seconds mean little on a machine that is busy with something else.
        "load": round(os.getloadavg()[0], 1),
        "devices": [d.device_kind for d in jax.devices()],
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def busy(columns: list[str], host: dict[str, Any]) -> str:
    """Return a sentence for a table with seconds that was made on a busy machine."""
    timed = any("seconds" in column for column in columns)
    if not timed or host["load"] <= host["cores"]:
        return ""
    return (
        "The machine was busy with other programs (load above): seconds by the clock "
        "are more than this program needs alone."
    )


def command() -> str:
    """The command that runs now."""
    name = Path(sys.argv[0]).stem.replace("_", "-")
    return shlex.join(["python", "-m", "benchmarks", name, *sys.argv[1:]])


def file_of(folder: str, part: str) -> Path:
    """The file of the result of one part of a long benchmark."""
    return Path("out") / folder / f"{part.replace(' ', '_')}.json"


PARTS: dict[str, dict[str, Any]] = {}
"""Code and machine of every part that this process measured or read, by its file."""


def kept(folder: str, part: str, measure: Callable[[], Any]) -> Any:
    """Measure one part of a long benchmark, or read its result from an earlier run.

    Results are kept in out/, so that the same command goes on where it was stopped. A
    part names the commit and the machine that made it, which `publish` copies: they may
    be others than those of the run that writes the table.
    """
    file = file_of(folder, part)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        found = measure()
        record = {STAMP: CODE.stamp(), "machine": machine(), "found": found}
        file.write_text(json.dumps(record))
        print(f"{part}: {json.dumps(found)}", flush=True)
    record = json.loads(file.read_text())
    if not (isinstance(record, dict) and STAMP in record):
        # A file of an earlier form says neither.
        record = {STAMP: None, "machine": None, "found": record}
    PARTS[f"{folder}/{file.stem}"] = {key: record[key] for key in (STAMP, "machine")}
    return record["found"]


def parts_in_words() -> str:
    """Return by how many parts each code and machine is represented; empty without
    parts."""
    groups: Counter[str] = Counter()
    for part in PARTS.values():
        host = part["machine"]
        stamp = part[STAMP]
        where = "an unknown machine"
        if host is not None:
            where = f"{host['cpu']}, {host['date']}"
        commit = "an unknown commit"
        if stamp is not None:
            commit = f"commit {stamp['commit'][:9]}"
            if stamp["changed"]:
                commit += " with changes"
        groups[f"{commit} ({where})"] += 1
    counted = (f"{number} at {text}" for text, number in groups.items())
    return "; ".join(counted)


def publish(
    name: str,
    title: str,
    columns: list[str],
    rows: list[list[str]],
    checks: dict[str, bool],
    details: dict[str, Any],
    notes: str = "",
    write: bool = True,
    made_by: str = "",
) -> int:
    """Print a table and its checks, write both files, and return the script's exit
    status.

    Args:
        name: stem of the files under results/.
        title: of the table.
        columns, rows: the table as text.
        checks: what must hold, as text, and whether it does.
        details: numbers for the JSON file.
        notes: what a reader must know to read the table.
        write: whether to write the files.
        made_by: the command that makes the files, where it is not the one that runs
            now.

    Returns:
        0 if every check holds, else 1.
    """
    # A pipe reports 80 columns.
    console = Console(width=max(120, Console().width))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for text, holds in checks.items():
        verdict = "[green]holds " if holds else "[bold red]FAILS "
        console.print(f"{verdict}[/] {text}", highlight=False)
    if write:
        host = machine()
        stamp = CODE.stamp()
        made_by = made_by or command()
        facts = ", ".join(f"{key} {value}" for key, value in host.items())
        if stamp:
            facts += f", commit {stamp['commit'][:9]}"
        lines = [f"# {title}", "", f"`{made_by}`", "", facts, ""]
        if PARTS:
            lines += [f"Parts were measured: {parts_in_words()}.", ""]
        lines += as_markdown(columns, rows, checks)
        for paragraph in (notes, busy(columns, host)):
            if paragraph:
                lines += ["", paragraph]
        record = {
            "command": made_by,
            STAMP: stamp,
            "machine": host,
            # JSON does not take NumPy's booleans.
            "checks": {text: bool(holds) for text, holds in checks.items()},
            **details,
        }
        if PARTS:
            record["parts"] = PARTS
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text("\n".join(lines).rstrip() + "\n")
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(checks.values()) else 1


def as_markdown(
    columns: list[str], rows: list[list[str]], checks: dict[str, bool]
) -> list[str]:
    """Lines of a table and of the checks below it."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines.append("")
    for text, holds in checks.items():
        verdict = "holds" if holds else "**fails**"
        lines.append(f"- {verdict}: {text}")
    return lines
