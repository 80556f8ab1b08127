"""Defaults: the evaluations of a default run beside those of the cheapest setting that
is as right.

    python -m benchmarks defaults [--keys 3] [--chains 300] [--only TEXT …]

Small programs with exact answers, each by the default call and by a grid of samplers,
numbers of levels and moves a level. A setting is right where the root mean square error
of a share over the keys is at most 2.5 times that of as many exact draws, and no run is
off by more than four of its stated errors with status OK. Levels are the program's,
which a default run visits all: fewer of them are shown, and no default is judged by
them. Runs are kept in out/defaults.jsonl. Exits with 1 if a default takes more than
twice the evaluations of the cheapest right setting on the same levels.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from exact.case import Answer, Case, schedule, share
from exact.grids import at_level_0, log_normal, on_grid
from exact.measure import Outcome, measured
from exact.networks import factor, noise_at
from modes import ablated, cases, rows_of
from report import CODE, publish
from scipy import stats

import composeprob as cp
from composeprob import tuning
from composeprob.samplers.choose import by_score, independent

KEYS, CHAINS = 3, 300
FEW = 16
"""Chains of the program of few chains."""
RIGHT = 2.5
"""Most that a right setting's error may be, in errors of exact draws."""
DEAR = 2.0
"""Most evaluations of a default, over those of the cheapest right setting."""
OBSERVATIONS = 90
PROGRAMS = (
    "a Gaussian, d = 10",
    "two modes, d = 10",
    "power 3, three modes",
    "three modes and a measurement, score",
    "cube, d = 4, score",
    "six groups",
    "three modes and a measurement, energy",
    "ripples at level 0, d = 3",
    "guidance 3, d = 2",
    "a measurement",
    "a skewed mixture times a Gaussian",
)
Row = dict[str, Any]


# ── tall data ─────────────────────────────────────────────────────────────────────────
@cp.program
def tall(posterior: Any, prior: Any, data: Any) -> Any:
    return cp.sample("theta", prior * cp.product(posterior / prior, over={"x": data}))


def tall_data() -> Case:
    """A number given 90 observations with noise N(0, 1), by the score of its posterior
    given one: the share below 0.5."""
    rng = np.random.default_rng(0)
    data = 0.5 + rng.standard_normal(OBSERVATIONS)

    def score(theta: Any, log_snr: Any, x: Any) -> Any:
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        variance = 0.5 * alpha**2 + jax.nn.sigmoid(-log_snr)
        return -(theta - alpha * x / 2) / variance

    def compiled() -> cp.AnnealedDensity:
        posterior = cp.Diffusion(
            score,
            schedule(),
            event_shape=(),
            parameterization="score",
            time="log_snr",
            conditions=("x",),
        )
        prior = cp.Analytic(dist.Normal(0.0, 1.0), schedule())
        return cp.compile(tall, posterior, prior, jnp.asarray(data, jnp.float32))

    def log_joint(theta: Any) -> Any:
        found = (1 - OBSERVATIONS) * log_normal(theta, *at_level_0(0.0, 1.0))
        for x in data:
            found = found + log_normal(theta, *at_level_0(x / 2, 0.5**0.5))
        return found

    def exact() -> Answer:
        found = on_grid(
            (-3.0, 3.0, 60_000), log_joint=log_joint, inside=lambda theta: theta < 0.5
        )
        return Answer(found.value)

    below = share(lambda s: s["theta"] < 0.5)
    return Case("tall data", f"{OBSERVATIONS} observations", compiled, below, exact)


# ── few chains in many dimensions ─────────────────────────────────────────────────────
DIMENSIONS = 64


@cp.program
def three(a: Any, b: Any, c: Any) -> Any:
    return cp.sample("x", a * b * c)


def few_chains() -> Case:
    """A product of three learned energies of Gaussians of unequal widths: the share of
    the ellipsoid that holds half of it, which shows a variance that is too small."""
    rng = np.random.default_rng(0)
    means = rng.normal(0.0, 0.5, (3, DIMENSIONS))
    widths = np.exp(rng.uniform(np.log(0.2), 0.0, (3, DIMENSIONS)))
    centres, sds = np.vectorize(at_level_0)(means, widths)
    precision = np.sum(sds**-2, axis=0)
    centre = np.sum(centres * sds**-2, axis=0) / precision
    radius = stats.chi2(DIMENSIONS).median()

    def learned(i: int) -> cp.Diffusion:
        mean = jnp.asarray(means[i], jnp.float32)
        sd = jnp.asarray(widths[i], jnp.float32)

        def energy(x: Any, log_snr: Any) -> Any:
            alpha, sigma = noise_at(log_snr)
            variance = (alpha * sd) ** 2 + sigma**2
            return sigma * 0.5 * jnp.sum((x - alpha * mean) ** 2 / variance)

        return factor(energy, "energy", DIMENSIONS)

    def within(sample: dict[str, Any]) -> Any:
        return np.sum(precision * (sample["x"] - centre) ** 2, axis=-1) < radius

    name = f"three Gaussians, d = {DIMENSIONS}, {FEW} chains"
    return Case(
        "few chains, many dimensions",
        name,
        lambda: cp.compile(three, *map(learned, range(3))),
        share(within),
        lambda: Answer(0.5),
    )


# ── settings ──────────────────────────────────────────────────────────────────────────
class Setting(NamedTuple):
    """A call of `infer`: its sampler, given the density and the number of chains, and
    the number of levels or a rule for them; None for the default of either."""

    name: str
    sampler: Callable[[cp.AnnealedDensity, int], cp.Sampler | None]
    levels: int | str | None = None


def default(density: cp.AnnealedDensity, chains: int) -> None:
    return None


def smc(density: cp.AnnealedDensity, chains: int) -> cp.Sampler:
    """Return SMC as it is: MALA moves where there is an energy, else none."""
    return cp.SMC()


def moved(density: cp.AnnealedDensity, chains: int) -> cp.Sampler:
    """Return SMC with a move at each level, by line integrals."""
    return cp.SMC(by_score(chains, metric="auto"))


def chains_alone(density: cp.AnnealedDensity, chains: int) -> cp.Sampler:
    """Return the independent chains of default runs of few chains."""
    sampler, _ = independent(density, "", chains)
    return sampler


def corrected(
    kernel: Callable[[], cp.Kernel], count: int
) -> Callable[[cp.AnnealedDensity, int], cp.Sampler]:
    """Return independent chains with so many transitions at each level."""

    def sampler(density: cp.AnnealedDensity, chains: int) -> cp.Sampler:
        return cp.AnnealedMCMC(kernel(), count, cp.ReverseStep(control="none"))

    return sampler


def tuned_hmc() -> cp.Kernel:
    return cp.HMC(cp.Adaptive())


def tuned_mala() -> cp.Kernel:
    return cp.MALA(cp.Adaptive())


def hmc(transitions: int) -> Callable[[cp.AnnealedDensity, int], cp.Sampler]:
    """Return HMC at one level, from the prior."""

    def sampler(density: cp.AnnealedDensity, chains: int) -> cp.Sampler:
        kernel = cp.HMC(cp.Adaptive(warmup=transitions), num_leapfrog=8)
        return cp.AnnealedMCMC(kernel, transitions)

    return sampler


DEFAULT = Setting("default", default)
ANNEALED = (
    DEFAULT,
    Setting("SMC", smc),
    Setting("SMC, 20 levels", smc, 20),
    Setting("SMC, levels='adaptive'", smc, "adaptive"),
    Setting("independent chains", chains_alone),
)
BY_SCORE = (
    Setting("SMC, moves by line integrals", moved),
    Setting("SMC, moves by line integrals, 20 levels", moved, 20),
)
"""Settings beside these where there is no energy."""
FEWER = {each.name for each in (*ANNEALED, *BY_SCORE) if each.levels is not None}
"""Settings on other levels than the program's."""
OF_FEW_CHAINS = (
    DEFAULT,
    Setting("reverse diffusion", lambda density, chains: cp.Ancestral()),
    Setting("MALA, 1 a level", corrected(tuned_mala, 1)),
    Setting("HMC, 1 a level", corrected(tuned_hmc, 1)),
    Setting("HMC, 5 a level", corrected(tuned_hmc, 5)),
)
AT_ONE_LEVEL = (
    DEFAULT,
    Setting("HMC, 25 transitions", hmc(25)),
    Setting("HMC, 50 transitions", hmc(50)),
    Setting("HMC, 100 transitions", hmc(100)),
)


def settings(density: cp.AnnealedDensity, chains: int) -> tuple[Setting, ...]:
    """Return the settings that a density is sampled by."""
    if chains < tuning.MANY_CHAINS.weighed:
        return OF_FEW_CHAINS
    if density.num_levels == 1:
        return AT_ONE_LEVEL
    if "energy" in density.capabilities:
        return ANNEALED
    return (*ANNEALED, *BY_SCORE)


def levels_of(setting: Setting, density: cp.AnnealedDensity) -> Any:
    """Return the argument ``levels``: so many log-SNR at equal distances among the
    density's, or a rule."""
    if not isinstance(setting.levels, int):
        return setting.levels
    own = np.asarray(density.schedule.log_snr)
    return np.linspace(own.max(), own.min(), setting.levels)


# ── runs ──────────────────────────────────────────────────────────────────────────────
def run(
    case: Case,
    density: cp.AnnealedDensity,
    setting: Setting,
    answer: Answer,
    key: int,
    chains: int,
) -> Row:
    """Return the row of one run."""
    row = measured(
        case,
        lambda: density,
        answer,
        key,
        chains,
        sampler=setting.sampler(density, chains),
        levels=levels_of(setting, density),
    )
    return row | {"setting": setting.name}


class Summary(NamedTuple):
    """A setting of a program over the keys."""

    name: str
    evaluations: float
    error: float  # root mean square, in errors of exact draws
    right: bool


def summary(name: str, rows: list[Row]) -> Summary:
    """Summarise the runs of a setting."""
    refused = any("refused" in row["codes"] for row in rows)
    if refused:
        return Summary(name, np.nan, np.nan, False)
    exact = rows[0]["exact"][0]
    floor = np.sqrt(exact * (1 - exact) / rows[0]["chains"])
    off = np.array([row["estimates"][0] for row in rows]) - exact
    error = float(np.sqrt(np.mean(off**2)) / floor)
    silent = any(row["outcome"] == Outcome.DEFECT for row in rows)
    evaluations = float(np.mean([row["evaluations"] for row in rows]))
    return Summary(name, evaluations, error, error <= RIGHT and not silent)


def line(case: Case, found: list[Summary]) -> list[str]:
    """Return a program's line of the table."""
    ours = found[0]
    verdict = "yes" if ours.right else "no"
    cells = [case.family, case.name, in_words(ours), verdict]
    for some in ([each for each in found if each.name not in FEWER], found):
        right = [each for each in some if each.right]
        if not right:
            cells += ["none is right", "–"]
            continue
        best = min(right, key=lambda each: each.evaluations)
        ratio = ours.evaluations / best.evaluations
        cells += [f"{best.name}: {in_words(best)}", f"{ratio:.1f}"]
    return cells


def in_words(found: Summary) -> str:
    """Return the evaluations and the error."""
    return f"{found.evaluations:,.0f} ({found.error:.1f})"


def dear(lines: list[list[str]]) -> list[str]:
    """Return the programs whose default is too dear."""
    ratios = [(cells[1], cells[-3]) for cells in lines]
    return [name for name, ratio in ratios if ratio != "–" and float(ratio) > DEAR]


def programs() -> list[Case]:
    """Return the programs: tall data, and some of `modes`."""
    known = {case.name: case for case in ablated()}
    known |= {case.name: case for case in cases()}
    return [tall_data(), few_chains(), *(known[name] for name in PROGRAMS)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--chains", type=int, default=CHAINS)
    parser.add_argument("--only", nargs="+", help="programs with one of these texts")
    parser.add_argument("--rows", type=Path, default=Path("out/defaults.jsonl"))
    asked = parser.parse_args()
    asked.rows.parent.mkdir(parents=True, exist_ok=True)
    names = ("program", "setting", "chains", "key")
    kept = {tuple(row[name] for name in names): row for row in rows_of(asked.rows)}
    lines = []
    details = {}
    for case in programs():
        if asked.only and not any(text in case.name for text in asked.only):
            continue
        density = case.compile()
        answer = functools.cache(case.exact)
        found = []
        chains = asked.chains
        if case.name == few_chains().name:
            chains = FEW
        for setting in settings(density, chains):
            rows = []
            for key in range(asked.keys):
                place = (case.name, setting.name, chains, key)
                if place not in kept:
                    row = run(case, density, setting, answer(), key, chains)
                    row["commit"] = CODE.commit
                    with asked.rows.open("a") as out:
                        out.write("\n" + json.dumps(row))
                    kept[place] = row
                rows.append(kept[place])
            found.append(summary(setting.name, rows))
            print(case.name, found[-1], flush=True)
        lines.append(line(case, found))
        details[case.name] = [each._asdict() for each in found]
    too_dear = dear(lines)
    columns = [
        "family",
        "program",
        "default: evaluations (error)",
        "right",
        "cheapest right setting on the same levels",
        "default over that",
        "on any levels",
        "default over that",
    ]
    notes = (
        f"{asked.keys} keys of {asked.chains} chains, or of as many as are named. "
        "Errors: root mean square over "
        f"the keys of a share's error, in those of as many exact draws. Right: at most "
        f"{RIGHT}, and no run that is off by more than four of its stated errors has "
        "status OK. Settings: the default, and "
    )
    every = [*ANNEALED[1:], *BY_SCORE, *AT_ONE_LEVEL[1:], *OF_FEW_CHAINS[1:]]
    notes += "; ".join(each.name for each in every) + "."
    check = (
        f"no default takes over {DEAR:g} times the evaluations of the cheapest right "
        f"setting on its levels ({', '.join(too_dear) or 'none'})"
    )
    return publish(
        "defaults",
        "Default calls beside the cheapest setting that is right",
        columns,
        lines,
        {check: not too_dear},
        {"programs": details},
        notes,
        write=not asked.only,
    )


if __name__ == "__main__":
    sys.exit(main())
