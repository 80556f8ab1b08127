"""Sequential Monte Carlo along the levels: reverse step, weights, resampling, kernel transitions."""

from __future__ import annotations

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Target
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.kernels import MALA, Adaptive, Kernel, KernelState
from composeprob.kernels.step_size import as_scalar, check_range
from composeprob.samplers.annealed_mcmc import check_kernel, check_steps, needs, unevaluated
from composeprob.samplers.base import Route, Run, Sampler, draw_initial, level_keys
from composeprob.samplers.blocks import by_kind
from composeprob.samplers.control import CONTROLS
from composeprob.samplers.ends import check_global_moves, check_stay, ending, needs_global
from composeprob.samplers.explicit import Explicit
from composeprob.samplers.fall import fall
from composeprob.samplers.fitted import Fitted
from composeprob.samplers.integrators import Integrator
from composeprob.samplers.resampling import (
    by_islands,
    distinct,
    evidence_variance,
    log_mean_weight,
    relative_ess,
    step_taken,
    systematic,
)
from composeprob.samplers.transitions import Transitions
from composeprob.samplers.weights import first_evidence

WEIGHTS = ("feynman_kac", "density")
INTEGRATORS: dict[str, type[Integrator]] = {kind.name: kind for kind in (Fitted, Explicit)}
LITTLE_SIGNAL = -4.6
"""log-SNR below which a level says nothing of the data: α/σ < 0.1."""
FAR_APART = 0.7
"""Levels whose log-SNR differ by more are too far apart for one reverse step: β > 0.5."""


class SMC(Sampler):
    r"""A population of chains, weighted from level to level so that modes keep their shares.

    From level k + 1 to k, with F the part of π made of diffusion factors and G the rest (observations, user
    energies, classifiers):

    * ``weights="feynman_kac"``: a reverse step, and log w += ∫g²·r dτ + log G_k(x') − log G_{k+1}(x) + log p(x') −
      log q(x'), with r the Feynman–Kac rate that the compiler derives from the leaves' scores, p the law of the step
      along ∇log F, and q that of the step that is made, which leans towards ∇log G. It needs scores of F only, so it is
      right for learned factors. Tempered observations and user energies are averaged in G_{k+1}, over 8 points that
      noise leads back to from x', so that walls, where they are 0, lose no mass. That takes 8 evaluations of these
      functions a level, and none of a network of F;
    * ``weights="density"``: no move, and log w += log π_k(x) − log π_{k+1}(x). It trusts log-densities *between*
      modes, which energies learned by score matching do not know: for analytic or calibrated factors only.

    Then the chains are resampled (systematically) where the relative effective sample size is below the threshold,
    and make ``steps_per_level`` transitions of the kernel, which leave π_k invariant. The last level always
    resamples, so that samples have equal weights.

    Where weights differ much, many chains become copies of few: ``result.ancestors`` says how many of the first chains
    have descendants, ``result.effective_chains`` and every standard error follow from that. Below some hundred chains
    independent ones (`AnnealedMCMC`) are better.

    Args:
        kernel: any kernel; left out, ``MALA(Adaptive(), metric="auto")`` where the density has an energy, else no
            transitions. A program with latents has one for the noised sites and another for the latents, in turn, as
            a `Gibbs`.
        steps_per_level: transitions at each level.
        weights: ``"feynman_kac"`` or ``"density"``.
        resample_threshold: resample where ESS/N falls below it, in (0, 1].
        second_order: whether the reverse step is corrected by the score where it ended, as in Heun's method, for one
            evaluation more a level; without that it is DDPM's, whose variance is too small.
        control: ``"affine"`` adds a drift to the reverse step under which Feynman–Kac weights differ less, fitted over
            the cloud of chains, and takes it into account in the weights, which stay exact; ``"none"`` leaves it out.
        integrator: ``"fitted"`` fits what is linear in the drift over the cloud of chains and integrates it exactly, so
            that the step is stable for products of any number of factors; ``"explicit"`` is DDPM's step. Left out, the
            first of second order, the other of first.
        stay: whether HMC moves all sites at level 0 until the population stops drifting, for programs with latents.
        check_levels: whether Feynman–Kac weights are computed once more over every other level, for half the
            evaluations, as an estimate of what the levels' distance does to the log-evidence.
        islands: I, a divisor of N. Chains are resampled within groups of N/I in a row, which keep their weights until
            level 0, so that a lucky chain takes over no more than its island. Islands are independent, apart from what
            is fitted and tuned over all chains: from 8 on the error of the log-evidence comes from how much theirs
            differ, `Result.islands`. Left out, one.
        global_moves: at level 0 each chain is proposed so many places that have nothing to do with its own, drawn from
            a Gaussian mixture fitted to the other half of the chains, and accepts them as Metropolis and Hastings say;
            one evaluation each. Where positions have few numbers (up to about 20) 20 of them make chains independent
            of one another again, however few first ones they descend from. For log-densities that can be compared
            between modes: analytic or calibrated factors. 0 for none.

    Result:
        ``result.log_evidence`` estimates log ∫π_0, with diffusion factors counted as normalised. Under Feynman–Kac
        weights it has an error of discretisation, which vanishes as the square of the levels' distance, or in
        proportion to it with ``second_order=False``; ``result.log_evidence_error`` has it in it.

    References:
        Skreta et al. 2025, *Feynman–Kac Correctors in Diffusion* (arXiv 2503.02819). Del Moral, Doucet and Jasra 2006,
        *Sequential Monte Carlo samplers*, for the density weights.
    """

    kernel: Kernel | None
    steps_per_level: int = eqx.field(static=True)
    weights: str = eqx.field(static=True)
    resample_threshold: Array
    second_order: bool = eqx.field(static=True)
    control: str = eqx.field(static=True)
    integrator: Integrator
    islands: int = eqx.field(static=True)
    check_levels: bool = eqx.field(static=True)

    def __init__(
        self,
        kernel: Kernel | None = None,
        steps_per_level: int = 1,
        weights: str = "feynman_kac",
        resample_threshold: float = 0.5,
        second_order: bool = True,
        control: str = "affine",
        stay: bool = False,
        check_levels: bool = True,
        integrator: str | None = None,
        islands: int | None = None,
        global_moves: int = 0,
    ):
        if kernel is not None:
            check_kernel(kernel, steps_per_level)
        check_steps(steps_per_level)
        if weights not in WEIGHTS:
            raise InvalidValueError(f"Unknown weights {weights!r}.", fix=f"use one of: {', '.join(WEIGHTS)}.")
        threshold = as_scalar(resample_threshold, "SMC(resample_threshold=)")
        check_range(threshold, "SMC(resample_threshold=)", 0.0, 1.0 + 1e-6, fix="a number in (0, 1]")
        self.kernel, self.steps_per_level, self.weights = kernel, int(steps_per_level), weights
        self.resample_threshold, self.moves = threshold, None
        self.second_order = bool(second_order) and weights == "feynman_kac"
        if control not in CONTROLS:
            raise InvalidValueError(f"Unknown control {control!r}.", fix=f"use one of: {', '.join(CONTROLS)}.")
        self.control = control if weights == "feynman_kac" else "none"
        name = ("fitted" if self.second_order else "explicit") if integrator is None else integrator
        if name not in INTEGRATORS:
            raise InvalidValueError(f"Unknown integrator {name!r}.", fix=f"use one of: {', '.join(INTEGRATORS)}.")
        if weights == "density" and name == "fitted":
            raise InvalidValueError(
                "SMC(weights='density') makes no reverse step that integrator='fitted' could take.",
                fix="leave integrator= out, or weights=, whose default steps from level to level.",
            )
        self.integrator = INTEGRATORS[name](self.control != "none")
        whole = isinstance(islands, (int, np.integer)) and not isinstance(islands, bool)
        if islands is not None and not (whole and islands >= 1):
            raise InvalidValueError(
                f"islands must be a whole number ≥ 1; got {islands!r}.", fix="for example islands=8."
            )
        self.islands = 1 if islands is None else int(islands)
        self.global_moves = check_global_moves(global_moves)
        self.stay, self.check_levels = bool(stay), bool(check_levels) and weights == "feynman_kac"

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        own = frozenset(
            {"score", "feynman_kac"} if self.weights == "feynman_kac" else {"score", "energy", "mode_depth"}
        )
        weighing = {f"SMC(weights='{self.weights}')": own, **needs_global(self.global_moves)}
        return weighing if self.kernel is None else {**weighing, **needs(self.kernel)}

    @property
    def check_order(self) -> int | None:
        return (2 if self.second_order else 1) if self.check_levels else None

    @property
    def paces(self) -> bool:
        return True

    def estimates_evidence(self, density: AnnealedDensity) -> bool:
        # Density weights carry each level's own constant: they tell the evidence only if there is none.
        return self.weights == "feynman_kac" or density.top.normalised

    def prepare(self, density: AnnealedDensity) -> SMC:
        kernel = self.kernel
        if kernel is None and "energy" in density.capabilities:
            kernel = by_kind(lambda: MALA(Adaptive(), metric="auto"), density)
        static = any(site.kind == "static" for site in density.sites.values())
        if kernel is None and static:
            raise CapabilityError(
                "SMC without a kernel leaves NumPyro's latents where their priors put them.",
                where=density.described.where,
                fix="pass a kernel, such as cp.UHMC(step_size=…) for score-only factors.",
            )
        if self.stay:
            check_stay(density, kernel is not None)
        moves = None if kernel is None else Transitions.resolved(kernel, self.steps_per_level, density)
        where = lambda s: (s.kernel, s.moves)  # noqa: E731
        return eqx.tree_at(where, self, (kernel, moves), is_leaf=lambda n: n is None or isinstance(n, Kernel))

    def route(self, density: AnnealedDensity) -> Route:
        if self.second_order or self.control != "none" or self.integrator.name != "explicit":
            raise CapabilityError(
                "The likelihood of SMC's samples is known only where its reverse steps are DDPM's; these are of second "
                "order, fitted, or have a control.",
                fix="ask for the likelihood of cp.SMC(..., second_order=False, control='none').",
            )
        return Route(self.weights == "feynman_kac", leaning=True, weights=self.weights)

    def with_moves(self, kernel: Kernel, steps_per_level: int) -> SMC:
        threshold, order, name = float(self.resample_threshold), self.second_order, self.integrator.name
        settings = (threshold, order, self.control, self.stay, self.check_levels, name, self.islands)
        return SMC(kernel, steps_per_level, self.weights, *settings, int(self.global_moves))

    def first_level(self, density: AnnealedDensity) -> int:
        """The noisiest level, or a few below it: where levels carry no signal but are far apart (the first ones of
        cosine schedules), a step between them would only spoil the weights."""
        log_snr = np.asarray(density.schedule.log_snr)
        level = density.num_levels - 1
        while level > 0 and log_snr[level - 1] < LITTLE_SIGNAL and log_snr[level - 1] - log_snr[level] > FAR_APART:
            level -= 1
        return level

    def evaluations(self, first_level: int, completed: int) -> int:
        descents = max(completed - 1, 0) if self.second_order else 0
        return completed * (1 + (self.moves.evaluations if self.moves else 0)) + descents

    def proposals(self) -> int:
        return 1 + (self.moves.proposals if self.moves else 0)

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        if len(run.ancestors) % self.islands:
            raise InvalidValueError(
                f"{len(run.ancestors)} chains cannot be split into {self.islands} islands of equal size.",
                fix="pass a num_chains that is a multiple of the islands.",
            )
        positions = draw_initial(run, density, level)
        keys = level_keys(run.keys, density.num_levels + 1)
        target = unevaluated(self.target(density, level))
        if self.moves is None:
            states = run.spread.map(lambda x: KernelState(x, target(x)), positions)
        else:
            states = run.spread.map(partial(self.moves.kernel.init, target=target), keys, positions)
        log_evidence = first_evidence(density, level)
        run = self.moves.begin(run, positions) if self.moves else run
        return dataclasses.replace(run, chains=states, log_evidence=log_evidence, islands=jnp.zeros((self.islands,)))

    def visit(self, run: Run, density: AnnealedDensity, level: Array, above: Array) -> Run:
        spread, keys = run.spread, level_keys(run.keys, level)
        target = self.target(density, level)
        states, gain, moved = fall(self, run, keys, density, level, above)
        own = run.log_weights + gain
        own = jnp.where(jnp.isfinite(own), own, -jnp.inf)
        table = jnp.stack([own, ~jnp.isnan(gain), run.log_weights, gain, moved], axis=1)
        log_weights, counted, *step = spread.gather(table).T
        run = run.counting(level, jnp.sum(counted == 0, dtype=jnp.int32))

        def together(log_weights: Array, ancestors: Array, *step: Array) -> tuple[Array, ...]:
            ess, log_mean = relative_ess(log_weights), log_mean_weight(log_weights)
            variance, poorest, apart = evidence_variance(log_weights, ancestors), ess, jnp.zeros((1,))
            if self.islands > 1:
                rows = log_weights.reshape(self.islands, -1)
                poorest, apart = jnp.min(jax.vmap(relative_ess)(rows)), jax.vmap(log_mean_weight)(rows) - log_mean
            return ess, log_mean, variance, poorest, apart, *step_taken(*step)

        told = spread.alone(together, log_weights, run.ancestors, *step)
        ess, log_mean, variance, poorest, apart, *step = told

        def surviving(log_weights: Array) -> tuple[Array, Array]:
            key, blank = jax.random.fold_in(run.shared, level), jnp.zeros_like(log_weights)
            if self.islands == 1:
                return systematic(key, log_weights), blank
            apart = by_islands(key, log_weights, self.islands, self.resample_threshold)
            return jax.tree.map(partial(jnp.where, level == 0), (systematic(key, log_weights), blank), apart)

        def resample(states: KernelState) -> tuple[KernelState, Array, Array, Array]:
            chosen, left = spread.alone(surviving, log_weights)
            mine = left[spread.numbers(keys) % len(left)]
            return spread.exchange(states, chosen), mine, run.log_evidence + log_mean, run.ancestors[chosen]

        states, own, log_evidence, ancestors = jax.lax.cond(
            (poorest < self.resample_threshold) | (level == 0),
            resample,
            lambda states: (states, own, run.log_evidence, run.ancestors),
            states,
        )
        left = distinct(ancestors).astype(ess.dtype)
        numbers = {"ess": ess, "ancestors": left, "weight_variance": step[0], "step_error": step[1]}
        records = dataclasses.replace(
            run.records, **{name: getattr(run.records, name).at[level].set(value) for name, value in numbers.items()}
        )
        tuning = run.tuning
        if self.moves is not None:
            states, tuning, records = self.moves.run(
                spread, keys, states, target, density.schedule, level, tuning, records
            )
        return dataclasses.replace(
            run,
            chains=states,
            log_weights=own,
            log_evidence=log_evidence,
            evidence_variance=variance,
            ancestors=ancestors,
            islands=apart,
            tuning=tuning,
            records=records,
        )

    def target(self, density: AnnealedDensity, level: Array | int) -> Target:
        return partial(density.evaluator, level=level)

    def positions(self, run: Run) -> dict[str, Array]:
        return run.chains.position

    def describe(self) -> str:
        kernel = "no kernel" if self.kernel is None else f"{self.kernel!r}, {self.steps_per_level} steps a level"
        order = ", second_order=False" if self.weights == "feynman_kac" and not self.second_order else ""
        order += (
            f", integrator={self.integrator.name!r}" if (self.integrator.name == "fitted") != self.second_order else ""
        )
        order += ", control='none'" if self.weights == "feynman_kac" and self.control == "none" else ""
        then = (f", {self.islands} islands" if self.islands > 1 else "") + ending(self)
        threshold = f"{float(self.resample_threshold):.3g}"
        return f"SMC({kernel}, weights='{self.weights}', resample_threshold={threshold}{order}{then})"
