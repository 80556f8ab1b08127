"""One row per public kernel, factor and schedule: a row buys every contract test.

kernels/test_transitions.py and factors/test_registry.py fail when a public class has no
row.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from composeprob.factors.analytic import Analytic
from composeprob.factors.calibrated import ERROR, KNOTS, LOG_NORMALISER, Calibrated
from composeprob.factors.categorical import (
    CategoricalFactor,
    MaskedDiffusion,
    TokenFactor,
)
from composeprob.factors.classifier import Classifier
from composeprob.factors.diffusion import WEIGHTS, Diffusion
from composeprob.factors.energy import Energy
from composeprob.factors.factor import LeafFactor
from composeprob.factors.formula import Formula
from composeprob.factors.uniform_diffusion import UniformDiffusion
from composeprob.kernels import (
    HMC,
    MALA,
    UHMC,
    ULA,
    BlackJAX,
    Gibbs,
    Kernel,
    LineIntegral,
)
from composeprob.schedule import Schedule

PAIR = np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])


def _energy_of_tokens(tokens, visible):
    return jnp.sum(jnp.where(visible, 0.3 * tokens, 0.0))


def _classes_of_tokens(tokens, visible):
    return jnp.stack([0.0, 1.0]) * jnp.sum(jnp.where(visible, tokens, 0))


def _logits_by_rank(tokens, rank):
    seen = rank[None] < rank[:, None]
    return jnp.sum(seen[:, :, None] * jax.nn.one_hot(tokens, 3)[None], axis=1)


def _logits_by_mask(tokens, visible):
    counts = jnp.sum(visible[:, None] * jax.nn.one_hot(tokens, 3), axis=0)
    return jnp.broadcast_to(counts, (4, 3))


CATEGORICAL: dict[str, Callable[[], CategoricalFactor]] = {
    "ClosedCategorical": lambda: Analytic(
        dist.Categorical(jnp.asarray(PAIR)[jnp.array([0, 1, 2, 0])]).to_event(1)
    ),
    "ClosedCategorical, chain": lambda: Analytic.chain(PAIR[0], PAIR, length=4),
    "ClosedCategorical, table": lambda: Analytic.table(
        np.random.default_rng(0).gamma(1.0, size=(3, 3, 3, 3))
    ),
    "CategoricalEnergy": lambda: Energy(_energy_of_tokens, length=4, num_values=3),
    "CategoricalClassifier": lambda: Classifier(
        _classes_of_tokens, length=4, num_values=3
    ).given(label=1),
    "MaskedDiffusion": lambda: MaskedDiffusion(_logits_by_rank, length=4, num_values=3),
    "MaskedDiffusion, boolean": lambda: MaskedDiffusion(
        _logits_by_mask, length=4, num_values=3, mask="boolean"
    ),
}
"""Factors of four tokens of three values by the name of their class."""


def _logits_of_clean(tokens, kept):
    return jnp.log(kept) * jax.nn.one_hot(tokens, 3)


UNIFORM: dict[str, Callable[[], TokenFactor]] = {
    **{
        name: CATEGORICAL[name]
        for name in CATEGORICAL
        if not name.startswith("MaskedDiffusion")
    },
    "UniformDiffusion": lambda: UniformDiffusion(
        _logits_of_clean, Schedule.log_snr(9), length=4, num_values=3
    ),
    "UniformDiffusion, x0": lambda: UniformDiffusion(
        _logits_of_clean, Schedule.log_snr(9), length=4, num_values=3, output="x0"
    ),
}
"""Factors of as many tokens under uniform noise."""

KERNELS: dict[str, Callable[[], Kernel]] = {
    "ULA": lambda: ULA(0.05),
    "MALA": lambda: MALA(0.15),
    "UHMC": lambda: UHMC(0.2, num_leapfrog=3),
    "HMC": lambda: HMC(0.45, num_leapfrog=3),
    "HMC, jitter": lambda: HMC(0.45, num_leapfrog=3, jitter=0.3),
    "MALA, LineIntegral": lambda: MALA(0.15, log_ratio=LineIntegral(3)),
    "HMC, LineIntegral": lambda: HMC(
        0.45, num_leapfrog=2, log_ratio=LineIntegral(None, "simpson")
    ),
    "BlackJAX": lambda: BlackJAX(blackjax.hmc, 0.45, num_integration_steps=3),
    "Gibbs": lambda: Gibbs({"a": MALA(0.15), "b": HMC(0.45, num_leapfrog=3)}),
    "HMC, metric": lambda: HMC(0.45, num_leapfrog=3, metric={"a": 1.44, "b": 0.64}),
}
"""Kernels by the name of their class, with their speciality after a comma; for
positions with the sites a and b.
"""

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": lambda: Schedule.linear(40),
    "cosine": lambda: Schedule.cosine(40),
    "vp": lambda: Schedule.vp(40, beta_min=0.1, beta_max=15.0),
    "edm": lambda: Schedule.edm(40, sigma_min=0.01, sigma_max=40.0),
    "flow": lambda: Schedule.flow(40, shift=2.0),
    "log_snr": lambda: Schedule.log_snr(40, min=-7.0, max=9.0),
    "from_arrays": lambda: Schedule.from_arrays(
        np.linspace(0.95, 0.1, 40), np.linspace(0.05, 1.5, 40)
    ),
}
"""Every constructor of `Schedule`."""


def _classifier(schedule: Schedule) -> Classifier:
    return Classifier(
        lambda x, t: jnp.stack([x[0], -x[1], 0.1 * t]), schedule, event_shape=(2,)
    ).given(label=1)


def _formula(schedule: Schedule) -> Formula:
    heads = {
        "left": Classifier(lambda x, t: jnp.stack([x[0], -x[0]]), schedule),
        "big": Classifier(lambda x, t: jnp.stack([x[1], 0.1 * t]), schedule),
    }
    return Formula(heads, "left | ~big", (2,))


def _calibrated(schedule: Schedule) -> Calibrated:
    """An energy e³ too large, with the tables of its calibration."""
    factor = Energy(
        lambda x, level: 3.0 - 0.5 * jnp.sum(x**2), schedule, event_shape=(2,)
    )
    log_snr = np.asarray(schedule.log_snr)[::-1]
    log_z = np.full(len(log_snr), 3.0 + np.log(2 * np.pi))
    tables = {KNOTS: log_snr, LOG_NORMALISER: log_z, ERROR: np.zeros(len(log_z))}
    return Calibrated(factor, tables)


def _weighted(schedule: Schedule) -> Diffusion:
    factor = Diffusion(
        lambda x, t: 0.3 * x[::-1],
        schedule,
        event_shape=(2,),
        parameterization="energy_residual",
    )
    return factor.holding({WEIGHTS: jnp.array([0.5, 1.0])})


def concrete(package: Any, base: type) -> dict[str, type]:
    """Classes of a package's modules that derive from a base and are not abstract, by
    name."""
    classes = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            if not inspect.isclass(value) or not issubclass(value, base):
                continue
            if not inspect.isabstract(value):
                classes[value.__name__] = value
    return classes


FACTORS: dict[str, Callable[[Schedule], LeafFactor]] = {
    "Analytic": lambda schedule: Analytic(
        dist.Normal(jnp.array([0.3, -0.2]), 0.5), schedule
    ),
    "Diffusion": lambda schedule: Diffusion(
        lambda x, t, c: 0.5 * jnp.sum((x - c) ** 2),
        schedule,
        event_shape=(2,),
        parameterization="energy",
        conditions={"c": 0.0},
    ),
    "Energy": lambda schedule: Energy(
        lambda x, level: -jnp.sum(x**2) - level, schedule, event_shape=(2,)
    ),
    "Classifier": _classifier,
    "Formula": _formula,
    "Calibrated": _calibrated,
    "Weighted": _weighted,
}
"""Every leaf factor, and one with weights of its entries, over events of shape (2,),
ready to be evaluated."""
