"""Antimicrobial peptides, token by token in any order."""

from __future__ import annotations

from functools import partial

from .. import peptides

RECIPE = peptides.recipe(antimicrobial=True, iterations=3000, batches=32)
quality = partial(peptides.quality, antimicrobial=True)
