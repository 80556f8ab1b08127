"""The table of a run's checks, printed from their registry when the site is built.

    ```{checks}
    ```

stands for one row per check: its code, what it finds, and whether errors are withheld.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from composeprob.results.checks import CHECKS


def rows() -> list[str]:
    """Return the table in Markdown, line by line."""
    lines = ["| finding | problem | errors |", "|---|---|---|"]
    for check in CHECKS:
        errors = "withheld" if check.withholds else "given"
        lines.append(f"| `{check.code}` | {check.meaning} | {errors} |")
    return lines


class ChecksTable(SphinxDirective):
    """The table, parsed as the page is."""

    def run(self) -> list[nodes.Node]:
        parent = nodes.container()
        lines = StringList(rows(), source="checks")
        self.state.nested_parse(lines, self.content_offset, parent)
        return parent.children


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("checks", ChecksTable)
    return {"parallel_read_safe": True}
