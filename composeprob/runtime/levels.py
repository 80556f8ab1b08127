"""What ``cp.infer(levels=…)`` means: the density on other levels, and whether the run chooses among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import AlignmentError, InvalidValueError
from composeprob.samplers.visits import Pace
from composeprob.schedule import Schedule

ADAPTIVE = "adaptive"
FINE = 1000
"""Levels, at least, among which a run chooses where factors know any log-SNR."""


def chosen(
    density: AnnealedDensity, levels: str | ArrayLike | None, num_chains: int
) -> tuple[AnnealedDensity, Pace | None]:
    """The density on the levels that N chains may visit, and how they choose among them; None where they visit all.

    Raises:
        InvalidValueError: no such levels.
        AlignmentError: a factor does not know one of them.
    """
    if levels is None:
        return density, None
    if isinstance(levels, str):
        if levels != ADAPTIVE:
            raise InvalidValueError(
                f"Unknown levels {levels!r}.", fix=f"pass {ADAPTIVE!r}, an array of log-SNR, or leave levels out."
            )
        return _finer(density), Pace.default(num_chains)
    return density.on(_at(density.schedule, _checked(levels))), None


def _checked(levels: ArrayLike) -> np.ndarray:
    """log-SNR from the cleanest to the noisiest."""
    try:
        log_snr = np.asarray(levels, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(
            f"levels must be numbers, log-SNR; got {levels!r}.", fix="for example levels=np.linspace(10, -8, 60)."
        ) from error
    if log_snr.ndim != 1 or log_snr.size == 0 or not np.all(np.isfinite(log_snr)):
        raise InvalidValueError(
            f"levels must be one axis of finite log-SNR; got an array of shape {log_snr.shape}"
            + ("." if log_snr.ndim != 1 or log_snr.size == 0 else " with numbers that are not finite."),
            fix="for example levels=np.linspace(10, -8, 60).",
        )
    return np.sort(log_snr)[::-1]


def _at(schedule: Schedule, log_snr: np.ndarray) -> Schedule:
    """The schedule's noise at other log-SNR: beyond its ends it goes on as at them."""
    alpha = schedule.alpha_at(log_snr)
    return Schedule.from_arrays(alpha, alpha * np.exp(-log_snr / 2))


def _finer(density: AnnealedDensity) -> AnnealedDensity:
    """The density with levels between its own, or itself where a factor knows only those."""
    own = np.asarray(density.schedule.log_snr, np.float64)
    parts = -(-FINE // max(len(own) - 1, 1))
    between = np.interp(np.arange((len(own) - 1) * parts + 1) / parts, np.arange(len(own)), own)
    try:
        return density.on(_at(density.schedule, between))
    except AlignmentError:
        return density
