"""The quality of a trained factor, against the exact distribution where that is
known."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from composeprob.compiler.pipeline import lowered
from composeprob.factors.analytic import Analytic
from composeprob.factors.factor import LeafFactor
from composeprob.language.decorator import single
from composeprob.metrics.distances import mode_weights, total_variation
from composeprob.runtime.infer import infer
from composeprob.samplers.sampler import Ancestral
from composeprob.schedule import Noise


def score_errors(
    factor: LeafFactor, reference: dist.Distribution, key: Array, *, num: int = 8000
) -> list[dict[str, float]]:
    """Measures the score's error at several log-SNR, against the exact score of the
    noised reference.

    With x drawn from the noised reference, s its exact score and ŝ the factor's,
    ``error`` is σ²·E‖ŝ − s‖²/d: the excess of the training loss over its least possible
    value. ``relative`` is E‖ŝ − s‖²/E‖s‖².

    Args:
        factor: a trained factor.
        reference: its exact distribution, which `Analytic` must know how to noise.
        key: for the draws.
        num: number of draws for each log-SNR.
    """
    exact = Analytic(reference, factor.schedule)
    rows = []
    for i, noise in enumerate(_noises(factor)):
        error, size = _compare(factor, exact, noise, jax.random.fold_in(key, i), num)
        sigma2 = float(noise.sigma) ** 2
        row = {
            "log_snr": float(noise.log_snr),
            "error": sigma2 * float(error),
            "relative": float(error / size),
        }
        rows.append(_rounded(row))
    return rows


def _rounded(row: dict[str, float]) -> dict[str, float]:
    """Its numbers to four digits."""
    return {name: float(f"{value:.4g}") for name, value in row.items()}


@eqx.filter_jit
def _compare(
    factor: LeafFactor, exact: Analytic, noise: Noise, key: Array, num: int
) -> tuple[Array, Array]:
    def squared_errors(point: Array) -> tuple[Array, Array]:
        given, true = (
            factor.evaluate(point, noise, factor.call_conditions())[1],
            exact.evaluate(point, noise, {})[1],
        )
        return jnp.mean((given - true) ** 2), jnp.mean(true**2)

    error, size = jax.vmap(squared_errors)(exact.at(noise).sample(key, (num,)))
    return jnp.mean(error), jnp.mean(size)


def _noises(factor: LeafFactor) -> list[Noise]:
    """The noises to look at: fixed log-SNR, or the levels nearest to them for a factor
    that knows only levels."""
    wanted = np.array(
        [-12.0, -8.0, -4.0, -2.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 9.5]
    )
    if factor.traits.levels == "own":
        known = np.asarray(factor.schedule.levels.log_snr)
        nearest = sorted(
            {int(np.abs(known - value).argmin()) for value in wanted}, reverse=True
        )
        return [factor.schedule.at(k) for k in nearest]
    pairs = zip(*factor.schedule.noise_at(wanted), strict=True)
    return [
        Noise(jnp.zeros((), int), jnp.float32(alpha), jnp.float32(sigma))
        for alpha, sigma in pairs
    ]


def sample_quality(
    factor: LeafFactor, reference: dist.Distribution, key: Array, *, num: int = 10_000
) -> dict[str, float]:
    """Measures samples that `Ancestral` draws from the factor alone, over its own
    levels.

    Returns:
        ``log_density_gap``: mean log-density of exact draws minus that of the samples,
        in nats, both under the exact distribution of level 0 (0 is perfect; samples
        that are too concentrated make it negative). ``mode_weights_tv``: total
        variation of the mode weights, for a mixture of components with distinct means;
        ``mode_weights_tv_exact``: the same for as many exact draws.
    """
    exact = Analytic(reference, factor.schedule)
    draw_key, sample_key = jax.random.split(key)
    clean = exact.at(factor.schedule.at(0))
    draws = clean.sample(draw_key, (num,))
    samples = reverse_samples(factor, sample_key, num)
    gap = jnp.mean(clean.log_prob(draws)) - jnp.mean(clean.log_prob(samples))
    found = {"log_density_gap": float(gap)}
    if (modes := _modes(reference)) is not None:
        truth, centres = modes
        found["mode_weights_tv"] = total_variation(
            mode_weights(samples, centres), truth
        )
        found["mode_weights_tv_exact"] = total_variation(
            mode_weights(draws, centres), truth
        )
    return _rounded(found)


def reverse_samples(factor: LeafFactor, key: Array, num: int) -> np.ndarray:
    """Samples of level 0 that `Ancestral` draws from the factor alone, over its own
    levels, (num, *event_shape)."""
    density = lowered(single, (factor,), {}, networks=False)
    return infer(density, key, num_chains=num, sampler=Ancestral(), progress=False)["x"]


def _modes(reference: dist.Distribution) -> tuple[Array, Array] | None:
    """Weights (M,) and means of a mixture's components; None where two means agree, as
    those of a bar with a floor."""
    if not isinstance(reference, dist.MixtureSameFamily):
        return None
    weights, means = (
        reference.mixing_distribution.probs,
        reference.component_distribution.mean,
    )
    flat = np.asarray(means).reshape(len(weights), -1)
    distances = np.linalg.norm(flat[:, None] - flat, axis=-1) + np.diag(
        np.full(len(flat), np.inf)
    )
    return (weights, means) if distances.min() > 1e-6 else None
