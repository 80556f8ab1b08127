"""The posterior of two moons from one observation, as a score."""

from __future__ import annotations

from .. import simulated
from ..worlds import two_moons

RECIPE = simulated.posterior(two_moons, simulated.two_moons_network, iterations=30_000)
