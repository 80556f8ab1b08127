"""The powers under which observations count at each level: those that suit how sharp
they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from composeprob import tuning
from composeprob.compiler.conjugate import Prior
from composeprob.compiler.once import once
from composeprob.compiler.trace import Sites, Traced
from composeprob.factors.gaussians import Gaussians
from composeprob.schedule import Noise, Schedule


class Near(eqx.Module):
    r"""Where observations look that fall faster than any power of x, such as Poisson
    counts of mean exp(x).

    At x/α, which noise of variance r² = σ²/α² carries far from all data, these are
    exp(−10³⁰) or overflow, and no power γ mends that. In the place of x/α they see m +
    v·(x/α − m)/(v + r²), which is the mean of x₀ given x under a prior N(m, v), entry
    by entry. It stays where the prior is, and tends to x/α as the noise vanishes.

    Attributes:
        mean: m of each noised site: of its prior where that is a mixture of Gaussians,
            else 0.
        variance: v, or 1.
    """

    mean: Sites
    variance: Sites

    def __call__(self, clean: Sites, blur: Array) -> Sites:
        """Where observations are evaluated, for sites that are ``clean`` = x/α at noise
        of this r."""
        pulled = {name: v / (v + blur**2) for name, v in self.variance.items()}
        return {
            name: self.mean[name] + pulled[name] * (x - self.mean[name])
            for name, x in clean.items()
        }


class Tempering(eqx.Module):
    r"""The powers γ_k of the observations that are tempered or denoised, and the values
    that replace their zeros.

    Evaluated at x/α, an observation is blurred by noise of variance r_k² = σ_k²/α_k².
    An instrument of standard deviation s is widened to that blur by the power s²/(s² +
    r²). Where it depends on x through a function, 1/s² is the curvature of the
    log-likelihood, and a function of x: H_k is the median of its largest eigenvalue at
    draws x₀ + r_k·ξ of the prior, at least e⁴ (s = 0.14), and

        γ_k = min over levels j ≤ k of (1 + r_0²·H_0)/(1 + r_j²·H_j),    so γ_0 = 1.

    A likelihood sharper than its power allows for is a path too narrow for the chains
    to follow.

    A likelihood that is 0 (log L = −∞) stays 0 under every power. That is right for a
    wall that divides a space; a box, though, is so small beside the noise of the first
    levels that no chain would be in it. So a wall stands only from the level on where
    it lets through at least half of the largest share; above that level the median of
    log L stands in for −∞.

    Attributes:
        power: γ, (K,).
        stand_in: ``{observation: (K,)}``; −∞ where the wall stands.
        near: where tempered observations look; None for x/α.
    """

    power: Array
    stand_in: Sites
    near: Near | None = None

    def log_likelihood(self, name: str, log_likelihood: Array, noise: Noise) -> Array:
        """log L to the level's power, a scalar."""
        held = self.stand_in[name][noise.index]
        return self.power[noise.index] * jnp.where(
            jnp.isneginf(log_likelihood), held, log_likelihood
        )


def tempering(
    traced: Traced, names: tuple[str, ...], priors: Mapping[str, Prior | str], shapes: dict[str, tuple[int, ...]],
    schedule: Schedule,
) -> Tempering:  # fmt: skip
    """The powers for the observations ``names``, from what the likelihood is at draws
    of the prior of each noised site; where that is no mixture of Gaussians, N(0, 1)
    stands for it."""
    parts = {
        name: prior.parts if isinstance(prior, Prior) else []
        for name, prior in priors.items()
    }
    rng, float_ = np.random.default_rng(0), np.dtype(jnp.result_type(float))
    xs: dict[str, Any] = {
        name: _drawn(rng, parts[name], shape).astype(float_)
        for name, shape in shapes.items()
    }
    # Three pieces, of which the program is in one alone: the others are compiled once
    # for all programs of these sizes.
    scales = _scales(schedule)
    noise = _noise(sum(math.prod(shape) for shape in shapes.values()))
    near: Near | None = None
    values, curvatures = _measured(traced, names, xs, scales, noise, near)
    if _far(values, curvatures, scales):
        near = _near(parts, shapes)
        values, curvatures = _measured(traced, names, xs, scales, noise, near)
    power, held = _powers_and_stand_ins(values, curvatures, scales, schedule)
    return Tempering(power, dict(zip(names, held, strict=True)), near)


def _near(
    parts: dict[str, list[Gaussians]], shapes: dict[str, tuple[int, ...]]
) -> Near:
    mean, variance = {}, {}
    for name, shape in shapes.items():
        m, v = np.zeros(math.prod(shape)), np.ones(math.prod(shape))
        for part in parts[name]:
            m[part.entries], v[part.entries] = part.normalised().moments
        mean[name], variance[name] = (
            jnp.asarray(a.reshape(shape), jnp.result_type(float)) for a in (m, v)
        )
    return Near(mean, variance)


class _Noise(NamedTuple):
    """Random numbers of each draw: a key for the latents, the noise ξ, and the
    direction along which slopes begin."""

    keys: Array
    noise: Array
    ways: Array


@once
def _noise(size: int) -> _Noise:
    """For positions of ``size`` numbers, (draws, …) each."""

    def draw(key: Array) -> _Noise:
        draw_key, noise_key, way_key = jax.random.split(key, 3)
        return _Noise(
            draw_key,
            jax.random.normal(noise_key, (size,)),
            jax.random.normal(way_key, (size,)),
        )

    return jax.vmap(draw)(jax.random.split(jax.random.key(0), tuning.TEMPERING_DRAWS))


@once
def _scales(schedule: Schedule) -> Array:
    """The sizes of noise, (scales,): ten from the cleanest level's to the
    noisiest's."""
    blur = schedule.levels.sigma / schedule.levels.alpha
    return jnp.exp(jnp.linspace(jnp.log(blur[0]), jnp.log(blur[-1]), 10))


@once
def _powers_and_stand_ins(
    values: Array, curvatures: Array, scales: Array, schedule: Schedule
) -> tuple[Array, list[Array]]:
    """γ, (K,), and the value that replaces −∞ of each observation, (K,)."""
    blur = schedule.levels.sigma / schedule.levels.alpha
    through = jnp.mean(~jnp.isneginf(values), axis=1)
    wide = through >= 0.5 * jnp.max(through, axis=0)
    entry = jnp.max(jnp.where(wide, scales[:, None], 0.0), axis=0)
    typical = jnp.nan_to_num(
        jnp.nanmedian(jnp.where(jnp.isfinite(values), values, jnp.nan), axis=(0, 1))
    )
    stand_ins = jnp.where(blur[:, None] > entry * (1 + 1e-5), typical, -jnp.inf)
    return _powers(curvatures, scales, blur), list(stand_ins.T)


@once
def _far(values: Array, curvatures: Array, scales: Array) -> Array:
    """Whether noise takes log L of some observation lower than powers can mend, or
    makes it NaN, a boolean."""
    power = 1.0 / (1.0 + scales**2 * _sharp(curvatures))
    finite = jnp.where(jnp.isfinite(values), values, jnp.nan)
    below = power[:, None, None] * (
        jnp.nanmedian(finite, axis=1, keepdims=True) - values
    )
    # Powers of x fall by less than 1e4 nats below the median: x⁶ by 10, x¹⁰ by 1,000.
    far = jnp.mean(jnp.isnan(values) | ((below > 1e4) & jnp.isfinite(values)), axis=1)
    return jnp.any(far - far[0] >= 1 / 16)  # of the draws


def _sharp(curvatures: Array) -> Array:
    """H under each scale, (scales,), from the curvatures at draws, (scales, some)."""
    sharp = jnp.nanmedian(curvatures, axis=1)
    return jnp.clip(
        jnp.where(jnp.isnan(sharp), 0.0, sharp), tuning.TEMPERING_SHARPNESS, 1e30
    )


def _powers(curvatures: Array, scales: Array, blur: Array) -> Array:
    """γ, (K,), from the curvatures at draws under each scale, (scales, some)."""
    sharp = _sharp(curvatures)
    here = jnp.exp(jnp.interp(jnp.log(blur), jnp.log(scales), jnp.log(sharp)))
    inverse = 1.0 + blur**2 * here
    return jax.lax.cummin(inverse[0] / inverse)


@once
def _measured(
    traced: Traced,
    names: tuple[str, ...],
    xs: Sites,
    scales: Array,
    random: _Noise,
    near: Near | None,
) -> tuple[Array, Array]:
    """Under each scale: log L of every observation at every draw, (scales, draws,
    observations), and the largest curvature of their sum at some."""

    def at_scale(scale: Array) -> tuple[Array, Array]:
        def noised(random: _Noise, x: Sites) -> tuple[Callable[[Array], Array], Array]:
            flat, back = ravel_pytree(x)
            flat = flat + scale * random.noise

            def inputs(flat: Array) -> Sites:
                return back(flat) if near is None else near(back(flat), scale)

            latents = traced.draw(random.keys, inputs(flat))

            def log_likelihoods(flat: Array) -> Array:
                found = traced.statements_at(
                    {**latents, **inputs(flat)}, random.keys
                ).log_likelihoods
                return jnp.stack([found[name] for name in names])

            return log_likelihoods, flat

        def value(random: _Noise, x: Sites) -> Array:
            log_likelihoods, flat = noised(random, x)
            return log_likelihoods(flat)

        def curvature(random: _Noise, x: Sites) -> Array:
            log_likelihoods, flat = noised(random, x)
            slope = jax.grad(lambda flat: jnp.sum(log_likelihoods(flat)))
            step = 0.03 * scale  # the length of the secant

            def power_iteration(
                i: Array, carry: tuple[Array, Array]
            ) -> tuple[Array, Array]:
                """The slope at the start, then two iterations of the power method;
                exact for one direction."""
                start, way = carry
                here = slope(
                    flat + jnp.where(i == 0, 0.0, step / jnp.linalg.norm(way)) * way
                )
                return jnp.where(i == 0, here, start), jnp.where(
                    i == 0, way, (here - start) / step
                )

            _, way = jax.lax.fori_loop(0, 3, power_iteration, (flat, random.ways))
            return jnp.linalg.norm(way)

        some = jax.tree.map(lambda leaf: leaf[:16], (random, xs))
        return jax.vmap(value)(random, xs), jax.vmap(curvature)(*some)

    return jax.lax.map(at_scale, scales)


def _drawn(
    rng: np.random.Generator, parts: list[Gaussians], shape: tuple[int, ...]
) -> np.ndarray:
    """Draws of a site, (draws, *shape)."""
    flat = rng.standard_normal((tuning.TEMPERING_DRAWS, int(np.prod(shape))))
    for part in parts:
        log_weights = part.normalised().log_weights
        chosen = rng.choice(
            len(log_weights), tuning.TEMPERING_DRAWS, p=np.exp(log_weights)
        )
        noise = flat[:, part.entries]
        if part.covariances.ndim == 2:
            away = np.sqrt(part.covariances[chosen]) * noise
        else:
            widths, basis = np.linalg.eigh(part.covariances)
            roots = basis * np.sqrt(np.maximum(widths, 0.0))[:, None, :]
            away = np.einsum("lab,lb->la", roots[chosen], noise)
        flat[:, part.entries] = part.means[chosen] + away
    return flat.reshape(tuning.TEMPERING_DRAWS, *shape)
