"""Shares of the values that the tokens of a result have, for its table: a mean of the
numbers that stand for values would mean nothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.events import shown_entries
from composeprob.results.record import Record

COLUMNS = ("token", "share", "±", "next", "its share", "entropy")


class TokenShares(NamedTuple):
    """Weighted shares of the values at one position, or at all of a long site.

    Attributes:
        token: the most probable value.
        share: its share of the samples.
        error: the standard error of that; NaN where the status withholds it.
        next: the value with the next greatest share; None where no other was seen.
        next_share: its share, 0 where there is none.
        entropy: of the shares, in nats; log V where V values are equally probable.
        interval: 90 % interval of ``share``.
    """

    token: int
    share: float
    error: float
    next: int | None
    next_share: float
    entropy: float
    interval: tuple[float, float]

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        error = "–" if np.isnan(self.error) else f"{self.error:.4g}"
        other = "–" if self.next is None else str(self.next)
        return (
            str(self.token),
            f"{self.share:.4g}",
            error,
            other,
            f"{self.next_share:.4g}",
            f"{self.entropy:.3g}",
        )


def token_shares(
    result: Record, name: str, drawn: Int[np.ndarray, "n draws *event"]
) -> dict[str, TokenShares]:
    """Shares of the values at each position of a site, under the names of the
    positions; of a long site, of all positions together."""
    labels, _ = shown_entries(name, drawn, 2)
    # One label stands for many positions where it pools them.
    columns = drawn.reshape(*drawn.shape[:2], len(labels), -1)
    rows = {}
    for j, label in enumerate(labels):
        rows[label] = _at(result, columns[:, :, j])
    return rows


def _at(result: Record, drawn: Int[np.ndarray, "n draws positions"]) -> TokenShares:
    """Shares of the values of some positions."""
    of_chain = drawn.shape[1] * drawn.shape[2]
    weights = np.repeat(result._genealogy.weights / of_chain, of_chain)
    values, index = np.unique(drawn, return_inverse=True)
    shares = np.bincount(index.ravel(), weights)
    order = np.argsort(-shares, kind="stable")
    most = int(values[order[0]])
    # Of positions that are pooled, the share of each sample.
    estimate = result.probability_of((drawn == most).mean(axis=2))
    other = None
    other_share = 0.0
    if len(values) > 1 and shares[order[1]] > 0:
        other = int(values[order[1]])
        other_share = float(shares[order[1]])
    seen = shares[shares > 0]
    low, high = estimate.interval(0.9)
    return TokenShares(
        token=most,
        share=float(estimate.value),
        error=float(estimate.error),
        next=other,
        next_share=other_share,
        entropy=float(-np.sum(seen * np.log(seen))),
        interval=(float(low), float(high)),
    )


def distinct(
    weights: Float[np.ndarray, " n"], drawn: Int[np.ndarray, "n draws *event"]
) -> str:
    """The number of different sequences, and the most frequent one with its share."""
    of_chain = drawn.shape[1]
    sequences = drawn.reshape(len(drawn) * of_chain, -1)
    found, index = np.unique(sequences, axis=0, return_inverse=True)
    shares = np.bincount(index.ravel(), np.repeat(weights / of_chain, of_chain))
    counted = int(np.count_nonzero(shares))
    most = int(np.argmax(shares))
    tokens = found[most].tolist()
    shown = " ".join(map(str, tokens[: tuning.SUMMARY.most_tokens]))
    if len(tokens) > tuning.SUMMARY.most_tokens:
        shown += " …"
    return (
        f"{counted:,} in {len(sequences):,} samples; the most frequent, {shown}, has a "
        f"share of {shares[most]:.2g}"
    )
