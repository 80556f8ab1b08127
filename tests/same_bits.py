"""Runs rows of the registry on several numbers of devices, and prints which give the
samples of the first, as JSON.

`main` is called in a process of its own, since devices are made when JAX starts.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp
from registry import FACTORS, KERNELS

SCHEDULE = cp.Schedule.log_snr(3, min=-5.0, max=2.0)
DEVICES = 8
CHAINS, CHUNK = 64, 8


def analytic(distribution: Any) -> cp.Analytic:
    return cp.Analytic(distribution, SCHEDULE)


def normal(scale: Any = 0.7) -> cp.Analytic:
    return analytic(dist.Normal(jnp.array([1.0, 0.1]), scale))


def covariance(size: int, seed: int) -> jax.Array:
    root = np.random.default_rng(seed).normal(size=(size, size))
    return jnp.asarray(root @ root.T / size + 0.1 * np.eye(size))


def multivariate(size: int) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(
        jnp.linspace(-1.0, 1.0, size), covariance(size, size)
    )


def mixed(components: dist.Distribution) -> cp.Analytic:
    return analytic(
        dist.MixtureSameFamily(
            dist.Categorical(probs=jnp.array([0.3, 0.7])), components
        )
    )


def full_mixture() -> cp.Analytic:
    covariances = jnp.stack([covariance(3, 1), covariance(3, 2)])
    return mixed(
        dist.MultivariateNormal(
            jnp.array([[0.0, 1.0, -0.5], [0.4, -0.3, 1.2]]), covariances
        )
    )


EXPRESSIONS: dict[str, Callable[[], Any]] = {
    **{
        name: (lambda make=make: make(SCHEDULE) * normal())
        for name, make in FACTORS.items()
    },  # type: ignore[misc]
    "MultivariateNormal of 2": lambda: analytic(multivariate(2)),
    "MultivariateNormal of 20": lambda: analytic(multivariate(20)),
    "mixture of MultivariateNormal": full_mixture,
    "mixture of Normal": lambda: (
        mixed(dist.Normal(jnp.array([[0.0, 1.0], [0.4, -0.3]]), 0.4).to_event(1))
        * normal()
    ),
    "points": lambda: analytic(np.random.default_rng(0).normal(size=(6, 2))),
    "box": lambda: (
        analytic(dist.Uniform(jnp.array([-0.5, 0.0]), jnp.array([0.4, 1.0]))) * normal()
    ),
    "cp.mixture": lambda: cp.mixture([normal(), normal(0.3)], weights=[0.2, 0.8]),
    "cp.window": lambda: (
        cp.window(normal(), (4,), (1,)) * analytic(dist.Normal(jnp.zeros(4), 0.9))
    ),
}
"""Every row of `FACTORS`, and what else has a closed form or an algebra of its own."""


@cp.program
def sites(factors: dict[str, Any]) -> None:
    """Independent sites, a factor each."""
    for name, factor in factors.items():
        cp.sample(name, factor)


@cp.program
def observed(factor: Any) -> None:
    """Data that are annealed exactly, with noise of unknown size."""
    x = cp.sample("x", factor)
    scale = cp.sample("scale", dist.HalfNormal(1.0))
    cp.observe(
        "y",
        dist.Normal(jnp.array([[1.0, 0.5], [0.3, -1.0]]) @ x, scale),
        jnp.array([0.3, 0.4]),
    )


def mcmc(kernel: Any) -> cp.AnnealedMCMC:
    return cp.AnnealedMCMC(kernel, 1, reverse_step=True)


SAMPLERS: dict[str, Callable[[], Any]] = {
    "Ancestral": cp.Ancestral,
    "MALA": lambda: mcmc(cp.MALA(0.05)),
    "SMC": lambda: cp.SMC(cp.HMC(cp.Adaptive(), num_leapfrog=2)),
    "global moves": lambda: cp.AnnealedMCMC(
        cp.MALA(0.05), 1, reverse_step=True, then=cp.GlobalMoves(3)
    ),
    "SMC, metric": lambda: cp.SMC(cp.MALA(metric="full")),
}


def case(name: str) -> tuple[Any, Any]:
    """A compiled density and a sampler: "SAMPLER: FACTOR + FACTOR …", a row of
    `KERNELS`, or "observed"."""
    if name == "observed":
        return cp.compile(observed, normal()), cp.SMC(cp.MALA(cp.Adaptive()))
    if name in KERNELS:
        return cp.compile(
            sites, {site: analytic(multivariate(2)) for site in ("a", "b")}
        ), mcmc(KERNELS[name]())
    sampler, rows = name.split(": ")
    return cp.compile(
        sites, {row: EXPRESSIONS[row]() for row in rows.split(" + ")}
    ), SAMPLERS[sampler]()


def has_rate(name: str) -> bool:
    """True if chains of this factor can have importance weights."""
    return "feynman_kac" in cp.compile(sites, {"x": EXPRESSIONS[name]()}).capabilities


def bits_of(result: cp.Result) -> bytes:
    """The samples, the weights, and what is recorded of the levels."""
    levels = [
        result.levels[name] for name in ("acceptance", "step_size", "ess", "non_finite")
    ]
    numbers = [
        *result.samples.values(),
        result.log_weights,
        *levels,
        np.float64(result.log_evidence or 0.0),
    ]
    return b"".join(np.ascontiguousarray(array).tobytes() for array in numbers)


def bits(density: Any, sampler: Any, devices: int) -> bytes:
    """Samples of a run on so many devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("chains",))
    options = {"num_chains": CHAINS, "chunk": CHUNK, "progress": False}
    return bits_of(
        cp.infer(density, jax.random.key(3), sampler=sampler, mesh=mesh, **options)
    )


def main(cases: list[str], devices: list[int]) -> None:
    assert jax.device_count() == DEVICES
    found = {}
    for name in cases:
        ready = case(name)
        first, *others = (bits(*ready, number) for number in devices)
        found[name] = [other == first for other in others]
    print(json.dumps(found))
