"""Your own energy: any log-density that you can write down is a factor, beside any
other.

Here a soft constraint, "the two coordinates have the product 0.1", on points from a
ring-shaped prior. The function gets the level too, so that the constraint can harden as
the noise goes down; level 0 is the one that counts.

    python examples/own_energy.py
    composeprob run examples/own_energy.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import composeprob as cp

schedule = cp.Schedule.log_snr(60)
angle = jnp.arange(24) * jnp.pi / 12
circle = 0.6 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
ring = cp.Analytic(
    dist.MixtureSameFamily(
        dist.Categorical(jnp.ones(24) / 24), dist.Normal(circle, 0.1).to_event(1)
    ),
    schedule,
)


def hyperbola(x, level):
    """−½·((x₀·x₁ − 0.1)/w)², with a width w that shrinks with the noise to 0.03."""
    width = 0.03 + 2 * jnp.asarray(schedule.sigma)[level]
    return -0.5 * ((x[0] * x[1] - 0.1) / width) ** 2


# top_power=0: at the noisiest level this is a gentle tilt of the ring's noise, no noise
# of its own.
constraint = cp.Energy(hyperbola, schedule, event_shape=(2,), top_power=0.0)


@cp.program
def own_energy(ring, constraint):
    return cp.sample("x", ring * constraint)


def main(num_chains=2000, out="out"):
    density = cp.compile(own_energy, ring, constraint)
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())

    x = result.unweighted()["x"]
    product = x.prod(1)
    radius = jnp.linalg.norm(x, axis=1)
    print(f"x₀·x₁ is {product.mean():.3f} ± {product.std():.3f}")
    print(f"|x| is {radius.mean():.3f}")
    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "own_energy.png"))
    return result


if __name__ == "__main__":
    main()
