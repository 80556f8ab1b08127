"""DAPPER's filters on a series of Lorenz-63 or Lorenz-96, run by the Python that has
DAPPER.

    PYTHON benchmarks/filters/dapper_filters.py SERIES.npz FOUND.json

`pip install dapper` in an environment of its own. The settings are those that DAPPER
suggests for these problems (Sakov, Oliver and Bertino 2012, table 1; Bocquet 2010;
Sakov and Oke 2008). DAPPER's series has no datum at its first state: the filters begin
there with the law of the first state, and see the data from the second state on.
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any, NamedTuple

import dapper.da_methods as da
import numpy as np
from dapper.mods import Chronology, GaussRV, HiddenMarkovModel
from dapper.mods.Lorenz63.sakov2012 import HMM as LORENZ_63
from dapper.mods.Lorenz96.bocquet2010 import HMM as RING_10
from dapper.mods.Lorenz96.sakov2008 import HMM as RING_40
from dapper.tools.seeding import set_seed

FILTERS = {
    "3D-Var": lambda: da.Var3D(xB=0.1),
    "EnKF, square root, 10": lambda: da.EnKF("Sqrt", N=10, infl=1.02, rot=True),
    "EnKF, perturbed observations, 100": lambda: da.EnKF("PertObs", N=100, infl=1.01),
    "EnKF-N, 10": lambda: da.EnKF_N(N=10, rot=True),
    "iEnKS, 10": lambda: da.iEnKS("Sqrt", N=10, infl=1.02, rot=True),
    "particle filter, 800": lambda: da.PartFilt(N=800, reg=0.9, NER=0.2),
    "particle filter, 4,000": lambda: da.PartFilt(N=4000, reg=0.7, NER=0.05),
}


OF_RING_10 = {
    "EnKF-N, 8": lambda: da.EnKF_N(N=8, rot=True, xN=1.3),
    "particle filter, 800": lambda: da.PartFilt(N=800, NER=0.2, reg=0.8),
    "optimal particle filter, 800": lambda: da.OptPF(N=800, NER=0.2, reg=0.6, Qs=0.1),
}

OF_RING_40 = {
    "3D-Var": lambda: da.Var3D(xB=0.02),
    "EnKF, perturbed observations, 40": lambda: da.EnKF("PertObs", N=40, infl=1.06),
    "EnKF, square root, 24": lambda: da.EnKF("Sqrt", N=24, infl=1.013, rot=True),
    "LETKF, 7": lambda: da.LETKF(N=7, rot=True, infl=1.04, loc_rad=4),
    "particle filter, 1,000": lambda: da.PartFilt(N=1000, NER=0.2, reg=1.2),
}


class Problem(NamedTuple):
    """A model of DAPPER's, the steps between two observations, and its filters.

    Attributes:
        model: with the law of observations.
        length: of a step.
        steps: between two observations.
        burn_in: first states whose errors do not count.
        filters: by name.
    """

    model: Any
    length: float
    steps: int
    burn_in: int
    filters: dict[str, Any]


PROBLEMS = {
    3: Problem(LORENZ_63, 0.01, 25, 16, FILTERS),
    10: Problem(RING_10, 0.05, 1, 60, OF_RING_10),
    40: Problem(RING_40, 0.05, 1, 60, OF_RING_40),
}
"""The problem of states of so many numbers."""


def dense(states: np.ndarray, problem: Problem) -> np.ndarray:
    """Return the true states at all steps, each stretch from its first one."""
    path = [states[0]]
    for state in states[:-1]:
        x = state
        for _ in range(problem.steps):
            x = problem.model.Dyn.model(x, 0.0, problem.length)
            path.append(x)
    return np.array(path)


def main() -> None:
    source, target = sys.argv[1:]
    series = np.load(source)
    states = series["states"].astype(float)
    observations = series["observations"].astype(float)[1:]
    number = len(observations)
    problem = PROBLEMS[states.shape[1]]
    steps = problem.steps
    times = Chronology(problem.length, dko=steps, K=steps * number, BurnIn=0, Tplot=1)
    first = GaussRV(C=float(series["variance"]), mu=series["start"].astype(float))
    known = problem.model
    model = HiddenMarkovModel(known.Dyn, known.Obs, times, first)
    truth = dense(states, problem)
    found = {}
    for name, make in problem.filters.items():
        set_seed(3000)
        method = make()
        began = time.monotonic()
        method.assimilate(model, truth, observations, liveplots=False)
        seconds = time.monotonic() - began
        # Root mean squares of the analysis at the data; the first states are left out.
        errors = np.asarray(method.stats.err.rms.a)[problem.burn_in - 1 :]
        found[name] = {"error": float(errors.mean()), "seconds": seconds}
        print(name, found[name], flush=True)
    with open(target, "w", encoding="utf-8") as file:
        json.dump({"version": version("dapper"), "filters": found}, file)


if __name__ == "__main__":
    main()
