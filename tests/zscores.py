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

import numpy as np

LIMIT = 4.0


def z_scores(
    values: Mapping[str, np.ndarray], expected: Mapping[str, float]
) -> dict[str, float]:
    """(average − expectation) / standard error by name; values are (chains,) or
    (chains, draws), NaN counts as ∞."""
    scores = {}
    for name, goal in expected.items():
        per_chain = np.asarray(values[name], dtype=np.float64)
        per_chain = per_chain.reshape(per_chain.shape[0], -1).mean(axis=1)
        error = per_chain.std(ddof=1) / np.sqrt(len(per_chain))
        score = np.inf  # of chains that agree to the last digit
        if error > 0:
            score = (per_chain.mean() - goal) / error
        scores[name] = float(np.nan_to_num(score, nan=np.inf))
    return scores


def worst(scores: Mapping[str, float]) -> float:
    """The largest |z|."""
    return max(abs(z) for z in scores.values())


def assert_agrees(scores: Mapping[str, float]) -> None:
    """Fail when any |z| exceeds `LIMIT`."""
    assert worst(scores) <= LIMIT, f"beyond |z| = {LIMIT}: {_listed(scores)}"


def assert_disagrees(scores: Mapping[str, float]) -> None:
    """Fail when no |z| exceeds `LIMIT`: for negative controls."""
    assert worst(scores) > LIMIT, f"not detected: {_listed(scores)}"


def _listed(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {z:+.1f}" for name, z in scores.items())
