"""One transition of this library and of its peers, counted in evaluations.

Every program is one compiled loop over transitions of all chains of a `Case` at one
level, with the density as an argument. Peers get the composed log-density as a function
to differentiate, which is how they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.infer
from jax import Array

import composeprob as cp
from price.cases import LEVEL, Case

LEAPFROGS = 3
"""Leapfrog steps of every HMC here, as in the paper."""
UNIT = "value and score"
HMC = f"HMC({LEAPFROGS})"
"""Names of rows."""
Program = Callable[[], Any]


def programs(case: Case) -> dict[str, tuple[Program, float]]:
    """Return ``{name: (program, transitions)}`` of all that is measured on a case.

    The first program is the unit.
    """
    density = case.compile()
    x = case.positions(density, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), case.num_chains)
    sigma = density.schedule.at(LEVEL).sigma
    mala = float(case.mala * sigma**2)
    hmc = float(case.hmc * sigma)
    many = case.count
    few = max(case.count // LEAPFROGS, 1)
    rows: dict[str, tuple[Program, float]] = {}

    def add(name: str, loop: Any, state: Any, count: int) -> None:
        rows[name] = (
            partial(eqx.filter_jit(loop), density, state, jnp.int32(count)),
            count,
        )

    def log_density(density: Any, position: Any) -> Array:
        return density.log_density(position, LEVEL)

    add(UNIT, _evaluations, x, many)
    for name, kernel, count in (
        ("MALA", cp.MALA(mala), many),
        (HMC, cp.HMC(hmc, num_leapfrog=LEAPFROGS), few),
    ):
        start = eqx.filter_jit(partial(_start, kernel))(density, keys, x)
        add(name, partial(_loop, partial(_kernel, kernel), keys), start, count)

    diagonal = jnp.ones(math.prod(density.sites["x"].shape))

    def blackjax_mala(density: Any) -> Any:
        return blackjax.mala(partial(log_density, density), mala)

    def blackjax_hmc(density: Any) -> Any:
        return blackjax.hmc(partial(log_density, density), hmc, diagonal, LEAPFROGS)

    for name, algorithm, count in (
        ("BlackJAX mala", blackjax_mala, many),
        (f"BlackJAX hmc({LEAPFROGS})", blackjax_hmc, few),
    ):
        start = eqx.filter_jit(partial(_blackjax_start, algorithm))(density, x)
        add(name, partial(_loop, partial(_blackjax, algorithm), keys), start, count)

    for leapfrogs, count in ((1, many), (LEAPFROGS, few)):
        make = partial(_numpyro, leapfrogs, hmc, log_density, keys, x)
        start = eqx.filter_jit(lambda density, make=make: make(density)[1])(density)
        step = partial(_numpyro_step, make)
        add(f"NumPyro HMC({leapfrogs})", partial(_loop, step, keys), start, count)

    momentum = jax.tree.map(jnp.zeros_like, x)
    notebook_hmc = partial(_notebook_hmc, hmc, LEAPFROGS)
    for name, transition, start, count in (
        ("notebook MALA", partial(_notebook_mala, mala), x, many),
        (f"notebook {HMC}", notebook_hmc, (x, momentum), few),
    ):
        step = partial(_notebook_step, transition, log_density)
        add(name, partial(_loop, step, keys), start, count)
    return rows | runs(case)


def runs(case: Case) -> dict[str, tuple[Program, float]]:
    """Whole runs of `cp.infer`, over their evaluations: the cost of the driver."""
    density = case.compile(num_levels=2)
    rules = {
        "MALA": cp.MALA(lambda s: case.mala * s.sigma**2),
        HMC: cp.HMC(lambda s: case.hmc * s.sigma, num_leapfrog=LEAPFROGS),
    }
    rows: dict[str, tuple[Program, float]] = {}
    for name, kernel in rules.items():
        steps = max(case.count // (2 * kernel.evaluations_per_step), 1)
        sampler = cp.AnnealedMCMC(kernel, steps)
        run = partial(
            cp.infer,
            density,
            jax.random.key(0),
            num_chains=case.num_chains,
            sampler=sampler,
            progress=False,
        )
        rows[f"cp.infer, {name}"] = (lambda run=run: run().samples, run().evaluations)
    return rows


def _loop(step: Any, keys: Array, density: Any, state: Any, count: Array) -> Any:
    """Make ``count`` transitions; each takes its keys as the driver does."""

    def body(i: Array, state: Any) -> Any:
        return step(density, jax.vmap(jax.random.fold_in, (0, None))(keys, i), state)

    return jax.lax.fori_loop(0, count, body, state)


def _evaluations(density: Any, x: Any, count: Array) -> Any:
    """Values and scores in a loop.

    Each position depends on the score before it: XLA would take independent
    evaluations out of the loop.
    """
    small = 1e-6 * density.schedule.at(LEVEL).sigma ** 2

    def body(_: Array, carry: Any) -> Any:
        x, total = carry
        value, score = jax.vmap(density.value_and_score, (0, None))(x, LEVEL)
        return jax.tree.map(lambda xi, si: xi + small * si, x, score), total + value

    return jax.lax.fori_loop(0, count, body, (x, jnp.zeros(len(x["x"]))))


def _start(kernel: Any, density: Any, keys: Array, x: Any) -> Any:
    return jax.vmap(kernel.init, (0, 0, None))(
        keys, x, partial(density.evaluator, level=LEVEL)
    )


def _kernel(kernel: Any, density: Any, keys: Array, states: Any) -> Any:
    target = partial(density.evaluator, level=LEVEL)
    return jax.vmap(
        lambda key, state: kernel.step(key, state, target, kernel.step_size)[0]
    )(keys, states)


def _blackjax_start(algorithm: Any, density: Any, x: Any) -> Any:
    return jax.vmap(algorithm(density).init)(x)


def _blackjax(algorithm: Any, density: Any, keys: Array, states: Any) -> Any:
    step = algorithm(density).step
    return jax.vmap(lambda key, state: step(key, state)[0])(keys, states)


def _numpyro(
    leapfrogs: int,
    step_size: float,
    log_density: Any,
    keys: Array,
    x: Any,
    density: Any,
) -> tuple[Any, Any]:
    """NumPyro's kernel over all chains, without adaptation, and its first state.

    The kernel holds the density, so each trace of a step makes it anew; the compiler
    drops the first state there.
    """
    kernel = numpyro.infer.HMC(
        potential_fn=lambda position: -log_density(density, position),
        step_size=step_size,
        trajectory_length=(leapfrogs - 0.5) * step_size,  # it rounds up
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    state = kernel.init(keys, 0, x, (), {})
    return kernel, state


def _numpyro_step(make: Any, density: Any, keys: Array, state: Any) -> Any:
    kernel, _ = make(density)
    return kernel.sample(state, (), {})


def _notebook_step(
    transition: Any, log_density: Any, density: Any, keys: Array, state: Any
) -> Any:
    return jax.vmap(partial(transition, partial(log_density, density)))(keys, state)


def _notebook_mala(h: float, log_density: Any, key: Array, x: Any) -> Any:
    """MALA as in the reference notebook: gradient and log-density are evaluated anew
    at both ends, each by its own call."""
    noise_key, accept_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x["x"].shape)
    gradient = jax.grad(log_density)
    here = gradient(x)["x"]
    moved = {"x": x["x"] + h * here + math.sqrt(2 * h) * noise}
    back = x["x"] - moved["x"] - h * gradient(moved)["x"]
    log_ratio = log_density(moved) - log_density(x)
    log_ratio += (jnp.sum(2 * h * noise**2) - jnp.sum(back**2)) / (4 * h)
    accepted = jnp.log(jax.random.uniform(accept_key)) < log_ratio
    return {"x": jnp.where(accepted, moved["x"], x["x"])}


def _notebook_hmc(
    h: float, leapfrogs: int, log_density: Any, key: Array, state: Any
) -> Any:
    """HMC as in the reference notebook: L + 1 gradients and two log-densities.

    Damping is 0.5, and a rejection reverses the momentum.
    """
    x, v = state
    noise_key, accept_key = jax.random.split(key)
    gradient = jax.grad(log_density)
    v = {
        "x": 0.5 * v["x"] + jnp.sqrt(0.75) * jax.random.normal(noise_key, x["x"].shape)
    }

    def leapfrog(_: int, point: Any) -> Any:
        x, v, score = point
        half = v["x"] + 0.5 * h * score
        x = {"x": x["x"] + h * half}
        score = gradient(x)["x"]
        return x, {"x": half + 0.5 * h * score}, score

    new_x, new_v, _ = jax.lax.fori_loop(
        0, leapfrogs, leapfrog, (x, v, gradient(x)["x"])
    )
    log_ratio = (
        log_density(new_x)
        - log_density(x)
        + 0.5 * (jnp.sum(v["x"] ** 2) - jnp.sum(new_v["x"] ** 2))
    )
    accepted = jnp.log(jax.random.uniform(accept_key)) < log_ratio

    def choose(new: Any, old: Any) -> Any:
        return {"x": jnp.where(accepted, new["x"], old["x"])}

    return choose(new_x, x), choose(new_v, {"x": -v["x"]})
