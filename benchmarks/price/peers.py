"""One transition as this library makes it, as its peers do, and the evaluation in whose
units all are counted.

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
"""Of every HMC here, as in the paper."""
UNIT = "value and score"
HMC = f"HMC({LEAPFROGS})"
"""Names of rows."""
Program = Callable[[], Any]


def programs(case: Case) -> dict[str, tuple[Program, float]]:
    """``{name: (program, transitions)}`` of everything that is measured on a case; the
    first is the unit."""
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
    for name, make, count in (
        ("BlackJAX mala", lambda f: blackjax.mala(f, mala), many),
        (
            f"BlackJAX hmc({LEAPFROGS})",
            lambda f: blackjax.hmc(f, hmc, diagonal, LEAPFROGS),
            few,
        ),
    ):
        algorithm = lambda density, make=make: make(partial(log_density, density))
        start = eqx.filter_jit(
            lambda density, x, algorithm=algorithm: jax.vmap(algorithm(density).init)(x)
        )
        add(
            name,
            partial(_loop, partial(_blackjax, algorithm), keys),
            start(density, x),
            count,
        )

    for leapfrogs, count in ((1, many), (LEAPFROGS, few)):
        make = partial(_numpyro, leapfrogs, hmc, log_density, keys, x)
        start = eqx.filter_jit(lambda density, make=make: make(density)[1])(density)
        step = lambda density, keys, state, make=make: make(density)[0].sample(
            state, (), {}
        )
        add(f"NumPyro HMC({leapfrogs})", partial(_loop, step, keys), start, count)

    momentum = jax.tree.map(jnp.zeros_like, x)
    for name, one, start, count in (
        ("notebook MALA", partial(_plain_mala, mala), x, many),
        (f"notebook {HMC}", partial(_plain_hmc, hmc, LEAPFROGS), (x, momentum), few),
    ):
        step = lambda density, keys, state, one=one: jax.vmap(
            partial(one, partial(log_density, density))
        )(keys, state)
        add(name, partial(_loop, step, keys), start, count)
    return rows | runs(case)


def runs(case: Case) -> dict[str, tuple[Program, float]]:
    """Whole runs of `cp.infer`, over the evaluations that they make: what the driver
    adds."""
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
    """``count`` transitions; each takes its keys as the driver does."""

    def body(i: Array, state: Any) -> Any:
        return step(density, jax.vmap(jax.random.fold_in, (0, None))(keys, i), state)

    return jax.lax.fori_loop(0, count, body, state)


def _evaluations(density: Any, x: Any, count: Array) -> Any:
    """Values and scores, each at a place that the last one has to do with."""
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
    """NumPyro's kernel over all chains at once, without adaptation, and its first
    state.

    It is made anew where a step is traced, as it holds the density: the compiler drops
    the first state there.
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


def _plain_mala(h: float, log_density: Any, key: Array, x: Any) -> Any:
    """The reference notebook's way: gradient and log-density evaluated anew at both
    ends, each by a call of its own."""
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


def _plain_hmc(
    h: float, leapfrogs: int, log_density: Any, key: Array, state: Any
) -> Any:
    """L + 1 gradients and two log-densities; damping 0.5, and the momentum turns round
    where it should."""
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
    choose = lambda new, old: {"x": jnp.where(accepted, new["x"], old["x"])}
    return choose(new_x, x), choose(new_v, {"x": -v["x"]})
