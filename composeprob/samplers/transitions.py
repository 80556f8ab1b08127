"""Kernel transitions of all chains at one level, with step sizes and metrics of each block adapted across chains."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Target
from composeprob.kernels import Adaptive, Estimated, Gibbs, Kernel, adapt, mean_acceptance, resolve, scaled_step
from composeprob.kernels.gibbs import GibbsState, in_blocks, with_field, with_parts
from composeprob.kernels.line_integral import integrates_score
from composeprob.kernels.step_size import as_step_size
from composeprob.samplers.base import Records, Run
from composeprob.samplers.spread import Spread
from composeprob.samplers.tally import Tally
from composeprob.samplers.tuning import Tunings, in_metrics, log_scales, untuned, with_log_scales, with_metrics
from composeprob.schedule import Schedule

FEW = 16
"""Number of chains at which the gain of adaptation is halved."""

SETTLING = 50
"""Transitions at level 0 that adapt step sizes before draws are taken."""


class Transitions(eqx.Module):
    """A kernel with its number of transitions a level; numbers resolved for one schedule.

    Attributes:
        kernel: blocks of sites with a kernel each, whose step size is an array (K,) or `Adaptive`; one block of all
            sites unless the user gave a `Gibbs`. Sites that must be held are in no block.
        count: transitions a level whose acceptance is recorded.
        static: static sites whose step does not shrink with the level's noise while that of others in their block
            does; none where the user gave both step sizes and metric.
        follows: for each block, whether its adaptive step shrinks with the level's noise.
        noised: whether any site is.
    """

    kernel: Gibbs
    count: int = eqx.field(static=True)
    static: frozenset[str] = eqx.field(static=True)
    follows: tuple[bool, ...] = eqx.field(static=True)
    noised: bool = eqx.field(static=True)

    @classmethod
    def resolved(cls, kernel: Kernel, count: int, density: AnnealedDensity) -> Transitions:
        """Check the sites and the step sizes against the density, before anything is compiled."""
        blocks = in_blocks(kernel, [name for name, site in density.sites.items() if site.kind != "held"])
        parts, static, follows = [], set(), []
        for part, block in zip(blocks.kernels, blocks.sites, strict=True):
            rule = as_step_size(part.step_size)
            adaptive = isinstance(rule, Adaptive)
            steps = (
                rule.starting(part, *_extent(density, block))
                if isinstance(rule, Adaptive)
                else resolve(rule, density.schedule, part)
            )
            parts.append(with_field(part, "step_size", steps))
            still = {name for name in block if density.sites[name].kind == "static"}
            follows.append(still != set(block))
            if follows[-1] and (adaptive or isinstance(getattr(part, "metric", None), Estimated)):
                static |= still
        noised = any(site.kind == "noised" for site in density.sites.values())
        moved = with_parts(blocks, parts)
        assert isinstance(moved, Gibbs)
        return cls(moved, count, frozenset(static), tuple(follows), noised)

    @property
    def adaptive(self) -> tuple[Adaptive | None, ...]:
        """For each block how its step size adapts; None where it is given."""
        rules = (part.step_size for part in self.kernel.kernels)
        return tuple(rule if isinstance(rule, Adaptive) else None for rule in rules)

    @property
    def total(self) -> int:
        """Transitions a level, adapting ones included."""
        return self.count + max(rule.warmup if rule else 0 for rule in self.adaptive)

    @property
    def evaluations(self) -> int:
        """Evaluations a level and chain of `run`."""
        return self.total * self.kernel.evaluations_per_step

    @property
    def proposals(self) -> int:
        """Moves a level and chain that can turn out non-finite."""
        return self.total * len(self.follows)

    def begin(self, run: Run, positions: dict[str, Array]) -> Run:
        """The run of chains at these positions before anything has adapted, and records of this kernel's shape."""
        tuning = untuned(self.kernel, positions, len(run.ancestors))
        records = Records.empty(run.records.ess.shape[0], len(self.follows))
        return dataclasses.replace(run, tuning=tuning, records=records)

    def steps(self) -> Array:
        """Step sizes at each level where all are given, (K, B)."""
        return jnp.stack([jnp.asarray(part.step_size) for part in self.kernel.kernels], axis=-1)

    def run(
        self,
        spread: Spread,
        keys: Array,
        states: GibbsState,
        target: Target,
        schedule: Schedule,
        level: Array,
        tuning: Tunings,
        records: Records,
        bad: Array | None = None,
    ) -> tuple[GibbsState, Tunings, Records]:
        """All transitions of one level.

        Args:
            spread: which chains these are.
            keys: this level's key of every chain, (n,).
            states: every chain's state, evaluated under ``target``.
            target: the level's density.
            schedule, level: where we are.
            tuning: log c and metrics as the neighbouring level left them.
            records: written at ``level``.
            bad: whether each chain's move to this level was non-finite, (n,).
        """
        sigma, warmup = schedule.at(level).sigma, self.total - self.count
        num_chains, kernel, began = spread.number_of(keys), self._in_force(tuning, sigma), states

        def transition(
            i: Array, carry: tuple[GibbsState, list[Array], Tally, Array]
        ) -> tuple[GibbsState, list[Array], Tally, Array]:
            states, log_scale, tally, steps = carry
            step_size, counted = self._step_size(log_scale, sigma, level), i >= warmup
            move = partial(self._move, kernel, i, target, step_size, counted)
            states, tally, acceptance = spread.map(move, keys, states, tally)
            if any(self.adaptive):
                mean = mean_acceptance(acceptance, spread.total, num_chains)
                log_scale = self._adapted(log_scale, mean, num_chains, counted)
            return states, log_scale, tally, steps + jnp.where(counted, jnp.stack(step_size), 0.0)

        start = (states, log_scales(tuning), self.blank_tally(keys, bad), jnp.zeros(len(self.follows)))
        states, log_scale, tally, steps = jax.lax.fori_loop(0, self.total, transition, start)
        acceptance, error, non_finite = tally.over(spread, self.count, num_chains, self.integrates_score)
        records = dataclasses.replace(
            records,
            acceptance=records.acceptance.at[level].set(acceptance),
            step_size=records.step_size.at[level].set(steps / self.count),
            non_finite=records.non_finite.at[level].add(non_finite),
            quadrature_error=records.quadrature_error.at[level].set(error),
        )
        follows = {name: yes for sites, yes in zip(self.kernel.sites, self.follows, strict=True) for name in sites}
        scale = {n: sigma if yes and n not in self.static else jnp.ones_like(sigma) for n, yes in follows.items()}
        tuning = with_metrics(with_log_scales(tuning, log_scale), self.kernel, spread, began, states, scale)
        return states, tuning, records

    def _in_force(self, tuning: Tunings, sigma: Array) -> Gibbs:
        """The kernel in the metrics of a level of noise σ.

        Noised sites live at the level's scale σ_k, static ones at a scale that does not change with the level: a step
        h_k ∝ σ_k^p suits both when static sites are measured in units of 1/σ_k.
        """
        return in_metrics(self.kernel, tuning, dict.fromkeys(self.static, 1.0 / sigma))

    @property
    def integrates_score(self) -> bool:
        """Whether the accept test of a block integrates the score."""
        return any(map(integrates_score, self.kernel.kernels))

    def blank_tally(self, keys: Array, bad: Array | None = None) -> Tally:
        """Nothing counted yet of the chains of these keys."""
        zero = jnp.zeros((len(keys), len(self.follows)))
        return Tally(zero, zero, jnp.zeros(keys.shape, jnp.int32) if bad is None else bad.astype(jnp.int32))

    @property
    def settling(self) -> int:
        """Transitions that adapt the step sizes once more before the first draw: down the levels they lag behind, and
        at level 0 they stop shrinking."""
        return SETTLING if any(self.adaptive) else 0

    def draw(
        self,
        spread: Spread,
        keys: Array,
        states: GibbsState,
        target: Target,
        schedule: Schedule,
        tuning: Tunings,
        i: Array,
        thin: Array,
    ) -> tuple[GibbsState, Tunings, Tally]:
        """The transitions that lead to draw i at level 0: ``thin`` of them, before the first one `settling` ones too.

        Args:
            spread, keys, schedule: as for `run`; the keys are others than those of a level.
            states: every chain's state, evaluated under ``target``.
            target: of level 0.
            tuning: log c, which no longer changes once it has settled, and metrics, which do not change.
            i, thin: numbers at run time.

        Returns:
            The states, what adapts, and the tally of the ``thin`` transitions.
        """
        sigma, num_chains, settled = schedule.at(0).sigma, spread.number_of(keys), jnp.int32(self.settling)
        kernel = self._in_force(tuning, sigma)

        def transition(
            t: Array, carry: tuple[GibbsState, list[Array], list[Array], Tally]
        ) -> tuple[GibbsState, list[Array], list[Array], Tally]:
            states, log_scale, recent, tally = carry
            step_size, counted = self._step_size(log_scale, sigma, jnp.int32(0)), t >= settled
            move = partial(self._move, kernel, t, target, step_size, counted)
            states, tally, acceptance = spread.map(move, keys, states, tally)
            if not self.settling:
                return states, log_scale, recent, tally

            def adapt_once(log_c: list[Array], recent: list[Array]) -> tuple[list[Array], list[Array]]:
                mean = mean_acceptance(acceptance, spread.total, num_chains)
                log_c = self._adapted(log_c, mean, num_chains, jnp.asarray(False))
                recent = [sum_ + jnp.where(2 * t >= settled, new, 0.0) for sum_, new in zip(recent, log_c, strict=True)]
                # What it is left at is the mean of the second half: less noise than the last one has.
                mean_of = [sum_ / (settled - settled // 2) for sum_ in recent]
                return [jnp.where(t == settled - 1, m, c) for m, c in zip(mean_of, log_c, strict=True)], recent

            log_scale, recent = jax.lax.cond(counted, lambda *same: same, adapt_once, log_scale, recent)
            return states, log_scale, recent, tally

        begin = jnp.where(i == 0, 0, settled + i * thin)
        log_scale = log_scales(tuning)
        start = (states, log_scale, [jnp.zeros_like(c) for c in log_scale], self.blank_tally(keys))
        states, log_scale, _, tally = jax.lax.fori_loop(begin, settled + (i + 1) * thin, transition, start)
        return states, with_log_scales(tuning, log_scale), tally

    def recorded(
        self,
        spread: Spread,
        records: Records,
        schedule: Schedule,
        tuning: Tunings,
        tally: Tally,
        before: Array,
        count: Array,
    ) -> Records:
        """Level 0's records with ``count`` transitions of `draw` more, after those of the level and ``before``."""
        num_chains = spread.number_of(tally.non_finite)
        acceptance, error, non_finite = tally.over(spread, count, num_chains, self.integrates_score)
        share = count / (self.count + before + count)
        old, new = (1 - share) * records.acceptance[0], share * acceptance
        errors = jnp.where(old > 0, old * records.quadrature_error[0], 0.0) + jnp.where(new > 0, new * error, 0.0)
        step_size = jnp.stack(self._step_size(log_scales(tuning), schedule.at(0).sigma, jnp.int32(0)))
        return dataclasses.replace(
            records,
            acceptance=records.acceptance.at[0].set(old + new),
            step_size=records.step_size.at[0].set((1 - share) * records.step_size[0] + share * step_size),
            non_finite=records.non_finite.at[0].add(non_finite),
            quadrature_error=records.quadrature_error.at[0].set(errors / (old + new)),
        )

    def _move(
        self,
        kernel: Gibbs,
        i: Array,
        target: Target,
        step_size: list[Array],
        counted: Array,
        key: Array,
        state: GibbsState,
        tally: Tally,
    ) -> tuple[GibbsState, Tally, Array]:
        """Transition i of one chain, with its acceptance."""
        state, info = kernel.step(jax.random.fold_in(key, i), state, target, step_size)
        return state, tally.adding(info, counted), info.acceptance

    def _step_size(self, log_scale: list[Array], sigma: Array, level: Array) -> list[Array]:
        """The step size in force, of each block."""

        def of(part: Kernel, log_c: Array, follows: bool) -> Array:
            if not isinstance(part.step_size, Adaptive):
                assert isinstance(part.step_size, Array)
                return part.step_size[level]
            return scaled_step(log_c, sigma if follows else jnp.ones_like(sigma), part)

        return list(map(of, self.kernel.kernels, log_scale, self.follows))

    def _adapted(self, log_scale: list[Array], mean: Array, n: int, counted: Array) -> list[Array]:
        """log c after a transition of n chains with this mean acceptance, (B,); ends a warm-up if ``counted``."""

        def of(part: Kernel, log_c: Array, own_mean: Array) -> Array:
            rule = part.step_size
            if not isinstance(rule, Adaptive):
                return log_c
            gain = rule.gain * n / (n + FEW)  # the mean of few chains is mostly noise
            moved = adapt(log_c, own_mean, rule.target(part), gain)
            return jnp.where(counted, log_c, moved) if rule.warmup else moved

        return list(map(of, self.kernel.kernels, log_scale, list(mean)))


def _extent(density: AnnealedDensity, block: tuple[str, ...]) -> tuple[int, float]:
    """How many numbers these sites are, and the most factors, by their powers, that any of them is in."""
    size = sum(math.prod(density.sites[name].shape) for name in block)
    powers = [np.max(density.top.power[name]) for name in block if name in density.top.power]
    return max(size, 1), float(max(1.0, *powers)) if powers else 1.0
