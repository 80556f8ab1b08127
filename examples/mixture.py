"""A mixture: points in the left bar OR in the right one, three times as often in the left.

Weights of a mixture are shares only if every part integrates to the same, as closed forms do. (Two energies from
networks are calibrated first, see calibration.py.)

    python examples/mixture.py
    composeprob run examples/mixture.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import composeprob as cp

schedule = cp.Schedule.log_snr(60)  # 60 noise levels, evenly spaced in log-SNR
left = cp.Analytic(dist.Uniform(jnp.array([-0.8, -0.9]), jnp.array([-0.4, 0.9])), schedule)
right = cp.Analytic(dist.Uniform(jnp.array([0.4, -0.9]), jnp.array([0.8, 0.9])), schedule)


@cp.program
def mixture(left, right):
    return cp.sample("x", cp.mixture([left, right], weights=[0.75, 0.25]))


def main(num_chains=2000, out="out"):
    density = cp.compile(mixture, left, right)
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())

    shares = cp.metrics.mode_weights(result["x"], [[-0.6, 0.0], [0.6, 0.0]], result.log_weights)
    print(f"share in the left bar {shares[0]:.3f} (should be 0.75), in the right {shares[1]:.3f}")

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "mixture.png"))
    return result


if __name__ == "__main__":
    main()
