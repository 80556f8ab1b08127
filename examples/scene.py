"""Scenes from parts: objects at several places, p(x)·Πᵢ (p(x | placeᵢ)/p(x))^w, from
one model of scenes.

The model knows scenes given the centre of ONE of their objects. Dividing by the model
without a condition leaves what the place says, so a product of such quotients asks for
an object at every place. MALA corrects reverse diffusion.

    python examples/scene.py
    composeprob run examples/scene.py
"""

from pathlib import Path

import jax

import composeprob as cp

# (x, y) in image widths, from the upper left corner.
PLACES = ((0.25, 0.3), (0.7, 0.25), (0.55, 0.75))
scenes = cp.load("shapes-position")
num_chains = 16
sampler = cp.AnnealedMCMC(
    cp.MALA(lambda levels: 0.08 * levels.sigma**2),
    steps_per_level=1,
    reverse_step=cp.ReverseStep(order=1, control="none"),
)


@cp.program
def scene(scenes, places=PLACES, strength=2.0):
    objects = [(scenes.given(position=place) / scenes) ** strength for place in places]
    return cp.sample("x", cp.product(scenes, *objects))


def main(num_chains=num_chains, out="out"):
    density = cp.compile(scene, scenes)
    # One network under four conditions: the compiler evaluates them as one batch.
    print(density)
    result = cp.infer(
        density, jax.random.key(0), num_chains=num_chains, sampler=sampler
    )
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "scene.png"))
    return result


if __name__ == "__main__":
    main()
