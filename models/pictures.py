"""Pictures of a trained model's card: the loss of every step, and its samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from jax import Array

from composeprob.compiler.pipeline import lowered
from composeprob.events import is_image
from composeprob.factors.diffusion import Diffusion
from composeprob.language.decorator import single
from composeprob.plotting import PALETTE, SIZES, new_figure, plot_images, style
from composeprob.runtime.infer import infer
from composeprob.samplers.sampler import Ancestral
from composeprob.training.loop import TrainingRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_pictures(folder: Path, run: TrainingRun, key: Array) -> list[Path]:
    """Write ``training.png`` and, for a diffusion of images, ``samples.png``.

    Samples are of reverse diffusion of the model alone. Returns the files.
    """
    training = folder / "training.png"
    with style():
        figure = new_figure(4.2, 2.4)
        _plot_loss(figure, run.loss)
    _save(figure, training)
    factor = run.factor
    if not isinstance(factor, Diffusion) or not is_image(factor.event_shape):
        return [training]
    if not set(factor.traits.conditions) <= set(factor.call_conditions()):
        return [training]  # Without its conditions such a model has no samples.
    images = infer(
        lowered(single, (factor,), {}, networks=False),
        key,
        num_chains=SIZES.images,
        sampler=Ancestral(),
        progress=False,
    )["x"]
    with style():
        figure = new_figure(3.4, 3.4)
        plot_images(figure.subplots(), images)
    samples = folder / "samples.png"
    _save(figure, samples)
    return [training, samples]


def _plot_loss(figure: Figure, loss: np.ndarray) -> None:
    """Plot the loss of each step, and its means over 150 parts of the training."""
    ax = figure.subplots()
    parts = np.array_split(loss, min(150, len(loss)))
    ends = np.cumsum([len(part) for part in parts])
    means = [part.mean() for part in parts]
    steps = np.arange(1, len(loss) + 1)
    ax.plot(steps, loss, color=PALETTE.faint, linewidth=0.3)
    ax.plot(ends, means, color=PALETTE.accent, linewidth=1.2)
    ax.set(xlabel="step", ylabel="loss", yscale="log", title="training")
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
