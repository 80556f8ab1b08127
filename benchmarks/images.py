"""Image models: placed objects, captions, tapestries, guided digits, mixtures, shares.

The shares are those of mixtures of classes under a measurement.

    python -m benchmarks images [--only TEXT] [--scenes 100] [--strength 2] [--chains
    100] [--canvases 8]

Cells are run one by one and kept in benchmarks/results/images.json: what is there is
not run again, so that the same command goes on where it was stopped, and `--only
"placed objects=3"` runs the cells whose names begin so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pictures import captioned, guided, placed, shares, tapestries, told
from pictures.cells import Cell, Kept, as_text
from report import RESULTS, publish

from composeprob.models.worlds import shapes
from composeprob.plotting import new_figure, plot_images, style

FILE = "images"
IMAGES = Path("out") / "bench-images"
COLUMNS = ["part", "what", "sampler", "share (95 %)", "also", "seconds"]
PICTURES: dict[str, Callable[[dict[str, Any]], bool]] = {
    FILE: lambda c: (
        c["part"] == "placed"
        and (c["form"], c["w"]) == ("energy", 2.0)
        and c["objects"] in LEAST
        and c["sampler"] in DRAWN
    ),
    f"{FILE}-captions": lambda c: (
        c["part"] in ("captions", "tapestry") and c["sampler"] in ("reverse", "MALA")
    ),
    f"{FILE}-digits": lambda c: c["part"] in ("guided", "mixed"),
}
"""Files of pictures, and the cells that they show."""
DRAWN = ("reverse", "MALA", "HMC", "SMC")
"""Samplers whose scenes are shown."""
JUDGED = ("MALA", "HMC")
LEAST = {1: 0.95, 3: 0.85, 5: 0.70}
"""Shares of scenes with all objects in their places that MALA or HMC must reach."""
SHARE_OF = {
    "placed": "all_placed",
    "captions": "satisfied",
    "tapestry": "satisfied",
    "guided": "recognised",
    "mixed": "first",
    "shares": "first",
}
"""Names of the shares that the cells of each part are about."""

NOTES = """\
Places are those of true scenes, the same for every sampler; one chain a scene (SMC: 8
chains, one of them judged). An object counts as placed within two pixels. "energy" is
the model; "score" is the same model's score without its energy: MALA and HMC then test
moves by a line integral, and SMC makes no MALA step between its reverse steps; the
other samplers use only the score. Captions: each formula is made from a true scene and
describes its objects by colour, shape and place; "by chance" is its share among true
scenes.

Told: at each log-SNR, the share of noised true scenes that a true caption fits better
than the same caption with one word replaced; 0.5 is guessing. Each of these cells has
300 scenes, less those for which both captions are true. Tapestry: 16 windows a canvas,
each asked for one object in its middle; a seam of 1 means that there is none. Digits:
as many images of each of ten classes, judged by a support-vector machine that is right
on 0.987 of real images; the Fréchet distance is between its ten decision values, and is
{floor:.3g} between the two halves of the real images. Intervals are exact for
independent trials; SMC's chains are not quite independent.

Shares: "thin" is a measured mean of the pixels of {ink:g} ± {error:g}; images of each
class alone give the judge's share of 3 among images of a 3 or an 8. Samplers drew in
{runs} runs of {chains} chains; the interval of "SMC", which `cp.infer` chooses by
default, is from the spread of these runs. Placed by "default": the choice of `cp.infer`
for 8 chains, which are independent; one of a scene is judged. Cells with other numbers
of scenes than 100, or another w than 2, were run with `--scenes` and `--strength`.
Seconds are of a machine that was busy with other work."""


def row(cell: dict[str, Any]) -> list[str]:
    """A line of the table."""
    if cell["part"] == "placed":
        what = f"{of(cell)}, {cell['form']}"
        also = (
            f"each {cell['each_placed']:.3f}, found {cell['found']:.2f}, "
            f"{cell['scenes']} scenes"
        )
        seconds = f"{cell['seconds_a_scene']} a scene"
        return [
            "placed",
            what,
            cell["sampler"],
            as_text(cell["all_placed"]),
            also,
            seconds,
        ]
    if cell["part"] == "captions":
        what = f"{cell['formula']}, w = {cell['w']:g}"
        also = f"by chance {cell['chance']:.3f}, {cell['scenes']} scenes"
        return [
            "captions",
            what,
            cell["sampler"],
            as_text(cell["satisfied"]),
            also,
            f"{cell['seconds_a_scene']} a scene",
        ]
    if cell["part"] == "told":
        shown = ", ".join(
            f"{found['share']:.2f} at {name}"
            for name, found in cell["by_log_snr"].items()
        )
        what = f"a true caption from one of wrong {cell['wrong']}"
        return ["told", what, "", shown, f"{cell['scenes']} scenes", ""]
    if cell["part"] == "tapestry":
        what = f"counted {cell['counted']}, w = {cell['w']:g}"
        also = f"seam {cell['seam']:.2f}, {cell['canvases']} canvases of 16 windows"
        seconds = f"{cell['seconds_a_canvas']} a canvas"
        return [
            "tapestry",
            what,
            cell["sampler"],
            as_text(cell["satisfied"]),
            also,
            seconds,
        ]
    if cell["part"] == "guided":
        what = f"{cell['by']}, scale {cell['scale']:g}"
        also = f"Fréchet distance {cell['distance']:.3g}, {cell['images']} images"
        return [
            "guided",
            what,
            cell["sampler"],
            as_text(cell["recognised"]),
            also,
            f"{cell['seconds']}",
        ]
    if cell["part"] == "shares":
        what = f"3 (0.2) or 8 (0.8), {cell['ink']}"
        also = f"{cell['images']} images, {cell['evaluations']} evaluations"
        if cell["sampler"] == shares.ALONE:
            also = f"{cell['images']} images of each, {cell['evaluations']} evaluations"
        else:
            findings = [f"found: {name}" for name in cell["findings"]]
            also = ", ".join([f"neither {cell['neither']:.3f}", also, *findings])
        return [
            "shares",
            what,
            cell["sampler"],
            as_text(cell["first"]),
            also,
            f"{cell['seconds']}",
        ]
    what = f"share of the first of {cell['classes']} (0.2)"
    also = f"neither {cell['neither']:.3f}, {cell['images']} images"
    return [
        "mixed",
        what,
        cell["sampler"],
        as_text(cell["first"]),
        also,
        f"{cell['seconds']}",
    ]


def of(cell: dict[str, Any]) -> str:
    """Number of objects that a cell asks for, and the strength of guidance."""
    plural = "s" if cell["objects"] > 1 else ""
    return f"{cell['objects']} object{plural}, w = {cell['w']:g}"


def title(cell: dict[str, Any]) -> str:
    """Title of a panel: the cell, its sampler and its share."""
    share = cell[SHARE_OF[cell["part"]]]["share"]
    return f"{subject(cell)}, {cell['sampler']}: {share:.2f}"


def subject(cell: dict[str, Any]) -> str:
    """The task of a cell, as a panel's title names it."""
    match cell["part"]:
        case "placed":
            return of(cell)
        case "captions":
            return cell["formula"]
        case "tapestry":
            return f"counted {cell['counted']}"
        case "guided":
            return f"{cell['by']}, {cell['scale']:g}"
        case "mixed":
            return cell["classes"]
        case _:
            return cell["ink"]


def pictures(kept: Kept, names: list[str]) -> None:
    """Plot the first images of the cells, one panel a cell.

    A file stays as it is if images of its cells were made on another machine.
    """
    cells = kept.cells
    for file, of_file in PICTURES.items():
        shown = [name for name in names if of_file(cells[name])]
        lacking = [name for name in shown if not kept.images_of(name).exists()]
        if lacking or not shown:
            print(
                f"{file}.png stays as it is: {len(lacking)} of its {len(shown)} cells "
                "were run elsewhere"
            )
            continue
        columns = min(len(shown), 4)
        rows = -(-len(shown) // columns)
        with style():
            figure = new_figure(2.6 * columns, 2.8 * rows)
            axes = figure.subplots(rows, columns, squeeze=False).ravel()
            for ax in axes:
                ax.set_axis_off()
            for ax, name in zip(axes, shown, strict=False):
                images = np.load(kept.images_of(name)).astype(float)
                if images.shape[-1] == 3:
                    images = shapes.to_rgb(images)
                plot_images(ax, images)
                ax.set_title(title(cells[name]), fontsize=8)
        figure.savefig(RESULTS / f"{file}.png", dpi=110)


def checks(found: list[dict[str, Any]]) -> dict[str, bool]:
    """Checks of the cells that were run."""
    return (
        _placed(found)
        | _guided(found)
        | _captioned(found)
        | _told_and_mixed(found)
        | shares.checks(found)
    )


def _placed(found: list[dict[str, Any]]) -> dict[str, bool]:
    """Objects in their places, by MALA or HMC beside reverse diffusion."""
    out = {}
    at = {
        (c["objects"], c["sampler"], c["w"]): c
        for c in found
        if c["part"] == "placed" and c["form"] == "energy"
    }
    for objects, least in LEAST.items():
        best = [
            c["all_placed"]["share"]
            for (k, name, _), c in at.items()
            if k == objects and name in JUDGED
        ]
        if best:
            out[
                f"{objects} objects: MALA or HMC places all in at least {least:g} of "
                "the scenes"
            ] = max(best) >= least
    for (objects, name, w), c in at.items():
        reverse = at.get((objects, "reverse", w))
        if name in JUDGED and reverse is not None:
            text = (
                f"{objects} objects, w = {w:g}: {name} is not worse than reverse "
                "diffusion beyond chance"
            )
            out[text] = c["all_placed"]["interval"][1] >= reverse["all_placed"]["share"]
        tested = at.get((objects, "MALA", w))
        if name == placed.DEFAULT and tested is not None:
            text = (
                f"{objects} objects, w = {w:g}: what cp.infer chooses is not worse "
                "than MALA beyond chance"
            )
            out[text] = c["all_placed"]["interval"][1] >= tested["all_placed"]["share"]
    return out


def _guided(found: list[dict[str, Any]]) -> dict[str, bool]:
    """Digits that are recognised at the best scale of each kind of guidance."""
    out = {}
    guides = [c for c in found if c["part"] == "guided"]
    for kind in dict.fromkeys(c["by"] for c in guides):
        best = max(c["recognised"]["share"] for c in guides if c["by"] == kind)
        out[f"digits, {kind} guidance: at least 0.95 recognised at some scale"] = (
            best >= 0.95
        )
    return out


def _captioned(found: list[dict[str, Any]]) -> dict[str, bool]:
    """Scenes and windows that satisfy their captions."""
    out = {}
    for formula in captioned.FORMULAS:
        best = [
            c["satisfied"]["share"]
            for c in found
            if c["part"] == "captions" and c["formula"] == formula
        ]
        if best:
            out[f"captions, {formula}: at least 0.85 of the scenes satisfy it"] = (
                max(best) >= 0.85
            )
    best = [
        c["satisfied"]["share"]
        for c in found
        if c["part"] == "tapestry" and c["counted"] == "once"
    ]
    if best:
        out["tapestry: at least 0.8 of the windows show what they were asked for"] = (
            max(best) >= 0.8
        )
    return out


def _told_and_mixed(found: list[dict[str, Any]]) -> dict[str, bool]:
    """Captions told from wrong ones, and shares of mixtures of classes."""
    out = {}
    for c in found:
        if c["part"] == "told" and c["wrong"] == told.ALIKE:
            clear = c["by_log_snr"]["6"]["share"]
            out[
                "told: circle and square differ in at least 0.95 of the scenes "
                "without much noise"
            ] = clear >= 0.95
        if c["part"] == "mixed" and c["sampler"] in ("SMC", "MALA"):
            text = (
                f"mixture of {c['classes']}, {c['sampler']}: share within 0.04 of 0.2"
            )
            out[text] = abs(c["first"]["share"] - guided.SHARE) <= 0.04
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        default="",
        help="how the names of the cells to run begin; 'none' runs none",
    )
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--strength", type=float, default=2.0)
    parser.add_argument("--chains", type=int, default=100, help="digits of each class")
    parser.add_argument("--canvases", type=int, default=8, help="tapestries of a cell")
    parser.add_argument(
        "--again", action="store_true", help="run cells that were run before"
    )
    options = parser.parse_args()
    kept = Kept(RESULTS / f"{FILE}.json", IMAGES)
    planned: list[Cell] = [
        *placed.cells(options.scenes, options.strength),
        *told.cells(),
        *captioned.cells(options.scenes),
        *tapestries.cells(options.canvases),
        *guided.cells(options.chains),
        *shares.cells(),
    ]
    for cell in planned:
        if cell.name.startswith(options.only) and (options.again or cell not in kept):
            kept.put(cell, *cell.run())
            print(cell.name, "  ".join(row(kept.cells[cell.name])[3:]), flush=True)
    order = {name: i for i, name in enumerate(cell.name for cell in planned)}
    cells = kept.cells
    names = sorted(cells, key=lambda name: order.get(name, len(order)))
    found = [cells[name] for name in names]
    pictures(kept, names)
    shares.picture(found, RESULTS / f"{FILE}-shares.png")
    details = {"cells": cells}
    ink, error = shares.INK["thin"]
    runs = shares.RUNS
    chains = shares.CHAINS
    notes = NOTES.format(
        floor=guided.floor(), ink=ink, error=error, runs=runs, chains=chains
    )
    table = [row(cell) for cell in found]
    holds = checks(found)
    # Whatever cells were run last, without options the command runs what is missing.
    return publish(
        FILE,
        "Image models",
        COLUMNS,
        table,
        holds,
        details,
        notes,
        made_by="python -m benchmarks images",
    )


if __name__ == "__main__":
    sys.exit(main())
