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
from composeprob.plotting import new_figure, plot_images

DATA = Path(__file__).parents[1] / "tests" / "pretrained" / "data"
model = cp.from_diffusers(DATA / "sd")
# For chains that cost minutes; cp.SMC() is exact, and needs many chains.
sampler = cp.Ancestral()
num_chains = 4


def guided(model, prompt, scale=7.5):
    return cp.guide(model, scale, prompt=prompt)


@cp.program
def one(model, prompt):
    return cp.sample("x", guided(model, prompt))


@cp.program
def both(model):
    """AND. Each guided factor contains the model, which must be there only once."""
    left = guided(model, "a cat on the left")
    right = guided(model, "a dog on the right")
    return cp.sample("x", left * right / model)


@cp.program
def without(model):
    """NOT: divided by the quotient of the second prompt."""
    dog = model.given(prompt="the dog") / model
    return cp.sample("x", guided(model, "a cat") / dog**2.0)


@cp.program
def wide(model, prompts=("a cat", "a tree", "a dog")):
    """A tapestry: windows that overlap by half, each with its prompt.

    Every entry counts once.
    """
    height, width, channels = model.event_shape
    canvas = (height, width * (len(prompts) + 1) // 2, channels)
    windows = []
    for i, prompt in enumerate(prompts):
        corner = (0, i * width // 2)
        windows.append(cp.window(guided(model, prompt), canvas, corner))
    return cp.sample("x", cp.tapestry(*windows))


def either(
    model,
    key,
    schedule,
    prompts=("a cat", "the dog"),
    shares=(0.5, 0.5),
    num_chains=num_chains,
):
    """OR. `cp.mixture` needs log-densities, which such models lack.

    The chains are divided among the prompts instead.
    """
    counts = np.diff(np.round(np.cumsum((0.0, *shares)) * num_chains)).astype(int)
    pictures = []
    for prompt, count in zip(prompts, counts, strict=True):
        if count == 0:
            continue
        density = cp.compile(one, model, prompt=prompt, schedule=schedule)
        result = cp.infer(density, key, num_chains=int(count), sampler=sampler)
        pictures.append(result.images())
    return np.concatenate(pictures)


def main(folder=None, num_chains=num_chains, levels=20, out="out"):
    loaded = model if folder is None else cp.from_diffusers(folder)
    key = jax.random.key(0)
    schedule = loaded.schedule.every(max(1, loaded.schedule.num_levels // levels))
    pictures = {"or": either(loaded, key, schedule, num_chains=num_chains)}
    for name, program in {"not": without, "tapestry": wide, "and": both}.items():
        density = cp.compile(program, loaded, schedule=schedule)
        result = cp.infer(density, key, num_chains=num_chains, sampler=sampler)
        pictures[name] = result.images()
    Path(out).mkdir(parents=True, exist_ok=True)
    figure = new_figure(10, 3)
    for axis, (name, images) in zip(
        figure.subplots(1, 4), pictures.items(), strict=True
    ):
        plot_images(axis, images, name)
    figure.savefig(Path(out, "text_to_image.png"))
    np.savez(Path(out, "text_to_image.npz"), **pictures)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:2])
