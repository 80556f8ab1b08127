"""The one failure rate of every statistical test.

A check passes when each average lies within `LIMIT` Monte Carlo standard errors of its
exact expectation. By chance alone |z| > 4 happens once in 16,000: some 200 averages in
this suite fail together with probability about 0.01 when keys are changed, and never
otherwise, as every test's key is fixed. A mutant counts as detected only beyond `LIMIT`
too: the checks that a wrong sampler must fail are the very ones that a right sampler
must pass.

Chains are independent, so the standard error is that of the chains' own averages,
whatever the correlation of draws within a chain.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

LIMIT = 4.0


class Average(NamedTuple):
    """An average of chains, its standard error, and its exact expectation."""

    exact: float
    estimate: float
    error: float


class Scores(dict[str, float]):
    """Scores by name, with the averages that they are of."""

    averages: dict[str, Average]


def z_scores(values: Mapping[str, np.ndarray], expected: Mapping[str, float]) -> Scores:
    """(average − expectation) / standard error by name; values are (chains,) or
    (chains, draws), NaN counts as ∞."""
    scores = Scores()
    scores.averages = {}
    for name, goal in expected.items():
        per_chain = np.asarray(values[name], dtype=np.float64)
        per_chain = per_chain.reshape(per_chain.shape[0], -1).mean(axis=1)
        error = per_chain.std(ddof=1) / np.sqrt(len(per_chain))
        score = np.inf  # of chains that agree to the last digit
        if error > 0:
            score = (per_chain.mean() - goal) / error
        scores.averages[name] = Average(float(goal), per_chain.mean(), error)
        scores[name] = float(np.nan_to_num(score, nan=np.inf))
    return scores


def worst(scores: Mapping[str, float]) -> float:
    """The largest |z|."""
    return max(abs(z) for z in scores.values())


def assert_agrees(scores: Mapping[str, float]) -> None:
    """Fail when any |z| exceeds `LIMIT`."""
    assert worst(scores) <= LIMIT, f"beyond |z| = {LIMIT}:\n{_listed(scores)}"


def assert_disagrees(scores: Mapping[str, float]) -> None:
    """Fail when no |z| exceeds `LIMIT`: for negative controls."""
    assert worst(scores) > LIMIT, f"not detected:\n{_listed(scores)}"


def _listed(scores: Mapping[str, float]) -> str:
    """A line for each score, the largest first, with its average if it is known."""
    averages: dict[str, Average] = getattr(scores, "averages", {})
    lines = []
    for name in sorted(scores, key=lambda name: -abs(scores[name])):
        line = f"  {name}: z {scores[name]:+.1f}"
        if name in averages:
            exact, estimate, error = averages[name]
            line += f", exact {exact:.6g}, estimate {estimate:.6g} ± {error:.2g}"
        lines.append(line)
    return "\n".join(lines)
