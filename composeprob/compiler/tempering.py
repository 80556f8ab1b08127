"""The powers under which observations count at each level, by the sharpness of their
likelihoods."""

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
from jaxtyping import Bool, Float

from composeprob import tuning
from composeprob.compiler.conjugate import Prior
from composeprob.compiler.trace import Sites, Traced
from composeprob.density.once import once
from composeprob.factors.gaussians import Gaussians
from composeprob.language.policies import Policy
from composeprob.schedule import Noise, Schedule


class Tempered(Policy):
    """The program sees x/α, and the power suits the sharpness of the likelihood.

    Where log L falls faster than any power of x/α, the program sees a point between x/α
    and the prior's mean (`Near`).
    """

    measured = True
    network_free = True


class Near(eqx.Module):
    r"""The point m + v·(x/α − m)/(v + r²) that observations see in the place of x/α if
    they fall faster than any power of x, such as Poisson counts of mean exp(x).

    Noise of variance r² = σ²/α² carries x/α far from all data. There such likelihoods
    are exp(−10³⁰) or overflow, which no power γ corrects. The point is the mean of x₀
    given x under a prior N(m, v), entry by entry. It stays where the prior is, and
    tends to x/α as the noise vanishes.

    Attributes:
        mean: m of each noised site: of its prior where that is a mixture of Gaussians,
            else 0.
        variance: v, or 1.
    """

    mean: Sites
    variance: Sites

    def __call__(self, clean: Sites, blur: Array) -> Sites:
        """The sites as observations see them, given ``clean`` = x/α and ``blur`` =
        r."""
        # v/(v + r²), the regression of x₀ on x/α.
        shrink = {name: v / (v + blur**2) for name, v in self.variance.items()}
        return {
            name: self.mean[name] + shrink[name] * (x - self.mean[name])
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
    wall that divides a space. A box, though, is so small beside the noise of the first
    levels that no chain would be in it. So a wall stands only from the level on at
    which the share of draws inside is at least half of the largest share; above that
    level the median of log L stands in for −∞.

    Attributes:
        power: γ, (K,).
        stand_in: ``{observation: (K,)}``; −∞ where the wall stands.
        near: the point that tempered observations see; None for x/α.
    """

    power: Array
    stand_in: Sites
    near: Near | None = None

    def log_likelihood(self, name: str, log_likelihood: Array, noise: Noise) -> Array:
        """log L to the level's power, a scalar."""
        stand_in = self.stand_in[name][noise.index]
        finite = jnp.where(jnp.isneginf(log_likelihood), stand_in, log_likelihood)
        return self.power[noise.index] * finite


def tempering(
    traced: Traced,
    names: tuple[str, ...],
    priors: Mapping[str, Prior | str],
    shapes: dict[str, tuple[int, ...]],
    schedule: Schedule,
) -> Tempering:
    """The powers for the observations ``names``, from their likelihoods at draws of
    each noised site's prior.

    Args:
        traced: the program.
        names: the observations.
        priors: the prior of each noised site; N(0, 1) stands for one that is not a
            mixture of Gaussians.
        shapes: the sites' shapes.
        schedule: the levels.
    """
    parts: dict[str, list[Gaussians]] = {}
    for name, prior in priors.items():
        parts[name] = prior.parts if isinstance(prior, Prior) else []
    # x₀; `_measured` adds noise of every scale.
    rng = np.random.default_rng(0)
    dtype = np.dtype(jnp.result_type(float))
    xs: dict[str, Any] = {}
    for name, shape in shapes.items():
        xs[name] = _drawn(rng, parts[name], shape).astype(dtype)
    # Compiled in three pieces. The program is in one of them alone; the others serve
    # all programs of these sizes.
    scales = _scales(schedule)
    noise = _noise(sum(math.prod(shape) for shape in shapes.values()))
    near: Near | None = None
    values, curvatures = _measured(traced, names, xs, scales, noise, near)
    # Where noise carries x/α too far, everything is measured once more at points near
    # the prior.
    if _far(values, curvatures, scales):
        near = _near(parts, shapes)
        values, curvatures = _measured(traced, names, xs, scales, noise, near)
    power, stand_ins = _powers_and_stand_ins(values, curvatures, scales, schedule)
    return Tempering(power, dict(zip(names, stand_ins, strict=True)), near)


def _near(
    parts: dict[str, list[Gaussians]], shapes: dict[str, tuple[int, ...]]
) -> Near:
    """`Near` with the moments of these priors."""
    dtype = jnp.result_type(float)
    means = {}
    variances = {}
    for name, shape in shapes.items():
        mean = np.zeros(math.prod(shape))
        variance = np.ones(math.prod(shape))
        for part in parts[name]:
            mean[part.entries], variance[part.entries] = part.normalised().moments
        means[name] = jnp.asarray(mean.reshape(shape), dtype)
        variances[name] = jnp.asarray(variance.reshape(shape), dtype)
    return Near(means, variances)


class _Noise(NamedTuple):
    """Random numbers of each draw.

    Attributes:
        keys: a key for the latents.
        noise: ξ, a number for each entry of the noised sites.
        direction: the direction that the power method starts from.
    """

    keys: Array
    noise: Float[Array, "*draws size"]
    direction: Float[Array, "*draws size"]


@once
def _noise(size: int) -> _Noise:
    """Random numbers of every draw, for noised sites of ``size`` entries in all."""

    def draw(key: Array) -> _Noise:
        draw_key, noise_key, direction_key = jax.random.split(key, 3)
        return _Noise(
            draw_key,
            jax.random.normal(noise_key, (size,)),
            jax.random.normal(direction_key, (size,)),
        )

    return jax.vmap(draw)(jax.random.split(jax.random.key(0), tuning.TEMPERING_DRAWS))


@once
def _scales(schedule: Schedule) -> Float[Array, " scales"]:
    """Sizes of noise: ten from the cleanest level's to the noisiest's."""
    blur = schedule.levels.sigma / schedule.levels.alpha
    return jnp.exp(jnp.linspace(jnp.log(blur[0]), jnp.log(blur[-1]), 10))


@once
def _powers_and_stand_ins(
    values: Float[Array, "scales draws observations"],
    curvatures: Float[Array, "scales some"],
    scales: Float[Array, " scales"],
    schedule: Schedule,
) -> tuple[Float[Array, " levels"], list[Float[Array, " levels"]]]:
    """γ, and the value that replaces −∞ of each observation."""
    blur = schedule.levels.sigma / schedule.levels.alpha
    inside = jnp.mean(~jnp.isneginf(values), axis=1)
    # A wall may stand under noise that leaves enough draws inside.
    wide = inside >= 0.5 * jnp.max(inside, axis=0)
    # The largest noise under which a wall stands.
    entry = jnp.max(jnp.where(wide, scales[:, None], 0.0), axis=0)
    finite = jnp.where(jnp.isfinite(values), values, jnp.nan)
    typical = jnp.nan_to_num(jnp.nanmedian(finite, axis=(0, 1)))
    # The tolerance is for rounding: `scales` has the noise of levels in it.
    stand_ins = jnp.where(blur[:, None] > entry * (1 + 1e-5), typical, -jnp.inf)
    return _powers(curvatures, scales, blur), list(stand_ins.T)


@once
def _far(
    values: Float[Array, "scales draws observations"],
    curvatures: Float[Array, "scales some"],
    scales: Float[Array, " scales"],
) -> Bool[Array, ""]:
    """True if noise takes log L of some observation lower than powers can correct, or
    makes it NaN."""
    power = 1.0 / (1.0 + scales**2 * _sharp(curvatures))
    finite = jnp.where(jnp.isfinite(values), values, jnp.nan)
    median = jnp.nanmedian(finite, axis=1, keepdims=True)
    below = power[:, None, None] * (median - values)
    # Powers of x fall by less than 1e4 nats below the median: x⁶ by 10, x¹⁰ by 1,000.
    lost = jnp.isnan(values) | ((below > 1e4) & jnp.isfinite(values))
    share = jnp.mean(lost, axis=1)
    return jnp.any(share - share[0] >= 1 / 16)


def _sharp(curvatures: Float[Array, "scales some"]) -> Float[Array, " scales"]:
    """H under each scale, from the curvatures at draws."""
    sharp = jnp.nanmedian(curvatures, axis=1)
    sharp = jnp.where(jnp.isnan(sharp), 0.0, sharp)
    return jnp.clip(sharp, tuning.TEMPERING_SHARPNESS, 1e30)


def _powers(
    curvatures: Float[Array, "scales some"],
    scales: Float[Array, " scales"],
    blur: Float[Array, " levels"],
) -> Float[Array, " levels"]:
    """γ, from the curvatures at draws under each scale."""
    sharp = _sharp(curvatures)
    at_level = jnp.exp(jnp.interp(jnp.log(blur), jnp.log(scales), jnp.log(sharp)))
    # γ_k = min over j ≤ k of (1 + r₀²·H₀)/(1 + r_j²·H_j): never more than below.
    inverse = 1.0 + blur**2 * at_level
    return jax.lax.cummin(inverse[0] / inverse)


@once
def _measured(
    traced: Traced,
    names: tuple[str, ...],
    xs: Sites,
    scales: Float[Array, " scales"],
    random: _Noise,
    near: Near | None,
) -> tuple[
    Float[Array, "scales draws observations"],
    Float[Array, "scales some"],
]:
    """log L of every observation at every draw under each scale, and the largest
    curvature of their sum at the first 16 draws."""

    def at_scale(scale: Array) -> tuple[Array, Array]:
        def noised(random: _Noise, x: Sites) -> tuple[Callable[[Array], Array], Array]:
            """log L of every observation as a function of the flattened noised sites,
            and the point x₀ + r·ξ."""
            flat, unravel = ravel_pytree(x)
            flat = flat + scale * random.noise

            def inputs(flat: Array) -> Sites:
                sites: Sites = unravel(flat)
                return sites if near is None else near(sites, scale)

            latents = traced.draw(random.keys, inputs(flat))

            def log_likelihoods(flat: Array) -> Array:
                statements = traced.statements_at(
                    {**latents, **inputs(flat)}, random.keys
                )
                return jnp.stack([statements.log_likelihoods[name] for name in names])

            return log_likelihoods, flat

        def value(random: _Noise, x: Sites) -> Array:
            log_likelihoods, flat = noised(random, x)
            return log_likelihoods(flat)

        def curvature(random: _Noise, x: Sites) -> Array:
            log_likelihoods, flat = noised(random, x)
            gradient = jax.grad(lambda flat: jnp.sum(log_likelihoods(flat)))
            # The power method on the Hessian, whose products with a direction are
            # differences of gradients over this length.
            length = 0.03 * scale

            def power_iteration(
                i: Array, carry: tuple[Array, Array]
            ) -> tuple[Array, Array]:
                """Evaluates the gradient at the start, then iterates twice; exact for
                one direction."""
                at_start, direction = carry
                step = jnp.where(i == 0, 0.0, length / jnp.linalg.norm(direction))
                here = gradient(flat + step * direction)
                product = (here - at_start) / length
                return (
                    jnp.where(i == 0, here, at_start),
                    jnp.where(i == 0, direction, product),
                )

            start = (flat, random.direction)
            _, product = jax.lax.fori_loop(0, 3, power_iteration, start)
            return jnp.linalg.norm(product)

        some = jax.tree.map(lambda leaf: leaf[:16], (random, xs))
        return jax.vmap(value)(random, xs), jax.vmap(curvature)(*some)

    return jax.lax.map(at_scale, scales)


def _drawn(
    rng: np.random.Generator, parts: list[Gaussians], shape: tuple[int, ...]
) -> Float[np.ndarray, "draws ..."]:
    """Draws of a site from its prior, from N(0, 1) where no part has an entry."""
    draws = tuning.TEMPERING_DRAWS
    flat = rng.standard_normal((draws, int(np.prod(shape))))
    for part in parts:
        log_weights = part.normalised().log_weights
        chosen = rng.choice(len(log_weights), draws, p=np.exp(log_weights))
        noise = flat[:, part.entries]
        if part.covariances.ndim == 2:
            away = np.sqrt(part.covariances[chosen]) * noise
        else:
            widths, basis = np.linalg.eigh(part.covariances)
            roots = basis * np.sqrt(np.maximum(widths, 0.0))[:, None, :]
            away = np.einsum("lab,lb->la", roots[chosen], noise)
        flat[:, part.entries] = part.means[chosen] + away
    return flat.reshape(draws, *shape)
