"""The table that `Result.summary` prints: means, quantiles and diagnostics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from composeprob import tuning
from composeprob.results.estimates import quantile, quiet_arviz, with_error
from composeprob.results.geometry import shown_entries
from composeprob.results.record import Record, by_block
from composeprob.text import printable

COLUMNS = ("mean", "±", "sd", "5%", "50%", "95%")


@dataclass(frozen=True)
class Summary:
    """A `Summary` holds the weighted moments and quantiles of every number in a result,
    and prints as a table.

    Args:
        rows: ``{label: (mean, its standard error, sd, 5 %, 50 %, 95 %)}``, one entry
            per number of each site; the error is NaN where the status withholds it.
        intervals: ``{label: (low, high)}``, of the means, 90 %; NaN where the error is
            withheld.
        facts: ``{name: text}``, what is printed below the table.
    """

    rows: dict[str, tuple[float, ...]]
    intervals: dict[str, tuple[float, float]]
    facts: dict[str, str]

    @classmethod
    def of_result(cls, result: Record) -> Summary:
        """Makes the summary of one result."""
        rows: dict[str, tuple[float, ...]] = {}
        intervals: dict[str, tuple[float, float]] = {}
        for name in result.samples:
            drawn = result.drawn(name, tuning.SUMMARY.most_numbers)
            labels, columns = shown_entries(name, drawn, 2)
            values = drawn.reshape(
                *drawn.shape[:2], len(labels), -1
            )  # of a row, many numbers where it pools them
            weights = np.repeat(
                result._families.weights, values.shape[1] * values.shape[3]
            )
            means = result.mean_of(columns)
            numbers = zip(labels, means.error, *means.interval(0.9), strict=True)
            for j, (label, error, low, high) in enumerate(numbers):
                mean, *others = weighted_statistics(values[:, :, j].ravel(), weights)
                rows[label] = (mean, float(error), *others)
                intervals[label] = float(low), float(high)
        return cls(rows, intervals, _facts(result))

    def __str__(self) -> str:
        width = max([len(label) for label in self.rows] + [4])
        lines = [" " * width + "".join(f"{column:>12}" for column in COLUMNS)]
        lines += [
            f"{label:<{width}}" + "".join(f"{cell(v):>12}" for v in row)
            for label, row in self.rows.items()
        ]
        margin = max(len(name) for name in self.facts) + 2
        lines.append("")
        for name, text in self.facts.items():
            lines.append(f"{name:<{margin}}" + text.replace("\n", "\n" + " " * margin))
        return printable("\n".join(lines))

    __repr__ = __str__


def cell(value: float) -> str:
    """Formats a number of the table; what is withheld is a dash."""
    return "–" if np.isnan(value) else f"{value:.4g}"


def weighted_statistics(values: np.ndarray, weights: np.ndarray) -> tuple[float, ...]:
    """Computes mean, standard deviation and the 5, 50 and 95 % quantiles of finite
    values under weights, both (N,)."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return (float("nan"),) * (len(COLUMNS) - 1)
    values, weights = values[finite], np.asarray(weights, np.float64)[finite]
    weights = weights / weights.sum()
    mean = float(weights @ values)
    sd = float(np.sqrt(weights @ (values - mean) ** 2))
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return (
        mean,
        sd,
        *(quantile(values[order], cumulative, q) for q in (0.05, 0.5, 0.95)),
    )


def _facts(result: Record) -> dict[str, str]:
    about, levels, number = result.about, result.levels, len(result.log_weights)
    facts = {"sampler": about.sampler}
    if result.reason:
        facts["why"] = result.reason
    facts["chains"] = (
        f"{number:,}, as good as {result.effective_chains:,.0f} independent ones"
    )
    if about.devices > 1:
        facts["devices"] = f"{about.devices}, all of which moved chains"
    copies = len(np.unique(result._families.index))
    if copies < number:
        facts["ancestors"] = (
            f"{copies:,} of the first chains have descendants ({result._families.effective:,.0f} effective)"
        )
    if about.global_acceptance is not None:
        facts["global moves"] = (
            f"{about.global_acceptance:.2g} of the proposals accepted"
        )
    if about.round_trips is not None:
        facts["swaps"] = (
            f"{_range(np.asarray(levels['swaps']))}; {about.round_trips:.3g} round trips of each chain's replicas"
        )
    if not math.isnan(k := result._families.pareto_k):
        largest = tuning.SUMMARY.largest_k
        doubt = (
            f", above {largest}: a few chains decide, and errors are too small"
            if k > largest
            else ""
        )
        facts["Pareto k̂"] = (
            f"{k:.2f}{doubt}"
            if k > 0
            else "below 0: no chain has much more weight than others"
        )
    if about.draws is not None:
        facts["draws"] = (
            f"{about.draws:,} of each chain, {about.thin} transitions apart"
        )
        facts |= _mixing(result)
    log_snr = levels["log_snr"].to_numpy()
    facts["levels"] = f"{len(log_snr)}, log-SNR {log_snr[-1]:.3g} … {log_snr[0]:.3g}"
    facts["evaluations"] = f"{result.evaluations:,} of the composed density per chain"
    for name, title in (
        ("acceptance", "acceptance"),
        ("step_size", "step size"),
        ("ess", "ESS"),
    ):
        facts |= {
            label: _range(column)
            for label, column in by_block(levels, name, title).items()
        }
    for label, column in by_block(levels, "quadrature_error", "quadrature").items():
        if np.nansum(column) > 0:
            facts[label] = f"error of log-ratios {_range(column)}"
    if about.curl:
        facts["curl"] = ", ".join(
            f"{name} {value:.2g}" for name, value in about.curl.items()
        )
    if (rejected := float(levels["non_finite"].sum())) > 0:
        facts["non-finite"] = f"{int(rejected):,} proposals, rejected"
    if result.log_evidence is not None:
        error = (
            math.nan if result.log_evidence_error is None else result.log_evidence_error
        )
        facts["log evidence"] = with_error(result.log_evidence, error)
        if math.isfinite(error):
            low, high = result.log_evidence_interval(0.9)
            facts["log evidence"] += f" (90 % interval {low:.4g} … {high:.4g})"
    facts["time"] = f"{about.seconds:.2f} s"
    facts["status"] = str(result.status)
    return facts


def _mixing(result: Record) -> dict[str, str]:
    """R̂ between the chains of a run with draws, the greatest over all numbers; by
    ArviZ."""
    if (
        len(result.log_weights) < 2
        or (result.about.draws or 0) < tuning.ERRORS.fewest_draws
    ):
        return {}
    (arviz, _), worst, where = quiet_arviz(), -math.inf, ""
    for name in result.samples:
        _, columns = shown_entries(
            name, result.drawn(name, tuning.SUMMARY.most_numbers), 2
        )
        for column in np.moveaxis(columns, -1, 0):
            found = (
                float(arviz.rhat(column))
                if np.isfinite(column).all() and np.ptp(column) > 0
                else -math.inf
            )
            worst, where = max((worst, where), (found, name))
    if not math.isfinite(worst):
        return {}
    largest = tuning.SUMMARY.largest_rhat
    doubt = (
        f", above {largest}: chains remember where they began"
        if worst > largest
        else ""
    )
    return {"R̂": f"at most {worst:.3f} ({where}){doubt}"}


def _range(values: np.ndarray) -> str:
    """Formats the least and the greatest value over levels, and the levels where they
    are."""
    low, high = np.nanargmin(values), np.nanargmax(values)
    if f"{values[low]:.3g}" == f"{values[high]:.3g}":
        return f"{values[low]:.3g} at every level"
    return f"{values[low]:.3g} (level {low}) … {values[high]:.3g} (level {high})"
