"""Simulation-based calibration: under data drawn from the program, a truth's rank among
posterior draws is uniform."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.compiler.pipeline import compile, prior
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import CapabilityError, InvalidValueError, LoadError
from composeprob.json_data import JSON
from composeprob.language.decorator import Program
from composeprob.results.geometry import entries
from composeprob.results.record import as_code
from composeprob.results.store import write_json
from composeprob.runtime.infer import infer
from composeprob.runtime.progress import Progress
from composeprob.samplers.choose import independent
from composeprob.samplers.sampler import Sampler

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Calibration:
    """A `Calibration` holds the ranks of true values among posterior draws, as shares
    of (0, 1).

    Args:
        ranks: ``{number: (num,)}``; of a calibrated program each is uniform.
        p_values: of each number's uniformity, by χ² and by Kolmogorov and Smirnov, the
            smaller one doubled.
    """

    ranks: dict[str, np.ndarray]
    p_values: dict[str, float]

    @property
    def calibrated(self) -> bool:
        """Whether all ranks are consistent with uniform ones; a right program fails
        once in a hundred cases."""
        return min(self.p_values.values()) >= 0.01 / len(self.p_values)

    def plot(self) -> Figure:
        """Draws a histogram of every number's ranks, with where bars of uniform ranks
        are in 99 of 100 cases."""
        from scipy import stats

        from composeprob.results.plotting import PALETTE, grid, style

        with style():
            figure, axes = grid(len(self.ranks))
            for ax, (name, ranks) in zip(axes, self.ranks.items(), strict=False):
                ax.axhspan(
                    *stats.binom.interval(0.99, len(ranks), 1 / tuning.RANK_BINS),
                    color="#d6e2ec",
                )
                ax.hist(
                    ranks,
                    bins=np.linspace(0, 1, tuning.RANK_BINS + 1),
                    color=PALETTE.second,
                    alpha=0.75,
                )
                ax.set(
                    title=name,
                    xlabel=f"rank (p = {self.p_values[name]:.2g})",
                    xlim=(0, 1),
                )
        return figure

    def __str__(self) -> str:
        count = len(next(iter(self.ranks.values())))
        verdict = (
            "consistent with uniform"
            if self.calibrated
            else "NOT uniform: posteriors are wrong"
        )
        lines = [f"{name}: p = {p:.3g}" for name, p in self.p_values.items()]
        return "\n".join([f"Ranks over {count} data sets: {verdict}.", *lines])


def calibrated(
    program: Program,
    *args: object,
    key: Array,
    num: int = 100,
    num_chains: int = 64,
    sampler: Sampler | None = None,
    data: Mapping[str, str] | None = None,
    checkpoint_dir: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Tests a program with data, and its sampler, against data that the program itself
    draws.

    ``num`` times latents are drawn from the prior, by independent chains of the default
    sampler, and data under them; the posterior under these data is sampled, and the
    rank of each true number among its draws taken. If everything is right, ranks are
    uniform, whatever the prior; a kernel that is wrong, a likelihood that is annealed
    wrongly or levels that are too few make them crowd. Data enter as other arrays, so
    nothing is compiled anew.

    Args:
        program: with at least one observation.
        args, kwargs: as for `compile`; the data among them only give their shape.
        key: a typed random key.
        num: data sets.
        num_chains: chains of each posterior.
        sampler: what is tested; left out, what `infer` chooses.
        data: ``{observed site: argument}``. Left out, arguments are found by their
            values.
        checkpoint_dir: a folder for the ranks so far; the same call goes on from there.
        progress: whether to show a progress bar.

    Raises:
        CapabilityError: a program without data.
        InvalidValueError: observed values that are no argument's, or num < 20.
        LoadError: the folder belongs to another call.

    References:
        Talts et al. 2018, *Validating Bayesian inference algorithms with
        simulation-based calibration*; Modrák et al. 2023, on the log-likelihood as a
        number to rank.
    """
    if num < 2.5 * tuning.RANK_BINS:
        raise InvalidValueError(
            f"num={num} data sets are too few to judge ranks by.",
            fix="ask for 100, or for 20 at least.",
        )
    density = compile(program, *args, **kwargs)
    bound = inspect.signature(program.function).bind(*args, **kwargs)
    names = dict(data) if data is not None else _arguments(density, bound.arguments)
    seeds = jax.random.split(key, 4)
    unseen = prior(density)
    truths = infer(
        unseen,
        seeds[0],
        num_chains=num,
        sampler=independent(unseen, "", num)[0],
        progress=False,
    ).samples
    drawn = {
        name: np.asarray(values)
        for name, values in density.predict(seeds[1], truths).items()
    }
    store = _RankStore(
        checkpoint_dir,
        [as_code(key), num, num_chains, repr(sampler), density.described.text],
    )
    with Progress(num, progress, "calibration") as bar:
        for i in range(len(store.rows), num):
            arguments = dict(bound.arguments) | {
                names[site]: drawn[site][i] for site in names
            }
            replaced = inspect.BoundArguments(bound.signature, arguments)
            posterior = compile(program, *replaced.args, **replaced.kwargs)
            run_key = jax.random.fold_in(seeds[2], i)
            result = infer(
                posterior,
                run_key,
                num_chains=num_chains,
                sampler=sampler,
                progress=False,
            )
            rng = np.random.default_rng(
                [i, *np.asarray(jax.random.key_data(seeds[3])).tolist()]
            )
            chosen = _unrelated(
                result.unweighted(), result._genealogy.index[result._resampled], rng
            )
            truth = {
                name: np.asarray(value)[i : i + 1] for name, value in truths.items()
            }
            store.add(_ranks(posterior, truth, chosen, rng))
            bar.update(i + 1)
    ranks = {
        name: np.array([row[name] for row in store.rows]) for name in store.rows[0]
    }
    return Calibration(
        ranks, {name: uniformity(values) for name, values in ranks.items()}
    )


def uniformity(ranks: np.ndarray) -> float:
    """Returns the p-value of ranks in (0, 1) being uniform: by χ² over bins, and by the
    distribution function."""
    from scipy import stats  # takes a while to import

    counts = np.histogram(ranks, bins=np.linspace(0, 1, tuning.RANK_BINS + 1))[0]
    return min(
        1.0,
        2
        * float(
            min(stats.chisquare(counts).pvalue, stats.kstest(ranks, "uniform").pvalue)
        ),
    )


def _arguments(density: AnnealedDensity, given: Mapping[str, object]) -> dict[str, str]:
    """The argument that each observed site's value is."""
    observed = {name: np.asarray(value) for name, value in density.observed().items()}
    if not observed:
        raise CapabilityError(
            "This program observes nothing, so there is nothing to calibrate.",
            where=density.described.where,
            fix="add cp.observe(name, distribution, value), with the value an argument.",
        )
    found = {}
    for site, value in observed.items():
        numbers = {
            n: a
            for n, a in given.items()
            if isinstance(a, int | float | np.ndarray | jax.Array)
        }
        numbers = {
            n: a
            for n, a in numbers.items()
            if not isinstance(a, bool) and np.shape(a) == value.shape
        }
        same = [
            name
            for name, number in numbers.items()
            if np.allclose(number, value, equal_nan=True)
        ]
        if len(same) != 1:
            several = f"the arguments {' and '.join(same)}" if same else "no argument"
            raise InvalidValueError(
                f"Which argument holds the data of {site!r} is not clear: its value is that of {several}.",
                where=density.described.where,
                fix=f"name the argument, data={{{site!r}: 'name'}}; what the program computes of it must be one too.",
            )
        found[site] = same[0]
    return found


def _unrelated(
    samples: Mapping[str, np.ndarray], families: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Some samples no two of which descend from one chain."""
    order = rng.permutation(len(families))
    first = order[np.sort(np.unique(families[order], return_index=True)[1])]
    first = first[:63]  # with the truth 64 ranks, a multiple of the bins
    return {name: np.asarray(values)[first] for name, values in samples.items()}


def _ranks(
    density: AnnealedDensity,
    truth: Mapping[str, np.ndarray],
    drawn: Mapping[str, np.ndarray],
    rng: np.random.Generator,
) -> dict[str, float]:
    """Every number's rank, ties broken at random, and that of the log-likelihood of the
    data."""
    numbers: dict[str, tuple[np.ndarray, float]] = {}
    for site, values in drawn.items():
        flat, true = values.reshape(len(values), -1), truth[site].ravel()
        if flat.shape[1] > 8:  # too many to be ranked one by one
            numbers[f"mean of {site}"] = flat.mean(1), float(true.mean())
            numbers[f"size of {site}"] = (
                np.linalg.norm(flat, axis=1),
                float(np.linalg.norm(true)),
            )
        else:
            names = entries(site, values.shape[1:])
            numbers |= {
                name: (flat[:, j], float(true[j])) for j, name in enumerate(names)
            }
    truth_and_draws = {
        site: np.concatenate([truth[site], values]) for site, values in drawn.items()
    }
    logs = sum(
        np.asarray(v).reshape(len(v), -1).sum(1)
        for v in density.log_likelihood(truth_and_draws).values()
    )
    numbers["log-likelihood"] = np.asarray(logs)[1:], float(np.asarray(logs)[0])
    found = {}
    for name, (draws, value) in numbers.items():
        below, equal = int(np.sum(draws < value)), int(np.sum(draws == value))
        found[name] = (below + int(rng.integers(equal + 1)) + float(rng.uniform())) / (
            len(draws) + 1
        )
    return found


class _RankStore:
    """The ranks so far, in memory and, where there is a folder, on disk after each data
    set."""

    def __init__(self, folder: str | Path | None, call: list[JSON]):
        self.path = None if folder is None else Path(folder) / "ranks.json"
        self.call, self.rows = call, list[dict[str, float]]()
        if self.path is not None and self.path.is_file():
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["call"] != call:
                raise LoadError(
                    f"{self.path} holds the ranks of another call of cp.calibrated.",
                    fix="choose another checkpoint_dir.",
                )
            self.rows = saved["rows"]

    def add(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if self.path is not None:
            write_json(self.path, {"call": self.call, "rows": self.rows})
