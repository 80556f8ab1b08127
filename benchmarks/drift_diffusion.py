"""Forty-four subjects of a drift-diffusion model, from a network that saw one.

It measures coverage, and compares with NUTS.

    python -m benchmarks drift-diffusion [--studies 20] [--beside 20] [--alone 2]

A study is drawn from the hierarchy's own priors: 44 subjects with a drift rate,
boundary and non-decision time each, and 200 trials of each. The zoo's
`drift-diffusion-posterior`, trained once on single subjects under a broad prior, is the
evidence of each; `cp.infer` is called with its defaults. 90 % intervals of all group
and subject parameters are asked whether they hold the truth. For some of the studies
NUTS samples the same hierarchy with the likelihood itself, the series of Navarro and
Fuss; and the estimator's posterior of each subject alone is compared with the exact
one, by importance sampling, so that its part in the difference is known.

Studies are kept in out/, so that the same command goes on where it was stopped. Trials
are drawn without steps of time: ssm-simulators' Euler steps of a millisecond lengthen
decision times by some four per cent.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, init_to_value
from report import kept, publish

import composeprob as cp
from composeprob.models.worlds import drift_diffusion as world

SUBJECTS, CHAINS = 44, 99
NAMES = ("drift", "log boundary", "log non-decision time")
CENTRE = jnp.array([1.5, 0.3, -1.2])
AROUND = jnp.array([0.75, 0.25, 0.25])
SPREAD = jnp.array([0.75, 0.25, 0.25])
"""Scales of the priors of the group's means, normal, and of its scales, half-normal."""
R_HAT = 1.05
"""Largest r-hat of group parameters with which NUTS is a reference."""
DRAWS, PROPOSALS = 1000, 10_000
"""Numbers of draws of one subject's posterior by the estimator, and of importance
samples for the exact one."""


@cp.program
def study(posterior: Any, prior: Any, xs: Any) -> None:
    mu = cp.sample("mu", dist.Normal(CENTRE, AROUND).to_event(1))
    tau = cp.sample("tau", dist.HalfNormal(SPREAD).to_event(1))
    with numpyro.plate("subjects", len(xs)):
        eta = cp.sample("eta", dist.Normal(mu, tau).to_event(1))
        cp.factor("trials", posterior.given(x=xs) / prior, at=eta)


def written(times: Any, choices: Any) -> None:
    """The same hierarchy with its likelihood, for NumPyro."""
    mu = numpyro.sample("mu", dist.Normal(CENTRE, AROUND).to_event(1))
    tau = numpyro.sample("tau", dist.HalfNormal(SPREAD).to_event(1))
    with numpyro.plate("subjects", len(times)):
        eta = numpyro.sample("eta", dist.Normal(mu, tau).to_event(1))
        numpyro.factor("trials", jax.vmap(world.log_likelihood)(eta, times, choices))


def drawn(number: int) -> tuple[dict[str, np.ndarray], Any, Any]:
    """The truth of a study, and its response times and choices, (44, 200) each."""
    keys = jax.random.split(jax.random.key(100 + number), 4)
    mu = CENTRE + AROUND * jax.random.normal(keys[0], (3,))
    tau = SPREAD * jnp.abs(jax.random.normal(keys[1], (3,)))
    eta = mu + tau * jax.random.normal(keys[2], (SUBJECTS, 3))
    times, choices = world.trials(keys[3], eta)
    return (
        {
            name: np.asarray(value)
            for name, value in (("mu", mu), ("tau", tau), ("eta", eta))
        },
        times,
        choices,
    )


def seconds() -> np.ndarray:
    return np.array([time.process_time(), time.monotonic()])


def ours(posterior: Any, prior: Any, number: int) -> dict[str, Any]:
    """A default run: its group parameters, and the share of draws below the truth of
    every parameter."""
    truth, times, choices = drawn(number)
    began = seconds()
    density = cp.compile(study, posterior, prior, world.summaries(times, choices))
    result = cp.infer(
        density, jax.random.key(number), num_chains=CHAINS, progress=False
    )
    cpu, clock = seconds() - began
    draws = {name: np.asarray(result[name]) for name in truth}
    below = {name: (draws[name] < truth[name]).sum(0).tolist() for name in truth}
    moments = {
        name: [draws[name].mean(0).tolist(), draws[name].std(0).tolist()]
        for name in truth
    }
    return {
        "below": below,
        "moments": moments,
        "status": str(result.status.code),
        "reason": result.reason,
        "evaluations": result.evaluations,
        "cpu": cpu,
        "clock": clock,
    }


def nuts(number: int) -> dict[str, Any]:
    """NumPyro's NUTS on the written likelihood: 2 chains, 500 draws each after as
    many."""
    truth, times, choices = drawn(number)
    began = seconds()
    start = jnp.stack(
        [jnp.full(SUBJECTS, 1.0), jnp.full(SUBJECTS, 0.3), jnp.log(0.8 * times.min(1))],
        axis=1,
    )
    init = init_to_value(
        values={"mu": start.mean(0), "tau": 0.5 * SPREAD, "eta": start}
    )
    chains = MCMC(
        NUTS(written, init_strategy=init),
        num_warmup=500,
        num_samples=500,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    chains.run(jax.random.key(number), times, choices)
    found = chains.get_samples(group_by_chain=True)
    cpu, clock = seconds() - began
    summary = numpyro.diagnostics.summary(found)
    moments = {
        name: [np.mean(a, (0, 1)).tolist(), np.std(a, (0, 1)).tolist()]
        for name, a in found.items()
    }
    below = {
        name: np.mean(a < truth[name], (0, 1)).tolist() for name, a in found.items()
    }
    worst = {
        name: float(np.max(summary[name]["r_hat"])) for name in ("mu", "tau", "eta")
    }
    least = min(float(np.min(summary[name]["n_eff"])) for name in ("mu", "tau"))
    return {
        "below": below,
        "moments": moments,
        "r_hat": worst,
        "n_eff": least,
        "cpu": cpu,
        "clock": clock,
        "divergences": int(chains.get_extra_fields()["diverging"].sum()),
    }


@cp.program
def single(posterior: Any, x: Any) -> Any:
    return cp.sample("eta", posterior.given(x=x))


def alone(posterior: Any, number: int) -> dict[str, Any]:
    """Each subject by itself, under the broad prior: mean and deviation by the
    estimator, and exact ones."""
    _, times, choices = drawn(number)
    xs = world.summaries(times, choices)
    rows = []
    log_joint = jax.jit(
        lambda etas, t, c: (
            jax.vmap(lambda eta: world.log_likelihood(eta, t, c))(etas)
            + world.prior().log_prob(etas)
        )
    )
    for j in range(SUBJECTS):
        density = cp.compile(single, posterior, xs[j])
        result = cp.infer(density, jax.random.key(j), num_chains=DRAWS, progress=False)
        draws = np.asarray(result.unweighted()["eta"], float)
        proposal = dist.MultivariateStudentT(
            5.0, draws.mean(0), np.linalg.cholesky(1.5 * np.cov(draws.T))
        )
        etas = proposal.sample(jax.random.key(j), (PROPOSALS,))
        log_weights = np.asarray(
            log_joint(etas, times[j], choices[j]) - proposal.log_prob(etas), float
        )
        weights = np.exp(log_weights - log_weights.max())
        weights /= weights.sum()
        mean = weights @ np.asarray(etas)
        deviation = np.sqrt(weights @ (np.asarray(etas) - mean) ** 2)
        rows.append(
            [
                draws.mean(0).tolist(),
                draws.std(0).tolist(),
                mean.tolist(),
                deviation.tolist(),
                float(1 / (weights**2).sum()),
            ]
        )
    found = [np.array([row[i] for row in rows]) for i in range(5)]
    return {
        "shift": ((found[0] - found[2]) / found[3]).tolist(),
        "wider": (found[1] / found[3]).tolist(),
        "away": (found[0] - found[2]).mean(0).tolist(),
        "least_n_eff": found[4].min(),
    }


def inside(below: Any) -> np.ndarray:
    """Return whether the central 90 % of a run's draws hold the truth.

    The rank decides, as no number of draws biases it.
    """
    return np.abs((np.asarray(below) + 0.5) / (CHAINS + 1) - 0.5) < 0.45


def percent(holds: Any) -> str:
    return f"{100 * np.mean(holds):.1f} %"


def beside(
    mine: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of means of a group parameter from NUTS's, in its standard deviations,
    and ratios of deviations, (studies, 3) each."""
    (mean, deviation), (other, width) = (
        np.moveaxis([run["moments"][name] for run in runs], 1, 0)
        for runs in (mine, theirs)
    )
    return (mean - other) / width, deviation / width


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument(
        "--beside", type=int, default=20, help="studies that NUTS stands beside"
    )
    parser.add_argument(
        "--alone",
        type=int,
        default=2,
        help="studies whose subjects are compared one by one",
    )
    options = parser.parse_args()
    posterior: Any = cp.load("drift-diffusion-posterior")
    prior = cp.Analytic(world.prior(), posterior.schedule, label="prior")
    folder = "drift_diffusion"
    mine = [
        kept(folder, f"study {i}", lambda i=i: ours(posterior, prior, i))
        for i in range(options.studies)
    ]
    theirs = [
        kept(folder, f"nuts {i}", lambda i=i: nuts(i)) for i in range(options.beside)
    ]
    singles = [
        kept(folder, f"alone {i}", lambda i=i: alone(posterior, i))
        for i in range(options.alone)
    ]

    holds = {
        name: np.array([inside(run["below"][name]) for run in mine])
        for name in ("mu", "tau", "eta")
    }
    settled = [
        i
        for i, run in enumerate(theirs)
        if max(run["r_hat"][name] for name in ("mu", "tau")) <= R_HAT
    ]
    off = {
        name: beside([mine[i] for i in settled], [theirs[i] for i in settled], name)
        for name in ("mu", "tau")
    }
    width = np.array([run["moments"]["mu"][1] for run in theirs[: options.alone]])
    shared = np.array([run["away"] for run in singles]) / width
    shift, wider = (
        np.array([run[what] for run in singles]) for what in ("shift", "wider")
    )
    rows = []
    for k, name in enumerate((*NAMES, "all")):
        pick = slice(None) if name == "all" else slice(k, k + 1)
        row = [
            name,
            *(percent(holds[what][..., pick]) for what in ("mu", "tau", "eta")),
        ]
        for what in ("mu", "tau"):
            row += [
                f"{np.abs(off[what][0][:, pick]).mean():.2f}",
                f"{off[what][1][:, pick].mean():.2f}",
            ]
        row += [
            f"{shift[..., pick].mean():+.2f} ± {shift[..., pick].std():.2f}",
            f"{wider[..., pick].mean():.2f}",
        ]
        rows.append([*row, f"{np.abs(shared[:, pick]).mean():.2f}"])
    by_nuts = [
        [np.abs(np.array(run["below"][what]) - 0.5) < 0.45 for run in theirs]
        for what in ("mu", "tau", "eta")
    ]
    rows.append(
        [
            f"all, by NUTS, of {len(theirs)} studies",
            *map(percent, by_nuts),
            *[""] * (len(rows[0]) - 4),
        ]
    )
    cpu = {
        "cp.infer": [run["cpu"] for run in mine],
        "NUTS": [run["cpu"] for run in theirs],
    }
    clock = {
        "cp.infer": [run["clock"] for run in mine],
        "NUTS": [run["clock"] for run in theirs],
    }
    named = [run["status"] for run in mine if run["status"] != "ok"]
    group = np.concatenate([holds["mu"], holds["tau"]], axis=1)
    # E|mean of N draws|, in standard deviations: √(2/(πN)).
    chance = np.sqrt(2 / np.pi / CHAINS)
    away = np.mean([np.abs(each).mean() for each, _ in off.values()])
    spread = np.mean([ratio.mean() for _, ratio in off.values()])
    checks = {
        "90 % intervals of group parameters hold the truth in 82 to 97 % "
        f"({percent(group)} of {group.size})": bool(0.82 <= group.mean() <= 0.97),
        f"those of subjects' parameters do ({percent(holds['eta'])} of "
        f"{holds['eta'].size})": bool(0.82 <= holds["eta"].mean() <= 0.97),
        f"every run is OK ({len(mine) - len(named)} of {len(mine)})": not named,
        "a study takes at most 20 CPU minutes (the longest "
        f"{max(cpu['cp.infer']) / 60:.1f})": max(cpu["cp.infer"]) <= 1200,
        f"group parameters lie within 0.2 sd of NUTS's on average ({away:.2f}; "
        f"{CHAINS} draws make {chance:.2f})": bool(away <= 0.2),
        f"their spreads are within 15 % of NUTS's on average ({spread:.2f})": bool(
            abs(spread - 1) <= 0.15
        ),
    }
    columns = [
        "parameter",
        *(f"{what} in 90 %" for what in ("group means", "group scales", "subjects")),
        "group mean off NUTS, sd",
        "sd over NUTS's",
        "group scale off NUTS, sd",
        "sd over NUTS's",
        "estimator off exact, sd",
        "sd over exact",
        "shared by 44, sd of the group mean",
    ]
    times = ", ".join(
        f"{by} {np.median(cpu[by]):.0f} CPU s a study ({max(cpu[by]):.0f} the "
        f"longest, {np.median(clock[by]):.0f} s by the clock)"
        for by in cpu
    )
    least = min(run["least_n_eff"] for run in singles)
    notes = (
        f"{len(mine)} studies of {SUBJECTS} subjects with {world.TRIALS} trials each; "
        f"{CHAINS} chains of a default run. NUTS, on the likelihood itself, in "
        f"{len(theirs)} of them: 2 chains, 1,000 draws, centred; it is the reference "
        f"in the {len(settled)} where the r-hat of group parameters is at most "
        f"{R_HAT} (the worst is "
        f"{max(max(run['r_hat'].values()) for run in theirs):.2f}, where a group "
        f"scale is near 0). All subjects of {len(singles)} studies were compared one "
        "by one, under the broad prior, with the exact posterior by importance "
        f"sampling (least effective number {least:.0f} of {PROPOSALS}): mean ± "
        "deviation over subjects. The last column is the mean of 44 such errors over "
        "the width of the group mean's posterior: the shift of this mean by the "
        f"estimator's errors. {times}, compilation included, on a machine that was "
        "shared."
    )
    details = {
        "studies": [
            run | {"moments": {n: run["moments"][n] for n in ("mu", "tau")}}
            for run in mine
        ],
        "nuts": [
            run | {"moments": {n: run["moments"][n] for n in ("mu", "tau")}}
            for run in theirs
        ],
        "alone": singles,
    }
    title = "Drift-diffusion: 44 subjects from a network that saw one"
    return publish("drift_diffusion", title, columns, rows, checks, details, notes)


if __name__ == "__main__":
    sys.exit(main())
