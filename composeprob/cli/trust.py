"""The command `trust`: a run beside finer ones, for the sampler's error, and the curl of scores, for the model's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from composeprob.cli.programs import arguments, load_program, presets
from composeprob.cli.shell import app, clean_errors, console

if TYPE_CHECKING:
    from composeprob.results.result import Result

DOUBT = 3.0
"""Standard errors beyond which a refined run differs by more than chance."""


@app.command()
@clean_errors
def trust(
    target: Annotated[
        str,
        typer.Argument(metavar="FILE[:PROGRAM]", help="A Python file, and which of its programs if it has several."),
    ],
    chains: Annotated[
        int | None, typer.Option(help="Number of chains of each run; left out, FILE's num_chains, or 1000.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the first run's report to this HTML file.", dir_okay=False)
    ] = None,
) -> None:
    """Say how far to trust the samples of a program, and whose error it is.

    Runs the program four times: as `composeprob run` does, under another key, with twice the levels, and with twice the
    transitions at each level. What changes by more than chance with levels or transitions is the sampler's error;
    what another key changes by more than chance is an error that the standard errors do not know of. Curl of scores,
    and factors that are asked where they were never trained, are the model's. Exits with 1 if anything was found.

    [b]Examples[/b]

        composeprob trust examples/product.py

        composeprob trust scene.py:two_cubes --chains 500 --out out/trust.html
    """
    import jax

    from composeprob import api

    program, module = load_program(target)
    args = arguments(program, module)
    sampler, own_chains = presets(module)
    number = own_chains if chains is None else chains
    density = api.compile(program, **args)
    log_snr = density.schedule.log_snr
    finer = api.compile(
        program,
        **args,
        schedule=api.Schedule.log_snr(2 * density.num_levels, min=float(log_snr[-1]), max=float(log_snr[0])),
    )
    chosen, longer = _twice(density, sampler, number)
    key, other = jax.random.split(jax.random.key(seed))
    first = api.infer(density, key, num_chains=number, sampler=chosen)
    again = {
        "another key": api.infer(density, other, num_chains=number, sampler=chosen),
        "2 × levels": api.infer(finer, other, num_chains=number, sampler=chosen),
    }
    if longer is not None:
        again["2 × transitions"] = api.infer(density, other, num_chains=number, sampler=longer)
    table, largest = _compared(first, again)
    console.print(table)
    found = [f"{name}: a difference of {size:.1f} standard errors" for name, size in largest.items() if size > DOUBT]
    compared = first.compare(again["another key"]).status if number >= 16 else first.status
    found += [f"{code}: {text}" for code, text in compared.findings]
    curl = _curl(density, first, key)
    for name, value in curl.items():
        console.print(f"curl of {name}: {value:.2g} (a gradient has 0)", highlight=False)
    for text in found or ["Nothing was found: the runs agree within their errors."]:
        console.print(text, highlight=False)
    if out is not None:
        print(f"wrote {first.report(out)}")
    raise typer.Exit(int(bool(found)))


def _twice(density: Any, sampler: Any, chains: int) -> tuple[Any, Any]:
    """The sampler of the runs, and the same with twice the transitions; None where it makes none."""
    from composeprob.samplers.choose import choose

    chosen = choose(density, chains)[0] if sampler is None else sampler
    moves = chosen.prepare(density).moves
    if moves is None:
        return chosen, None
    kernel = chosen.kernel or moves.kernel
    return chosen, chosen.with_moves(kernel, 2 * moves.count)


def _rows(result: Result) -> dict[str, tuple[float, float]]:
    """Means and their errors; the log-evidence too."""
    rows = {label: (row[0], row[1]) for label, row in result.summary().rows.items()}
    if result.log_evidence is not None and result.log_evidence_error is not None:
        rows["log evidence"] = result.log_evidence, result.log_evidence_error
    return rows


def _compared(first: Result, again: dict[str, Result]) -> tuple[Table, dict[str, float]]:
    """A table of differences in their standard errors, and the largest of each run, for how many there are."""
    table = Table("", "mean", "±", *(Column(name, justify="right") for name in again))
    mine, theirs = _rows(first), {name: _rows(result) for name, result in again.items()}
    largest = dict.fromkeys(again, 0.0)
    allowed = math.sqrt(2 * math.log(max(len(mine), 1)))  # what the largest of so many has by chance
    for label, (mean, error) in mine.items():
        cells = []
        for name, rows in theirs.items():
            other, its = rows.get(label, (math.nan, math.nan))
            size = abs(other - mean) / math.hypot(error, its) if math.hypot(error, its) > 0 else math.nan
            largest[name] = max(largest[name], 0.0 if math.isnan(size) else size - allowed)
            cells.append("–" if math.isnan(size) else f"{other - mean:+.3g} ({size:.1f} ±)")
        table.add_row(label, f"{mean:.4g}", "–" if math.isnan(error) else f"{error:.2g}", *cells)
    return table, largest


def _curl(density: Any, result: Result, key: Any) -> dict[str, float]:
    """The curl of scores at the samples, where the program's latents are all noised sites."""
    import jax

    from composeprob import api

    if any(site.kind != "noised" for site in density.sites.values()):
        return {}
    positions = {name: jax.numpy.asarray(result.unweighted()[name][:64]) for name in density.sites}
    found: dict[str, float] = api.metrics.curl(density, positions, 0, key)
    return found
