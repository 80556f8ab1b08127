"""Replica exchange: chains at all levels at once, which swap what they hold with their
neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.arguments import check_count
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.kernels import MALA, Adaptive, Info, Kernel, mean_acceptance
from composeprob.kernels.gibbs import measures_metric, replaced
from composeprob.kernels.kernel import log_density_of
from composeprob.kernels.metropolis import accept, log_uniform
from composeprob.pytree import all_finite, where
from composeprob.samplers.descent import Carry, Descent, LevelState, PhaseContext
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles, by_kind
from composeprob.samplers.random import threefry
from composeprob.samplers.run import Pace, Run, Visits
from composeprob.samplers.sampler import Sampler, check_kernel, initial_point
from composeprob.samplers.spread import Tree, host
from composeprob.samplers.step import Step
from composeprob.samplers.weights import incremental_log_weight
from composeprob.schedule import Noise

NEEDS = {
    "energy": frozenset({"score", "energy", "mode_depth"}),
    "feynman_kac": frozenset({"score", "feynman_kac"}),
}
"""What each kind of swap asks of a density."""


class Swap(eqx.Module):
    """How neighbouring replicas exchange places: how a swap is proposed, and how it is
    weighed.

    With y at level a and y' at b, candidates c at a, from y', and c' at b, from y, take
    their places with probability min(1, R). By energies, R =
    π_a(c)·π_b(c')·k(y'|c)·k(y|c') / (π_a(y)·π_b(y')·k(c|y')·k(c'|y)), k the law of
    `Step.bridge` for the total power of the factors: every level keeps its π (Ballard
    and Jarzynski 2009). By Feynman–Kac path weights, which are those of DDPM's step,
    log R is what the way down gains, less what the way up does (*CREPE*, ICLR 2026): it
    needs scores and rates only, and is right as the levels' distance goes to 0.
    """

    kind: str | None = eqx.field(
        static=True
    )  # of `NEEDS`; None for the first one that can be
    power: Array | None = None  # P of the bridge at each level, (K, d), once `resolved`

    def __check_init__(self) -> None:
        if self.kind is not None and self.kind not in NEEDS:
            raise InvalidValueError(
                f"Unknown swap {self.kind!r}.", fix=f"use one of: {', '.join(NEEDS)}."
            )

    @property
    def energies(self) -> bool:
        """Whether by energies."""
        return self.kind == "energy"

    def resolved(self, density: AnnealedDensity) -> Swap:
        """The same for this density; where the user named no kind by energies, if they
        can be trusted."""
        layout, levels = Layout.of_density(density), jnp.arange(density.num_levels)
        power = jax.vmap(lambda level: layout.power(density, level))(levels)
        for kind, needed in NEEDS.items():
            if self.kind == kind or (
                self.kind is None and needed <= density.capabilities
            ):
                return Swap(kind, power if kind == "energy" else jnp.ones_like(power))
        raise CapabilityError(
            "Swaps need log-densities that can be trusted between modes, or a Feynman–Kac rate, and this program has "
            "neither.",
            where=density.described.where,
            fix="use cp.AnnealedMCMC, or calibrate the factors with cp.calibrate.",
        )

    def propose(
        self, start: Noise, end: Noise, v: Array, found: Evaluation, noise: Array
    ) -> Array:
        """Where a replica at v, (D,), goes from a level to another; static entries, and
        one that is there, stay."""
        (law, drift), d = self._bridge(start, end, found), noise.size
        moved = law.draw(v[:d], drift, noise)
        stays = (start.index == end.index) | ~all_finite(moved)
        return jnp.concatenate([jnp.where(stays, v[:d], moved), v[d:]])

    def log_ratios(
        self,
        noise: Noise,
        partner: Array,
        points: Array,
        here: Evaluation,
        candidates: Array,
        there: Evaluation,
    ) -> Array:
        """log R of the swaps of rungs at this noise with their partners, (L,); NaN
        where it is of no use: replicas are at ``points``, (L, D), and what is to take
        their places, made of their partners, are the ``candidates``."""
        others = jax.tree.map(lambda leaf: leaf[partner], (noise, points, here))
        half = jax.vmap(self.half)(noise, candidates, there, *others)
        if self.energies:
            half = half + log_density_of(there) - log_density_of(here)
        half = jnp.where(jax.vmap(all_finite)((candidates, there.score)), half, jnp.nan)
        return jnp.where(
            partner == jnp.arange(len(partner)), jnp.nan, half + half[partner]
        )

    def half(
        self,
        end: Noise,
        c: Array,
        there: Evaluation,
        start: Noise,
        v: Array,
        here: Evaluation,
    ) -> Array:
        """What the candidate c, made of v, adds to log R, beside energies: on the way
        up a gain is minus that down."""
        if not self.energies:
            return incremental_log_weight(here.terms, there.terms, start, end)
        (forth, drift), (back, drift_back) = (
            self._bridge(start, end, here),
            self._bridge(end, start, there),
        )
        y, c = v[: drift.size], c[: drift.size]
        return back.log_density(y, c, drift_back) - forth.log_density(c, y, drift)

    def _bridge(
        self, start: Noise, end: Noise, found: Evaluation
    ) -> tuple[Step, Array]:
        """The law that leads from a level to another, and the drift that it follows,
        none up."""
        assert self.power is not None
        drift = (
            found.score[: self.power.shape[1]] if self.energies else found.terms.drift
        )
        law = Step.bridge(
            start.variance,
            end.variance,
            self.power[jnp.maximum(start.index, end.index)],
        )
        return law, jnp.where(end.index < start.index, drift, 0.0)


class Replicas(Particles):
    """Ensembles of a replica on every rung, one a chain: arrays of `Particles` with a
    second axis, (N, L, …)."""

    from_top: Array = eqx.field(
        kw_only=True
    )  # whether it was on the top rung since it last was on rung 0, (N, L)
    trips: Array = eqx.field(
        kw_only=True
    )  # how often it came from the top to rung 0, (N, L)


class Rungs(Visits):
    """Visits of an ensemble's replicas, which come down to their rungs, rung 0 the
    cleanest, and stay there.

    All replicas make turns. In turn t < L those that have not reached their rung come
    to level `order` [t]. Sweeps follow, which swap, in rounds; after each round but the
    last a turn places the rungs anew.
    """

    levels: Array  # where the turn in progress leads, (L,)
    previous: Array  # where it begins, (L,)
    turns: Array  # made so far: what random numbers are counted by
    # Sums over the sweeps of a round, of each rung's swap with the one above it, which
    # is tried every other time, and of the acceptance of its transitions, (L, 1 + B).
    probability: Array
    planned: int = eqx.field(static=True)  # sweeps before the first sample

    @property
    def now(self) -> tuple[Array, Array]:
        return self.levels, self.previous

    @property
    def number(self) -> Array:
        return self.turns

    @property
    def comes(self) -> Array:
        """Whether the turn leads replicas down to their rungs for the first time."""
        return self.turns < len(self.levels)

    @property
    def plan(self) -> tuple[Array, Array, Array]:
        """How many sweeps the round has had, whether the turn places rungs anew, and
        whether step sizes adapt: all the way down, and in the first half of each
        round."""
        size, last, turn = (
            self.planned // tuning.RUNGS.rounds,
            tuning.RUNGS.rounds - 1,
            self.turns - len(self.levels),
        )
        number = jnp.clip(turn // (size + 1), 0, last)
        sweeps = turn - number * (size + 1)
        places = (number < last) & (sweeps == size)
        return (
            sweeps,
            places,
            sweeps < jnp.where(number < last, size, self.planned - last * size) // 2,
        )

    @property
    def swaps(self) -> Array:
        """Whether the turn is a sweep."""
        return ~(self.comes | self.plan[1])

    @property
    def first_sample(self) -> int:
        """Turns before the first sample."""
        return len(self.levels) + self.planned + tuning.RUNGS.rounds - 1

    @property
    def partner(self) -> Array:
        """The rung that each swaps with, even pairs and odd ones in turn, (L,); itself
        where it has none."""
        rungs = jnp.arange(len(self.levels))
        partner = rungs + jnp.where((rungs + self.plan[0]) % 2 == 0, 1, -1)
        return jnp.where(
            self.swaps & (partner >= 0) & (partner < len(rungs)), partner, rungs
        )

    @property
    def means(self) -> tuple[Array, Array]:
        """Mean probabilities of swaps, (L − 1,), and of transitions, (L, B), in the
        sweeps of the round."""
        (sweeps, _, _), odd = self.plan, jnp.arange(len(self.levels) - 1) % 2
        swaps, transitions = self.probability[:-1, 0], self.probability[:, 1:]
        return swaps / jnp.maximum(
            (sweeps + 1 - odd) // 2, 1
        ), transitions / jnp.maximum(sweeps, 1)

    def following(
        self, transitions: Array, density: AnnealedDensity, energies: bool
    ) -> Rungs:
        """The next turn, after one with these mean probabilities of transitions, (L,
        B)."""
        count, sums = len(self.levels), self.probability.at[:, 1:].add(transitions)
        sums = jnp.where(self.swaps, sums, 0.0)
        new = dataclasses.replace(
            self, previous=self.levels, turns=self.turns + 1, probability=sums
        )
        made, (_, places, _) = jnp.minimum(new.turns, count - 1), new.plan
        down = jnp.maximum(
            self.order[:count][::-1], self.order[made]
        )  # those that reached their rung wait there
        placed = equal_rejection(self.levels, new.means[0], density, energies)
        levels = jnp.where(new.comes, down, jnp.where(places, placed, self.levels))
        order = self.order.at[:count].set(
            jnp.where(new.comes, self.order[:count], self.levels[::-1])
        )
        made = made + (new.turns >= self.first_sample)
        return dataclasses.replace(new, order=order, made=made, levels=levels)


def rungs_of(run: Run) -> Rungs:
    """The visits of a run of this sampler."""
    assert isinstance(run.visits, Rungs)
    return run.visits


def replica_words(count: int, words: Array) -> Array:
    """Random words of each of an ensemble's replicas, (L, 2)."""
    return jnp.stack(threefry(words, jnp.arange(count, dtype=jnp.uint32)), axis=1)


class Exchange(Descent):
    """A turn of all replicas in the phases of a level: a bridge, to new levels or for a
    swap, and a transition."""

    exchange: Swap  # type: ignore[assignment]

    def __post_init__(self, run: Run) -> None:
        super().__post_init__(run)
        self.count = len(run.visits.now[0])
        self.total, self.adapting = 1, 0  # a warm-up is that of the way down
        self.noise_size = max(
            self.noise_size, self.layout.dims + 1
        )  # a bridge's, and what decides a swap
        self.words = self.spread.map(partial(replica_words, self.count), run.words)

    def at_level(
        self, run: Run, now: PhaseContext, function: Callable[..., Tree]
    ) -> Callable[..., Tree]:
        setting, on_rungs = (run.tuning, now.end), jax.vmap(function)
        return lambda *rows: on_rungs(setting, *rows)

    def predict(self, run: Run, level: LevelState, now: PhaseContext) -> LevelState:
        """Where each rung's replica, or that of its partner, leads."""
        partner, d = rungs_of(run).partner, self.layout.dims
        start = jax.tree.map(lambda leaf: leaf[partner], now.start)

        def ensemble(points: Array, found: Evaluation, z: Array) -> Array:
            v, here = jax.tree.map(lambda leaf: leaf[partner], (points, found))
            return jax.vmap(self.exchange.propose)(start, now.end, v, here, z)

        query = self.spread.map(
            ensemble, run.chains.position, run.chains.evaluation, now.normals[..., :d]
        )
        return dataclasses.replace(level, query=query)

    def arrived(
        self, run: Run, level: LevelState, now: PhaseContext, found: Evaluation
    ) -> Carry:
        """Replicas where bridges ended: all that came to new levels, and of swaps those
        that are accepted."""
        rungs, partner, index = (
            rungs_of(run),
            rungs_of(run).partner,
            jnp.arange(self.count),
        )

        def ensemble(
            old: Replicas, query: Array, found: Evaluation, z: Array
        ) -> tuple[Replicas, Array]:
            here, there = (old.position, old.evaluation), (query, found)
            log_ratio = self.exchange.log_ratios(now.end, partner, *here, *there)
            log_u = log_uniform(
                z[jnp.minimum(index, partner)]
            )  # a number for each pair
            taken, probability = accept(log_u, log_ratio)
            points, evaluation = jax.vmap(where)(taken | ~rungs.swaps, there, here)
            origin = jnp.where(taken, partner, index)
            from_top = old.from_top[origin].at[-1].set(True)
            trips = old.trips[origin].at[0].add(from_top[0])
            probability = jnp.where(partner > index, probability, 0.0)
            from_top = from_top.at[0].set(False)
            return Replicas(
                points, evaluation, old.inner, from_top=from_top, trips=trips
            ), probability

        batch = run.chains, level.query, found, now.normals[..., self.layout.dims]
        chains, swapped = self.spread.map(ensemble, *batch)
        swapped = mean_acceptance(swapped, self.spread.total, self.num_chains)
        rungs = dataclasses.replace(
            rungs, probability=rungs.probability.at[:, 0].add(swapped)
        )
        return dataclasses.replace(run, chains=chains, visits=rungs), level

    def made(
        self,
        b: int,
        run: Run,
        level: LevelState,
        now: PhaseContext,
        chains: Particles,
        info: Info,
    ) -> Carry:
        made, level = super().made(b, run, level, now, chains, info)
        return dataclasses.replace(
            made, tuning=where(rungs_of(run).plan[2], made.tuning, run.tuning)
        ), level

    def leave(self, run: Run, level: LevelState, now: PhaseContext) -> Run:
        """The turn is made, and recorded; another one follows."""
        transitions = mean_acceptance(
            level.tally.acceptance, self.spread.total, self.num_chains
        )
        rungs = rungs_of(run).following(
            transitions, self.density, self.exchange.energies
        )
        at, (swaps, acceptance) = rungs.previous, rungs.means
        steps = self.moves.steps_in_x(run.tuning, now.end)
        records = jax.tree.map(
            jnp.asarray, type(run.records).empty(len(rungs.order), len(run.tuning))
        )
        records = records.at(at, acceptance=acceptance, step_size=steps).at(
            at[:-1], swaps=swaps
        )
        tuned = jax.tree.map(
            lambda c: jnp.where(rungs.plan[1], jnp.interp(rungs.levels, at, c), c),
            run.tuning,
        )
        trips = jnp.where(rungs.turns == rungs.first_sample, 0, run.chains.trips)
        chains = dataclasses.replace(run.chains, trips=trips)
        return dataclasses.replace(
            run, chains=chains, tuning=tuned, records=records, visits=rungs
        )


class ReplicaExchange(Sampler):
    r"""Ensembles of replicas, one at each of L levels, that move there and swap with
    their neighbours.

    A sweep tries to swap each second pair of neighbours, the even pairs and the odd
    ones in turn, and then makes one transition of the kernel on every rung. What is
    swapped is not x itself: each replica proposes for the other's level what noise, or
    a reverse step, makes of it, and the pair is accepted by the ratio of `Swap`, so
    that with energies all levels keep their π_k exactly. A mode that is found at a
    noisy level so comes down, again and again, in the proportions of π_0: no
    resampling, no copies. One chain of the result is one ensemble, and what it gives is
    its replica at level 0: draws of a Markov chain, to be judged by R̂ and effective
    sample size.

    Chains come down the rungs first, then make ``sweeps`` sweeps, in four rounds, in
    which step sizes adapt and the rungs move to where neighbours swap equally often.
    Then nothing adapts any more. For draws pass ``draws=`` to `infer`; each is ``thin``
    sweeps from the one before.

    Cost: L·(1 + evaluations of the kernel's transition) for a sweep.

    Args:
        kernel: left out, ``MALA(Adaptive())``, which needs an energy; of tens of
            numbers ``HMC(Adaptive(), 4)``.
        num_levels: L, rungs, placed among the density's levels; left out, 24 or all
            that there are.
        swap: ``"energy"`` needs log-densities that can be trusted between modes
            (analytic or calibrated factors); ``"feynman_kac"`` needs scores and the
            rate. Left out, the first where it can be.
        sweeps: before the first sample.

    Result:
        ``result.levels["swaps"]`` is the mean probability of swaps with the next
        noisier rung, ``result.about.round_trips`` how many replicas came from the top
        to level 0, per ensemble: below a few, modes' shares are those of the way down.

    References:
        Geyer 1991; Syed, Bouchard-Côté, Deligiannidis and Doucet 2022, *Non-reversible
        parallel tempering*, for even and odd sweeps in turn and rungs of equal
        rejection. *CREPE* (ICLR 2026) for path weights.

    Example:
        >>> import composeprob as cp
        >>> cp.ReplicaExchange(cp.MALA(0.01), num_levels=8, swap="energy").describe()
        "ReplicaExchange(MALA(step_size=0.01), 8 rungs, swap='energy', 200 sweeps)"
    """

    meet: Swap = Swap(None)  # type: ignore[assignment]
    num_levels: int = eqx.field(
        default=None, static=True
    )  # None until `prepare`, unless the user gave it
    sweeps: int = eqx.field(default=200, static=True)

    descent: ClassVar[type[Descent]] = Exchange

    def __init__(
        self,
        kernel: Kernel | None = None,
        num_levels: int | None = None,
        swap: str | None = None,
        sweeps: int = 200,
    ):
        check_kernel(kernel, 1, optional=True)
        if measures_metric(kernel):
            raise InvalidValueError(
                "ReplicaExchange cannot measure a metric.",
                fix="leave metric out, or pass one that is given.",
            )
        self.sweeps = check_count(sweeps, "sweeps", tuning.RUNGS.rounds)
        self.num_levels = (
            None if num_levels is None else check_count(num_levels, "num_levels", 2)
        )  # type: ignore[assignment]
        super().__init__(kernel, 1, meet=Swap(swap))  # type: ignore[arg-type]

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        kind = self.meet.kind
        swaps = {} if kind is None else {f"ReplicaExchange(swap='{kind}')": NEEDS[kind]}
        return swaps | super().requires

    def needs_terms(self, density: AnnealedDensity) -> bool:
        return not self.meet.energies

    def prepare(self, density: AnnealedDensity) -> Sampler:
        where, swap, kernel = (
            density.described.where,
            self.meet.resolved(density),
            self.kernel,
        )
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
        count = (
            min(tuning.RUNGS.default, density.num_levels)
            if self.num_levels is None
            else self.num_levels
        )
        if not 2 <= count <= density.num_levels:
            raise InvalidValueError(
                f"{count} rungs do not fit on {density.num_levels} levels.",
                where=where,
                fix="compile with more levels (schedule=), or pass a smaller num_levels.",
            )
        return Sampler.prepare(
            replaced(self, kernel=kernel, num_levels=count, meet=swap), density
        )

    def visits(self, density: AnnealedDensity, pace: Pace | None) -> Rungs:
        count, log_snr = (
            self.num_levels,
            np.asarray(density.schedule.log_snr, np.float64),
        )
        levels = np.searchsorted(-log_snr, -np.linspace(log_snr[0], log_snr[-1], count))
        order = np.asarray(distinct_levels(jnp.asarray(levels), density.num_levels))[
            ::-1
        ]
        given, top = Visits.given(order, density.num_levels), jnp.full(count, order[0])
        sums = jnp.zeros((count, 1 + len(self.moves.blocks)))
        return Rungs(
            given.order, given.made, None, top, top, given.made, sums, self.sweeps
        )

    @property
    def drawing(self) -> tuple[int, int, int]:
        evaluations, blocks = (
            self.moves.kernel.evaluations_per_step,
            len(self.moves.blocks),
        )
        return self.num_levels * (1 + evaluations), self.num_levels * (1 + blocks), 0

    def evaluations(self, completed: int) -> int:
        sweeps = (
            self.sweeps + tuning.RUNGS.rounds - 1 if completed == self.num_levels else 0
        )
        return (completed + sweeps) * self.drawing[0]

    def proposals(self) -> int:
        return self.drawing[1]

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        layout, moves, count = Layout.of_density(density), self.moves, self.num_levels
        blank = layout.unevaluated(density, self.needs_terms(density))

        def replica(words: Array) -> Particles:
            return self.initial_particle(
                blank, words, initial_point(layout, density, level, words)
            )

        def ensemble(words: Array) -> Replicas:
            chains, trips = (
                jax.vmap(replica)(replica_words(count, words)),
                jnp.zeros(count, jnp.int32),
            )
            return Replicas(
                chains.position,
                chains.evaluation,
                chains.inner,
                from_top=trips > 0,
                trips=trips,
            )

        tuning = jax.tree.map(
            lambda scale: jnp.full(count, scale), moves.untuned(len(run.ancestors))
        )
        records = type(run.records).empty(density.num_levels, len(moves.blocks))
        return dataclasses.replace(
            run,
            chains=run.spread.map(ensemble, run.words),
            tuning=tuning,
            records=records,
        )

    def draw(self, run: Run, density: AnnealedDensity, i: Array, thin: Array) -> Run:
        way, end = self.way(density, run), rungs_of(run).turns + thin
        carry = run, way.blank(run)
        return jax.lax.while_loop(
            lambda carry: rungs_of(carry[0]).turns < end, way.phase, carry
        )[0]

    def positions(self, run: Run, density: AnnealedDensity) -> Position:
        lowest = jax.tree.map(lambda leaf: leaf[:, 0], run.chains)
        return super().positions(dataclasses.replace(run, chains=lowest), density)

    def log_densities(self, run: Run) -> Array | None:
        value = run.chains.evaluation.log_density
        return None if value is None else value[:, 0]

    def round_trips(self, run: Run) -> float:
        return float(np.mean(np.sum(host(run.chains.trips), axis=1)))

    def describe(self) -> str:
        kernel = "no kernel" if self.kernel is None else repr(self.kernel)
        rungs = "" if self.num_levels is None else f", {self.num_levels} rungs"
        return f"ReplicaExchange({kernel}{rungs}, swap={self.meet.kind!r}, {self.sweeps} sweeps)"


def equal_rejection(
    levels: Array, swaps: Array, density: AnnealedDensity, energies: bool
) -> Array:
    """Levels between which neighbours would be refused equally often, (L,), by the mean
    probabilities of swaps at the present ones, (L − 1,). With path weights, whose error
    follows from the levels' distance, that counts for two thirds."""
    between = jnp.maximum(1 - swaps, tuning.RUNGS.least_rejection)
    if not energies:
        distance = -jnp.diff(jnp.asarray(density.schedule.log_snr)[levels])
        between = between / jnp.sum(between) + 2 * distance / jnp.sum(distance)
    barrier = jnp.concatenate([jnp.zeros(1), jnp.cumsum(between)])
    wanted = jnp.interp(
        jnp.linspace(0, barrier[-1], len(levels)), barrier, levels.astype(barrier.dtype)
    )
    return distinct_levels(jnp.round(wanted).astype(jnp.int32), density.num_levels)


def distinct_levels(levels: Array, num_levels: int) -> Array:
    """Rising levels moved as little as it takes to be L different ones from 0 to K − 1,
    these two among them."""
    index = jnp.arange(len(levels))
    levels = index + jax.lax.cummax(levels - index)  # each above the one below it
    top = (
        num_levels - len(levels) + index
    )  # and none so high that those above it have no room
    return (
        jnp.minimum(levels, top)
        .at[0]
        .set(0)
        .at[-1]
        .set(num_levels - 1)
        .astype(jnp.int32)
    )
