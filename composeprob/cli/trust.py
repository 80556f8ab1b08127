"""The command `trust`: a run beside finer ones and a reference, for whose error it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from composeprob.cli.programs import compiled
from composeprob.cli.shell import NoCache, Target, app, clean_errors, console, keep_compiled

if TYPE_CHECKING:
    from jax import Array

    from composeprob.density.annealed import AnnealedDensity
    from composeprob.results.result import Result
    from composeprob.samplers.sampler import Sampler


@app.command()
@clean_errors
def trust(
    target: Target,
    chains: Annotated[
        int | None, typer.Option(help="Number of chains of each run; left out, FILE's num_chains, or 1000.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Draws of what the samples should be, .npy of the only site or .npz of several: held-out data. Left "
            "out, FILE's function reference(key, num), if it has one.",
            dir_okay=False,
            exists=True,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the first run's report to this HTML file.", dir_okay=False)
    ] = None,
    no_cache: NoCache = False,
) -> None:
    """Say how far to trust the samples of a program, and whose error it is.

    Runs the program several times: as `composeprob run` does, under another key, with twice the levels, with twice the
    transitions at each level, and, where the kernel's distribution depends on its step, with half of it. What changes
    by more than chance with levels, transitions or steps is the sampler's error; what another key changes by more than
    chance is an error that the standard errors do not know of. Curl of scores, their Fokker-Planck residual, and
    factors that are asked where they were never trained, are the model's. Where there are draws of what the samples
    should be, the error is split: up to the finest run it is the sampler's, from there on the model's. Exits with 1 if
    anything was found.

    [b]Examples[/b]

        composeprob trust examples/product.py

        composeprob trust scene.py:two_cubes --chains 500 --reference held_out.npy --out out/trust.html
    """
    import jax

    from composeprob import api, tuning
    from composeprob.cli import whose_error
    from composeprob.cli.whose_error import Refinement, moments
    from composeprob.samplers.choose import choose

    keep_compiled(no_cache)
    density, module, settings = compiled(target)
    number = settings["num_chains"] if chains is None else chains
    chosen = settings["sampler"] if "sampler" in settings else choose(density, number)[0]
    key, other = jax.random.split(jax.random.key(seed))

    def run(density: AnnealedDensity, sampler: Sampler, key: Array = other) -> Result:
        return api.infer(density, key, num_chains=number, sampler=sampler)

    first = run(density, chosen, key)
    draws = whose_error.reference_draws(module, reference, jax.random.fold_in(key, 1), number, list(first.samples))
    expected = None if draws is None else whose_error.draws_moments(first, draws)  # refuses misfits before other runs
    again = {"another key": run(density, chosen)}
    name, relevelled = whose_error.twice_the_levels(density)
    if whose_error.fits(relevelled, chosen):
        again[name] = run(relevelled, chosen)
    else:
        console.print("The sampler has one step for each level: no other number of levels was tried.")
    if (refined := whose_error.longer(density, chosen)) is not None:
        again[Refinement.TRANSITIONS] = run(density, refined)
    if (refined := whose_error.shorter_steps(density, chosen, first)) is not None:
        again[Refinement.STEP] = run(density, refined)
    rows = {label: moments(result) for label, result in again.items()}
    table, largest = whose_error.compared(moments(first), rows)
    console.print(table)
    if Refinement.COARSER in largest:  # an error of order p is 1/(2^p − 1) of what half the levels change
        largest[Refinement.COARSER] /= 2 ** (chosen.check_order or 1) - 1
    sizes = {f"{name}: a difference of": size for name, size in largest.items()}
    if expected is not None:
        best = whose_error.finest(run, chosen, again, name, relevelled)
        table, whose = whose_error.split(moments(first), moments(best), expected)
        console.print(table)
        sizes |= {f"The {who}'s error:": size for who, size in whose.items()}
    found = [f"{what} {size:.1f} standard errors" for what, size in sizes.items() if size > tuning.REFINED_ERRORS]
    compared_runs = first.compare(again["another key"]).status if number >= 16 else first.status
    found += [f"{code}: {text}" for code, text in compared_runs.findings]
    nothing = ["Nothing was found: the runs agree within their errors."]
    for text in [*whose_error.score_checks(density, first, key), *(found or nothing)]:
        console.print(text, highlight=False)
    if out is not None:
        print(f"wrote {first.report(out)}")
    raise typer.Exit(int(bool(found)))
