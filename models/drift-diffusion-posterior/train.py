"""The posterior of one subject's drift-diffusion parameters from 200 trials, as a
score."""

from __future__ import annotations

import composeprob as cp

from .. import simulated
from ..worlds import drift_diffusion

LOSSES = (cp.training.Denoising(simulated.even),)
RECIPE = simulated.posterior(
    drift_diffusion,
    simulated.drift_diffusion_network,
    schedule=cp.Schedule.log_snr(60, -9.0, 11.0),
    log_snr=cp.training.LogSNR(-12.0, 12.0, focus=(-1.0, 10.0)),
    iterations=100_000,
    losses=LOSSES,
)
