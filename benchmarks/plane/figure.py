"""The picture: what each sampler makes of each task, beside the exact law."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from plane.tasks import TASKS, truth
from plane.truth import POINTS

SHOWN = (
    ("Reverse", "cosine"),
    ("ULA 0.001", "cosine"),
    ("MALA 0.001", "cosine"),
    ("U-HMC 0.03 × 3", "cosine"),
    ("HMC 0.03 × 3", "cosine"),
    ("SMC", "even"),
)
"""Columns: sampler and levels."""


def draw(
    samples: dict[tuple[str, str, str], np.ndarray],
    judged: dict[tuple[str, str, str], Any],
    path: Path,
) -> None:
    """One row a task, one column a sampler, over the energy models.

    Args:
        samples: by (task, sampler, levels).
        judged: the rows of the table, likewise.
        path: where to write the PNG.
    """
    tasks = [name for name in TASKS if any(key[0] == name for key in samples)]
    figure, axes = plt.subplots(
        len(tasks),
        1 + len(SHOWN),
        figsize=(2 * (1 + len(SHOWN)), 2.25 * len(tasks)),
        squeeze=False,
    )
    for line, name in zip(axes, tasks, strict=True):
        law = truth(name)
        width = TASKS[name].half_width
        image = law.mass.reshape(POINTS, POINTS)[::5, ::5].T
        line[0].imshow(
            image, origin="lower", extent=(-width, width, -width, width), cmap="Greys"
        )
        line[0].set_ylabel(
            TASKS[name].title.replace(": ", ":\n").replace(" × ", "\n× "), fontsize=8
        )
        for axis, column in zip(line[1:], SHOWN, strict=True):
            x = samples.get((name, *column))
            if x is None:
                axis.axis("off")
                continue
            axis.scatter(*x.T, s=1, lw=0, color="tab:blue")
            row = judged[name, *column]
            axis.text(
                0.03,
                0.02,
                f"TV {row.tv:.3f}, log p {row.log_likelihood:.2f}",
                transform=axis.transAxes,
                fontsize=6,
            )
            axis.set(xlim=(-width, width), ylim=(-width, width), aspect="equal")
        for axis in line:
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("exact law", fontsize=9)
    for axis, (name, levels) in zip(axes[0, 1:], SHOWN, strict=True):
        axis.set_title(f"{name}\n{levels} levels", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
