"""The sampler: N chains go down the levels by steps, weights, resampling and moves.

`SMC`, `AnnealedMCMC` and `Ancestral` are choices of these parts.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, UInt32

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.kernels import MALA, Adaptive, Gibbs, Kernel
from composeprob.kernels.gibbs import parts_of, replaced
from composeprob.kernels.kernel import as_kernel
from composeprob.kernels.step_size import as_scalar, check_range
from composeprob.pytree import where
from composeprob.samplers.descent import Descent, Phases, at_target, moved_to
from composeprob.samplers.discrete import with_discrete
from composeprob.samplers.finishers import Finisher, as_finishers
from composeprob.samplers.hierarchy import StandardCoordinates, has_dependents
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles, Transitions, by_kind
from composeprob.samplers.random import Stream, key_of, normals, stream
from composeprob.samplers.resampling import Resample, Resampler
from composeprob.samplers.run import Pace, Run, Visits
from composeprob.samplers.step import ReverseStep
from composeprob.samplers.weights import Weights, as_weights


class DrawCost(NamedTuple):
    """Costs of one transition of `Sampler.draw`."""

    evaluations: int  # of the composed density, for one chain
    proposals: int  # moves that can turn out non-finite
    settling: int  # transitions that are made before the first draw


class Sampler(eqx.Module):
    """Method by which chains go from the noisiest level to level 0: what `infer` takes
    as ``sampler=``.

    Hyper-parameters only; numbers are leaves, so other numbers reuse compiled code.

    Attributes:
        kernel: moves chains at a level; None for no moves.
        steps_per_level: transitions at each level.
        step: leads chains from a level to the next; None where they stay.
        weights: rule for the importance weights of chains: `FeynmanKac` from scores and
            the compiler's rate, `DensityRatio` from π_{k−1}/π_k, or another one; None
            for chains without weights.
        exchange: rule by which chains exchange places: a `Resampler` of `SMC`, a swap
            of `ReplicaExchange`.
        finishers: post-processing moves at level 0, the argument ``then=``.
        check_levels: whether the run is repeated over every other level, which tells
            the discretisation error of Feynman–Kac weights.
        moves: the transitions, once `prepare` has resolved them.
    """

    kernel: Kernel | None = None
    steps_per_level: int = eqx.field(default=0, static=True)
    step: ReverseStep | None = None
    weights: Weights | None = None
    exchange: Resampler | None = None
    finishers: tuple[Finisher, ...] = ()
    check_levels: bool = eqx.field(default=False, static=True)
    # Nothing reads it before `prepare`, or where there is no kernel.
    moves: Transitions = None  # type: ignore[assignment]

    descent: ClassVar[type[Descent]] = Descent
    # Whether a default run with too few ancestors gives way to another sampler.
    may_be_replaced: ClassVar[bool] = True

    # Requirements and properties

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        """Capabilities that the density must have, by the part that needs them:
        ``{"HMC": {"energy", "score"}}``."""
        needed: dict[str, frozenset[str]] = {}
        if self.weights is not None:
            needed[f"SMC(weights={self.weights.argument})"] = self.weights.requires
        elif self.kernel is None:
            needed[type(self).__name__] = frozenset({"score"})
        for finisher in self.finishers:
            needed |= finisher.requires
        for part in parts_of(self.kernel):
            name = type(part).__name__
            needed[name] = needed.get(name, frozenset()) | part.requires
        return needed

    @property
    def adjusted(self) -> tuple[bool, ...]:
        """True for each block of the kernel that has a Metropolis test, so that its
        acceptance means something."""
        parts = parts_of(self.kernel)
        return tuple(part.optimal_acceptance is not None for part in parts) or (False,)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the kernel's blocks, where it has any, such as ``("x", "mu,
        sigma")``."""
        if not isinstance(self.kernel, Gibbs):
            return ()
        return self.kernel.labels

    @property
    def can_draw(self) -> bool:
        """True if the sampler can go on at level 0, for draws."""
        return self.moves is not None

    @property
    def stays(self) -> bool:
        """True if its own kernel makes the first transitions of a finisher."""
        return any(finisher.stay for finisher in self.finishers)

    @property
    def check_order(self) -> int | None:
        """Order p at which the error of `Run.log_evidence` vanishes with the distance
        of levels, where that error is to be estimated; else None."""
        if self.step is None or not self.check_levels:
            return None
        return self.step.order

    def estimates_evidence(self, density: AnnealedDensity) -> bool:
        """Return whether `Run.log_evidence` estimates log ∫π_0."""
        return self.weights is not None and self.weights.estimates_evidence(density)

    def needs_terms(self, density: AnnealedDensity) -> bool:
        """Return whether evaluations must have their density terms: for weights, and
        for path weights of chains without weights."""
        if self.weights is not None:
            return True
        noised = any(site.kind == "noised" for site in density.sites.values())
        has_rate = "feynman_kac" in density.capabilities
        return self.step is not None and noised and has_rate

    def suited(self, density: AnnealedDensity) -> AnnealedDensity:
        """Return the density that this sampler's levels follow: with constant exponents
        where they could grow only if chains carried a factor's log-density, and this
        sampler's chains do not."""
        by_rate = self.weights is not None and self.weights.by_rate
        if by_rate and all(part.carries for part in parts_of(self.kernel)):
            return density
        return density.untracked()

    def in_numbers(self) -> Self:
        """Return the prepared sampler with step sizes as numbers in place of their
        rules.

        A rule is a function, part of what is compiled. A notebook's cell that runs once
        more defines it anew, and everything would be compiled again.
        """
        if self.moves is None:
            return self
        return replaced(self, kernel=self.moves.kernel)

    def prepare(self, density: AnnealedDensity) -> Sampler:
        """Return the sampler for one density, with step sizes per level and all
        defaults resolved.

        Refused if it cannot be used with this density.
        """
        if self.kernel is not None:
            kernel = with_discrete(self.kernel, density)
            moves = Transitions.resolved(kernel, self.steps_per_level, density)
            return replaced(self, kernel=kernel, moves=moves)
        name = type(self).__name__
        moving = [each for each in self.finishers if each.needs_kernel]
        if moving:
            raise CapabilityError(
                f"then={moving[0]!r} moves chains at level 0, but {name} has "
                "no kernel here.",
                where=density.described.where,
                fix="pass a kernel, or leave then out.",
            )
        static = []
        for name_of_site, site in density.sites.items():
            if site.kind in ("static", "discrete"):
                static.append(name_of_site)
        if static:
            raise CapabilityError(
                f"{name} without a kernel leaves NumPyro's latents where their priors "
                f"put them: {', '.join(map(repr, static))}.",
                where=density.described.where,
                fix="use cp.SMC or cp.AnnealedMCMC with a kernel, such as "
                "cp.UHMC(step_size=…) for score-only factors.",
            )
        return self

    def with_moves(self, kernel: Kernel, steps_per_level: int) -> Self:
        """Return the sampler, not yet prepared, with other transitions."""
        return replaced(
            self, kernel=kernel, steps_per_level=steps_per_level, moves=None
        )

    # Costs

    def first_level(self, density: AnnealedDensity) -> int:
        """Return the level where chains start: the noisiest, or a few below it.

        The first levels of a cosine schedule carry no signal but are far from one
        another. A step between them would only spoil weights, so weighted chains start
        below them.
        """
        level = density.num_levels - 1
        if self.weights is None:
            return level
        log_snr = density.schedule.log_snr
        while (
            level > 0
            and log_snr[level - 1] < tuning.START.little_signal
            and log_snr[level - 1] - log_snr[level] > tuning.START.far_apart
        ):
            level -= 1
        return level

    def evaluations(self, completed: int) -> int:
        """Return the evaluations of the composed density, per chain, in ``completed``
        levels."""
        descents = max(completed - 1, 0)
        if self.weights is None and self.moves is None:
            return descents
        at_start = 0
        at_level = 1
        if self.moves is not None:
            at_level += self.moves.total * self.moves.kernel.evaluations_per_step
            if self.weights is None and not self.moves.layout.dims:
                at_start = tuning.START.draws  # see `likely_start`
        # A step of second order is corrected by the score where it ends.
        corrected = self.step is not None and self.step.order == 2
        return at_start + completed * at_level + descents * corrected

    def proposals(self) -> int:
        """Return the number of moves of one chain at one level that can turn out
        non-finite: transitions, adapting ones included, and the reverse step."""
        stepped = self.weights is not None or self.step is not None
        if self.moves is None:
            return int(stepped)
        return stepped + self.moves.total * len(self.moves.blocks)

    @property
    def drawing(self) -> DrawCost:
        """Costs of one transition of `draw`."""
        return DrawCost(
            evaluations=self.moves.kernel.evaluations_per_step,
            proposals=len(self.moves.blocks),
            settling=self.moves.settling,
        )

    def visits(self, density: AnnealedDensity, pace: Pace | None) -> Visits:
        """Return the levels to visit: all from the first on, or those that a `Pace`
        chooses."""
        first = self.first_level(density)
        if pace is None:
            return Visits.every(first, density.num_levels)
        return Visits.given([first], density.num_levels, pace)

    # The run

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        """Fill in the chains' states, and first weights, at the first level, before any
        transition there."""
        layout = Layout.of_density(density)
        spread = run.spread
        blank = layout.unevaluated(density, self.needs_terms(density))
        if layout.dims or self.weights is not None:
            initial = partial(initial_point, layout, density, level)
            points = spread.map(initial, run.words)
        else:
            least = least_widths(layout, density, level)
            likely = partial(likely_start, layout, density, level, least)
            points, path_weights = spread.map(likely, run.words)
            run = dataclasses.replace(run, path_weights=path_weights)
        particle = partial(self.initial_particle, blank)
        run = dataclasses.replace(run, chains=spread.map(particle, run.words, points))
        if self.moves is not None:
            num_levels = len(run.records.ess)
            records = type(run.records).empty(num_levels, len(self.moves.blocks))
            untuned = self.moves.untuned(len(run.ancestors))
            run = dataclasses.replace(run, tuning=untuned, records=records)
        if self.weights is not None:
            log_evidence = self.weights.first_evidence(density, level)
            run = dataclasses.replace(run, log_evidence=log_evidence)
        return run

    def initial_particle(
        self, blank: Evaluation, words: UInt32[Array, " 2"], v: Float[Array, " size"]
    ) -> Particles:
        """Return one chain at v, not evaluated yet."""
        if self.moves is None:
            return Particles(v, blank)
        return self.moves.start(words, v, blank)

    def phases(self, density: AnnealedDensity, run: Run) -> Phases:
        """Return the phases of a level, while they are traced."""
        return self.descent(
            density,
            run,
            self.moves,
            self.step,
            self.weights,
            self.exchange,
            self.needs_terms(density),
            stays=self.stays,
        )

    def advance(
        self,
        run: Run,
        density: AnnealedDensity,
        end: Array | int,
        stay: Array | int = 0,
    ) -> Run:
        """Visit levels until ``end`` visits are made, or level 0 is reached; traced
        once for all levels.

        At level 0, chains of a sampler that `stays` make ``stay`` more transitions.
        """
        phases: Any = self.phases(density, run)
        begun = phases.blank(run)
        if self.stays:
            begun = phases.staying(begun, stay)

        def unfinished(carry: tuple[Run, Any]) -> Array:
            run, state = carry
            unvisited = run.visits.before(end)
            if not self.stays:
                return unvisited
            return unvisited | (state.stay > 0)

        run, _ = jax.lax.while_loop(unfinished, phases.phase, (run, begun))
        return run

    def draw(self, run: Run, density: AnnealedDensity, i: Array, thin: Array) -> Run:
        """Make the ``thin`` transitions at level 0 that lead to draw i; before the
        first draw also those in which step sizes settle."""
        moves = self.moves
        words = run.spread.map(lambda words: stream(words, Stream.DRAWS), run.words)
        first = jnp.where(i == 0, 0, moves.settling + i * thin)
        end = moves.settling + (i + 1) * thin
        made, tally = at_target(run, density, moves, words, first, end)
        acceptance, error, bad = tally.means(
            run.spread, moves, thin, len(run.ancestors)
        )

        # The records of level 0 are means over all transitions there, of which those of
        # this draw are a share.
        records = run.records
        share = thin / (moves.count + (i + 1) * thin)
        old = (1 - share) * records.acceptance[0]
        new = share * acceptance
        # Errors are means over accepted moves: where none is, there is no error.
        old_error = jnp.where(old > 0, old * records.quadrature_error[0], 0.0)
        new_error = jnp.where(new > 0, new * error, 0.0)
        old_step = (1 - share) * records.step_size[0]
        level = jnp.int32(0)
        records = records.counting(level, bad).at(
            level,
            acceptance=old + new,
            quadrature_error=(old_error + new_error) / (old + new),
            step_size=old_step + share * tally.steps / thin,
        )
        moved = moved_to(run, made.chains)
        return dataclasses.replace(moved, tuning=made.tuning, records=records)

    def positions(self, run: Run, density: AnnealedDensity) -> Position:
        """Return the chains' positions, each leaf of shape (N, …)."""
        alpha = density.schedule.at(run.visits.level).alpha
        return Layout.of_density(density).position(run.chains.position, alpha)

    def log_densities(self, run: Run) -> Float[Array, " chains"] | None:
        """Return log π of each chain where it is, as last evaluated; None where it is
        unknown."""
        if self.moves is None and self.weights is None:
            return None
        return run.chains.evaluation.log_density

    def scores(self, run: Run) -> Float[Array, "chains size"] | None:
        """Return ∇log π of each chain's vector, as last evaluated; None where it is
        unknown."""
        if self.moves is None and self.weights is None:
            return None
        score: Array = run.chains.evaluation.score
        return score

    def round_trips(self, run: Run) -> float | None:
        """Return how many replicas of a chain came from the noisiest level to level 0
        in its draws; None without replicas."""
        return None

    @abc.abstractmethod
    def describe(self) -> str:
        """Return one line: the sampler and its settings."""

    def __repr__(self) -> str:
        return self.describe()


class SMC(Sampler):
    r"""Sequential Monte Carlo: a population of chains, weighted from level to level so
    that modes keep their shares.

    From level k + 1 to k, with F the part of π made of diffusion factors and G the rest
    (observations, user energies, classifiers):

    * ``weights="feynman_kac"``: a reverse step, and log w += ∫(r + ∇·u + ⟨u, S⟩) dτ +
      log G_k(x') − log G_{k+1}(x) + log p(x') − log q(x'). Here S = ∇log F, r is the
      Feynman–Kac rate that the compiler derives from the leaves' scores, τ the variance
      that a step takes away, u the control, p the law of the step along S + u, and q
      the law of the step that is made, which is twisted towards ∇log G. These weights
      need scores of F only, so they are right for learned factors. Tempered
      observations and user energies are averaged in G_{k+1}, over 8 points that noise
      leads back to from x', so that walls, where they are 0, lose no mass. That takes 8
      evaluations of these functions a level, and none of a network of F;
    * ``weights="density"``: no step, and log w += log π_k(x) − log π_{k+1}(x). These
      weights trust log-densities *between* modes, which energies learned by score
      matching do not know: use them for analytic or calibrated factors only.

    Then the chains are resampled where the relative effective sample size is below the
    threshold, and make ``steps_per_level`` transitions of the kernel, which leave π_k
    invariant. The last level always resamples, so that samples have equal weights.

    Where weights differ much, many chains become copies of few: ``result.ancestors``
    says how many of the first chains have descendants; ``result.effective_chains`` and
    every standard error follow from that. `infer` takes independent chains
    (`AnnealedMCMC`) where there are fewer than 32, or than 256 where log-densities can
    be compared between modes.

    Args:
        kernel: any kernel, or ``cp.Renoise()``; left out, ``MALA(Adaptive(),
            metric="auto")`` where the density has an energy, else no transitions. A
            program with latents has one for the noised sites and another for the
            latents, in turn, as a `Gibbs`.
        steps_per_level: transitions at each level.
        weights: ``"feynman_kac"`` for `FeynmanKac`, ``"density"`` for `DensityRatio`,
            or other `Weights`.
        resample: a threshold in (0, 1] for ``cp.Resample(threshold)``, resampling where
            ESS/N falls below it; or another `Resampler`.
        step: reverse step from level to level, a `ReverseStep`; density weights make
            none.
        then: post-processing moves at level 0: `WarmUp`, `GlobalMoves`, or several in a
            tuple.
        check_levels: whether Feynman–Kac weights are computed once more over every
            other level, for half the evaluations, to estimate the discretisation error
            of the log-evidence.

    Result:
        ``result.log_evidence`` estimates log ∫π_0, with diffusion factors counted as
        normalised. Under Feynman–Kac weights it has a discretisation error, which
        vanishes as the square of the levels' distance, or in proportion to it for a
        step of first order; ``result.log_evidence_error`` includes it.

    References:
        Skreta et al. 2025, *Feynman–Kac Correctors in Diffusion* (arXiv 2503.02819).
        Del Moral, Doucet and Jasra 2006, *Sequential Monte Carlo samplers*, for the
        density weights.
    """

    def __init__(
        self,
        kernel: Kernel | Finisher | None = None,
        steps_per_level: int = 1,
        weights: str | Weights = "feynman_kac",
        resample: float | Resampler = 0.5,
        step: ReverseStep | None = None,
        then: Finisher | tuple[Finisher, ...] = (),
        check_levels: bool = True,
    ):
        moved_by = check_kernel(kernel, steps_per_level, optional=True)
        rule = as_weights(weights)
        if step is not None and not isinstance(step, ReverseStep):
            raise WrongTypeError(
                f"step must be a cp.ReverseStep; got {step!r}.",
                fix="pass one, or leave step out.",
            )
        super().__init__(
            moved_by,
            int(steps_per_level),
            reverse_step_of(rule, step),
            rule,
            as_resampler(resample),
            as_finishers(then),
            check_levels=bool(check_levels) and rule.by_rate,
        )

    def prepare(self, density: AnnealedDensity) -> Sampler:
        if self.kernel is None and "energy" in density.capabilities:
            kernel = by_kind(lambda: MALA(Adaptive(), metric="auto"), density)
            return self.with_moves(kernel, self.steps_per_level).prepare(density)
        return super().prepare(density)

    def describe(self) -> str:
        settings = ["no kernel"]
        if self.kernel is not None:
            settings = [f"{self.kernel!r}", f"{self.steps_per_level} steps a level"]
        if self.weights is not None:
            settings.append(f"weights={self.weights.argument}")
        settings.append(f"resample={self._resample}")
        if self.step is not None and repr(self.step) != "ReverseStep()":
            settings.append(f"step={self.step!r}")
        settings += [f"then {finisher!r}" for finisher in self.finishers]
        return f"SMC({', '.join(settings)})"

    @property
    def _resample(self) -> str:
        """The argument ``resample`` as text: the threshold of `Resample` itself, else
        the repr of the rule."""
        if type(self.exchange) is Resample:
            return f"{float(self.exchange.threshold):.3g}"
        return repr(self.exchange)


class AnnealedMCMC(Sampler):
    """Independent chains that make ``steps_per_level`` transitions of a kernel at every
    level, K − 1 to 0.

    Cost: one evaluation a level to refresh what the kernel caches, and the kernel's own
    for each transition. Chains cannot cross between modes once these have parted: the
    share of each mode is frozen at the level where that happens, whatever the number of
    chains. `SMC` corrects it. With a reverse step the status says so
    (``shares_frozen``) where the Feynman–Kac weights of the chains' paths tell.

    In a program without noised sites nothing leads from the prior to the data in small
    steps: there each chain starts at one of 16 draws of the prior, chosen by their
    likelihood, for 16 evaluations more.

    Args:
        kernel: a kernel such as ``cp.HMC(0.03, num_leapfrog=3)``, or ``cp.Renoise()``.
        steps_per_level: transitions at each level, ≥ 1; 10 unless given.
        reverse_step: whether a step of the reverse process takes the chains from each
            level to the next, as a better start for the kernel. True means
            ``cp.ReverseStep(control="none")``, the step of second order that default
            runs take, for one evaluation more a level;
            ``cp.ReverseStep(order=1, control="none")`` saves that evaluation.
            Observations and user energies shift a step by at most half the length of
            its noise, so that a sharp one does not throw chains far off.
        then: post-processing moves at level 0: `WarmUp`, `GlobalMoves`, or several in a
            tuple.

    Raises:
        WrongTypeError: ``reverse_step`` is neither a boolean nor a `ReverseStep`.
        InvalidValueError: a step with a control, which only weights could take into
            account.

    References:
        Du et al. 2023, Algorithm 1. Song and Ermon 2019 for annealed Langevin dynamics.

    Example:
        >>> import composeprob as cp
        >>> cp.AnnealedMCMC(cp.MALA(0.03), steps_per_level=10).describe()
        'AnnealedMCMC(MALA(step_size=0.03), 10 steps a level)'
    """

    def __init__(
        self,
        kernel: Kernel | Finisher,
        steps_per_level: int = 10,
        reverse_step: bool | ReverseStep = False,
        then: Finisher | tuple[Finisher, ...] = (),
    ):
        moved_by = check_kernel(kernel, steps_per_level)
        if not isinstance(reverse_step, (bool, ReverseStep)):
            raise WrongTypeError(
                "reverse_step must be True, False or a cp.ReverseStep; got "
                f"{reverse_step!r}.",
                fix="write True.",
            )
        step: ReverseStep | None = None
        if isinstance(reverse_step, ReverseStep):
            step = reverse_step
        elif reverse_step:
            step = ReverseStep(control="none")
        if step is not None and step.control != "none":
            raise InvalidValueError(
                f"The reverse step of AnnealedMCMC has control={step.control!r}, which "
                "only weights could correct.",
                fix='write cp.ReverseStep(control="none"), or use cp.SMC.',
            )
        finishers = as_finishers(then)
        super().__init__(moved_by, int(steps_per_level), step, finishers=finishers)

    def describe(self) -> str:
        settings = [f"{self.kernel!r}", f"{self.steps_per_level} steps a level"]
        if self.step is not None and self.step.order == 2:
            settings.append("reverse step of second order between levels")
        elif self.step is not None:
            settings.append("reverse step between levels")
        settings += [f"then {finisher!r}" for finisher in self.finishers]
        return f"AnnealedMCMC({', '.join(settings)})"


class Ancestral(Sampler):
    """Reverse diffusion of the composed score: K − 1 evaluations, and the wrong law for
    products.

    The score of the noised product is not the sum of the noised scores, so this samples
    something else than the program's density. It is the baseline that the other
    samplers correct (Du et al. 2023, section 3). Of any program its samples are too
    narrow where levels are far apart: they have .85 of the variance of a Gaussian on 60
    levels, and .98 on 600. `Trust.narrowing` states what is lost.

    Args:
        eta: η in [0, 1]; 1 is DDPM's ancestral sampling, 0 deterministic DDIM.

    Raises:
        InvalidValueError: η outside [0, 1].

    References:
        Ho et al. 2020, *Denoising Diffusion Probabilistic Models*; Song, Meng and Ermon
        2021 (DDIM).
    """

    def __init__(self, eta: Array | float = 1.0):
        value = as_scalar(eta, "Ancestral(eta=)")
        check_range(
            value,
            "Ancestral(eta=)",
            1.0 + 1e-6,
            closed=True,
            fix="a number in [0, 1]: 1 is DDPM, 0 is DDIM",
        )
        step = ReverseStep(order=1, control="none", twist=None, eta=value)
        super().__init__(step=step)

    def describe(self) -> str:
        assert self.step is not None
        return f"Ancestral(eta={float(self.step.eta):.3g})"


def initial_point(
    layout: Layout, density: AnnealedDensity, level: int, words: UInt32[Array, " 2"]
) -> Float[Array, " size"]:
    """Draw N(0, s/P) at noised entries and from the prior at static ones."""
    variance = density.schedule.at(level).variance / layout.power(density, level)
    y = jnp.sqrt(variance) * normals(words, Stream.INITIAL, layout.dims)
    if layout.size == layout.dims:
        return y
    v = jnp.concatenate([y, jnp.zeros((layout.size - layout.dims,))])
    # Priors of latents that depend on a noised site see it as x/α.
    xs = {name: layout.position(v, 1.0)[name] for name, _ in layout.noised}
    latents = density.evaluator.draw_static(key_of(words, Stream.STATIC), xs)
    return layout.vector({**xs, **latents}, 1.0)


class _PriorDraw(NamedTuple):
    """A draw of the prior that takes part in the choice of a start.

    Attributes:
        point: the vector v.
        perturbed: log L·h plus a Gumbel number, of which the largest is chosen.
        log_h: log h.
    """

    point: Float[Array, " size"]
    perturbed: Float[Array, ""]
    log_h: Float[Array, ""]


def least_widths(
    layout: Layout, density: AnnealedDensity, level: int
) -> dict[str, Array]:
    """Return the scales of members that chains start above, where they are latents: a
    thousandth of the prior's median; empty where there are none."""
    if not has_dependents(density):
        return {}

    coordinates = StandardCoordinates(density, layout)

    def scales(key: Array) -> dict[str, Array]:
        return coordinates.scales(density.initial(key, level))

    drawn = jax.vmap(scales)(jax.random.split(jax.random.key(0), tuning.START.widths))
    medians = jax.tree.map(lambda each: jnp.median(each, axis=0), drawn)
    return jax.tree.map(lambda each: tuning.START.narrow * each, medians)


def likely_start(
    layout: Layout,
    density: AnnealedDensity,
    level: int,
    least: dict[str, Array],
    words: UInt32[Array, " 2"],
) -> tuple[Float[Array, " size"], Float[Array, ""]]:
    """Choose one of `tuning.START.draws` draws of the prior, with probabilities in
    proportion to their likelihood L.

    A chain that starts far out in a heavy tail would stay there, as the step size that
    suits the others is too long for it. So would one that starts where a scale is near
    0: members all at their location are often likelier than members that are spread at
    random. So draws with a scale below ``least`` are chosen by L·h instead, with h so
    small that all others are preferred.

    Returns:
        The draw, and log of the mean of L·h, over its own h, which as an importance
        weight gives such draws the posterior's distribution.
    """
    alpha = density.schedule.at(level).alpha
    key = key_of(words, Stream.INITIAL)

    def log_h_of(position: Position) -> Array:
        if not least:
            return jnp.zeros(())
        scales = StandardCoordinates(density, layout).scales(position)
        narrow = [jnp.any(scales[name] < least[name]) for name in least]
        return jnp.where(jnp.stack(narrow).any(), -tuning.START.preferred, 0.0)

    Carry = tuple[_PriorDraw, Array]

    def race(i: Array, carry: Carry) -> Carry:
        # The largest of log-weights plus Gumbel numbers is a draw in proportion to the
        # weights, which needs no second pass over them.
        best, log_total = carry
        draw_key, race_key = jax.random.split(jax.random.fold_in(key, i))
        position = density.initial(draw_key, level)
        log_h = log_h_of(position)
        log_weight = density.evaluator(position, level).terms.log_potential + log_h
        log_weight = jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)
        perturbed = log_weight + jax.random.gumbel(race_key)
        drawn = _PriorDraw(layout.vector(position, alpha), perturbed, log_h)
        best = where(perturbed >= best.perturbed, drawn, best)
        return best, jnp.logaddexp(log_total, log_weight)

    never = jnp.asarray(-jnp.inf)
    nobody = _PriorDraw(jnp.zeros((layout.size,)), never, jnp.zeros(()))
    draws = tuning.START.draws
    best, log_total = jax.lax.fori_loop(0, draws, race, (nobody, never))
    return best.point, log_total - math.log(draws) - best.log_h


def check_kernel(
    given: object, steps_per_level: object, optional: bool = False
) -> Kernel | None:
    """Return the kernel that was given, or that a finisher is among moves; refuse
    anything else, and a number of transitions below 1."""
    kernel = as_kernel(given)
    if not (isinstance(kernel, Kernel) or (optional and kernel is None)):
        shown = repr(kernel)
        if isinstance(kernel, type):
            shown = f"the class {kernel.__name__}"
        raise WrongTypeError(
            f"A sampler needs a kernel; got {shown}.",
            fix="make one, for example cp.MALA() or cp.HMC(0.03, num_leapfrog=3).",
        )
    check_count(steps_per_level, "steps_per_level")
    if kernel is not None and not isinstance(kernel.requires, frozenset):
        raise WrongTypeError(
            f"The kernel {type(kernel).__name__} requires {kernel.requires!r}, which "
            "is no frozenset.",
            fix='write requires = frozenset({"energy"}), or {"score"} for a kernel '
            "that follows scores.",
        )
    return kernel


def reverse_step_of(rule: Weights, given: ReverseStep | None) -> ReverseStep | None:
    """Return the step that weights choose; refuse anything else that a user's weights
    return."""
    step = rule.reverse_step(given)
    if step is None or isinstance(step, ReverseStep):
        return step
    raise WrongTypeError(
        f"The rule of weights {type(rule).__name__} returns {step!r} from "
        "reverse_step(given).",
        fix="return a cp.ReverseStep, or None for no step.",
    )


def as_resampler(resample: object) -> Resampler:
    """Return the rule that the argument ``resample`` of `SMC` stands for."""
    if isinstance(resample, type):
        raise WrongTypeError(
            f"SMC(resample=) is the class {resample.__name__}.",
            fix=f"write {resample.__name__}().",
        )
    if isinstance(resample, Resampler):
        return resample
    return Resample(resample)  # type: ignore[arg-type]  # it refuses all but numbers
