"""The posterior of SLCP from one observation, as a score."""

from __future__ import annotations

import composeprob as cp

from .. import simulated
from ..worlds import slcp

LOSSES = (cp.training.Denoising(simulated.even),)
RECIPE = simulated.posterior(
    slcp, simulated.slcp_network, iterations=240_000, losses=LOSSES
)
