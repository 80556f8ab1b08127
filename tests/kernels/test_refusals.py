"""Refusals of kernels, step sizes, metrics and line integrals, as they are written or
at their first transition."""

import types

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composeprob.density.evaluation import Evaluation
from composeprob.errors import (
    CapabilityError,
    ConditionError,
    InvalidValueError,
    ShapeError,
    WrongTypeError,
)
from composeprob.kernels import HMC, MALA, UHMC, ULA, Adaptive, BlackJAX, LineIntegral
from composeprob.kernels.step_size import resolve
from refusals import refused, rows
from targets import evaluate

LEVELS = types.SimpleNamespace(num_levels=4, sigma=jnp.array([0.1, 0.2, 0.4, 0.8]))
SQUARE = evaluate(lambda x: -jnp.sum(x["a"] ** 2))
ALONG = LineIntegral(None, tolerance=0.1)
SIMPSON = LineIntegral(None, "simpson")


def resolving(step_size):
    """Return a call that resolves a step size on four levels."""
    kernel = MALA(step_size)
    return lambda: resolve(kernel.step_size, LEVELS, kernel)


def begun(kernel, size=2, target=SQUARE):
    """Return the state of a chain at the origin."""
    return kernel.init(jax.random.key(0), {"a": jnp.zeros(size)}, target)


def stepping(kernel, target=SQUARE):
    """Return a call that makes one transition from there."""

    def step():
        state = begun(kernel, target=target)
        return kernel.step(jax.random.key(0), state, target, jnp.asarray(0.1))

    return step


def by_score(kernel):
    """Return a call that makes one transition by a density's score alone."""
    return stepping(kernel, lambda x: Evaluation(None, x))


def hmc_of_blackjax(**options):
    return lambda: BlackJAX(blackjax.hmc, **{"step_size": 0.1} | options)


INTEGRATION = {"num_integration_steps": 3}
REFUSED = {
    InvalidValueError: {
        "rule of MALA is 0": resolving(lambda s: s.sigma - 0.1),
        "MALA(step_size=) is -0.1": lambda: MALA(-0.1),
        "ULA(step_size=) is 0": lambda: ULA(0.0),
        "ULA(step_size=) is nan": lambda: ULA(float("nan")),
        "HMC(step_size=) is inf": lambda: HMC([0.1, float("inf")]),
        "HMC(num_leapfrog=) must be at least 1; got 0": lambda: HMC(
            0.1, num_leapfrog=0
        ),
        "HMC(damping=) is 1": lambda: HMC(0.1, damping=1.0),
        "UHMC(damping=) is -0.1": lambda: UHMC(0.1, damping=-0.1),
        "HMC(damping=) is nan": lambda: HMC(0.1, damping=float("nan")),
        "HMC(jitter=) is 1": lambda: HMC(0.1, jitter=1.0),
        "target_acceptance=) is 1": lambda: Adaptive(target_acceptance=1.0),
        "initial=) is 0": lambda: Adaptive(initial=0.0),
        "gain=) is -1": lambda: Adaptive(gain=-1),
        "warmup=) must be at least 0; got -1": lambda: Adaptive(warmup=-1),
        "BlackJAX(step_size=) is -1": hmc_of_blackjax(step_size=-1.0, **INTEGRATION),
        "evaluations=) must be at least 1": hmc_of_blackjax(
            evaluations=0, **INTEGRATION
        ),
        "odd number...4": lambda: LineIntegral(4, "simpson"),
        "Unknown rule": lambda: LineIntegral(3, "midpoint"),
        "at least 2": lambda: LineIntegral(1),
        "accepts no move": lambda: LineIntegral(tolerance=0.0),
        "two points": lambda: LineIntegral(2, tolerance=0.1),
        "one leapfrog": lambda: HMC(0.1, 1, log_ratio=ALONG),
        "no trajectory": lambda: MALA(0.1, log_ratio=LineIntegral(None)),
        "three": lambda: HMC(0.1, 3, log_ratio=SIMPSON),
    },
    WrongTypeError: {
        "rule of MALA returned cannot be 'large'": resolving(lambda s: "large"),
        "a step size cannot be 'big', of type str": lambda: HMC("big"),
        "a step size cannot be True": lambda: HMC(True),
        "a step size cannot be None": lambda: HMC(None),
        "a step size cannot be <class": lambda: HMC(Adaptive),
        "UHMC(num_leapfrog=) must be a whole number; got 2.5": lambda: UHMC(
            0.1, num_leapfrog=2.5
        ),
        "damping cannot be 'half'": lambda: HMC(0.1, damping="half"),
        "warmup=) must be a whole number; got 1.5": lambda: Adaptive(warmup=1.5),
        "whole number": lambda: LineIntegral(2.5),
        "MALA...'line'": lambda: MALA(0.1, log_ratio="line"),
        "HMC...'line'": lambda: HMC(0.1, log_ratio="line"),
    },
    ShapeError: {
        "MALA has 2 step sizes, but the schedule has 4 levels": resolving([0.1, 0.2]),
        "rule of MALA returned shape (2,) for a schedule of 4 levels": resolving(
            lambda s: s.sigma[:2]
        ),
        "rule of MALA returned shape () for a schedule of 4 levels": resolving(
            lambda s: 0.1
        ),
        "shape (2, 2)": lambda: HMC(np.ones((2, 2))),
        "initial=) has shape (2,)": lambda: Adaptive(initial=[1.0, 2.0]),
        "shape (2,) at 'a'": lambda: begun(MALA(0.5, metric={"a": jnp.ones(2)}), 3),
        "it moves 3 numbers": lambda: begun(MALA(0.5, metric=np.eye(2)), 3),
    },
    CapabilityError: {
        "ULA": lambda: ULA(Adaptive()),
        "UHMC": lambda: UHMC(Adaptive()),
        "MALA by score": by_score(MALA(0.1)),
        "HMC by score": by_score(HMC(0.1)),
        "measured from all chains": stepping(MALA(0.5, metric="full")),
        "reports no acceptance": stepping(BlackJAX(blackjax.mclmc, Adaptive(), L=1.0)),
        "not one position": stepping(BlackJAX(blackjax.orbital_hmc, 0.1, period=3)),
    },
    ConditionError: {
        "hmc of BlackJAX needs num_integration_steps": hmc_of_blackjax(),
        "nuts of BlackJAX has no parameter 'steps'": lambda: BlackJAX(
            blackjax.nuts, 0.1, steps=3
        ),
        "takes no step_size": lambda: BlackJAX(blackjax.slice_sampling, 0.1),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSED))
def test_refused(kind, call):
    refused(call, kind)
