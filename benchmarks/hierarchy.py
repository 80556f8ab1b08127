"""A hierarchy with a learned prior: the default run, NUTS and quadrature.

All have the same density.

    python -m benchmarks hierarchy [--keys 5]

Five groups of ten readings in the plane; the groups lie around a place whose prior is
the zoo's `ring2d`, at an unknown distance tau. Written centred and non-centred. The
reference is quadrature over the learned prior's own energy, so that what is missed is
the sampler's. Every run is a process of its own, from which its processor seconds are
told, with compilation and nothing kept from other runs; of further keys only the
answers count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from report import publish

import composeprob as cp

CHAINS = 200
GROUPS, READINGS, NOISE, WIDTH = 5, 10, 0.2, 0.1
"""Groups, readings of each, their noise, and the scale of tau's half-normal prior;
chains of a run."""


def data() -> np.ndarray:
    """(groups, readings, 2)."""
    rng = np.random.default_rng(3)
    theta = np.array([0.5, 0.0]) + 0.1 * rng.standard_normal((GROUPS, 1, 2))
    return theta + NOISE * rng.standard_normal((GROUPS, READINGS, 2))


Y = jnp.asarray(data(), jnp.float32)


def around(values: Any) -> Any:
    return dist.Normal(values[:, None, :], NOISE).to_event(3)


@cp.program
def centred(prior: Any) -> None:
    x = cp.sample("x", prior)
    tau = cp.sample("tau", dist.HalfNormal(WIDTH))
    theta = cp.sample("theta", dist.Normal(x, tau).expand([GROUPS, 2]).to_event(2))
    cp.observe("y", around(theta), Y)


@cp.program
def non_centred(prior: Any) -> None:
    x = cp.sample("x", prior)
    tau = cp.sample("tau", dist.HalfNormal(WIDTH))
    z = cp.sample("z", dist.Normal(0.0, 1.0).expand([GROUPS, 2]).to_event(2))
    cp.observe("y", around(x + tau * z), Y)


FORMS = {"centred": centred, "non-centred": non_centred}


def quadrature() -> tuple[float, float]:
    """Mean and sd of tau: the groups are integrated in closed form, the place and tau
    on grids."""
    prior = cp.compile(cp.program(lambda f: cp.sample("x", f)), cp.load("ring2d"))
    side = np.linspace(-1.2, 1.2, 241)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    alpha = float(prior.schedule.alpha[0])
    log_prior = np.asarray(
        jax.jit(jax.vmap(lambda x: prior.log_density({"x": x}, 0)))(
            jnp.asarray(alpha * grid)
        )
    )
    taus = np.linspace(0.0, 6 * WIDTH, 601)[1:]
    away = ((np.asarray(Y, float).mean(1)[:, None] - grid) ** 2).sum(-1).sum(0)
    spread = taus**2 + NOISE**2 / READINGS
    joint = (
        log_prior[None]
        - 0.5 * away / spread[:, None]
        - GROUPS * np.log(spread)[:, None]
    )
    log_tau = np.logaddexp.reduce(joint, axis=1) - 0.5 * (taus / WIDTH) ** 2
    weight = np.exp(log_tau - log_tau.max())
    mean = weight @ taus / weight.sum()
    return float(mean), float(np.sqrt(weight @ (taus - mean) ** 2 / weight.sum()))


def ours(density: Any, key: int) -> dict[str, Any]:
    """A default run."""
    result = cp.infer(density, jax.random.key(key), num_chains=CHAINS, progress=False)
    return {
        "tau": result["tau"].tolist(),
        "status": str(result.status.code),
        "evaluations": result.evaluations,
    }


def nuts(density: Any, key: int) -> dict[str, Any]:
    """NumPyro's NUTS at its defaults on the log-density of level 0: 4 chains, 1,000
    steps each after as many."""
    start = density.initial(jax.random.key(0), density.num_levels - 1)

    def potential(position: Any) -> Any:
        return -density.log_density(position, 0)

    chains = MCMC(
        NUTS(potential_fn=potential),
        num_warmup=1000,
        num_samples=1000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    alpha = float(density.schedule.alpha[0])
    place = jnp.asarray(np.asarray(Y).mean((0, 1)) * alpha)
    init = {name: jnp.zeros((4, *value.shape)) for name, value in start.items()} | {
        "x": jnp.tile(place, (4, 1))
    }
    init["tau"] = jnp.full((4,), np.log(WIDTH))
    chains.run(jax.random.key(key), init_params=init)
    return {
        "tau": np.exp(np.asarray(chains.get_samples()["tau"])).tolist(),
        "status": "",
        "evaluations": 0,
    }


WAYS = {"cp.infer": ours, "NUTS": nuts}


def one(form: str, way: str, keys: int) -> dict[str, Any]:
    """Runs of one row in this process; the seconds are those of the first, with
    everything before it but imports."""
    began = time.process_time(), time.monotonic()
    density = cp.compile(FORMS[form], cp.load("ring2d"))
    runs = [WAYS[way](density, 0)]
    seconds = time.process_time() - began[0], time.monotonic() - began[1]
    runs += [WAYS[way](density, key) for key in range(1, keys)]
    return {
        "means": [float(np.mean(run["tau"])) for run in runs],
        "sds": [float(np.std(run["tau"])) for run in runs],
        "status": sorted({run["status"] for run in runs}),
        "processor": seconds[0],
        "clock": seconds[1],
        "evaluations": runs[0]["evaluations"],
    }


def apart(form: str, way: str, keys: int) -> dict[str, Any]:
    """`one` in a process of its own, which finds nothing compiled."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            f"import json, hierarchy as h; print(json.dumps(h.one({form!r}, {way!r}, "
            f"{keys})))"
        )
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
        here = Path(__file__).parent
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=5)
    options = parser.parse_args()
    mean, sd = quadrature()
    rows: list[list[str]] = [
        ["quadrature", "", f"{mean:.4f} ± {sd:.4f}", "", "", "", "", ""]
    ]
    found: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        for way in WAYS:
            row = found[f"{form}, {way}"] = apart(form, way, options.keys)
            off = row["off"] = abs(float(np.mean(row["means"])) - mean) / sd
            rows.append(
                [
                    form,
                    way,
                    f"{np.mean(row['means']):.4f} ± {np.mean(row['sds']):.4f}",
                    f"{off:.3f}",
                    ", ".join(row["status"]),
                    f"{row['evaluations'] or ''}",
                    f"{row['processor']:.1f}",
                    f"{row['clock']:.1f}",
                ]
            )
            print("  ".join(rows[-1]), flush=True)
    checks = {}
    for form in FORMS:
        mine, theirs = found[f"{form}, cp.infer"], found[f"{form}, NUTS"]
        chance = 2 / np.sqrt(CHAINS * options.keys)
        checks[
            f"{form}: as near to quadrature as NUTS, to within {chance:.2f} sd, what "
            "chance does to as many draws"
        ] = mine["off"] < theirs["off"] + chance
        ratio = mine["processor"] / theirs["processor"]
        checks[f"{form}: at most NUTS's processor seconds ({ratio:.2f})"] = ratio <= 1.0
    columns = [
        "form",
        "by",
        "tau, mean ± sd",
        "off by, sd",
        "status",
        "evaluations",
        "processor s",
        "clock s",
    ]
    notes = (
        f"{CHAINS} chains, and 4 of NUTS with 1,000 draws each, NumPyro's defaults. "
        f"Means over {options.keys} keys; "
    )
    notes += (
        "seconds are of the first key's run, with compilation, in a process of its own."
    )
    return publish(
        "hierarchy",
        "A hierarchy with a learned prior",
        columns,
        rows,
        checks,
        {"rows": found},
        notes,
    )


if __name__ == "__main__":
    sys.exit(main())
