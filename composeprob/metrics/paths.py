"""The path that a chain of a sampler takes, walked in either direction with its log-probability ratio.

A chain starts from the top law and makes, level by level, a reverse step (where the sampler has one) and kernel
transitions. `climb` walks that path backwards, from a point at level 0 to the top, by the transitions' reversals;
`descend` walks it forwards. Both return a log-weight whose exponential has a known expectation: the sampler's output
density at the point, and ∫f₀.
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
from composeprob.density.evaluation import Evaluation, Position
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.kernels import Estimated, Gibbs, Kernel, KernelState
from composeprob.kernels.base import log_density_of
from composeprob.kernels.gibbs import GibbsState, parts_of, with_field, with_parts
from composeprob.pytree import normal_like
from composeprob.runtime.arguments import not_a_sampler
from composeprob.samplers.base import REVERSE, Sampler
from composeprob.samplers.choose import check_capabilities
from composeprob.samplers.reverse import leaning, log_ratio_of_leaning, reverse_law, reverse_step
from composeprob.samplers.weights import first_evidence, first_weight, gain_between


class Path(eqx.Module):
    """What one chain does, with every step size a number.

    Attributes:
        kernel: the kernel; None where there are no transitions.
        steps: the step size of its blocks at each level, (K, B).
        count: transitions a level.
        reverse: whether a reverse step leads from each level to the next.
        leaning: whether that step follows `leaning` and not the score.
        weights: how `SMC` weighs its chains; None for samplers without weights.
        first: the level where chains start.
        pull, spread: how a reversal goes up, `upward`; per site, (K − 1, …).
    """

    kernel: Gibbs | None
    steps: Array
    count: int = eqx.field(static=True)
    reverse: bool = eqx.field(static=True)
    leaning: bool = eqx.field(static=True)
    weights: str | None = eqx.field(static=True)
    first: int = eqx.field(static=True)
    pull: dict[str, Array]
    spread: dict[str, Array]

    @classmethod
    def of(cls, sampler: Sampler, density: AnnealedDensity, weighted: bool = True) -> Path:
        """The path of a sampler whose step sizes are numbers, as `frozen` makes it; with or without its weights."""
        route, moves = sampler.route(density), sampler.moves
        weights = route.weights if weighted else None
        up = upward(density, mixed=moves is not None or weights is not None, weighted=weights == "feynman_kac")
        steps = jnp.zeros((density.num_levels, 1)) if moves is None else moves.steps()
        kernel, count = (None, 0) if moves is None else (moves.kernel, moves.count)
        first = sampler.first_level(density)
        return cls(kernel, steps, count, route.reverse, route.leaning, weights, first, *up)


def frozen(sampler: Sampler, density: AnnealedDensity, step_size: ArrayLike | None) -> Sampler:
    """The sampler, prepared for the density, with adaptive step sizes replaced by those that a run came to.

    Args:
        sampler: one with a `Sampler.route`: `Ancestral` with η = 1, `AnnealedMCMC`, `SMC` without control.
        density: compiled; noised sites only.
        step_size: ``result.step_size``, (K,) or (K, B), or None.

    Raises:
        WrongTypeError: no sampler.
        CapabilityError: static sites, a way that has no reversal, an adaptive step without ``step_size``, or a factor
            that lacks what is needed.
        InvalidValueError: η other than 1.
    """
    if not isinstance(density, AnnealedDensity):
        raise WrongTypeError(
            f"A likelihood belongs to a compiled density; got {type(density).__name__}.", fix="call cp.compile first."
        )
    if not isinstance(sampler, Sampler):
        raise not_a_sampler(sampler)
    sampler.route(density)
    static = [name for name, site in density.sites.items() if site.kind != "noised"]
    if static:
        raise CapabilityError(
            f"{', '.join(map(repr, static))} is a NumPyro latent: only densities of noised sites have this likelihood.",
            where=density.described.where,
            fix="condition on it, or compile a program without static sites.",
        )
    check_capabilities(sampler, density)
    prepared = sampler.prepare(density)
    moves = prepared.moves
    if moves is not None and any(isinstance(getattr(part, "metric", None), Estimated) for part in moves.kernel.kernels):
        raise CapabilityError(
            "The kernel's metric is measured from all chains, so the likelihood of a single chain's path is not known.",
            fix='give it a kernel with a fixed metric, such as cp.MALA(cp.Adaptive(), metric="none").',
        )
    if moves is None or not any(moves.adaptive):
        return prepared
    if step_size is None:
        raise CapabilityError(
            "An Adaptive step size depends on all chains, so the likelihood of a single chain's path is not known.",
            fix="take the steps that a run came to: step_size=result.step_size.",
        )
    blocks = (len(prepared.blocks),) if prepared.blocks else ()
    steps = filled(step_size, (density.num_levels, *blocks)).reshape(density.num_levels, -1)
    assert prepared.kernel is not None
    stepped = [with_field(part, "step_size", own) for part, own in zip(parts_of(prepared.kernel), steps.T, strict=True)]
    kernel = with_parts(prepared.kernel, stepped)
    # Transitions that adapted moved the chains too.
    return sampler.with_moves(kernel, moves.total).prepare(density)


def upward(density: AnnealedDensity, mixed: bool, weighted: bool = False) -> tuple[dict[str, Array], dict[str, Array]]:
    r"""How to go from x_k up to x_{k+1}: N(α_{k+1}/α_k·x_k + pull_k·s_k(x_k), spread_k·I), with s_k the score.

    For one factor it is the forward diffusion, whose pull is 0. Scores of a product sum to W times those of noise,
    and a reverse step then draws chains together W times as strongly, which noise alone would not undo: weights
    would degenerate. Pull and spread are those of the exact reversal where there is only noise, x_k ~ N(0, V_k I) and
    s_k = −W·x_k/σ_k²; there x_{k+1} | x_k is Gaussian. Where there is signal the pull vanishes beside x.
    Any choice leaves E p̂ as it is.

    Args:
        density: gives the schedule and W, the total power of the factors at each entry.
        mixed: whether kernels bring the chains to π_k, so that V_k = σ_k²/W; else V_k is what reverse steps make of it.
        weighted: whether Feynman–Kac weights ½(W² − W)·(x/σ)² per unit of log-SNR belong to the path.

    Returns:
        Pull and spread, ``{site: (K − 1, …)}``: one number a level where an entry is like every other.
    """
    alpha, sigma = (np.asarray(a, np.float64) for a in (density.schedule.alpha, density.schedule.sigma))
    log_snr = 2 * np.log(alpha / sigma)
    beta = sigma[1:] ** 2 - (alpha[1:] / alpha[:-1] * sigma[:-1]) ** 2
    pull, spread = {}, {}
    for name, powers in density.top.power.items():
        w = np.asarray(powers, np.float64)
        w = np.ravel(w)[0] if np.ptp(w) == 0 else w
        pulls, spreads = [], []
        variance = sigma[-1] ** 2 / w
        for k in range(len(sigma) - 2, -1, -1):
            v = beta[k] * (sigma[k] / sigma[k + 1]) ** 2
            slope = alpha[k] / alpha[k + 1] * (1 - w) + np.sqrt(max(sigma[k] ** 2 - v, 0.0)) * w / sigma[k + 1]
            above = sigma[k + 1] ** 2 / w if mixed else variance
            if weighted:  # half of a trapezoid's weight falls on the upper end; kept away from an improper law
                tilt = 0.25 * (log_snr[k] - log_snr[k + 1]) * (w**2 - w)
                above = sigma[k + 1] ** 2 / np.maximum(w - tilt, 0.5 * w)
            variance = slope**2 * above + v
            pulls.append((alpha[k + 1] / alpha[k] - slope * above / variance) * sigma[k] ** 2 / w)
            spreads.append(np.maximum(above * v / variance, v * (alpha[k + 1] / alpha[k]) ** 2))
        pull[name], spread[name] = (jnp.asarray(np.stack(values[::-1]), float) for values in (pulls, spreads))
    return pull, spread


def filled(step_size: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Steps of a run, (K,) or (K, B), with NaN at levels that it skipped replaced by the step of the nearest level."""
    steps, num_levels = np.asarray(step_size, float), shape[0]
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
    return jnp.asarray(steps[nearest])


def climb(path: Path, density: AnnealedDensity, key: Array, position: Position) -> Array:
    """One reversal from a point at level 0 to the top: log p̂ with E p̂(x₀) the sampler's output density.

    log p̂(x₀) = log top(x_top) + Σ log T(x'→x)/T(x→x') over the transitions x → x' made on the way up
    + Σ log N(x_k; reverse step from x_{k+1})/q(x_{k+1}|x_k) over the noising steps. A kernel that carries a momentum
    starts from a fresh one: its terms cancel, as every refreshment leaves N(0, I) alone. With `SMC`'s weights the
    target is the weighted path, times ∫ over all paths: subtract its log-evidence.

    Args:
        path: what chains of the sampler do.
        density: compiled.
        key: typed random key.
        position: x₀.
    """
    state = _start(path, density, jax.random.fold_in(key, density.num_levels), position, 0)
    backwards = None if path.kernel is None else path.kernel.reversal

    def rise(k: Array, state: KernelState) -> tuple[KernelState, Array]:
        after, x = state.evaluation, state.position
        log_ratio = jnp.zeros(())
        if path.reverse:
            mean, variance = _upward_law(path, density, state, k)
            noised = _draw(jax.random.fold_in(jax.random.fold_in(key, k), REVERSE), mean, variance)
            log_ratio = -_log_normal(noised, mean, variance)
            state = dataclasses.replace(state, position=noised)
        state = _relevel(path, state, density, k + 1)
        if path.reverse:
            log_ratio = log_ratio + _log_reverse(path, density, state, x, k)
        if path.weights is not None:
            log_ratio = log_ratio + _gain(path, state.evaluation, after, density, k)
            if path.reverse:
                drift, followed = state.evaluation.parts.drift, _followed(path, density, state, k + 1)
                log_ratio = log_ratio + log_ratio_of_leaning(state.position, drift, followed, x, density, k + 1)
        return state, log_ratio

    def level(k: Array, carry: tuple[KernelState, Array]) -> tuple[KernelState, Array]:
        state, total = carry
        state, moved = _transitions(path, backwards, density, jax.random.fold_in(key, k), state, k)
        state, risen = jax.lax.cond(k < path.first, partial(rise, k), lambda s: (s, jnp.zeros(())), state)
        return state, total + moved + risen

    state, total = jax.lax.fori_loop(0, path.first + 1, level, (state, jnp.zeros(())))
    total = total + density.top.log_density(state.position, density.schedule.at(path.first).sigma)
    if path.weights is not None:
        log_evidence = start_constant(first_evidence(density, path.first))
        total = total + first_weight(state, density, path.first) + log_evidence
    return jnp.where(jnp.isnan(total), -jnp.inf, total)


def descend(path: Path, density: AnnealedDensity, key: Array) -> Array:
    """One chain of the sampler, without weights: log w with E w = ∫f₀ (annealed importance sampling).

    log w = log f₀(x₀) − log top(x_top) + Σ log T(x'→x)/T(x→x') + Σ log q(x_{k+1}|x_k)/N(x_k; reverse step).
    """
    start_key = jax.random.fold_in(key, density.num_levels)
    position = density.initial(start_key, path.first)
    total = -density.top.log_density(position, density.schedule.at(path.first).sigma)
    state = _start(path, density, jax.random.fold_in(start_key, 1), position, path.first)

    def fall(k: Array, state: KernelState) -> tuple[KernelState, Array]:
        log_ratio = jnp.zeros(())
        if path.reverse:
            step_key = jax.random.fold_in(jax.random.fold_in(key, k), REVERSE)
            above = state.position
            x = reverse_step(step_key, above, _followed(path, density, state, k + 1), density, k + 1)
            log_ratio = -_log_reverse(path, density, state, x, k)
            state = dataclasses.replace(state, position=x)
        state = _relevel(path, state, density, k)
        if path.reverse:
            log_ratio = log_ratio + _log_normal(above, *_upward_law(path, density, state, k))
        return state, log_ratio

    def level(i: Array, carry: tuple[KernelState, Array]) -> tuple[KernelState, Array]:
        state, total = carry
        k = path.first - i
        state, fallen = jax.lax.cond(i > 0, partial(fall, k), lambda s: (s, jnp.zeros(())), state)
        state, moved = _transitions(path, path.kernel, density, jax.random.fold_in(key, k), state, k)
        return state, total + fallen + moved

    state, total = jax.lax.fori_loop(0, path.first + 1, level, (state, total))
    total = total + state.evaluation.log_density
    return jnp.where(jnp.isnan(total), -jnp.inf, total)


def start_constant(log_evidence: Array) -> Array:
    """The log-evidence that weights start from; an unknown one is dropped, here and where the evidence is estimated."""
    return jnp.where(jnp.isfinite(log_evidence), log_evidence, 0.0)


def _start(path: Path, density: AnnealedDensity, key: Array, position: Position, level: int) -> KernelState:
    target = partial(density.evaluator, level=level)
    if path.kernel is None:
        return KernelState(position, target(position))
    return path.kernel.init(key, position, target)


def _relevel(path: Path, state: KernelState, density: AnnealedDensity, level: Array) -> KernelState:
    target = partial(density.evaluator, level=level)
    if path.kernel is None:
        return dataclasses.replace(state, evaluation=target(state.position))
    assert isinstance(state, GibbsState)
    return path.kernel.relevel(state, target)


def _transitions(
    path: Path, kernel: Kernel | None, density: AnnealedDensity, key: Array, state: KernelState, level: Array
) -> tuple[KernelState, Array]:
    """The level's transitions, by the path's kernel or its reversal, and Σ log-ratio of the way back."""
    target = partial(density.evaluator, level=level)
    if kernel is None:
        return state, jnp.zeros(())

    def step(i: Array, carry: tuple[KernelState, Array]) -> tuple[KernelState, Array]:
        state, total = carry
        state, info = kernel.step(jax.random.fold_in(key, i), state, target, path.steps[level])
        return state, total + jnp.sum(info.log_reversal)

    return jax.lax.fori_loop(0, path.count, step, (state, jnp.zeros(())))


def _followed(path: Path, density: AnnealedDensity, state: KernelState, level: Array) -> Position:
    """What the reverse step from a state at this level follows."""
    e = state.evaluation
    return leaning(state.position, e.parts.drift, e.score, density, level) if path.leaning else e.score


def _gain(path: Path, before: Evaluation, after: Evaluation, density: AnnealedDensity, level: Array) -> Array:
    """What a chain's log-weight gains from level + 1 to level."""
    if path.weights == "density":
        return log_density_of(after) - log_density_of(before)
    return gain_between(before.parts, after.parts, density, level)


def _log_reverse(path: Path, density: AnnealedDensity, state: KernelState, x: Position, level: Array) -> Array:
    """log N(x; the reverse step from the state at level + 1)."""
    mean, variance = reverse_law(state.position, _followed(path, density, state, level + 1), density, level + 1)
    return _log_normal(x, mean, jax.tree.map(lambda _: variance, mean))


def _upward_law(path: Path, density: AnnealedDensity, state: KernelState, level: Array) -> tuple[Position, Position]:
    """Mean and variances of `upward` from a state at level k < K − 1."""
    here, there = density.schedule.at(level), density.schedule.at(level + 1)
    s = state.evaluation.parts.drift if path.leaning else state.evaluation.score
    mean = {name: there.alpha / here.alpha * x + path.pull[name][level] * s[name] for name, x in state.position.items()}
    return mean, {name: path.spread[name][level] for name in mean}


def _draw(key: Array, mean: Position, variance: Position) -> Position:
    noise = normal_like(key, mean)
    return {name: m + jnp.sqrt(variance[name]) * noise[name] for name, m in mean.items()}


def _log_normal(x: Position, mean: Position, variance: Position) -> Array:
    """log N(x; mean, variance) over all sites, a scalar."""
    terms = [jnp.sum(-0.5 * ((x[n] - mean[n]) ** 2 / variance[n] + jnp.log(2 * jnp.pi * variance[n]))) for n in mean]
    return sum(terms, jnp.zeros(()))
