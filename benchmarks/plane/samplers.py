"""Samplers that are compared: the paper's at the paper's settings, and ours, on two
sets of levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

import composeprob as cp
from plane.tasks import Task

STEPS = 3
"""Transitions a level of the tuned kernels."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One sampler.

    Attributes:
        name: as in the table.
        make: builds it; a function, since samplers hold arrays.
        levels: ``"cosine"``, the paper's 100, or ``"even"``, 60 even in log-SNR. Every
            sampler visits all of them.
        paper: whether step sizes and numbers of transitions are the paper's.
    """

    name: str
    make: Callable[[], Any]
    levels: str
    paper: bool = False

    def schedule(self, task: Task) -> cp.Schedule:
        """The levels."""
        return (
            cp.Schedule.cosine(100)
            if self.levels == "cosine"
            else cp.Schedule.log_snr(60, -9.0, task.finest)
        )


def _plain_step() -> cp.ReverseStep:
    """DDPM's own, whose likelihood RAISE can take."""
    return cp.ReverseStep(order=1, control="none")


def _langevin_rule(schedule: cp.Schedule) -> Any:
    return jnp.asarray(0.1 * schedule.sigma**2)


def _leapfrog_rule(schedule: cp.Schedule) -> Any:
    return jnp.asarray(0.5 * schedule.sigma)


def rows(kind: str, task: Task) -> list[Row]:
    """The rows for models of a kind, ``"energy"`` or ``"score"``: without an energy,
    log-ratios are line integrals.

    Simpson's rule for chains is compared with the trapezoid rule on the task whose
    models were retrained.
    """
    mcmc, line = cp.AnnealedMCMC, cp.LineIntegral
    along = {f"{n} points": line(n) for n in (3, 5, 10)}
    if task.retrainings > 1:
        along |= {f"{n} points Simpson": line(n, "simpson") for n in (3, 5)}
    own = line(None)
    paper = [
        Row("Reverse", cp.Ancestral, "cosine", True),
        Row("ULA 0.001", lambda: mcmc(cp.ULA(0.001), 10), "cosine", True),
        Row(
            "U-HMC 0.03 × 3",
            lambda: mcmc(cp.UHMC(0.03, num_leapfrog=3), 10),
            "cosine",
            True,
        ),
    ]
    ours = [
        Row("Reverse", cp.Ancestral, "even"),
        Row("ULA 0.1σ²", lambda: mcmc(cp.ULA(_langevin_rule), STEPS), "even"),
        Row(
            "U-HMC 0.5σ × 3",
            lambda: mcmc(cp.UHMC(_leapfrog_rule, num_leapfrog=3), STEPS),
            "even",
        ),
    ]
    if kind == "energy":
        paper += [
            Row("MALA 0.001", lambda: mcmc(cp.MALA(0.001), 10), "cosine", True),
            Row(
                "HMC 0.03 × 3",
                lambda: mcmc(cp.HMC(0.03, num_leapfrog=3), 10),
                "cosine",
                True,
            ),
        ]
        ours += [
            Row("MALA tuned", lambda: mcmc(cp.MALA(cp.Adaptive()), STEPS), "even"),
            Row(
                "HMC tuned × 3",
                lambda: mcmc(cp.HMC(cp.Adaptive(), num_leapfrog=3), STEPS),
                "even",
            ),
            Row(
                "HMC tuned × 3, 10 a level",
                lambda: mcmc(cp.HMC(cp.Adaptive(), num_leapfrog=3), 10),
                "even",
            ),
            Row(
                "SMC",
                lambda: cp.SMC(cp.MALA(cp.Adaptive()), step=_plain_step()),
                "even",
            ),
            Row(
                "SMC, 3 MALA a level",
                lambda: cp.SMC(cp.MALA(cp.Adaptive()), STEPS, step=_plain_step()),
                "even",
            ),
        ]
        return paper + ours
    three = line(3)
    five = line(5, "simpson")
    paper += [
        Row(
            "MALA 0.001, 3 points",
            lambda: mcmc(cp.MALA(0.001, log_ratio=three), 10),
            "cosine",
            True,
        ),
        Row(
            "HMC 0.03 × 3, 3 points",
            lambda: mcmc(cp.HMC(0.03, 3, log_ratio=three), 10),
            "cosine",
            True,
        ),
        Row(
            "HMC 0.03 × 3, leapfrog",
            lambda: mcmc(cp.HMC(0.03, 3, log_ratio=own), 10),
            "cosine",
            True,
        ),
    ]

    def tuned(name: str, rule: Any) -> list[Row]:
        return [
            Row(
                f"MALA tuned, {name}",
                lambda: mcmc(cp.MALA(cp.Adaptive(), log_ratio=rule), STEPS),
                "even",
            ),
            Row(
                f"HMC tuned × 3, {name}",
                lambda: mcmc(cp.HMC(cp.Adaptive(), 3, log_ratio=rule), STEPS),
                "even",
            ),
        ]

    for name, rule in along.items():
        ours += tuned(name, rule)
    return [
        *paper,
        *ours,
        Row(
            "HMC tuned × 3, leapfrog",
            lambda: mcmc(cp.HMC(cp.Adaptive(), 3, log_ratio=own), STEPS),
            "even",
        ),
        Row("SMC, no kernel", cp.SMC, "even"),
        Row(
            "SMC, MALA 5 points",
            lambda: cp.SMC(cp.MALA(cp.Adaptive(), log_ratio=five), step=_plain_step()),
            "even",
        ),
    ]
