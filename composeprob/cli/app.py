"""The application's commands: `run`, `new`, `zoo`, `train` and `devices`."""

from __future__ import annotations

import functools
import json
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from composeprob.cli.programs import compiled
from composeprob.errors import ComposeProbError, InvalidValueError
from composeprob.extras import needed
from composeprob.json_data import JSONObject
from composeprob.text import spell_out

if TYPE_CHECKING:
    from composeprob.core import Result
    from composeprob.model_zoo import Card

# jax and the rest of the library are imported inside the commands, so that `composeprob
# --help` answers at once.
app = typer.Typer(
    name="composeprob",
    no_args_is_help=True,
    rich_markup_mode="rich",
    # An exception in the user's own file keeps Python's traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
Target = Annotated[
    str,
    typer.Argument(
        metavar="FILE[:PROGRAM]",
        help="Python file, and the name of a program if it has several.",
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Keep no compiled code. By default it is kept in a private folder under "
        "the user's cache.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Seed of the random numbers: the same seed gives the same samples."
    ),
]
CheckpointFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of checkpoints: the same command resumes an interrupted run.",
        file_okay=False,
    ),
]
spell_out(sys.stdout, sys.stderr)


def _version(shown: bool) -> None:
    if shown:
        from composeprob import __version__

        print(f"composeprob {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Compose pretrained diffusion models in a probabilistic program, and sample it."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command of the application.

    The library's own errors are printed without a traceback, and exit with 2.
    """

    @app.command()
    @functools.wraps(function)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            function(*args, **kwargs)
        except ComposeProbError as error:
            # An argument of `infer` is an option of the command.
            text = f"{type(error).__name__}: {error}".replace(
                "choose another checkpoint_dir, or start again:",
                "choose another --checkpoint-dir, or in the file",
            )
            Console(stderr=True).print(text, style="red", markup=False, highlight=False)
            raise typer.Exit(2) from None

    return wrapped


def keep_compiled(no_cache: bool) -> None:
    """Keep compiled code for later processes, and print its folder the first time."""
    from composeprob.core import cache
    from composeprob.settings import default_cache

    if no_cache:
        return
    first = not default_cache().exists()
    folder = cache()
    if first and folder == default_cache():
        text = (
            f"Compiled code is kept in {folder}, up to 1 GiB, for the next run; "
            "--no-cache keeps none."
        )
        Console(stderr=True, soft_wrap=True).print(text, highlight=False)


@command
def run(
    target: Target,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A diffusers folder, or owner/name on the hub. It becomes the value "
            "of the program's parameter [b]model[/b].",
            show_default=False,
        ),
    ] = None,
    chains: Annotated[
        int | None,
        typer.Option(
            help="Number of chains, that is, of samples; by default FILE's num_chains, "
            "or 1000."
        ),
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for samples.safetensors, samples.png, summary.txt and "
            "results.json.",
            file_okay=False,
        ),
    ] = Path("out"),
    checkpoint_dir: CheckpointFolder = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="ROWSxCOLUMNS",
            help="Grid of devices to run on; by default as many devices as the chains "
            "can be spread over. With COLUMNS above 1, network arrays of more than "
            "1 MiB are split over the devices of a row and gathered for each "
            "evaluation: for networks that do not fit on one device.",
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Run on the devices of all processes that are started with this "
            "command. JAX finds the processes itself under SLURM, Kubernetes, Open MPI "
            "and on TPU pods; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID. All processes must share the folders; samples go to "
            "OUT/samples.zarr, or to the store of FILE's draws.",
        ),
    ] = False,
    no_cache: NoCache = False,
) -> None:
    """Sample a program from a Python file.

    FILE holds a function decorated with [b]@cp.program[/b]. Each of its parameters gets
    its default value, or the value of the variable of the same name in FILE:

        ring, bar = cp.load("ring2d"), cp.load("bar2d")

        @cp.program
        def product(ring, bar):
            return cp.sample("x", ring * bar)

    Other variables of FILE set how the program is sampled. They are passed to cp.infer
    and cp.compile:

        sampler = cp.SMC(cp.HMC(cp.Adaptive()), steps_per_level=3)

        num_chains, levels = 2000, np.linspace(8, -8, 60)

        draws = cp.Draws(10000, thin=10, store="out/draws.zarr")

        checkpoint_dir = cp.Checkpoint("out/checkpoints", resume=True)

        chunk, precision = 250, "bfloat16"

    [b]Examples[/b]

        composeprob run examples/product.py

        composeprob run scene.py:two_cubes --chains 2000 --out out/cubes

        composeprob run scene.py --chains 100000 --checkpoint-dir out/checkpoints

        srun composeprob run scene.py --distributed --chains 100000

        composeprob run scene.py --mesh 2x4

        composeprob run examples/text_to_image.py:both --model FOLDER
    """
    import jax

    from composeprob import api
    from composeprob.arguments import check_writable
    from composeprob.cli.hardware import arranged_devices, join

    keep_compiled(no_cache)
    if distributed:
        # JAX starts its devices once: processes join before anything looks for them.
        join()
    leads = jax.process_index() == 0
    devices = arranged_devices(jax.devices(), mesh)
    given = {} if model is None else {"model": lambda: api.from_diffusers(model)}
    density, _, settings = compiled(target, given)
    check_writable(out, f"No result can be written to --out {out}")
    if chains is not None:
        settings["num_chains"] = chains
    if checkpoint_dir is not None:
        settings["checkpoint_dir"] = checkpoint_dir
    draws = settings.pop("draws", None)
    if not isinstance(draws, api.Draws):
        draws = api.Draws(draws, thin=settings.pop("thin", 1))
    # Samples of several processes are written by all of them, which needs a store.
    if distributed and draws.store is None:
        draws = replace(draws, store=out / "samples.zarr")
    if leads:
        print(density)
    grid = None if devices is None else jax.sharding.Mesh(devices, ("chains", "model"))
    result = api.infer(
        density,
        jax.random.key(seed),
        mesh=grid,
        progress=leads,
        draws=draws,
        **settings,
    )
    if leads:
        about = {
            "program": density.graph.name,
            "file": target.rpartition(":")[0] or target,
            "seed": seed,
        }
        report(result, out, about, draws.store)


def report(
    result: Result, folder: Path, about: JSONObject, store: str | Path | None
) -> None:
    """Print a result's summary, write its files, and exit with 130 if it is partial."""
    print(f"\n{result.summary()}\n")
    samples = None if store is None else Path(store)
    for path in write_or_rescue(result, folder, about, samples):
        print(f"wrote {path}")
    if not result.status.ok:
        message = "The run has problems; see its status above."
        Console(stderr=True).print(message, style="yellow")
    if result.status.code == "interrupted":
        raise typer.Exit(130)


def write_or_rescue(
    result: Result, folder: Path, about: JSONObject, store: Path | None
) -> list[Path]:
    """Write a result into ``folder``, or exit with its samples in a spare folder.

    A disk that has become full thus loses no samples.
    """
    try:
        return write(result, folder, about, store)
    except (OSError, InvalidValueError) as error:
        temporary = Path(tempfile.mkdtemp(prefix="composeprob-"))
        spare = result.save(temporary / "samples.safetensors")
        message = f"{folder} cannot be written: {error}. The samples are in {spare}."
        Console(stderr=True).print(message, style="red")
        raise typer.Exit(1) from None


def write(
    result: Result, folder: Path, about: JSONObject, store: Path | None = None
) -> list[Path]:
    """Write samples, picture, summary and numbers of a result; return the files.

    Samples that are in a ``store`` are not written again.
    """
    import matplotlib.pyplot as plt

    samples = store or result.save(folder / "samples.safetensors")
    picture = folder / "samples.png"
    figure = result.plot()
    figure.savefig(picture)
    plt.close(figure)
    summary = folder / "summary.txt"
    summary.write_text(f"{result.summary()}\n", encoding="utf-8")
    numbers = folder / "results.json"
    text = json.dumps({**about, **result.numbers()}, indent=1)
    numbers.write_text(text + "\n", encoding="utf-8")
    return [samples, picture, summary, numbers]


@command
def new(
    folder: Annotated[
        Path,
        typer.Argument(metavar="NAME", help="The project's folder, to be made."),
    ],
) -> None:
    """Make a small project: a program, a network that it trains, and a test.

    [b]Examples[/b]

        composeprob new crescents

        cd crescents && composeprob run program.py
    """
    from composeprob.arguments import check_writable

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidValueError(
            f"{folder} exists and is not an empty folder.", fix="choose another name."
        )
    with needed("train", "A project that trains a network"):
        import optax  # noqa: F401
    check_writable(folder, f"No project can be written to '{folder}'")
    title = f"# {folder.resolve().name}\n"
    for file in resources.files("composeprob.cli").joinpath("template").iterdir():
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8").replace("# NAME\n", title)
        written = folder / file.name
        written.write_text(text, encoding="utf-8")
        print(f"wrote {written}")
    quoted = shlex.quote(str(folder))
    print(f"Run it: cd {quoted} && composeprob run program.py")


@command
def zoo(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Show the card of this model."),
    ] = None,
) -> None:
    """List the pretrained models, or show the card of one.

    [b]Examples[/b]

        composeprob zoo

        composeprob zoo ring2d
    """
    from composeprob import api

    if name is not None:
        console.print(Markdown(api.zoo(name).text))
        return
    zoo = api.zoo()
    wide = console.width >= WIDE
    console.print(_zoo_table(list(zoo.values()), wide))
    console.print(
        '\ncomposeprob zoo NAME shows one; cp.load("NAME") loads it.',
        highlight=False,
    )
    if wide:
        console.print(zoo.legend, highlight=False, markup=False)


WIDE = 110
"""Columns of a terminal from which on the zoo's table shows figures, too."""


def _zoo_table(cards: list[Card], wide: bool) -> Table:
    """Return a table with a line for each model of the zoo; only a ``wide`` one has
    figures, which the legend explains."""
    titles = ["model", "offers", "weights", "error", "what it is"]
    rows = [list(_zoo_row(card)) for card in cards]
    if not wide:
        for row in (titles, *rows):
            del row[2:4]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    # The last column takes the room that is left: a model has one line, which ends at a
    # word, and a card for more.
    room = console.width - sum(widths[:-1]) - 2 * (len(titles) - 1)
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, no_wrap=True)
    for *figures, what in rows:
        table.add_row(*figures, textwrap.shorten(what, max(room, 20), placeholder=" …"))
    return table


def _zoo_row(card: Card) -> tuple[str, ...]:
    offers = "energy" if "energy" in card.capabilities else "score"
    error = ""
    if "score_error" in card.quality:
        error = f"{card.quality['score_error']:.2g}"
    weights = card.trained.removeprefix("trained ")
    return card.name, offers, weights, error, card.title


@command
def train(
    model: Annotated[
        str,
        typer.Argument(help="A model of the zoo: a folder in models/ with a train.py."),
    ],
    iterations: Annotated[
        int | None,
        typer.Option(help="Optimiser steps; by default those of its recipe."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write into.", show_default="out/MODEL"),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a trained model in that folder.")
    ] = False,
    checkpoint_dir: CheckpointFolder = None,
    retraining: Annotated[
        int,
        typer.Option(
            min=0,
            help="Train the same recipe with another random key, into "
            "weights-N.safetensors.",
        ),
    ] = 0,
    no_cache: NoCache = False,
) -> None:
    """Train a model of the zoo by its recipe, and write it into a folder.

    The folder gets weights, measurements and card; cp.load(NAME, folder="out/NAME")
    loads them. To update the zoo of a checkout, write into models/NAME with --replace.

    [b]Examples[/b]

        composeprob train ring2d

        composeprob train ring2d --iterations 500 --out out/short --checkpoint-dir
        out/checkpoints

        composeprob train ring2d-sharp --retraining 1 --out models/ring2d-sharp
    """
    from composeprob.models.making import train_model

    keep_compiled(no_cache)
    done = train_model(
        model,
        checkpoint_dir=checkpoint_dir,
        out=out,
        iterations=iterations,
        retraining=retraining,
        replace=replace,
    )
    if not done.finished:
        again = "with --checkpoint-dir it could go on"
        if checkpoint_dir:
            again = "the same command goes on"
        print(f"stopped after {len(done.loss):,} steps; {again}")
    folder = done.written[0].parent
    print(f"wrote {', '.join(file.name for file in done.written)} into {folder}")
    number = f", retraining={retraining}" if retraining else ""
    print(f'cp.load("{model}"{number}, folder="{folder}") loads it')


@command
def devices() -> None:
    """Show the devices of this machine, and the precision of numbers on them.

    [b]Example[/b]

        composeprob devices
    """
    from composeprob.cli.hardware import devices_table

    console.print(devices_table())
