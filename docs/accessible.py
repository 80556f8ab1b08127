"""Additions to the theme for those who use a keyboard or a screen reader."""

from __future__ import annotations

import re
from typing import Any

PARAMETERS = re.compile(r"<dl>\s*((?:<dd>.*?</dd>\s*)+)</dl>", re.DOTALL)
"""A signature over several lines, to Sphinx a list of empty definitions."""


def _reach(
    app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Make output and wide tables, which scroll sideways, reachable by keyboard."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )
    if "body" in context:
        body = context["body"].replace("<pre>", '<pre tabindex="0">')
        body = PARAMETERS.sub(_lines, body)
        context["body"] = body.replace(
            '<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'
        )


def _lines(match: re.Match[str]) -> str:
    """Return the lines of a signature as spans."""
    opened = match[1].replace("<dd>", '<span class="sig-line">')
    return opened.replace("</dd>", "</span>")


def setup(app: Any) -> dict[str, Any]:
    """Connect the additions, after the page is written."""
    app.connect("html-page-context", _reach, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
