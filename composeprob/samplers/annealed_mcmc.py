"""Annealed MCMC: the paper's Algorithm 1."""

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
from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels import Kernel, KernelState
from composeprob.kernels.gibbs import parts_of
from composeprob.pytree import all_finite, where
from composeprob.samplers.base import REVERSE, Route, Run, Sampler, draw_initial, level_keys
from composeprob.samplers.ends import check_global_moves, check_stay, ending, needs_global
from composeprob.samplers.reverse import leaning, log_ratio_of_leaning, reverse_step
from composeprob.samplers.transitions import Transitions
from composeprob.samplers.weights import first_weight, gain_between

NOTHING = {"f": np.nan, "b": False}
"""What stands for a number that is not known yet."""
STARTS = 16
"""Draws of the prior that a chain chooses its start from where no level is noisy."""


class AnnealedMCMC(Sampler):
    """Independent chains that make ``steps_per_level`` transitions of a kernel at every level, K − 1 to 0.

    Cost: one evaluation a level to refresh what the kernel caches, and the kernel's own for each transition. What
    chains cannot do is cross between modes once these have parted: the share of each mode is frozen at the level where
    that happens, and no number of chains mends it. `SMC` does. With ``reverse_step=True`` the status says so
    (``shares_frozen``) where the Feynman–Kac weights of the chains' paths tell.

    In a program without noised sites nothing leads from the prior to the data in small steps: there each chain starts
    at one of 16 draws of the prior, chosen by their likelihood, for 16 evaluations more.

    Args:
        kernel: a kernel such as ``cp.HMC(0.03, num_leapfrog=3)``.
        steps_per_level: transitions at each level, ≥ 1.
        reverse_step: whether one step of the reverse process takes the chains from each level to the next, as a
            better start for the kernel. Observations and user energies shift it by at most half the length of its
            noise, so that a sharp one does not throw chains far off.
        stay: whether HMC moves all sites at level 0 until the population stops drifting, for programs with latents.
        global_moves: so many proposals to each chain at level 0 that have nothing to do with where it is, as `SMC` has
            them. They give modes their shares, whatever these were before.

    References:
        Du et al. 2023, Algorithm 1. Song and Ermon 2019 for annealed Langevin dynamics.

    Example:
        >>> import composeprob as cp
        >>> cp.AnnealedMCMC(cp.HMC(0.03, num_leapfrog=3), steps_per_level=10).describe()
        'AnnealedMCMC(HMC(step_size=0.03, num_leapfrog=3, damping=0.5), 10 steps a level)'
    """

    kernel: Kernel
    steps_per_level: int = eqx.field(static=True)
    reverse_step: bool = eqx.field(static=True)

    def __init__(
        self,
        kernel: Kernel,
        steps_per_level: int,
        reverse_step: bool = False,
        stay: bool = False,
        global_moves: int = 0,
    ):
        check_kernel(kernel, steps_per_level)
        self.kernel, self.steps_per_level, self.reverse_step = kernel, int(steps_per_level), bool(reverse_step)
        self.stay, self.moves, self.global_moves = bool(stay), None, check_global_moves(global_moves)

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        return {**needs(self.kernel), **needs_global(self.global_moves)}

    def prepare(self, density: AnnealedDensity) -> AnnealedMCMC:
        if self.stay:
            check_stay(density, True)
        moves = Transitions.resolved(self.kernel, self.steps_per_level, density)
        return eqx.tree_at(lambda s: s.moves, self, moves, is_leaf=lambda node: node is None)

    def route(self, density: AnnealedDensity) -> Route:
        return Route(self.reverse_step, leaning=self.leans(density))

    def with_moves(self, kernel: Kernel, steps_per_level: int) -> AnnealedMCMC:
        return AnnealedMCMC(kernel, steps_per_level, self.reverse_step, self.stay, int(self.global_moves))

    def first_level(self, density: AnnealedDensity) -> int:
        return density.num_levels - 1

    def evaluations(self, first_level: int, completed: int) -> int:
        assert self.moves is not None
        starts = 0 if self.moves.noised else STARTS
        return starts + completed * (1 + self.moves.evaluations)

    def proposals(self) -> int:
        assert self.moves is not None
        return self.moves.proposals + self.reverse_step

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        assert self.moves is not None
        if self.moves.noised:
            positions = draw_initial(run, density, level)
        else:
            positions, weighs = likely_initial(run, density, level)
            run = dataclasses.replace(run, path_weights=weighs)
        keys = level_keys(run.keys, density.num_levels + 1)
        init = partial(self.moves.kernel.init, target=unevaluated(self.target(density, level)))
        states = run.spread.map(init, keys, positions)
        return dataclasses.replace(self.moves.begin(run, positions), chains=states)

    def visit(self, run: Run, density: AnnealedDensity, level: Array, above: Array) -> Run:
        assert self.moves is not None
        keys = level_keys(run.keys, level)
        target = self.target(density, level)
        came, states, bad, stays = run.chains, run.chains, *(jnp.zeros(keys.shape, bool),) * 2
        if self.reverse_step:
            fall = partial(descend, density=density, level=level, above=above, leans=self.weighs(density))
            states, bad, stays = run.spread.map(fall, keys, states)
        states = run.spread.map(partial(self.moves.kernel.relevel, target=target), states)
        if self.weighs(density):
            gain = run.spread.map(partial(path_gain, density=density, level=level, above=above), came, states)
            gain = jnp.where(stays, jnp.nan, gain)  # a step that was not made has no probability to go by
            run = dataclasses.replace(run, path_weights=run.path_weights + gain)
        states, tuning, records = self.moves.run(
            run.spread, keys, states, target, density.schedule, level, run.tuning, run.records, bad
        )
        return dataclasses.replace(run, chains=states, tuning=tuning, records=records)

    def target(self, density: AnnealedDensity, level: Array | int) -> Target:
        return partial(density.evaluator, level=level) if self.weighs(density) else super().target(density, level)

    def weighs(self, density: AnnealedDensity) -> bool:
        """Whether `Run.path_weights` are kept, for what `results.shares` says of them: they cost no evaluation."""
        return self.moves is not None and bool(self.moves.noised) and self.leans(density)

    def leans(self, density: AnnealedDensity) -> bool:
        """Whether the reverse step follows `leaning`: where the scores of F and G are known apart."""
        return self.reverse_step and "feynman_kac" in density.capabilities

    def positions(self, run: Run) -> dict[str, Array]:
        return run.chains.position

    def describe(self) -> str:
        reverse = ", reverse step between levels" if self.reverse_step else ""
        return f"AnnealedMCMC({self.kernel!r}, {self.steps_per_level} steps a level{reverse}{ending(self)})"


def unevaluated(target: Target) -> Target:
    """A density that is NaN everywhere, for states that `Kernel.relevel` fills in where they are used first.

    So one executable, that of the levels, has the networks in it, and not a second one that only starts the chains.
    """

    def blank(position: Position) -> Evaluation:
        shapes = jax.eval_shape(target, position)
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, NOTHING[leaf.dtype.kind], leaf.dtype), shapes)

    return blank


def descend(
    key: Array, state: KernelState, density: AnnealedDensity, level: Array, above: Array, leans: bool
) -> tuple[KernelState, Array, Array]:
    """One chain's reverse step from the level above to level, whether its score was not finite, and whether it stayed.

    A step through a wall, to where the density is 0, is not made: the chain stays at the same x/α.

    Args:
        leans: whether the step follows `leaning`, for which the evaluation has its parts; else ∇log π.
    """
    score, falls, through = state.evaluation.score, level < above, jnp.asarray(False)
    followed = score
    if leans:
        followed = leaning(state.position, state.evaluation.parts.drift, score, density, above, level)
    moved = reverse_step(jax.random.fold_in(key, REVERSE), state.position, followed, density, above, below=level)
    if density.evaluator.plain:
        through = jnp.isneginf(density.evaluator.plain_potential(moved, level)) & ~state.evaluation.zero
        ratio = density.schedule.at(level).alpha / density.schedule.at(above).alpha
        noised = {name for name, site in density.sites.items() if site.kind == "noised"}
        stayed = {name: ratio * x if name in noised else x for name, x in state.position.items()}
        moved = where(through, stayed, moved)
    fallen = dataclasses.replace(state, position=where(falls, moved, state.position))
    return fallen, falls & ~all_finite(score), falls & through


def path_gain(came: KernelState, state: KernelState, density: AnnealedDensity, level: Array, above: Array) -> Array:
    """What one chain's log-weight gains by its reverse step from the level above, or by its first draw, a
    scalar: `SMC`'s Feynman–Kac weight. Not finite where the density is 0 or a score is not finite.

    Args:
        came, state: before the step and after it, under their levels' densities.
        density, level, above: as of `descend`.
    """
    before, after = came.evaluation, state.evaluation
    followed = leaning(came.position, before.parts.drift, before.score, density, above, level)
    path = (came.position, before.parts.drift, followed, state.position)
    gain = log_ratio_of_leaning(*path, density, above, level)
    gain = gain + gain_between(before.parts, after.parts, density, level, above)
    return jnp.where(level < above, gain, first_weight(state, density, level))


def likely_initial(run: Run, density: AnnealedDensity, level: int) -> tuple[dict[str, Array], Array]:
    """One of `STARTS` draws of the prior for each chain, with probabilities in proportion to their likelihood, and what
    it weighs: log of the mean of these likelihoods, under which such draws have the posterior's law.

    A chain that starts far out in a heavy tail would stay there: the step size that suits the others is too long for
    it. Chains remain independent.
    """

    def one(key: Array) -> tuple[dict[str, Array], Array]:
        def draw(i: Array) -> tuple[dict[str, Array], Array, Array]:
            draw_key, race_key = jax.random.split(jax.random.fold_in(key, i))
            position = density.initial(draw_key, level)
            log_weight = density.evaluator(position, level).parts.log_potential
            log_weight = jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)
            return position, log_weight + jax.random.gumbel(race_key), log_weight

        def race(i: Array, best: tuple[dict[str, Array], Array, Array]) -> tuple[dict[str, Array], Array, Array]:
            other = draw(i)
            position, score = where(other[1] >= best[1], other[:2], best[:2])
            return position, score, jnp.logaddexp(best[2], other[2])

        none = jnp.asarray(-jnp.inf)
        nobody = jax.tree.map(jnp.zeros_like, density.initial(key, level)), none, none
        position, _, total = jax.lax.fori_loop(0, STARTS, race, nobody)
        return position, total - math.log(STARTS)

    return run.spread.map(one, level_keys(run.keys, density.num_levels))


def needs(kernel: Kernel) -> dict[str, frozenset[str]]:
    """What a density must offer, by the name of the kernel (or of the block's) that needs it."""
    found: dict[str, frozenset[str]] = {}
    for part in parts_of(kernel):
        name = type(part).__name__
        found[name] = found.get(name, frozenset()) | part.requires
    return found


def check_kernel(kernel: object, steps_per_level: object) -> None:
    """Refuse what is no kernel, and a number of transitions below 1."""
    if not isinstance(kernel, Kernel):
        found = f"the class {kernel.__name__}" if isinstance(kernel, type) else repr(kernel)
        raise WrongTypeError(
            f"A sampler needs a kernel; got {found}.",
            fix="make one, for example cp.MALA() or cp.HMC(0.03, num_leapfrog=3).",
        )
    check_steps(steps_per_level)


def check_steps(steps_per_level: object) -> None:
    """Refuse a number of transitions below 1."""
    whole = isinstance(steps_per_level, (int, np.integer)) and not isinstance(steps_per_level, bool)
    if not whole or steps_per_level < 1:  # type: ignore[operator]
        raise InvalidValueError(
            f"steps_per_level must be a whole number ≥ 1; got {steps_per_level!r}.",
            fix="pass 1 or more.",
        )
