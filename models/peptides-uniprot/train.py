"""Peptides of UniProt, token by token in any order."""

from __future__ import annotations

from functools import partial

from .. import peptides

RECIPE = peptides.recipe(antimicrobial=False, iterations=1200, batches=32)
quality = partial(peptides.quality, antimicrobial=False)
