"""The application and its commands: `run`, `trust`, `new`, `zoo`, `train` and
`devices`."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
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
from composeprob.json_data import JSONObject
from composeprob.text import spell_out

if TYPE_CHECKING:
    from jax import Array

    from composeprob.density.annealed import AnnealedDensity
    from composeprob.results.result import Result
    from composeprob.samplers.sampler import Sampler

# jax and the rest of the library are imported inside the commands: `composeprob --help`
# answers at once.
app = typer.Typer(
    name="composeprob",
    no_args_is_help=True,
    rich_markup_mode="rich",
    # an exception in the user's own file keeps Python's plain traceback
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
Target = Annotated[
    str,
    typer.Argument(
        metavar="FILE[:PROGRAM]",
        help="A Python file, and which of its programs if it has several.",
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Keep no compiled code. Else it is in a private folder under the user's cache.",
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
        help="Folder of checkpoints: the same command goes on where it was stopped.",
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
    """Makes a function a command that prints the library's deliberate errors without a
    traceback, and exits with 2."""

    @app.command()
    @functools.wraps(function)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            function(*args, **kwargs)
        except ComposeProbError as error:
            # an argument of `infer` is an option here
            text = f"{type(error).__name__}: {error}".replace(
                "choose another checkpoint_dir, or start again:",
                "choose another --checkpoint-dir, or in the file",
            )
            Console(stderr=True).print(text, style="red", markup=False, highlight=False)
            raise typer.Exit(2) from None

    return wrapped


def keep_compiled(no_cache: bool) -> None:
    """Keeps what this process compiles for the next one, unless told not to; the first
    time it says where."""
    from composeprob.settings import cache, default_cache

    if no_cache:
        return
    first = not default_cache().exists()
    folder = cache()
    if first and folder == default_cache():
        text = f"Compiled code is kept in {folder}, up to 1 GiB, for the next run; --no-cache keeps none."
        Console(stderr=True, soft_wrap=True).print(text, highlight=False)


@command
def run(
    target: Target,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A diffusers folder, or owner/name on the hub: the value of the program's parameter [b]model[/b].",
            show_default=False,
        ),
    ] = None,
    chains: Annotated[
        int | None,
        typer.Option(
            help="Number of chains, that is, of samples; left out, FILE's num_chains, or 1000."
        ),
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for samples.safetensors, samples.png, summary.txt and results.json.",
            file_okay=False,
        ),
    ] = Path("out"),
    checkpoint_dir: CheckpointFolder = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="ROWSxCOLUMNS",
            help="Run on so many devices; left out, on as many as the chains can be spread over. With COLUMNS above 1 "
            "arrays of the networks of more than 1 MiB are in parts, one on each device of a row, gathered for each "
            "evaluation: for networks that leave no room else.",
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Run on every device of all processes that are started with this command: found as JAX finds them "
            "(SLURM, Kubernetes, Open MPI, TPU pods), or given by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID. The folders must be the same for all; samples go to OUT/samples.zarr, or where "
            "FILE's draws say.",
        ),
    ] = False,
    no_cache: NoCache = False,
) -> None:
    """Sample a program that is written in a Python file.

    FILE holds a function decorated with [b]@cp.program[/b]. A parameter of it gets its
    default value, or else the variable of the same name in FILE:

        ring, bar = cp.load("ring2d"), cp.load("bar2d")

        @cp.program
        def product(ring, bar):
            return cp.sample("x", ring * bar)

    Other variables of FILE say how it is sampled, as arguments of cp.infer and
    cp.compile:

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
    from composeprob.cli.hardware import arranged_devices, join

    keep_compiled(no_cache)
    if distributed:
        join()  # before anything looks for devices
    leads = jax.process_index() == 0
    devices = arranged_devices(jax.devices(), mesh)
    given = {} if model is None else {"model": lambda: api.from_diffusers(model)}
    density, _, settings = compiled(target, given)
    if chains is not None:
        settings["num_chains"] = chains
    if checkpoint_dir is not None:
        settings["checkpoint_dir"] = checkpoint_dir
    draws = settings.pop("draws", None)
    draws = draws if isinstance(draws, api.Draws) else api.Draws(draws)
    if distributed and draws.store is None:
        draws = replace(draws, store=out / "samples.zarr")
    store = None if draws.store is None else Path(draws.store)
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
    if not leads:
        return
    summary = str(result.summary())
    print(f"\n{summary}\n")
    about = {
        "program": density.graph.name,
        "file": target.rpartition(":")[0] or target,
        "seed": seed,
    }
    try:
        written = write(result, out, about, store)
    except (OSError, InvalidValueError) as error:  # a full disk loses no samples
        spare = result.save(
            Path(tempfile.mkdtemp(prefix="composeprob-")) / "samples.safetensors"
        )
        Console(stderr=True).print(
            f"{out} cannot be written: {error}. The samples are in {spare}.",
            style="red",
        )
        raise typer.Exit(1) from None
    for path in written:
        print(f"wrote {path}")
    if not result.status.ok:
        Console(stderr=True).print(
            "The run has problems; see its status above.", style="yellow"
        )
    if result.status.code.value == "interrupted":
        raise typer.Exit(130)


def write(
    result: Result, folder: Path, about: JSONObject, store: Path | None = None
) -> list[Path]:
    """Writes samples (unless they are in a ``store``), picture, summary and numbers of
    a result into ``folder``; returns the files."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    samples, picture = (
        store or result.save(folder / "samples.safetensors"),
        folder / "samples.png",
    )
    figure = result.plot()
    figure.savefig(picture)
    plt.close(figure)
    summary, numbers = folder / "summary.txt", folder / "results.json"
    summary.write_text(f"{result.summary()}\n", encoding="utf-8")
    numbers.write_text(
        json.dumps({**about, **result.numbers()}, indent=1) + "\n", encoding="utf-8"
    )
    return [samples, picture, summary, numbers]


@command
def trust(
    target: Target,
    chains: Annotated[
        int | None,
        typer.Option(
            help="Number of chains of each run; left out, FILE's num_chains, or 1000."
        ),
    ] = None,
    seed: Seed = 0,
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
        Path | None,
        typer.Option(
            help="Write the first run's report to this HTML file.", dir_okay=False
        ),
    ] = None,
    no_cache: NoCache = False,
) -> None:
    """Say how far to trust the samples of a program, and whose error it is.

    Runs the program several times: as `composeprob run` does, under another key, with
    twice the levels, with twice the transitions at each level, and, where the kernel's
    distribution depends on its step, with half of it. What changes by more than chance
    with levels, transitions or steps is the sampler's error; what another key changes
    by more than chance is an error that the standard errors do not know of. Curl of
    scores, their Fokker-Planck residual, and factors that are asked where they were
    never trained, are the model's. Where there are draws of what the samples should be,
    the error is split: up to the finest run it is the sampler's, from there on the
    model's. Exits with 1 if anything was found.

    [b]Examples[/b]

        composeprob trust examples/product.py

        composeprob trust scene.py:two_cubes --chains 500 --reference held_out.npy --out
        out/trust.html
    """
    import jax

    from composeprob import api, tuning
    from composeprob.cli import whose_error
    from composeprob.cli.whose_error import Refinement, moments
    from composeprob.samplers.choose import choose

    keep_compiled(no_cache)
    density, module, settings = compiled(target)
    number = settings["num_chains"] if chains is None else chains
    chosen = (
        settings["sampler"] if "sampler" in settings else choose(density, number)[0]
    )
    key, other = jax.random.split(jax.random.key(seed))

    def run(density: AnnealedDensity, sampler: Sampler, key: Array = other) -> Result:
        return api.infer(density, key, num_chains=number, sampler=sampler)

    first = run(density, chosen, key)
    draws = whose_error.reference_draws(
        module, reference, jax.random.fold_in(key, 1), number, list(first.samples)
    )
    expected = (
        None if draws is None else whose_error.draws_moments(first, draws)
    )  # refuses misfits before other runs
    name, relevelled = whose_error.twice_the_levels(density)
    fits = whose_error.fits(relevelled, chosen)
    if not fits:
        console.print(
            "The sampler has one step for each level: no other number of levels was tried."
        )
    refined = {
        "another key": (density, chosen),
        name: (relevelled, chosen if fits else None),
        Refinement.TRANSITIONS: (density, whose_error.longer(density, chosen)),
        Refinement.STEP: (density, whose_error.shorter_steps(density, chosen, first)),
    }
    again = {
        label: run(program, sampler)
        for label, (program, sampler) in refined.items()
        if sampler is not None
    }
    rows = {label: moments(result) for label, result in again.items()}
    table, largest = whose_error.compared(moments(first), rows)
    console.print(table)
    if (
        Refinement.COARSER in largest
    ):  # an error of order p is 1/(2^p − 1) of what half the levels change
        largest[Refinement.COARSER] /= 2 ** (chosen.check_order or 1) - 1
    sizes = {f"{name}: a difference of": size for name, size in largest.items()}
    if expected is not None:
        best = whose_error.finest(run, chosen, again, name, relevelled)
        table, whose = whose_error.split(moments(first), moments(best), expected)
        console.print(table)
        sizes |= {f"The {who}'s error:": size for who, size in whose.items()}
    found = [
        f"{what} {size:.1f} standard errors"
        for what, size in sizes.items()
        if size > tuning.REFINED_ERRORS
    ]
    compared_runs = (
        first.compare(again["another key"]).status if number >= 16 else first.status
    )
    found += [f"{code}: {text}" for code, text in compared_runs.findings]
    nothing = ["Nothing was found: the runs agree within their errors."]
    for text in [*whose_error.score_checks(density, first, key), *(found or nothing)]:
        console.print(text, highlight=False)
    if out is not None:
        print(f"wrote {first.report(out)}")
    raise typer.Exit(int(bool(found)))


@command
def new(
    folder: Annotated[
        Path,
        typer.Argument(metavar="NAME", help="The project's folder, which is made."),
    ],
) -> None:
    """Make a small project: a program, a network of its own that it trains, and a test.

    [b]Examples[/b]

        composeprob new crescents

        cd crescents && composeprob run program.py
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidValueError(
            f"{folder} exists and is not an empty folder.", fix="choose another name."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file in resources.files("composeprob.cli").joinpath("template").iterdir():
        if file.is_file():
            text = file.read_text(encoding="utf-8").replace(
                "# NAME\n", f"# {folder.resolve().name}\n"
            )
            (folder / file.name).write_text(text, encoding="utf-8")
            print(f"wrote {folder / file.name}")
    print(f"Run it: cd {folder} && composeprob run program.py")


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

    if name is None:
        zoo = api.zoo()
        rows = [("model", "offers", "weights", "error", "what it is")]
        for card in zoo.values():
            offers = "energy" if "energy" in card.capabilities else "score"
            error = (
                f"{card.quality['score_error']:.2g}"
                if "score_error" in card.quality
                else ""
            )
            rows.append(
                (
                    card.name,
                    offers,
                    card.trained.removeprefix("trained "),
                    error,
                    card.title,
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        table = Table(box=None, pad_edge=False)
        for title, width in zip(rows[0], [*widths, None], strict=True):
            table.add_column(
                title, no_wrap=True, min_width=width
            )  # a line a model: its card has what does not fit
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
        console.print(
            '\ncomposeprob zoo NAME shows one; cp.load("NAME") loads it.',
            highlight=False,
        )
        console.print(zoo.legend, highlight=False, markup=False)
        return
    console.print(Markdown(api.zoo(name).text))


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
            help="Train the same recipe with another random key, into weights-N.safetensors.",
        ),
    ] = 0,
    no_cache: NoCache = False,
) -> None:
    """Train a model of the zoo by its recipe, and write its weights, measurements and
    card into a folder of its own.

    cp.load(NAME, folder="out/NAME") loads them. To bring the zoo of a checkout up to
    date, write into models/NAME with --replace.

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
        again = (
            "the same command goes on"
            if checkpoint_dir
            else "with --checkpoint-dir it could go on"
        )
        print(f"stopped after {len(done.loss):,} steps; {again}")
    folder = done.written[0].parent
    print(f"wrote {', '.join(file.name for file in done.written)} into {folder}")
    number = f", retraining={retraining}" if retraining else ""
    print(f'cp.load("{model}"{number}, folder="{folder}") loads it')


@command
def devices(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE[:PROGRAM]]",
            help="What to compile; left out, the demo's ring × bar from the zoo.",
        ),
    ] = None,
    compile_for: Annotated[
        str | None,
        typer.Option(
            "--compile",
            metavar="TOPOLOGY",
            help="TPUs to compile for, such as v5e:4x4 or v4:4x4x4.",
        ),
    ] = None,
    chains_per_chip: Annotated[
        int, typer.Option(min=1, help="Chains on each chip.")
    ] = 64,
    diagnostics: Annotated[
        bool,
        typer.Option(
            help="Include the means over all chains that a result reports of each level."
        ),
    ] = True,
    mesh: Annotated[
        str | None, typer.Option(metavar="ROWSxCOLUMNS", help="As for run.")
    ] = None,
) -> None:
    """Show what programs would run on here; with --compile, what a run would take on
    TPUs that are not here.

    The real TPU compiler (pip install 'composeprob\\[tpu]') compiles a whole run,
    chains spread over the chips, for topologies of v4, v5e, v5p and v6e. Variables
    sampler and precision of FILE count, as for run. It runs nothing. Costs are its own
    estimates, and count the body of a loop once.

    [b]Examples[/b]

        composeprob devices

        composeprob devices --compile v5e:4x4

        composeprob devices scene.py:two_cubes --compile v5p:4x4x4

        composeprob devices benchmarks/sizes.py:sd15 --compile v5e:4x4 --chains-per-chip
        1
    """
    from composeprob.cli import hardware

    if compile_for is None:
        if target is not None:
            raise InvalidValueError(
                f"{target} was given, but nothing to compile it for.",
                fix="add --compile v5e:4x4.",
            )
        console.print(hardware.devices_table())
        return
    hardware.prepare_tpu_compiler()
    density, sampler = hardware.program(target)
    console.print(
        hardware.ahead(
            compile_for, density, chains_per_chip, sampler, diagnostics, mesh
        )
    )
