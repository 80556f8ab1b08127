"""The commands `zoo`, `train`, `calibrate`, `bench` and `devices`, beside `new`, `run` and `trust`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown
from rich.table import Table

from composeprob.cli import new, run, trust  # noqa: F401 - join the application
from composeprob.cli.benchmarks import benchmarks, oldest_first, run_benchmark, table_of_ages, title
from composeprob.cli.programs import condition
from composeprob.cli.samplers import KernelName, SamplerName, make_sampler
from composeprob.cli.shell import app, clean_errors, console
from composeprob.errors import InvalidValueError


@app.command()
@clean_errors
def zoo(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show the card of this model.")] = None,
) -> None:
    """List the pretrained models, or show the card of one.

    [b]Examples[/b]

        composeprob zoo

        composeprob zoo ring2d
    """
    from composeprob import api

    if name is None:
        table = Table("model", "event", "offers", "weights", "score error", "what it is")
        table.columns[0].no_wrap = True  # a name is there to be copied
        zoo = api.zoo()
        for card in zoo.values():
            offers = "energy" if "energy" in card.capabilities else "score only"
            error = f"{card.quality['score_error']:.2g}" if "score_error" in card.quality else ""
            table.add_row(card.name, str(card.event_shape), offers, card.trained, error, card.title)
        console.print(table)
        console.print('composeprob zoo NAME shows one; cp.load("NAME") loads it.', highlight=False)
        console.print(zoo.legend, highlight=False)
        return
    console.print(Markdown(api.zoo(name).text))


@app.command()
@clean_errors
def train(
    model: Annotated[str, typer.Argument(help="A model of the zoo: a folder in models/ with a train.py.")],
    iterations: Annotated[int | None, typer.Option(help="Optimiser steps; by default those of its recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write into.", show_default="out/MODEL")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a trained model in that folder.")] = False,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints: the same command goes on where it was stopped.")
    ] = None,
    retraining: Annotated[
        int, typer.Option(min=0, help="Train the same recipe with another random key, into weights-N.safetensors.")
    ] = 0,
) -> None:
    """Train a model of the zoo by its recipe, and write its weights, measurements and card into a folder of its own.

    cp.load(NAME, folder="out/NAME") loads them. To bring the zoo of a checkout up to date, write into models/NAME with
    --replace.

    [b]Examples[/b]

        composeprob train ring2d

        composeprob train ring2d --iterations 500 --out out/short --checkpoint-dir out/checkpoints

        composeprob train ring2d-sharp --retraining 1 --out models/ring2d-sharp
    """
    from composeprob.training import train_model

    done = train_model(
        model, checkpoint_dir=checkpoint_dir, out=out, iterations=iterations, retraining=retraining, replace=replace
    )
    if not done.finished:
        again = "the same command goes on" if checkpoint_dir else "with --checkpoint-dir it could go on"
        print(f"stopped after {len(done.loss):,} steps; {again}")
    folder = done.written[0].parent
    print(f"wrote {', '.join(file.name for file in done.written)} into {folder}")
    number = f", retraining={retraining}" if retraining else ""
    print(f'cp.load("{model}"{number}, folder="{folder}") loads it')


@app.command()
@clean_errors
def calibrate(
    model: Annotated[str, typer.Argument(help="A trained model of the zoo that has an energy.")],
    retraining: Annotated[int, typer.Option(min=0, help="Which of its trainings.")] = 0,
    given: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="The value of a condition; once for each.")
    ] = None,
    chains: Annotated[int, typer.Option(min=2, help="Chains of each repeat; fewer for large models.")] = 1000,
    out: Annotated[
        Path | None, typer.Option(help="The folder of its weights, and to write into.", show_default="that of the zoo")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a calibration that is there.")] = False,
) -> None:
    """Find the log-normaliser of a model at every noise level, so that weights of mixtures with it are shares.

    Writes calibration.safetensors beside its weights; cp.load applies it. Training does this too.

    [b]Examples[/b]

        composeprob calibrate ring2d --replace

        composeprob calibrate ring2d-sharp --retraining 1 --out out/ring2d-sharp

        composeprob calibrate digits --given label=3 --chains 200
    """
    from composeprob.calibration import calibrate_model

    conditions = dict(condition(text) for text in given or [])
    print(
        calibrate_model(
            model, retraining=retraining, conditions=conditions, num_chains=chains, out=out, replace=replace
        )
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@clean_errors
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which benchmark; left out, lists them.")] = None,
    stale: Annotated[bool, typer.Option("--stale", help="Say which results are older than what they measure.")] = False,
) -> None:
    """Run a benchmark of a checkout, which prints its table and writes it to benchmarks/results/.

    What follows the name goes to the benchmark: [b]composeprob bench paper-2d --chains 100[/b]. It exits with 1 if
    something that it checks does not hold.

    [b]--stale[/b] runs nothing. A results file names the commit that it was made at, and what it depends on: the
    library without its command line, the benchmark's own scripts, the models where it uses them. Of each file it counts
    the commits since then that touch these, and exits with 1 if there are any.

    [b]Examples[/b]

        composeprob bench

        composeprob bench paper-2d

        composeprob bench --stale
    """
    if stale:
        if name is not None:
            raise InvalidValueError(f"--stale looks at all results, and {name!r} was given.", fix="leave the name out.")
        found = oldest_first()
        console.print(table_of_ages(found))
        raise typer.Exit(int(any(age.stale for age in found)))
    if name is None:
        table = Table("benchmark", "what it measures")
        for known, script in benchmarks().items():
            table.add_row(known, title(script))
        console.print(table)
        return
    run_benchmark(name, context.args)


@app.command()
@clean_errors
def devices(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE[:PROGRAM]]", help="What to compile; left out, the demo's ring × bar from the zoo."
        ),
    ] = None,
    compile_for: Annotated[
        str | None,
        typer.Option("--compile", metavar="TOPOLOGY", help="TPUs to compile for, such as v5e:4x4 or v4:4x4x4."),
    ] = None,
    chains_per_chip: Annotated[int, typer.Option(min=1, help="Chains on each chip.")] = 64,
    sampler: Annotated[SamplerName, typer.Option(help="As for run; auto chooses by the program and the chains.")] = (
        SamplerName.auto
    ),
    kernel: Annotated[KernelName | None, typer.Option(help="As for run.")] = None,
    step_size: Annotated[str | None, typer.Option(metavar="NUMBER|adaptive", help="As for run.")] = None,
    diagnostics: Annotated[
        bool, typer.Option(help="Include the means over all chains that a result reports of each level.")
    ] = True,
    mesh: Annotated[str | None, typer.Option(metavar="ROWSxCOLUMNS", help="As for run.")] = None,
    precision: Annotated[str | None, typer.Option(metavar="bfloat16", help="As for run.", show_default=False)] = None,
) -> None:
    """Show what programs would run on here; with --compile, what a run would take on TPUs that are not here.

    The real TPU compiler (pip install 'composeprob\\[tpu]') compiles a whole run, chains spread over the chips, for
    topologies of v4, v5e, v5p and v6e. It runs nothing. Costs are its own estimates, and count the body of a loop once.

    [b]Examples[/b]

        composeprob devices

        composeprob devices --compile v5e:4x4

        composeprob devices scene.py:two_cubes --compile v5p:4x4x4 --kernel mala --step-size 0.01

        composeprob devices benchmarks/sizes.py:sd15 --compile v5e:4x4 --chains-per-chip 1 --sampler ancestral
    """
    from composeprob.cli import hardware

    if compile_for is None:
        if target is not None:
            raise InvalidValueError(f"{target} was given, but nothing to compile it for.", fix="add --compile v5e:4x4.")
        console.print(hardware.devices_table())
        return
    hardware.prepare_tpu_compiler()
    chosen = make_sampler(sampler, kernel, None, step_size, 3, 0.5)
    density = hardware.program(target, precision)
    console.print(hardware.ahead(compile_for, density, chains_per_chip, chosen, diagnostics, mesh))
