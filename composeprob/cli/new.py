"""The command `new`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from composeprob.cli.shell import app, clean_errors
from composeprob.errors import InvalidValueError


@app.command()
@clean_errors
def new(
    folder: Annotated[Path, typer.Argument(metavar="NAME", help="The project's folder, which is made.")],
) -> None:
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
