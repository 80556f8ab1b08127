"""Two scales on one canvas: a triangle wider than a window of the model, and small
shapes around it.

A window with scale 5 sees averages of 5×5 pixels, so that what the model draws there is
five times as large. It leaves open how pixels differ within these blocks; a narrow
Gaussian, divided by what it says of the averages, says that they hardly do. Windows of
scale 1 lie around it and overlap with one another and with the large one.

    python examples/two_scales.py
    composeprob run examples/two_scales.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

SIZE, SCALE, OVERLAP, ROUGHNESS = 32, 5, 10, 0.05
LARGE = SIZE * SCALE
EDGE = SIZE - OVERLAP
CANVAS = (LARGE + 2 * EDGE, LARGE + 2 * EDGE, 3)
STARTS = [round(start) for start in np.linspace(0, CANVAS[0] - SIZE, 7)]
AROUND = [(y, x) for y in STARTS for x in STARTS if {y, x} & {STARTS[0], STARTS[-1]}]

scenes = cp.load("shapes-caption")
# The large window is evaluated at a log-SNR higher by 2·log 5, up to the 8 that the
# model was trained for.
schedule = cp.Schedule.log_snr(60, -7.0, 4.75)
num_chains = 1
# Averages of 25 pixels have 25 times less variance, and set the pace.
sampler = cp.AnnealedMCMC(
    cp.MALA(lambda levels: 0.004 * levels.sigma**2),
    steps_per_level=1,
    reverse_step=cp.ReverseStep(order=1, control="none"),
)


def smooth():
    """N(pixels; 0, v) / N(averages; 0, v/25), a law of differences within blocks.

    It leaves the blocks' averages free.
    """
    of_pixels = dist.Normal(jnp.zeros((LARGE, LARGE, 3)), ROUGHNESS)
    of_averages = dist.Normal(jnp.zeros((SIZE, SIZE, 3)), ROUGHNESS / SCALE)
    corner = (EDGE, EDGE)
    pixels = cp.window(cp.Analytic(of_pixels, schedule), CANVAS, corner)
    averages = cp.window(
        cp.Analytic(of_averages, schedule), CANVAS, corner, scale=SCALE
    )
    return pixels / averages


@cp.program
def canvas(scenes, caption="a yellow triangle in the middle", strength=6.0):
    guided = cp.guide(scenes, strength, caption=caption)
    large = cp.window(guided, CANVAS, (EDGE, EDGE), scale=SCALE)
    small = [cp.window(scenes, CANVAS, offset) for offset in AROUND]
    return cp.sample("x", cp.tapestry(large, *small) * smooth())


def main(num_chains=num_chains, out="out"):
    density = cp.compile(canvas, scenes, schedule=schedule)
    print(density.sites["x"])
    result = cp.infer(
        density, jax.random.key(0), num_chains=num_chains, sampler=sampler
    )
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "two_scales.png"))
    return result


if __name__ == "__main__":
    main()
