"""One step of the reverse process, from a level to the next cleaner one."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.pytree import all_finite, normal_like, where


def reverse_step(
    key: Array,
    position: Position,
    score: Position,
    density: AnnealedDensity,
    level: Array,
    eta: Array | float = 1.0,
    below: Array | None = None,
) -> Position:
    """x_{k−1} given x_k, for one chain: static sites stay, and so does a chain that a non-finite score would move.

    With x̂_0 = (x + σ_k²·s)/α_k and ε̂ = −σ_k·s,

        x_{k−1} = α_{k−1}·x̂_0 + √(σ_{k−1}² − v)·ε̂ + √v·ξ,    v = η²·β_k·σ_{k−1}²/σ_k².

    η = 1 is DDPM's ancestral step, η = 0 the deterministic DDIM step.

    Args:
        key: typed random key.
        position: x_k.
        score: s, the score to follow, same structure.
        density: gives the schedule and says which sites are noised.
        level: k ≥ 1.
        eta: η in [0, 1].
        below: the level that the step ends at, in place of k − 1.

    References:
        Ho et al. 2020; Song, Meng and Ermon 2021, equation 12.
    """
    mean, variance = reverse_law(position, score, density, level, eta, below)
    noise = normal_like(key, position)

    def move(name: str) -> Array:
        if density.sites[name].kind != "noised":
            return position[name]
        return mean[name] + jnp.sqrt(variance) * noise[name]

    moved = {name: move(name) for name in position}
    return where(all_finite(moved), moved, position)


LEAN = 0.5
"""How far data and user energies may shift a reverse step, in units of its noise."""


def leaning(
    position: Position,
    drift: Position,
    score: Position,
    density: AnnealedDensity,
    level: Array,
    below: Array | None = None,
) -> Position:
    """The score that a weighed reverse step follows: ∇log(F·E), and of ∇log G as much as shifts the step by at most
    half the length √(v·d) of its noise.

    Data pull chains along, which saves the weights from picking the few that found their way by chance. Where G is much
    narrower than the level's noise, though, its gradient would throw chains far off.

    Args:
        position: x_k.
        drift, score: ∇log(F·E) and ∇log π there, under level k.
        density, level, below: as of `reverse_step`.

    References:
        Wu, Trippe, Naesseth, Blei and Cunningham (2023), *Practical and asymptotically exact conditional sampling in
        diffusion models*: the twisted proposal.
    """
    noised = [name for name in position if density.sites[name].kind == "noised"]
    plain, variance = reverse_law(position, drift, density, level, below=below)
    full, _ = reverse_law(position, score, density, level, below=below)
    shift = sum((jnp.sum((full[name] - plain[name]) ** 2) for name in noised), jnp.zeros(()))
    longest = LEAN**2 * variance * sum(position[name].size for name in noised)
    share = jnp.sqrt(jnp.where(shift > longest, longest / shift, 1.0))
    share = jnp.where(jnp.isfinite(shift), share, 0.0)

    def leaned(name: str) -> Array:
        return drift[name] + jnp.where(share > 0, share * (score[name] - drift[name]), 0.0)

    return {name: leaned(name) if name in noised else drift[name] for name in position}


def log_ratio_of_leaning(
    position: Position,
    drift: Position,
    followed: Position,
    moved: Position,
    density: AnnealedDensity,
    level: Array,
    below: Array | None = None,
) -> Array:
    """log N(x'; reverse step along ∇log(F·E)) − log N(x'; reverse step along `leaning`), a scalar.

    Args:
        position, density, level, below: as of `leaning`.
        drift, followed: the two scores.
        moved: x', drawn from the second law.
    """
    plain, variance = reverse_law(position, drift, density, level, below=below)
    leaned, _ = reverse_law(position, followed, density, level, below=below)
    noised = [name for name in position if density.sites[name].kind == "noised"]
    # (x' − leaned)² − (x' − plain)², as a product: exactly zero where they agree
    terms = [jnp.sum((leaned[n] - plain[n]) * (leaned[n] + plain[n] - 2 * moved[n])) for n in noised]
    return sum(terms, jnp.zeros(())) / (2 * variance)


def second_order(
    moved: Position,
    ended: Position,
    position: Position,
    began: Position,
    density: AnnealedDensity,
    level: Array,
    below: Array | None = None,
) -> Position:
    """Corrects a `reverse_step` from k to k − 1 by the score where it ended.

    The step takes x̂_0 for constant on its way. With x' and c = α_{k−1}·β_k/σ_k², the weight of x̂_0 in its mean,

        x' ← x' + γ·c·(x̂_0(x', k − 1) − x̂_0(x_k, k)),
        γ = α_{k−1}·(√(1 + c²·σ_k²/(α_k²·v)) − 1)/c · exp(−(λ_{k−1} − λ_k)/4).

    γ → ½ as levels get closer: Heun's method, in which x̂_0 is integrated by the trapezoid rule and the noise goes
    through both ends. Where F is a noised marginal DDPM's step has the right mean and too small a variance, v, that of
    x_{k−1} given x_k and x_0: at the end of 60 levels a Gaussian lacks 15 % of its variance. The root is what gives
    noise that passes through both ends the variance it lacks where data are much wider than the level's noise, were
    the slope of x̂_0 the same at both; the exponential takes the geometric mean of their values there. With it the
    variance is right to 0.02 % after 60 levels, to 0.2 % after 32.

    Args:
        moved, ended: x', what `reverse_step` made of ``position``, and the score there, under level k − 1.
        position, began: x_k, and the score there, under level k.
        density, level, below: as of `reverse_step`.

    References:
        Kloeden and Platen (1992), chapter 15, for the weak order of Heun's method under additive noise; Bao, Li, Zhu
        and Zhang (2022), *Analytic-DPM*, for the variance that DDPM's step lacks.
    """
    end = level - 1 if below is None else below
    here, there = density.schedule.at(level), density.schedule.at(end)
    _, variance = reverse_law(position, began, density, level, below=below)
    weight = there.alpha * density.schedule.added(level, below) / here.sigma**2
    share = jnp.sqrt(1 + (weight * here.sigma / here.alpha) ** 2 / variance) - 1  # γ·c/α_{k−1}
    share = share * jnp.exp(0.25 * (here.log_snr - there.log_snr))

    def corrected(name: str) -> Array:
        if density.sites[name].kind != "noised":
            return moved[name]
        clean = moved[name] + there.sigma**2 * ended[name]
        before = there.alpha / here.alpha * (position[name] + here.sigma**2 * began[name])
        return moved[name] + share * (clean - before)

    settled = {name: corrected(name) for name in moved}
    return where(all_finite(settled), settled, moved)


def reverse_law(
    position: Position,
    score: Position,
    density: AnnealedDensity,
    level: Array,
    eta: Array | float = 1.0,
    below: Array | None = None,
) -> tuple[Position, Array]:
    """The law N(mean, v·I) from which `reverse_step` draws the noised sites.

    Returns:
        The mean, structured like the position, and v, a scalar.
    """
    here, there = density.schedule.at(level), density.schedule.at(level - 1 if below is None else below)
    variance = eta**2 * density.schedule.added(level, below) * (there.sigma / here.sigma) ** 2
    direction = jnp.sqrt(jnp.maximum(there.sigma**2 - variance, 0.0))

    def mean(name: str) -> Array:
        x, s = position[name], score[name]
        return there.alpha / here.alpha * (x + here.sigma**2 * s) - direction * here.sigma * s

    return {name: mean(name) for name in position}, variance
