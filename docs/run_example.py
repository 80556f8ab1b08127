"""Run an example for the gallery, and write run.json beside its pictures.

python run_example.py FILE FOLDER
"""

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

from composeprob.plotting import SIZES

CHAINS = 300
"""Greatest number of chains, so that the site is built in minutes."""


def main(file: str, folder: str) -> None:
    """Run an example.

    A missing package is recorded as `needs`; any other failure is raised.
    """
    printed = io.StringIO()
    needs = ""
    started = time.monotonic()
    # The resolution of the library's own pictures.
    plt.rcParams["savefig.dpi"] = SIZES.pixels_an_inch
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
            parameters = inspect.signature(module.main).parameters
            options = {}
            if "num_chains" in parameters:
                options["num_chains"] = min(parameters["num_chains"].default, CHAINS)
            module.main(out=folder, **options)
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    record = {
        "printed": printed.getvalue().replace(folder, "out"),
        "seconds": time.monotonic() - started,
        "processor": time.process_time(),
        "cores": cores,
        "needs": needs,
    }
    Path(folder, "run.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
