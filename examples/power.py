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
    # The same program with another number: nothing is compiled again.
    for w in (0.5, 2.0):
        density = cp.compile(power, modes, w)
        result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
        share = cp.metrics.mode_weights(result["x"], centers, result.log_weights)[0]
        width = result.unweighted()["x"][:, 1].std()
        exact_share = 0.8**w / (0.8**w + 0.2**w)
        exact_width = 0.1 / w**0.5
        print(f"w = {w}")
        print(f"  share of the left mode {share:.3f} (exact {exact_share:.3f})")
        print(f"  width {width:.3f} (exact {exact_width:.3f})")
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "power.png"))
    return result


if __name__ == "__main__":
    main()
