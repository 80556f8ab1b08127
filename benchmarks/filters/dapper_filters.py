"""DAPPER's filters on a series of Lorenz-63, run by the Python that has DAPPER.

    PYTHON benchmarks/filters/dapper_filters.py SERIES.npz FOUND.json

`pip install dapper` in an environment of its own. The settings are those that DAPPER
suggests for this problem (Sakov, Oliver and Bertino 2012, table 1). DAPPER's series
has no datum at its first state: the filters begin there with the law of the first
state, and see the data from the second state on.
"""

import json
import sys
import time
from importlib.metadata import version

import dapper.da_methods as da
import numpy as np
from dapper.mods import Chronology, GaussRV, HiddenMarkovModel
from dapper.mods.Lorenz63.sakov2012 import HMM as SAKOV
from dapper.tools.seeding import set_seed

STEPS = 25
"""Steps of 0.01 between two observations."""

BURN_IN = 16

FILTERS = {
    "3D-Var": lambda: da.Var3D(xB=0.1),
    "EnKF, square root, 10": lambda: da.EnKF("Sqrt", N=10, infl=1.02, rot=True),
    "EnKF, perturbed observations, 100": lambda: da.EnKF("PertObs", N=100, infl=1.01),
    "EnKF-N, 10": lambda: da.EnKF_N(N=10, rot=True),
    "iEnKS, 10": lambda: da.iEnKS("Sqrt", N=10, infl=1.02, rot=True),
    "particle filter, 800": lambda: da.PartFilt(N=800, reg=0.9, NER=0.2),
    "particle filter, 4,000": lambda: da.PartFilt(N=4000, reg=0.7, NER=0.05),
}


def dense(states: np.ndarray) -> np.ndarray:
    """Return the true states at all steps of 0.01, each stretch from its first one."""
    path = [states[0]]
    for state in states[:-1]:
        x = state
        for _ in range(STEPS):
            x = SAKOV.Dyn.model(x, 0.0, 0.01)
            path.append(x)
    return np.array(path)


def main() -> None:
    source, target = sys.argv[1:]
    series = np.load(source)
    states = series["states"].astype(float)
    observations = series["observations"].astype(float)[1:]
    number = len(observations)
    times = Chronology(0.01, dko=STEPS, K=STEPS * number, BurnIn=0, Tplot=1)
    first = GaussRV(C=2.0, mu=series["start"].astype(float))
    model = HiddenMarkovModel(SAKOV.Dyn, SAKOV.Obs, times, first)
    truth = dense(states)
    found = {}
    for name, make in FILTERS.items():
        set_seed(3000)
        method = make()
        began = time.monotonic()
        method.assimilate(model, truth, observations, liveplots=False)
        seconds = time.monotonic() - began
        # Root mean squares of the analysis at the data; the first states are left out.
        errors = np.asarray(method.stats.err.rms.a)[BURN_IN - 1 :]
        found[name] = {"error": float(errors.mean()), "seconds": seconds}
        print(name, found[name], flush=True)
    with open(target, "w", encoding="utf-8") as file:
        json.dump({"version": version("dapper"), "filters": found}, file)


if __name__ == "__main__":
    main()
