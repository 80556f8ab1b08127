"""Cost of a transition, in evaluations of the density: ours and its peers'.

The peers are BlackJAX, NumPyro and the reference notebook.

    python -m benchmarks cost
    python -m benchmarks cost --cases plane --clock processor

The unit is one jitted value-and-score of the same density for the same chains in a
compiled loop. All programs take turns in one process; numbers are medians. Exits with 1
if a transition costs more than its limit, or than a peer's.
"""

from __future__ import annotations

import argparse
import sys

import jax
from price.cases import CASES, Case
from price.clock import CLOCKS, Times, alternate, ratio
from price.peak import PRODUCTS, SIDE, flops, matrix_products
from price.peers import HMC, LEAPFROGS, UNIT, programs
from report import publish

PEERS = {
    "MALA": ("BlackJAX mala", "NumPyro HMC(1)"),
    HMC: (f"BlackJAX hmc({LEAPFROGS})", f"NumPyro HMC({LEAPFROGS})"),
}
"""Peers of each of our kernels: HMC with one leapfrog makes the evaluations of MALA."""
GEMM = "matrix product"
ERRORS = 3.0
"""Standard errors of a ratio that are called noise."""
PER_TRANSITION = dict.fromkeys((HMC, *PEERS[HMC], f"notebook {HMC}"), LEAPFROGS)
"""Evaluations that one transition needs, where that is not 1."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=list(CASES),
        default=list(CASES),
        help="which densities",
    )
    parser.add_argument(
        "--repeats", type=int, default=9, help="how often every program is timed"
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="processor: for a machine that is busy",
    )
    options = parser.parse_args()
    status = 0
    # each has files of its own, so that one can be measured again without the others
    for name in options.cases:
        case = CASES[name]()
        times = alternate(
            programs(case) | {GEMM: (matrix_products(), PRODUCTS)},
            options.repeats,
            options.clock,
        )
        work = flops(case)
        rate = work / times[UNIT].median
        share = rate * times[GEMM].seconds.min() / (2.0 * SIDE**3)
        details = {
            "clock": options.clock,
            "chains": case.num_chains,
            "flops of an evaluation": work,
        }
        details |= {
            "share of peak": share,
            "seconds": {n: t.seconds.tolist() for n, t in times.items()},
        }
        title = f"Cost of a transition: {case.name}, {case.num_chains} chains"
        notes = (
            f"{options.clock.capitalize()} time, medians of {options.repeats} repeats "
            "in turns. "
        )
        notes += (
            f"An evaluation makes {rate / 1e9:.0f} GFLOP/s, {share:.0%} of a large "
            f"matrix product's. {NOTES}"
        )
        status |= publish(
            f"cost_{name}",
            title,
            COLUMNS,
            table(times),
            judge(case, times),
            details,
            notes,
        )
        jax.clear_caches()
    return status


COLUMNS = [
    "program",
    "milliseconds",
    "in evaluations",
    "± (standard error)",
    "for each that it needs",
]
NOTES = (
    "An evaluation is one jitted value-and-score of the composed density for all "
    f"chains in a compiled loop; a transition of MALA needs one, of HMC({LEAPFROGS}) "
    f"{LEAPFROGS}. `cp.infer` is a whole run on two levels, over its evaluations: it "
    "includes the cost of the driver. Peers differentiate the same composed "
    "log-density. The notebook rows restate the paper's reference implementation, "
    f"which evaluates gradient and energy anew at both ends. Noise is {ERRORS:g} "
    "standard errors of a ratio, from the scatter of the repeats."
)


def table(times: dict[str, Times]) -> list[list[str]]:
    """One row a program."""
    rows = []
    for name, row in times.items():
        if name != GEMM:
            cost, error = ratio(row, times[UNIT])
            each = cost / PER_TRANSITION.get(name, 1)
            rows.append(
                [
                    name,
                    f"{1e3 * row.median:.1f}",
                    f"{cost:.3f}",
                    f"{error:.3f}",
                    f"{each:.3f}",
                ]
            )
    return rows


def judge(case: Case, times: dict[str, Times]) -> dict[str, bool]:
    """The limits: in evaluations, and beside the peers."""
    checks = {}
    if case.limit is not None:
        for name, count in (
            ("MALA", 1),
            (HMC, LEAPFROGS),
            ("cp.infer, MALA", 1),
            (f"cp.infer, {HMC}", 1),
        ):
            limit = case.limit * count
            cost = ratio(times[name], times[UNIT])[0]
            checks[f"{name} costs {cost:.3f} ≤ {limit:.2f} evaluations"] = cost <= limit
    for name, peers in PEERS.items():
        for peer in peers:
            cost, error = ratio(times[name], times[peer])
            text = (
                f"{name} over {peer} is {cost:.3f} ± {error:.3f}, no more than 1 "
                "within noise"
            )
            checks[text] = cost - ERRORS * error <= 1.0
    return checks


if __name__ == "__main__":
    sys.exit(main())
