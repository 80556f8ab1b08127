r"""Whether a run has reached all of its target: draws of the program's own factors are
sent where no chain may be.

A *scout* is a draw from a known density q, made of the factors that exact draws can be
taken from and of the priors of static sites. It weighs $W_j \propto \pi_0(x_j)/q(x_j)$,
so that shares of scouts are shares of $\pi_0$ (importance sampling), whatever the run
did. Two things are asked of them.

*Is there mass where no chain is?* A scout is apart from the chains if it is farther
from the nearest one than nine of ten chains are from theirs, and log π₀ falls by more
than `tuning.IMPORTANCE.barrier` nats on the way there. Chains may be apart from one another
too, where modes are many or curved: a fresh draw of π₀ would be apart from N chains
about as often as one of these from the others. So the scouts' share M is held against
the chains' own, L.

Scouts may lack what chains have, such as a mode that is narrow beside q. Let U be the
share of chains that would weigh more than any scout does: those places are as good as
unknown to scouts. Where both have been, the odds are known, and

$$\frac{M'}{1 - M'} = (1 - U)\,\frac{M}{1 - M}$$

are the odds of what is apart from the chains against what these have, by the run's own
shares.

*Have regions the shares that scouts say?* Regions are cells of k-means over chains and
scouts together. That is asked where scouts are worth `tuning.IMPORTANCE.fewest` draws of
π₀, and shares must differ by more than U. Pareto k̂ says little: of two sizes of
weights, by one narrow mode, it was 2.5, and shares were right to 0.003.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position, over_chains
from composeprob.density.points import barrier_depth, in_blocks
from composeprob.results.estimates import Families, systematic
from composeprob.results.geometry import chosen, nearest, rows, scaled, spaced, units
from composeprob.results.status import Code, Findings


def unreached(
    density: AnnealedDensity,
    positions: Position,
    families: Families,
    key: Array,
    evaluations: float,
) -> Findings:
    """The findings `modes_unreached` and `shares_frozen` of chains at level 0, ``{site:
    (N, …)}``, if scouts have cause for them, of whom, and of evaluations in all, there
    may be so many where nothing is wrong."""
    blocks = int(min(evaluations, tuning.IMPORTANCE.most) // tuning.IMPORTANCE.block)
    if not can_draw(density) or blocks == 0:
        return []
    chains = _chains(positions, families)
    if chains is None:
        return []
    found = Sample.of_scouts(
        density, jax.random.split(key, blocks * tuning.IMPORTANCE.block)
    )
    if found is None:
        return []
    return _apart(density, chains, found) or _other_shares(density, chains, found)


def can_draw(density: AnnealedDensity) -> bool:
    """Whether draws of the program's factors can be weighed against one another."""
    return {
        "energy",
        "mode_depth",
    } <= density.capabilities and density.evaluator.drawable


def importance(density: AnnealedDensity, positions: Position) -> np.ndarray:
    """log π₀ and log π₀/q of many positions, (2, M)."""
    return in_blocks(
        lambda block: np.stack(over_chains(density.evaluator.importance, block)),
        positions,
    )


class Sample(NamedTuple):
    """Weighted positions, ``{site: (n, …)}``, families of those that are not
    independent of each other, and of scouts log π₀/q, (n,)."""

    positions: Position
    families: Families
    log_weights: np.ndarray | None = None

    @classmethod
    def of_scouts(cls, density: AnnealedDensity, keys: Array) -> Sample | None:
        """Scouts, one for each key; None where none weighs anything."""
        size = tuning.IMPORTANCE.block
        drawn = [
            over_chains(density.evaluator.draw, keys[i : i + size])
            for i in range(0, len(keys), size)
        ]
        positions = jax.tree.map(
            lambda *leaves: np.concatenate(list(map(np.asarray, leaves))), *drawn
        )
        _, log_weights = importance(density, positions)
        log_weights = np.where(np.isfinite(log_weights), log_weights, -np.inf)
        if not np.isfinite(log_weights).any():
            return None
        return cls(positions, Families.from_log_weights(log_weights), log_weights)

    @property
    def weights(self) -> np.ndarray:
        """Normalised, (n,)."""
        return self.families.weights

    def share(
        self, inside: np.ndarray, expected: float | None = None
    ) -> tuple[float, float]:
        """The weight of those inside, (n,), and its variance: at least what as many
        independent draws would have if the share were the expected one; without one by
        the rule of succession."""
        share = float(self.weights @ inside)
        variance, effective = (
            float(self.families.variance(inside)),
            self.families.effective,
        )
        if expected is None:
            return share, variance + 1 / effective**2
        number = 1 / float(np.sum(self.weights**2)) if share > 0 else effective
        return share, max(variance, expected * (1 - expected) / number)

    def some(self, number: int) -> Sample:
        """Those that systematic resampling keeps, weighed by how often."""
        index, count = np.unique(systematic(self.weights, number), return_counts=True)
        return Sample(
            chosen(self.positions, index),
            Families(count / number, self.families.index[index]),
        )


def _chains(positions: Position, families: Families) -> Sample | None:
    """The chains that have weight, evenly spaced ones of many; None where too few are
    finite."""
    finite = np.all(
        [np.isfinite(x).reshape(len(x), -1).all(1) for x in positions.values()], axis=0
    )
    entries = sum(np.size(x) // len(x) for x in positions.values())
    index = np.flatnonzero(finite & (families.weights > 0))
    most = int(
        np.clip(
            tuning.SHARES.entries // entries,
            tuning.IMPORTANCE.block,
            4 * tuning.SHARES.most,
        )
    )
    if len(index) < tuning.COMPARISON.fewest:
        return None
    index = index[spaced(len(index), most)]
    return Sample(
        chosen(positions, index),
        Families.from_ancestors(families.weights[index], families.index[index]),
    )


def _rows(*samples: Sample) -> tuple[list[np.ndarray], list[int]]:
    """The positions as rows, (n, d) each, with sites in units of the spread that all
    have together; how many numbers each site has."""
    points, all_sizes, _ = zip(
        *(rows(dict(sorted(sample.positions.items()))) for sample in samples),
        strict=True,
    )
    pairs = zip(samples, points, strict=True)
    variance = np.mean([s.weights @ (x - s.weights @ x) ** 2 for s, x in pairs], axis=0)
    return [x / units(variance, all_sizes[0]) for x in points], all_sizes[0]


def _apart(density: AnnealedDensity, chains: Sample, scouts: Sample) -> Findings:
    """The finding that mass lies where no chain is."""
    few, some = (
        scouts.some(tuning.IMPORTANCE.block),
        chains.some(tuning.IMPORTANCE.block),
    )
    (points, others, theirs), _ = _rows(few, some, chains)
    index, distance = (
        each[:, 0]
        for each in nearest(
            others, some.families.index, theirs, chains.families.index, 1
        )
    )
    far = float(np.quantile(distance, tuning.IMPORTANCE.far))

    def depths(sample: Sample, near: np.ndarray, distance: np.ndarray) -> np.ndarray:
        depth = np.zeros(len(near))
        index = np.flatnonzero(distance > far)
        if len(index):
            ends = (
                chosen(sample.positions, index),
                chosen(chains.positions, near[index]),
            )
            between = barrier_depth(
                lambda points: importance(density, points)[0], *ends
            )
            depth[index] = np.where(
                np.isnan(between), np.inf, between
            )  # an end where π₀ is 0
        return depth

    depth = depths(
        few,
        *(
            each[:, 0]
            for each in nearest(points, None, theirs, chains.families.index, 1)
        ),
    )
    inside = depth > tuning.IMPORTANCE.barrier
    share = float(few.weights @ inside)
    if share < tuning.IMPORTANCE.least:
        return []
    effective = scouts.families.effective
    variance = (share * (1 - share) + 1 / effective) / effective
    alike, of_chains = some.share(
        depths(some, index, distance) > tuning.IMPORTANCE.barrier
    )
    odds = (1 - _unknown(density, some, scouts)) * share / max(1 - share, 1 / effective)
    mass, error = odds / (1 + odds), math.sqrt(variance + of_chains)
    if mass - alike < max(tuning.IMPORTANCE.errors * error, tuning.IMPORTANCE.least):
        return []
    example = int(np.argmax(np.where(inside, few.weights, -1)))
    text = (
        f"Draws of the program's own factors, weighed, find {mass:.0%} ± {error:.0%} of the probability where no chain "
        f"is, behind barriers of {min(depth[example], 999):.0f} nats or so: for example at "
        f"{_place(density, few.positions, example)}. The run has missed a mode, or modes. Try more chains, more "
        "levels, or cp.ReplicaExchange, whose replicas come down again and again; or begin from wider factors."
    )
    return [(Code.MODES_UNREACHED, text)]


def _unknown(density: AnnealedDensity, chains: Sample, scouts: Sample) -> float:
    """The share of chains that would weigh more than any scout."""
    assert scouts.log_weights is not None
    return float(
        chains.weights
        @ (importance(density, chains.positions)[1] > scouts.log_weights.max())
    )


def _other_shares(density: AnnealedDensity, chains: Sample, scouts: Sample) -> Findings:
    """The finding that a region has another share of the chains than of the scouts."""
    from scipy.cluster.vq import kmeans2

    if scouts.families.effective < tuning.IMPORTANCE.fewest:
        return []
    pooled = chains.some(tuning.IMPORTANCE.block), scouts.some(tuning.IMPORTANCE.block)
    parts, sizes = _rows(*pooled, chains, scouts)
    counts = np.cumsum([len(part) for part in parts])[:-1]
    points = scaled(np.concatenate(parts), sizes)
    shown = points[: counts[1]]
    centres, cells = kmeans2(
        shown,
        min(tuning.IMPORTANCE.cells, len(np.unique(shown, axis=0))),
        minit="++",
        seed=0,
    )
    known = np.unique(cells)
    centres, labels = (
        centres[known],
        ((points[:, None] - centres[known]) ** 2).sum(-1).argmin(1),
    )
    _, _, of_chains, of_scouts = np.split(labels, counts)
    different = _most_different(chains, scouts, of_chains, of_scouts)
    if different is not None:
        different = _most_different(
            chains, scouts, of_chains, of_scouts, _unknown(density, pooled[0], scouts)
        )
    if different is None:
        return []
    group, (share, variance), (right, of_right) = different
    example = int(np.argmin(((points[counts[2] :] - centres[group]) ** 2).sum(-1)))
    text = (
        f"The region about {_place(density, scouts.positions, example)} holds {share:.1%} ± "
        f"{math.sqrt(variance):.1%} of the chains; weighed draws of the program's own factors say {right:.1%} ± "
        f"{math.sqrt(of_right):.1%}. Try more chains, more levels, or cp.ReplicaExchange."
    )
    return [(Code.SHARES_FROZEN, text)]


def _most_different(
    chains: Sample,
    scouts: Sample,
    of_chains: np.ndarray,
    of_scouts: np.ndarray,
    unknown: float = 0.0,
) -> tuple[int, tuple[float, float], tuple[float, float]] | None:
    """The region whose shares of chains and scouts differ by most errors, with both
    shares and their variances; None where none does by enough."""
    found, most = None, tuning.IMPORTANCE.errors
    for group in range(int(max(of_chains.max(), of_scouts.max())) + 1):
        right = scouts.share(of_scouts == group)
        share = chains.share(of_chains == group, expected=right[0])
        difference = abs(share[0] - right[0]) - unknown
        errors = difference / math.sqrt(share[1] + right[1])
        if errors > most and difference > tuning.IMPORTANCE.least:
            found, most = (group, share, right), errors
    return found


def _place(density: AnnealedDensity, positions: Position, index: int) -> str:
    """A position as its program's author knows it: ``x = (3.02, -1)``."""
    values: PyTree[Array] = density.to_samples(chosen(positions, np.array(index)))
    shown = []
    for name in density.sites:
        numbers = np.ravel(np.asarray(values[name]))
        text = ", ".join(f"{number:.3g}" for number in numbers[:4]) + ", …" * (
            len(numbers) > 4
        )
        shown.append(f"{name} = {text}" if len(numbers) == 1 else f"{name} = ({text})")
    return "; ".join(shown[:3])
