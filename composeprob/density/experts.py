"""Experts of a density: factors whose density at a level is that of their own noised draws."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
from jax import Array


class Expert(NamedTuple):
    """An expert f of a program, for people.

    Attributes:
        name: how it is printed.
        site: the noised site that it is a density of.
        power: the power that it has in the program; negative where it divides.
        dimension: how many entries it is a density of, d.
        trained: whether it was learned; a closed form is right everywhere.
        rows: how many conditions in plates it stands for.
        averaged: how many entries of the site each entry of its event is the mean of.
        members: in how many sets it sees the entries of the site, each entry in one of them; 1 where in no such sets.
    """

    name: str
    site: str
    power: float
    dimension: float
    trained: bool
    rows: int = 1
    averaged: float = 1.0
    members: int = 1


class ExpertValue(eqx.Module):
    """Score and log-density of an expert at one position and level, a row for each of its conditions in plates.

    Attributes:
        score: ∇ log f over the entries of its site, (rows, entries).
        total: the sum of these over the rows, (entries,).
        log_density: log f, (rows,); NaN of a factor that offers only its score.
    """

    score: Array
    total: Array
    log_density: Array
