"""Quality of a trained factor, against the exact distribution in closed form."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from composeprob.compiler.pipeline import lowered
from composeprob.core import Analytic, Ancestral, LeafFactor, infer, single
from composeprob.errors import ShapeError
from composeprob.metrics.distances import mode_weights, total_variation
from composeprob.schedule import Noise

# Closer where the score of a usual model takes shape, at the cleaner end.
LOG_SNR = np.array(
    [-12.0, -8.0, -4.0, -2.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 9.5]
)


def score_errors(
    factor: LeafFactor, reference: dist.Distribution, key: Array, *, num: int = 8000
) -> list[dict[str, float]]:
    """Measure the score's error at several log-SNR, against the exact score.

    With x drawn from the noised reference, s its exact score and ŝ the factor's,
    ``error`` is σ²·E‖ŝ − s‖²/d: the excess of the training loss over its minimum.
    ``relative`` is E‖ŝ − s‖²/E‖s‖².

    Args:
        factor: a trained factor.
        reference: its exact distribution, of a kind that `Analytic` can noise.
        key: for the draws.
        num: number of draws for each log-SNR.

    Raises:
        ShapeError: a reference over other events than the factor's.
    """
    exact = _exact(factor, reference)
    rows = []
    for i, noise in enumerate(_noises(factor)):
        noise_key = jax.random.fold_in(key, i)
        error, size = _compare(factor, exact, noise, noise_key, num)
        sigma2 = float(noise.sigma) ** 2
        row = {
            "log_snr": float(noise.log_snr),
            "error": sigma2 * float(error),
            "relative": float(error / size),
        }
        rows.append(_rounded(row))
    return rows


def _exact(factor: LeafFactor, reference: dist.Distribution) -> Analytic:
    """Return the reference as a factor; refuse one over events of another shape, which
    would be compared by broadcasting."""
    exact = Analytic(reference, factor.schedule)
    if exact.event_shape != factor.event_shape:
        raise ShapeError(
            f"The factor's events have shape {factor.event_shape}, and those of the "
            f"reference {exact.event_shape}.",
            fix="pass the distribution of whole events, such as "
            "dist.Normal(jnp.zeros(2), 1.0).to_event(1).",
        )
    return exact


def _rounded(row: dict[str, float]) -> dict[str, float]:
    """Return a row's numbers to four digits."""
    return {name: float(f"{value:.4g}") for name, value in row.items()}


@eqx.filter_jit
def _compare(
    factor: LeafFactor, exact: Analytic, noise: Noise, key: Array, num: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return E‖ŝ − s‖²/d and E‖s‖²/d over draws of the exact distribution."""

    def squared_errors(x: Array) -> tuple[Array, Array]:
        _, score = factor.evaluate(x, noise, factor.call_conditions())
        _, exact_score = exact.evaluate(x, noise, {})
        return jnp.mean((score - exact_score) ** 2), jnp.mean(exact_score**2)

    draws = exact.at(noise).sample(key, (num,))
    error, size = jax.vmap(squared_errors)(draws)
    return jnp.mean(error), jnp.mean(size)


def _noises(factor: LeafFactor) -> list[Noise]:
    """Return the noises to compare at, by increasing log-SNR.

    A factor that is defined at its levels only is compared at the nearest levels, by
    decreasing index.
    """
    if factor.traits.levels == "own":
        log_snr = np.asarray(factor.schedule.levels.log_snr)
        nearest = {int(np.abs(log_snr - value).argmin()) for value in LOG_SNR}
        return [factor.schedule.at(k) for k in sorted(nearest, reverse=True)]
    alphas, sigmas = factor.schedule.noise_at(LOG_SNR)
    # Such a factor is evaluated by its noise: the index of a level stands for nothing.
    no_level = jnp.zeros((), int)
    return [
        Noise(no_level, jnp.float32(alpha), jnp.float32(sigma))
        for alpha, sigma in zip(alphas, sigmas, strict=True)
    ]


def sample_quality(
    factor: LeafFactor, reference: dist.Distribution, key: Array, *, num: int = 10_000
) -> dict[str, float]:
    """Measure samples that `Ancestral` draws from the factor alone, over its levels.

    Returns:
        ``log_density_gap``: mean log-density of exact draws minus that of the samples,
        in nats, both under the exact distribution of level 0 (0 is perfect; samples
        that are too concentrated make it negative). ``mode_weights_tv``: total
        variation of the mode weights, for a mixture of components with distinct means;
        ``mode_weights_tv_exact``: the same for as many exact draws.

    Raises:
        ShapeError: a reference over other events than the factor's.
    """
    exact = _exact(factor, reference)
    draw_key, sample_key = jax.random.split(key)
    clean = exact.at(factor.schedule.at(0))
    draws = clean.sample(draw_key, (num,))
    samples = reverse_samples(factor, sample_key, num)
    gap = jnp.mean(clean.log_prob(draws)) - jnp.mean(clean.log_prob(samples))
    quality = {"log_density_gap": float(gap)}
    modes = _modes(reference)
    if modes is not None:
        weights, centres = modes
        sampled = mode_weights(samples, centres)
        drawn = mode_weights(draws, centres)
        quality["mode_weights_tv"] = total_variation(sampled, weights)
        quality["mode_weights_tv_exact"] = total_variation(drawn, weights)
    return _rounded(quality)


def reverse_samples(
    factor: LeafFactor, key: Array, num: int
) -> Float[np.ndarray, "num ..."]:
    """Draw samples of level 0 from the factor alone, by `Ancestral` over its levels."""
    density = lowered(single, (factor,), {}, networks=False)
    return infer(density, key, num_chains=num, sampler=Ancestral(), progress=False)["x"]


def _modes(
    reference: dist.Distribution,
) -> tuple[Float[Array, " modes"], Float[Array, "modes ..."]] | None:
    """Return weights and means of a mixture's components.

    None for other distributions, and where two means agree, as those of a bar with a
    floor: samples could not be assigned to such components.
    """
    if not isinstance(reference, dist.MixtureSameFamily):
        return None
    weights = reference.mixing_distribution.probs
    means = reference.component_distribution.mean
    # An (M, M) table: mixtures of a few components only.
    flat = np.asarray(means).reshape(len(weights), -1)
    distances = np.linalg.norm(flat[:, None] - flat, axis=-1)
    np.fill_diagonal(distances, np.inf)
    if distances.min() <= 1e-6:
        return None
    return weights, means
