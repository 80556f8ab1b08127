"""Networks that count how often they are traced and run, a conditional factor in closed
form."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp
from composeprob.factors.factor import LeafFactor, Traits
from composeprob.schedule import Schedule
from sampling_cases import Calls


class Energy(eqx.Module):
    """E = ½·‖W·x − c‖² of each event; counted."""

    weight: jax.Array
    counter: Calls = eqx.field(static=True)

    def __call__(
        self, x: jax.Array, t: jax.Array, c: jax.Array | float = 0.0
    ) -> jax.Array:
        self.counter()
        return 0.5 * jnp.sum((self.weight @ x - c) ** 2)


class Gaussian(eqx.Module):
    """The noised N(c·slope, diag variance) under its one condition c, for α² + σ² = 1;
    its traces are counted."""

    form: str = eqx.field(static=True)
    slope: tuple[float, ...] = eqx.field(static=True)
    variance: tuple[float, ...] = eqx.field(static=True)
    counter: Calls = eqx.field(static=True)

    def __call__(
        self, x: jax.Array, log_snr: jax.Array, **condition: jax.Array
    ) -> jax.Array:
        self.counter.traced += 1
        (c,) = condition.values()
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        away = x - alpha * c * jnp.array(self.slope)
        variance = alpha**2 * jnp.array(self.variance) + sigma**2
        if self.form == "energy":
            return sigma * 0.5 * jnp.sum(away**2 / variance)
        if self.form == "score":
            return -away / variance
        return sigma * away / variance


def gaussian(
    form: str, slope: Any, variance: Any, schedule: Schedule, **options: Any
) -> tuple[cp.Diffusion, Calls]:
    """A factor by such a network, and its counter."""
    counter = Calls()
    network = Gaussian(form, tuple(slope), tuple(variance), counter)
    options = {
        "event_shape": (len(slope),),
        "parameterization": form,
        "time": "log_snr",
    } | options
    return cp.Diffusion(network, schedule, **options), counter


def score_by_one_trace() -> Any:
    """The score of any density with one site x, which may be traced only once: later
    densities reuse the compiled code."""
    traced: list[bool] = []

    @eqx.filter_jit
    def score(density: Any, x: Any, level: Any) -> Any:
        assert not traced, "compiled again"
        traced.append(True)
        return density.score(x, level)["x"]

    return score


def agree(actual: Any, wanted: Any, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """Assert that two trees of numbers are the same."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


class Moved(LeafFactor):
    """N(c + d, 0.5²) of every entry, c and d conditions: normalised, and exact at every
    level."""

    schedule: Schedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    fixed: Mapping[str, Any]
    label: str = eqx.field(static=True)

    def __init__(self, schedule):
        self.schedule = schedule
        self.event_shape = (2,)
        self.fixed = {}
        self.label = "moved"

    @property
    def traits(self):
        return Traits(Traits.EXACT, "any", ("c", "d"))

    def call_conditions(self):
        return {"c": 0.0, "d": 0.0, **self.fixed}

    def evaluate(self, x, noise, conditions):
        def log_density(x):
            mean = noise.alpha * (conditions["c"] + conditions["d"])
            scale = jnp.hypot(0.5 * noise.alpha, noise.sigma)
            return jnp.sum(dist.Normal(mean, scale).log_prob(x))

        return jax.value_and_grad(log_density)(x)
