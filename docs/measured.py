"""Numbers of the pages, taken from benchmarks/results/ when the site is built.

A number that no file has stops the build.

    {measured}`FILE; CELL; …; COLUMN`

shows the table's cell in that column as it is published: rounded once more it could be
off by a digit. FILE is the name of a Markdown file without its ending. The cells name
one row by what it begins with; in a table with headings between its rows (**like
this**) some words of the heading may come first. ``COLUMN#2`` is the second column of
that name.

    ```{failing} FILE FILE …
    ```

lists the checks that failed when these files were made, or says that all held.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.util.docutils import SphinxRole

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


class NotMeasured(LookupError):
    """A page asks for a number that no file has."""


@cache
def tables(file: Path) -> list[list[list[str]]]:
    """Every table of a Markdown file: rows of cells, the header first."""
    blocks: list[list[list[str]]] = [[]]
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            blocks[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif blocks[-1]:
            blocks.append([])
    # The second line of a block is the rule under the header.
    return [[block[0], *block[2:]] for block in blocks if len(block) > 2]


def rows_of(file: Path) -> list[tuple[list[str], str, list[str]]]:
    """(header, heading, cells) of every row."""
    out = []
    for header, *rows in tables(file):
        heading = ""
        for cells in rows:
            if cells[0].startswith("**") and not any(cells[1:]):
                heading = cells[0].strip("*")
            else:
                out.append((header, heading, cells))
    return out


def measured(address: str, results: Path = RESULTS) -> str:
    """Return the cell at an address.

    Raises:
        NotMeasured: no such file, row or column, or more than one row.
    """
    parts = [part.strip() for part in " ".join(address.split()).split(";")]
    if len(parts) < 3:
        raise NotMeasured(f"'{address}' is not FILE; CELL; …; COLUMN.")
    name, *wanted, column = parts
    file = results / f"{name}.md"
    if not file.is_file():
        raise NotMeasured(f"there is no {name}.md in benchmarks/results.")
    matching = [
        (header, cells)
        for header, heading, cells in rows_of(file)
        if wanted == cells[: len(wanted)]
        or (wanted[0] in heading and wanted[1:] == cells[: len(wanted) - 1])
    ]
    if len(matching) != 1:
        raise NotMeasured(
            f"{name}.md has {len(matching)} rows that begin with {'; '.join(wanted)}."
        )
    header, cells = matching[0]
    title, _, text = column.partition("#")
    number = int(text or 1)
    places = [i for i, text in enumerate(header) if text == title]
    if len(places) < number:
        raise NotMeasured(
            f"{name}.md has no column '{column}' there; it has: {', '.join(header)}."
        )
    cell = cells[places[number - 1]]
    if not cell:
        raise NotMeasured(
            f"{name}.md has nothing in '{column}' of {'; '.join(wanted)}."
        )
    return cell


def failing(names: list[str], results: Path = RESULTS) -> list[str]:
    """Checks that failed, each after the name of its file if there are several.

    Raises:
        NotMeasured: no such file.
    """
    out = []
    for name in names:
        file = results / f"{name}.json"
        if not file.is_file():
            raise NotMeasured(f"there is no {name}.json in benchmarks/results.")
        checks = json.loads(file.read_text(encoding="utf-8"))["checks"]
        prefix = f"{name}: " if len(names) > 1 else ""
        out += [f"{prefix}{text}" for text, holds in checks.items() if not holds]
    return out


class Measured(SphinxRole):
    """One number of a results file."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        self.env.note_dependency(
            str(RESULTS / f"{self.text.partition(';')[0].strip()}.md")
        )
        try:
            return [nodes.Text(measured(self.text))], []
        except NotMeasured as error:
            message = self.inliner.reporter.error(
                f"not measured: {error}", line=self.lineno
            )
            problem = self.inliner.problematic(self.rawtext, self.rawtext, message)
            return [problem], [message]


class Failing(Directive):
    """The failed checks of results files."""

    required_arguments, optional_arguments = 1, 100

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        for name in self.arguments:
            env.note_dependency(str(RESULTS / f"{name}.json"))
        try:
            found = failing(self.arguments)
        except NotMeasured as error:
            raise self.error(f"not measured: {error}") from error
        if not found:
            return [nodes.paragraph(text="All checks held.")]
        items = [nodes.list_item("", nodes.paragraph(text=text)) for text in found]
        return [nodes.bullet_list("", *items)]


def setup(app: Any) -> dict[str, Any]:
    """Add the role and the directive."""
    app.add_role("measured", Measured())
    app.add_directive("failing", Failing)
    return {"parallel_read_safe": True}
