"""Programs and schedules that the tests of sampling share: one structure, so that compiled code is shared too."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

SCHEDULE = cp.Schedule.log_snr(32)  # steps of 0.65 in log-SNR
N = 2048


@cp.program
def single(f: Any) -> Any:
    """One site under one factor."""
    return cp.sample("x", f)


@cp.program
def both(f: Any, g: Any) -> Any:
    """One site under a product."""
    return cp.sample("x", f * g)


def normal(mean: Any = 0.0, sd: Any = 1.0, schedule: cp.Schedule = SCHEDULE) -> cp.Analytic:
    """A Gaussian factor with independent entries."""
    return cp.Analytic(dist.Normal(jnp.asarray(mean, float), jnp.asarray(sd, float)), schedule)


def unit_energy(x: jax.Array, t: jax.Array) -> jax.Array:
    """The energy of N(0, I) under a variance-preserving schedule, for time="sigma": t = σ/α, and −E/σ = −½‖x‖²."""
    return 0.5 * jnp.sum(x**2) * t / jnp.sqrt(1 + t**2)


SAMPLER = cp.SMC(cp.MALA(cp.Adaptive()), check_levels=False, integrator="explicit")  # compiles in half the time


def run(density: Any, seed: int = 0, chains: int = 64, **options: Any) -> cp.Result:
    """A small run, by `SAMPLER` unless told otherwise."""
    options = {"sampler": SAMPLER, "progress": False} | options
    return cp.infer(density, jax.random.key(seed), num_chains=chains, **options)


class Calls:
    """A counter that survives tracing: `network` counts its calls at run time, `traced` its calls by Python."""

    def __init__(self) -> None:
        self.run, self.traced = 0, 0

    def _one_more(self) -> None:
        self.run += 1

    def __call__(self) -> None:
        self.traced += 1
        jax.debug.callback(self._one_more)

    def reset(self) -> None:
        """Start from zero, once every call under way has arrived."""
        jax.effects_barrier()
        self.run = self.traced = 0


class Counted(eqx.Module):
    """log N(x; 0, I); a module, as a function is not called again once a program with it is compiled."""

    calls: Calls = eqx.field(static=True)

    def __call__(self, x: jax.Array, level: jax.Array) -> jax.Array:
        self.calls()
        return -0.5 * jax.numpy.sum(x**2)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance over the leading axis."""
    return x.mean(0), np.cov(x.reshape(len(x), -1), rowvar=False)


def per_run(results: list[cp.Result], statistic: Any) -> np.ndarray:
    """A statistic of each run: interacting chains are no independent draws, runs under different keys are."""
    return np.array([statistic(result) for result in results])
