"""A reverse step turned round: where noise leads from the level below, if chains come down with a control."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.samplers.fit import Fit, flat, power, times, unflat

STEPS = 8
"""Of the implicit midpoint rule between two levels: 2e-4 of error where the control moves chains by half of x."""


class Turned(eqx.Module):
    r"""The law N(R·y' + b, C) of y = x/α at a level, given y' at the level below, for either half of the chains.

    In y the reverse step is dy = (S + u) dτ + dW, with u = A·y + a affine. Where F_k weighs what starts at the level
    above, F_k' weighs what ends at the level below, and the same paths seen from there are those of

        dy = −(A·y + a) ds + dW,    s = σ²/α² from s_k' to s_k,

    whatever S is: noise as it enters anyway, N(y', s_k − s_k'), but for the control. It is integrated by the implicit
    midpoint rule, which is stable for any A ≥ 0 and has the variance of equal Gaussians' products right. Between the
    levels s·A of what was fitted is taken for linear in s, as it nearly is for Gaussians of any width.

    Attributes:
        decay: R, (2, d, d) or (2, d) for a diagonal.
        shift: b, (2, d).
        root: a root of C, structured like R.

    References:
        Anderson (1982), *Reverse-time diffusion equation models*, for the drift that turns round; Hairer and Wanner
        (1996), *Solving ordinary differential equations II*, for the rule.
    """

    decay: Array
    shift: Array
    root: Array

    @classmethod
    def between(
        cls, density: AnnealedDensity, level: Array, below: Array, fits: tuple[Fit, Fit] | None, control: bool
    ) -> Turned:
        """The law of one step.

        Args:
            density: gives the schedule and the powers.
            level, below: k and k', where the step starts and where it ends.
            fits: what was fitted at both; None without.
            control: whether there is one.
        """
        s1, s0, total = scale(density, level)[1], scale(density, below)[1], power(density)
        blank = jnp.zeros((2, total.size))
        gains = [blank, blank] if fits is None else [fit.gain for fit in fits]
        ones = jnp.broadcast_to(identity(gains[0][0]), gains[0].shape)
        still = cls(ones, blank, ones * jnp.sqrt(s1 - s0))
        if not control:
            return still
        pushes = [blank, blank]
        if fits is not None:
            pushes = [fit.push - jax.vmap(times, (0, None))(fit.gain, fit.centre) for fit in fits]
        step = (s1 - s0) / STEPS

        def advance(i: Array, law: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            decay, shift, variance = law
            share = (i + 0.5) / STEPS
            s = s0 + share * (s1 - s0)
            gain, push = (((1 - share) * s0 * last + share * s1 * first) / s for first, last in (gains, pushes))
            fixed = 0.5 * (total - 1) / (1 + s)
            gain = gain + (jnp.diag(fixed) if gain.ndim == 3 else fixed)
            half = inverse(ones + 0.5 * step * gain)
            whole = 2 * half - ones
            variance = step * product(half, half) + product(product(whole, variance), whole)
            shift = jax.vmap(times)(whole, shift) - step * jax.vmap(times)(half, push)
            return product(whole, decay), shift, variance

        decay, shift, variance = jax.lax.fori_loop(0, STEPS, advance, (ones, blank, jnp.zeros_like(ones)))
        law = cls(decay, shift, jnp.linalg.cholesky(variance) if variance.ndim == 3 else jnp.sqrt(variance))
        fine = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(law)]))
        return jax.tree.map(lambda of, other: jnp.where(fine, of, other), law, still)

    def leads(
        self, position: Position, noise: Position, half: Array, density: AnnealedDensity, levels: tuple[Array, Array]
    ) -> Position:
        """Where this noise, N(0, I) at noised sites, leads one chain of this half; other sites stay."""
        (above, _), (below, _) = (scale(density, level) for level in levels)
        both = jax.vmap(times, (0, None))
        y = both(self.decay, flat(position, density) / below) + self.shift + both(self.root, flat(noise, density))
        return unflat(above * y[half], position, density)


def scale(density: AnnealedDensity, level: Array) -> tuple[Array, Array]:
    """α and s = σ²/α² of a level."""
    noise = density.schedule.at(level)
    return noise.alpha, (noise.sigma / noise.alpha) ** 2


def identity(like: Array) -> Array:
    """The unit matrix, or its diagonal."""
    return jnp.eye(len(like)) if like.ndim == 2 else jnp.ones_like(like)


def product(left: Array, right: Array) -> Array:
    """Products of matrices, or of diagonals, of both halves; the matrices are symmetric or powers of one another."""
    return left @ right if left.ndim == 3 else left * right


def inverse(matrix: Array) -> Array:
    """Of the matrix, or the diagonal, of each half."""
    return jnp.linalg.inv(matrix) if matrix.ndim == 3 else 1 / matrix
