"""The path that a chain of a sampler takes, walked in either direction with its log-probability ratio.

`reverse_walk` goes it from a point at level 0 up, by the reversals of steps and transitions; `forward_walk` goes down.
Both return a log-weight whose exponential has a known expectation: the sampler's output density at the point, and ∫f₀.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.kernels.base import log_density_of
from composeprob.kernels.gibbs import measures_metric, parts_of, replaced, with_parts
from composeprob.runtime.infer import not_a_sampler
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Particles
from composeprob.samplers.random import Stream, key_of, normals
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.step import Backward, Step
from composeprob.samplers.weights import Weight, first_evidence, first_weight


class Path(eqx.Module):
    """What one chain of a sampler, as `frozen` prepares it, does from the level ``first`` on, with its ``weights``."""

    sampler: Sampler
    density: AnnealedDensity
    layout: Layout
    first: int = eqx.field(static=True)
    weights: str | None = eqx.field(static=True)

    @classmethod
    def of_sampler(cls, sampler: Sampler, density: AnnealedDensity, weighted: bool = True) -> Path:
        """The path of a sampler that `frozen` returned, with or without its weights."""
        layout, first = Layout.of_density(density), sampler.first_level(density)
        return cls(sampler.in_numbers(), density, layout, first, sampler.weights if weighted else None)

    def top(self) -> tuple[Step, Array]:
        """N(0, s/P), which first draws have, as a step from 0; and log |dx/dy| of the y that stands for x₀."""
        noise, schedule = self.density.schedule.at(self.first), self.density.schedule
        alpha = noise.alpha if self.sampler.step is None else schedule.at(0).alpha
        variance = noise.variance / self.layout.power(self.density, self.first)
        return Step.plain(jnp.zeros_like(variance), variance), self.layout.dims * jnp.log(alpha)

    def walk(self, words: Array, y: Array, reverse: bool) -> tuple[Particles, Array]:
        """One chain from y at the first level to level 0, or in reverse, and Σ log of the probability of each way back
        over that of the way there; in reverse with what the way back gains in weight."""
        density, layout, move, moves = self.density, self.layout, self.sampler.step, self.sampler.moves
        parts, mixed = self.sampler.needs_parts(density), moves is not None
        twist = move.twist if move is not None and parts else None
        if moves is not None and reverse:
            moves = dataclasses.replace(moves, kernel=moves.kernel.reversal)
        draws = 1 + (0 if moves is None else moves.count)

        def drift(chain: Particles) -> Array:
            return chain.evaluation.parts.drift if parts else chain.evaluation.score

        def step(level: Array, carry: tuple[Particles, Array]) -> tuple[Particles, Array]:
            chain, total = carry
            noise, end = (density.schedule.at(k + (0 if reverse else 1)) for k in (level, level - 1))
            s = noise.variance, end.variance
            down, up = Step.ddpm(*s), Step.upward(*s, layout.power(density, noise.index), mixed, self.weights)
            z = normals(words, level * draws, layout.dims)
            if move is None:
                y = chain.position * (end.alpha / noise.alpha if reverse else noise.alpha / end.alpha)
            elif reverse:
                y = up.draw(chain.position, drift(chain), z)
            else:
                y, _, _ = down.predict(chain.position, drift(chain), chain.evaluation.score, z, twist)
            moved = Particles(y, layout.evaluate(density, y, level, parts), chain.inner)
            above, below = (moved, chain) if reverse else (chain, moved)
            ratio = jnp.zeros(())
            if self.weights is not None:
                tempered = density.evaluator.plain and self.weights == "feynman_kac"
                backward = Backward.of_step(*s, layout.power(density, self.first), None, False) if tempered else None
                weight = Weight(self.weights, density, layout, twist)
                ratio, _ = weight.gained(words, jnp.int32(0), above, below, noise, end, backward)
            if move is not None:
                # Weights have p/q of the twist in them: of the two nothing is left.
                shift = 0.0 if self.weights else down.shift(drift(above), above.evaluation.score, twist)
                ratio = ratio + down.log_density(below.position, above.position, drift(above), shift)
                ratio = ratio - up.log_density(above.position, below.position, drift(below))
            return moved, total + (ratio if reverse else -ratio)

        def visit(i: Array, carry: tuple[Particles, Array]) -> tuple[Particles, Array]:
            level = i if reverse else self.first - i
            carry = jax.lax.cond(i > 0, partial(step, level), lambda carry: carry, carry)
            if moves is None:
                return carry
            place = density, parts, (moves.untuned(1), density.schedule.at(level))

            def transition(j: Array, carry: tuple[Particles, Array]) -> tuple[Particles, Array]:
                chain, info = moves.step(*place, key_of(words, level * draws + 1 + j), carry[0])
                return chain, carry[1] + jnp.sum(info.log_reversal)

            return jax.lax.fori_loop(0, moves.count, transition, carry)

        found = layout.evaluate(density, y, 0 if reverse else self.first, parts)
        chain = Particles(y, found) if moves is None else moves.start(words, y, found)
        return jax.lax.fori_loop(0, self.first + 1, visit, (chain, jnp.zeros(())))


def reverse_walk(path: Path, key: Array, position: Position) -> Array:
    """One reversal from a point at level 0 to the first level: log p̂ with E p̂(x₀) the sampler's output density.

    log p̂(x₀) = log top(x_top) + Σ log T(x'→x)/T(x→x') over the transitions x → x' made on the way up
    + Σ log N(x_k; reverse step from x_{k+1})/q(x_{k+1}|x_k) over the noising steps. Momenta start afresh: their terms
    cancel, as every refreshment leaves N(0, I) alone. With `SMC`'s weights the target is the weighted path, times ∫
    over all paths: subtract its log-evidence. Steps that a wall kept where they were are left out.
    """
    words, layout, (top, volume) = jax.random.bits(key, (2,), jnp.uint32), path.layout, path.top()
    y = layout.vector(position, path.density.schedule.at(0).alpha)
    chain, total = path.walk(words, y, reverse=True)
    total = total + top.log_density(chain.position, jnp.zeros_like(y), jnp.zeros_like(y)) - volume
    if path.weights is not None:
        total = total + first_weight(layout, path.density, chain.position, chain.evaluation, path.first)
        total = total + start_constant(first_evidence(path.density, path.first))
    return jnp.where(jnp.isfinite(total), total, -jnp.inf)


def forward_walk(path: Path, key: Array) -> Array:
    """One chain of the sampler, without weights: log w with E w = ∫f₀ (annealed importance sampling).

    log w = log f₀(x₀) − log top(x_top) + Σ log T(x'→x)/T(x→x') + Σ log q(x_{k+1}|x_k)/N(x_k; reverse step).
    """
    words, zero, (top, volume) = jax.random.bits(key, (2,), jnp.uint32), jnp.zeros((path.layout.dims,)), path.top()
    y = top.draw(zero, zero, normals(words, Stream.INITIAL, zero.size))
    chain, total = path.walk(words, y, reverse=False)
    total = total + log_density_of(chain.evaluation) + volume - top.log_density(y, zero, zero)
    return jnp.where(jnp.isfinite(total), total, -jnp.inf)


def start_constant(log_evidence: Array) -> Array:
    """The log-evidence that weights start from; an unknown one is dropped, here and where the evidence is estimated."""
    return jnp.where(jnp.isfinite(log_evidence), log_evidence, 0.0)


def frozen(sampler: Sampler, density: AnnealedDensity, step_size: ArrayLike | None) -> Sampler:
    """The sampler, prepared for the density, with adaptive step sizes replaced by those that a run came to, (K,) or
    (K, B); refused where its path has no reversal."""
    if not isinstance(density, AnnealedDensity):
        fix = "call cp.compile first."
        raise WrongTypeError(f"A likelihood belongs to a compiled density; got {type(density).__name__}.", fix=fix)
    if not isinstance(sampler, Sampler):
        raise not_a_sampler(sampler)

    def refuse(when: object, found: str, fix: str) -> None:
        if when:
            raise CapabilityError(found, where=density.described.where, fix=fix)

    kind, step = type(sampler), sampler.step
    refuse(kind.start is not Sampler.start or kind.descent is not Sampler.descent,
           f"The likelihood of {kind.__name__} is not known: its path cannot be reversed.",
           "use cp.Ancestral(), cp.AnnealedMCMC(kernel, steps_per_level) or cp.SMC(kernel).")  # fmt: skip
    refuse(step is not None and (step.order != 1 or step.control != "none" or float(step.eta) != 1.0),
           f"The likelihood of {sampler!r} is known only where its reverse steps are DDPM's: of first order, without "
           "control, with eta=1.",
           "use cp.SMC(..., step=cp.ReverseStep(order=1, control='none')) or cp.Ancestral(eta=1.0).")  # fmt: skip
    static = ", ".join(repr(name) for name, site in density.sites.items() if site.kind != "noised")
    refuse(static, f"{static} is a NumPyro latent: only densities of noised sites have this likelihood.",
           "condition on it, or compile a program without static sites.")  # fmt: skip
    check_capabilities(sampler, density)
    prepared, chain = sampler.prepare(density), "so the likelihood of a single chain's path is not known."
    moves, kernel = prepared.moves, prepared.kernel
    refuse(sampler.then, f"What closes {sampler!r} is fitted to all chains, {chain}", "leave then= out.")
    refuse(measures_metric(kernel), f"The kernel's metric is measured from all chains, {chain}",
           'give it a kernel with a fixed metric, such as cp.MALA(cp.Adaptive(), metric="none").')  # fmt: skip
    if moves is None or kernel is None or not any(moves.adaptive):
        return prepared
    refuse(step_size is None, f"An Adaptive step size depends on all chains, {chain}",
           "take the steps that a run came to: step_size=result.step_size.")  # fmt: skip
    assert step_size is not None
    steps = filled(step_size, density.num_levels, prepared)
    kernels = [replaced(part, step_size=h) for part, h in zip(parts_of(kernel), steps.T, strict=True)]
    # Transitions that adapted moved the chains too.
    return sampler.with_moves(with_parts(kernel, kernels), moves.total).prepare(density)


def filled(step_size: ArrayLike, num_levels: int, prepared: Sampler) -> Array:
    """Steps of a run of a sampler, (K,) or (K, B), as (K, B); of a level that it skipped, where they are NaN, those of
    the nearest level."""
    steps = np.asarray(step_size, float)
    shape = (num_levels, len(prepared.blocks)) if prepared.blocks else (num_levels,)
    finite = np.isfinite(steps).reshape(len(steps), -1).all(1) if steps.shape == shape else np.zeros(0, bool)
    known = np.flatnonzero(finite)
    if not len(known):
        raise InvalidValueError(
            f"step_size must have one for each of the {num_levels} levels, shape {shape}; got shape {steps.shape}.",
            fix="pass result.step_size of a run of this sampler on this density.",
        )
    if np.any(steps[known] <= 0):
        raise InvalidValueError("Some step sizes are not positive.", fix="pass result.step_size of a run.")
    nearest = known[np.abs(np.arange(num_levels)[:, None] - known).argmin(1)]
    return jnp.asarray(steps[nearest]).reshape(num_levels, -1)
