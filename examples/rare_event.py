"""A rare event: how probable is it that a draw of a mixture lies beyond 11, which one
in a million does?

The event is soft evidence, and its probability the evidence of the program. Chains come
down to it from noise, so that no draw has to hit it by chance.
`result.log_evidence_error` is the ± in the logarithm; here the exact value is known.

    python examples/rare_event.py
    composeprob run examples/rare_event.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import log_ndtr
from scipy.stats import norm

import composeprob as cp

THRESHOLDS = (5.0, 7.0, 9.0, 11.0)
WIDTH = 0.1  # the event's edge is as soft as this
weights = np.array([0.3, 0.3, 0.2, 0.2])
means = np.array([[-4.0, 3.0], [-2.0, -3.0], [4.0, 3.0], [4.0, -3.0]])
covariances = np.array(
    [
        [[1, -0.5], [-0.5, 1]],
        [[1, 0.5], [0.5, 1]],
        [[2.4, 1.9], [1.9, 2]],
        [[2.4, -1.9], [-1.9, 2]],
    ]
)
modes = dist.MultivariateNormal(
    jnp.asarray(means), covariance_matrix=jnp.asarray(covariances)
)
law = cp.Analytic(
    dist.MixtureSameFamily(dist.Categorical(jnp.asarray(weights)), modes),
    cp.Schedule.log_snr(100, -10.0, 8.0),
)


@cp.program
def rare_event(law, threshold=THRESHOLDS[-1]):
    x = cp.sample("x", law)
    cp.factor("beyond", log_ndtr((x[0] - threshold) / WIDTH), anneal="denoised")


def exact(threshold):
    """E Φ((x₁ − τ)/WIDTH) of the mixture."""
    deviation = np.sqrt(covariances[:, 0, 0] + WIDTH**2)
    return weights @ norm.cdf((means[:, 0] - threshold) / deviation)


def main(num_chains=1000, out="out"):
    figure, (plane, curve) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    everywhere = law.distribution.sample(jax.random.key(1), (2000,))
    plane.plot(*everywhere.T, ".", ms=2, color="0.7", label="2,000 draws of the law")
    for threshold in THRESHOLDS:
        density = cp.compile(rare_event, law, jnp.float32(threshold))
        result = cp.infer(
            density,
            jax.random.key(0),
            num_chains=num_chains,
            sampler=cp.SMC(),
            levels="adaptive",
        )
        found = np.exp(result.log_evidence)
        error = result.log_evidence_error
        hits = int((np.asarray(everywhere)[:, 0] > threshold).sum())
        estimate = f"{found:.2e} ± {100 * error:.0f} %"
        print(f"P(x₁ > {threshold:g}): {estimate}, exactly {exact(threshold):.2e}")
        print(f"    {hits} of 2,000 draws of the law are there")
        curve.errorbar(threshold, found, found * error, fmt="o", color="tab:red")
    curve.plot([], [], "o", color="tab:red", label=f"found with {num_chains:,} chains")
    print(result.summary())

    label = f"given that x₁ > {threshold:g}"
    plane.plot(*result.unweighted()["x"].T, ".", ms=2, color="tab:red", label=label)
    plane.set(xlabel="x₁", ylabel="x₂")
    plane.legend(loc="lower left", markerscale=4)
    line = np.linspace(THRESHOLDS[0], THRESHOLDS[-1])
    exactly = [exact(threshold) for threshold in line]
    curve.plot(line, exactly, "k", lw=0.8, label="exact")
    curve.set(yscale="log", xlabel="τ", ylabel="P(x₁ > τ)")
    curve.legend()
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "rare_event.png"))
    return result


if __name__ == "__main__":
    main()
