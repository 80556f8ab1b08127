"""A result as HTML: a page with the samples of a run, their quality and what to do
next, and a shorter one for notebooks."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from composeprob import tuning
from composeprob.events import is_image
from composeprob.plotting.figures import (
    diagnostics,
    new_figure,
    plot_levels,
    plot_result,
    plot_site,
    style,
)
from composeprob.text import cell

if TYPE_CHECKING:
    from composeprob.core import Result, Summary

TITLES = ("mean", "±", "90 % interval", "sd", "5 %", "50 %", "95 %")
TITLES_OF_TOKENS = (
    "token",
    "share",
    "±",
    "90 % interval",
    "next",
    "its share",
    "entropy",
)


def report(result: Result) -> str:
    """Return the page."""
    style_sheet = resources.files("composeprob.plotting").joinpath("report.css")
    css = style_sheet.read_text(encoding="utf-8")
    name = "a run" if result.density is None else result.density.graph.name
    summary = result.summary()
    # Facts of single levels are left out: they are drawn.
    of_samples = ("chains", "ancestors", "Pareto k̂", "draws", "R̂", "curl", "non-finite")
    estimates = _estimates(result, summary) + _facts(summary.facts, *of_samples)
    sections = [
        _verdict(result),
        _program(result, _facts(summary.facts, "levels", "sampler", "why")),
        _section("Estimates", estimates),
        _samples(result),
        _levels(result),
        _cost(result),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"
        f"<title>{escape(name)}</title><style>{css}</style></head><body><main>"
        f"<h1>{len(result.log_weights):,} samples of {escape(name)}</h1>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def display(result: Result) -> str:
    """Return the display of a `Result` in a notebook."""
    name = "" if result.density is None else f" of {escape(result.density.graph.name)}"
    summary = result.summary()
    parts = [
        f"<div><b>{len(result.log_weights):,} samples{name}</b></div>",
        _verdict(result),
        png(plot_result(result, "overview"), f"samples{name}", dpi=75),
        _estimates(result, summary) + _facts(summary.facts),
    ]
    if result.density is not None:
        program = result.density._repr_html_()
        parts.append(f"<details><summary>the program</summary>{program}</details>")
    return f"<div>{''.join(parts)}</div>"


def _section(title: str, body: str, kind: str = "") -> str:
    return f"<section class='{kind}'><h2>{escape(title)}</h2>{body}</section>"


def _facts(pairs: dict[str, str], *names: str) -> str:
    """A table of all facts, or of those with these names."""
    shown = {name: pairs[name] for name in names or pairs if name in pairs}
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
        for name, text in shown.items()
    )
    return f"<table class='facts'>{rows}</table>"


def _verdict(result: Result) -> str:
    """The findings with their remedies; for a run without findings, a way to make the
    errors smaller."""
    if result.status.ok:
        text = (
            f"<p>{escape(result.status.message)} The errors below are those of "
            "sampling; four times the chains halve them. They do not include errors of "
            "the model, nor a mode that no chain has found: compare two runs under "
            "different keys, <code>result.compare(other)</code>.</p>"
        )
        return _section("Status: ok", text, "verdict")
    items = "".join(
        f"<li><b>{code}</b>: {escape(text)}</li>"
        for code, text in result.status.findings
    )
    withheld = ""
    if result.status.withholds:
        withheld = "Standard errors are withheld: they would mislead."
    count = len(result.status.findings)
    title = f"Status: {count} finding{'s' * (count > 1)}, the gravest first"
    return _section(title, f"<ul>{items}</ul><p>{withheld}</p>", "verdict bad")


def _program(result: Result, facts: str) -> str:
    """The program as text and graph, with facts of how it was sampled."""
    title = "What was sampled"
    if result.density is None:
        return _section(title, facts + _note("The program is not in the file."))
    text = (
        f"<div class='scroll'><pre>{escape(result.density.described.text)}</pre></div>"
    )
    graph = f"<div class='scroll graph'>{result.density.graph._repr_html_()}</div>"
    return _section(title, text + graph + facts)


def _note(text: str) -> str:
    return f"<p class='note'>{escape(text)}</p>"


def _estimates(result: Result, summary: Summary) -> str:
    """The tables of means with errors and intervals, of the shares of tokens, and of
    the log-evidence."""
    rows = []
    for label, (mean, error, *others) in summary.rows.items():
        rows.append(_row(label, mean, error, summary.intervals[label], others))
    evidence = result.log_evidence
    if evidence is not None:
        error = math.nan
        if result.log_evidence_error is not None:
            error = result.log_evidence_error
        ends = result.log_evidence_interval()
        rows.append(_row("log evidence", evidence, error, ends, []))
    tables = ""
    if summary.tokens:
        tables = _table(TITLES_OF_TOKENS, _rows_of_tokens(summary))
    if rows:
        tables += _table(TITLES, rows)
    note = (
        "± is the standard error of the mean; the interval holds the exact mean in "
        "nine of ten runs. A dash: withheld."
    )
    return tables + _note(note)


def _table(titles: tuple[str, ...], rows: list[str]) -> str:
    """A table of rows under titles, the first column without one."""
    head = "".join(f"<th>{title}</th>" for title in ("", *titles))
    return (
        f"<div class='scroll'><table class='estimates'><tr>{head}</tr>"
        f"{''.join(rows)}</table></div>"
    )


def _rows_of_tokens(summary: Summary) -> list[str]:
    """The rows of the table of tokens."""
    rows = []
    for label, shares in summary.tokens.items():
        token, share, error, *others = shares.cells
        cells = [token, share, error, _interval(shares.interval), *others]
        columns = "".join(f"<td>{text}</td>" for text in cells)
        rows.append(f"<tr><th>{escape(label)}</th>{columns}</tr>")
    return rows


def _interval(ends: tuple[float, float]) -> str:
    """An interval's text; a dash where it is withheld."""
    return "–" if math.isnan(ends[0]) else f"{ends[0]:.4g} … {ends[1]:.4g}"


def _row(
    label: str,
    mean: float,
    error: float,
    ends: tuple[float, float],
    others: list[float],
) -> str:
    """One row of the table; ``others`` are the columns after the interval."""
    cells = [cell(mean), cell(error), _interval(ends), *map(cell, others)]
    columns = "".join(f"<td>{text}</td>" for text in cells)
    return f"<tr><th>{escape(label)}</th>{columns}</tr>"


def _samples(result: Result) -> str:
    """A panel for each site."""
    panels = []
    for name, values in result.unweighted(most=tuning.SUMMARY.most_numbers).items():
        kind = "pictures" if is_image(values.shape[1:]) else "chart"
        alt = f"samples of {escape(name)}"
        # Transparent, as the page may be dark; a white image would glare.
        with style():
            figure = new_figure(4.4, 3.6)
            plot_site(figure.subplots(), name, values, result.density)
            image = png(figure, alt, 140, kind, transparent=True)
        panels.append(f"<figure>{image}</figure>")
    return _section("Samples", f"<div class='panels'>{''.join(panels)}</div>")


def _levels(result: Result) -> str:
    """A panel for each diagnostic; empty without any."""
    if not diagnostics(result):
        return ""
    alt = "diagnostics by level"
    with style():
        image = png(plot_levels(result), alt, 140, "wide chart", transparent=True)
    return _section("Diagnostics by level", f"<figure>{image}</figure>")


def _cost(result: Result) -> str:
    """Evaluations, time and devices; and the key and versions with which the run can be
    repeated."""
    of_chain = result.evaluations
    total = of_chain * len(result.log_weights)
    versions = ", ".join(
        f"{name} {version}" for name, version in result.about.versions.items()
    )
    pairs = {
        "evaluations": f"{of_chain:,} of the composed density per chain, {total:,} in "
        "all",
        "time": f"{result.about.seconds:.2f} s, compilation included",
        "devices": f"{result.about.devices}",
        "random key": result.about.key or "not recorded",
        "versions": versions or "not recorded",
    }
    for name, values in result.samples.items():
        pairs[name] = f"samples {np.shape(values)}"
    return _section("Cost, and how to repeat it", _facts(pairs))


def png(
    figure: Figure, alt: str, dpi: int, kind: str = "", transparent: bool = False
) -> str:
    """Return a figure as an image inside of the page; close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, transparent=transparent)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    # The page's style sheet has rules for classes.
    look = f"class='{kind}'" if kind else "style='max-width:100%'"
    return f"<img {look} alt='{alt}' src='data:image/png;base64,{data}'>"
