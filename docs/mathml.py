r"""Formulas as MathML, made of TeX when the site is built: pages need no script and no
network to show them.

Browsers draw MathML themselves, and screen readers read it out.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert


def mathml(tex: str, display: str) -> str:
    """One `<math>` element, which keeps its TeX as the text for those who cannot draw
    it."""
    converted = convert(tex.strip(), display=display)
    label = (
        " ".join(tex.split())
        .replace("&", "&amp;")
        .replace('"', "&quot;")
        .replace("<", "&lt;")
    )
    return converted.replace("<math ", f'<math alttext="{label}" ', 1)


def visit_math(writer: Any, node: nodes.math) -> None:
    """A formula in a line of text."""
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_math_block(writer: Any, node: nodes.math_block) -> None:
    """A formula on a line of its own; one that is too wide for the screen is
    scrolled."""
    writer.body.append(
        f'<div class="math" tabindex="0" role="math">{mathml(node.astext(), "block")}</div>\n'
    )
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Offer the renderer that `html_math_renderer` names."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
