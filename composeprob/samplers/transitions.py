"""Kernel transitions of all chains at one level, with step sizes (of each block, if any) adapted across chains."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Target
from composeprob.kernels import Adaptive, Info, Kernel, KernelState, adapt, mean_acceptance, resolve, scaled_step
from composeprob.kernels.scaled import in_units, target_in_units
from composeprob.samplers.base import Records, Run
from composeprob.samplers.spread import Spread
from composeprob.schedule import Schedule

FEW = 16
"""Number of chains at which the gain of adaptation is halved."""

SETTLING = 50
"""Transitions at level 0 that adapt step sizes before draws are taken."""


class Tally(eqx.Module):
    """What the transitions of each chain add up to: sums over them, (n,), or (n, B) for a kernel of B blocks.

    Attributes:
        acceptance: of the acceptance probabilities.
        error: of acceptance × quadrature error: over all transitions that is the mean over accepted moves, without
            the noise of which were accepted.
        non_finite: number of moves, (n,).
    """

    acceptance: Array
    error: Array
    non_finite: Array

    def adding(self, info: Info, counted: Array) -> Tally:
        """One chain's tally after one more transition; those not ``counted`` can only be non-finite."""
        error = jnp.where(info.acceptance > 0, info.acceptance * info.quadrature_error, 0.0)
        return Tally(
            self.acceptance + jnp.where(counted, info.acceptance, 0.0),
            self.error + jnp.where(counted, error, 0.0),
            self.non_finite + jnp.sum(info.non_finite, dtype=jnp.int32),
        )

    def over(self, spread: Spread, count: Array | int, num_chains: int, errors: bool) -> tuple[Array, Array, Array]:
        """Over all chains and ``count`` transitions: mean acceptance, mean error of accepted moves (0 unless there are
        ``errors``), number of non-finite moves."""
        acceptance = mean_acceptance(self.acceptance / count, spread.total, num_chains)
        error = jnp.mean(spread.gather(self.error), axis=0) / count if errors else jnp.zeros_like(acceptance)
        return acceptance, error / acceptance, spread.total(self.non_finite)


class Transitions(eqx.Module):
    """A kernel with its number of transitions a level; numbers resolved for one schedule.

    A kernel of B blocks has B step sizes, log c and acceptances, in arrays of shape (B,); one without blocks has
    scalars.

    Attributes:
        kernel: the kernel, the step size of each part an array (K,) or `Adaptive`.
        count: transitions a level whose acceptance is recorded.
        static: static sites whose step does not shrink with the level's noise while that of others in their block
            does; empty where the user gave step sizes.
        follows: for each part, whether its adaptive step shrinks with the level's noise.
        noised: whether any site is.
    """

    kernel: Kernel
    count: int = eqx.field(static=True)
    static: frozenset[str] = eqx.field(static=True)
    follows: tuple[bool, ...] = eqx.field(static=True)
    noised: bool = eqx.field(static=True)

    @classmethod
    def resolved(cls, kernel: Kernel, count: int, density: AnnealedDensity) -> Transitions:
        """Check the sites and the step sizes against the density, before anything is compiled."""
        kernel.check_sites(density.sites)
        rules, static, follows = [], set(), []
        for part, block in zip(kernel.parts, kernel.blocks or (tuple(density.sites),), strict=True):
            steps = resolve(part.step_size, density.schedule, part)
            adaptive = isinstance(part.step_size, Adaptive)
            rules.append(part.step_size if adaptive else steps)
            still = {name for name in block if density.sites[name].kind == "static"}
            follows.append(not kernel.blocks or still != set(block))
            if adaptive and follows[-1]:
                static |= still
        noised = any(site.kind == "noised" for site in density.sites.values())
        return cls(kernel.with_steps(rules), count, frozenset(static), tuple(follows), noised)

    @property
    def adaptive(self) -> tuple[Adaptive | None, ...]:
        """For each part how its step size adapts; None where it is given."""
        rules = (part.step_size for part in self.kernel.parts)
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

    def begin(self, run: Run) -> Run:
        """The run with log c where it starts, and records of the shape that this kernel has."""
        log_scale = self._joined([rule.log_scale if rule else jnp.zeros(()) for rule in self.adaptive])
        records = run.records
        if self.kernel.blocks:
            records = Records.empty(records.ess.shape[0], len(self.follows))
        return dataclasses.replace(run, log_scale=log_scale, records=records)

    def steps(self) -> Array:
        """Step sizes at each level where all are given: (K,), or (K, B) for a kernel of B blocks."""
        return self._joined([part.step_size for part in self.kernel.parts])

    def run(
        self,
        spread: Spread,
        keys: Array,
        states: KernelState,
        target: Target,
        schedule: Schedule,
        level: Array,
        log_scale: Array,
        records: Records,
        bad: Array | None = None,
    ) -> tuple[KernelState, Array, Records]:
        """All transitions of one level.

        Args:
            spread: which chains these are.
            keys: this level's key of every chain, (n,).
            states: every chain's state, evaluated under ``target``.
            target: the level's density.
            schedule, level: where we are.
            log_scale: log c as the neighbouring level left it.
            records: written at ``level``.
            bad: whether each chain's move to this level was non-finite, (n,).
        """
        sigma, warmup = schedule.at(level).sigma, self.total - self.count
        units, back = self.units(sigma)
        scaled_target, num_chains = target_in_units(target, units), spread.number_of(keys)

        def transition(i: Array, carry: Any) -> Any:
            states, log_scale, tally, steps = carry
            step_size, counted = self._step_size(log_scale, sigma, level), i >= warmup
            states, tally, acceptance = self._move(spread, keys, i, states, scaled_target, step_size, tally, counted)
            if any(self.adaptive):
                mean = mean_acceptance(acceptance, spread.total, num_chains)
                log_scale = self._adapted(log_scale, mean, num_chains, counted)
            return states, log_scale, tally, steps + jnp.where(counted, step_size, 0.0)

        start = (in_units(states, units), log_scale, self.blank_tally(keys, bad), jnp.zeros_like(log_scale))
        states, log_scale, tally, steps = jax.lax.fori_loop(0, self.total, transition, start)
        acceptance, error, non_finite = tally.over(spread, self.count, num_chains, self.kernel.integrates_score)
        records = Records(
            records.acceptance.at[level].set(acceptance),
            records.step_size.at[level].set(steps / self.count),
            records.ess,
            records.ancestors,
            records.non_finite.at[level].add(non_finite),
            records.quadrature_error.at[level].set(error),
        )
        return in_units(states, back), log_scale, records

    def units(self, sigma: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """Units that static sites are measured in at a level of noise σ while its transitions last, and their inverse.

        Noised sites live at the level's scale σ_k, static ones at a scale that does not change with the level: a step
        h_k ∝ σ_k^p suits both when static sites are measured in units of 1/σ_k.
        """
        unit = 1.0 / sigma
        return dict.fromkeys(self.static, unit), dict.fromkeys(self.static, 1.0 / unit)

    def blank_tally(self, keys: Array, bad: Array | None = None) -> Tally:
        """Nothing counted yet of the chains of these keys."""
        shape = (len(keys), len(self.follows)) if self.kernel.blocks else (len(keys),)
        zero = jnp.zeros(shape)
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
        states: KernelState,
        target: Target,
        schedule: Schedule,
        log_scale: Array,
        i: Array,
        thin: Array,
    ) -> tuple[KernelState, Array, Tally]:
        """The transitions that lead to draw i at level 0: ``thin`` of them, before the first one `settling` ones too.

        Args:
            spread, keys, schedule: as for `run`; the keys are others than those of a level.
            states: every chain's state, evaluated under ``target``.
            target: of level 0.
            log_scale: log c, which no longer changes once it has settled.
            i, thin: numbers at run time.

        Returns:
            The states, log c, and the tally of the ``thin`` transitions.
        """
        sigma, num_chains, settled = schedule.at(0).sigma, spread.number_of(keys), jnp.int32(self.settling)
        units, back = self.units(sigma)
        scaled = target_in_units(target, units)

        def transition(t: Array, carry: Any) -> Any:
            states, log_scale, recent, tally = carry
            step_size, counted = self._step_size(log_scale, sigma, jnp.int32(0)), t >= settled
            states, tally, acceptance = self._move(spread, keys, t, states, scaled, step_size, tally, counted)
            if not self.settling:
                return states, log_scale, recent, tally

            def adapt_once(log_c: Array, recent: Array) -> tuple[Array, Array]:
                mean = mean_acceptance(acceptance, spread.total, num_chains)
                log_c = self._adapted(log_c, mean, num_chains, jnp.asarray(False))
                recent = recent + jnp.where(2 * t >= settled, log_c, 0.0)
                # What it is left at is the mean of the second half: less noise than the last one has.
                return jnp.where(t == settled - 1, recent / (settled - settled // 2), log_c), recent

            log_scale, recent = jax.lax.cond(counted, lambda *same: same, adapt_once, log_scale, recent)
            return states, log_scale, recent, tally

        begin = jnp.where(i == 0, 0, settled + i * thin)
        start = (in_units(states, units), log_scale, jnp.zeros_like(log_scale), self.blank_tally(keys))
        states, log_scale, _, tally = jax.lax.fori_loop(begin, settled + (i + 1) * thin, transition, start)
        return in_units(states, back), log_scale, tally

    def recorded(
        self,
        spread: Spread,
        records: Records,
        schedule: Schedule,
        log_scale: Array,
        tally: Tally,
        before: Array,
        count: Array,
    ) -> Records:
        """Level 0's records with ``count`` transitions of `draw` more, after those of the level and ``before``."""
        num_chains = spread.number_of(tally.non_finite)
        acceptance, error, non_finite = tally.over(spread, count, num_chains, self.kernel.integrates_score)
        share = count / (self.count + before + count)
        old, new = (1 - share) * records.acceptance[0], share * acceptance
        errors = jnp.where(old > 0, old * records.quadrature_error[0], 0.0) + jnp.where(new > 0, new * error, 0.0)
        step_size = self._step_size(log_scale, schedule.at(0).sigma, jnp.int32(0))
        return Records(
            records.acceptance.at[0].set(old + new),
            records.step_size.at[0].set((1 - share) * records.step_size[0] + share * step_size),
            records.ess,
            records.ancestors,
            records.non_finite.at[0].add(non_finite),
            records.quadrature_error.at[0].set(errors / (old + new)),
        )

    def _move(
        self,
        spread: Spread,
        keys: Array,
        i: Array,
        states: KernelState,
        target: Target,
        step_size: Array,
        tally: Tally,
        counted: Array,
    ) -> tuple[KernelState, Tally, Array]:
        """Transition i of every chain, with the acceptance of each."""

        def one(key: Array, state: KernelState, tally: Tally) -> tuple[KernelState, Tally, Array]:
            state, info = self.kernel.step(jax.random.fold_in(key, i), state, target, step_size)
            return state, tally.adding(info, counted), info.acceptance

        return spread.map(one, keys, states, tally)

    def _step_size(self, log_scale: Array, sigma: Array, level: Array) -> Array:
        """The step size in force."""

        def of(part: Any, log_c: Array, follows: bool) -> Array:
            if not isinstance(part.step_size, Adaptive):
                return part.step_size[level]
            return scaled_step(log_c, sigma if follows else jnp.ones_like(sigma), part)

        return self._joined(list(map(of, self.kernel.parts, self._split(log_scale), self.follows)))

    def _adapted(self, log_scale: Array, mean: Array, n: int, counted: Array) -> Array:
        """log c after a transition of n chains with this mean acceptance; ends a warm-up if ``counted``."""

        def of(part: Any, log_c: Array, own_mean: Array) -> Array:
            rule = part.step_size
            if not isinstance(rule, Adaptive):
                return log_c
            gain = rule.gain * n / (n + FEW)  # the mean of few chains is mostly noise
            moved = adapt(log_c, own_mean, rule.target(part), gain)
            return jnp.where(counted, log_c, moved) if rule.warmup else moved

        return self._joined(list(map(of, self.kernel.parts, self._split(log_scale), self._split(mean))))

    def _split(self, joined: Array) -> list[Array]:
        return [joined[..., b] for b in range(len(self.follows))] if self.kernel.blocks else [joined]

    def _joined(self, parts: list[Any]) -> Array:
        return jnp.stack(parts, axis=-1) if self.kernel.blocks else parts[0]
