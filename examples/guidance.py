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

CENTERS, WIDTH = jnp.array([[-0.3, 0.0], [0.3, 0.0]]), 0.3
BOTH = (
    -1
)  # the condition that means "no condition", as in training with dropout of the class


def energy(x, log_snr, label=BOTH):
    """E(x) = −σ·log p(x | label) of the noised classes: what a trained energy network
    would approximate."""
    alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
    variance = (alpha * WIDTH) ** 2 + sigma**2
    log_class = -jnp.sum((x - alpha * CENTERS) ** 2, -1) / (2 * variance) - jnp.log(
        2 * jnp.pi * variance
    )
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
        print(
            f"scale {scale}: mean x {x.mean():+.3f}, share on the other class's side {(x < 0).mean():.3f}"
        )
    print(
        density
    )  # one network, two conditions: the compiler evaluates them as one batch
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "guidance.png"))
    return result


if __name__ == "__main__":
    main()
