"""The output of `composeprob run`: the files of a result, and errors in the words of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from composeprob.json_data import JSONObject

if TYPE_CHECKING:
    from composeprob.results.result import Result


def in_options(text: str) -> str:
    """Returns an error's text, with the arguments of `infer` that it names as options of the command."""
    options = {"choose another checkpoint_dir, or start again:": "choose another --checkpoint-dir, or in the file"}
    for argument, option in options.items():
        text = text.replace(argument, option)
    return text


def write(result: Result, folder: Path, about: JSONObject, store: Path | None = None) -> list[Path]:
    """Writes samples (unless they are in a ``store``), picture, summary and numbers of a result into ``folder``.

    Returns:
        The files.
    """
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
