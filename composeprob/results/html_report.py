"""A result as HTML: a file that says what a run sampled, how well, and what to do next,
and what a notebook shows."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from importlib import resources

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from composeprob import tuning
from composeprob.results.geometry import is_image
from composeprob.results.plotting import (
    diagnostics,
    new_figure,
    plot_levels,
    plot_result,
    plot_site,
    style,
)
from composeprob.results.record import Record
from composeprob.results.summary import Summary, cell


def html(result: Record) -> str:
    """Returns the page."""
    css = (
        resources.files("composeprob.results")
        .joinpath("report.css")
        .read_text(encoding="utf-8")
    )
    name, summary = (
        "a run" if result.density is None else result.density.graph.name,
        Summary.of_result(result),
    )
    # what belongs to single levels is drawn
    facts = _facts(
        summary.facts,
        "chains",
        "ancestors",
        "Pareto k̂",
        "draws",
        "R̂",
        "curl",
        "non-finite",
    )
    sections = [
        _verdict(result),
        _program(result, _facts(summary.facts, "levels", "sampler", "why")),
        _section("Estimates", _estimates(result, summary) + facts),
        _samples(result),
        _levels(result),
        _cost(result),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>{escape(name)}</title><style>{css}</style></head><body><main>"
        f"<h1>{len(result.log_weights):,} samples of {escape(name)}</h1>{''.join(sections)}</main></body></html>\n"
    )


def display(result: Record) -> str:
    """Returns what `Result` is displayed as."""
    name = "" if result.density is None else f" of {escape(result.density.graph.name)}"
    summary = Summary.of_result(result)
    parts = [
        f"<div><b>{len(result.log_weights):,} samples{name}</b></div>",
        _verdict(result),
        png(plot_result(result, "overview"), f"samples{name}", dpi=75),
        _estimates(result, summary) + _facts(summary.facts),
    ]
    if result.density is not None:
        parts.append(
            f"<details><summary>the program</summary>{result.density._repr_html_()}</details>"
        )
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


def _verdict(result: Record) -> str:
    """What was found, and what to try; or how to make the errors smaller."""
    if result.status.ok:
        text = (
            f"<p>{escape(result.status.message)} The errors below are those of sampling; four times the chains halve "
            "them. What is wrong with a model is not in them, and neither is a mode that no chain has found: compare "
            "two runs under different keys, <code>result.compare(other)</code>.</p>"
        )
        return _section("Status: ok", text, "verdict")
    items = "".join(
        f"<li><b>{code}</b>: {escape(text)}</li>"
        for code, text in result.status.findings
    )
    withheld = (
        "Standard errors are withheld: they would mislead."
        if result.status.withholds
        else ""
    )
    count = len(result.status.findings)
    title = f"Status: {count} finding{'s' * (count > 1)}, the gravest first"
    return _section(title, f"<ul>{items}</ul><p>{withheld}</p>", "verdict bad")


def _program(result: Record, facts: str) -> str:
    if result.density is None:
        return _section(
            "What was sampled", facts + _note("The program is not in the file.")
        )
    text = (
        f"<div class='scroll'><pre>{escape(result.density.described.text)}</pre></div>"
    )
    graph = f"<div class='scroll graph'>{result.density.graph._repr_html_()}</div>"
    return _section("What was sampled", text + graph + facts)


def _note(text: str) -> str:
    return f"<p class='note'>{escape(text)}</p>"


def _estimates(result: Record, summary: Summary) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("", "mean", "±", "90 % interval", "sd", "5 %", "50 %", "95 %")
    )
    rows = []
    for label, (mean, error, *others) in summary.rows.items():
        rows.append(_row(label, mean, error, summary.intervals[label], others))
    if result.log_evidence is not None:
        error = (
            math.nan if result.log_evidence_error is None else result.log_evidence_error
        )
        rows.append(
            _row(
                "log evidence",
                result.log_evidence,
                error,
                result.log_evidence_interval(),
                [],
            )
        )
    table = f"<div class='scroll'><table class='estimates'><tr>{head}</tr>{''.join(rows)}</table></div>"
    note = "± is the standard error of the mean; the interval holds the exact mean in nine of ten runs. A dash: withheld."
    return table + _note(note)


def _row(
    label: str,
    mean: float,
    error: float,
    ends: tuple[float, float],
    others: list[float],
) -> str:
    interval = "–" if math.isnan(ends[0]) else f"{ends[0]:.4g} … {ends[1]:.4g}"
    cells = [cell(mean), cell(error), interval, *map(cell, others)]
    return (
        f"<tr><th>{escape(label)}</th>"
        + "".join(f"<td>{text}</td>" for text in cells)
        + "</tr>"
    )


def _samples(result: Record) -> str:
    panels = []
    for name, values in result.unweighted(most=tuning.SUMMARY.most_numbers).items():
        kind = "pictures" if is_image(values.shape[1:]) else "chart"
        with style():
            figure = new_figure(4.4, 3.6)
            plot_site(figure.subplots(), name, values, result.density)
            image = png(
                figure, f"samples of {escape(name)}", 140, kind, transparent=True
            )
        panels.append(f"<figure>{image}</figure>")
    return _section("Samples", f"<div class='panels'>{''.join(panels)}</div>")


def _levels(result: Record) -> str:
    if not diagnostics(result):
        return ""
    with style():
        drawn = png(
            plot_levels(result),
            "diagnostics by level",
            140,
            "wide chart",
            transparent=True,
        )
    return _section("Diagnostics by level", f"<figure>{drawn}</figure>")


def _cost(result: Record) -> str:
    total = result.evaluations * len(result.log_weights)
    pairs = {
        "evaluations": f"{result.evaluations:,} of the composed density per chain, {total:,} in all",
        "time": f"{result.about.seconds:.2f} s, compilation included",
        "devices": f"{result.about.devices}",
        "random key": result.about.key or "not recorded",
        "versions": ", ".join(
            f"{name} {version}" for name, version in result.about.versions.items()
        )
        or "not recorded",
    }
    shape = {
        name: f"samples {np.shape(values)}" for name, values in result.samples.items()
    }
    return _section("Cost, and how to repeat it", _facts(pairs | shape))


def png(
    figure: Figure, alt: str, dpi: int, kind: str = "", transparent: bool = False
) -> str:
    """Returns a figure as an image inside of the page; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, transparent=transparent)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    look = (
        f"class='{kind}'" if kind else "style='max-width:100%'"
    )  # of a class the page's own style speaks
    return f"<img {look} alt='{alt}' src='data:image/png;base64,{data}'>"
