"""The one sampler: N chains go down the levels by a step, weights, a meeting and moves;
`SMC`, `AnnealedMCMC` and `Ancestral` are made of other parts of these."""

from __future__ import annotations

import abc
import dataclasses
import math
from functools import partial
from typing import ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.kernels import MALA, Adaptive, Gibbs, Kernel
from composeprob.kernels.gibbs import parts_of, replaced
from composeprob.kernels.step_size import as_scalar, check_range
from composeprob.pytree import where
from composeprob.samplers.descent import Descent, at_target, moved_to
from composeprob.samplers.finishers import Finisher, closings
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles, Transitions, by_kind
from composeprob.samplers.random import Stream, key_of, normals, stream
from composeprob.samplers.resampling import Resample, Resampler
from composeprob.samplers.run import Pace, Run, Visits
from composeprob.samplers.step import ReverseStep
from composeprob.samplers.weights import first_evidence


class Sampler(eqx.Module):
    """How chains travel from the noisiest level to level 0: what `infer` takes as
    ``sampler=``.

    Hyper-parameters only; numbers are leaves, so other numbers reuse compiled code.

    Attributes:
        kernel: what moves chains at a level; None where nothing does.
        steps_per_level: transitions at each level.
        step: what leads chains from a level to the next; None where they stay.
        weights: ``"feynman_kac"`` from scores and the compiler's rate, ``"density"``
            from π_{k−1}/π_k, or None.
        meet: how chains exchange places.
        then: what closes the run at level 0.
        check_levels: whether Feynman–Kac weights are computed once more over every
            other level.
        moves: the transitions, once `prepare` has resolved them.
    """

    kernel: Kernel | None = None
    steps_per_level: int = eqx.field(default=0, static=True)
    step: ReverseStep | None = None
    weights: str | None = eqx.field(default=None, static=True)
    meet: Resampler | None = None
    then: tuple[Finisher, ...] = ()
    check_levels: bool = eqx.field(default=False, static=True)
    moves: Transitions = None  # type: ignore[assignment]  # nothing reads it before, or where there is no kernel

    descent: ClassVar[type[Descent]] = Descent

    # What it needs, and what it is

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        """What the density must offer, by who needs it: ``{"HMC": {"energy",
        "score"}}``."""
        needed: dict[str, frozenset[str]] = {}
        if self.weights is not None:
            by_weights = (
                {"feynman_kac"}
                if self.weights == "feynman_kac"
                else {"energy", "mode_depth"}
            )
            needed[f"SMC(weights='{self.weights}')"] = frozenset({"score", *by_weights})
        elif self.kernel is None:
            needed[type(self).__name__] = frozenset({"score"})
        for closing in self.then:
            needed |= closing.requires
        for part in parts_of(self.kernel):
            needed[type(part).__name__] = (
                needed.get(type(part).__name__, frozenset()) | part.requires
            )
        return needed

    @property
    def adjusted(self) -> tuple[bool, ...]:
        """Whether a Metropolis test decides, so that acceptance means something, for
        each of the kernel's blocks."""
        return tuple(
            part.optimal_acceptance is not None for part in parts_of(self.kernel)
        ) or (False,)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the kernel's blocks, where it has any, such as ``("x", "mu,
        sigma")``."""
        return (
            tuple(", ".join(sites) for sites in self.kernel.sites)
            if isinstance(self.kernel, Gibbs)
            else ()
        )

    @property
    def check_order(self) -> int | None:
        """The order p at which the error of `Run.log_evidence` vanishes with the
        levels' distance, where it is to be estimated; None where it has none, or nobody
        asks."""
        return self.step.order if self.step is not None and self.check_levels else None

    def estimates_evidence(self, density: AnnealedDensity) -> bool:
        """Whether `Run.log_evidence` estimates log ∫π_0."""
        # Density weights carry each level's own constant: they give the evidence only
        # if there is none.
        return self.weights == "feynman_kac" or (
            self.weights == "density" and density.top.normalised
        )

    def needs_terms(self, density: AnnealedDensity) -> bool:
        """Whether evaluations are to have their parts: of chains that are weighed, or
        whose path weights are kept."""
        noised = any(site.kind == "noised" for site in density.sites.values())
        return self.weights is not None or (
            self.step is not None and noised and "feynman_kac" in density.capabilities
        )

    def in_numbers(self) -> Self:
        """The same, once prepared, with the steps that rules gave in the place of the
        rules: these are functions, and one that is written again, as a notebook's cell
        does, would be compiled again."""
        return self if self.moves is None else replaced(self, kernel=self.moves.kernel)

    def prepare(self, density: AnnealedDensity) -> Sampler:
        """The same sampler with everything resolved that depends on the density: step
        sizes per level, defaults. Refused where it cannot be used with this density."""
        if self.kernel is not None:
            return replaced(
                self,
                moves=Transitions.resolved(self.kernel, self.steps_per_level, density),
            )
        static = [name for name, site in density.sites.items() if site.kind == "static"]
        if self.then:
            raise CapabilityError(
                f"then={self.then[0]!r} moves chains at level 0, but {type(self).__name__} has no kernel here.",
                where=density.described.where,
                fix="pass a kernel, or leave then out.",
            )
        if static:
            raise CapabilityError(
                f"{type(self).__name__} without a kernel leaves NumPyro's latents where their priors put them: "
                f"{', '.join(map(repr, static))}.",
                where=density.described.where,
                fix="use cp.SMC or cp.AnnealedMCMC with a kernel, such as cp.UHMC(step_size=…) for score-only factors.",
            )
        return self

    def with_moves(self, kernel: Kernel, steps_per_level: int) -> Self:
        """The same sampler, not yet prepared, with other transitions."""
        return replaced(
            self, kernel=kernel, steps_per_level=steps_per_level, moves=None
        )

    # What it costs

    def first_level(self, density: AnnealedDensity) -> int:
        """The level where chains start: the noisiest, or a few below it for chains that
        are weighed, where levels carry no signal but are far from one another (the
        first ones of cosine schedules): a step between them would only spoil the
        weights."""
        level = density.num_levels - 1
        if self.weights is None:
            return level
        log_snr = density.schedule.log_snr
        little, far = tuning.START.little_signal, tuning.START.far_apart
        while (
            level > 0
            and log_snr[level - 1] < little
            and log_snr[level - 1] - log_snr[level] > far
        ):
            level -= 1
        return level

    def evaluations(self, completed: int) -> int:
        """Evaluations of the composed density per chain in so many levels."""
        descents = max(completed - 1, 0)
        if self.weights is None and self.moves is None:
            return descents
        moves = (
            self.moves.total * self.moves.kernel.evaluations_per_step
            if self.moves
            else 0
        )
        starts = (
            0
            if self.moves is None or self.moves.layout.dims or self.weights is not None
            else tuning.START.draws
        )
        return (
            starts
            + completed * (1 + moves)
            + (descents if self.step is not None and self.step.order == 2 else 0)
        )

    def proposals(self) -> int:
        """Moves of one chain at one level that can turn out non-finite: transitions,
        adapting ones included, and the reverse step."""
        stepped = self.weights is not None or self.step is not None
        return stepped + (
            self.moves.total * len(self.moves.blocks) if self.moves else 0
        )

    @property
    def drawing(self) -> tuple[int, int, int]:
        """Evaluations of one transition of `draw`, the moves in it that can turn out
        non-finite, and how many of them are made before the first draw."""
        return (
            self.moves.kernel.evaluations_per_step,
            len(self.moves.blocks),
            self.moves.settling,
        )

    def visits(self, density: AnnealedDensity, pace: Pace | None) -> Visits:
        """The levels that it visits: all from the first on, or those that a `Pace`
        chooses."""
        first, levels = self.first_level(density), density.num_levels
        return (
            Visits.every(first, levels)
            if pace is None
            else Visits.given([first], levels, pace)
        )

    # What it does

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        """Fill in the chains' states (and first weights) at the first level, before any
        transition there."""
        layout, spread = Layout.of_density(density), run.spread
        blank = layout.unevaluated(density, self.needs_terms(density))
        if layout.dims or self.weights is not None:
            points = spread.map(
                partial(initial_point, layout, density, level), run.words
            )
        else:
            points, paths = spread.map(
                partial(likely_start, layout, density, level), run.words
            )
            run = dataclasses.replace(run, path_weights=paths)
        run = dataclasses.replace(
            run,
            chains=spread.map(partial(self.initial_particle, blank), run.words, points),
        )
        if self.moves is not None:
            records = type(run.records).empty(
                len(run.records.ess), len(self.moves.blocks)
            )
            run = dataclasses.replace(
                run, tuning=self.moves.untuned(len(run.ancestors)), records=records
            )
        return (
            run
            if self.weights is None
            else dataclasses.replace(run, log_evidence=first_evidence(density, level))
        )

    def initial_particle(self, blank: Evaluation, words: Array, v: Array) -> Particles:
        """One chain at v, (D,), not evaluated yet."""
        return (
            Particles(v, blank)
            if self.moves is None
            else self.moves.start(words, v, blank)
        )

    def way(self, density: AnnealedDensity, run: Run) -> Descent:
        """Its phases, while they are traced."""
        return self.descent(
            density,
            run,
            self.moves,
            self.step,
            self.weights,
            self.meet,
            self.needs_terms(density),
        )

    def advance(self, run: Run, density: AnnealedDensity, end: Array | int) -> Run:
        """Goes on with the run's visits until ``end`` are made, or level 0 is reached;
        traced once for all levels."""
        way = self.way(density, run)
        return jax.lax.while_loop(
            lambda carry: carry[0].visits.before(end), way.phase, (run, way.blank(run))
        )[0]

    def draw(self, run: Run, density: AnnealedDensity, i: Array, thin: Array) -> Run:
        """Makes the ``thin`` transitions at level 0 that lead to draw i, before the
        first one those in which step sizes settle too."""
        moves, n = self.moves, len(run.ancestors)
        words = run.spread.map(lambda words: stream(words, Stream.DRAWS), run.words)
        first, end = (
            jnp.where(i == 0, 0, moves.settling + i * thin),
            moves.settling + (i + 1) * thin,
        )
        made, tally = at_target(run, density, moves, words, first, end)
        # The records of level 0 are means over all transitions there.
        share, zero, records = (
            thin / (moves.count + (i + 1) * thin),
            jnp.int32(0),
            run.records,
        )
        acceptance, error, bad = tally.means(run.spread, moves, thin, n)
        old, new = (1 - share) * records.acceptance[0], share * acceptance
        errors = jnp.where(old > 0, old * records.quadrature_error[0], 0.0) + jnp.where(
            new > 0, new * error, 0.0
        )
        means = {"acceptance": old + new, "quadrature_error": errors / (old + new)}
        means["step_size"] = (1 - share) * records.step_size[
            0
        ] + share * tally.steps / thin
        records = records.counting(zero, bad).at(zero, **means)
        return dataclasses.replace(
            moved_to(run, made.chains), tuning=made.tuning, records=records
        )

    def positions(self, run: Run, density: AnnealedDensity) -> Position:
        """The chains' positions, each leaf of shape (N, …)."""
        alpha = density.schedule.at(run.visits.level).alpha
        return Layout.of_density(density).position(run.chains.position, alpha)

    def log_densities(self, run: Run) -> Array | None:
        """log π of each chain where it is, (N,), as last evaluated; None where it is
        not known."""
        return (
            None
            if self.moves is None and self.weights is None
            else run.chains.evaluation.log_density
        )

    def round_trips(self, run: Run) -> float | None:
        """How many replicas of a chain came from the noisiest level to level 0 in its
        draws; None without replicas."""
        return None

    @abc.abstractmethod
    def describe(self) -> str:
        """One line: the sampler and its settings."""

    def __repr__(self) -> str:
        return self.describe()


class SMC(Sampler):
    r"""A population of chains, weighted from level to level so that modes keep their
    shares.

    From level k + 1 to k, with F the part of π made of diffusion factors and G the rest
    (observations, user energies, classifiers):

    * ``weights="feynman_kac"``: a reverse step, and log w += ∫(r + ∇·u + ⟨u, S⟩) dτ + log G_k(x') − log G_{k+1}(x) +
      log p(x') − log q(x'), with S = ∇log F and r the Feynman–Kac rate that the
      compiler derives from the leaves' scores, τ the variance that a step takes away, u
      the control, p the law of the step along S + u, and q that of the step that is
      made, which is twisted towards ∇log G. It needs scores of F only, so it is right
      for learned factors. Tempered observations and user energies are averaged in
      G_{k+1}, over 8 points that noise leads back to from x', so that walls, where they
      are 0, lose no mass. That takes 8 evaluations of these functions a level, and none
      of a network of F;
    * ``weights="density"``: no move, and log w += log π_k(x) − log π_{k+1}(x). It trusts log-densities *between*
      modes, which energies learned by score matching do not know: for analytic or
      calibrated factors only.

    Then the chains are resampled where the relative effective sample size is below the
    threshold, and make ``steps_per_level`` transitions of the kernel, which leave π_k
    invariant. The last level always resamples, so that samples have equal weights.

    Where weights differ much, many chains become copies of few: ``result.ancestors``
    says how many of the first chains have descendants, ``result.effective_chains`` and
    every standard error follow from that. Below some hundred chains independent ones
    (`AnnealedMCMC`) are better.

    Args:
        kernel: any kernel; left out, ``MALA(Adaptive(), metric="auto")`` where the
            density has an energy, else no transitions. A program with latents has one
            for the noised sites and another for the latents, in turn, as a `Gibbs`.
        steps_per_level: transitions at each level.
        weights: ``"feynman_kac"`` or ``"density"``.
        resample: a threshold in (0, 1] for ``cp.Resample(threshold)``, resampling where
            ESS/N falls below it; or another `Resampler`.
        step: how chains go from level to level, a `ReverseStep`; density weights make
            none.
        then: what closes the run at level 0: `WarmUp`, `GlobalMoves`, or several in a
            tuple.
        check_levels: whether Feynman–Kac weights are computed once more over every
            other level, for half the evaluations, as an estimate of what the levels'
            distance does to the log-evidence.

    Result:
        ``result.log_evidence`` estimates log ∫π_0, with diffusion factors counted as
        normalised. Under Feynman–Kac weights it has an error of discretisation, which
        vanishes as the square of the levels' distance, or in proportion to it for a
        step of first order; ``result.log_evidence_error`` has it in it.

    References:
        Skreta et al. 2025, *Feynman–Kac Correctors in Diffusion* (arXiv 2503.02819).
        Del Moral, Doucet and Jasra 2006, *Sequential Monte Carlo samplers*, for the
        density weights.
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        steps_per_level: int = 1,
        weights: str = "feynman_kac",
        resample: float | Resampler = 0.5,
        step: ReverseStep | None = None,
        then: Finisher | tuple[Finisher, ...] = (),
        check_levels: bool = True,
    ):
        check_kernel(kernel, steps_per_level, optional=True)
        if weights not in ("feynman_kac", "density"):
            raise InvalidValueError(
                f"Unknown weights {weights!r}.", fix="use one of: feynman_kac, density."
            )
        if step is not None and not isinstance(step, ReverseStep):
            raise WrongTypeError(
                f"step must be a cp.ReverseStep; got {step!r}.",
                fix="pass one, or leave step out.",
            )
        if step is not None and weights == "density":
            raise InvalidValueError(
                "SMC(weights='density') makes no reverse step.",
                fix="leave step= out, or weights=, whose default steps from level to level.",
            )
        if step is not None and (float(step.eta) != 1.0 or step.twist is None):
            raise InvalidValueError(
                f"SMC weighs steps with eta=1 and a twist that is limited; got {step!r}.",
                fix="leave eta out, and give twist a number such as 0.5.",
            )
        step = None if weights == "density" else step or ReverseStep()
        if isinstance(resample, type):
            raise WrongTypeError(
                f"SMC(resample=) is the class {resample.__name__}.",
                fix=f"write {resample.__name__}().",
            )
        meet = resample if isinstance(resample, Resampler) else Resample(resample)
        checked = bool(check_levels) and weights == "feynman_kac"
        super().__init__(
            kernel, int(steps_per_level), step, weights, meet, closings(then), checked
        )

    def prepare(self, density: AnnealedDensity) -> Sampler:
        if self.kernel is None and "energy" in density.capabilities:
            kernel = by_kind(lambda: MALA(Adaptive(), metric="auto"), density)
            return self.with_moves(kernel, self.steps_per_level).prepare(density)
        return super().prepare(density)

    def describe(self) -> str:
        kernel = (
            "no kernel"
            if self.kernel is None
            else f"{self.kernel!r}, {self.steps_per_level} steps a level"
        )
        threshold = (
            f"{float(self.meet.threshold):.3g}"
            if isinstance(self.meet, Resample)
            else repr(self.meet)
        )
        step = (
            ""
            if self.step is None or repr(self.step) == "ReverseStep()"
            else f", step={self.step!r}"
        )
        then = "".join(f", then {closing!r}" for closing in self.then)
        return (
            f"SMC({kernel}, weights='{self.weights}', resample={threshold}{step}{then})"
        )


class AnnealedMCMC(Sampler):
    """Independent chains that make ``steps_per_level`` transitions of a kernel at every
    level, K − 1 to 0.

    Cost: one evaluation a level to refresh what the kernel caches, and the kernel's own
    for each transition. What chains cannot do is cross between modes once these have
    parted: the share of each mode is frozen at the level where that happens, and no
    number of chains mends it. `SMC` does. With ``reverse_step=True`` the status says so
    (``shares_frozen``) where the Feynman–Kac weights of the chains' paths tell.

    In a program without noised sites nothing leads from the prior to the data in small
    steps: there each chain starts at one of 16 draws of the prior, chosen by their
    likelihood, for 16 evaluations more.

    Args:
        kernel: a kernel such as ``cp.HMC(0.03, num_leapfrog=3)``.
        steps_per_level: transitions at each level, ≥ 1; 10 unless it says another
            number.
        reverse_step: whether one step of the reverse process takes the chains from each
            level to the next, as a better start for the kernel: of first order, or
            ``cp.ReverseStep(control="none")``, of second order for one evaluation more
            a level. Observations and user energies shift it by at most half the length
            of its noise, so that a sharp one does not throw chains far off.
        then: what closes the run at level 0: `WarmUp`, `GlobalMoves`, or several in a
            tuple.

    Raises:
        WrongTypeError: a step that is neither.
        InvalidValueError: a step with a control, which only weights could take into
            account.

    References:
        Du et al. 2023, Algorithm 1. Song and Ermon 2019 for annealed Langevin dynamics.

    Example:
        >>> import composeprob as cp
        >>> cp.AnnealedMCMC(cp.HMC(0.03, num_leapfrog=3), steps_per_level=10).describe()
        'AnnealedMCMC(HMC(step_size=0.03, num_leapfrog=3, damping=0.5), 10 steps a level)'
    """

    def __init__(
        self,
        kernel: Kernel,
        steps_per_level: int = 10,
        reverse_step: bool | ReverseStep = False,
        then: Finisher | tuple[Finisher, ...] = (),
    ):
        check_kernel(kernel, steps_per_level)
        if not isinstance(reverse_step, (bool, ReverseStep)):
            raise WrongTypeError(
                f"reverse_step must be True, False or a cp.ReverseStep; got {reverse_step!r}.",
                fix="write True.",
            )
        step = (
            ReverseStep(order=1, control="none")
            if reverse_step is True
            else reverse_step or None
        )
        if step is not None and step.control != "none":
            raise InvalidValueError(
                f"The reverse step of AnnealedMCMC has control={step.control!r}, which only weights could make up for.",
                fix='write cp.ReverseStep(control="none"), or use cp.SMC.',
            )
        super().__init__(kernel, int(steps_per_level), step, then=closings(then))

    def describe(self) -> str:
        reverse = ""
        if self.step is not None:
            reverse = f", reverse step{' of second order' if self.step.order == 2 else ''} between levels"
        then = "".join(f", then {closing!r}" for closing in self.then)
        return f"AnnealedMCMC({self.kernel!r}, {self.steps_per_level} steps a level{reverse}{then})"


class Ancestral(Sampler):
    """Reverse diffusion of the composed score: K − 1 evaluations, and the wrong law for
    products.

    The score of the noised product is not the sum of the noised scores, so this samples
    something else than the program's density; it is the baseline that the other
    samplers mend (Du et al. 2023, section 3).

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
        super().__init__(
            step=ReverseStep(order=1, control="none", twist=None, eta=value)
        )

    def describe(self) -> str:
        assert self.step is not None
        return f"Ancestral(eta={float(self.step.eta):.3g})"


def initial_point(
    layout: Layout, density: AnnealedDensity, level: int, words: Array
) -> Array:
    """N(0, s/P) at noised entries, the prior at static ones, (D,)."""
    deviation = jnp.sqrt(
        density.schedule.at(level).variance / layout.power(density, level)
    )
    y = deviation * normals(words, Stream.INITIAL, layout.dims)
    if layout.size == layout.dims:
        return y
    v = jnp.concatenate([y, jnp.zeros((layout.size - layout.dims,))])
    xs = {
        name: layout.position(v, 1.0)[name] for name, _ in layout.noised
    }  # x/α, as the priors see it
    return layout.vector(
        {**xs, **density.evaluator.draw_static(key_of(words, Stream.STATIC), xs)}, 1.0
    )


def likely_start(
    layout: Layout, density: AnnealedDensity, level: int, words: Array
) -> tuple[Array, Array]:
    """One of `tuning.START.draws` draws of the prior, with probabilities in proportion
    to their likelihood, and log of the mean of these, under which such draws have the
    posterior's distribution: a chain that starts far out in a heavy tail would stay
    there, as the step size that suits the others is too long for it."""
    alpha, key = density.schedule.at(level).alpha, key_of(words, Stream.INITIAL)

    def race(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        draw_key, race_key = jax.random.split(jax.random.fold_in(key, i))
        position = density.initial(draw_key, level)
        log_weight = density.evaluator(position, level).terms.log_potential
        log_weight = jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)
        rival = layout.vector(position, alpha), log_weight + jax.random.gumbel(race_key)
        v, score = where(rival[1] >= best[1], rival, best[:2])
        return v, score, jnp.logaddexp(best[2], log_weight)

    none = jnp.zeros((layout.size,)), jnp.asarray(-jnp.inf), jnp.asarray(-jnp.inf)
    v, _, total = jax.lax.fori_loop(0, tuning.START.draws, race, none)
    return v, total - math.log(tuning.START.draws)


def check_kernel(
    kernel: object, steps_per_level: object, optional: bool = False
) -> None:
    """Refuse what is no kernel, and a number of transitions below 1."""
    if not (isinstance(kernel, Kernel) or (optional and kernel is None)):
        found = (
            f"the class {kernel.__name__}" if isinstance(kernel, type) else repr(kernel)
        )
        raise WrongTypeError(
            f"A sampler needs a kernel; got {found}.",
            fix="make one, for example cp.MALA() or cp.HMC(0.03, num_leapfrog=3).",
        )
    check_count(steps_per_level, "steps_per_level")
