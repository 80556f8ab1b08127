"""Energies whose normaliser is known at every level: exact noised marginals times a constant of the level."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import composeprob as cp
from composeprob.schedule import Noise
from sampling_cases import learned, modes

SCHEDULE = cp.Schedule.log_snr(40, min=-8.0, max=10.0)


def log_constant(log_snr, nats):
    """log Z of `raw` at a log-SNR."""
    return nats * (1 + 0.1 * jnp.sin(log_snr))


def raw(distribution, nats, label="raw"):
    """exp(log_constant)·(the noised distribution) as a network's energy, continuous in log-SNR."""
    exact = cp.Analytic(distribution, SCHEDULE)

    def energy(x, log_snr):
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
        marginal = exact.at(Noise(jnp.zeros((), int), alpha, sigma))
        return -sigma * (marginal.log_prob(x) + log_constant(log_snr, nats))

    return learned(energy, "energy", SCHEDULE, exact.event_shape, log_snr_range=(-12.0, 11.0), label=label)


def normal(mean, deviation):
    return dist.Normal(jnp.asarray(mean), deviation).to_event(1)


def two_modes(mean, deviation, share):
    """Modes at ±mean, of which the first has this share."""
    return modes([share, 1 - share], jnp.stack([jnp.asarray(mean), -jnp.asarray(mean)]), deviation)
