"""Two sources in one picture: y = a + b + noise, where a is a handwritten 3 and b a 7;
what were they?

Each source has a prior of its own, a diffusion model given its class. `cp.observe`
looks at their sum; the posterior is of both at once, so that every pixel of each has an
error bar, and where the one is unsure the other is too.

    python examples/separation.py
    composeprob run examples/separation.py
"""

from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

import composeprob as cp
from composeprob.models.worlds import digits

LABELS, NOISE = (3, 7), 0.2
three, seven = (cp.load("digits", label=label) for label in LABELS)
num_chains = 200
# Independent chains.
sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive()), steps_per_level=5, reverse_step=True)

images, labels = digits.held_out(jax.random.key(4), 100)  # no model learned from these
truth = {
    name: np.asarray(images[int(np.argmax(labels == label))])
    for name, label in zip("ab", LABELS, strict=True)
}
mixed = (
    truth["a"]
    + truth["b"]
    + NOISE * np.random.default_rng(0).normal(size=(8, 8, 1)).astype(np.float32)
)


@cp.program
def separation(three, seven, mixed=mixed):
    a = cp.sample("a", three)
    b = cp.sample("b", seven)
    cp.observe("y", dist.Normal(a + b, NOISE), mixed)


def main(num_chains=num_chains, out="out"):
    density = cp.compile(separation, three, seven)
    print(density)
    result = cp.infer(
        density, jax.random.key(0), num_chains=num_chains, sampler=sampler
    )
    print(result.summary())

    figure, axes = plt.subplots(2, 4, figsize=(8, 4), layout="constrained")
    axes[0, 0].set_title("a + b + noise")
    axes[0, 0].imshow(mixed[..., 0], cmap="gray_r", vmin=-2, vmax=2)
    axes[1, 0].remove()
    for row, (name, true) in zip(axes, truth.items(), strict=True):
        draws = result.unweighted()[name]
        mean = draws.mean(0)
        spread = draws.std(0)
        error = np.sqrt(np.mean((mean - true) ** 2))
        error_of_half = np.sqrt(np.mean((mixed / 2 - true) ** 2))
        expected = np.sqrt(np.mean(spread**2))
        low, high = np.quantile(draws, [0.05, 0.95], axis=0)
        inside = np.mean((low <= true) & (true <= high))
        print(f"{name}: error of a pixel {error:.2f}, {expected:.2f} expected")
        print(f"   error of y/2 {error_of_half:.2f}")
        print(f"   {inside:.2f} of the pixels are in their 90 % intervals")
        shown = {
            f"{name}, truth": (true, -1),
            f"{name}, posterior mean": (mean, -1),
            "its ±": (spread, 0),
        }
        for axis, (title, (image, low)) in zip(row[1:], shown.items(), strict=True):
            axis.set_title(title)
            axis.imshow(image[..., 0], cmap="gray_r", vmin=low, vmax=1)
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[])
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "separation.png"))
    return result


if __name__ == "__main__":
    main()
