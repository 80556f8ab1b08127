"""Levels that findings advise, tried on the density at hand before they are printed."""

from __future__ import annotations

import math

import numpy as np

from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import ComposeProbError
from composeprob.schedule import Schedule


def with_less_noise(density: AnnealedDensity, highest: float) -> str:
    """Code of levels of a program that end at a log-SNR of ``highest`` or a little
    more; empty where one of its factors does not know them."""
    number = density.num_levels
    least = _least(density)
    most = math.ceil(highest)
    if not _knows(density, Schedule.log_snr(number, min=least, max=most)):
        return ""
    return f"schedule=cp.Schedule.log_snr({number}, min={least:g}, max={most})"


def without_cleanest(density: AnnealedDensity, level: int) -> str:
    """Code of levels of a program that end at one of its own: argument of
    `composeprob.infer`."""
    log_snr = np.asarray(density.schedule.log_snr, np.float64)
    number = density.num_levels - level
    high = math.floor(100 * float(log_snr[level])) / 100
    least = _least(density)
    if number > 1 and high > least:
        levels = np.linspace(high, least, number)
        schedule = Schedule.from_arrays(*density.schedule.noise_at(levels))
        if _knows(density, schedule):
            return f"levels=np.linspace({high:g}, {least:g}, {number})"
    # Factors of whole levels know their own alone.
    return f"levels=density.schedule.log_snr[{level}:]"


def _least(density: AnnealedDensity) -> float:
    """The log-SNR of the noisiest level to two decimals, inside of the range."""
    least = float(np.asarray(density.schedule.log_snr)[-1])
    return math.ceil(100 * least) / 100


def _knows(density: AnnealedDensity, schedule: Schedule) -> bool:
    """Return whether a program can be compiled on these levels."""
    try:
        density.on(schedule)
    except ComposeProbError:
        return False
    return True
