"""Handwritten digits given their class, as an energy."""

from __future__ import annotations

from .. import handwriting

RECIPE = handwriting.images("energy_residual", iterations=6000)
held_out = handwriting.held_out
