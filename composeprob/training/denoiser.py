"""The network of the default recipe of estimators: it corrects a linear regression, and sees sets of observations."""

from __future__ import annotations

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.factors.one_dimension import log_normal_mass

Box = tuple[Array, Array]


class _Block(eqx.Module):
    """h + W₂·swish(FiLM(norm(W₁·swish(norm h)))), with W₂ and FiLM zero at first (Perez et al. 2018)."""

    enter: eqx.nn.Linear
    leave: eqx.nn.Linear
    film: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, width: int, key: Array):
        keys = jax.random.split(key, 3)
        self.enter = eqx.nn.Linear(width, width, key=keys[0])
        self.leave = _zero(eqx.nn.Linear(width, width, key=keys[1]))
        self.film = _zero(eqx.nn.Linear(width, 2 * width, key=keys[2]))
        self.norm = eqx.nn.LayerNorm(width)

    def __call__(self, h: Array, embedding: Array) -> Array:
        gain, shift = jnp.split(self.film(embedding), 2)
        inner = self.norm(self.enter(jax.nn.swish(self.norm(h))))
        return h + self.leave(jax.nn.swish(inner * (1 + gain) + shift))


class PosteriorDenoiser(eqx.Module):
    r"""The noise in α·θ + σ·ε on a variance-preserving schedule, beginning as what a linear regression says of it.

    Were θ given x Gaussian with mean c(x) and variances v(x) along axes U, then ε̂ = U·σ·r/m with
    r = Uᵀ·(θ_k − α·c)/m and m² = α²·v + σ². Here

        ε̂ = σ·U·(r + α·√v·F/d)/m,   d² = α²·w² + σ²,

    where the network F is of order 1 wherever the noise is wider than the finest structure w (Karras et al. 2022), and
    below that changes the score by no more than F/w. At first F is 0, c is the linear regression of θ on x, U and v are
    of its residuals' covariance; a network of x learns to change c, v and w. In a box the mean
    of θ given θ_k becomes that of a Gaussian cut by its walls, of variances s² = U²·(σ²·v/m²) entry by entry: where
    walls only cut, F has nothing to learn.

    Args:
        theta: parameters (N, size), as all that follows in their own units.
        x: data (N, d), or sets of them (N, m, d).
        box: bounds (low, high) of θ, each (size,); None without.
        key: for the initial weights.
    """

    known: dict[str, Array]
    box: Box | None
    item: eqx.nn.MLP | None
    enter: eqx.nn.MLP
    gaussian: eqx.nn.Linear
    time: eqx.nn.Linear
    mix: eqx.nn.Linear
    first: eqx.nn.Linear
    blocks: list[_Block]
    last: eqx.nn.Linear
    gate: eqx.nn.Linear

    def __init__(self, theta: np.ndarray, x: np.ndarray, box: Box | None, key: Array):
        width, waves, depth = tuning.ESTIMATOR.width, tuning.ESTIMATOR.waves, tuning.ESTIMATOR.blocks
        size, keys = theta.shape[1], iter(jax.random.split(key, 8 + depth))
        every = tuple(range(x.ndim - 1))
        self.box, self.known = box, {}
        self._know(centre=theta.mean(0), scale=theta.std(0), x_centre=x.mean(every), x_scale=x.std(every) + 1e-12)
        told = np.asarray(jax.vmap(self._features)(jnp.asarray(x)), float)
        slope = np.linalg.lstsq(told, theta.astype(float), rcond=None)[0]
        residual = theta - told @ slope
        variance, axes = np.linalg.eigh(residual.T @ residual / len(x))
        self._know(slope=slope.T, axes=axes, deviation=np.sqrt(np.maximum(variance, 1e-8 * variance.max())))
        linear = lambda enter, leave: eqx.nn.Linear(enter, leave, key=next(keys))  # noqa: E731
        mlp = functools.partial(eqx.nn.MLP, out_size=width, width_size=width, activation=jax.nn.swish)
        self.item = mlp(2 * x.shape[-1], depth=1, key=next(keys)) if x.ndim == 3 else None
        self.enter = mlp(told.shape[1] + (width if self.item else 0), depth=2, key=next(keys))
        self.gaussian = _zero(linear(width, 3 * size))
        self.time, self.mix = linear(waves, width), linear(width, width)
        self.first = linear(2 * size + told.shape[1], width)
        self.blocks = [_Block(width, next(keys)) for _ in range(depth)]
        self.last, self.gate = _zero(linear(width, size)), _zero(linear(width, width))

    def _know(self, **arrays: np.ndarray) -> None:
        self.known |= {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}

    def _features(self, x: Array) -> Array:
        """What the regression is on: x in its units, also with its tails drawn in; of a set means, and deviations."""
        units = (x - self.known["x_centre"]) / self.known["x_scale"]
        parts = [units, jnp.arcsinh(units)]
        if x.ndim == 2:
            parts = [part.mean(0) for part in parts] + [jnp.log(units.std(0) + 1e-4)]
        return jnp.concatenate([*parts, jnp.ones(1)])

    def __call__(self, event: Array, t: Array, x: Array) -> Array:
        """ε̂, shape (size,), for one event at log-SNR t and one x."""
        known, box = jax.lax.stop_gradient((self.known, self.box))  # told, not learned
        features = jax.lax.stop_gradient(self._features(x))
        seen, size = features, len(event)
        if self.item is not None:
            within = (x - x.mean(0)) / (x.std(0) + 1e-6)
            items = jnp.concatenate([within, jnp.arcsinh((x - known["x_centre"]) / known["x_scale"])], axis=1)
            seen = jnp.append(features, jax.vmap(self.item)(items).mean(0))
        told = self.enter(seen)
        change = self.gaussian(jax.nn.swish(told))
        axes, mean = known["axes"], known["slope"] @ features
        mean = mean + axes @ (known["deviation"] * change[:size])
        deviation = known["deviation"] * jnp.exp(change[size : 2 * size])
        finest = tuning.ESTIMATOR.finest * deviation * jnp.exp(change[2 * size :])
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(t)), jnp.sqrt(jax.nn.sigmoid(-t))
        spread = jnp.sqrt((alpha * deviation) ** 2 + sigma**2)
        r = (event - alpha * mean) @ axes / spread
        level = t + 2 * jnp.mean(jnp.log(known["scale"]))  # log-SNR where θ has unit variance
        angle = 2 * jnp.pi * level / jnp.geomspace(*tuning.ESTIMATOR.periods, tuning.ESTIMATOR.waves // 2)
        told = self.time(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])) + told
        embedding = jax.nn.swish(self.mix(jax.nn.swish(told)))
        wide = (event - alpha * known["centre"]) / jnp.sqrt((alpha * known["scale"]) ** 2 + sigma**2)
        h = self.first(jnp.concatenate([r, wide, features]))
        for block in self.blocks:
            h = block(h, embedding)
        corrected = self.last(jax.nn.swish(h) * (1 + self.gate(embedding)))
        fine = jnp.sqrt((alpha * finest) ** 2 + sigma**2)
        noise = sigma * (axes @ ((r + alpha * deviation * corrected / fine) / spread))
        if box is None:
            return noise
        low, high = box
        s = jnp.sqrt(axes**2 @ (sigma * deviation / spread) ** 2)
        mean = (event - sigma * noise) / alpha
        near = jnp.clip(mean, low - 30 * s, high + 30 * s)  # from farther away exp(−l²/2) has no digits left
        lower, upper = (low - near) / s, (high - near) / s
        log_mass = log_normal_mass(lower, upper, upper - lower) + 0.5 * math.log(2 * math.pi)
        pull = jnp.exp(-0.5 * lower**2 - log_mass) - jnp.exp(-0.5 * upper**2 - log_mass)  # (φ(l) − φ(u))/(Φ(u) − Φ(l))
        return noise - alpha / sigma * (near - mean + s * pull)


def _zero(layer: eqx.nn.Linear) -> eqx.nn.Linear:
    return jax.tree.map(jnp.zeros_like, layer)
