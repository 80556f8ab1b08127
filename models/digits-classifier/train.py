"""A classifier of handwritten digits under noise of any level."""

from __future__ import annotations

from .. import handwriting

RECIPE = handwriting.classifier(iterations=3000)
held_out = handwriting.held_out
