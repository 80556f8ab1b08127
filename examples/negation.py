"""A negation: points on the ring but NOT at its right-hand side.

Dividing by a factor avoids what it describes: ring^1.3 / right^0.3, the form of Du et al. (2023). What is negated
should be broader than what it is taken from: where the ring has fallen to nothing, so must have the quotient. And the
powers must sum to more than zero, or the noisiest level could not be normalised; the compiler checks that.

    python examples/negation.py
    composeprob run examples/negation.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import composeprob as cp

schedule = cp.Schedule.log_snr(60)
angle = jnp.arange(8) * jnp.pi / 4
modes = 0.5 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
ring = cp.Analytic(
    dist.MixtureSameFamily(dist.Categorical(jnp.ones(8) / 8), dist.Normal(modes, 0.075).to_event(1)), schedule
)
right = cp.Analytic(dist.Normal(jnp.array([0.5, 0.0]), 0.25), schedule)


@cp.program
def negation(ring, right):
    return cp.sample("x", ring**1.3 / right**0.3)


def main(num_chains=2000, out="out"):
    density = cp.compile(negation, ring, right)
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())

    shares = cp.metrics.mode_weights(result["x"], modes, result.log_weights)
    for (x, y), share in zip(modes, shares, strict=True):
        print(f"mode at ({x:+.2f}, {y:+.2f}): {share:.3f}   (1/8 in the ring itself)")

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "negation.png"))
    return result


if __name__ == "__main__":
    main()
