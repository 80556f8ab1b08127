"""Replica exchange: chains at all levels at once, which swap places with their
neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

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
from composeprob.samplers.sampler import (
    DrawCost,
    Sampler,
    check_kernel,
    initial_point,
)
from composeprob.samplers.spread import Tree, host
from composeprob.samplers.step import Step
from composeprob.samplers.weights import incremental_log_weight
from composeprob.schedule import Noise

NEEDS = {
    "energy": frozenset({"score", "energy", "mode_depth"}),
    "feynman_kac": frozenset({"score", "feynman_kac"}),
}
"""Capabilities that a density must have for each kind of swap."""


class Swap(eqx.Module):
    """Rule by which neighbouring replicas exchange places: proposal and accept ratio.

    With y at level a and y' at b, candidates c at a, from y', and c' at b, from y, take
    their places with probability min(1, R). By energies,

        R = π_a(c)·π_b(c')·k(y'|c)·k(y|c') / (π_a(y)·π_b(y')·k(c|y')·k(c'|y)),

    with k the law of `Step.bridge` for the total power of the factors: every level
    keeps its π (Ballard and Jarzynski 2009). By Feynman–Kac path weights, which are
    those of DDPM's step, log R is the log-weight increment of the way down less that of
    the way up (*CREPE*, ICLR 2026): it needs scores and rates only, and is right as the
    levels' distance goes to 0.
    """

    # A key of `NEEDS`; None for the first one that the density allows.
    kind: str | None = eqx.field(static=True)
    # P of the bridge at each level, (K, d), once `resolved`.
    power: Array | None = None

    def __check_init__(self) -> None:
        if self.kind is not None and self.kind not in NEEDS:
            raise InvalidValueError(
                f"Unknown swap {self.kind!r}.", fix=f"use one of: {', '.join(NEEDS)}."
            )

    @property
    def energies(self) -> bool:
        """True for swaps by energies."""
        return self.kind == "energy"

    def resolved(self, density: AnnealedDensity) -> Swap:
        """Return the rule for this density; where the user named no kind, by energies
        if these can be trusted."""
        layout = Layout.of_density(density)
        levels = jnp.arange(density.num_levels)
        power = jax.vmap(lambda level: layout.power(density, level))(levels)
        for kind, needed in NEEDS.items():
            usable = self.kind is None and needed <= density.capabilities
            if self.kind != kind and not usable:
                continue
            if not Swap(kind).energies:
                # Path weights are those of DDPM's step, whose power is 1.
                power = jnp.ones_like(power)
            return Swap(kind, power)
        raise CapabilityError(
            "Swaps need log-densities that can be trusted between modes, or a "
            "Feynman–Kac rate, and this program has neither.",
            where=density.described.where,
            fix="use cp.AnnealedMCMC, or calibrate the factors with cp.calibrate.",
        )

    def propose(
        self,
        start: Noise,
        end: Noise,
        v: Float[Array, " size"],
        evaluation: Evaluation,
        noise: Float[Array, " dims"],
    ) -> Float[Array, " size"]:
        """Return the candidate at level ``end`` that a replica at v, level ``start``,
        proposes. Static entries stay, and so does a replica that is at ``end``."""
        d = noise.size
        law, drift = self._bridge(start, end, evaluation)
        moved = law.draw(v[:d], drift, noise)
        stays = (start.index == end.index) | ~all_finite(moved)
        return jnp.concatenate([jnp.where(stays, v[:d], moved), v[d:]])

    def log_ratios(
        self,
        noise: Noise,
        partner: Int[Array, " rungs"],
        points: Float[Array, "rungs size"],
        here: Evaluation,
        candidates: Float[Array, "rungs size"],
        there: Evaluation,
    ) -> Float[Array, " rungs"]:
        """Return log R of the swap of each rung with its partner; NaN rejects.

        Args:
            noise: of each rung's level.
            partner: rung that each swaps with; itself where it has none.
            points: the replicas.
            here: their evaluations.
            candidates: made of the partners, to take the replicas' places.
            there: evaluations of the candidates.
        """
        others = jax.tree.map(lambda leaf: leaf[partner], (noise, points, here))
        half = jax.vmap(self.half_log_ratio)(noise, candidates, there, *others)
        if self.energies:
            half = half + log_density_of(there) - log_density_of(here)
        usable = jax.vmap(all_finite)((candidates, there.score))
        half = jnp.where(usable, half, jnp.nan)
        alone = partner == jnp.arange(len(partner))
        return jnp.where(alone, jnp.nan, half + half[partner])

    def half_log_ratio(
        self,
        end: Noise,
        c: Float[Array, " size"],
        there: Evaluation,
        start: Noise,
        v: Float[Array, " size"],
        here: Evaluation,
    ) -> Float[Array, ""]:
        """Return the terms of log R, beside energies, of the candidate c made of v. On
        the way up a log-weight increment is minus that on the way down."""
        if not self.energies:
            return incremental_log_weight(here.terms, there.terms, start, end)
        forth, drift = self._bridge(start, end, here)
        back, drift_back = self._bridge(end, start, there)
        y = v[: drift.size]
        c = c[: drift.size]
        return back.log_density(y, c, drift_back) - forth.log_density(c, y, drift)

    def _bridge(
        self, start: Noise, end: Noise, evaluation: Evaluation
    ) -> tuple[Step, Array]:
        """Return the law that leads from a level to another, and the drift that it
        follows, 0 on the way up."""
        assert self.power is not None
        if self.energies:
            drift = evaluation.score[: self.power.shape[1]]
        else:
            drift = evaluation.terms.drift
        power = self.power[jnp.maximum(start.index, end.index)]
        law = Step.bridge(start.variance, end.variance, power)
        return law, jnp.where(end.index < start.index, drift, 0.0)


class Replicas(Particles):
    """Ensembles of replicas, one replica on every rung and one ensemble a chain: arrays
    of `Particles` with a second axis, (N, L, …)."""

    # Whether each was on the top rung since it last was on rung 0, (N, L).
    from_top: Array = eqx.field(kw_only=True)
    # How often each came from the top to rung 0, (N, L).
    trips: Array = eqx.field(kw_only=True)


class RoundPlan(NamedTuple):
    """Place of a turn in its round of sweeps."""

    sweeps: Int[Array, ""]  # that the round has had
    places: Bool[Array, ""]  # the turn places the rungs anew
    # Step sizes adapt: all the way down, and in the first half of each round.
    adapts: Bool[Array, ""]


class RoundMeans(NamedTuple):
    """Mean probabilities over the sweeps of a round."""

    swaps: Float[Array, " neighbours"]  # of each rung with the next noisier one
    transitions: Float[Array, "rungs blocks"]


class Rungs(Visits):
    """Visits of an ensemble's replicas, which come down to their rungs, rung 0 the
    cleanest, and stay there.

    All replicas make turns. In turn t < L those that have not reached their rung come
    to level `order` [t]. Sweeps follow, which swap, in rounds; after each round but the
    last a turn places the rungs anew.
    """

    levels: Array  # where the turn in progress leads, (L,)
    previous: Array  # where it begins, (L,)
    turns: Array  # made so far: random numbers are counted by them
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
    def comes(self) -> Bool[Array, ""]:
        """True while replicas come down to their rungs for the first time."""
        return self.turns < len(self.levels)

    @property
    def plan(self) -> RoundPlan:
        """Place of the turn in its round, by the number of turns alone."""
        size = self.planned // tuning.RUNGS.rounds
        last = tuning.RUNGS.rounds - 1
        turn = self.turns - len(self.levels)
        # A round has `size` sweeps and a turn that places the rungs; the last one has
        # the sweeps that are left over, and places nothing.
        number = jnp.clip(turn // (size + 1), 0, last)
        sweeps = turn - number * (size + 1)
        in_round = jnp.where(number < last, size, self.planned - last * size)
        return RoundPlan(
            sweeps,
            places=(number < last) & (sweeps == size),
            adapts=sweeps < in_round // 2,
        )

    @property
    def swaps(self) -> Bool[Array, ""]:
        """True if the turn is a sweep."""
        return ~(self.comes | self.plan.places)

    @property
    def first_sample(self) -> int:
        """Number of turns before the first sample."""
        return len(self.levels) + self.planned + tuning.RUNGS.rounds - 1

    @property
    def partner(self) -> Int[Array, " rungs"]:
        """Rung that each rung swaps with, even pairs and odd pairs in turn; itself for
        a rung without a partner."""
        rungs = jnp.arange(len(self.levels))
        partner = rungs + jnp.where((rungs + self.plan.sweeps) % 2 == 0, 1, -1)
        exists = (partner >= 0) & (partner < len(rungs))
        return jnp.where(self.swaps & exists, partner, rungs)

    @property
    def means(self) -> RoundMeans:
        """Mean probabilities of swaps and transitions in the sweeps of the round."""
        sweeps = self.plan.sweeps
        odd = jnp.arange(len(self.levels) - 1) % 2
        tried = (sweeps + 1 - odd) // 2  # every other sweep, the even pairs first
        return RoundMeans(
            swaps=self.probability[:-1, 0] / jnp.maximum(tried, 1),
            transitions=self.probability[:, 1:] / jnp.maximum(sweeps, 1),
        )

    def following(
        self,
        transitions: Float[Array, "rungs blocks"],
        density: AnnealedDensity,
        energies: bool,
    ) -> Rungs:
        """Return the next turn, after one with these mean probabilities of
        transitions."""
        count = len(self.levels)
        sums = self.probability.at[:, 1:].add(transitions)
        new = dataclasses.replace(
            self,
            previous=self.levels,
            turns=self.turns + 1,
            probability=jnp.where(self.swaps, sums, 0.0),
        )
        made = jnp.minimum(new.turns, count - 1)
        # On the way down, replicas that have reached their rung wait there.
        down = jnp.maximum(self.order[:count][::-1], self.order[made])
        placed = equal_rejection(self.levels, new.means.swaps, density, energies)
        later = jnp.where(new.plan.places, placed, self.levels)
        order = jnp.where(new.comes, self.order[:count], self.levels[::-1])
        return dataclasses.replace(
            new,
            order=self.order.at[:count].set(order),
            made=made + (new.turns >= self.first_sample),
            levels=jnp.where(new.comes, down, later),
        )


def rungs_of(run: Run) -> Rungs:
    """Return the visits of a run of this sampler."""
    assert isinstance(run.visits, Rungs)
    return run.visits


def replica_words(count: int, words: UInt32[Array, " 2"]) -> UInt32[Array, "rungs 2"]:
    """Return random words for each of an ensemble's replicas."""
    return jnp.stack(threefry(words, jnp.arange(count, dtype=jnp.uint32)), axis=1)


class ReplicaDescent(Descent):
    """A turn of all replicas in the phases of a level: a bridge, to new levels or for a
    swap, and a transition."""

    exchange: Swap  # type: ignore[assignment]

    def __post_init__(self, run: Run) -> None:
        super().__post_init__(run)
        self.count = len(run.visits.now[0])
        # One transition a turn; a warm-up is that of the way down.
        self.total = 1
        self.adapting = 0
        # Numbers of a bridge, and one that decides a swap.
        self.noise_size = max(self.noise_size, self.layout.dims + 1)
        self.words = self.spread.map(partial(replica_words, self.count), run.words)

    def at_level(
        self, run: Run, context: PhaseContext, function: Callable[..., Tree]
    ) -> Callable[..., Tree]:
        setting = (run.tuning, context.end)
        on_rungs = jax.vmap(function)

        def of_ensemble(*replicas: Array) -> Tree:
            return on_rungs(setting, *replicas)

        return of_ensemble

    def predict(self, run: Run, level: LevelState, context: PhaseContext) -> LevelState:
        """Propose a candidate for each rung from its replica, or from that of its
        partner."""
        partner = rungs_of(run).partner
        start = jax.tree.map(lambda leaf: leaf[partner], context.start)

        def ensemble(points: Array, evaluation: Evaluation, z: Array) -> Array:
            v, here = jax.tree.map(lambda leaf: leaf[partner], (points, evaluation))
            return jax.vmap(self.exchange.propose)(start, context.end, v, here, z)

        noise = context.normals[..., : self.layout.dims]
        query = self.spread.map(
            ensemble, run.chains.position, run.chains.evaluation, noise
        )
        return dataclasses.replace(level, query=query)

    def arrived(
        self, run: Run, level: LevelState, context: PhaseContext, evaluation: Evaluation
    ) -> Carry:
        """Move replicas to where bridges ended: all that came to new levels, and of
        swaps those that are accepted."""
        rungs = rungs_of(run)
        partner = rungs.partner
        index = jnp.arange(self.count)

        def ensemble(
            old: Replicas, query: Array, evaluation: Evaluation, z: Array
        ) -> tuple[Replicas, Array]:
            here = (old.position, old.evaluation)
            there = (query, evaluation)
            log_ratio = self.exchange.log_ratios(context.end, partner, *here, *there)
            # Both rungs of a pair decide by the number of the lower one.
            log_u = log_uniform(z[jnp.minimum(index, partner)])
            accepted, probability = accept(log_u, log_ratio)
            position, evaluation = jax.vmap(where)(accepted | ~rungs.swaps, there, here)
            origin = jnp.where(accepted, partner, index)
            from_top = old.from_top[origin].at[-1].set(True)
            trips = old.trips[origin].at[0].add(from_top[0])
            replicas = Replicas(
                position,
                evaluation,
                old.inner,
                from_top=from_top.at[0].set(False),
                trips=trips,
            )
            # A pair counts once, at its lower rung.
            return replicas, jnp.where(partner > index, probability, 0.0)

        chains, swapped = self.spread.map(
            ensemble,
            run.chains,
            level.query,
            evaluation,
            context.normals[..., self.layout.dims],
        )
        swapped = mean_acceptance(swapped, self.spread.total, self.num_chains)
        sums = rungs.probability.at[:, 0].add(swapped)
        rungs = dataclasses.replace(rungs, probability=sums)
        return dataclasses.replace(run, chains=chains, visits=rungs), level

    def made(
        self,
        b: int,
        run: Run,
        level: LevelState,
        context: PhaseContext,
        chains: Particles,
        info: Info,
    ) -> Carry:
        made, level = super().made(b, run, level, context, chains, info)
        adapted = where(rungs_of(run).plan.adapts, made.tuning, run.tuning)
        return dataclasses.replace(made, tuning=adapted), level

    def leave(self, run: Run, level: LevelState, context: PhaseContext) -> Run:
        """Record the turn that was made, and begin the next one."""
        transitions = mean_acceptance(
            level.tally.acceptance, self.spread.total, self.num_chains
        )
        rungs = rungs_of(run).following(
            transitions, self.density, self.exchange.energies
        )
        at = rungs.previous
        means = rungs.means

        empty = type(run.records).empty(len(rungs.order), len(run.tuning))
        records = (
            jax.tree.map(jnp.asarray, empty)
            .at(
                at,
                acceptance=means.transitions,
                step_size=self.moves.steps_in_x(run.tuning, context.end),
            )
            .at(at[:-1], swaps=means.swaps)
        )

        # Where rungs are placed anew, step sizes are those of the levels they come to.
        def placed(scale: Array) -> Array:
            moved = jnp.interp(rungs.levels, at, scale)
            return jnp.where(rungs.plan.places, moved, scale)

        # Trips count from the first sample on.
        first = rungs.turns == rungs.first_sample
        trips = jnp.where(first, 0, run.chains.trips)
        return dataclasses.replace(
            run,
            chains=dataclasses.replace(run.chains, trips=trips),
            tuning=jax.tree.map(placed, run.tuning),
            records=records,
            visits=rungs,
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
    resampling, no copies. One chain of the result is one ensemble, represented by its
    replica at level 0: draws of a Markov chain, to be judged by R̂ and effective sample
    size.

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

    exchange: Swap = Swap(None)  # type: ignore[assignment]
    # None until `prepare`, unless the user gave it.
    num_levels: int = eqx.field(default=None, static=True)
    sweeps: int = eqx.field(default=200, static=True)

    descent: ClassVar[type[Descent]] = ReplicaDescent

    def __init__(
        self,
        kernel: Kernel | None = None,
        num_levels: int | None = None,
        swap: str | None = None,
        sweeps: int = 200,
    ):
        kernel = check_kernel(kernel, 1, optional=True)
        if measures_metric(kernel):
            raise InvalidValueError(
                "ReplicaExchange cannot measure a metric.",
                fix="leave metric out, or pass a fixed metric.",
            )
        self.sweeps = check_count(sweeps, "sweeps", tuning.RUNGS.rounds)
        if num_levels is not None:
            num_levels = check_count(num_levels, "num_levels", 2)
        self.num_levels = num_levels  # type: ignore[assignment]
        super().__init__(kernel, 1, exchange=Swap(swap))  # type: ignore[arg-type]

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        kind = self.exchange.kind
        if kind is None:
            return super().requires
        return {f"ReplicaExchange(swap='{kind}')": NEEDS[kind]} | super().requires

    def needs_terms(self, density: AnnealedDensity) -> bool:
        return not self.exchange.energies

    def prepare(self, density: AnnealedDensity) -> Sampler:
        where = density.described.where
        swap = self.exchange.resolved(density)
        if any(site.kind == "held" for site in density.sites.values()):
            raise CapabilityError(
                "ReplicaExchange moves chains from level to level, but a latent here "
                "must stay at its prior draw.",
                where=where,
                fix="use cp.AnnealedMCMC, whose chains are independent.",
            )
        kernel = self.kernel
        if kernel is None:
            if "energy" not in density.capabilities:
                raise CapabilityError(
                    "ReplicaExchange needs a kernel where a factor offers only its "
                    "score.",
                    where=where,
                    fix="pass one, such as "
                    "cp.MALA(cp.Adaptive(), log_ratio=cp.LineIntegral()).",
                )
            kernel = by_kind(lambda: MALA(Adaptive()), density)
        count = self.num_levels
        if count is None:
            count = min(tuning.RUNGS.default, density.num_levels)
        if not 2 <= count <= density.num_levels:
            raise InvalidValueError(
                f"{count} rungs do not fit on {density.num_levels} levels.",
                where=where,
                fix="compile with more levels (schedule=), or pass a smaller "
                "num_levels.",
            )
        resolved = replaced(self, kernel=kernel, num_levels=count, exchange=swap)
        return Sampler.prepare(resolved, density)

    def visits(self, density: AnnealedDensity, pace: Pace | None) -> Rungs:
        count = self.num_levels
        # Rungs begin at equal distances in log-SNR.
        log_snr = np.asarray(density.schedule.log_snr, np.float64)
        equidistant = np.linspace(log_snr[0], log_snr[-1], count)
        nearest = jnp.asarray(np.searchsorted(-log_snr, -equidistant))
        order = np.asarray(distinct_levels(nearest, density.num_levels))[::-1]
        given = Visits.given(order, density.num_levels)
        top = jnp.full(count, order[0])
        return Rungs(
            given.order,
            given.made,
            pace=None,
            levels=top,
            previous=top,
            turns=given.made,
            probability=jnp.zeros((count, 1 + len(self.moves.blocks))),
            planned=self.sweeps,
        )

    @property
    def drawing(self) -> DrawCost:
        transition = self.moves.kernel.evaluations_per_step
        return DrawCost(
            evaluations=self.num_levels * (1 + transition),
            proposals=self.num_levels * (1 + len(self.moves.blocks)),
            settling=0,
        )

    def evaluations(self, completed: int) -> int:
        turns = completed
        if completed == self.num_levels:
            turns += self.sweeps + tuning.RUNGS.rounds - 1
        return turns * self.drawing.evaluations

    def proposals(self) -> int:
        return self.drawing.proposals

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        layout = Layout.of_density(density)
        moves = self.moves
        count = self.num_levels
        blank = layout.unevaluated(density, self.needs_terms(density))

        def replica(words: Array) -> Particles:
            point = initial_point(layout, density, level, words)
            return self.initial_particle(blank, words, point)

        def ensemble(words: Array) -> Replicas:
            replicas = jax.vmap(replica)(replica_words(count, words))
            trips = jnp.zeros(count, jnp.int32)
            return Replicas(
                replicas.position,
                replicas.evaluation,
                replicas.inner,
                from_top=trips > 0,
                trips=trips,
            )

        return dataclasses.replace(
            run,
            chains=run.spread.map(ensemble, run.words),
            tuning=jax.tree.map(
                lambda scale: jnp.full(count, scale),
                moves.untuned(len(run.ancestors)),
            ),
            records=type(run.records).empty(density.num_levels, len(moves.blocks)),
        )

    def draw(self, run: Run, density: AnnealedDensity, i: Array, thin: Array) -> Run:
        phases = self.phases(density, run)
        end = rungs_of(run).turns + thin
        run, _ = jax.lax.while_loop(
            lambda carry: rungs_of(carry[0]).turns < end,
            phases.phase,
            (run, phases.blank(run)),
        )
        return run

    def positions(self, run: Run, density: AnnealedDensity) -> Position:
        lowest = jax.tree.map(lambda leaf: leaf[:, 0], run.chains)
        return super().positions(dataclasses.replace(run, chains=lowest), density)

    def log_densities(self, run: Run) -> Float[Array, " chains"] | None:
        log_densities = run.chains.evaluation.log_density
        return None if log_densities is None else log_densities[:, 0]

    def scores(self, run: Run) -> Float[Array, "chains size"]:
        return run.chains.evaluation.score[:, 0]

    def round_trips(self, run: Run) -> float:
        return float(np.mean(np.sum(host(run.chains.trips), axis=1)))

    def describe(self) -> str:
        settings = ["no kernel" if self.kernel is None else repr(self.kernel)]
        if self.num_levels is not None:
            settings.append(f"{self.num_levels} rungs")
        settings += [f"swap={self.exchange.kind!r}", f"{self.sweeps} sweeps"]
        return f"ReplicaExchange({', '.join(settings)})"


def equal_rejection(
    levels: Int[Array, " rungs"],
    swaps: Float[Array, " neighbours"],
    density: AnnealedDensity,
    energies: bool,
) -> Int[Array, " rungs"]:
    """Return levels between which neighbours would be rejected equally often, by the
    mean probabilities of swaps at the present ones.

    Rejections add up along the levels to the communication barrier (Syed et al. 2022),
    of which every pair of new neighbours gets an equal part. With path weights, whose
    error follows from the levels' distance, that distance counts for two thirds.
    """
    between = jnp.maximum(1 - swaps, tuning.RUNGS.least_rejection)
    if not energies:
        distance = -jnp.diff(jnp.asarray(density.schedule.log_snr)[levels])
        between = between / jnp.sum(between) + 2 * distance / jnp.sum(distance)
    barrier = jnp.concatenate([jnp.zeros(1), jnp.cumsum(between)])
    equal = jnp.linspace(0, barrier[-1], len(levels))
    wanted = jnp.interp(equal, barrier, levels.astype(barrier.dtype))
    return distinct_levels(jnp.round(wanted).astype(jnp.int32), density.num_levels)


def distinct_levels(
    levels: Int[Array, " rungs"], num_levels: int
) -> Int[Array, " rungs"]:
    """Return L different, rising levels from 0 to K − 1, both included; they are moved
    from these only where needed."""
    index = jnp.arange(len(levels))
    levels = index + jax.lax.cummax(levels - index)  # each above the one below it
    # And none so high that those above it have no room.
    top = num_levels - len(levels) + index
    levels = jnp.minimum(levels, top).at[0].set(0).at[-1].set(num_levels - 1)
    return levels.astype(jnp.int32)
