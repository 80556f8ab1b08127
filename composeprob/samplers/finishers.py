"""What closes a run at level 0, passed as ``then=``: a warm-up at the target, and
global moves by fitted mixtures."""

from __future__ import annotations

import abc
import dataclasses
import math
import warnings
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.kernels import HMC, MALA, Adaptive, KernelState
from composeprob.kernels.line_integral import bounded
from composeprob.kernels.metropolis import log_density_ratio, log_uniform, metropolis
from composeprob.samplers.descent import at_target, moved_to
from composeprob.samplers.hierarchy import Interweaving, interweaves
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles, Transitions
from composeprob.samplers.random import Stream, normals, stream
from composeprob.samplers.run import Run


class Finisher(eqx.Module):
    """A kernel for chains at level 0 that adapts to their population: what samplers
    take as ``then=``.

    In each of at most ``rounds`` rounds `adapt` fits, on the host, what `move` takes;
    this is traced and runs on every device. After a round `drift` says whether another
    one follows. ``title`` is that of its progress bar.
    """

    title = "at level 0"
    rounds = 1

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        """What the density must offer, by the name of what needs it."""
        return {}

    def check(self, density: AnnealedDensity, num_chains: int) -> None:
        """Raises where it cannot be used with this density, or there are too few chains
        for it."""

    @abc.abstractmethod
    def adapt(
        self, points: np.ndarray, density: AnnealedDensity
    ) -> PyTree[Array] | None:
        """What is fitted to the population's points v, (N, D); None where nothing can
        be."""

    @abc.abstractmethod
    def move(
        self, run: Run, density: AnnealedDensity, fitted: PyTree[Array], number: Array
    ) -> Run:
        """The run whose chains have moved by what was fitted, in the round of this
        number; traced."""

    def drift(
        self, points: Sequence[np.ndarray], density: AnnealedDensity, weighed: bool
    ) -> float:
        """By how much a round moved a population, weighed on its way or not; 0 where
        chance may have done it. Its points, (N, D), are those from before the first
        round, before this one, and after it."""
        return 0.0

    @abc.abstractmethod
    def evaluations(self, fitted: PyTree[Array]) -> int:
        """That a round with what was fitted takes of each chain."""


class WarmUp(Finisher):
    """HMC on all sites at the target, MALA by scores, until the population stops
    drifting, for latents or fine data.

    A few transitions a level follow a density that changes little from one level to the
    next. Latents in a hierarchy need more: how wide they are has nothing to do with the
    noise, and a scale and what it scales hold each other back. Blocks of HMC in the
    metric of the population's variances follow until one changes neither means nor
    standard deviations.

    Example:
        >>> import composeprob as cp
        >>> cp.SMC(then=cp.WarmUp()).then
        (WarmUp(),)
    """

    rounds = tuning.WARM_UP.blocks

    def check(self, density: AnnealedDensity, num_chains: int) -> None:
        held = [name for name, site in density.sites.items() if site.kind == "held"]
        if held:
            raise CapabilityError(
                f"cp.WarmUp would move {', '.join(map(repr, held))}, which a factor's unknown normaliser depends on.",
                where=density.described.where,
                fix="leave it out.",
            )

    def adapt(self, points: np.ndarray, density: AnnealedDensity) -> Transitions:
        """HMC, or MALA by scores alone, whose inverse masses are the population's
        variances, in units of the noise at noised entries."""
        layout, deviation = Layout.of_density(density), points.std(0, dtype=np.float64)
        if interweaves(density):
            widths = jnp.asarray(deviation[layout.dims :], jnp.float32)
            return Transitions.resolved(
                Interweaving(log_ratio=bounded(len(points)), widths=widths), 1, density
            )
        noise = density.schedule.sigma[0] / density.schedule.alpha[0]
        units = np.where(np.arange(points.shape[1]) < layout.dims, noise, 1.0).astype(
            np.float32
        )
        # Its square is a number; chains that are all in one place, or have diverged,
        # give no scale.
        known = (deviation > 0) & (deviation < 1e18)
        mass = (np.where(known, deviation, units).astype(np.float32) / units) ** 2
        metric = layout.position(jnp.asarray(mass), 1.0)
        if "energy" not in density.capabilities:
            return Transitions.resolved(
                MALA(Adaptive(), log_ratio=bounded(len(points)), metric=metric),
                1,
                density,
            )
        # Full refreshment and jitter, so that no direction is missed.
        kernel = HMC(
            Adaptive(initial=0.3),
            num_leapfrog=tuning.WARM_UP.leapfrogs,
            damping=0.0,
            jitter=0.3,
            metric=metric,
        )
        return Transitions.resolved(kernel, 1, density)

    def move(
        self, run: Run, density: AnnealedDensity, fitted: Transitions, number: Array
    ) -> Run:
        def fresh(words: Array, particle: Particles) -> Particles:
            return fitted.start(words, particle.position, particle.evaluation)

        words = run.spread.map(
            lambda words: stream(stream(words, Stream.CLOSING), number), run.words
        )
        chains = run.spread.map(fresh, words, run.chains)
        begun = dataclasses.replace(
            run, chains=chains, tuning=fitted.untuned(len(run.ancestors))
        )
        end = fitted.settling + tuning.WARM_UP.transitions
        made, _ = at_target(begun, density, fitted, words, 0, end)
        # The kernel that came down goes on from there; its momenta, independent of
        # where the chains are, are as good.
        return moved_to(run, dataclasses.replace(made.chains, inner=run.chains.inner))

    def drift(
        self, points: Sequence[np.ndarray], density: AnnealedDensity, weighed: bool
    ) -> float:
        """The greatest change of a mean, in standard deviations, or of the logarithm of
        one; where rounds of `Interweaving` left a latent of most chains near where it
        began, and these do not weigh one another, their correlation if that is more."""
        start, before, after = points
        means, deviations = (
            [find(x, axis=0, dtype=float) for x in (before, after)]
            for find in (np.mean, np.std)
        )
        wide = np.maximum(np.maximum(*deviations), 1e-30)
        ratio = np.maximum(deviations[1], 1e-30) / np.maximum(deviations[0], 1e-30)
        changes = [np.abs(means[1] - means[0]) / wide, np.abs(np.log(ratio))]
        greatest = float(np.max(np.concatenate(changes), initial=0.0))
        drifts = (
            greatest
            if greatest > tuning.WARM_UP.drift + 4.0 * math.sqrt(2.0 / len(after))
            else 0.0
        )
        if weighed or not interweaves(density):
            return drifts
        # A population that hardly moves does not drift either: it has to have forgotten
        # where it was.
        latents = Layout.of_density(density).dims
        apart = [(x - x.mean(0, dtype=float))[:, latents:] for x in (start, after)]
        sizes = np.maximum(np.std(apart[0], axis=0) * np.std(apart[1], axis=0), 1e-30)
        kept = float(np.max(np.mean(apart[0] * apart[1], axis=0) / sizes))
        return max(
            drifts,
            kept if kept > tuning.WARM_UP.memory + 2 / math.sqrt(len(after)) else 0.0,
        )

    def evaluations(self, fitted: Transitions) -> int:
        return (
            tuning.WARM_UP.settling + tuning.WARM_UP.transitions
        ) * fitted.kernel.evaluations_per_step


class GlobalMoves(Finisher):
    r"""Proposals from anywhere, under which modes get their shares whatever the chains
    did before.

    Chains are split in two halves. A Gaussian mixture q is fitted to each, and is what
    the other half's proposals are drawn from, whatever a chain's own position is:

    $$x' \sim q, \qquad a = \min\Big(1, \frac{\pi(x')\,q(x)}{\pi(x)\,q(x')}\Big).$$

    Where positions have few numbers (up to about 20) 20 of them make chains independent
    of one another, however few ancestors they had. For log-densities that can be
    compared between modes: analytic or calibrated factors.

    Args:
        number: proposals to each chain, one evaluation each.

    Raises:
        InvalidValueError: no whole number ≥ 1.

    References:
        Tierney (1994), *Markov chains for exploring posterior distributions*, for
        independence chains; South, Pettitt and Drovandi (2019), *Sequential Monte Carlo
        samplers with independent Markov chain Monte Carlo proposals*.

    Example:
        >>> import composeprob as cp
        >>> cp.GlobalMoves(20)
        GlobalMoves(20)
    """

    number: int = eqx.field(default=20, static=True)

    title = "global moves"

    def __check_init__(self) -> None:
        check_count(self.number, "GlobalMoves(number=)")

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        return {"GlobalMoves": frozenset({"energy", "mode_depth"})}

    def check(self, density: AnnealedDensity, num_chains: int) -> None:
        size = Layout.of_density(density).size
        if num_chains < fewest_chains(size):
            raise InvalidValueError(
                f"cp.GlobalMoves fits a Gaussian mixture to each half of the chains, and {num_chains} are too few for "
                f"positions of {size} number{'s' * (size != 1)}.",
                fix=f"use {fewest_chains(size)} chains or more, or leave it out.",
            )

    def __repr__(self) -> str:
        return f"GlobalMoves({self.number})"

    def adapt(
        self, points: np.ndarray, density: AnnealedDensity
    ) -> GaussianMixture | None:
        """The mixtures that each half's proposals are drawn from, which are fitted to
        the other half."""
        halves = finite(points[: len(points) // 2]), finite(points[len(points) // 2 :])
        if min(map(len, halves)) < tuning.MIXTURE.fewest_points:
            return None  # the status says why
        return GaussianMixture.beside(
            GaussianMixture.fitted(*halves[::-1]), GaussianMixture.fitted(*halves)
        )

    def move(
        self, run: Run, density: AnnealedDensity, fitted: GaussianMixture, number: Array
    ) -> Run:
        spread, layout, size = (
            run.spread,
            Layout.of_density(density),
            run.chains.position.shape[1],
        )
        halves = (spread.numbers(run.words) >= len(run.ancestors) // 2).astype(
            jnp.int32
        )
        Carry = tuple[KernelState, Array, Array, Array]

        def chain(
            words: Array, v: Array, found: Evaluation, half: Array
        ) -> tuple[Array, Evaluation, Array]:
            words = stream(words, Stream.CLOSING)

            def log_q(v: Array) -> Array:
                return jax.vmap(lambda fit: fit.log_prob(v))(fitted)[half]

            def propose(i: Array, carry: Carry) -> Carry:
                state, log_q_here, total, moved = carry
                noise = normals(words, i, size + 2, v.dtype)
                there = jax.vmap(lambda fit: fit.draw(noise[:-1]))(fitted)[half].astype(
                    v.dtype
                )
                proposed = KernelState(
                    there, layout.evaluate(density, there, 0, terms=False)
                )
                log_q_there = log_q(there)
                ratio = log_density_ratio(proposed, state) + log_q_here - log_q_there
                state, info = metropolis(log_uniform(noise[-1]), ratio, proposed, state)
                log_q_here = jnp.where(info.accepted, log_q_there, log_q_here)
                return state, log_q_here, total + info.acceptance, moved | info.accepted

            start = (
                KernelState(v, found.without_terms),
                log_q(v),
                jnp.zeros(()),
                jnp.asarray(False),
            )
            state, _, total, moved = jax.lax.fori_loop(0, self.number, propose, start)
            return (
                state.position,
                state.evaluation,
                jnp.stack([moved, total / self.number]),
            )

        points, found, facts = spread.map(
            chain, run.words, run.chains.position, run.chains.evaluation, halves
        )

        def genealogy(facts: Array, ancestors: Array) -> tuple[Array, Array]:
            moved, acceptance = facts.T
            enough = jnp.mean(moved) >= 1 - tuning.GLOBAL_MOVES.most_stuck
            return jnp.where(
                enough, renewed(ancestors, moved > 0), ancestors
            ), jnp.mean(acceptance)

        moved = Particles(points, found, run.chains.inner)
        ancestors, mean = spread.on_population(
            genealogy, spread.gather(facts), run.ancestors
        )
        return dataclasses.replace(
            moved_to(run, moved), ancestors=ancestors, global_acceptance=mean
        )

    def evaluations(self, fitted: GaussianMixture) -> int:
        return self.number


class GaussianMixture(eqx.Module):
    """q(y) = Σ_j w_j·N(y; m_j, L_j·L_jᵀ) over flattened positions of d numbers."""

    log_weights: Array  # log w_j, (J,); −∞ of components that only fill up
    means: Array  # m_j, (J, d)
    roots: Array  # L_j, (J, d, d)
    inverses: Array  # L_j⁻¹

    def draw(self, noise: Array) -> Array:
        """The draw that d + 1 independent normal numbers make, (d,): the first says
        which component."""
        below = jnp.cumsum(jnp.exp(self.log_weights))
        j = jnp.minimum(
            jnp.sum(jax.scipy.special.ndtr(noise[0]) > below), len(below) - 1
        )
        return self.means[j] + self.roots[j] @ noise[1:]

    def log_prob(self, row: Array) -> Array:
        """log q at one row (d,)."""
        z = jnp.einsum("jab,jb->ja", self.inverses, row - self.means)
        heights = self.log_weights + jnp.sum(
            jnp.log(jnp.diagonal(self.inverses, axis1=1, axis2=2)), axis=1
        )
        return jax.nn.logsumexp(heights - 0.5 * jnp.sum(z**2, axis=1)) - 0.5 * len(
            row
        ) * jnp.log(2 * jnp.pi)

    @classmethod
    def fitted(cls, points: np.ndarray, others: np.ndarray) -> GaussianMixture:
        """The mixture that maximises the likelihood of points, (M, d), by the EM
        algorithm (Dempster, Laird and Rubin 1977), of as many components as give others
        of the same distribution, (M', d), the highest likelihood."""
        from sklearn.mixture import (
            GaussianMixture as Fit,
        )  # takes a second to import, and most runs never fit one

        points, others = _some(points), _some(others)
        center, width = points.mean(0), points.std(0)
        width = np.where(width > 0, width, 1.0)
        best, highest, worse, single = None, -np.inf, 0, np.zeros(0)
        for count in tuning.MIXTURE.components:
            if worse == tuning.MIXTURE.patience or (
                count > 1 and count * (points.shape[1] + 1) > len(points)
            ):
                break
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # a fit that has not converged, or of few distinct points, will do
                found = Fit(count, random_state=0).fit((points - center) / width)
            log_densities = found.score_samples((others - center) / width)
            single = log_densities if count == 1 else single
            mean = np.mean(np.maximum(log_densities, single - tuning.MIXTURE.most_lost))
            worse += 1
            if best is None or mean > highest:
                best, highest, worse = found, mean, 0
        assert best is not None
        roots = width[:, None] * np.linalg.cholesky(best.covariances_)
        arrays = (
            np.log(best.weights_),
            center + width * best.means_,
            roots,
            np.linalg.inv(roots),
        )
        return cls(*(jnp.asarray(each, jnp.result_type(float)) for each in arrays))

    @classmethod
    def beside(cls, *mixtures: GaussianMixture) -> GaussianMixture:
        """Several mixtures as one, whose arrays have an axis for them in front; filled
        up with components of no weight to 8, or the most that are tried, so that two
        numbers of them are all that is compiled."""
        most = max(len(mixture.means) for mixture in mixtures)
        room = 8 if most <= 8 else tuning.MIXTURE.components[-1]

        def filled(array: Array) -> np.ndarray:
            more = np.repeat(np.asarray(array)[:1], room - len(array), axis=0)
            return np.concatenate(
                [array, more if array.ndim > 1 else np.full_like(more, -np.inf)]
            )

        return jax.tree.map(
            lambda *arrays: jnp.stack([jnp.asarray(filled(a)) for a in arrays]),
            *mixtures,
        )


def finite(points: np.ndarray) -> np.ndarray:
    """The rows that are numbers throughout, as their squares are."""
    with np.errstate(over="ignore"):
        return points[np.isfinite(np.square(points, dtype=np.float64)).all(1)]


def _some(points: np.ndarray) -> np.ndarray:
    """At most `tuning.MIXTURE.most_points` of the rows, in double precision."""
    chosen = np.linspace(
        0, len(points) - 1, min(len(points), tuning.MIXTURE.most_points)
    ).astype(int)
    return points[chosen].astype(np.float64)


def closings(then: object) -> tuple[Finisher, ...]:
    """What was passed as ``then=``, as a tuple."""
    found = then if isinstance(then, (tuple, list)) else (then,)
    for each in found:
        if not isinstance(each, Finisher):
            shown = (
                f"the class {each.__name__}" if isinstance(each, type) else repr(each)
            )
            raise WrongTypeError(
                f"then= takes what closes a run at level 0; got {shown}.",
                fix="pass cp.WarmUp(), cp.GlobalMoves(20), or both in a tuple.",
            )
    return tuple(found)


def fewest_chains(size: int) -> int:
    """Chains from which on mixtures over so many numbers are fitted to each half of
    them."""
    return 2 * tuning.MIXTURE.points_per_number * size


def renewed(ancestors: Array, moved: Array) -> Array:
    """Whom chains descend from, (N,) of 0 … N − 1, after those that moved have become
    their own ancestors. Descendants of others are named after the first of them that is
    left, a number that none of those has."""
    numbers = jnp.arange(len(ancestors), dtype=ancestors.dtype)
    names = (
        jnp.full_like(ancestors, len(ancestors))
        .at[ancestors]
        .min(jnp.where(moved, len(ancestors), numbers))
    )
    return jnp.where(moved, numbers, names[ancestors])
