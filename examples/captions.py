"""Logic of captions: a red object on the left AND (a blue OR a green one on the right)
AND NOT a triangle.

The model knows scenes given a caption of ONE of their objects. A quotient p(x |
caption)/p(x) is what the caption says; quotients multiply for AND, their numerators are
mixed for OR, and a quotient divides for NOT.

    python examples/captions.py
    composeprob run examples/captions.py
"""

from pathlib import Path

import jax

import composeprob as cp

scenes = cp.load("shapes-caption")
num_chains = 16
sampler = cp.AnnealedMCMC(
    cp.MALA(lambda levels: 0.08 * levels.sigma**2),
    steps_per_level=1,
    reverse_step=cp.ReverseStep(order=1, control="none"),
)


@cp.program
def scene(scenes, strength=6.0):
    red = scenes.given(caption="a red object on the left")
    blue = scenes.given(caption="a blue object on the right")
    green = scenes.given(caption="a green object on the right")
    triangle = scenes.given(caption="a triangle")
    # The model was trained to classify captions, so their densities are on one scale,
    # and log-weights 0, 0 are even odds.
    other = cp.mixture([blue, green], log_weights=[0, 0])
    quotient = (red / scenes) * (other / scenes) / (triangle / scenes)
    return cp.sample("x", scenes * quotient**strength)


def main(num_chains=num_chains, out="out"):
    density = cp.compile(scene, scenes)
    print(density)
    result = cp.infer(
        density, jax.random.key(0), num_chains=num_chains, sampler=sampler
    )
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "captions.png"))
    return result


if __name__ == "__main__":
    main()
