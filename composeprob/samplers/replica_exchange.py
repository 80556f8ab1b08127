"""Replica exchange: chains at all levels at once, which swap what they hold with their neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import log_ndtr
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.kernels import MALA, Adaptive, Estimated, Kernel, mean_acceptance
from composeprob.kernels.gibbs import parts_of
from composeprob.pytree import where
from composeprob.samplers.blocks import by_kind
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles, Transitions, Tuning
from composeprob.samplers.random import Stream, key_of, normals, stream, threefry
from composeprob.samplers.run import Records, Run
from composeprob.samplers.sampler import Sampler, check_kernel, initial_point, needs
from composeprob.samplers.spread import host
from composeprob.samplers.swap import NEEDS, Swap, default_swap, distinct_levels, equal_rejection
from composeprob.samplers.visits import Pace, Visits
from composeprob.schedule import Noise


class Ensemble(eqx.Module):
    """One chain of the sampler: a replica on every rung.

    Attributes:
        replicas: each leaf of shape (L, …), rung 0 the cleanest.
        from_top: whether each replica was on the top rung since it last was on rung 0, (L,).
        trips: how many replicas came from the top to rung 0, a scalar.
    """

    replicas: Particles
    from_top: Array
    trips: Array


class Rungs(eqx.Module):
    """What all ensembles share.

    Attributes:
        levels: where replicas are, (L,), rung 0 the cleanest.
        tuning: of each block there, log c of shape (L,).
        turns: made so far, a scalar: what random numbers are counted by.
        sweeps: how many of them swapped, since the rungs were placed.
        probability: sums over these sweeps, of each rung's swap with the one above it, which is tried every other time,
            and of the acceptance of its transitions, (L, 1 + B).
    """

    levels: Array
    tuning: tuple[Tuning, ...]
    turns: Array
    sweeps: Array
    probability: Array

    @property
    def means(self) -> tuple[Array, Array]:
        """Mean probabilities of swaps, (L − 1,), and of transitions, (L, B)."""
        tries = (self.sweeps + 1 - jnp.arange(len(self.levels) - 1) % 2) // 2
        swaps, transitions = self.probability[:-1, 0], self.probability[:, 1:]
        return swaps / jnp.maximum(tries, 1), transitions / jnp.maximum(self.sweeps, 1)


class ReplicaExchange(Sampler):
    r"""Ensembles of replicas, one at each of L levels, that move there and swap with their neighbours.

    A sweep tries to swap each second pair of neighbours, the even pairs and the odd ones in turn, and then makes one
    transition of the kernel on every rung. What is swapped is not x itself: each replica proposes for the other's level
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
        for name, value, least in (("num_levels", num_levels, 2), ("sweeps", sweeps, tuning.RUNGS.rounds)):
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if value is not None and not (whole and value >= least):
                raise InvalidValueError(
                    f"{name} must be a whole number ≥ {least}; got {value!r}.", fix=f"for example {name}={least * 10}."
                )
        self.kernel, self.num_levels, self.swap, self.sweeps = kernel, num_levels, swap, int(sweeps)
        self.steps_per_level, self.step, self.weights, self.meet = 1, None, None, None
        self.then, self.check_levels, self.moves = (), False, None

    # What it needs, and what it costs

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        swapping = {} if self.swap is None else {f"ReplicaExchange(swap='{self.swap}')": NEEDS[self.swap]}
        return swapping if self.kernel is None else {**swapping, **needs(self.kernel)}

    def needs_parts(self, density: AnnealedDensity) -> bool:
        return self.swap != "energy"

    def prepare(self, density: AnnealedDensity) -> ReplicaExchange:
        where, swap, kernel = density.described.where, self.swap or default_swap(density), self.kernel
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
        count = min(tuning.RUNGS.default, density.num_levels) if self.num_levels is None else self.num_levels
        if not 2 <= count <= density.num_levels:
            raise InvalidValueError(
                f"{count} rungs do not fit on {density.num_levels} levels.",
                where=where,
                fix="compile with more levels (schedule=), or pass a smaller num_levels.",
            )
        prepared, moves = ReplicaExchange(kernel, count, swap, self.sweeps), Transitions.resolved(kernel, 1, density)
        return eqx.tree_at(lambda s: s.moves, prepared, moves, is_leaf=lambda node: node is None)

    @property
    def _prepared(self) -> tuple[Transitions, int]:
        """The transitions and L."""
        assert self.moves is not None
        assert self.num_levels is not None
        return self.moves, self.num_levels

    def first_level(self, density: AnnealedDensity) -> int:
        return density.num_levels - 1

    def visits(self, density: AnnealedDensity, pace: Pace | None) -> Visits:
        log_snr = np.asarray(density.schedule.log_snr, np.float64)
        levels = np.searchsorted(-log_snr, -np.linspace(log_snr[0], log_snr[-1], self._prepared[1]))
        return Visits.given(
            np.asarray(distinct_levels(jnp.asarray(levels), density.num_levels))[::-1], density.num_levels
        )

    def evaluations(self, first_level: int, completed: int) -> int:
        (_, count), (evaluations, _, _) = self._prepared, self.drawing
        arrived = self.sweeps * evaluations + (tuning.RUNGS.rounds - 1) * count
        return completed * evaluations + (arrived if completed == count else 0)

    @property
    def drawing(self) -> tuple[int, int, int]:
        moves, count = self._prepared
        return count * (1 + moves.kernel.evaluations_per_step), count * (1 + len(moves.blocks)), 0

    def proposals(self) -> int:
        return self.drawing[1]

    # What it does

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        layout, (moves, count) = Layout.of_density(density), self._prepared
        blank = layout.unevaluated(density, self.needs_parts(density))

        def replica(words: Array) -> Particles:
            return self.initial_particle(blank, words, initial_point(layout, density, level, words))

        def ensemble(words: Array) -> Ensemble:
            replicas = jnp.stack(threefry(stream(words, Stream.INITIAL), jnp.arange(count, dtype=jnp.uint32)), axis=1)
            return Ensemble(jax.vmap(replica)(replicas), jnp.zeros(count, bool), jnp.int32(0))

        tuning = jax.tree.map(lambda scale: jnp.full(count, scale), moves.untuned(len(run.ancestors)))
        none = jnp.int32(0), jnp.int32(0), jnp.zeros((count, 1 + len(moves.blocks)))
        rungs, records = Rungs(jnp.full(count, level, jnp.int32), tuning, *none), run.records
        records = Records.empty(records.ess.shape[0], len(moves.blocks))
        return dataclasses.replace(run, chains=run.spread.map(ensemble, run.words), tuning=(rungs,), records=records)

    def advance(self, run: Run, density: AnnealedDensity, end: Array | int) -> Run:
        visit = partial(self._visit, density)
        return jax.lax.while_loop(lambda run: run.visits.before(end), visit, run)

    def _visit(self, density: AnnealedDensity, run: Run) -> Run:
        """All replicas that have not reached their rung come from the level above to this one; at level 0, where all
        have, the sweeps before the first sample follow."""
        rounds = tuning.RUNGS.rounds
        (at, _), (_, count), each = run.visits.now, self._prepared, self.sweeps // rounds
        until = (rounds - 1) * (each + 1)  # the last turn that places rungs anew, the arrival being turn 0

        def next_turn(t: Array, run: Run) -> Run:
            (rungs,) = run.tuning
            comes, places = t == 0, (t > 0) & (t <= until) & (rungs.sweeps == each)
            size = jnp.where(t <= until, each, self.sweeps - (rounds - 1) * each)
            order = jnp.maximum(run.visits.order[:count][::-1], at)
            place = lambda rungs: self._placed(rungs, density)  # noqa: E731
            stay = lambda rungs: (jnp.where(comes, order, rungs.levels), rungs.tuning)  # noqa: E731
            levels, tuning = jax.lax.cond(places, place, stay, rungs)
            run = dataclasses.replace(run, tuning=(dataclasses.replace(rungs, tuning=tuning),))
            adapts = comes | ~places & (rungs.sweeps < size // 2)
            return Turn(self, density, run, levels, ~(comes | places)).made(adapts, ~places)

        def arrived(run: Run) -> Run:
            (rungs,) = run.tuning
            order = jnp.zeros_like(run.visits.order).at[:count].set(rungs.levels[::-1])
            chains = dataclasses.replace(run.chains, trips=jnp.zeros_like(run.chains.trips))
            run = dataclasses.replace(run, chains=chains, visits=dataclasses.replace(run.visits, order=order))
            return self._with_records(run, density)

        run = jax.lax.fori_loop(0, jnp.where(at == 0, 1 + self.sweeps + rounds - 1, 1), next_turn, run)
        run = jax.lax.cond(at == 0, arrived, lambda run: run, run)
        return dataclasses.replace(run, visits=run.visits.onwards(density.schedule, run.records))

    def _placed(self, rungs: Rungs, density: AnnealedDensity) -> tuple[Array, tuple[Tuning, ...]]:
        """Levels between which neighbours would swap equally often, and what is tuned at the present ones there."""
        levels = equal_rejection(rungs.levels, rungs.means[0], density, self.swap == "energy")
        return levels, jax.tree.map(lambda c: jnp.interp(levels, rungs.levels, c), rungs.tuning)

    def draw(self, run: Run, density: AnnealedDensity, i: Array, thin: Array) -> Run:
        def sweep(_: Array, run: Run) -> Run:
            every = jnp.asarray(True)
            return Turn(self, density, run, run.tuning[0].levels, every).made(~every, every)

        return self._with_records(jax.lax.fori_loop(0, thin, sweep, run), density)

    def _with_records(self, run: Run, density: AnnealedDensity) -> Run:
        """The run with what its sweeps came to in its records."""
        (rungs,), (moves, _) = run.tuning, self._prepared
        levels, (swaps, acceptance) = rungs.levels, rungs.means
        steps = moves.steps_in_x(rungs.tuning, density.schedule.at(levels))
        records = run.records.at(levels, acceptance=acceptance, step_size=steps).at(levels[:-1], swaps=swaps)
        return dataclasses.replace(run, records=records)

    def positions(self, run: Run, density: AnnealedDensity) -> Position:
        alpha = density.schedule.at(run.tuning[0].levels[0]).alpha
        return Layout.of_density(density).position(run.chains.replicas.points[:, 0], alpha)

    def log_densities(self, run: Run) -> Array | None:
        value = run.chains.replicas.evaluation.log_density
        return None if value is None else value[:, 0]

    def round_trips(self, run: Run) -> float:
        return float(np.mean(host(run.chains.trips)))

    def describe(self) -> str:
        kernel = "no kernel" if self.kernel is None else repr(self.kernel)
        rungs = "" if self.num_levels is None else f", {self.num_levels} rungs"
        return f"ReplicaExchange({kernel}{rungs}, swap={self.swap!r}, {self.sweeps} sweeps)"


Carry = tuple[Ensemble, Array, dict[int, PyTree[Array]], Array]
"""A turn in progress: chains as far as they are, where every replica is evaluated next, (n, L, D), trajectories by
block, and probabilities of swaps and transitions, (n, L, 1 + B)."""


class Turn:
    """A turn of all replicas, while it is traced: a bridge, to new levels or for a swap, and a transition.

    It is a loop around ONE place where the density is evaluated, on all rungs: where bridges lead, and then at each
    point of each block's trajectory. Only kernels that evaluate the density themselves have a place of their own.
    """

    def __init__(self, sampler: ReplicaExchange, density: AnnealedDensity, run: Run, levels: Array, swaps: Array):
        """The turn that leads to these levels, (L,), where replicas are already if it ``swaps``."""
        (self.rungs,), self.run, self.density, (self.moves, _) = run.tuning, run, density, sampler._prepared
        self.levels, self.swaps, self.parts = levels, swaps, sampler.needs_parts(density)
        self.noise, self.swap = density.schedule.at(levels), Swap.of_density(density, not self.parts)
        rungs = jnp.arange(len(levels))
        partner = rungs + jnp.where((rungs + self.rungs.sweeps) % 2 == 0, 1, -1)
        self.partner = jnp.where(swaps & (partner >= 0) & (partner < len(levels)), partner, rungs)
        self.opaque = not all(kernel.resumable for kernel in self.moves.kernel.kernels)
        self.blocks = () if self.opaque else self.moves.sequence
        self.number = self.rungs.turns.astype(jnp.uint32) * (2 + len(self.moves.blocks))  # of the turn's first draw

    def made(self, adapts: Array, transits: Array) -> Run:
        """The run after it; without a transition unless it ``transits``."""
        run, rungs, moves, chains = self.run, self.rungs, self.moves, self.run.chains
        counts = [moves.kernel.kernels[b].evaluations_per_step for b in self.blocks]
        phases = [(0, 0)] + [(place, i) for place, count in enumerate(counts, 1) for i in range(count)]
        probability = jnp.zeros((len(run.words), len(self.levels), 1 + len(moves.blocks)))
        carry: Any = (chains, chains.replicas.points, {}, probability)
        for b in self.blocks:
            carry = jax.eval_shape(partial(self._begin, b), carry)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), carry[2])
        carry, phase = (chains, chains.replicas.points, blank, probability), partial(self._phase, jnp.asarray(phases))
        carry = jax.lax.fori_loop(0, jnp.where(transits, len(phases), 1), phase, carry)
        if self.opaque:
            carry = jax.lax.cond(transits, self._transition, lambda same: same, carry)
        num_chains, never = len(run.ancestors), jnp.asarray(False)
        means, tuning = mean_acceptance(carry[3], run.spread.total, num_chains), []
        for b, known in enumerate(rungs.tuning):
            adapted = moves.adapted(b, known.log_scale, means[:, 1 + b], num_chains, never)
            tuning.append(Tuning(jnp.where(adapts, adapted, known.log_scale), known.metric))
        sums = where(self.swaps, (rungs.sweeps + 1, rungs.probability + means), (jnp.int32(0), 0 * means))
        rungs = Rungs(self.levels, tuple(tuning), rungs.turns + 1, *sums)
        return dataclasses.replace(run, chains=carry[0], tuning=(rungs,))

    def _phase(self, phases: Array, p: Array, carry: Carry) -> Carry:
        """One evaluation of every replica, and what leads to it and follows from it."""
        place, i = phases[p]

        def evaluate(_: object, noise: Noise, v: Array) -> Evaluation:
            return self.moves.layout.evaluate(self.density, v, noise.index, self.parts)

        begins: list[Any] = [self._bridge, *(partial(self._begin, b) for b in self.blocks)]
        afters: list[Any] = [self._met, *(partial(self._advance, b, i) for b in self.blocks)]
        carry = jax.lax.switch(jnp.where(i == 0, place, len(begins)), [*begins, lambda same: same], carry)
        return jax.lax.switch(place, afters, carry, self._replicas(evaluate, carry[1]))

    def _replicas(self, function: Callable[..., PyTree[Array]], *batch: PyTree[Array]) -> PyTree[Array]:
        """``function`` of every replica, given what is tuned on its rung and the noise: (n, L, …) → (n, L, …)."""
        on_rungs = jax.vmap(function)
        return self.run.spread.map(lambda *rows: on_rungs(self.rungs.tuning, self.noise, *rows), *batch)

    def _normals(self, draw: int, size: int) -> Array:
        """Standard normal numbers of one of the turn's draws, (n, L, size)."""
        shape, dtype = (len(self.levels), size), self.run.chains.replicas.points.dtype
        numbers = partial(normals, number=self.number + draw, size=shape[0] * size, dtype=dtype)
        return self.run.spread.map(lambda words: numbers(words).reshape(shape), self.run.words)

    def _bridge(self, carry: Carry) -> Carry:
        """Where each rung's replica, or that of its partner, leads."""
        start = self.density.schedule.at(self.rungs.levels[self.partner])

        def ensemble(replicas: Particles, z: Array) -> Array:
            v, found = jax.tree.map(lambda leaf: leaf[self.partner], (replicas.points, replicas.evaluation))
            return jax.vmap(self.swap.propose)(start, self.noise, v, found, z)

        chains, _, trajectory, probability = carry
        query = self.run.spread.map(ensemble, chains.replicas, self._normals(0, self.swap.power.size))
        return chains, query, trajectory, probability

    def _met(self, carry: Carry, found: Evaluation) -> Carry:
        """Replicas where bridges ended: all that came to new levels, and of swaps those that are accepted."""
        rungs, (chains, query, trajectory, probability) = jnp.arange(len(self.levels)), carry

        def ensemble(chains: Ensemble, query: Array, found: Evaluation, z: Array) -> tuple[Ensemble, Array]:
            now = chains.replicas.points, chains.replicas.evaluation
            log_ratio = self.swap.log_ratios(self.noise, self.partner, *now, query, found)
            taken = log_ndtr(z[jnp.minimum(rungs, self.partner), 0]) <= log_ratio  # a number for each pair; not NaN
            replicas = jax.vmap(where)(taken | ~self.swaps, (query, found), now)
            from_top = chains.from_top[jnp.where(taken, self.partner, rungs)].at[-1].set(True)
            trips = chains.trips + from_top[0]
            tried = (self.partner > rungs) & ~jnp.isnan(log_ratio)
            probability = jnp.where(tried, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
            return Ensemble(Particles(*replicas, chains.replicas.inner), from_top.at[0].set(False), trips), probability

        chains, swapped = self.run.spread.map(ensemble, chains, query, found, self._normals(1, 1))
        return chains, query, trajectory, probability.at[..., 0].set(swapped)

    def _begin(self, b: int, carry: Carry) -> Carry:
        """Block b's transition of every replica, up to its first evaluation."""
        (chains, _, trajectory, probability), noise = carry, self._normals(2 + b, self.moves.noise_size(b))
        begun, query = self._replicas(partial(self.moves.begin, b), chains.replicas, noise)
        return chains, query, {**trajectory, b: begun}, probability

    def _advance(self, b: int, i: Array, carry: Carry, found: Evaluation) -> Carry:
        """Block b's transition after its evaluation i: on to the next one, or accepted or rejected after the last."""
        (chains, query, trajectory, probability), count = carry, self.moves.kernel.kernels[b].evaluations_per_step
        batch = chains.replicas, trajectory[b], found

        def on() -> Carry:
            along, query = self._replicas(partial(self.moves.advance, b, i), *batch)
            return chains, query, {**trajectory, b: along}, probability

        def accept() -> Carry:
            replicas, info = self._replicas(partial(self.moves.finish, b), *batch)
            accepted = probability.at[..., 1 + b].set(info.acceptance)
            return dataclasses.replace(chains, replicas=replicas), query, trajectory, accepted

        return accept() if count == 1 else jax.lax.cond(i == count - 1, accept, on)

    def _transition(self, carry: Carry) -> Carry:
        """A whole transition of kernels that call the density themselves, such as BlackJAX's."""
        (chains, query, trajectory, probability), count = carry, len(self.levels)
        split = lambda words: jax.random.split(key_of(words, self.number + 2), count)  # noqa: E731
        keys, step = self.run.spread.map(split, self.run.words), partial(self.moves.step, self.density, self.parts)
        replicas, info = self._replicas(step, keys, chains.replicas)
        accepted = probability.at[..., 1:].set(info.acceptance)
        return dataclasses.replace(chains, replicas=replicas), query, trajectory, accepted
