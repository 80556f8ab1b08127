"""One row per public kernel, and later factor and schedule: a row buys every contract test.

test_registry.py of each part fails when a public class has no row.
"""

from __future__ import annotations

from collections.abc import Callable

import blackjax

from composeprob.kernels import HMC, MALA, UHMC, ULA, BlackJAX, Kernel

KERNELS: dict[str, Callable[[], Kernel]] = {
    "ULA": lambda: ULA(0.05),
    "MALA": lambda: MALA(0.15),
    "UHMC": lambda: UHMC(0.2, num_leapfrog=3),
    "HMC": lambda: HMC(0.45, num_leapfrog=3),
    "BlackJAX": lambda: BlackJAX(blackjax.hmc, 0.45, num_integration_steps=3),
}
