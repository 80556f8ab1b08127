"""The program of one factor."""

from __future__ import annotations

from jax import Array

from composeprob.factors.base import Factor
from composeprob.language.program import program
from composeprob.language.statements import sample


@program
def single(factor: Factor) -> Array:
    """A program whose one site, x, has one factor."""
    return sample("x", factor)
