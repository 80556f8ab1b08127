"""Programs and schedules that the tests of sampling share: one structure, so that
compiled code is shared too."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.runtime.progress import Progress
from composeprob.samplers.layout import Layout
from composeprob.samplers.resampling import Resampler
from composeprob.samplers.run import Run, Visits, begin

SCHEDULE = cp.Schedule.log_snr(32)  # steps of 0.65 in log-SNR
N = 2048


@cp.program
def single(f: Any) -> Any:
    """One site under one factor."""
    return cp.sample("x", f)


@cp.program
def squared(f: Any) -> Any:
    """One site under the square of a factor."""
    return cp.sample("x", f**2)


@cp.program
def both(f: Any, g: Any) -> Any:
    """One site under a product."""
    return cp.sample("x", f * g)


@cp.program
def measured(f: Any, law: Any, y: Any, anneal: Any = None) -> None:
    """One site under a factor, and data under the law that a function makes of it."""
    cp.observe("y", law(cp.sample("x", f)), y, anneal=anneal)


@cp.program
def weighed(f: Any, log_weight: Any, anneal: Any = None) -> None:
    """One site under a factor, and the log-weight that a function makes of it."""
    cp.factor("w", log_weight(cp.sample("x", f)), anneal=anneal)


def normal(
    mean: Any = 0.0, sd: Any = 1.0, schedule: cp.Schedule = SCHEDULE
) -> cp.Analytic:
    """A Gaussian factor with independent entries."""
    return cp.Analytic(dist.Normal(on_host(mean), on_host(sd)), schedule)


def on_host(values: Any) -> Any:
    """An array in the precision of JAX's numbers; of traced values a traced one.

    NumPyro checks the values of a distribution: on a device each operation of that
    would be compiled for each shape.
    """
    traced = [isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)]
    if any(traced):
        return jnp.asarray(values, float)
    return np.asarray(values, jnp.result_type(float))


def slow(*row: Any) -> Any:
    """A row of a table that only `make test-all` runs."""
    return pytest.param(*row, marks=pytest.mark.slow)


def modes(shares: Any, means: Any, sds: Any) -> dist.Distribution:
    """A mixture of normal laws of a number, or, where the means are rows, of an
    event."""
    means, sds = on_host(means), on_host(sds)
    width = sds[:, None] if sds.ndim == 1 < means.ndim else sds
    parts = dist.Normal(means, width).to_event(means.ndim - 1)
    return dist.MixtureSameFamily(dist.Categorical(probs=on_host(shares)), parts)


def learned(
    network: Any,
    form: str,
    schedule: cp.Schedule,
    shape: tuple[int, ...] = (2,),
    time: str = "log_snr",
    **options: Any,
) -> cp.Diffusion:
    """A factor by a network of this parameterization, told the log-SNR."""
    return cp.Diffusion(
        network,
        schedule,
        event_shape=shape,
        parameterization=form,
        time=time,
        **options,
    )


def unit_energy(x: jax.Array, t: jax.Array) -> jax.Array:
    """The energy of N(0, I) under a variance-preserving schedule, for time="sigma": t =
    σ/α, and −E/σ = −½‖x‖²."""
    return 0.5 * jnp.sum(x**2) * t / jnp.sqrt(1 + t**2)


class Layers(eqx.Module):
    """An energy with matrix products, for time="sigma": that of `unit_energy` and a
    tenth of a network's outputs."""

    weights: tuple[jax.Array, ...]

    def __init__(self, *widths: int) -> None:
        keys = jax.random.split(jax.random.key(0), len(widths) - 1)
        sizes = zip(keys, widths[1:], widths[:-1], strict=True)
        self.weights = tuple(
            jax.random.normal(key, (out, into)) / into**0.5 for key, out, into in sizes
        )

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        h = x
        for matrix in self.weights:
            h = jnp.tanh(matrix @ h)
        return unit_energy(x, t) + 0.1 * jnp.sum(h) * t / jnp.sqrt(1 + t**2)


# Of first order it compiles in half the time.
SAMPLER = cp.SMC(
    cp.MALA(cp.Adaptive()), check_levels=False, step=cp.ReverseStep(order=1)
)


def run(density: Any, seed: int = 0, chains: int = 64, **options: Any) -> cp.Result:
    """A small run, by `SAMPLER` unless the options name another."""
    options = {"sampler": SAMPLER, "progress": False} | options
    return cp.infer(density, jax.random.key(seed), num_chains=chains, **options)


def stop_after(patch: Any, number: int, what: str = "") -> None:
    """An interruption when so many levels are done, or so many of what the bar then
    counts."""
    update = Progress.update

    def stopping(self: Any, done: int, **facts: Any) -> None:
        update(self, done, **facts)
        if done >= number and self.description.endswith(what):
            raise KeyboardInterrupt

    patch.setattr(Progress, "update", stopping)


class Never(Resampler):
    """No chain takes the place of another, so that log-weights stay with the chains
    that gained them."""

    def should_resample(self, ess: jax.Array, level: jax.Array) -> jax.Array:
        return jnp.asarray(False)

    def ancestors(self, words: jax.Array, log_weights: jax.Array) -> jax.Array:
        return jnp.arange(len(log_weights))


def visited(
    sampler: Any,
    density: Any,
    points: Any,
    level: Any,
    above: Any = None,
    seed: int = 2,
) -> Run:
    """The run of chains at these points v of the level above, (n, D), after their visit
    of a level; traceable.

    They are evaluated there, with equal weights; their log-weights afterwards are the
    increments.
    """

    @eqx.filter_jit  # traced anew each time, so that mutants are seen
    def visit(
        sampler: Any,
        density: Any,
        points: jax.Array,
        level: jax.Array,
        above: jax.Array,
    ) -> Run:
        layout = Layout.of_density(density)
        terms = sampler.needs_terms(density)
        visits = Visits.given([0], density.num_levels)
        run = begin(jax.random.key(seed), len(points), visits)
        run = sampler.start(run, density, density.num_levels - 1)

        def particle(words: jax.Array, v: jax.Array) -> Any:
            evaluation = layout.evaluate(density, v, above, terms)
            return sampler.initial_particle(evaluation, words, v)

        # As if the level above had been visited last.
        order = run.visits.order.at[0].set(above).at[1].set(level)
        zero = jnp.zeros(len(points), points.dtype)
        run = dataclasses.replace(
            run,
            chains=jax.vmap(particle)(run.words, points),
            visits=Visits(order, jnp.int32(1), None),
            log_weights=zero,
            path_weights=zero,
        )
        return sampler.advance(run, density, jnp.int32(2))

    if above is None:
        above = level + 1
    return visit(
        sampler, density, jnp.asarray(points), jnp.asarray(level), jnp.asarray(above)
    )


class Calls:
    """A counter that survives tracing: `run` counts calls at run time, one for a whole
    batch under `jax.vmap`, `traced` those by Python."""

    def __init__(self) -> None:
        self._run, self.traced = 0, 0

    def _one_more(self) -> None:
        self._run += 1

    def __call__(self) -> None:
        self.traced += 1
        jax.debug.callback(self._one_more)

    @property
    def run(self) -> int:
        """So far, once every call under way has arrived."""
        jax.effects_barrier()
        return self._run

    def reset(self) -> None:
        self._run -= self.run
        self.traced = 0

    def runs_of(self, thunk: Callable[[], Any]) -> int:
        """Number of calls in `thunk`."""
        before = self.run
        jax.block_until_ready(thunk())
        return self.run - before


class Counted(eqx.Module):
    """log N(x; 0, I); a module, as a function is not called again once a program with
    it is compiled."""

    calls: Calls = eqx.field(static=True)

    def __call__(self, x: jax.Array, level: jax.Array) -> jax.Array:
        self.calls()
        return -0.5 * jax.numpy.sum(x**2)


def equations(jaxpr: Any, loops: int = 0) -> Iterator[tuple[Any, int]]:
    """Every equation of a traced function, those inside of others too, with the number
    of loops that it is in."""

    def is_jaxpr(node: Any) -> bool:
        return hasattr(node, "eqns")

    for equation in jaxpr.eqns:
        yield equation, loops
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
        is_loop = equation.primitive.name in ("while", "scan")
        for inner_jaxpr in filter(is_jaxpr, inner):
            yield from equations(inner_jaxpr, loops + is_loop)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance over the leading axis."""
    return x.mean(0), np.cov(x.reshape(len(x), -1), rowvar=False)
