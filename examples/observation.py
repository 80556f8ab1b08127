"""An observation: a ring-shaped diffusion prior, and one noisy linear measurement of
the point.

Bayes' rule as a program: `cp.observe` multiplies the likelihood in. How it enters the
noisier levels is a policy ("exact", "moments", "tempered", "denoised", "noised");
whichever is chosen, level 0 is the same exact posterior. Here the compiler finds that
the closed form exists, and takes "exact".

    python examples/observation.py
    composeprob run examples/observation.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

schedule = cp.Schedule.log_snr(60)
angle = jnp.arange(8) * jnp.pi / 4
modes = 0.5 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
ring = cp.Analytic(
    dist.MixtureSameFamily(
        dist.Categorical(jnp.ones(8) / 8), dist.Normal(modes, 0.075).to_event(1)
    ),
    schedule,
)
DIRECTION = jnp.array([1.0, 0.5])
NOISE = 0.1


@cp.program
def observation(ring, y=0.35):
    x = cp.sample("x", ring)
    cp.observe("y", dist.Normal(x @ DIRECTION, NOISE), y)


def exact_shares(y=0.35):
    """Posterior shares of the modes: each mode's predictive density of y."""
    mean = modes @ DIRECTION
    variance = 0.075**2 * (DIRECTION @ DIRECTION) + NOISE**2
    likelihood = np.exp(-0.5 * (y - mean) ** 2 / variance)
    return likelihood / likelihood.sum()


def main(num_chains=2000, out="out"):
    density = cp.compile(observation, ring)
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())

    found = cp.metrics.mode_weights(result["x"], modes, result.log_weights)
    print("posterior share of each mode, sampled:", np.round(found, 3))
    print("                               exact:", np.round(exact_shares(), 3))
    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "observation.png"))
    return result


if __name__ == "__main__":
    main()
