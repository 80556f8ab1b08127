"""Pictures for a trained model's card: the loss of every step, and images that it
makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from jax import Array

from composeprob.compiler.pipeline import lowered
from composeprob.factors.diffusion import Diffusion
from composeprob.language.decorator import single
from composeprob.results.geometry import is_image
from composeprob.results.plotting import PALETTE, SIZES, new_figure, plot_images, style
from composeprob.runtime.infer import infer
from composeprob.samplers.sampler import Ancestral
from composeprob.training.loop import TrainingRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_pictures(folder: Path, run: TrainingRun, key: Array) -> list[Path]:
    """Writes ``training.png`` and, for a diffusion of images, ``samples.png``, by
    reverse diffusion of the model alone.

    Returns:
        The files.
    """
    written = [folder / "training.png"]
    with style():
        figure = new_figure(4.2, 2.4)
        ax = figure.subplots()
        parts = np.array_split(run.loss, min(150, len(run.loss)))
        ends = np.cumsum([len(part) for part in parts])
        ax.plot(
            np.arange(1, len(run.loss) + 1),
            run.loss,
            color=PALETTE.faint,
            linewidth=0.3,
        )
        ax.plot(
            ends, [part.mean() for part in parts], color=PALETTE.accent, linewidth=1.2
        )
        ax.set(xlabel="step", ylabel="loss", yscale="log", title="training")
        ax.spines[["top", "right"]].set_visible(False)
    _save(figure, written[0])
    factor = run.factor
    if (
        isinstance(factor, Diffusion)
        and is_image(factor.event_shape)
        and _complete(factor)
    ):
        drawn = infer(
            lowered(single, (factor,), {}, networks=False),
            key,
            num_chains=SIZES.images,
            sampler=Ancestral(),
            progress=False,
        )
        with style():
            figure = new_figure(3.4, 3.4)
            plot_images(figure.subplots(), drawn["x"])
        written.append(folder / "samples.png")
        _save(figure, written[-1])
    return written


def _complete(factor: Diffusion) -> bool:
    """Whether the model can be sampled without conditions."""
    return set(factor.traits.conditions) <= set(factor.call_conditions())


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
