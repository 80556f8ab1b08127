"""The commands `run`, `zoo`, `train`, `calibrate`, `bench` and `devices`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from composeprob.cli.benchmarks import benchmarks, run_benchmark, title
from composeprob.cli.output import in_options, write
from composeprob.cli.programs import arguments, condition, load_program, presets
from composeprob.cli.samplers import RULES, KernelName, LogRatioName, SamplerName, make_sampler
from composeprob.errors import ComposeProbError, InvalidValueError

# jax and the rest of the library are imported inside the commands: `composeprob --help` answers at once.
app = typer.Typer(
    name="composeprob",
    help="Compose pretrained diffusion models in a probabilistic program, and sample it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # an exception in the user's own file keeps Python's plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()


def _clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print the library's deliberate errors without a traceback, and exit with 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ComposeProbError as error:
            told = f"{type(error).__name__}: {in_options(str(error))}"
            Console(stderr=True).print(told, style="red", markup=False, highlight=False)
            raise typer.Exit(2) from None

    return wrapped


@app.command()
@_clean_errors
def run(
    target: Annotated[
        str,
        typer.Argument(metavar="FILE[:PROGRAM]", help="A Python file, and which of its programs if it has several."),
    ],
    sampler: Annotated[
        SamplerName,
        typer.Option(
            help="[b]auto[/b] chooses by what the program's factors can do, and says why; [b]smc[/b]: sequential Monte "
            "Carlo; [b]annealed[/b]: independent MCMC chains; [b]ancestral[/b]: plain reverse diffusion, which is "
            "biased for products."
        ),
    ] = SamplerName.auto,
    kernel: Annotated[
        KernelName | None,
        typer.Option(
            help="How chains move at a level. [b]mala[/b] and [b]hmc[/b] are exact and need energies (or --log-ratio); "
            "[b]ula[/b] and [b]uhmc[/b] need only scores. Without --sampler, a kernel runs as --sampler annealed."
        ),
    ] = None,
    chains: Annotated[
        int | None, typer.Option(help="Number of chains, that is, of samples; left out, FILE's num_chains, or 1000.")
    ] = None,
    steps_per_level: Annotated[int | None, typer.Option(help="Kernel steps at each noise level.")] = None,
    step_size: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|adaptive",
            help="Step size of the kernel. Default: adaptive for mala and hmc; "
            + ", ".join(f"{rule} for {name}" for name, rule in RULES.items())
            + ", with σ the level's noise.",
        ),
    ] = None,
    num_leapfrog: Annotated[int, typer.Option(help="Leapfrog steps in one step of hmc or uhmc.")] = 3,
    damping: Annotated[float, typer.Option(help="Share of the momentum that hmc and uhmc keep between steps.")] = 0.5,
    log_ratio: Annotated[
        LogRatioName | None,
        typer.Option(
            help="What mala and hmc test with: [b]exact[/b] log-densities (the default), or a [b]line-integral[/b] of "
            "the score, for factors that offer nothing else."
        ),
    ] = None,
    num_points: Annotated[
        int | None,
        typer.Option(help="Points of the line integral, both ends included: 3 unless given; odd numbers are best."),
    ] = None,
    levels: Annotated[
        int | None,
        typer.Option(help="Use this many noise levels, evenly spaced in log-SNR over the program's own range."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers: the same seed gives the same samples.")] = 0,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for samples.safetensors, samples.png, summary.txt and results.json.", file_okay=False
        ),
    ] = Path("out"),
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoints: the same command goes on where it was stopped.", file_okay=False),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Refuse to start where there is no checkpoint, or start again whatever there is.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="Go on at level 0 and keep so many draws of each chain.", show_default=False)
    ] = None,
    thin: Annotated[int, typer.Option(help="Kernel steps between two draws.")] = 1,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Folder that the samples are streamed to in zarr format, so that memory does not grow with --draws; "
            "in place of samples.safetensors.",
            file_okay=False,
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Chains that a device evaluates at once: the same samples, bit for bit, on any number of devices.",
            show_default=False,
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Run on every device of all processes that are started with this command: found as JAX finds them "
            "(SLURM, Kubernetes, Open MPI, TPU pods), or told by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID. The folders must be the same for all; samples go to --store, by default OUT/samples.zarr.",
        ),
    ] = False,
) -> None:
    """Sample a program that is written in a Python file.

    FILE holds a function decorated with [b]@cp.program[/b]. A parameter of it gets its default value, or else the
    variable of the same name in FILE:

        ring, bar = cp.load("ring2d"), cp.load("bar2d")

        @cp.program
        def product(ring, bar):
            return cp.sample("x", ring * bar)

    Variables [b]sampler[/b] and [b]num_chains[/b] of FILE are used where the options name neither sampler nor chains.

    [b]Examples[/b]

        composeprob run examples/product.py

        composeprob run examples/product.py --kernel hmc --steps-per-level 3 --chains 2000

        composeprob run scene.py:two_cubes --sampler smc --levels 60 --out out/cubes

        composeprob run scene.py --chains 100000 --checkpoint-dir out/checkpoints --resume

        composeprob run scene.py --draws 10000 --thin 10 --store out/draws.zarr

        srun composeprob run scene.py --distributed --chains 100000 --chunk 250
    """
    import jax

    from composeprob import api
    from composeprob.cli.hardware import join

    if distributed:
        join()  # before anything looks for devices
        store = store or out / "samples.zarr"
    leads = jax.process_index() == 0 if distributed else True

    if resume is not None and checkpoint_dir is None:
        raise InvalidValueError(
            f"{'--resume' if resume else '--no-resume'} was given, but no folder of checkpoints.",
            fix="add --checkpoint-dir FOLDER.",
        )
    program, module = load_program(target)
    args = arguments(program, module)
    chosen = make_sampler(sampler, kernel, steps_per_level, step_size, num_leapfrog, damping, log_ratio, num_points)
    own_sampler, own_chains = presets(module)
    chosen, chains = chosen or own_sampler, own_chains if chains is None else chains
    density = api.compile(program, **args)
    if levels is not None:
        own = density.schedule.log_snr
        schedule = api.Schedule.log_snr(levels, min=float(own[-1]), max=float(own[0]))
        density = api.compile(program, **args, schedule=schedule)
    if leads:
        print(density)
    result = api.infer(
        density,
        jax.random.key(seed),
        num_chains=chains,
        sampler=chosen,
        chunk=chunk,
        progress=leads,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        draws=draws,
        thin=thin,
        store=store,
    )
    if not leads:
        return
    summary = str(result.summary())
    print(f"\n{summary}\n")
    about = {"program": program.name, "file": target.rpartition(":")[0] or target, "seed": seed}
    try:
        written = write(result, out, about, store)
    except OSError as error:  # a full disk loses no samples
        spare = result.save(Path(tempfile.mkdtemp(prefix="composeprob-")) / "samples.safetensors")
        Console(stderr=True).print(f"{out} cannot be written: {error}. The samples are in {spare}.", style="red")
        raise typer.Exit(1) from None
    for path in written:
        print(f"wrote {path}")
    if not result.status.ok:
        Console(stderr=True).print("The run has problems; see its status above.", style="yellow")
    if result.status.code.value == "interrupted":
        raise typer.Exit(130)


@app.command()
@_clean_errors
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
        table = Table("model", "event", "offers", "trained", "score error", "what it is")
        table.columns[0].no_wrap = True  # a name is there to be copied
        for card in api.zoo().values():
            offers = "energy" if "energy" in card.capabilities else "score only"
            error = f"{card.quality['score_error']:.2g}" if "score_error" in card.quality else ""
            trained = f"{len(card.retrainings)}×"
            table.add_row(card.name, str(card.event_shape), offers, trained, error, card.title)
        console.print(table)
        console.print("score error: mean of σ²·|score − exact score|², where the exact one is known.", highlight=False)
        console.print('composeprob zoo NAME shows one; cp.load("NAME") loads it.', highlight=False)
        console.print(
            'trained: how many times, with other random keys; cp.load("NAME", retraining=1).', highlight=False
        )
        return
    console.print(Markdown(api.zoo(name).text))


@app.command()
@_clean_errors
def train(
    model: Annotated[str, typer.Argument(help="A model of the zoo: a folder in models/ with a train.py.")],
    iterations: Annotated[int | None, typer.Option(help="Optimiser steps; by default those of its recipe.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write weights.safetensors; by default into the model's folder.")
    ] = None,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints: the same command goes on where it was stopped.")
    ] = None,
    retraining: Annotated[
        int, typer.Option(min=0, help="Train the same recipe with another random key, into weights-N.safetensors.")
    ] = 0,
) -> None:
    """Train a model of the zoo by its recipe, and write its weights.

    [b]Examples[/b]

        composeprob train ring2d

        composeprob train ring2d --iterations 500 --out out/ring2d --checkpoint-dir out/checkpoints

        composeprob train ring2d-sharp --retraining 1
    """
    from composeprob.training import train_model

    train_model(model, checkpoint_dir=checkpoint_dir, out=out, iterations=iterations, retraining=retraining)


@app.command()
@_clean_errors
def calibrate(
    model: Annotated[str, typer.Argument(help="A trained model of the zoo that has an energy.")],
    retraining: Annotated[int, typer.Option(min=0, help="Which of its trainings.")] = 0,
    given: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="The value of a condition; once for each.")
    ] = None,
    chains: Annotated[int, typer.Option(min=2, help="Chains of each repeat; fewer for large models.")] = 1000,
) -> None:
    """Find the log-normaliser of a model at every noise level, so that weights of mixtures with it are shares.

    Writes calibration.safetensors beside its weights; cp.load applies it. Training does this too.

    [b]Examples[/b]

        composeprob calibrate ring2d

        composeprob calibrate ring2d-sharp --retraining 1

        composeprob calibrate digits --given label=3 --chains 200
    """
    from composeprob.calibration import calibrate_model

    conditions = dict(condition(text) for text in given or [])
    print(calibrate_model(model, retraining=retraining, conditions=conditions, num_chains=chains))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@_clean_errors
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which benchmark; left out, lists them.")] = None,
) -> None:
    """Run a benchmark of a checkout, which prints its table and writes it to benchmarks/results/.

    What follows the name goes to the benchmark: [b]composeprob bench paper-2d --chains 100[/b]. It exits with 1 if
    something that it checks does not hold.

    [b]Examples[/b]

        composeprob bench

        composeprob bench paper-2d
    """
    if name is None:
        table = Table("benchmark", "what it measures")
        for known, script in benchmarks().items():
            table.add_row(known, title(script))
        console.print(table)
        return
    run_benchmark(name, context.args)


@app.command()
@_clean_errors
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
) -> None:
    """Show what programs would run on here; with --compile, what a run would take on TPUs that are not here.

    The real TPU compiler (pip install 'composeprob\\[tpu]') compiles a whole run, chains spread over the chips, for
    topologies of v4, v5e, v5p and v6e. It runs nothing. Costs are its own estimates, and count the body of a loop once.

    [b]Examples[/b]

        composeprob devices

        composeprob devices --compile v5e:4x4

        composeprob devices scene.py:two_cubes --compile v5p:4x4x4 --kernel mala --step-size 0.01
    """
    from composeprob.cli import hardware

    if compile_for is None:
        if target is not None:
            raise InvalidValueError(f"{target} was given, but nothing to compile it for.", fix="add --compile v5e:4x4.")
        console.print(hardware.here())
        return
    hardware.prepare_tpu_compiler()
    chosen = make_sampler(sampler, kernel, None, step_size, 3, 0.5)
    console.print(hardware.ahead(compile_for, target, chains_per_chip, chosen, diagnostics))
