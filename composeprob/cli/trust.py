"""The command `trust`: a run beside finer ones and a reference, for whose error it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from composeprob.cli.programs import arguments, load_program, presets, reference_draws
from composeprob.cli.shell import NoCache, app, clean_errors, console, keep_compiled

if TYPE_CHECKING:
    from jax import Array

    from composeprob.density.annealed import AnnealedDensity
    from composeprob.results.result import Result
    from composeprob.samplers.sampler import Sampler


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
    from composeprob.cli.whose_error import compared, draws_moments, moments, split

    keep_compiled(no_cache)
    program, module = load_program(target)
    args = arguments(program, module)
    settings = presets(module)
    number = settings["num_chains"] if chains is None else chains
    density = api.compile(program, **args, precision=settings.get("precision"))
    chosen = whose_error.resolved(density, settings.get("sampler"), number)
    key, other = jax.random.split(jax.random.key(seed))

    def run(density: AnnealedDensity, sampler: Sampler, key: Array = other) -> Result:
        return api.infer(density, key, num_chains=number, sampler=sampler)

    first = run(density, chosen, key)
    draws = reference_draws(module, reference, jax.random.fold_in(key, 1), number, list(first.samples))
    expected = None if draws is None else draws_moments(first, draws)  # refuses what does not fit, before other runs
    again = {"another key": run(density, chosen)}
    name, relevelled = whose_error.twice_the_levels(density)
    if whose_error.fits(relevelled, chosen):
        again[name] = run(relevelled, chosen)
    else:
        console.print("The sampler has one step for each level: no other number of levels was tried.")
    if (longer := whose_error.longer(density, chosen)) is not None:
        again[whose_error.Refinement.TRANSITIONS] = run(density, longer)
    if (shorter := whose_error.shorter_steps(density, chosen, first)) is not None:
        again[whose_error.Refinement.STEP] = run(density, shorter)
    rows = {label: moments(result) for label, result in again.items()}
    table, largest = compared(moments(first), rows)
    console.print(table)
    if whose_error.Refinement.COARSER in largest:  # an error of order p is 1/(2^p − 1) of what half the levels change
        largest[whose_error.Refinement.COARSER] /= 2 ** (chosen.check_order or 1) - 1
    found = [
        f"{name}: a difference of {size:.1f} standard errors"
        for name, size in largest.items()
        if size > tuning.REFINED_ERRORS
    ]
    if expected is not None:
        finest = _finest(run, density, chosen, again, name, relevelled)
        table, whose = split(moments(first), moments(finest), expected)
        console.print(table)
        found += [
            f"The {who}'s error: {size:.1f} standard errors"
            for who, size in whose.items()
            if size > tuning.REFINED_ERRORS
        ]
    compared_runs = first.compare(again["another key"]).status if number >= 16 else first.status
    found += [f"{code}: {text}" for code, text in compared_runs.findings]
    for text in _score_checks(density, first, key):
        console.print(text, highlight=False)
    for text in found or ["Nothing was found: the runs agree within their errors."]:
        console.print(text, highlight=False)
    if out is not None:
        print(f"wrote {first.report(out)}")
    raise typer.Exit(int(bool(found)))


def _finest(
    run: Callable[[AnnealedDensity, Sampler], Result],
    density: AnnealedDensity,
    chosen: Sampler,
    again: dict[str, Result],
    name: str,
    relevelled: AnnealedDensity,
) -> Result:
    """The finest run: twice the levels, twice the transitions, half the step, as far as each is possible."""
    from composeprob.cli import whose_error

    if name != whose_error.Refinement.LEVELS or name not in again:
        order = (whose_error.Refinement.STEP, whose_error.Refinement.TRANSITIONS, "another key")
        return next(again[label] for label in order if label in again)
    shorter = whose_error.shorter_steps(relevelled, chosen, again[name])
    finest = shorter or whose_error.longer(relevelled, chosen)
    result: Result = again[name] if finest is None else run(relevelled, finest)
    return result


def _score_checks(density: AnnealedDensity, result: Result, key: Array) -> list[str]:
    """Checks of the model by scores at the samples, where the program's latents are all noised sites."""
    import jax
    import numpy as np

    from composeprob import api
    from composeprob.density.overlap import noised
    from composeprob.runtime.own_draws import own_scores

    if any(site.kind != "noised" for site in density.sites.values()):
        return []
    positions = {name: jax.numpy.asarray(result.unweighted()[name][:64]) for name in density.sites}
    curls = api.metrics.curl(density, positions, 0, key)
    lines = [f"curl of {name}: {value:.2g} (a gradient has 0)" for name, value in curls.items()]
    lines += [
        f"score of {name} at its own draws: {own.steepness:.2g} times as steep as their spread says, shifted by "
        f"{own.shift:.2g} sd (1 and 0 are right)"
        for name, own in own_scores(density, positions, key).items()
    ]
    learned = {expert.name for expert in density.described.experts if expert.trained}
    worst: dict[str, tuple[float, int]] = {}
    for level in np.unique(np.linspace(0, density.num_levels - 1, 5).round().astype(int)) if learned else ():
        at = noised(density, positions, int(level), jax.random.fold_in(key, int(level)))
        try:
            residuals = api.metrics.fokker_planck(density, at, int(level), key)
        except (TypeError, ValueError, NotImplementedError):  # what JAX raises for custom rules and callbacks
            return [*lines, "Fokker–Planck residual: a network cannot be differentiated so often."]
        for name in learned & residuals.keys():
            if not math.isnan(residuals[name]):
                worst[name] = max(worst.get(name, (0.0, 0)), (residuals[name], int(level)))
    for name, (value, level) in worst.items():
        lines.append(
            f"Fokker–Planck residual of {name}: at most {value:.2g}, at level {level} (a noised distribution has 0)"
        )
    return lines
