"""The command `run`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from composeprob.cli.output import write
from composeprob.cli.programs import arguments, load_program, presets
from composeprob.cli.samplers import RULES, KernelName, LogRatioName, SamplerName, make_sampler
from composeprob.cli.shell import app, clean_errors
from composeprob.errors import InvalidValueError


@app.command()
@clean_errors
def run(
    target: Annotated[
        str,
        typer.Argument(metavar="FILE[:PROGRAM]", help="A Python file, and which of its programs if it has several."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A diffusers folder, or owner/name on the hub: the value of the program's parameter [b]model[/b].",
            show_default=False,
        ),
    ] = None,
    sampler: Annotated[
        SamplerName,
        typer.Option(
            help="[b]auto[/b] chooses by what the program's factors can do; [b]smc[/b]: sequential Monte "
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
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="bfloat16", help="Numbers that networks multiply; left out, as they are.", show_default=False
        ),
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
        int | None, typer.Option(help="Go on at level 0 and keep this many draws of each chain.", show_default=False)
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
            help="Chains that a device evaluates at once: the same samples, bit for bit, on two devices or more.",
            show_default=False,
        ),
    ] = None,
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

        composeprob run scene.py --mesh 2x4

        composeprob run examples/text_to_image.py:both --model FOLDER
    """
    import jax

    from composeprob import api
    from composeprob.cli.hardware import arranged_devices, join

    if distributed:
        join()  # before anything looks for devices
        store = store or out / "samples.zarr"
    leads = jax.process_index() == 0 if distributed else True

    if resume is not None and checkpoint_dir is None:
        raise InvalidValueError(
            f"{'--resume' if resume else '--no-resume'} was given, but no folder of checkpoints.",
            fix="add --checkpoint-dir FOLDER.",
        )
    devices = arranged_devices(jax.devices(), mesh)
    program, module = load_program(target)
    args = arguments(program, module, {} if model is None else {"model": lambda: api.from_diffusers(model)})
    chosen = make_sampler(sampler, kernel, steps_per_level, step_size, num_leapfrog, damping, log_ratio, num_points)
    own_sampler, own_chains = presets(module)
    chosen, chains = chosen or own_sampler, own_chains if chains is None else chains
    density = api.compile(program, **args, precision=precision)
    if levels is not None:
        native = density.schedule.log_snr
        schedule = api.Schedule.log_snr(levels, min=float(native[-1]), max=float(native[0]))
        density = api.compile(program, **args, schedule=schedule, precision=precision)
    if leads:
        print(density)
    result = api.infer(
        density,
        jax.random.key(seed),
        num_chains=chains,
        sampler=chosen,
        mesh=None if devices is None else jax.sharding.Mesh(devices, ("chains", "model")),
        chunk=chunk,
        progress=leads,
        checkpoint_dir=None if checkpoint_dir is None else api.Checkpoint(checkpoint_dir, resume),
        draws=api.Draws(draws, thin, store),
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
