"""The command line itself: the application that commands join, its console, errors, and the files of a run."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from composeprob.errors import ComposeProbError
from composeprob.json_data import JSONObject
from composeprob.text import spell_out

if TYPE_CHECKING:
    from composeprob.results.result import Result


def write(result: Result, folder: Path, about: JSONObject, store: Path | None = None) -> list[Path]:
    """Writes samples (unless they are in a ``store``), picture, summary and numbers of a result into ``folder``;
    returns the files."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    samples, picture = store or result.save(folder / "samples.safetensors"), folder / "samples.png"
    figure = result.plot()
    figure.savefig(picture)
    plt.close(figure)
    summary, numbers = folder / "summary.txt", folder / "results.json"
    summary.write_text(f"{result.summary()}\n", encoding="utf-8")
    numbers.write_text(json.dumps({**about, **result.numbers()}, indent=1) + "\n", encoding="utf-8")
    return [samples, picture, summary, numbers]


# jax and the rest of the library are imported inside the commands: `composeprob --help` answers at once.
app = typer.Typer(
    name="composeprob",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # an exception in the user's own file keeps Python's plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
Target = Annotated[
    str, typer.Argument(metavar="FILE[:PROGRAM]", help="A Python file, and which of its programs if it has several.")
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Keep no compiled code. Else it is in a private folder under the user's cache."),
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compose pretrained diffusion models in a probabilistic program, and sample it."""


def clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a command print the library's deliberate errors without a traceback, and exit with 2."""

    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except ComposeProbError as error:
            text = f"{type(error).__name__}: {error}".replace(  # an argument of `infer` is an option here
                "choose another checkpoint_dir, or start again:", "choose another --checkpoint-dir, or in the file"
            )
            Console(stderr=True).print(text, style="red", markup=False, highlight=False)
            raise typer.Exit(2) from None

    return wrapped


def keep_compiled(no_cache: bool) -> None:
    """Keeps what this process compiles for the next one, unless told not to; the first time it says where."""
    from composeprob.compiled_code import cache, default_cache

    if no_cache:
        return
    first = not default_cache().exists()
    folder = cache()
    if first and folder == default_cache():
        text = f"Compiled code is kept in {folder}, up to 1 GiB, for the next run; --no-cache keeps none."
        Console(stderr=True, soft_wrap=True).print(text, highlight=False)
