"""Pictures and pages of results, densities and graphs: the core asks for them here, and
`composeprob.plotting`, which it does not import, makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Renderer(Protocol):
    """Functions of a package that draws."""

    def plot_result(self, result: Any, kind: str) -> Figure:
        """Draw a figure of one kind; see `Result.plot`."""

    def report(self, result: Any) -> str:
        """Return the page of a `Result`."""

    def display(self, result: Any) -> str:
        """Return the display of a `Result` in a notebook."""

    def graph_source(self, graph: Any) -> str:
        """Return the Graphviz source of a program's graph."""

    def graph_html(self, graph: Any) -> str:
        """Return the display of a program's graph in a notebook."""


_load: Callable[[], Renderer] | None = None


def set_renderer(load: Callable[[], Renderer]) -> None:
    """Set the function that loads what draws: it is called at each drawing, and the
    first call imports Matplotlib."""
    global _load
    _load = load


def renderer() -> Renderer:
    """Load what draws."""
    assert _load is not None  # the package sets it at its import
    return _load()
