"""Scenes given a caption of one object, as an energy."""

from __future__ import annotations

from .. import scenes

RECIPE = scenes.caption("energy_residual", iterations=8_000)
