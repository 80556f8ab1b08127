"""Compilation of a first call, over that of a bare scan of scores.

It is processor seconds of the first run less those of the second.

    python -m benchmarks first-call [--repeats 3] [--cases NAME …]
    python -m benchmarks.first_call

README's program, ring × bar with 256 chains, by default and by two samplers; beside
them BlackJAX's MALA and NumPyro's NUTS on other models. Every measurement is a new
process without a persistent compilation cache, and all cases take turns. Exits with 1
if the default takes more than 4.0 times the bare scan, or reverse diffusion over 2.2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

# As for a script, so that `report` is found.
sys.path.insert(0, str(Path(__file__).parent))

CHAINS, SEED = 256, 0
BARE, DEFAULT, REVERSE = (
    "bare scan of the composed score",
    "cp.infer, default",
    "cp.infer, Ancestral",
)
LIMITS = {DEFAULT: 4.0, REVERSE: 2.2}
"""Most that each may take, in compilations of the bare scan."""
COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event that JAX reports once for every XLA program it compiles."""
Run = Callable[[], Any]


@cp.program
def ring_and_bar(ring: Any, bar: Any) -> Any:
    return cp.sample("x", ring * bar)


def density() -> cp.AnnealedDensity:
    """README's program on the zoo's two networks, 60 levels."""
    return cp.compile(ring_and_bar, cp.load("ring2d"), cp.load("bar2d"))


def infer(**options: Any) -> Run:
    """`cp.infer` of README's program, until the samples are there."""
    target = density()
    return lambda: (
        cp.infer(target, jax.random.key(SEED), num_chains=CHAINS, **options).samples
    )


def bare_scan() -> Run:
    """One composed score and one draw of noise a level, for all chains, in one jitted
    function of the density."""
    target = density()
    levels = jnp.arange(target.num_levels)[::-1]
    sigma = jnp.asarray(target.schedule.sigma)

    @jax.jit
    def descend(target: Any, key: jax.Array) -> jax.Array:
        def level(
            x: jax.Array, scanned: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, None]:
            k, key = scanned
            score = jax.vmap(lambda x: target.score({"x": x}, k)["x"])(x)
            step = 0.1 * sigma[k] ** 2
            return x + step * score + jnp.sqrt(2 * step) * jax.random.normal(
                key, x.shape
            ), None

        first, *keys = jax.random.split(key, 2)
        x = jax.random.normal(first, (CHAINS, 2))
        return jax.lax.scan(level, x, (levels, jax.random.split(keys[0], len(levels))))[
            0
        ]

    return lambda: descend(target, jax.random.key(SEED))


def blackjax_mala() -> Run:
    """MALA of BlackJAX on a correlated Gaussian in two dimensions, 256 chains, 60
    transitions."""
    import blackjax

    precision = jnp.asarray([[2.0, -1.2], [-1.2, 1.5]])
    algorithm = blackjax.mala(lambda x: -0.5 * x @ precision @ x, 0.2)

    @jax.jit
    def run(key: jax.Array) -> jax.Array:
        def transition(state: Any, key: jax.Array) -> tuple[Any, None]:
            return jax.vmap(algorithm.step)(jax.random.split(key, CHAINS), state)[
                0
            ], None

        state = jax.vmap(algorithm.init)(jnp.zeros((CHAINS, 2)))
        return jax.lax.scan(transition, state, jax.random.split(key, 60))[0].position

    return lambda: run(jax.random.key(SEED))


def numpyro_nuts() -> Run:
    """NUTS of NumPyro on eight schools, one chain of 200 warm-up steps and 200
    draws."""
    import numpyro
    from numpyro.infer import MCMC, NUTS

    effects = jnp.asarray([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = jnp.asarray([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def schools() -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("schools", len(effects)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(mu + tau * z, errors), obs=effects)

    mcmc = MCMC(NUTS(schools), num_warmup=200, num_samples=200, progress_bar=False)

    def run() -> Any:
        mcmc.run(jax.random.key(SEED))
        return mcmc.get_samples()

    return run


CASES: dict[str, Callable[[], Run]] = {
    BARE: bare_scan,
    DEFAULT: infer,
    REVERSE: lambda: infer(sampler=cp.Ancestral()),
    "cp.infer, AnnealedMCMC(MALA)": lambda: infer(
        sampler=cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 1)
    ),
    "BlackJAX MALA, a Gaussian": blackjax_mala,
    "NumPyro NUTS, eight schools": numpyro_nuts,
}


def measure(name: str) -> dict[str, Any]:
    """Processor seconds of a first and of a second run in this process, and the XLA
    programs that each compiled."""
    seconds, programs, count = [], [], [0]

    def count_program(event: str, *_: Any, **__: Any) -> None:
        count[0] += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(count_program)
    run = CASES[name]()
    # Nothing above is counted, the start of the backend included.
    jax.block_until_ready(jax.random.key(SEED))
    for _ in range(2):
        count[0] = 0
        began = time.process_time()
        jax.block_until_ready(run())
        seconds.append(time.process_time() - began)
        programs.append(count[0])
    return {"first": seconds[0], "second": seconds[1], "programs": programs}


def in_a_process(name: str) -> dict[str, Any]:
    """`measure` in a fresh process that has no persistent compilation cache."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("JAX_COMPILATION_CACHE")
    }
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    load = os.getloadavg()[0]
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"load": load}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=3, help="how often each case is measured"
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--measure",
        choices=list(CASES),
        help="measure one case in this process, and print its JSON",
    )
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return 0
    from report import publish

    names = list(dict.fromkeys([BARE, *options.cases]))  # the unit is always measured
    series: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        for name in names[:: 1 if repeat % 2 == 0 else -1]:
            series[name].append(in_a_process(name))
            print(f"{name}: {json.dumps(series[name][-1])}", flush=True)
    compilation = {
        name: statistics.median(m["first"] - m["second"] for m in runs)
        for name, runs in series.items()
    }
    ratios = {
        name: seconds / compilation[BARE] for name, seconds in compilation.items()
    }
    rows = []
    for name, runs in series.items():
        first, second = (
            statistics.median(m[key] for m in runs) for key in ("first", "second")
        )
        programs = " and ".join(
            f"{np.median([m['programs'][i] for m in runs]):.0f}" for i in range(2)
        )
        rows.append(
            [
                name,
                f"{first:.1f}",
                f"{second:.1f}",
                f"{compilation[name]:.1f}",
                f"{ratios[name]:.1f}",
                programs,
            ]
        )
    checks = {
        f"{name} compiles {ratios[name]:.2f} ≤ {limit} times the bare scan": ratios[
            name
        ]
        <= limit
        for name, limit in LIMITS.items()
        if name in ratios
    }
    loads = [m["load"] for runs in series.values() for m in runs]
    notes = NOTES.format(repeats=options.repeats, least=min(loads), most=max(loads))
    if set(names) >= PEERS:
        notes += OF_PEERS
    title = f"What a first call compiles, {CHAINS} chains, processor seconds"
    return publish(
        "first_call",
        title,
        COLUMNS,
        rows,
        checks,
        {"series": series, "over bare": ratios},
        notes,
    )


COLUMNS = [
    "program",
    "first call (s)",
    "second (s)",
    "compilation (s)",
    "over the bare scan",
    "XLA programs, first and second",
]
NOTES = (
    "Medians over {repeats} fresh processes each, which took turns; the machine's "
    "load before them was {least:.1f} to {most:.1f}. Compilation is the first call "
    "less the second, in processor seconds of all threads; before it the models are "
    "loaded and the program is compiled to a density. The bare scan evaluates "
    "README's composed score and draws noise once a level, in one jitted function of "
    "the density."
)
PEERS = {"BlackJAX MALA, a Gaussian", "NumPyro NUTS, eight schools"}
OF_PEERS = (
    " The last two rows are other models, named there: they show what first calls of "
    "other libraries take."
)


if __name__ == "__main__":
    sys.exit(main())
