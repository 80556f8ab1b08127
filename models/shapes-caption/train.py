"""Scenes given a caption of one object, as an energy."""

from __future__ import annotations

from .. import scenes

RECIPE = scenes.caption(iterations=24_000)
start = scenes.from_positions
