"""A negation: points in the box but NOT in the smaller box inside of it.

Two diffusion models, trained apart, are divided: box^1.3 / inner^0.3, the form of Du et
al. (2023). What is negated becomes rarer, here by 256^−0.3: the inner model is 256
times denser in its box than on the floor around it. It should not be thinner than what
it is taken from: where the inner model has fallen to nothing the quotient would
explode, so it was trained with that floor. And the powers must sum to more than zero,
or the noisiest level could not be normalised; the compiler checks that.

    python examples/negation.py
    composeprob run examples/negation.py
"""

from pathlib import Path

import jax
import numpy as np

import composeprob as cp

box, inner = cp.load("box2d"), cp.load("softbox2d")


@cp.program
def negation(box, inner):
    return cp.sample("x", box**1.3 / inner**0.3)


def share_inside(x, log_weights=None):
    """The share of points with |x₁|, |x₂| < 0.3, those in the inner box."""
    weights = None if log_weights is None else np.exp(log_weights)
    return np.average(np.abs(x).max(-1) < 0.3, weights=weights)


def main(num_chains=2000, out="out"):
    density = cp.compile(negation, box, inner)
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())
    share = share_inside(result["x"], result.log_weights)
    print(f"share in the inner box {share:.3f} (exact 0.041; 0.184 in the box)")

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "negation.png"))
    return result


if __name__ == "__main__":
    main()
