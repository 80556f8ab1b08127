"""A tapestry: a canvas of 96×96 pixels under 16 overlapping windows, each with a
caption of its own.

The model knows scenes of 32×32. `cp.window` lets it see a part of the canvas, and
`cp.tapestry` multiplies windows so that every pixel counts once, however many windows
see it. All windows are one batch to the compiler.

    python examples/tapestry.py
    composeprob run examples/tapestry.py
"""

from pathlib import Path

import jax

import composeprob as cp

CANVAS = (96, 96, 3)
STARTS = (0, 21, 43, 64)
CAPTIONS = """
    red circle     green square     blue triangle   yellow circle
    cyan triangle  magenta circle   red square      green triangle
    blue square    yellow triangle  cyan circle     magenta square
    green circle   red triangle     yellow square   blue circle
"""
scenes = cp.load("shapes-caption")
num_chains = 2
# A canvas has nine times the pixels of a scene, so that steps are half as long.
sampler = cp.AnnealedMCMC(
    cp.MALA(lambda levels: 0.035 * levels.sigma**2),
    steps_per_level=1,
    reverse_step=cp.ReverseStep(order=1, control="none"),
)


@cp.program
def canvas(scenes, captions=CAPTIONS, strength=6.0):
    words = captions.split()
    corners = [(y, x) for y in STARTS for x in STARTS]
    windows = []
    for colour, shape, corner in zip(words[::2], words[1::2], corners, strict=True):
        caption = f"a {colour} {shape} in the middle"
        factor = cp.guide(scenes, strength, caption=caption)
        windows.append(cp.window(factor, CANVAS, corner))
    return cp.sample("x", cp.tapestry(*windows))


def main(num_chains=num_chains, out="out"):
    density = cp.compile(canvas, scenes)
    print(density.sites["x"])
    result = cp.infer(
        density, jax.random.key(0), num_chains=num_chains, sampler=sampler
    )
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "tapestry.png"))
    return result


if __name__ == "__main__":
    main()
