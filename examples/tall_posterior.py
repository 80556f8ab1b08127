"""One network, 32 observations: a posterior of many data from a network that was
trained on single ones.

The simulator draws θ from a box, and one number x ~ N(θ₁, exp θ₂). The network learns
p(θ | x) for one x. Then p(θ | x₁ … x_n) is p(θ)·Π_i p(θ | x_i)/p(θ), one batched
evaluation of that network, whatever n is.

    python examples/tall_posterior.py
"""

from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax

import composeprob as cp

LOW = jnp.array([-2.0, -1.5])
HIGH = jnp.array([2.0, 1.0])
TRUTH = jnp.array([0.6, -0.4])
box = dist.Uniform(LOW, HIGH).to_event(1)
schedule = cp.Schedule.log_snr(60, min=-9.0, max=9.0)
prior = cp.Analytic(box, schedule, label="prior")  # noised boxes are known exactly


def simulate(key, theta):
    mean = theta[..., :1]
    return mean + jnp.exp(theta[..., 1:]) * jax.random.normal(key, mean.shape)


def pairs(key, n):
    """Fresh pairs for each step of training."""
    theta_key, x_key = jax.random.split(key)
    theta = box.sample(theta_key, (n,))
    return theta, {"x": simulate(x_key, theta)}


class Network(eqx.Module):
    """ε̂ = −σ·(∇ log prior + F(θ, λ, x)).

    Walls of the box need not be learned, and cancel in p(θ | x)/p(θ).
    """

    mlp: eqx.nn.MLP

    def __call__(self, theta, log_snr, x):
        noise = recipe.noise_at(log_snr)
        phases = log_snr * jnp.array([0.1, 0.3])
        away = theta[:1] - noise.alpha * x
        inputs = jnp.concatenate(
            [
                theta,
                jnp.arcsinh(2 * x),
                jnp.arcsinh(2 * away),
                jnp.sin(phases),
                jnp.cos(phases),
            ]
        )
        prior_score = jax.grad(prior.at(noise).log_prob)(theta)
        return -noise.sigma * (prior_score + self.mlp(inputs))


def network(key):
    mlp = eqx.nn.MLP(8, 2, width_size=96, depth=3, activation=jax.nn.swish, key=key)
    return Network(mlp)


def weight(log_snr):
    """Weight of the loss: errors at little noise add up over observations."""
    return 1 / jnp.sqrt(jax.nn.sigmoid(-log_snr) + 1e-3)


recipe = cp.training.Recipe(
    network=network,
    data=pairs,
    schedule=schedule,
    conditions=("x",),
    log_snr=cp.training.LogSNR(-12.0, 10.0, focus=(-4.0, 8.0)),
    batches=cp.training.Batches(512, antithetic=True),
    iterations=4000,
    ema=0.99,
    learning_rate=partial(optax.cosine_decay_schedule, 3e-3),
    losses=(cp.training.Denoising(weight),),
)


@cp.program
def tall(posterior, prior, xs):
    return cp.sample("theta", prior * cp.product(posterior / prior, over={"x": xs}))


def main(num_chains=1000, out="out"):
    posterior = cp.training.train(recipe, jax.random.key(0), label="posterior").factor
    xs = simulate(jax.random.key(3), jnp.tile(TRUTH, (32, 1)))
    density = cp.compile(tall, posterior, prior, xs)
    result = cp.infer(density, jax.random.key(1), num_chains=num_chains)
    print(result.summary(), f"\ntruth {np.round(TRUTH, 2)}")
    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "tall_posterior.png"))
    return result


if __name__ == "__main__":
    main()
