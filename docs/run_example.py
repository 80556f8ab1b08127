"""python run_example.py FILE FOLDER: runs an example for the gallery, and writes
run.json beside its pictures."""

import contextlib
import importlib.util
import inspect
import io
import json
import os
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt

from composeprob.results.plotting import SIZES

CHAINS = 300
"""At most so many, that the site is built in minutes; an example's own number may be
greater."""


def main(file: str, folder: str) -> None:
    """`needs` names a package that is not installed; nothing else that goes wrong is
    forgiven."""
    printed, needs, started = io.StringIO(), "", time.monotonic()
    plt.rcParams["savefig.dpi"] = (
        SIZES.pixels_an_inch
    )  # as of the library's own pictures
    with contextlib.redirect_stdout(printed):
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as error:
            needs = (error.name or "").partition(".")[0]
            if importlib.util.find_spec(needs):
                raise  # the package is here, and lacks a module of its own
        else:
            given = inspect.signature(module.main).parameters
            chains = (
                {"num_chains": min(given["num_chains"].default, CHAINS)}
                if "num_chains" in given
                else {}
            )
            module.main(out=folder, **chains)
    told = {
        "printed": printed.getvalue().replace(folder, "out"),
        "seconds": time.monotonic() - started,
        "processor": time.process_time(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "needs": needs,
    }
    Path(folder, "run.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
