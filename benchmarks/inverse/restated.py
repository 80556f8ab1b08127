r"""DPS, ΠGDM, MMPS, TDS and FPS-SMC, restated from their papers' formulas on any score
and any levels.

All start from noise and go down the levels of x_k = α_k·x₀ + σ_k·ε by steps of reverse
diffusion, whose law is `reversed_law`, and return x/α of level 0. Guidance g = ∇ log
p(y | x_k) moves E[x₀ | x_k] by (σ²/α)·g, which is Tweedie's formula for the score and g
together. Where a paper's own step is another, the function says so.

Cost is counted in passes through the network: one for a score, one for each product
with its Jacobian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import composeprob as cp


class Problem(NamedTuple):
    """y = A(x) + noise·ε under a prior that offers its score.

    Attributes:
        prior: a compiled program of noised sites, on the levels that are visited.
        measure: A, a matrix (M, d) or a function of all sites' numbers, flat and in
            their order.
        y: what was measured, (M,).
        noise: its standard deviation, a scalar.
    """

    prior: Any
    measure: Array | Callable[[Array], Array]
    y: Array
    noise: Array

    def on(self, levels: int) -> Problem:
        """The same on as many levels of equal steps in log-SNR between the ends of the
        prior's own."""
        schedule = self.prior.schedule
        log_snr = np.linspace(*np.asarray(schedule.log_snr, float)[[0, -1]], levels)
        return self._replace(
            prior=self.prior.on(cp.Schedule.from_arrays(*schedule.noise_at(log_snr)))
        )

    @property
    def size(self) -> int:
        """Numbers of all sites together."""
        return sum(math.prod(site.shape) for site in self.prior.sites.values())

    def apart(self, x: Array) -> dict[str, Array]:
        """The sites of flat numbers (d,)."""
        shapes = {name: site.shape for name, site in self.prior.sites.items()}
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
        parts = jnp.split(x, ends)
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def measured(self, x: Array) -> Array:
        """A(x) of flat numbers (d,)."""
        return self.measure(x) if callable(self.measure) else self.measure @ x

    def noise_at(self, k: Any) -> tuple[Array, Array]:
        """α and σ of a level."""
        at = self.prior.schedule.at(k)
        return at.alpha, at.sigma

    def denoised(self, x: Array, k: Array) -> Array:
        """E[x₀ | x_k], (d,)."""
        alpha, sigma = self.noise_at(k)
        scores = self.prior.score(self.apart(x), k)
        score = jnp.concatenate([scores[name].ravel() for name in self.prior.sites])
        return (x + sigma**2 * score) / alpha

    def reversed_law(self, x: Array, clean: Array, k: Array) -> tuple[Array, Array]:
        """Mean (d,) and variance, a scalar, of x_{k−1} given x_k and x₀."""
        alpha, sigma = self.noise_at(k)
        next_alpha, next_sigma = self.noise_at(k - 1)
        kept = alpha / next_alpha
        fresh = sigma**2 - (kept * next_sigma) ** 2
        mean = (kept * next_sigma**2 * x + next_alpha * fresh * clean) / sigma**2
        return mean, next_sigma**2 * fresh / sigma**2

    def blur(self, k: Array) -> Array:
        """r² = σ²/(α² + σ²), the variance of x₀ given x_k for data of unit variance, as
        ΠGDM takes it."""
        alpha, sigma = self.noise_at(k)
        return sigma**2 / (alpha**2 + sigma**2)


Method = Callable[[Problem, Array, int, int], Array]
"""Function of a problem, a key, the number n of samples, and the passes for each; it
returns the samples (n, d)."""


def independent(
    step: Callable[[Problem, Array, Array, Array], Array], cost: int
) -> Method:
    """n chains of a step (problem, key, x_k, k) → x_{k−1} that takes ``cost``
    passes."""

    @eqx.filter_jit
    def run(problem: Problem, key: Array, n: int) -> Array:
        def chain(key: Array) -> Array:
            top = problem.prior.num_levels - 1
            first, rest = jax.random.split(key)

            def visit(x: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
                return step(problem, at[0], x, at[1]), None

            x = problem.noise_at(top)[1] * jax.random.normal(first, (problem.size,))
            x, _ = jax.lax.scan(
                visit, x, (jax.random.split(rest, top), jnp.arange(top, 0, -1))
            )
            return x / problem.noise_at(0)[0]

        return jax.vmap(chain)(jax.random.split(key, n))

    return lambda problem, key, n, passes: run(problem.on(passes // cost + 1), key, n)


def dps(scale: float = 1.0) -> Method:
    """Diffusion posterior sampling (Chung et al. 2023, arXiv 2209.14687): an unguided
    step, less ζ·∇‖y − A(E[x₀ | x_k])‖, which is their ζ_k = ζ/‖y − A(·)‖ before the
    gradient of a square."""

    def step(problem: Problem, key: Array, x: Array, k: Array) -> Array:
        def distance(x: Array) -> tuple[Array, Array]:
            clean = problem.denoised(x, k)
            return jnp.linalg.norm(problem.y - problem.measured(clean)), clean

        slope, clean = jax.grad(distance, has_aux=True)(x)
        mean, variance = problem.reversed_law(x, clean, k)
        return (
            mean + jnp.sqrt(variance) * jax.random.normal(key, x.shape) - scale * slope
        )

    return independent(step, 2)


def _guided(
    problem: Problem, key: Array, x: Array, k: Array, clean: Array, guidance: Array
) -> Array:
    """A reverse step by the score and g together."""
    alpha, sigma = problem.noise_at(k)
    mean, variance = problem.reversed_law(x, clean + sigma**2 / alpha * guidance, k)
    return mean + jnp.sqrt(variance) * jax.random.normal(key, x.shape)


def pseudoinverse_guided() -> Method:
    """ΠGDM (Song et al. 2023, ICLR): p(y | x_k) ≈ N(y; A·E[x₀ | x_k], r²·A·Aᵀ +
    noise²). Their own step adds α·r²·g to one of DDIM, whatever its length, which many
    steps repeat; here g joins the score."""

    def step(problem: Problem, key: Array, x: Array, k: Array) -> Array:
        clean, pull = jax.vjp(lambda x: problem.denoised(x, k), x)
        a = problem.measure
        covariance = problem.blur(k) * a @ a.T + problem.noise**2 * jnp.eye(len(a))
        guidance = pull(a.T @ jnp.linalg.solve(covariance, problem.y - a @ clean))[0]
        return _guided(problem, key, x, k, clean, guidance)

    return independent(step, 2)


def moments(iterations: int = 3) -> Method:
    """MMPS (Rozet et al. 2024, arXiv 2405.13712): p(y | x_k) ≈ N(y; A·E[x₀ | x_k],
    noise² + A·V·Aᵀ) with V = (σ²/α)·∂E[x₀ | x_k]/∂x_k, solved by so many iterations of
    conjugate gradient, one product each."""

    def step(problem: Problem, key: Array, x: Array, k: Array) -> Array:
        alpha, sigma = problem.noise_at(k)
        clean, pull = jax.vjp(lambda x: problem.denoised(x, k), x)
        a = problem.measure

        def covariance(v: Array) -> Array:  # the Jacobian of a denoiser is symmetric
            return problem.noise**2 * v + sigma**2 / alpha * (a @ pull(a.T @ v)[0])

        residual = problem.y - a @ clean
        u = jnp.zeros_like(residual)
        r = residual
        p = r
        for _ in range(iterations):
            image = covariance(p)
            length = (r @ r) / jnp.where(p @ image > 0, p @ image, jnp.inf)
            u = u + length * p
            rest = r - length * image
            p = rest + (rest @ rest) / jnp.maximum(r @ r, 1e-20) * p
            r = rest
        return _guided(problem, key, x, k, clean, pull(a.T @ u)[0])

    return independent(step, 2 + iterations)


def _resampled(key: Array, log_w: Array) -> tuple[Array, Array]:
    """Ancestors, and log-weights after resampling.

    Resampling is systematic, if fewer than half of the particles are effective.
    """
    w = jax.nn.softmax(log_w)
    n = len(log_w)
    places = (jnp.arange(n) + jax.random.uniform(key)) / n
    drawn = jnp.clip(jnp.searchsorted(jnp.cumsum(w), places), 0, n - 1)
    due = 1 / jnp.sum(w**2) < 0.5 * n
    return jnp.where(due, drawn, jnp.arange(n)), jnp.where(due, 0.0, log_w)


def _final(key: Array, x: Array, log_w: Array) -> Array:
    """Particles of equal weight."""
    return x[jax.random.categorical(key, log_w, shape=log_w.shape)]


def twisted() -> Method:
    """TDS (Wu et al. 2023, arXiv 2306.17775): n particles, proposed by the score and
    ∇ log p̃(y | x_k).

    Importance weights correct the proposal and the twisting p̃. As in their inpainting,
    p̃ is widened by the noise of the level, here N(y; A(E[x₀ | x_k]), r²·A·Aᵀ + noise²),
    with r² alone if A is not a matrix; at level 0 it is the likelihood.
    """

    @eqx.filter_jit
    def run(problem: Problem, key: Array, n: int) -> Array:
        top = problem.prior.num_levels - 1

        def log_twist(x: Array, k: Array) -> tuple[Array, Array]:
            clean = jnp.where(k > 0, problem.denoised(x, k), x / problem.noise_at(0)[0])
            spread = jnp.where(k > 0, problem.blur(k), 0.0)
            gain = (
                jnp.eye(len(problem.y))
                if callable(problem.measure)
                else problem.measure @ problem.measure.T
            )
            root = jnp.linalg.cholesky(
                spread * gain + problem.noise**2 * jnp.eye(len(problem.y))
            )
            e = jax.scipy.linalg.solve_triangular(
                root, problem.y - problem.measured(clean), lower=True
            )
            return -0.5 * e @ e - jnp.sum(jnp.log(jnp.diagonal(root))), clean

        twist = jax.vmap(jax.value_and_grad(log_twist, has_aux=True), (0, None))

        def visit(carry: Any, at: tuple[Array, Array]) -> tuple[Any, None]:
            x, log_w, (old, clean), slope = carry
            key, k = at
            for_noise, for_ancestors = jax.random.split(key)
            chosen, log_w = _resampled(for_ancestors, log_w)
            x, old, clean, slope = x[chosen], old[chosen], clean[chosen], slope[chosen]
            alpha, sigma = problem.noise_at(k)
            reverse = jax.vmap(problem.reversed_law, (0, 0, None))
            unguided, variance = reverse(x, clean, k)
            mean, _ = reverse(x, clean + sigma**2 / alpha * slope, k)
            e = jax.random.normal(for_noise, x.shape)
            x = mean + jnp.sqrt(variance[0]) * e
            (value, clean), slope = twist(x, k - 1)
            # log of the reverse step's density over the proposal's.
            ratio = -0.5 * jnp.sum((x - unguided) ** 2, 1) / variance[0]
            ratio += 0.5 * jnp.sum(e**2, 1)
            return (x, log_w + ratio + value - old, (value, clean), slope), None

        first, rest, last = jax.random.split(key, 3)
        x = problem.noise_at(top)[1] * jax.random.normal(first, (n, problem.size))
        found, slope = twist(x, jnp.asarray(top))
        at = jax.random.split(rest, top), jnp.arange(top, 0, -1)
        carry, _ = jax.lax.scan(visit, (x, found[0], found, slope), at)
        return _final(last, carry[0], carry[1]) / problem.noise_at(0)[0]

    return lambda problem, key, n, passes: run(problem.on(passes // 2 + 1), key, n)


def filtering() -> Method:
    """FPS-SMC (Dou and Song 2024, ICLR): y_k = α_k·y + A·(the noise of x_k), drawn once
    for all n particles; x_{k−1} is drawn from p(x_{k−1} | x_k)·N(y_{k−1}; A·x_{k−1},
    (α·noise)²), a Gaussian, whose normaliser is the weight. The noise is that since
    level 0, so that level 0 meets y itself."""

    @eqx.filter_jit
    def run(problem: Problem, key: Array, n: int) -> Array:
        a = problem.measure
        top = problem.prior.num_levels - 1
        _, singular, axes = jnp.linalg.svd(a, full_matrices=False)
        first, second, rest, last = jax.random.split(key, 4)

        def noised(z: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            key, k = at
            alpha, sigma = problem.noise_at(k)
            next_alpha, next_sigma = problem.noise_at(k - 1)
            kept = alpha / next_alpha
            fresh = jnp.sqrt(sigma**2 - (kept * next_sigma) ** 2)
            noisier = kept * z + fresh * jax.random.normal(key, z.shape)
            return noisier, problem.noise_at(k - 1)[0] * problem.y + a @ z

        _, ys = jax.lax.scan(
            noised,
            jnp.zeros(problem.size),
            (jax.random.split(second, top), jnp.arange(1, top + 1)),
        )

        def visit(
            carry: tuple[Array, Array], at: tuple[Array, Array, Array]
        ) -> tuple[tuple[Array, Array], None]:
            x, log_w = carry
            key, k, y = at
            for_noise, for_ancestors = jax.random.split(key)
            clean = jax.vmap(problem.denoised, (0, None))(x, k)
            mean, variance = jax.vmap(problem.reversed_law, (0, 0, None))(x, clean, k)
            v = variance[0]
            s = (problem.noise_at(k - 1)[0] * problem.noise) ** 2
            covariance = v * a @ a.T + s * jnp.eye(len(a))
            e = jax.scipy.linalg.solve_triangular(
                jnp.linalg.cholesky(covariance), (y - mean @ a.T).T, lower=True
            )
            chosen, log_w = _resampled(for_ancestors, log_w - 0.5 * jnp.sum(e**2, 0))
            mean = mean[chosen]
            mean = mean + v * jnp.linalg.solve(covariance, (y - mean @ a.T).T).T @ a
            z = jax.random.normal(for_noise, x.shape)
            # The change of the standard deviation along each axis of A.
            narrowing = jnp.sqrt(s / (s + v * singular**2)) - 1
            x = mean + jnp.sqrt(v) * (z + (z @ axes.T * narrowing) @ axes)
            return (x, log_w), None

        x = problem.noise_at(top)[1] * jax.random.normal(first, (n, problem.size))
        at = jax.random.split(rest, top), jnp.arange(top, 0, -1), ys[::-1]
        (x, log_w), _ = jax.lax.scan(visit, (x, jnp.zeros(n)), at)
        return _final(last, x, log_w) / problem.noise_at(0)[0]

    return lambda problem, key, n, passes: run(problem.on(passes + 1), key, n)
