"""A classifier steers a model that knows no classes: f(x)·p(label | x)^s, Bayes' rule
at s = 1.

The model is of handwritten digits as such, the classifier was trained on noised images.
With s = 1 samples are as likely of the digit as the classifier says; a greater s keeps
clear of what could be taken for another. One image in a hundred is bright all over: the
network has such a mode of its own (its card says so), which s = 8 makes more of.

    python examples/digits.py
    composeprob run examples/digits.py
"""

from pathlib import Path

import jax
import numpy as np

import composeprob as cp

digits, classifier = cp.load("digits"), cp.load("digits-classifier")
num_chains = 200
sampler = cp.AnnealedMCMC(
    cp.MALA(cp.Adaptive()),
    steps_per_level=1,
    reverse_step=cp.ReverseStep(order=1, control="none"),
)


@cp.program
def digit(digits, classifier, label=3, scale=1.0):
    return cp.sample("x", cp.condition(digits, classifier, label, scale))


def surely(images, label):
    """Share of images with this label by the classifier, at the cleanest level."""
    logits = jax.vmap(lambda x: classifier.logits(x, classifier.schedule.at(0)))(images)
    return float(np.mean(np.argmax(logits, -1) == label))


def main(num_chains=num_chains, out="out"):
    for scale in (1.0, 8.0):
        density = cp.compile(digit, digits, classifier, scale=scale)
        result = cp.infer(
            density, jax.random.key(0), num_chains=num_chains, sampler=sampler
        )
        share = surely(result["x"], 3)
        print(f"scale {scale:g}: {share:.3f} of the images are a 3 to the classifier")
    print(density)
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "digits.png"))
    return result


if __name__ == "__main__":
    main()
