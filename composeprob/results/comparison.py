"""A comparison of the modes of two runs, as no run alone shows that it has missed
one."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from composeprob import tuning
from composeprob.arguments import check_key
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.findings import Code
from composeprob.results.checks.modes_missing import Isolated, ModesMissing
from composeprob.results.geometry import nearest, rows, scaled
from composeprob.results.record import Record
from composeprob.results.status import Status


@dataclass(frozen=True)
class Comparison:
    """A `Comparison` holds the shares of two runs' samples that have no near sample in
    the other run.

    Args:
        missing_here: share of the other run's samples that have none near in this one.
        missing_there: share of this run's samples that have none near in the other.
        p_value: frequency of shares as large between runs of one distribution, by
            permutation.
        status: the run's status, with the finding `modes_missing` where there is one,
            and `modes_unreached` of either run.
    """

    missing_here: float
    missing_there: float
    p_value: float
    status: Status

    def __str__(self) -> str:
        return (
            f"missing here {self.missing_here:.1%}, there {self.missing_there:.1%}, "
            f"p = {self.p_value:.3g}\n{self.status}"
        )


def compare(self: Record, other: Record, key: Array | None = None) -> Comparison:
    """Compare with a run of the same program under another key: has either missed a
    mode that the other found?

    Two runs that miss the same mode cannot tell by their samples; importance samples
    from the factors can, and `modes_unreached` of either run is reported. A sample is
    isolated if its nearest ones in both runs, those of its own ancestor left out, are
    all of its own run. Shares of isolated samples are compared with those under random
    labels.

    Args:
        other: the other run.
        key: a typed random key, for the random labels and the samples that are chosen;
            left out, the same ones at each call.

    Returns:
        The shares, with a ``.status`` that has the finding `modes_missing` where one is
        above 0.05, and by chance in fewer than one of 100 cases.

    Raises:
        WrongTypeError, ShapeError, InvalidValueError: not a result, one of another
            program, or too few samples.

    References:
        Schilling 1986, *Multivariate two-sample tests based on nearest neighbors*.
    """
    if not hasattr(other, "unweighted"):
        raise WrongTypeError(
            f"compare takes another result; got {type(other).__name__}.",
            fix="run the program under another key: "
            "result.compare(cp.infer(density, jax.random.key(1), …)).",
        )
    _check_another_run(self, other)
    limits = tuning.COMPARISON
    rng = np.random.default_rng(0)
    if key is not None:
        check_key(key)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    points, sizes, ancestors = _samples(self, rng)
    others, _, their_ancestors = _samples(other, rng)
    same_sites = self.samples.keys() == other.samples.keys()
    if points.shape[1:] != others.shape[1:] or not same_sites:
        raise ShapeError(
            f"The runs have other sites: {_events(self)} and {_events(other)}.",
            fix="compare two runs of one program.",
        )
    n = min(len(points), len(others), limits.most)
    if n < limits.fewest:
        raise InvalidValueError(
            f"A comparison takes {limits.fewest} samples or more of either run; there "
            f"are {n}.",
            fix="use more chains.",
        )
    rows_here = rng.permutation(len(points))[:n]
    rows_there = rng.permutation(len(others))[:n]
    ancestors = ancestors[rows_here]
    their_ancestors = their_ancestors[rows_there]
    pooled = np.concatenate([points[rows_here], others[rows_there]])
    together = np.concatenate([ancestors, their_ancestors + ancestors.max() + 1])
    mine = np.arange(2 * n) < n
    pooled = scaled(pooled, sizes)
    k = int(np.clip(n // 20, 8, 25))  # few enough for a small mode
    near, _ = nearest(pooled, together, pooled, together, k)
    there, here = isolated(near, mine)
    # Permutation test: whole ancestors are relabelled, as copies are not independent.
    largest = max(here, there)
    as_large = 0
    for _ in range(limits.permutations):
        as_large += max(isolated(near, _shuffled(together, n, rng))) >= largest
    p_value = float((1 + as_large) / (1 + limits.permutations))
    findings = ModesMissing().ask(Isolated(here, there, n, p_value))
    if not self.status.has(Code.MODES_UNREACHED):  # which both may have missed
        for finding in other.status.findings:
            if finding.code == Code.MODES_UNREACHED:
                findings.append(finding)
    return Comparison(here, there, p_value, self.status.with_findings(*findings))


def _check_another_run(this: Record, other: Record) -> None:
    """Refuse to compare a run with itself, or with a run of another program."""
    same_sites = this.samples.keys() == other.samples.keys()
    same_run = same_sites and np.array_equal(this.log_weights, other.log_weights)
    for name, values in this.samples.items():
        same_run = same_run and np.array_equal(values, other.samples[name])
    if same_run:
        raise InvalidValueError(
            "compare got the same samples twice, which agree by themselves.",
            fix="run the program under another key: "
            "result.compare(cp.infer(density, jax.random.key(1), …)).",
        )
    density = getattr(this, "density", None)
    others = getattr(other, "density", None)
    if density is None or others is None:  # read from a file
        return
    formula = density.described.graph.formula
    another = others.described.graph.formula
    if formula != another:
        raise InvalidValueError(
            f"compare got runs of two programs: {formula}, and {another}.",
            fix="compare two runs of one program, under different keys.",
        )


def isolated(
    near: Int[np.ndarray, "m k"], mine: Bool[np.ndarray, " m"]
) -> tuple[float, float]:
    """Return the shares of isolated samples, among mine and among the others': all but
    a twelfth of an isolated sample's neighbours are from its own run."""
    k = near.shape[1]
    of_mine = mine[near].sum(1)
    of_own_run = np.where(mine, of_mine, k - of_mine)
    alone = of_own_run >= k - k // 12
    return float(alone[mine].mean()), float(alone[~mine].mean())


def _samples(
    result: Record, rng: np.random.Generator
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Samples of equal weight as rows, the number of entries of each site, and the
    ancestor of each sample; draws of a chain have one ancestor."""
    draws = result.about.draws
    drawn = {name: result.drawn(name) for name in sorted(result.samples)}
    points, sizes, _ = rows(drawn, 2)
    ancestors = np.repeat(result._genealogy.index, draws or 1)
    if draws is None and np.ptp(result.log_weights) > 0:
        # With replacement, in proportion to their weights.
        chosen = rng.choice(len(points), len(points), p=result._genealogy.weights)
        points = points[chosen]
        ancestors = ancestors[chosen]
    return points, sizes, ancestors


def _shuffled(
    ancestors: Int[np.ndarray, " m"], n: int, rng: np.random.Generator
) -> Bool[np.ndarray, " m"]:
    """A random relabelling of about n samples as mine, with all descendants of an
    ancestor under one label."""
    order = rng.permutation(int(ancestors.max()) + 1)
    descendants = np.bincount(ancestors, minlength=len(order))
    mine = np.zeros(len(order), bool)
    mine[order] = np.cumsum(descendants[order]) <= n
    return mine[ancestors]


def _events(result: Record) -> str:
    """The sites of a result, each with the shape of its event."""
    lead = 1 if result.about.draws is None else 2
    events = []
    for name, values in sorted(result.samples.items()):
        events.append(f"{name!r} of shape {np.shape(values)[lead:]}")
    return ", ".join(events)
