"""A power: the same density sharper or flatter, f(x)^w.

w > 1 is a lower temperature (typical points become more typical), w < 1 a higher one.
Two modes with shares 0.8 and 0.2 and equal widths have, under the power w, shares in
the ratio 0.8^w : 0.2^w, and a width divided by √w.

    python examples/power.py
    composeprob run examples/power.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import composeprob as cp

schedule = cp.Schedule.log_snr(60)
centers = jnp.array([[-0.5, 0.0], [0.5, 0.0]])
modes = cp.Analytic(
    dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.8, 0.2])), dist.Normal(centers, 0.1).to_event(1)
    ),
    schedule,
)


@cp.program
def power(modes, w=2.0):
    return cp.sample("x", modes**w)


def main(num_chains=2000, out="out"):
    for w in (
        0.5,
        2.0,
    ):  # the same program with another number: nothing is compiled again
        result = cp.infer(
            cp.compile(power, modes, w), jax.random.key(0), num_chains=num_chains
        )
        share = cp.metrics.mode_weights(result["x"], centers, result.log_weights)[0]
        width = result.unweighted()["x"][:, 1].std()
        print(
            f"w = {w:3}: share of the left mode {share:.3f} (exact {0.8**w / (0.8**w + 0.2**w):.3f}), "
            f"width {width:.3f} (exact {0.1 / w**0.5:.3f})"
        )
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "power.png"))
    return result


if __name__ == "__main__":
    main()
