"""A mixture of energies by shares: points of a learned bar, or four times as often of a
spot beside it.

An energy that was learned by matching scores has an unknown constant at each noise
level. `cp.calibrate` finds it: by quadrature in two dimensions, by sequential Monte
Carlo in more. Models of the zoo bring theirs along, as the bar here; the spot's energy
is 5 nats too high until it is calibrated.

    python examples/calibration.py
    composeprob run examples/calibration.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import composeprob as cp

schedule = cp.Schedule.log_snr(40)
centre = jnp.array([1.2, 0.0])


def energy(x, log_snr):
    """A Gaussian at the right of the bar: E = −σ·log f, with f too large by e⁵."""
    alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
    sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
    variance = 0.01 * alpha**2 + sigma**2
    distance2 = jnp.sum((x - alpha * centre) ** 2)
    return sigma * (0.5 * distance2 / variance - 5.0)


raw = cp.Diffusion(
    energy, schedule, event_shape=(2,), parameterization="energy", time="log_snr"
)
spot = cp.calibrate(raw, jax.random.key(0))
bar = cp.load("bar2d")


@cp.program
def mixture(spot, bar):
    return cp.sample("x", cp.mixture([spot, bar], weights=[0.8, 0.2]))


def main(num_chains=2000, out="out"):
    print(spot)  # log Z and its error
    print(bar)
    density = cp.compile(mixture, spot, bar)
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())

    centres = [np.asarray(centre), [0.0, 0.0]]
    shares = cp.metrics.mode_weights(result["x"], centres, result.log_weights)
    print(f"share of the spot {shares[0]:.3f} (should be 0.8)")
    print(f"share of the bar  {shares[1]:.3f}")

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "calibration.png"))
    return result


if __name__ == "__main__":
    main()
