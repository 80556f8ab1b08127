"""OR with stated shares: two images in ten are a 3, the others are an 8.

The model is of digits given their class. Each class has a normaliser of its own, which
the zoo stores: with it the weights of the mixture are shares.

    python examples/two_digits.py
    composeprob run examples/two_digits.py
"""

from pathlib import Path

import jax
import numpy as np

import composeprob as cp

three, eight = cp.load("digits", label=3), cp.load("digits", label=8)
num_chains = 1000


@cp.program
def two_digits(three, eight, share=0.2):
    return cp.sample("x", cp.mixture([three, eight], weights=[share, 1 - share]))


def share_of_three(images, log_weights):
    """The weight of images that are more like a 3 than an 8 to a classifier."""
    classifier = cp.load("digits-classifier")
    logits = jax.vmap(lambda x: classifier.logits(x, classifier.schedule.at(0)))(images)
    weights = np.exp(log_weights - log_weights.max())
    return float(np.average(logits[:, 3] > logits[:, 8], weights=weights))


def main(num_chains=num_chains, out="out"):
    density = cp.compile(two_digits, three, eight)
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())
    share = share_of_three(result["x"], result.log_weights)
    print(f"share of threes {share:.3f} (should be 0.2)")

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "two_digits.png"))
    return result


if __name__ == "__main__":
    main()
