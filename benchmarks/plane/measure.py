"""One run of one sampler on one task, judged."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from report import CODE

import composeprob as cp
from plane.samplers import Row
from plane.tasks import Task, truth

HELD_OUT, BUDGET, MOST = 48, 4000, 32
"""Exact draws whose RAISE log-likelihood is estimated, evaluations that each may cost,
and most chains from each."""


@dataclasses.dataclass
class Judged:
    """Results of one row; errors are in nats of mean log p and in total variation of
    the modes' shares.

    The sampler's error is that of the same run with exact noised factors; the models'
    error is the rest. ``seconds`` are those of the run without compilation, ``wall``
    all that the row took, judging included.
    """

    task: str
    kind: str
    retraining: int
    sampler: str
    levels: str
    paper: bool
    log_likelihood: float
    raise_log_likelihood: float | None
    raise_standard_error: float | None
    tv: float
    mmd: float
    w2: float
    covariance: float
    acceptance: float
    quadrature_error: float
    evaluations: int
    seconds: float
    wall: float
    sampler_error: tuple[float, float] | None
    score_error: tuple[float, float] | None
    status: str
    num_chains: int
    made_at: dict[str, Any] | None = None  # by which code, as `report.CODE` says it

    @property
    def name(self) -> tuple[str, str, int, str, str]:
        """Key of a row."""
        return self.task, self.kind, self.retraining, self.sampler, self.levels


class Compilations:
    """Adds up what JAX spends on tracing and compiling."""

    EVENTS = (
        "/jax/core/compile/jaxpr_trace_duration",
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    )

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **_: Any) -> None:
        self.seconds += duration if event in self.EVENTS else 0.0

    @contextlib.contextmanager
    def apart(self) -> Iterator[list[float]]:
        """Times a block; the list gets its seconds without compilation."""
        out: list[float] = []
        before = self.seconds
        began = time.monotonic()
        yield out
        out.append(time.monotonic() - began - (self.seconds - before))


COMPILATIONS = Compilations()


def judge(
    task: Task,
    kind: str,
    row: Row,
    num_chains: int,
    exact: dict[str, float] | None,
    retraining: int = 0,
    raised: bool = True,
) -> tuple[Judged, np.ndarray]:
    """Run a row and judge it.

    Args:
        task, kind, row, retraining: what to run.
        num_chains: number of chains, and of exact draws that they are compared with.
        exact: what the same run with exact factors came to; None if this is that run.
        raised: whether to estimate the RAISE log-likelihood, which costs up to
            HELD_OUT·BUDGET evaluations.

    Returns:
        The row and its samples.
    """
    law = truth(task.name)
    began = time.monotonic()
    density = task.compile(kind, row.schedule(task), retraining)
    key = jax.random.fold_in(jax.random.key(0), retraining)
    with COMPILATIONS.apart() as seconds:
        result = cp.infer(
            density, key, num_chains=num_chains, sampler=row.make(), progress=False
        )
    samples = np.asarray(result["x"], np.float64)
    found = law.judge(samples, law.draw(jax.random.key(1), num_chains))
    raise_mean = raise_error = None
    if raised:
        raise_mean, raise_error = _raise(
            density, row, result, law.draw(jax.random.key(2), HELD_OUT)
        )
    sampler_error = score_error = None
    if exact is not None:
        draws = law.judge(
            law.draw(jax.random.key(3), num_chains),
            law.draw(jax.random.key(1), num_chains),
        )
        sampler_error = (draws["log_likelihood"] - exact["log_likelihood"], exact["tv"])
        score_error = (
            exact["log_likelihood"] - found["log_likelihood"],
            found["tv"] - exact["tv"],
        )
    visited = np.isfinite(result.acceptance)
    acceptance = float("nan")
    if visited.any():
        acceptance = float(result.acceptance[visited].mean())
    judged = Judged(
        task=task.name,
        kind=kind,
        retraining=retraining,
        sampler=row.name,
        levels=row.levels,
        paper=row.paper,
        **found,
        raise_log_likelihood=raise_mean,
        raise_standard_error=raise_error,
        acceptance=acceptance,
        quadrature_error=_mean(result.levels["quadrature_error"]),
        evaluations=result.evaluations,
        seconds=seconds[0],
        wall=time.monotonic() - began,
        sampler_error=sampler_error,
        score_error=score_error,
        status=str(result.status),
        num_chains=num_chains,
        made_at=CODE.stamp(),
    )
    return judged, samples


def _raise(
    density: Any, row: Row, result: Any, points: np.ndarray
) -> tuple[float, float]:
    """RAISE log-likelihood of points under the run's sampler at the run's step sizes,
    and its standard error."""
    found = cp.metrics.raise_log_likelihood(
        density,
        {"x": points},
        jax.random.key(4),
        sampler=row.make(),
        num_chains=int(np.clip(BUDGET // result.evaluations, 1, MOST)),
        log_evidence=result.log_evidence,
        step_size=result.step_size,
    )
    return float(found.mean), float(found.standard_error)


def _mean(values: Any) -> float:
    known = np.asarray(values)[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
