"""Your own network: trained here in seconds with Equinox and Optax, then composed like
any model of the zoo.

It sees ONE event and the log-SNR, and predicts the noise ε. It never saw the box that
it is multiplied with afterwards.

    python examples/own_network.py
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax

import composeprob as cp


def moon(key, n):
    """Training data, shape (n, 2): a half circle with some noise."""
    angle_key, noise_key = jax.random.split(key)
    angle = jnp.pi * jax.random.uniform(angle_key, (n,))
    arc = jnp.stack([jnp.cos(angle), jnp.sin(angle) - 0.5], -1)
    return 0.7 * arc + 0.05 * jax.random.normal(noise_key, (n, 2))


class Network(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, x, log_snr):
        phases = log_snr * jnp.array([0.1, 0.3, 0.9])
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        inputs = jnp.concatenate([x, jnp.sin(phases), jnp.cos(phases)])
        # Far from the data x ≈ ε: the network learns only the rest.
        return sigma * x + self.mlp(inputs)


def train(key, steps=1500, batch=256):
    mlp = eqx.nn.MLP(8, 2, width_size=64, depth=3, activation=jax.nn.swish, key=key)
    network = Network(mlp)
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(network, key):
        data_key, level_key, noise_key = jax.random.split(key, 3)
        log_snr = jax.random.uniform(level_key, (batch,), minval=-9.0, maxval=7.0)
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))[:, None]
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))[:, None]
        noise = jax.random.normal(noise_key, (batch, 2))
        noised = alpha * moon(data_key, batch) + sigma * noise
        predicted = jax.vmap(network)(noised, log_snr)
        return jnp.mean((predicted - noise) ** 2)

    @eqx.filter_jit
    def step(network, state, key):
        gradient = eqx.filter_grad(loss)(network, key)
        updates, state = optimiser.update(gradient, state)
        return eqx.apply_updates(network, updates), state

    # Arrays only: the network contains its activation function too.
    state = optimiser.init(eqx.filter(network, eqx.is_array))
    for step_key in jax.random.split(key, steps):
        network, state = step(network, state, step_key)
    return network


schedule = cp.Schedule.log_snr(60, min=-9.0, max=7.0)
network = train(jax.random.key(0))
arc = cp.Diffusion(
    network, schedule, event_shape=(2,), parameterization="epsilon", time="log_snr"
)
right_half = cp.Analytic(
    dist.Uniform(jnp.array([0.0, -1.0]), jnp.array([1.0, 1.0])), schedule
)


@cp.program
def right_arc(arc, right_half):
    return cp.sample("x", arc * right_half)


def main(num_chains=2000, out="out"):
    density = cp.compile(right_arc, arc, right_half)
    result = cp.infer(density, jax.random.key(1), num_chains=num_chains)
    print(result.summary())
    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "own_network.png"))
    return result


if __name__ == "__main__":
    main()
