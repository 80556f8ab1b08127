"""Worth of sharing: K conditions of one network in one batch, or one by one.

    python -m benchmarks share

One by one in two ways: one after the other, as a loop over conditions does it, and side
by side, written out one by one in the same compiled code, whose independent parts XLA
spreads over the cores. All are one jitted value-and-score of the same product in a
compiled loop. Exits with 1 if at K = 8 and 32 chains the batch is less than 1.5 times
as fast as one after the other, if anywhere it is slower than either beyond noise, or if
they do not agree.

What a batch can gain is the peak of matrix products over the rate that one condition
alone reaches: both are told.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from price.cases import LEVEL, conditioned
from price.clock import CLOCKS, alternate, ratio
from price.peak import PRODUCTS, SIDE, flops, matrix_products
from report import publish

NUMBERS, CHAINS, LOOPS = (1, 2, 4, 8, 16), (1, 32, 256), 20
LIMIT, AT = 1.5, (8, 32)
"""The gain over one after the other that is asked for, at so many conditions and
chains."""
NOISE = 0.05
"""A batch that takes so much longer, as a share, is not called slower whatever the
scatter of its repeats."""


def batched(density: Any, x: Array) -> tuple[Array, Array]:
    """(log-density, score) as the compiler evaluates the product: one batch."""
    value, score = density.value_and_score({"x": x}, LEVEL)
    return value, score["x"]


def side_by_side(factors: Any, density: Any, x: Array) -> tuple[Array, Array]:
    """The same, each factor evaluated by itself, in whatever order XLA takes them."""
    noise = density.schedule.at(LEVEL)
    parts = [factor.evaluate(x, noise, factor.call_conditions()) for factor in factors]
    return sum(value for value, _ in parts), sum(score for _, score in parts)


def in_turn(factors: Any, density: Any, x: Array) -> tuple[Array, Array]:
    """The same, one factor after the other."""
    noise = density.schedule.at(LEVEL)
    asked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(factor.call_conditions() for factor in factors),
    )
    values, scores = jax.lax.map(
        lambda conditions: factors[0].evaluate(x, noise, conditions), asked
    )
    return values.sum(0), scores.sum(0)


def loop(evaluate: Any, arguments: Any, x: Array) -> Any:
    """`LOOPS` evaluations of all chains, each where the last one leads."""

    def body(_: Array, carry: Any) -> Any:
        x, total = carry
        value, score = jax.vmap(partial(evaluate, *arguments))(x)
        return x + 1e-6 * score, total + value

    return jax.lax.fori_loop(0, LOOPS, body, (x, jnp.zeros(len(x))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=15, help="how often every program is timed"
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="processor: for a machine that is busy",
    )
    parser.add_argument(
        "--chains",
        type=int,
        nargs="+",
        default=CHAINS,
        help=f"numbers of chains, {AT[1]} among them",
    )
    options = parser.parse_args()
    if AT[1] not in options.chains:
        parser.error(f"the limit is one for {AT[1]} chains: name that number too")
    programs = {("peak", 0, 0): (matrix_products(), PRODUCTS)}
    work = {}
    agree = one_batch = True
    for chains, number in itertools.product(options.chains, NUMBERS):
        case = conditioned(number, chains)
        density = case.compile()
        one_batch &= len(density.graph.groups) == 1
        x = case.positions(density, jax.random.key(0))["x"]
        ways = {
            "batch": (batched, (density,)),
            "in turn": (in_turn, (case.factors, density)),
            "side by side": (side_by_side, (case.factors, density)),
        }
        for way, (evaluate, arguments) in ways.items():
            run = eqx.filter_jit(partial(loop, evaluate))
            programs[way, number, chains] = (partial(run, arguments, x), LOOPS)
        (_, one), *others = (programs[way, number, chains][0]() for way in ways)
        agree &= all(
            np.allclose(one, other, rtol=1e-3, atol=1e-2) for _, other in others
        )
        work[number, chains] = flops(case)
    times = alternate(programs, options.repeats, options.clock)
    peak = 2.0 * SIDE**3 / times["peak", 0, 0].seconds.min()
    rows, gains, slower = [], {}, []
    for number, chains in work:
        one = times["batch", number, chains]
        row = [str(chains), str(number), f"{1e3 * one.median:.2f}"]
        for way in ONE_BY_ONE:
            other = times[way, number, chains]
            gain, error = ratio(other, one)
            gains[way, number, chains] = gain
            if gain < 1 - max(3 * error, NOISE):
                slower.append(f"{number} for {chains} chains")
            row += [f"{1e3 * other.median:.2f}", f"{gain:.2f} ± {error:.2f}"]
        rates = [
            work[number, chains] / times[way, number, chains].median / peak
            for way in ("batch", *ONE_BY_ONE)
        ]
        rows.append([*row, *(f"{rate:.0%}" for rate in rates)])
    asked = f"{AT[0]} conditions of {AT[1]} chains"
    gain = gains["in turn", *AT]
    checks = {
        f"{asked} in a batch: {gain:.2f} ≥ {LIMIT} times as fast as in turn": gain
        >= LIMIT,
        "no batch is slower than one by "
        f"one{': ' * bool(slower)}{', '.join(dict.fromkeys(slower))}": not slower,
        "all ways agree": bool(agree),
        "each batch is one evaluation of one network": one_batch,
    }
    details = {"clock": options.clock}
    details["gains"] = {
        f"{k} conditions, {n} chains, over {way}": v for (way, k, n), v in gains.items()
    }
    details["seconds"] = {
        f"{way}, {k} conditions, {n} chains": t.seconds.tolist()
        for (way, k, n), t in times.items()
    }
    title = (
        f"K conditions of one MLP energy, {options.clock} time, medians of "
        f"{options.repeats} repeats"
    )
    columns = [
        "chains",
        "K",
        "batch (ms)",
        "in turn (ms)",
        "times as fast",
        "side by side (ms)",
        "times as fast",
    ]
    columns += ["batch, of peak", "in turn, of peak", "side by side, of peak"]
    return publish("share", title, columns, rows, checks, details, NOTES)


ONE_BY_ONE = ("in turn", "side by side")
NOTES = (
    "One by one, each condition is evaluated for all chains by itself: in turn, by a "
    "loop over the conditions, or side by side, written out in the same compiled "
    "code, where XLA spreads independent parts over the cores. ± is a standard error. "
    "Peak is that of a product of large matrices in the same process: a batch gains "
    "at most the share of it that evaluation one by one leaves unused."
)


if __name__ == "__main__":
    sys.exit(main())
