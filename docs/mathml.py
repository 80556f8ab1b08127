r"""Formulas as MathML, made of TeX when the site is built.

Pages need no script and no network to show them: browsers draw MathML themselves, and
screen readers read it out.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert


def mathml(tex: str, display: str) -> str:
    """Return a `<math>` element, with its TeX as alternative text."""
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
    """A formula on a line of its own, which scrolls if it is too wide."""
    formula = mathml(node.astext(), "block")
    box = '<div class="math" tabindex="0" role="math">'
    writer.body.append(f"{box}{formula}</div>\n")
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Offer the renderer that `html_math_renderer` names."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
