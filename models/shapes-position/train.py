"""Scenes given the centre of one object, as an energy."""

from __future__ import annotations

from .. import scenes

RECIPE = scenes.position("energy_residual", iterations=15_000)
