"""Replica exchange: chains at all levels at once, which swap what they hold with their neighbours."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.kernels import MALA, Adaptive, Estimated, Kernel, adapt, mean_acceptance, scaled_step
from composeprob.kernels.gibbs import GibbsState, parts_of
from composeprob.samplers.annealed_mcmc import check_kernel, needs, unevaluated
from composeprob.samplers.base import Run, Sampler, level_keys
from composeprob.samplers.blocks import by_kind
from composeprob.samplers.rungs import Ensemble, Rungs, apart, evened
from composeprob.samplers.spread import Spread, host
from composeprob.samplers.swaps import NEEDS, Swap, best, swapped
from composeprob.samplers.transitions import Transitions
from composeprob.samplers.tuning import in_metrics, untuned
from composeprob.samplers.visits import Pace, Visits

DEFAULT = 24
"""Rungs, or as many levels as there are."""
ROUNDS = 4
"""After each of which, but the last, the rungs are placed anew."""


class ReplicaExchange(Sampler):
    r"""Ensembles of replicas, one at each of L levels, that move there and swap with their neighbours.

    A sweep makes one transition of the kernel on every rung and then tries to swap each second pair of neighbours, the
    even pairs and the odd ones in turn. What is swapped is not x itself: each replica proposes for the other's level
    what noise, or a reverse step, makes of it, and the pair is accepted by the ratio of `Swap`, so that with energies
    all levels keep their π_k exactly. A mode that is found at a noisy level so comes down, again and again, in the
    proportions of π_0: no resampling, no copies. One chain of the result is one ensemble, and what it gives is its
    replica at level 0: draws of a Markov chain, to be judged by R̂ and effective sample size.

    Chains come down the rungs first, then make ``sweeps`` sweeps, in four rounds, in which step sizes adapt and the
    rungs move to where neighbours swap equally often. Then nothing adapts any more. For draws pass ``draws=`` to
    `infer`; each is ``thin`` sweeps from the one before.

    Cost: L·(1 + evaluations of the kernel's transition) for a sweep.

    Args:
        kernel: moves replicas; left out, ``MALA(Adaptive())`` where the density has an energy, else none.
        num_levels: L, rungs, placed among the density's levels; left out, 24 or all that there are.
        swap: ``"energy"`` needs log-densities that can be trusted between modes (analytic or calibrated factors);
            ``"feynman_kac"`` needs scores and the rate. Left out, the first where it can be.
        sweeps: before the first sample.

    Result:
        ``result.swaps`` is the mean probability of swaps with the next noisier rung, ``result.round_trips`` how many
        replicas came from the top to level 0, per ensemble: below a few, modes' shares are those of the way down.

    References:
        Geyer 1991; Syed, Bouchard-Côté, Deligiannidis and Doucet 2022, *Non-reversible parallel tempering*, for
        even and odd sweeps in turn and rungs of equal rejection. *CREPE* (ICLR 2026) for path weights.

    Example:
        >>> import composeprob as cp
        >>> cp.ReplicaExchange(cp.MALA(0.01), num_levels=8, swap="energy").describe()
        "ReplicaExchange(MALA(step_size=0.01), 8 rungs, swap='energy', 200 sweeps)"
    """

    kernel: Kernel | None
    num_levels: int | None = eqx.field(static=True)
    swap: str | None = eqx.field(static=True)
    sweeps: int = eqx.field(static=True)

    def __init__(
        self, kernel: Kernel | None = None, num_levels: int | None = None, swap: str | None = None, sweeps: int = 200
    ):
        if kernel is not None:
            check_kernel(kernel, 1)
            if any(isinstance(getattr(part, "metric", None), Estimated) for part in parts_of(kernel)):
                raise InvalidValueError(
                    "ReplicaExchange cannot measure a metric.", fix="leave metric out, or pass one that is given."
                )
        if swap is not None and swap not in NEEDS:
            raise InvalidValueError(f"Unknown swap {swap!r}.", fix=f"use one of: {', '.join(NEEDS)}.")
        for name, value, least in (("num_levels", num_levels, 2), ("sweeps", sweeps, ROUNDS)):
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if value is not None and not (whole and value >= least):
                raise InvalidValueError(
                    f"{name} must be a whole number ≥ {least}; got {value!r}.", fix=f"for example {name}={least * 10}."
                )
        self.kernel, self.num_levels, self.swap, self.sweeps = kernel, num_levels, swap, int(sweeps)
        self.moves = None

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        swapping = {} if self.swap is None else {f"ReplicaExchange(swap='{self.swap}')": NEEDS[self.swap]}
        return swapping if self.kernel is None else {**swapping, **needs(self.kernel)}

    def prepare(self, density: AnnealedDensity) -> ReplicaExchange:
        where, swap, kernel = density.described.where, self.swap or best(density), self.kernel
        if any(site.kind == "held" for site in density.sites.values()):
            raise CapabilityError(
                "ReplicaExchange moves chains from level to level, but a latent here must stay at its prior draw.",
                where=where,
                fix="use cp.AnnealedMCMC, whose chains are independent.",
            )
        if kernel is None:
            if "energy" not in density.capabilities:
                raise CapabilityError(
                    "ReplicaExchange needs a kernel where a factor offers only its score.",
                    where=where,
                    fix="pass one, such as cp.MALA(cp.Adaptive(), log_ratio=cp.LineIntegral()).",
                )
            kernel = by_kind(lambda: MALA(Adaptive()), density)
        count = min(DEFAULT, density.num_levels) if self.num_levels is None else self.num_levels
        if not 2 <= count <= density.num_levels:
            raise InvalidValueError(
                f"{count} rungs do not fit on {density.num_levels} levels.",
                where=where,
                fix="compile with more levels (schedule=), or pass a smaller num_levels.",
            )
        made = ReplicaExchange(kernel, count, swap, self.sweeps)
        moves = Transitions.resolved(kernel, 1, density)
        return eqx.tree_at(lambda s: s.moves, made, moves, is_leaf=lambda node: node is None)

    def first_level(self, density: AnnealedDensity) -> int:
        return density.num_levels - 1

    def visits(self, density: AnnealedDensity, pace: Pace | None) -> Visits:
        assert self.num_levels is not None
        log_snr = np.asarray(density.schedule.log_snr, np.float64)
        wanted = np.linspace(log_snr[0], log_snr[-1], self.num_levels)
        levels = np.searchsorted(-log_snr, -wanted)
        return Visits.of(np.asarray(apart(jnp.asarray(levels), density.num_levels))[::-1], density.num_levels)

    def evaluations(self, first_level: int, completed: int) -> int:
        assert self.moves is not None
        assert self.num_levels is not None
        down = completed * self.num_levels * (1 + self.moves.kernel.evaluations_per_step)
        arrived = completed == self.num_levels
        return down + (self.sweeps * self.drawing[0] + (ROUNDS - 1) * self.num_levels if arrived else 0)

    @property
    def drawing(self) -> tuple[int, int, int]:
        assert self.moves is not None
        assert self.num_levels is not None
        moves = len(self.moves.follows)
        return self.num_levels * (1 + self.moves.kernel.evaluations_per_step), self.num_levels * (1 + moves), 0

    def proposals(self) -> int:
        return self.drawing[1]

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        assert self.moves is not None
        assert self.num_levels is not None
        count, kernel, swap = self.num_levels, self.moves.kernel, self._swap
        target = unevaluated(swap.target(density, jnp.int32(level)))

        def one(key: Array) -> Ensemble:
            def replica(key: Array) -> GibbsState:
                first, other = jax.random.split(key)
                return kernel.init(other, density.initial(first, level), target)

            states = jax.vmap(replica)(jax.random.split(key, count))
            return Ensemble(states, jnp.zeros(count, bool), jnp.int32(0))

        chains = run.spread.map(one, level_keys(run.keys, density.num_levels))
        blank = self.moves.begin(run, jax.tree.map(lambda leaf: leaf[:, 0], chains.states.position))
        rules = [part.step_size for part in kernel.kernels]
        scales = jnp.stack([r.log_scale if isinstance(r, Adaptive) else jnp.zeros(()) for r in rules])
        rungs = Rungs(
            run.visits.order[count - 1 :: -1][:count],
            jnp.tile(scales, (count, 1)),
            jnp.int32(0),
            jnp.zeros(count - 1),
            jnp.zeros((count, len(rules))),
        )
        return dataclasses.replace(blank, chains=chains, tuning=(rungs,))

    def visit(self, run: Run, density: AnnealedDensity, level: Array, above: Array) -> Run:
        """All replicas that have not reached their rung come from the level above to this one; at level 0, where all
        have, the sweeps before the first sample are made."""
        keys, (rungs,) = level_keys(run.keys, level), run.tuning
        start, end = jnp.maximum(rungs.levels, above), jnp.maximum(rungs.levels, level)
        chains = self._placed(run.spread, keys, run.chains, density, start, end)
        standing = dataclasses.replace(rungs, levels=end)
        chains, acceptance = self._move(run.spread, keys, jnp.int32(0), chains, density, standing)
        rungs = dataclasses.replace(rungs, log_scale=self._adapted(rungs.log_scale, acceptance, len(run.ancestors)))
        run = dataclasses.replace(run, chains=chains, tuning=(rungs,))
        return jax.lax.cond(level == 0, lambda run: self._warmed(run, density), lambda run: run, run)

    def draw(self, run: Run, density: AnnealedDensity, i: Array, thin: Array) -> Run:
        sweep = lambda t, run: self._sweep(run, density, self.sweeps + i * thin + t, jnp.asarray(False))  # noqa: E731
        return self._recorded(jax.lax.fori_loop(0, thin, sweep, run), density)

    def positions(self, run: Run) -> dict[str, Array]:
        return jax.tree.map(lambda leaf: leaf[:, 0], run.chains.states.position)

    def round_trips(self, run: Run) -> float:
        return float(np.mean(host(run.chains.trips)))

    def describe(self) -> str:
        kernel = "no kernel" if self.kernel is None else repr(self.kernel)
        rungs = "" if self.num_levels is None else f", {self.num_levels} rungs"
        return f"ReplicaExchange({kernel}{rungs}, swap={self.swap!r}, {self.sweeps} sweeps)"

    @property
    def _swap(self) -> Swap:
        return Swap(self.swap == "energy")

    def _placed(
        self, spread: Spread, keys: Array, chains: Ensemble, density: AnnealedDensity, start: Array, end: Array
    ) -> Ensemble:
        """Every replica after a hop from its level of ``start`` to that of ``end``, where they differ, evaluated."""
        assert self.moves is not None
        kernel, swap = self.moves.kernel, self._swap

        def replica(key: Array, state: GibbsState, start: Array, end: Array) -> GibbsState:
            x = state.position
            hop = swap.hop(x, state.evaluation, density, start, end).draw(key, x, density, end)
            moved: Position = jax.tree.map(lambda new, old: jnp.where(start == end, old, new), hop, x)
            return kernel.relevel(dataclasses.replace(state, position=moved), swap.target(density, end))

        def one(key: Array, ensemble: Ensemble) -> Ensemble:
            split = jax.random.split(jax.random.fold_in(key, 1), len(start))
            return dataclasses.replace(ensemble, states=jax.vmap(replica)(split, ensemble.states, start, end))

        return spread.map(one, keys, chains)

    def _move(
        self, spread: Spread, keys: Array, i: Array, chains: Ensemble, density: AnnealedDensity, rungs: Rungs
    ) -> tuple[Ensemble, Array]:
        """One transition of every replica, and the mean acceptance on each rung, (L, B)."""
        moves, swap = self.moves, self._swap
        assert moves is not None
        plain = untuned(moves.kernel, jax.tree.map(lambda leaf: leaf[:, 0], chains.states.position), len(keys))

        def replica(key: Array, state: GibbsState, level: Array, log_scale: Array) -> tuple[GibbsState, Array]:
            sigma = density.schedule.at(level).sigma
            kernel = in_metrics(moves.kernel, plain, dict.fromkeys(moves.static, 1.0 / sigma))
            steps = self._steps(log_scale, sigma, level)
            state, info = kernel.step(key, state, swap.target(density, level), steps)
            return state, info.acceptance

        def one(key: Array, ensemble: Ensemble) -> tuple[Ensemble, Array]:
            split = jax.random.split(jax.random.fold_in(key, i), len(rungs.levels))
            states, acceptance = jax.vmap(replica)(split, ensemble.states, rungs.levels, rungs.log_scale)
            return dataclasses.replace(ensemble, states=states), acceptance

        chains, acceptance = spread.map(one, keys, chains)
        return chains, mean_acceptance(acceptance, spread.total, spread.number_of(keys))

    def _sweep(self, run: Run, density: AnnealedDensity, i: Array, adapts: Array) -> Run:
        """A transition on every rung, then swaps."""
        keys, (rungs,), swap = level_keys(run.keys, density.num_levels + 2), run.tuning, self._swap
        count = len(run.ancestors)
        chains, acceptance = self._move(run.spread, keys, 2 * i, run.chains, density, rungs)

        def one(key: Array, ensemble: Ensemble) -> tuple[Ensemble, Array]:
            key = jax.random.fold_in(key, 2 * i + 1)
            states, came, chance = swapped(key, ensemble.states, rungs.levels, i % 2, swap, density)
            from_top = ensemble.from_top[came].at[-1].set(True)
            trips = ensemble.trips + from_top[0]
            return Ensemble(states, from_top.at[0].set(False), trips), chance[:-1]

        chains, chance = run.spread.map(one, keys, chains)
        tried = jnp.arange(len(rungs.levels) - 1) % 2 == i % 2
        mean = mean_acceptance(jnp.where(tried, chance, 0.0), run.spread.total, run.spread.number_of(keys))
        n = rungs.sweeps
        log_scale = jnp.where(adapts, self._adapted(rungs.log_scale, acceptance, count), rungs.log_scale)
        rungs = Rungs(
            rungs.levels,
            log_scale,
            n + 1,
            (n * rungs.chance + 2 * mean) / (n + 1),  # each pair tries every other time
            (n * rungs.acceptance + acceptance) / (n + 1),
        )
        return dataclasses.replace(run, chains=chains, tuning=(rungs,))

    def _warmed(self, run: Run, density: AnnealedDensity) -> Run:
        """Sweeps in which step sizes adapt, in rounds after which rungs are placed anew."""
        each = self.sweeps // ROUNDS
        last = self.sweeps - (ROUNDS - 1) * each

        def round_(r: Array, run: Run) -> Run:
            (rungs,) = run.tuning
            begun = dataclasses.replace(
                rungs, sweeps=jnp.int32(0), chance=0 * rungs.chance, acceptance=0 * rungs.acceptance
            )
            run = dataclasses.replace(run, tuning=(begun,))
            size = jnp.where(r == ROUNDS - 1, last, each)
            sweep = lambda t, run: self._sweep(run, density, r * each + t, t < size // 2)  # noqa: E731
            run = jax.lax.fori_loop(0, size, sweep, run)
            return jax.lax.cond(r < ROUNDS - 1, lambda run: self._replaced(run, density, r), lambda run: run, run)

        run = jax.lax.fori_loop(0, ROUNDS, round_, run)
        (rungs,) = run.tuning
        order = jnp.zeros_like(run.visits.order).at[: len(rungs.levels)].set(rungs.levels[::-1])
        chains = dataclasses.replace(run.chains, trips=0 * run.chains.trips)
        run = dataclasses.replace(run, chains=chains, visits=dataclasses.replace(run.visits, order=order))
        return self._recorded(run, density)

    def _replaced(self, run: Run, density: AnnealedDensity, r: Array) -> Run:
        """The rungs where neighbours would swap equally often, and the replicas on them."""
        (rungs,) = run.tuning
        levels = evened(rungs, density, self._swap.energies)
        keys = level_keys(run.keys, density.num_levels + 3 + r)
        chains = self._placed(run.spread, keys, run.chains, density, rungs.levels, levels)
        scale = jax.vmap(lambda c: jnp.interp(levels, rungs.levels, c), 1, 1)(rungs.log_scale)
        new = dataclasses.replace(rungs, levels=levels, log_scale=scale)
        return dataclasses.replace(run, chains=chains, tuning=(new,))

    def _adapted(self, log_scale: Array, acceptance: Array, count: int) -> Array:
        """log c on each rung after a transition with this mean acceptance, (L, B)."""
        assert self.moves is not None
        columns = []
        for b, part in enumerate(self.moves.kernel.kernels):
            c, rule = log_scale[:, b], part.step_size
            if isinstance(rule, Adaptive):
                c = adapt(c, acceptance[:, b], rule.target(part), rule.gain * count / (count + 16))
            columns.append(c)
        return jnp.stack(columns, axis=1)

    def _steps(self, log_scale: Array, sigma: Array, level: Array) -> list[Array]:
        """The step size of each block at one level, or at several: log c is (…, B), σ and levels are (…)."""
        assert self.moves is not None

        def of(b: int, part: Any, follows: bool) -> Array:
            if not isinstance(part.step_size, Adaptive):
                return part.step_size[level]
            return scaled_step(log_scale[..., b], sigma if follows else jnp.ones_like(sigma), part)

        return [of(b, *each) for b, each in enumerate(zip(self.moves.kernel.kernels, self.moves.follows, strict=True))]

    def _recorded(self, run: Run, density: AnnealedDensity) -> Run:
        """The run with what its rungs say in its records."""
        assert self.moves is not None
        (rungs,), records = run.tuning, run.records
        sigma = density.schedule.levels.sigma[rungs.levels]
        steps = self._steps(rungs.log_scale, sigma, rungs.levels)
        records = dataclasses.replace(
            records,
            acceptance=records.acceptance.at[rungs.levels].set(rungs.acceptance),
            step_size=records.step_size.at[rungs.levels].set(jnp.stack(steps, axis=1)),
            swaps=records.swaps.at[rungs.levels[:-1]].set(rungs.chance),
        )
        return dataclasses.replace(run, records=records)
