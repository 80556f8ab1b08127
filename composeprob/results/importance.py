r"""A check that a run has reached all modes of its target, by importance sampling.

Importance samples are draws from a closed-form density q, made of the factors that can
be sampled exactly and of the priors of static sites. Their weights are
$W_j \propto \pi_0(x_j)/q(x_j)$, so that shares of importance samples are shares of
$\pi_0$, whatever the run did. They answer two questions.

*Is there mass where no chain is?* A sample is separated from the chains if it is
farther from the nearest one than nine of ten chains are from theirs, and log π₀ falls
by more than `tuning.IMPORTANCE.barrier` nats on the way there. Chains may be separated
from one another too, where modes are many or curved: a fresh draw of π₀ would be
separated from N chains about as often as one of these from the others. So the samples'
separated share M is compared with the chains' own, L.

Importance samples may miss modes of the chains, such as one that is narrow beside q.
Let U be the share of chains whose importance weight would exceed that of every sample:
their places are as good as unknown to the samples. The odds of the rest are

$$\frac{M'}{1 - M'} = (1 - U)\,\frac{M}{1 - M},$$

the mass separated from the chains against that of the chains, by the run's own shares.

*Do regions have the shares that importance samples estimate?* Regions are cells of
k-means over chains and samples together. This is checked where samples are worth
`tuning.IMPORTANCE.fewest` draws of π₀, and shares must differ by more than U. Pareto k̂
says little: with two sizes of weights, by one narrow mode, it was 2.5, and shares were
right to 0.003.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position, over_chains
from composeprob.density.points import barrier_depth, in_blocks
from composeprob.results.estimates import Genealogy, systematic
from composeprob.results.geometry import chosen, nearest, rows, scaled, spaced, units


class Unlike(NamedTuple):
    """Differences of importance samples from the chains, in words; empty where there
    are none."""

    unreached: str = ""  # mass where no chain is
    shares: str = ""  # a region of another share


def unlike(
    density: AnnealedDensity,
    positions: Position,
    genealogy: Genealogy,
    key: Array,
    evaluations: float,
) -> Unlike:
    """Compare importance samples with the chains.

    Args:
        density: of the run.
        positions: of its chains at level 0, ``{site: (N, …)}``.
        genealogy: their ancestors and weights.
        key: of the samples.
        evaluations: at most this many density evaluations where nothing is wrong; a
            suspicion takes more.
    """
    block = tuning.IMPORTANCE.block
    # Whole blocks, so that all calls run the same compiled code.
    blocks = int(min(evaluations, tuning.IMPORTANCE.most) // block)
    if not can_draw(density) or blocks == 0:
        return Unlike()
    chains = _weighted_chains(positions, genealogy)
    if chains is None:
        return Unlike()
    keys = jax.random.split(key, blocks * block)
    samples = WeightedSample.by_importance(density, keys)
    if samples is None:
        return Unlike()
    # A missed mode explains wrong shares, which then need no finding of their own.
    unreached = _missed_mass(density, chains, samples)
    if unreached:
        return Unlike(unreached=unreached)
    return Unlike(shares=_different_shares(density, chains, samples))


def can_draw(density: AnnealedDensity) -> bool:
    """Return whether a program's factors give importance samples whose weights can be
    compared."""
    return density.comparable_modes and density.evaluator.drawable


def importance(
    density: AnnealedDensity, positions: Position
) -> Float[np.ndarray, "2 points"]:
    """log π₀ and log π₀/q of many positions."""
    return in_blocks(
        lambda block: np.stack(over_chains(density.evaluator.importance, block)),
        positions,
    )


class Share(NamedTuple):
    """The share of weight in a region, and the variance of its estimate."""

    value: float
    variance: float


class WeightedSample(NamedTuple):
    """Weighted positions, ``{site: (n, …)}``, chains or importance samples."""

    positions: Position
    genealogy: Genealogy  # of chains that are not independent of each other
    log_weights: Float[np.ndarray, " n"] | None = None  # log π₀/q of importance samples

    @classmethod
    def by_importance(
        cls, density: AnnealedDensity, keys: Array
    ) -> WeightedSample | None:
        """Draw one importance sample for each key; None where no weight is finite."""
        size = tuning.IMPORTANCE.block
        drawn = [
            over_chains(density.evaluator.draw, keys[i : i + size])
            for i in range(0, len(keys), size)
        ]

        def joined(*blocks: Array) -> np.ndarray:
            return np.concatenate([np.asarray(block) for block in blocks])

        positions = jax.tree.map(joined, *drawn)
        _, log_weights = importance(density, positions)
        # Where π₀ is NaN, or q overflows, a sample tells nothing.
        log_weights = np.where(np.isfinite(log_weights), log_weights, -np.inf)
        if not np.isfinite(log_weights).any():
            return None
        return cls(positions, Genealogy.from_log_weights(log_weights), log_weights)

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        """Normalised weights."""
        return self.genealogy.weights

    def share(self, inside: Bool[np.ndarray, " n"]) -> Share:
        """The weight of the members ``inside``, and its variance, which the rule of
        succession keeps above 0."""
        variance = float(self.genealogy.variance(inside))
        floor = 1 / self.genealogy.effective**2
        return Share(float(self.weights @ inside), variance + floor)

    def share_if(self, inside: Bool[np.ndarray, " n"], expected: float) -> Share:
        """The weight of the members ``inside``, and its variance: at least the variance
        of as many independent draws if the share were the ``expected`` one."""
        share = float(self.weights @ inside)
        variance = float(self.genealogy.variance(inside))
        number = self.genealogy.effective
        if share > 0:
            number = 1 / float(np.sum(self.weights**2))
        return Share(share, max(variance, expected * (1 - expected) / number))

    def resampled(self, number: int) -> WeightedSample:
        """The distinct members of a systematic resampling, weighted by their counts."""
        drawn = systematic(self.weights, number)
        index, count = np.unique(drawn, return_counts=True)
        genealogy = Genealogy(count / number, self.genealogy.index[index])
        return WeightedSample(chosen(self.positions, index), genealogy)


def _weighted_chains(
    positions: Position, genealogy: Genealogy
) -> WeightedSample | None:
    """The chains that have weight, or evenly spaced ones of many; None if too few are
    finite."""
    finite = np.all(
        [np.isfinite(x).reshape(len(x), -1).all(1) for x in positions.values()], axis=0
    )
    index = np.flatnonzero(finite & (genealogy.weights > 0))
    if len(index) < tuning.COMPARISON.fewest:
        return None
    entries = sum(np.size(x) // len(x) for x in positions.values())
    # Bounds the memory of distances between all pairs.
    most = tuning.SHARES.entries // entries
    most = int(np.clip(most, tuning.IMPORTANCE.block, 4 * tuning.SHARES.most))
    index = index[spaced(len(index), most)]
    return WeightedSample(
        chosen(positions, index),
        Genealogy.from_ancestors(genealogy.weights[index], genealogy.index[index]),
    )


def _rows(
    *samples: WeightedSample,
) -> tuple[list[Float[np.ndarray, "n dims"]], list[int]]:
    """The positions as rows, with sites in units of the spread that all samples have
    together, and the number of entries of each site."""
    points = []
    variances = []
    sizes: list[int] = []
    for sample in samples:
        x, sizes, _ = rows(dict(sorted(sample.positions.items())))
        points.append(x)
        variances.append(sample.weights @ (x - sample.weights @ x) ** 2)
    scale = units(np.mean(variances, axis=0), sizes)
    return [x / scale for x in points], sizes


def _missed_mass(
    density: AnnealedDensity, chains: WeightedSample, samples: WeightedSample
) -> str:
    """The mass that lies where no chain is, in words; empty where there is none."""
    limits = tuning.IMPORTANCE
    few = samples.resampled(limits.block)
    some = chains.resampled(limits.block)
    (few_points, some_points, points), _ = _rows(few, some, chains)
    ancestors = chains.genealogy.index
    # Copies of a chain would make its nearest neighbour too near.
    near, distance = nearest(some_points, some.genealogy.index, points, ancestors, 1)
    near_few, distance_few = nearest(few_points, None, points, ancestors, 1)
    far = float(np.quantile(distance[:, 0], limits.far))

    def separated(
        sample: WeightedSample, near: np.ndarray, distance: np.ndarray
    ) -> Float[np.ndarray, " n"]:
        return _barriers_to(density, sample, chains, near[:, 0], distance[:, 0] > far)

    depth = separated(few, near_few, distance_few)
    inside = depth > limits.barrier
    share = float(few.weights @ inside)
    if share < limits.least:
        return ""
    effective = samples.genealogy.effective
    # The rule of succession keeps the variance of a share near 0 or 1 above 0.
    variance = (share * (1 - share) + 1 / effective) / effective
    own = some.share(separated(some, near, distance) > limits.barrier)
    # The odds of the module's formula, M'/(1 − M').
    unknown = _share_unknown(density, some, samples)
    odds = (1 - unknown) * share / max(1 - share, 1 / effective)
    mass = odds / (1 + odds)
    error = math.sqrt(variance + own.variance)
    if mass - own.value < max(limits.errors * error, limits.least):
        return ""
    example = int(np.argmax(np.where(inside, few.weights, -1)))
    return (
        f"Importance samples from the program's own factors find {mass:.0%} ± "
        f"{error:.0%} of the probability where no chain is, behind barriers of about "
        f"{min(depth[example], 999):.0f} nats: for example at "
        f"{_place(density, few.positions, example)}. The run has missed a mode, or "
        "modes. Try more chains, more levels, or cp.ReplicaExchange, whose replicas "
        "come down again and again; or begin from wider factors."
    )


def _barriers_to(
    density: AnnealedDensity,
    sample: WeightedSample,
    chains: WeightedSample,
    near: Int[np.ndarray, " n"],
    is_far: Bool[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Barrier heights of log π₀ between positions and the chains ``near`` them; 0 for
    positions that are not far, which take no evaluation."""
    depth = np.zeros(len(near))
    index = np.flatnonzero(is_far)
    if len(index):
        ends = (chosen(sample.positions, index), chosen(chains.positions, near[index]))
        heights = barrier_depth(lambda points: importance(density, points)[0], *ends)
        # NaN where π₀ is 0 at an end.
        depth[index] = np.where(np.isnan(heights), np.inf, heights)
    return depth


def _share_unknown(
    density: AnnealedDensity, chains: WeightedSample, samples: WeightedSample
) -> float:
    """The share of chains whose importance weight exceeds that of every sample."""
    assert samples.log_weights is not None
    _, log_weights = importance(density, chains.positions)
    return float(chains.weights @ (log_weights > samples.log_weights.max()))


class _Difference(NamedTuple):
    """A region, with its shares of chains and of importance samples."""

    region: int
    of_chains: Share
    of_samples: Share


def _different_shares(
    density: AnnealedDensity, chains: WeightedSample, samples: WeightedSample
) -> str:
    """The region that has another share of the chains than of importance samples, in
    words; empty where there is none."""
    if samples.genealogy.effective < tuning.IMPORTANCE.fewest:
        return ""
    some_chains = chains.resampled(tuning.IMPORTANCE.block)
    some_samples = samples.resampled(tuning.IMPORTANCE.block)
    # Regions are fitted to as many chains as samples, and then tell all of both apart.
    parts, sizes = _rows(some_chains, some_samples, chains, samples)
    points = scaled(np.concatenate(parts), sizes)
    ends = np.cumsum([len(part) for part in parts])
    centres, labels = _regions(points, number_fitted=int(ends[1]))
    labels_of_chains = labels[ends[1] : ends[2]]
    labels_of_samples = labels[ends[2] :]
    labelled = (chains, samples, labels_of_chains, labels_of_samples)
    different = _largest_difference(*labelled)
    if different is None:
        return ""
    # Evaluations of the density are spent only on a suspicion.
    unknown = _share_unknown(density, some_chains, samples)
    different = _largest_difference(*labelled, unknown)
    if different is None:
        return ""
    to_centre = ((points[ends[2] :] - centres[different.region]) ** 2).sum(-1)
    place = _place(density, samples.positions, int(np.argmin(to_centre)))
    of_chains = different.of_chains
    of_samples = different.of_samples
    return (
        f"The region about {place} holds {of_chains.value:.1%} ± "
        f"{math.sqrt(of_chains.variance):.1%} of the chains; importance samples from "
        f"the program's own factors estimate {of_samples.value:.1%} ± "
        f"{math.sqrt(of_samples.variance):.1%}. Try more chains, more levels, or "
        "cp.ReplicaExchange."
    )


def _regions(
    points: Float[np.ndarray, "n dims"], number_fitted: int
) -> tuple[Float[np.ndarray, "regions dims"], Int[np.ndarray, " n"]]:
    """Centres of k-means, fitted to the first points, and the region of each point."""
    from scipy.cluster.vq import kmeans2

    fitted = points[:number_fitted]
    number = min(tuning.IMPORTANCE.cells, len(np.unique(fitted, axis=0)))
    centres, cells = kmeans2(fitted, number, minit="++", seed=0)
    centres = centres[np.unique(cells)]  # without empty cells
    squares = ((points[:, None] - centres) ** 2).sum(-1)
    return centres, squares.argmin(1)


def _largest_difference(
    chains: WeightedSample,
    samples: WeightedSample,
    labels_of_chains: Int[np.ndarray, " n"],
    labels_of_samples: Int[np.ndarray, " m"],
    unknown: float = 0.0,
) -> _Difference | None:
    """The region whose shares of chains and of samples differ most, in standard errors;
    None if no difference is significant."""
    largest = None
    most_errors = tuning.IMPORTANCE.errors
    number = int(max(labels_of_chains.max(), labels_of_samples.max())) + 1
    for region in range(number):
        of_samples = samples.share(labels_of_samples == region)
        of_chains = chains.share_if(labels_of_chains == region, of_samples.value)
        # Samples may lack the share of chains that is unknown to them.
        difference = abs(of_chains.value - of_samples.value) - unknown
        errors = difference / math.sqrt(of_chains.variance + of_samples.variance)
        if errors > most_errors and difference > tuning.IMPORTANCE.least:
            largest = _Difference(region, of_chains, of_samples)
            most_errors = errors
    return largest


def _place(density: AnnealedDensity, positions: Position, index: int) -> str:
    """A position in the values of the program's sites: ``x = (3.02, -1)``."""
    values: PyTree[Array] = density.to_samples(chosen(positions, np.array(index)))
    shown = []
    for name in density.sites:
        numbers = np.ravel(np.asarray(values[name]))
        text = ", ".join(f"{number:.3g}" for number in numbers[:4])
        if len(numbers) > 4:
            text += ", …"
        if len(numbers) > 1:
            text = f"({text})"
        shown.append(f"{name} = {text}")
    return "; ".join(shown[:3])
