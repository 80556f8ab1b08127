"""Guidance: a condition, and more of it than the model would give, f(x | c)^s ·
f(x)^(1−s).

A conditional diffusion model of two overlapping classes, written in closed form so that
nothing needs training: class 0 lies on the left, class 1 on the right. With s = 1
samples follow the class; with s > 1 they keep clear of the other.

    python examples/guidance.py
    composeprob run examples/guidance.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp

import composeprob as cp

CENTERS = jnp.array([[-0.3, 0.0], [0.3, 0.0]])
WIDTH = 0.3
# The condition for "no condition", as in training with dropout of the class.
BOTH = -1


def energy(x, log_snr, label=BOTH):
    """E(x) = −σ·log p(x | label) of the noised classes.

    A trained energy network would approximate it.
    """
    alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
    sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
    variance = (alpha * WIDTH) ** 2 + sigma**2
    distance2 = jnp.sum((x - alpha * CENTERS) ** 2, -1)
    log_class = -distance2 / (2 * variance) - jnp.log(2 * jnp.pi * variance)
    both = jax.nn.logsumexp(log_class) - jnp.log(2.0)
    return -sigma * jnp.where(label == BOTH, both, log_class[label])


schedule = cp.Schedule.log_snr(60)
classes = cp.Diffusion(
    energy,
    schedule,
    event_shape=(2,),
    parameterization="energy",
    time="log_snr",
    conditions={"label": BOTH},
)


@cp.program
def guidance(classes, scale=3.0):
    return cp.sample("x", cp.guide(classes, scale, label=1))


def main(num_chains=2000, out="out"):
    for scale in (1.0, 3.0):
        density = cp.compile(guidance, classes, scale)
        result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
        x = result.unweighted()["x"][:, 0]
        wrong = (x < 0).mean()
        print(f"scale {scale}: mean x {x.mean():+.3f}, {wrong:.3f} on the other side")
    # One network, two conditions: the compiler evaluates them as one batch.
    print(density)
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "guidance.png"))
    return result


if __name__ == "__main__":
    main()
