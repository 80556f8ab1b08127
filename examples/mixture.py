"""A mixture: points in the left bar OR in the right one, three times as often in the
left.

The bars are two diffusion models trained apart. An energy is learned up to a constant,
so weights would mean nothing; models of the zoo come with their normalisers, and then
they are shares. (For a model of your own see calibration.py.)

    python examples/mixture.py
    composeprob run examples/mixture.py
"""

from pathlib import Path

import jax

import composeprob as cp

left, right = cp.load("bar2d-left"), cp.load("bar2d-right")


@cp.program
def mixture(left, right):
    return cp.sample("x", cp.mixture([left, right], weights=[0.75, 0.25]))


def main(num_chains=2000, out="out"):
    density = cp.compile(mixture, left, right)
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())

    centres = [[-0.5, 0.0], [0.5, 0.0]]
    shares = cp.metrics.mode_weights(result["x"], centres, result.log_weights)
    print(f"share in the left bar  {shares[0]:.3f} (should be 0.75)")
    print(f"share in the right bar {shares[1]:.3f}")

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "mixture.png"))
    return result


if __name__ == "__main__":
    main()
