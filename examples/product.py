"""A product: points that lie on the ring AND in the bar.

Two diffusion models, trained apart on a ring of eight Gaussians and on an upright bar,
are multiplied. Only the two modes of the ring that lie in the bar should survive, top
and bottom, with equal weight.

    python examples/product.py
    composeprob run examples/product.py
"""

from pathlib import Path

import jax

import composeprob as cp

ring, bar = cp.load("ring2d"), cp.load("bar2d")


@cp.program
def product(ring, bar):
    return cp.sample("x", ring * bar)


def main(num_chains=2000, out="out"):
    density = cp.compile(product, ring, bar)
    print(density)  # the program as mathematics, and what the compiler did

    # Without a sampler=, infer chooses by the factors' capabilities; the summary names
    # its choice and the reason.
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())

    centres = [[0.0, 0.5], [0.0, -0.5]]
    shares = cp.metrics.mode_weights(result["x"], centres, result.log_weights)
    print(f"share at the top {shares[0]:.3f}, at the bottom {shares[1]:.3f}")

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "product.png"))
    return result


if __name__ == "__main__":
    main()
