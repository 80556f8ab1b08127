"""A result as HTML: a file that says what a run sampled, how well, and what to do next, and what a notebook shows."""

from __future__ import annotations

import base64
import io
import math
import os
from html import escape
from importlib import resources
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from composeprob import tuning
from composeprob.arguments import check_path
from composeprob.results.estimates import Estimate
from composeprob.results.estimation import Estimating
from composeprob.results.images import is_image
from composeprob.results.plotting import new_figure, plot_result, plot_site, style
from composeprob.results.summary import Summary

ABOUT = {
    "program": ("levels", "sampler", "why"),
    "samples": ("chains", "ancestors", "Pareto k̂", "draws", "R̂", "curl", "non-finite"),
}
"""Facts of the summary that are told in words, by section; what belongs to single levels is drawn."""


def write(result: Estimating, path: str | os.PathLike) -> Path:
    """See `Result.report`."""
    path = check_path(path, "The path of a report", "run.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(result), encoding="utf-8")
    return path


def html(result: Estimating) -> str:
    """Returns the page."""
    css = resources.files("composeprob.results").joinpath("report.css").read_text(encoding="utf-8")
    name = "a run" if result.density is None else result.density.graph.name
    sections = [
        _verdict(result),
        _program(result),
        _estimates(result),
        _samples(result),
        _levels(result),
        _cost(result),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>{escape(name)}</title><style>{css}</style></head><body><main>"
        f"<h1>{result.num_chains:,} samples of {escape(name)}</h1>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str, kind: str = "") -> str:
    return f"<section class='{kind}'><h2>{escape(title)}</h2>{body}</section>"


def _facts(pairs: dict[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in pairs.items())
    return f"<table class='facts'>{rows}</table>"


def _numbers(result: Estimating, section: str) -> dict[str, str]:
    facts = Summary.of_result(result).facts
    return {name: facts[name] for name in ABOUT[section] if name in facts}


def _verdict(result: Estimating) -> str:
    """What was found, and what to try; or how to make the errors smaller."""
    if result.status.ok:
        text = (
            "<p>No problem was found. The errors below are those of sampling; four times the chains halve them. What "
            "is wrong with a model is not in them, and neither is a mode that no chain has found: compare two runs "
            "under different keys, <code>result.compare(other)</code>.</p>"
        )
        return _section("Status: ok", text, "verdict")
    items = "".join(f"<li><b>{code}</b>: {escape(text)}</li>" for code, text in result.status.findings)
    withheld = "Standard errors are withheld: they would mislead." if result.status.withholds else ""
    count = len(result.status.findings)
    title = f"Status: {count} finding{'s' * (count > 1)}, the gravest first"
    return _section(title, f"<ul>{items}</ul><p>{withheld}</p>", "verdict bad")


def _program(result: Estimating) -> str:
    if result.density is None:
        return _section(
            "What was sampled", _facts(_numbers(result, "program")) + _note("The program is not in the file.")
        )
    text = f"<div class='scroll'><pre>{escape(result.density.described.text)}</pre></div>"
    graph = f"<div class='scroll graph'>{result.density.graph._repr_html_()}</div>"
    return _section("What was sampled", text + graph + _facts(_numbers(result, "program")))


def _note(text: str) -> str:
    return f"<p class='note'>{escape(text)}</p>"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _estimates(result: Estimating) -> str:
    summary = Summary.of_result(result)
    head = "".join(f"<th>{name}</th>" for name in ("", "mean", "±", "90 % interval", "sd", "5 %", "50 %", "95 %"))
    rows = []
    degrees = max(result.families.effective - 1, 1.0)
    for label, (mean, error, *others) in summary.rows.items():
        rows.append(_row(label, Estimate(mean, error, degrees), others))
    if result.log_evidence is not None:
        error = math.nan if result.log_evidence_error is None else result.log_evidence_error
        rows.append(_row("log evidence", Estimate(result.log_evidence, error), []))
    table = f"<div class='scroll'><table class='estimates'><tr>{head}</tr>{''.join(rows)}</table></div>"
    note = (
        "± is the standard error of the mean; the interval holds the exact mean in nine of ten runs. A dash: withheld."
    )
    return _section("Estimates", table + _note(note) + _facts(_numbers(result, "samples")))


def _row(label: str, estimate: Estimate, others: list[float]) -> str:
    low, high = estimate.interval(0.9)
    interval = "–" if math.isnan(low) else f"{low:.4g} … {high:.4g}"
    cells = [_number(estimate.value), _number(estimate.error), interval, *map(_number, others)]
    return f"<tr><th>{escape(label)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _samples(result: Estimating) -> str:
    panels = []
    for name, values in result.unweighted(most=tuning.SUMMARY.most_numbers).items():
        kind = "pictures" if is_image(values.shape[1:]) else "chart"
        with style():
            figure = new_figure(4.4, 3.6)
            plot_site(figure.subplots(), name, values, result.density)
            image = png(figure, f"samples of {escape(name)}", 140, kind, transparent=True)
        panels.append(f"<figure>{image}</figure>")
    return _section("Samples", f"<div class='panels'>{''.join(panels)}</div>")


def _levels(result: Estimating) -> str:
    drawn = curves(result)
    if not drawn:
        return ""
    panels = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in drawn.items())
    note = "From the noisiest level, on the left, to level 0, by log-SNR."
    return _section("Diagnostics by level", f"<div class='panels'>{panels}</div>{_note(note)}")


def _cost(result: Estimating) -> str:
    total = result.evaluations * result.num_chains
    pairs = {
        "evaluations": f"{result.evaluations:,} of the composed density per chain, {total:,} in all",
        "time": f"{result.seconds:.2f} s, compilation included",
        "devices": f"{result.devices}",
        "random key": result.key or "not recorded",
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()) or "not recorded",
    }
    shape = {name: f"samples {np.shape(values)}" for name, values in result.samples.items()}
    return _section("Cost, and how to repeat it", _facts(pairs | shape))


def display(result: Estimating) -> str:
    """Returns what `Result` is displayed as."""
    name = "" if result.density is None else f" of {escape(result.density.graph.name)}"
    parts = [
        f"<div><b>{result.num_chains:,} samples{name}</b></div>",
        findings(result),
        png(plot_result(result, "overview"), f"samples{name}", dpi=75),
        Summary.of_result(result)._repr_html_(),
    ]
    if result.density is not None:
        parts.append(f"<details><summary>the program</summary>{result.density._repr_html_()}</details>")
    return f"<div>{''.join(parts)}</div>"


def findings(result: Estimating) -> str:
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


def curves(result: Estimating) -> dict[str, str]:
    """Returns ``{title: SVG}``, one for everything that the sampler has by level."""
    blocks = f" (a line each: {', '.join(result.blocks)})" if result.blocks else ""
    shares, n = (0.0, 1.0), result.num_chains
    drawn = {
        f"acceptance{blocks}": (result.acceptance, shares, False),
        f"step size{blocks}": (result.step_size, None, True),
        "effective sample size, share of chains": (result.ess, shares, False),
        "first chains that have descendants": (result.ancestors, (0.0, float(n)), False),
        "proposals that were not finite": (_where(result.non_finite), None, False),
    }
    known = {title: what for title, what in drawn.items() if np.isfinite(np.asarray(what[0], float)).any()}
    return {title: curve(result.log_snr, values, limits, log) for title, (values, limits, log) in known.items()}


def _where(counts: np.ndarray) -> np.ndarray:
    """Counts, as they are worth a drawing: only where there are any."""
    return np.where(np.nansum(counts) > 0, counts, np.nan)


def curve(x: np.ndarray, values: np.ndarray | None, limits: tuple[float, float] | None, log: bool) -> str:
    """Draws columns of numbers over x, (K,) or (K, B), noisy on the left.

    Args:
        x: log-SNR, (K,).
        values: what is drawn.
        limits: of the vertical axis; those of the values where left out.
        log: whether the axis is logarithmic.
    """
    columns = np.asarray(values, float).reshape(len(x), -1)
    columns = np.where(columns > 0, columns, np.nan) if log else columns
    finite = columns[np.isfinite(columns)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0.0, 1.0))
    scaled, low_, high_ = (np.log10(columns), math.log10(low), math.log10(high)) if log else (columns, low, high)
    if high_ <= low_:
        low_, high_ = low_ - 0.5, high_ + 0.5
    width, height, margin_left, margin_right, margin_top, margin_bottom = 320, 170, 58, 8, 10, 26
    span = float(np.ptp(x)) or 1.0
    across = margin_left + (np.asarray(x, float) - np.min(x)) / span * (width - margin_left - margin_right)
    down = margin_top + (high_ - scaled) / (high_ - low_) * (height - margin_top - margin_bottom)
    lines = []
    for column in down.T:
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, column, strict=True) if math.isfinite(b))
        lines.append(f"<polyline points='{points}'/>")
    floor = height - margin_bottom
    texts = [
        (margin_left - 6, margin_top + 4, "end", f"{high:.3g}"),
        (margin_left - 6, floor + 4, "end", f"{low:.3g}"),
        (margin_left, height - 8, "start", f"log-SNR {np.min(x):.3g}"),
        (width - margin_right, height - 8, "end", f"{np.max(x):.3g}"),
    ]
    labels = "".join(f"<text x='{a}' y='{b}' text-anchor='{c}'>{escape(t)}</text>" for a, b, c, t in texts)
    axis = f"<path class='axis' d='M{margin_left} {margin_top}V{floor}H{width - margin_right}'/>"
    return f"<svg class='curve' viewBox='0 0 {width} {height}' role='img'>{axis}{''.join(lines)}{labels}</svg>"
