"""The table that `Result.summary` prints: means, quantiles, shares of tokens and
diagnostics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from composeprob import tuning
from composeprob.events import is_tokens, shown_entries
from composeprob.records import by_block
from composeprob.results.estimates import quantile, quiet_arviz, with_error
from composeprob.results.record import Record
from composeprob.results.token_shares import COLUMNS as TOKEN_COLUMNS
from composeprob.results.token_shares import (
    TokenShares,
    distinct,
    token_shares,
)
from composeprob.text import cell, printable

COLUMNS = ("mean", "±", "sd", "5%", "50%", "95%")


@dataclass(frozen=True)
class Summary:
    """A `Summary` holds the weighted moments and quantiles of every number in a result,
    and the shares of its tokens, and prints as a table.

    Args:
        rows: ``{label: (mean, its standard error, sd, 5 %, 50 %, 95 %)}``, one entry
            per number of each site; the error is NaN where the status withholds it.
        intervals: ``{label: (low, high)}``, of the means, 90 %; NaN where the error is
            withheld.
        tokens: ``{label: TokenShares}``, one entry per position of each site of tokens.
        facts: ``{name: text}``, the lines printed below the table.
    """

    rows: dict[str, tuple[float, ...]]
    intervals: dict[str, tuple[float, float]]
    tokens: dict[str, TokenShares]
    facts: dict[str, str]

    @classmethod
    def of_result(cls, result: Record) -> Summary:
        """Make the summary of one result."""
        summary = cls({}, {}, {}, {})
        for name in result.samples:
            drawn = result.drawn(name, tuning.SUMMARY.most_numbers)
            if is_tokens(drawn, 2):
                summary.tokens.update(token_shares(result, name, drawn))
                found = distinct(result._genealogy.weights, drawn)
                summary.facts[f"distinct {name}"] = found
            else:
                summary._add(result, name, drawn)
        summary.facts.update(_facts(result))
        return summary

    def _add(self, result: Record, name: str, drawn: np.ndarray) -> None:
        """Add the rows of a site of numbers, (N, draws, …)."""
        labels, columns = shown_entries(name, drawn, 2)
        # One label stands for many numbers where it pools them.
        values = drawn.reshape(*drawn.shape[:2], len(labels), -1)
        # Draws of one chain share its weight.
        of_chain = values.shape[1] * values.shape[3]
        weights = np.repeat(result._genealogy.weights, of_chain)
        means = result.mean_of(columns)
        lows, highs = means.interval(0.9)
        for j, label in enumerate(labels):
            mean, *others = weighted_statistics(values[:, :, j].ravel(), weights)
            self.rows[label] = (mean, float(means.error[j]), *others)
            self.intervals[label] = (float(lows[j]), float(highs[j]))

    def __str__(self) -> str:
        width = max([len(label) for label in (*self.rows, *self.tokens)] + [4])
        lines = []
        if self.rows:
            numbers = {label: map(cell, row) for label, row in self.rows.items()}
            lines += _table(width, COLUMNS, numbers)
        if self.tokens:
            shares = {label: row.cells for label, row in self.tokens.items()}
            lines += _table(width, TOKEN_COLUMNS, shares)
        margin = max(len(name) for name in self.facts) + 2
        for name, text in self.facts.items():
            indented = text.replace("\n", "\n" + " " * margin)
            lines.append(f"{name:<{margin}}{indented}")
        return printable("\n".join(lines))

    __repr__ = __str__


def _table(
    width: int, columns: tuple[str, ...], rows: Mapping[str, Iterable[str]]
) -> list[str]:
    """Lines of a table, with an empty one below it."""
    lines = [" " * width + "".join(f"{column:>12}" for column in columns)]
    for label, cells in rows.items():
        lines.append(f"{label:<{width}}" + "".join(f"{text:>12}" for text in cells))
    return [*lines, ""]


def weighted_statistics(values: np.ndarray, weights: np.ndarray) -> tuple[float, ...]:
    """Return mean, standard deviation and the 5, 50 and 95 % quantiles of finite values
    under weights, both (N,)."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return (float("nan"),) * (len(COLUMNS) - 1)
    values = values[finite]
    weights = np.asarray(weights, np.float64)[finite]
    weights = weights / weights.sum()
    mean = float(weights @ values)
    sd = float(np.sqrt(weights @ (values - mean) ** 2))
    # Weighted quantiles: the first value at which the cumulative weight reaches q.
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    quantiles = [quantile(values[order], cumulative, q) for q in (0.05, 0.5, 0.95)]
    return (mean, sd, *quantiles)


def _facts(result: Record) -> Iterator[tuple[str, str]]:
    """Name and text of each line below the table."""
    about = result.about
    yield "sampler", about.sampler
    if result.reason:
        yield "why", result.reason
    yield from _facts_of_chains(result)
    if about.draws is not None:
        text = f"{about.draws:,} of each chain, {about.thin} transitions apart"
        yield "draws", text
        yield from _facts_of_mixing(result)
    yield from _facts_of_levels(result)
    yield from _facts_of_evidence(result)
    yield "time", f"{about.seconds:.2f} s"
    yield "status", str(result.status)


def _facts_of_chains(result: Record) -> Iterator[tuple[str, str]]:
    """Number of chains and ancestors, moves between modes, and weights."""
    about = result.about
    genealogy = result._genealogy
    number = len(result.log_weights)
    worth = result.effective_chains
    yield "chains", f"{number:,}, as good as {worth:,.0f} independent ones"
    if about.devices > 1:
        yield "devices", f"{about.devices}, all of which moved chains"
    distinct = len(np.unique(genealogy.index))
    if distinct < number:
        text = f"{distinct:,} distinct ({genealogy.effective:,.0f} effective)"
        yield "ancestors", text
    if about.global_acceptance is not None:
        text = f"{about.global_acceptance:.2g} of the proposals accepted"
        yield "global moves", text
    if about.round_trips is not None:
        swaps = _range(np.asarray(result.levels["swaps"]))
        trips = f"{about.round_trips:.3g} round trips of each chain's replicas"
        yield "swaps", f"{swaps}; {trips}"
    if not math.isnan(genealogy.pareto_k):
        yield "Pareto k̂", _text_of_pareto_k(genealogy.pareto_k)


def _text_of_pareto_k(k: float) -> str:
    """Pareto k̂, explained where it is large or negative."""
    largest = tuning.SUMMARY.largest_k
    if not k > 0:
        return "below 0: no chain has much more weight than others"
    if k > largest:
        return (
            f"{k:.2f}, above {largest}: a few chains decide, and errors are too small"
        )
    return f"{k:.2f}"


def _facts_of_levels(result: Record) -> Iterator[tuple[str, str]]:
    """Levels, evaluations, and diagnostics over the levels."""
    levels = result.levels
    log_snr = levels["log_snr"].to_numpy()
    text = f"{len(log_snr)}, log-SNR {log_snr[-1]:.3g} … {log_snr[0]:.3g}"
    if result.about.by_reveals:
        text = f"{len(log_snr)} reveals"
    yield "levels", text
    text = f"{result.evaluations:,} of the composed density per chain"
    if result.about.checks:
        text += f", and {result.about.checks:,} to check it"
    yield "evaluations", text
    titles = {"acceptance": "acceptance", "step_size": "step size", "ess": "ESS"}
    for name, title in titles.items():
        for label, column in by_block(levels, name, title).items():
            yield label, _range(column)
    for label, column in by_block(levels, "quadrature_error", "quadrature").items():
        # 0 at every level without a quadrature, which needs no line.
        if np.nansum(column) > 0:
            yield label, f"error of log-ratios {_range(column)}"
    curl = result.about.curl
    if curl:
        yield "curl", ", ".join(f"{name} {value:.2g}" for name, value in curl.items())
    rejected = float(levels["non_finite"].sum())
    if rejected > 0:
        yield "non-finite", f"{int(rejected):,} proposals, rejected"


def _facts_of_evidence(result: Record) -> Iterator[tuple[str, str]]:
    """The log-evidence, with its error and interval where there are any."""
    if result.log_evidence is None:
        return
    error = result.log_evidence_error
    if error is None:
        error = math.nan
    text = with_error(result.log_evidence, error)
    if math.isfinite(error):
        low, high = result.log_evidence_interval(0.9)
        text += f" (90 % interval {low:.4g} … {high:.4g})"
    yield "log evidence", text


def _facts_of_mixing(result: Record) -> Iterator[tuple[str, str]]:
    """R̂ between the chains of a run with draws, the greatest over all numbers; by
    ArviZ."""
    draws = result.about.draws or 0
    if len(result.log_weights) < 2 or draws < tuning.ERRORS.fewest_draws:
        return
    arviz, _ = quiet_arviz()
    worst = -math.inf
    of_site = ""
    for name in result.samples:
        drawn = result.drawn(name, tuning.SUMMARY.most_numbers)
        _, columns = shown_entries(name, drawn, 2)
        for column in np.moveaxis(columns, -1, 0):
            if not np.isfinite(column).all() or np.ptp(column) == 0:
                continue  # it has no R̂
            # R̂ compares the variance between chains, (N, draws), with that within.
            r_hat = float(arviz.rhat(column))
            worst, of_site = max((worst, of_site), (r_hat, name))
    if not math.isfinite(worst):
        return
    text = f"at most {worst:.3f} ({of_site})"
    largest = tuning.SUMMARY.largest_rhat
    if worst > largest:
        text += f", above {largest}: chains remember where they began"
    yield "R̂", text


def _range(values: np.ndarray) -> str:
    """Format the least and the greatest value over levels, and the levels where they
    are."""
    low = np.nanargmin(values)
    high = np.nanargmax(values)
    least = f"{values[low]:.3g}"
    greatest = f"{values[high]:.3g}"
    if least == greatest:
        return f"{least} at every level"
    return f"{least} (level {low}) … {greatest} (level {high})"
