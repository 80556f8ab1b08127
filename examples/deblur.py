"""Deblurring with unknown noise: where in a blurred, noisy signal is the step, and how
sharp was it?

The prior is a mixture: a step at one of 21 places, with smooth deviations. The compiler
sees that a blur is linear and the noise Gaussian, and anneals the observation exactly,
although the noise's scale is a latent.

    python examples/deblur.py
    composeprob run examples/deblur.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

N = 32
place = np.arange(N)
PLACES = np.arange(6, 27)
steps = np.where(place >= PLACES[:, None], 0.8, -0.8)
kernel = np.exp(-0.5 * ((place[:, None] - place) / 3.0) ** 2)
covariance = 0.05 * kernel + 1e-3 * np.eye(N)
shapes = dist.MultivariateNormal(jnp.asarray(steps), jnp.asarray(covariance))
places = dist.Categorical(probs=jnp.full(len(PLACES), 1 / len(PLACES)))
signal = cp.Analytic(dist.MixtureSameFamily(places, shapes), cp.Schedule.log_snr(60))
blur = kernel / kernel.sum(1, keepdims=True)

rng = np.random.default_rng(0)
truth = rng.multivariate_normal(steps[8], covariance)
blurred = jnp.asarray(blur @ truth + 0.15 * rng.normal(size=N))


@cp.program
def deblur(signal, blurred=blurred):
    x = cp.sample("x", signal)
    noise = cp.sample("noise", dist.LogNormal(jnp.log(0.2), 0.7))
    cp.observe("y", dist.Normal(jnp.asarray(blur) @ x, noise), blurred)


def exact():
    """Posterior shares of the places and mean noise, by quadrature over the noise."""
    grid = np.exp(np.linspace(-4, 0.5, 200))
    away = np.asarray(blurred) - steps @ blur.T
    log_weight = np.zeros((grid.size, len(PLACES)))
    for i, noise in enumerate(grid):
        total = blur @ covariance @ blur.T + noise**2 * np.eye(N)
        distance2 = np.einsum("jn,nm,jm->j", away, np.linalg.inv(total), away)
        fit = distance2 + np.linalg.slogdet(total)[1]
        log_weight[i] = -0.5 * fit - 0.5 * (np.log(noise / 0.2) / 0.7) ** 2
    weight = np.exp(log_weight - log_weight.max())
    return weight.sum(0) / weight.sum(), float(weight.sum(1) @ grid / weight.sum())


def main(num_chains=2000, out="out"):
    density = cp.compile(deblur, signal)
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())
    draws = result.unweighted()
    shares, noise = exact()
    likely = PLACES[shares.argmax()]
    print(f"exact: most likely a step at {likely}, with share {shares.max():.2f}")
    print(f"mean of the noise {draws['noise'].mean():.4f}, exactly {noise:.4f}")

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.set(xlabel="place", ylabel="value")
    low, middle, high = np.quantile(draws["x"], [0.05, 0.5, 0.95], axis=0)
    label = "90 % of the posterior"
    axis.fill_between(place, low, high, color="tab:blue", alpha=0.25, label=label)
    axis.plot(place, middle, color="tab:blue", label="median")
    axis.plot(place, truth, "k", label="truth")
    axis.plot(place, blurred, ".", color="tab:red", label="blurred and noisy")
    axis.legend()
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "deblur.png"))
    return result


if __name__ == "__main__":
    main()
