"""Simulation-based calibration of programs.

Under data drawn from the program, a true value's rank among posterior draws is uniform.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from composeprob.arguments import as_code
from composeprob.calibration import tuning
from composeprob.core import (
    AnnealedDensity,
    Program,
    Progress,
    Sampler,
    compile,
    infer,
    prior,
)
from composeprob.errors import CapabilityError, InvalidValueError, LoadError
from composeprob.events import entries
from composeprob.files import write_json
from composeprob.json_data import JSON
from composeprob.samplers.choose import independent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Calibration:
    """A `Calibration` holds the ranks of true values among posterior draws.

    Args:
        ranks: ranks as shares of (0, 1), ``{number: (num,)}``; uniform for a calibrated
            program.
        p_values: p-value of each number's uniformity: the smaller one of χ² and
            Kolmogorov–Smirnov, doubled.
    """

    ranks: dict[str, np.ndarray]
    p_values: dict[str, float]

    @property
    def calibrated(self) -> bool:
        """True if all ranks are consistent with uniform ones.

        A right program fails once in a hundred cases.
        """
        return min(self.p_values.values()) >= 0.01 / len(self.p_values)

    def plot(self) -> Figure:
        """Draw a histogram of every number's ranks.

        The shaded band holds the bars of uniform ranks in 99 of 100 cases.
        """
        from scipy import stats

        from composeprob.plotting.figures import PALETTE, grid, style

        bins = tuning.RANK_BINS
        with style():
            figure, axes = grid(len(self.ranks))
            for ax, (name, ranks) in zip(axes, self.ranks.items(), strict=False):
                band = stats.binom.interval(0.99, len(ranks), 1 / bins)
                ax.axhspan(*band, color="#d6e2ec")
                edges = np.linspace(0, 1, bins + 1)
                ax.hist(ranks, bins=edges, color=PALETTE.second, alpha=0.75)
                label = f"rank (p = {self.p_values[name]:.2g})"
                ax.set(title=name, xlabel=label, xlim=(0, 1))
        return figure

    def __str__(self) -> str:
        count = len(next(iter(self.ranks.values())))
        verdict = "NOT uniform: posteriors are wrong"
        if self.calibrated:
            verdict = "consistent with uniform"
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
    """Test a program with data, and its sampler, on data that the program generates.

    Latents are drawn ``num`` times from the prior, by independent chains of the default
    sampler, and data given them. For each data set the posterior is sampled, and each
    true number is ranked among its draws. If everything is right, ranks are uniform,
    whatever the prior; a wrong kernel, a likelihood that is annealed wrongly or too few
    levels make them crowd. Data enter as other arrays, so nothing is compiled anew.

    Args:
        program: a program with at least one observation.
        args, kwargs: as for `compile`; data among them only give their shape.
        key: a typed random key.
        num: number of data sets.
        num_chains: chains of each posterior.
        sampler: the sampler to test; by default the one that `infer` chooses.
        data: ``{observed site: argument}``. By default arguments are identified by
            their values.
        checkpoint_dir: a folder for the ranks so far; the same call goes on from there.
        progress: show a progress bar.

    Raises:
        CapabilityError: a program without data.
        InvalidValueError: observed values that equal no argument, or num < 20.
        LoadError: the folder belongs to another call.

    References:
        Talts et al. 2018, *Validating Bayesian inference algorithms with
        simulation-based calibration*; Modrák et al. 2023, on ranking the
        log-likelihood.
    """
    if num < 2.5 * tuning.RANK_BINS:
        raise InvalidValueError(
            f"num={num} data sets are too few to judge ranks by.",
            fix="ask for 100, or for 20 at least.",
        )
    density = compile(program, *args, **kwargs)
    bound = inspect.signature(program.function).bind(*args, **kwargs)
    names = dict(data) if data is not None else _arguments(density, bound.arguments)
    prior_key, data_key, runs_key, rank_key = jax.random.split(key, 4)
    truths = _prior_draws(density, prior_key, num)
    predicted = density.predict(data_key, truths)
    simulated = {name: np.asarray(values) for name, values in predicted.items()}
    # A resumed call must be the same one: ranks of other calls are refused.
    call: list[JSON] = [
        as_code(key),
        num,
        num_chains,
        repr(sampler),
        density.described.text,
    ]
    store = _RankStore(checkpoint_dir, call)
    rank_seed = np.asarray(jax.random.key_data(rank_key)).tolist()
    with Progress(num, progress, "calibration") as bar:
        for i in range(len(store.rows), num):
            arguments = dict(bound.arguments)
            for site, argument in names.items():
                arguments[argument] = simulated[site][i]
            replaced = inspect.BoundArguments(bound.signature, arguments)
            posterior = compile(program, *replaced.args, **replaced.kwargs)
            result = infer(
                posterior,
                jax.random.fold_in(runs_key, i),
                num_chains=num_chains,
                sampler=sampler,
                progress=False,
            )
            # A seed for each data set: a resumed call ranks as an uninterrupted one.
            rng = np.random.default_rng([i, *rank_seed])
            draws = _unrelated(
                result.unweighted(), result._genealogy.index[result._resampled], rng
            )
            truth = {
                name: np.asarray(value)[i : i + 1] for name, value in truths.items()
            }
            store.add(_ranks(posterior, truth, draws, rng))
            bar.update(i + 1)
    ranks = {
        name: np.array([row[name] for row in store.rows]) for name in store.rows[0]
    }
    # Bonferroni's correction over the numbers is that of `Calibration.calibrated`.
    p_values = {name: uniformity(values) for name, values in ranks.items()}
    return Calibration(ranks, p_values)


def _prior_draws(
    density: AnnealedDensity, key: Array, num: int
) -> Mapping[str, np.ndarray]:
    """Draw latents from the program without its observations."""
    unobserved = prior(density)
    sampler, _ = independent(unobserved, "", num)
    result = infer(unobserved, key, num_chains=num, sampler=sampler, progress=False)
    return result.samples


def uniformity(ranks: Float[np.ndarray, " n"]) -> float:
    """Return the p-value of ranks in (0, 1) being uniform.

    It combines χ² over bins and Kolmogorov–Smirnov by Bonferroni's correction.
    """
    from scipy import stats  # takes a while to import

    counts, _ = np.histogram(ranks, bins=np.linspace(0, 1, tuning.RANK_BINS + 1))
    by_bins = stats.chisquare(counts).pvalue
    by_distribution = stats.kstest(ranks, "uniform").pvalue
    return min(1.0, 2 * float(min(by_bins, by_distribution)))


def _arguments(density: AnnealedDensity, given: Mapping[str, object]) -> dict[str, str]:
    """Return the argument of the program that each observed site's value came from."""
    observed = {name: np.asarray(value) for name, value in density.observed().items()}
    if not observed:
        raise CapabilityError(
            "This program observes nothing, so there is nothing to calibrate.",
            where=density.described.where,
            fix="add cp.observe(name, distribution, value), with the value an "
            "argument.",
        )
    arguments = {}
    for site, value in observed.items():
        same = [name for name in given if _is_equal(given[name], value)]
        if len(same) != 1:
            candidates = (
                f"the arguments {' and '.join(same)}" if same else "no argument"
            )
            raise InvalidValueError(
                f"Which argument holds the data of {site!r} is not clear: its value is "
                f"that of {candidates}.",
                where=density.described.where,
                fix=f"name the argument, data={{{site!r}: 'name'}}; a value that the "
                "program computes from its arguments must become an argument itself.",
            )
        arguments[site] = same[0]
    return arguments


def _is_equal(argument: object, value: np.ndarray) -> bool:
    """Return whether an argument is a number or array equal to an observed value."""
    if isinstance(argument, bool):
        return False
    if not isinstance(argument, int | float | np.ndarray | jax.Array):
        return False
    if np.shape(argument) != value.shape:
        return False
    return np.allclose(argument, value, equal_nan=True)


def _unrelated(
    samples: Mapping[str, np.ndarray], ancestors: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return a random choice of samples with distinct ancestors."""
    order = rng.permutation(len(ancestors))
    _, first = np.unique(ancestors[order], return_index=True)
    # With the true value there are 64 ranks, a multiple of the number of bins.
    chosen = order[np.sort(first)][:63]
    return {name: np.asarray(values)[chosen] for name, values in samples.items()}


class _Ranked(NamedTuple):
    """A number's posterior draws, and its true value."""

    draws: np.ndarray
    truth: float


def _ranks(
    density: AnnealedDensity,
    truth: Mapping[str, np.ndarray],
    draws: Mapping[str, np.ndarray],
    rng: np.random.Generator,
) -> dict[str, float]:
    """Return the rank of every number, and of the log-likelihood of the data.

    Ties are broken at random.
    """
    numbers: dict[str, _Ranked] = {}
    for site, values in draws.items():
        numbers |= _numbers(site, values, truth[site])
    numbers["log-likelihood"] = _log_likelihoods(density, truth, draws)
    ranks = {}
    for name, ranked in numbers.items():
        below = int(np.sum(ranked.draws < ranked.truth))
        equal = int(np.sum(ranked.draws == ranked.truth))
        # Uniform within a rank, so that ranks are continuous on (0, 1).
        rank = below + int(rng.integers(equal + 1)) + float(rng.uniform())
        ranks[name] = rank / (len(ranked.draws) + 1)
    return ranks


def _numbers(site: str, values: np.ndarray, truth: np.ndarray) -> dict[str, _Ranked]:
    """Return the numbers of a site that are ranked.

    They are its entries, or mean and norm of an event of more than 8 entries.
    """
    flat = values.reshape(len(values), -1)
    flat_truth = truth.ravel()
    if flat.shape[1] > 8:
        norm = float(np.linalg.norm(flat_truth))
        return {
            f"mean of {site}": _Ranked(flat.mean(1), float(flat_truth.mean())),
            f"size of {site}": _Ranked(np.linalg.norm(flat, axis=1), norm),
        }
    return {
        name: _Ranked(flat[:, j], float(flat_truth[j]))
        for j, name in enumerate(entries(site, values.shape[1:]))
    }


def _log_likelihoods(
    density: AnnealedDensity,
    truth: Mapping[str, np.ndarray],
    draws: Mapping[str, np.ndarray],
) -> _Ranked:
    """Return the log-likelihood of all data under the draws and the truth."""
    truth_and_draws = {
        site: np.concatenate([truth[site], values]) for site, values in draws.items()
    }
    by_site = density.log_likelihood(truth_and_draws).values()
    total = sum(np.asarray(logs).reshape(len(logs), -1).sum(1) for logs in by_site)
    logs = np.asarray(total)
    return _Ranked(logs[1:], float(logs[0]))


class _RankStore:
    """Ranks so far, in memory and, given a folder, on disk after each data set."""

    def __init__(self, folder: str | Path | None, call: list[JSON]):
        self.path = None if folder is None else Path(folder) / "ranks.json"
        self.call = call
        self.rows: list[dict[str, float]] = []
        if self.path is not None and self.path.is_file():
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["call"] != call:
                raise LoadError(
                    f"{self.path} holds the ranks of another call of cp.calibrated.",
                    fix="choose another checkpoint_dir.",
                )
            self.rows = saved["rows"]

    def add(self, row: dict[str, float]) -> None:
        """Add the ranks of one data set."""
        self.rows.append(row)
        if self.path is not None:
            write_json(self.path, {"call": self.call, "rows": self.rows})
