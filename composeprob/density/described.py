"""What people are shown of a compiled program."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple, Protocol

import numpy as np


class Diagram(Protocol):
    """What is shown of a program's IR, and asked of it by those who know no IR."""

    @property
    def name(self) -> str: ...

    @property
    def dims(self) -> Mapping[str, tuple[str | None, ...]]: ...

    @property
    def doubts(self) -> tuple[str, ...]: ...

    @property
    def observations(self) -> Sequence[object]: ...

    @property
    def formula(self) -> str: ...

    def dot(self) -> str: ...

    def _repr_html_(self) -> str: ...


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
        members: in how many sets it sees the entries of the site, each entry in one of
            them; 1 where in no such sets.
    """

    name: str
    site: str
    power: float
    dimension: float
    trained: bool
    rows: int = 1
    averaged: float = 1.0
    members: int = 1


@dataclass(frozen=True, eq=False, repr=False)
class Described:
    """The program's IR, for people. All are equal, so that other numbers share compiled
    code; no trace may read it.

    Attributes:
        graph: the IR; renders in notebooks.
        text: the program as mathematics, with what each pass did.
        where: the place of the program's definition.
        offers: (name, place, capabilities) of every leaf.
        pictures: what makes images of a stack of a site's values, by the site's name,
            where its factors know that.
        experts: a description of every expert, in the order of
            `Evaluates.expert_values`.
    """

    graph: Diagram
    text: str
    where: str
    offers: tuple[tuple[str, str, frozenset[str]], ...]
    pictures: Mapping[str, Callable[[object], np.ndarray]] = field(default_factory=dict)
    experts: tuple[Expert, ...] = ()

    def html(self) -> str:
        """The program for notebooks: its density, its graph, and behind a click what
        the compiler did."""
        density = escape(self.graph.formula)
        density = re.sub(r"_(\w)\b", r"<sub>\1</sub>", density)
        density = re.sub(r"\^(-?[\d.]+(?:e[-+]?\d+)?)", r"<sup>\1</sup>", density)
        return (
            f"<div><div><b>{escape(self.graph.name)}</b> <small>({escape(self.where)})</small></div>"
            f"<div style='font-family:serif;font-size:1.2em;margin:6px 0'>{density}</div>"
            f"<div style='overflow-x:auto'>{self.graph._repr_html_()}</div>"
            "<details><summary>sites, levels, and what the compiler did</summary>"
            f"<pre style='white-space:pre-wrap'>{escape(self.text)}</pre></details></div>"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Described)

    def __hash__(self) -> int:
        return hash(Described)
