"""The posterior of SLCP from one observation, as a score."""

from __future__ import annotations

from .. import simulated
from ..worlds import slcp

RECIPE = simulated.posterior(slcp, simulated.slcp_network, iterations=240_000, weight=simulated.even)
