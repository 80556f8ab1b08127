"""Text to image with any diffusers folder: prompts under AND, OR and NOT, and a wide
picture of three prompts.

Without an argument a tiny network with random weights runs, whose pictures are noise:
it shows that the parts fit. Any text-to-image folder (Stable Diffusion 1, 2, XL), or
its name on the hub, takes its place:

    python examples/text_to_image.py
    python examples/text_to_image.py FOLDER
    composeprob run examples/text_to_image.py:both --model FOLDER
"""

import sys
from pathlib import Path

import jax
import numpy as np

import composeprob as cp
from composeprob.results.plotting import new_figure, plot_images

model = cp.from_diffusers(
    Path(__file__).parents[1] / "tests" / "pretrained" / "data" / "sd"
)
sampler = (
    cp.Ancestral()
)  # where a chain costs minutes; cp.SMC() is exact, and wants many chains
num_chains = 4


def said(model, prompt, scale=7.5):
    return cp.guide(model, scale, prompt=prompt)


@cp.program
def one(model, prompt):
    return cp.sample("x", said(model, prompt))


@cp.program
def both(model):
    """AND. Each guided factor has the model once, so the product has it once too
    often."""
    return cp.sample(
        "x",
        said(model, "a cat on the left") * said(model, "a dog on the right") / model,
    )


@cp.program
def without(model):
    """NOT: less of what the second prompt adds to the model."""
    return cp.sample(
        "x", said(model, "a cat") / (model.given(prompt="the dog") / model) ** 2.0
    )


@cp.program
def wide(model, prompts=("a cat", "a tree", "a dog")):
    """A tapestry: windows that overlap by half, each with its prompt, every entry
    counted once."""
    height, width, channels = model.event_shape
    canvas = (height, width * (len(prompts) + 1) // 2, channels)
    windows = [
        cp.window(said(model, p), canvas, (0, i * width // 2))
        for i, p in enumerate(prompts)
    ]
    return cp.sample("x", cp.tapestry(*windows))


def either(
    model,
    key,
    schedule,
    prompts=("a cat", "the dog"),
    shares=(0.5, 0.5),
    num_chains=num_chains,
):
    """OR. `cp.mixture` needs log-densities, which such models do not have: the chains
    are shared out instead."""
    counts = np.diff(np.round(np.cumsum((0.0, *shares)) * num_chains)).astype(int)
    densities = [
        cp.compile(one, model, prompt=prompt, schedule=schedule) for prompt in prompts
    ]
    runs = [
        cp.infer(d, key, num_chains=int(n), sampler=sampler)
        for d, n in zip(densities, counts, strict=True)
        if n
    ]
    return np.concatenate([run.images() for run in runs])


def main(folder=None, num_chains=num_chains, levels=20, out="out"):
    loaded, key = (
        model if folder is None else cp.from_diffusers(folder),
        jax.random.key(0),
    )
    schedule = loaded.schedule.every(max(1, loaded.schedule.num_levels // levels))
    pictures = {"or": either(loaded, key, schedule, num_chains=num_chains)}
    for name, program in {"not": without, "tapestry": wide, "and": both}.items():
        result = cp.infer(
            cp.compile(program, loaded, schedule=schedule),
            key,
            num_chains=num_chains,
            sampler=sampler,
        )
        pictures[name] = result.images()
    Path(out).mkdir(parents=True, exist_ok=True)
    for axis, (name, images) in zip(
        new_figure(10, 3).subplots(1, 4), pictures.items(), strict=True
    ):
        plot_images(axis, images, name)
    axis.figure.savefig(Path(out, "text_to_image.png"))
    np.savez(Path(out, "text_to_image.npz"), **pictures)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:2])
