"""Kernels, resamplers, weights and policies of a user's own that break their contract
are refused in words, before anything is compiled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import pytree
from composeprob.compiler.facts import Bound
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels.kernel import KernelState, log_density_of
from composeprob.kernels.metropolis import log_uniform, metropolis
from composeprob.kernels.step_size import match_precision
from refusals import refused, rows
from sampling_cases import measured, normal, squared

SCHEDULE = cp.Schedule.log_snr(8)
FACTOR = normal(np.zeros(2), schedule=SCHEDULE)
DENSITY = cp.compile(squared, FACTOR)


class Walk(cp.Kernel[KernelState]):
    """Random-walk Metropolis, of two evaluations: the first is not looked at."""

    requires = frozenset({"energy"})
    evaluations_per_step = 2
    optimal_acceptance = 0.234
    scale_exponent = 1

    def noise_size(self, position: Any) -> Any:
        return pytree.size(position) + 1

    def begin(self, noise: Any, state: Any, step_size: Any) -> Any:
        xi = pytree.unravel(noise[:-1], state.position)
        h = match_precision(step_size, state.position)
        position = pytree.axpy(h, xi, state.position)
        return (state, position, noise[-1]), position

    def advance(self, i: Any, trajectory: Any, evaluation: Any) -> Any:
        return trajectory, trajectory[1]

    def finish(self, trajectory: Any, evaluation: Any) -> Any:
        state, position, normal = trajectory
        proposed = KernelState(position, evaluation)
        log_ratio = log_density_of(evaluation) - log_density_of(state.evaluation)
        return metropolis(log_uniform(normal), log_ratio, proposed, state)


def with_methods(base: type, **methods: Any) -> Any:
    """Return a class that differs in these methods."""
    return type(base)("Own", (base,), {"__module__": __name__, **methods})


def walks(**methods: Any) -> Any:
    """Run a walk with other methods; the run goes no further than its contract."""
    kernel = with_methods(Walk, **methods)(0.1)
    sampler = cp.AnnealedMCMC(kernel, steps_per_level=1)
    return cp.infer(
        DENSITY, jax.random.key(0), num_chains=4, sampler=sampler, progress=False
    )


class Always(cp.Resampler):
    """Resampling at every level, of each chain by itself."""

    def should_resample(self, ess: Any, level: Any) -> Any:
        return True

    def ancestors(self, words: Any, log_weights: Any) -> Any:
        return jnp.arange(len(log_weights))


def resamples(**methods: Any) -> Any:
    """Run with another resampler."""
    sampler = cp.SMC(resample=with_methods(Always, **methods)())
    return cp.infer(
        DENSITY, jax.random.key(0), num_chains=4, sampler=sampler, progress=False
    )


class Even(cp.Weights):
    """Equal weights, of DDPM's step."""

    def reverse_step(self, given: Any) -> Any:
        return cp.ReverseStep(order=1, control="none")

    def gained(self, passage: Any) -> Any:
        return 0.0


def weighs(**methods: Any) -> Any:
    """Run with other weights."""
    sampler = cp.SMC(weights=with_methods(Even, **methods)())
    return cp.infer(
        DENSITY, jax.random.key(0), num_chains=4, sampler=sampler, progress=False
    )


@dataclasses.dataclass(frozen=True)
class Seen(cp.Policy):
    """The likelihood at the Tweedie mean."""

    def seen(self, x: Any, mean: Any, noise: Any) -> Any:
        return mean


def anneals(**methods: Any) -> Any:
    """Evaluate a likelihood under another policy."""

    def law(x: Any) -> dist.Distribution:
        return dist.Normal(jnp.sum(x), 0.2)

    policy = with_methods(Seen, **methods)()
    density = cp.compile(measured, FACTOR, law, 1.0, policy)
    return density.value_and_score({"x": jnp.zeros(2)}, 3)


KERNELS = {
    "begin returns another shape": lambda: walks(
        begin=lambda self, *a: (Walk.begin(self, *a)[0], jnp.ones(3))
    ),
    "begin returns the position alone": lambda: walks(
        begin=lambda self, *a: Walk.begin(self, *a)[1]
    ),
    "noise is too short": lambda: walks(noise_size=lambda self, x: 1),
    "noise is no whole number": lambda: walks(noise_size=lambda self, x: 3.0),
    "begin decides by if": lambda: walks(
        begin=lambda self, noise, *a: Walk.begin(self, noise, *a) if noise[0] else None
    ),
    "advance changes the trajectory": lambda: walks(
        advance=lambda self, i, t, e: (t[0], t[1])
    ),
    "advance returns another precision": lambda: walks(
        advance=lambda self, i, t, e: ((*t[:2], t[2].astype(jnp.float16)), t[1])
    ),
    "advance is missing": lambda: walks(advance=cp.Kernel.advance),
    "finish is missing": lambda: walks(finish=cp.Kernel.finish),
    "finish returns no info": lambda: walks(
        finish=lambda self, *a: Walk.finish(self, *a)[0]
    ),
    "finish returns a position": lambda: walks(
        finish=lambda self, t, e: (t[1], Walk.finish(self, t, e)[1])
    ),
    "init returns a position": lambda: walks(init=lambda self, key, x, target: x),
    "requires is text": lambda: walks(requires="energy"),
}
RESAMPLERS = {
    "ancestors are too few": lambda: resamples(
        ancestors=lambda self, words, log_weights: jnp.arange(3)
    ),
    "ancestors are no whole numbers": lambda: resamples(
        ancestors=lambda self, words, log_weights: jnp.exp(log_weights)
    ),
    "no ancestors": lambda: resamples(ancestors=lambda self, words, w: None),
    "should_resample returns a truth value": lambda: resamples(
        should_resample=lambda self, ess, level: bool(ess < 0.5)
    ),
    "should_resample of each chain": lambda: resamples(
        should_resample=lambda self, ess, level: jnp.ones(3) < ess
    ),
}
WEIGHTS = {
    "gained is an array": lambda: weighs(gained=lambda self, passage: jnp.zeros(2)),
    "gained is nothing": lambda: weighs(gained=lambda self, passage: None),
    "gained calls what is not there": lambda: weighs(
        gained=lambda self, passage: passage.x
    ),
    "the step is text": lambda: weighs(reverse_step=lambda self, given: "ddpm"),
}
POLICIES = {
    "seen has another shape": lambda: anneals(seen=lambda self, x, m, n: jnp.sum(x)),
    "bind makes a term of its own": lambda: anneals(
        bind=lambda self, observation, facts: Bound(self, lambda *given: "own")
    ),
    "seen is nothing": lambda: anneals(seen=lambda self, x, mean, noise: None),
    "power is an array": lambda: anneals(power=lambda self, s, noise: jnp.ones(3)),
    "power decides by if": lambda: anneals(
        power=lambda self, s, noise: 1.0 if noise.sigma > 1 else 0.5
    ),
}
TABLE = {
    WrongTypeError: {**KERNELS, **RESAMPLERS, **WEIGHTS, **POLICIES},
    InvalidValueError: {
        "power is negative": lambda: anneals(power=lambda self, s, noise: -1.0),
        "power is not finite": lambda: anneals(power=lambda self, s, noise: jnp.nan),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(TABLE))
def test_is_refused_in_words(kind, call):
    refused(call, kind, "own|Own")


def test_parts_that_keep_their_contract_run():
    anneals()
    assert resamples().samples["x"].shape == (4, 2)
    counted = walks(noise_size=lambda self, x: np.int64(Walk.noise_size(self, x)))
    assert counted.samples["x"].shape == (4, 2)
    assert walks().samples["x"].shape == (4, 2)
    assert weighs().samples["x"].shape == (4, 2)
