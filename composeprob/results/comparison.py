"""Whether two runs found the same modes, each of which alone would not tell that it has
missed one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from composeprob import tuning
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.results.geometry import nearest, rows, scaled
from composeprob.results.record import Record
from composeprob.results.status import Code, Findings, Status


@dataclass(frozen=True)
class Comparison:
    """A `Comparison` says which share of each of two runs' samples the other has
    nothing near to.

    Args:
        missing_here: share of the other run's samples that this one has nothing near
            to.
        missing_there: share of this run's samples that the other has nothing near to.
        p_value: how often runs of one law show as much, by permutation.
        status: the run's status, with the finding `modes_missing` where there is one,
            and `modes_unreached` of either.
    """

    missing_here: float
    missing_there: float
    p_value: float
    status: Status

    def __str__(self) -> str:
        shares = f"missing here {self.missing_here:.1%}, there {self.missing_there:.1%}, p = {self.p_value:.3g}"
        return f"{shares}\n{self.status}"


def compare(self: Record, other: Record) -> Comparison:
    """Compares with a run of the same program under another key: has either missed a
    mode that the other found?

    Two that miss the same mode cannot tell by their samples; where factors can be drawn
    from, such draws can, and `modes_unreached` of either run is reported. A sample
    whose nearest ones in both runs, its own family left out, are all of its own run is
    where the other has nothing. Shares of such samples are held against random labels'.

    Returns:
        The shares, with a ``.status`` that has the finding `modes_missing` where one is
        above 0.05, and by chance in fewer than one of 100 cases.

    Raises:
        WrongTypeError, ShapeError, InvalidValueError: no result, one of another
            program, or too few samples.
    References:
        Schilling 1986, *Multivariate two-sample tests based on nearest neighbors*.
    """
    if not hasattr(other, "unweighted"):
        raise WrongTypeError(
            f"compare takes another result; got {type(other).__name__}.",
            fix="run the program under another key: result.compare(cp.infer(density, jax.random.key(1), …)).",
        )
    rng = np.random.default_rng(0)
    (points, sizes, families), (others, _, their_families) = (
        _samples(r, rng) for r in (self, other)
    )
    if (
        points.shape[1:] != others.shape[1:]
        or self.samples.keys() != other.samples.keys()
    ):
        raise ShapeError(
            f"The runs have other sites: {sorted(self.samples)} and {sorted(other.samples)}.",
            fix="compare two runs of one program.",
        )
    n = min(len(points), len(others), tuning.COMPARISON.most)
    if n < tuning.COMPARISON.fewest:
        raise InvalidValueError(
            f"A comparison takes {tuning.COMPARISON.fewest} samples or more of either run; there are {n}.",
            fix="use more chains.",
        )
    rows_here, rows_there = (
        rng.permutation(len(each))[:n] for each in (points, others)
    )
    families, their_families = families[rows_here], their_families[rows_there]
    pooled = np.concatenate([points[rows_here], others[rows_there]])
    together = np.concatenate([families, their_families + families.max() + 1])
    mine = np.arange(2 * n) < n
    pooled = scaled(pooled, sizes)
    k = int(np.clip(n // 20, 8, 25))  # few enough for a small mode
    near, _ = nearest(pooled, together, pooled, together, k)
    there, here = isolated(near, mine)
    chance = np.array(
        [
            max(isolated(near, _shuffled(together, n, rng)))
            for _ in range(tuning.COMPARISON.permutations)
        ]
    )
    p_value = float(
        (1 + np.sum(chance >= max(here, there))) / (1 + tuning.COMPARISON.permutations)
    )
    found = _findings(here, there, n) if p_value < tuning.COMPARISON.chance else []
    if not self.status.has(Code.MODES_UNREACHED):  # which both may have missed
        found += [
            finding
            for finding in other.status.findings
            if finding[0] is Code.MODES_UNREACHED
        ]
    return Comparison(here, there, p_value, self.status.with_findings(*found))


def isolated(near: Int[np.ndarray, "m k"], mine: np.ndarray) -> tuple[float, float]:
    """Returns the shares of my samples, and of the others', whose neighbours, all but a
    twelfth, are of their run."""
    of_mine = mine[near].sum(1)
    k = near.shape[1]
    alone = np.where(mine, of_mine, k - of_mine) >= k - k // 12
    return float(alone[mine].mean()), float(alone[~mine].mean())


def _samples(
    result: Record, rng: np.random.Generator
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Samples of equal weight, all sites in one row, how many numbers each site has,
    and the family of each sample; draws of a chain are one family."""
    draws = result.about.draws
    points, sizes, _ = rows(
        {name: result.drawn(name) for name in sorted(result.samples)}, 2
    )
    families = np.repeat(result._families.index, draws or 1)
    if draws is None and np.ptp(result.log_weights) > 0:
        chosen = rng.choice(len(points), len(points), p=result._families.weights)
        points, families = points[chosen], families[chosen]
    return points, sizes, families


def _shuffled(families: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Which samples are taken for mine where whole families are dealt out at random,
    about n."""
    order = rng.permutation(int(families.max()) + 1)
    sizes = np.bincount(families, minlength=len(order))
    dealt = np.zeros(len(order), bool)
    dealt[order] = np.cumsum(sizes[order]) <= n
    return dealt[families]


def _findings(here: float, there: float, n: int) -> Findings:
    shares = (here, "the other run's", "this one"), (there, "this run's", "the other")
    return [
        (
            Code.MODES_MISSING,
            f"{share:.0%} ± {math.sqrt(share * (1 - share) / n):.0%} of {whose} samples lie where {whom} has next to "
            "none: it has missed a mode, or modes, of about that share. Shares of modes are wrong in at least one of "
            "them. Try more chains, more levels, cp.SMC, whose weights keep shares right, and compare a third run.",
        )
        for share, whose, whom in shares
        if share >= tuning.COMPARISON.least
    ]
