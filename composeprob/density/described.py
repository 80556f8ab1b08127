"""Description of a compiled program for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple, Protocol

import numpy as np

from composeprob.density.reward import SiteReward


class Diagram(Protocol):
    """View of a program's IR for modules that do not know the IR."""

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
        members: the number of disjoint sets of entries that it sees; 1 where it sees
            the site as a whole.
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
    """The program's IR, for people.

    All descriptions are equal, so that programs with other numbers share compiled code;
    no trace may read one.

    Attributes:
        graph: the IR; renders in notebooks.
        text: the program as mathematics, with what each pass did.
        where: the place of the program's definition.
        offers: (name, place, capabilities) of every leaf.
        pictures: functions that make images of a stack of a site's values, by the
            site's name, where its factors know one.
        experts: a description of every expert, in the order of
            `Evaluates.expert_values`.
        rewards: criteria without a gradient, which runs add and evaluations leave out.
    """

    graph: Diagram
    text: str
    where: str
    offers: tuple[tuple[str, str, frozenset[str]], ...]
    pictures: Mapping[str, Callable[[object], np.ndarray]] = field(default_factory=dict)
    experts: tuple[Expert, ...] = ()
    rewards: tuple[SiteReward, ...] = ()

    def html(self) -> str:
        """Render the program for notebooks: its density, its graph, and behind a click
        the compiler's report."""
        name = escape(self.graph.name)
        place = escape(self.where)
        density = escape(self.graph.formula)
        # Indices and exponents of the formula as HTML: x_k, f^-0.5.
        density = re.sub(r"_(\w)\b", r"<sub>\1</sub>", density)
        density = re.sub(r"\^(-?[\d.]+(?:e[-+]?\d+)?)", r"<sup>\1</sup>", density)
        return (
            f"<div><div><b>{name}</b> <small>({place})</small></div>"
            "<div style='font-family:serif;font-size:1.2em;margin:6px 0'>"
            f"{density}</div>"
            f"<div style='overflow-x:auto'>{self.graph._repr_html_()}</div>"
            "<details><summary>sites, levels, and what the compiler did</summary>"
            f"<pre style='white-space:pre-wrap'>{escape(self.text)}</pre>"
            "</details></div>"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Described)

    def __hash__(self) -> int:
        return hash(Described)
