"""The command `run`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from composeprob.cli.programs import compiled
from composeprob.cli.shell import NoCache, Target, app, clean_errors, keep_compiled, write
from composeprob.errors import InvalidValueError


@app.command()
@clean_errors
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
        int | None, typer.Option(help="Number of chains, that is, of samples; left out, FILE's num_chains, or 1000.")
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

    FILE holds a function decorated with [b]@cp.program[/b]. A parameter of it gets its default value, or else the
    variable of the same name in FILE:

        ring, bar = cp.load("ring2d"), cp.load("bar2d")

        @cp.program
        def product(ring, bar):
            return cp.sample("x", ring * bar)

    Other variables of FILE say how it is sampled, as arguments of cp.infer and cp.compile:

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
    leads = jax.process_index() == 0 if distributed else True
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
    result = api.infer(density, jax.random.key(seed), mesh=grid, progress=leads, draws=draws, **settings)
    if not leads:
        return
    summary = str(result.summary())
    print(f"\n{summary}\n")
    about = {"program": density.graph.name, "file": target.rpartition(":")[0] or target, "seed": seed}
    try:
        written = write(result, out, about, store)
    except (OSError, InvalidValueError) as error:  # a full disk loses no samples
        spare = result.save(Path(tempfile.mkdtemp(prefix="composeprob-")) / "samples.safetensors")
        Console(stderr=True).print(f"{out} cannot be written: {error}. The samples are in {spare}.", style="red")
        raise typer.Exit(1) from None
    for path in written:
        print(f"wrote {path}")
    if not result.status.ok:
        Console(stderr=True).print("The run has problems; see its status above.", style="yellow")
    if result.status.code.value == "interrupted":
        raise typer.Exit(130)
