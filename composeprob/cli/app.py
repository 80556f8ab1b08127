"""The commands `new`, `zoo`, `train` and `devices`, beside `run` and `trust`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown
from rich.table import Table

from composeprob.cli import run, trust  # noqa: F401 - join the application
from composeprob.cli.shell import NoCache, app, clean_errors, console, keep_compiled
from composeprob.errors import InvalidValueError


@app.command()
@clean_errors
def new(folder: Annotated[Path, typer.Argument(metavar="NAME", help="The project's folder, which is made.")]) -> None:
    """Make a small project: a program, a network of its own that it trains, and a test.

    [b]Examples[/b]

        composeprob new crescents

        cd crescents && composeprob run program.py
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidValueError(f"{folder} exists and is not an empty folder.", fix="choose another name.")
    folder.mkdir(parents=True, exist_ok=True)
    for file in resources.files("composeprob.cli").joinpath("template").iterdir():
        if file.is_file():
            text = file.read_text(encoding="utf-8").replace("# NAME\n", f"# {folder.resolve().name}\n")
            (folder / file.name).write_text(text, encoding="utf-8")
            print(f"wrote {folder / file.name}")
    print(f"Run it: cd {folder} && composeprob run program.py")


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
        zoo = api.zoo()
        rows = [("model", "offers", "weights", "error", "what it is")]
        for card in zoo.values():
            offers = "energy" if "energy" in card.capabilities else "score"
            error = f"{card.quality['score_error']:.2g}" if "score_error" in card.quality else ""
            rows.append((card.name, offers, card.trained.removeprefix("trained "), error, card.title))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        table = Table(box=None, pad_edge=False)
        for title, width in zip(rows[0], [*widths, None], strict=True):
            table.add_column(title, no_wrap=True, min_width=width)  # a line a model: its card has what does not fit
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
        console.print('\ncomposeprob zoo NAME shows one; cp.load("NAME") loads it.', highlight=False)
        console.print(zoo.legend, highlight=False, markup=False)
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
    no_cache: NoCache = False,
) -> None:
    """Train a model of the zoo by its recipe, and write its weights, measurements and card into a folder of its own.

    cp.load(NAME, folder="out/NAME") loads them. To bring the zoo of a checkout up to date, write into models/NAME with
    --replace.

    [b]Examples[/b]

        composeprob train ring2d

        composeprob train ring2d --iterations 500 --out out/short --checkpoint-dir out/checkpoints

        composeprob train ring2d-sharp --retraining 1 --out models/ring2d-sharp
    """
    from composeprob.models.making import train_model

    keep_compiled(no_cache)
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
    diagnostics: Annotated[
        bool, typer.Option(help="Include the means over all chains that a result reports of each level.")
    ] = True,
    mesh: Annotated[str | None, typer.Option(metavar="ROWSxCOLUMNS", help="As for run.")] = None,
) -> None:
    """Show what programs would run on here; with --compile, what a run would take on TPUs that are not here.

    The real TPU compiler (pip install 'composeprob\\[tpu]') compiles a whole run, chains spread over the chips, for
    topologies of v4, v5e, v5p and v6e. Variables sampler and precision of FILE count, as for run. It runs nothing.
    Costs are its own estimates, and count the body of a loop once.

    [b]Examples[/b]

        composeprob devices

        composeprob devices --compile v5e:4x4

        composeprob devices scene.py:two_cubes --compile v5p:4x4x4

        composeprob devices benchmarks/sizes.py:sd15 --compile v5e:4x4 --chains-per-chip 1
    """
    from composeprob.cli import hardware

    if compile_for is None:
        if target is not None:
            raise InvalidValueError(f"{target} was given, but nothing to compile it for.", fix="add --compile v5e:4x4.")
        console.print(hardware.devices_table())
        return
    hardware.prepare_tpu_compiler()
    density, sampler = hardware.program(target)
    console.print(hardware.ahead(compile_for, density, chains_per_chip, sampler, diagnostics, mesh))
