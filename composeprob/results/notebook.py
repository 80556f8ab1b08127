"""What a notebook shows of a result: findings, picture, numbers, and the program."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from composeprob.results.result import Result


def html(result: Result) -> str:
    """Returns what `Result` is displayed as."""
    from composeprob.results.figures import plot_result

    name = "" if result.density is None else f" of {escape(result.density.graph.name)}"
    parts = [
        f"<div><b>{result.num_chains:,} samples{name}</b></div>",
        findings(result),
        png(plot_result(result, "overview"), f"samples{name}", dpi=75),
        result.summary()._repr_html_(),
    ]
    if result.density is not None:
        parts.append(f"<details><summary>the program</summary>{result.density._repr_html_()}</details>")
    return f"<div>{''.join(parts)}</div>"


def findings(result: Result) -> str:
    """Returns a list of what was found, with what to try."""
    if result.status.ok:
        return "<div style='border-left:4px solid #2e7d4f;padding-left:8px;margin:6px 0'>No problem was found.</div>"
    items = "".join(f"<li><b>{code}</b>: {escape(text)}</li>" for code, text in result.status.findings)
    return f"<ul style='border-left:4px solid #b5432b;margin:6px 0;padding-left:24px'>{items}</ul>"


def png(figure: Figure, alt: str, dpi: int, kind: str = "", transparent: bool = False) -> str:
    """Returns a figure as an image inside of the page; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, transparent=transparent)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    look = f"class='{kind}'" if kind else "style='max-width:100%'"  # of a class the page's own style speaks
    return f"<img {look} alt='{alt}' src='data:image/png;base64,{data}'>"
