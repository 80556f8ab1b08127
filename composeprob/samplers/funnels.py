r"""Moves at level 0 into the necks of funnels, whose widths differ by orders of
magnitude from place to place.

A step that suits most chains is too long for a neck. They are rejected there, so that
chains do not enter; and Stein's identity, whose variance is that of the scores, has no
power. What can be seen are the heavy tails of scores: in a funnel a few chains carry
their mean square. There `FunnelMoves` follow, by steps as long as the place allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from composeprob import pytree, tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation
from composeprob.density.stein import bounds_on_chance, carried_by
from composeprob.kernels import HMC, Adaptive
from composeprob.kernels.hamiltonian import (
    HamiltonianState,
    HamiltonianTrajectory,
)
from composeprob.kernels.line_integral import LogRatio, bounded
from composeprob.kernels.metric import in_force
from composeprob.samplers.discrete import discrete_sites
from composeprob.samplers.finishers import Points, Trail, WarmUp, squares
from composeprob.samplers.hierarchy import has_dependents, has_members, interweaves
from composeprob.samplers.moves import Transitions


class SelfTuning(HMC):
    r"""HMC whose steps are as long as the density is wide where a chain is.

    Each transition draws its step size h from a law that depends on the position,

    $$\log h \mid x \sim N(\log \epsilon + \log s(x), \tau^2), \qquad s(x) =
      \big(\tfrac12 + \tfrac{1}{2d}\|L^\top\nabla\log\pi(x)\|^2\big)^{-1/2},$$

    and follows the leapfrog of that length. The proposal is accepted by the ratio of
    $\pi(x)\,N(v)\,p(h \mid x)$ at both ends, which leaves π invariant: h is a variable
    of its own, drawn anew by Gibbs and held by the leapfrog.

    References:
        Bou-Rabee, Carpenter and Marsden (2024), *GIST: Gibbs self-tuning for locally
        adaptive Hamiltonian Monte Carlo*.
    """

    def begin(
        self,
        noise: Float[Array, " noise_size"],
        state: HamiltonianState,
        step_size: Float[Array, ""],
    ) -> tuple[HamiltonianTrajectory, Array]:
        # The normal number that is another kernel's jitter.
        about = tuning.FUNNELS.spread * noise[-1]
        log_scale = self._log_width(state.evaluation) + about
        length = step_size * jnp.exp(log_scale).astype(step_size.dtype)
        return self.begun(noise, state, length)

    def log_step_ratio(
        self, trajectory: HamiltonianTrajectory, proposed: HamiltonianState
    ) -> Float[Array, ""]:
        """Return log p(h | x′) − log p(h | x)."""
        here = trajectory.spare_noise[-1]
        start = self._log_width(trajectory.start.evaluation)
        end = self._log_width(proposed.evaluation)
        there = here + (start - end) / tuning.FUNNELS.spread
        return 0.5 * (here**2 - there**2)

    def _log_width(self, evaluation: Evaluation) -> Float[Array, ""]:
        """Return log s(x)."""
        score = in_force(self.metric).back(evaluation.score)
        mean_square = pytree.squared_norm(score) / pytree.size(score)
        return -0.5 * jnp.log(0.5 + 0.5 * mean_square)


class FunnelMoves(WarmUp):
    """Warm-up by `SelfTuning` where few chains carry the squared scores of a number, as
    in a funnel; elsewhere nothing.

    Example:
        >>> import composeprob as cp
        >>> from composeprob.samplers.funnels import FunnelMoves
        >>> cp.SMC(then=FunnelMoves()).finishers
        (FunnelMoves(),)
    """

    # The finisher before it took chains across modes.
    across: None = eqx.field(default=None, init=False)

    title = "into the neck of a funnel"
    fewest_rounds = tuning.FUNNELS.rounds
    by_scores = True

    @staticmethod
    def suits(density: AnnealedDensity) -> bool:
        """Return whether a density has an energy, or latents under scores, and real
        numbers alone, none of which a hierarchy's coordinates reach."""
        kinds = {site.kind for site in density.sites.values()}
        if "held" in kinds or discrete_sites(density):
            return False
        if "energy" in density.capabilities:
            return not has_dependents(density)
        return interweaves(density) and not has_members(density)

    def begins(self, scores: Callable[[], Points]) -> bool:
        found = scores()
        # As many as Stein's identity is asked of tell the tails.
        found = found[:: -(-len(found) // tuning.STEIN.chains)].astype(np.float64)
        n = len(found)
        if not (found.size and np.isfinite(found).all()):
            return False
        carried = carried_by(found, np.full(n, 1 / n))
        return bool(carried.min() < tuning.FUNNELS.carried * n)

    def fit(
        self, points: Points, density: AnnealedDensity, measured: np.ndarray | None
    ) -> Transitions:
        """Return `SelfTuning` whose units of length lie between the widths of the
        population and those that its scores imply, which are those of the neck."""
        assert measured is not None
        steepness = np.sqrt(np.mean(measured.astype(np.float64) ** 2, axis=0))
        implied = 1 / np.maximum(steepness, 1e-30)
        middle = np.sqrt(points.std(0, dtype=np.float64) * implied)
        log_ratio: LogRatio = "exact"
        if "energy" not in density.capabilities:
            log_ratio = bounded(len(points))
        kernel = SelfTuning(
            Adaptive(initial=0.3),
            tuning.WARM_UP.leapfrogs,
            damping=0.0,
            metric=squares(middle, density),
            log_ratio=log_ratio,
        )
        return Transitions.resolved(kernel, 1, density)

    def drift(self, trail: Trail, density: AnnealedDensity, supported: bool) -> float:
        """Return the change of a mean or a mean square during the latter half of the
        rounds, in standard deviations or variances; 0 where chance may have made it.

        A population creeps into a neck. So differences of single chains are asked, and
        of several rounds at once. What latents remember is asked by the warm-up before.
        """
        return significant_change(trail.halfway, trail.after, trail.ancestors)

    def entered(self, trail: Trail) -> float:
        r"""Return −log(1 − D) of the greatest distance D of the distributions of a
        number, by Kolmogorov and Smirnov, on arrival and at the end.

        Where a share m of the mass had no chain, the weights estimate the evidence of
        the rest, (1 − m)·Z, and the distributions are as far apart as m.
        """
        farthest = significant_distance(trail.start, trail.after)
        return -math.log1p(-min(farthest, 0.999))

    def least_evaluations(self, density: AnnealedDensity) -> int:
        return 0


def significant_distance(start: Points, end: Points) -> float:
    """Return the greatest distance of the distribution functions of a number; 0 where
    chance may have made it of independent chains.

    That few ancestors had many descendants is no chance: their evidence is as wrong as
    their shares are.
    """
    from scipy.stats import ks_2samp

    n, size = end.shape
    # Kolmogorov's limit of the tail, 2·exp(−2λ²).
    limit = math.sqrt(math.log(2 * size / tuning.FUNNELS.by_chance) / n)
    farthest = 0.0
    for number in range(size):
        apart = float(ks_2samp(start[:, number], end[:, number]).statistic)
        farthest = max(farthest, apart)
    if farthest <= limit:
        return 0.0
    return farthest


def significant_change(before: Points, after: Points, ancestors: np.ndarray) -> float:
    """Return the change of a mean, or of a mean square about it, that is least likely
    by chance, in standard deviations or variances; 0 where chance may have made it.

    Chains are compared with themselves; those of different ancestors are independent.
    """
    deviation = np.maximum(after.std(0, dtype=np.float64), 1e-30)
    new = (after - after.mean(0, dtype=np.float64)) / deviation
    old = (before - after.mean(0, dtype=np.float64)) / deviation
    changes = np.hstack([new - old, new**2 - old**2])
    if not np.isfinite(changes).all():
        return 0.0
    n = len(changes)
    means = changes.mean(0)
    centred = changes - means
    _, family = np.unique(ancestors, return_inverse=True)
    sizes = np.bincount(family) / n
    totals = np.zeros((len(sizes), changes.shape[1]))
    np.add.at(totals, family, centred / n)
    errors = np.sqrt((totals**2).sum(0))
    ratios = np.abs(means) / np.maximum(errors, 1e-30)
    free = 1 / np.sum(sizes**2) - 1
    chances = bounds_on_chance(ratios, centred, np.full(n, 1 / n), float(free))
    most = int(np.argmin(chances))
    if chances[most] >= tuning.FUNNELS.by_chance:
        return 0.0
    return float(abs(means[most]))
