"""Three objects share a learned prior, a gain and a noise: what one object tells of the
gain, the others profit from.

Each object's place has the zoo's `ring2d` as its prior. An instrument of unknown gain
and noise measures each three times. Everything is inferred together: the places by one
kernel, gain and noise by another.

    python examples/hierarchy.py
    composeprob run examples/hierarchy.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

OBJECTS, GAIN, NOISE = 3, 1.6, 0.25  # the truth
angle = np.arange(8) * np.pi / 4
# The modes that ring2d was trained on, with deviation 0.075.
modes = 0.5 * np.stack([np.cos(angle), np.sin(angle)], -1)

rng = np.random.default_rng(0)
chosen = modes[rng.choice(8, OBJECTS, replace=False)]
places = chosen + 0.075 * rng.normal(size=(OBJECTS, 2))
noise = NOISE * rng.normal(size=(OBJECTS, 3, 2))
readings = jnp.asarray(GAIN * places[:, None] + noise, jnp.float32)


@cp.program
def hierarchy(prior, readings=readings):
    gain = cp.sample("gain", dist.LogNormal(0.0, 0.5))
    noise = cp.sample("noise", dist.LogNormal(jnp.log(0.3), 0.5))
    for j in range(OBJECTS):
        x = cp.sample(f"x{j}", prior)
        cp.observe(f"y{j}", dist.Normal(gain * x, noise).to_event(1), readings[j])


def exact():
    """(Mean, sd) of log gain and of log noise, by quadrature.

    The prior is the one that ring2d was trained on.
    """
    gains = np.exp(np.linspace(-2, 2, 161))
    noises = np.exp(np.log(0.3) + np.linspace(-2, 2, 121))
    mean = np.asarray(readings).mean(1)
    around = ((np.asarray(readings) - mean[:, None]) ** 2).sum()
    away = mean[:, None] - gains[:, None, None, None] * modes
    spread = (gains[:, None] * 0.075) ** 2 + noises**2 / 3
    distance2 = (away**2).sum(-1)[:, None] / spread[..., None, None]
    fits = np.exp(-0.5 * distance2).mean(-1) / spread[..., None]
    log_weight = np.log(fits).sum(-1)
    log_weight -= 0.5 * around / noises**2 + 4 * OBJECTS * np.log(noises)
    log_weight -= 2 * np.log(gains)[:, None] ** 2 + 2 * np.log(noises / 0.3) ** 2
    weight = np.exp(log_weight - log_weight.max())
    of_gain = moments(weight.sum(1), np.log(gains))
    of_noise = moments(weight.sum(0), np.log(noises))
    return [of_gain, of_noise]


def moments(weight, values):
    """Mean and standard deviation of weighted values."""
    mean = weight @ values / weight.sum()
    variance = weight @ (values - mean) ** 2 / weight.sum()
    return mean, float(np.sqrt(variance))


def main(num_chains=1000, out="out"):
    density = cp.compile(hierarchy, cp.load("ring2d"))
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())
    draws = result.unweighted()
    for name, (mean, sd) in zip(("gain", "noise"), exact(), strict=True):
        log = np.log(draws[name])
        sampled = f"{log.mean():.3f} ± {log.std():.3f}"
        print(f"log {name}: {sampled}, by quadrature {mean:.3f} ± {sd:.3f}")

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for j in range(OBJECTS):
        axes[0].scatter(*draws[f"x{j}"].T, s=2, alpha=0.3, color=f"C{j}")
        x, y = np.asarray(readings[j]).T / GAIN
        label = f"readings {j} / gain"
        axes[0].scatter(x, y, marker="x", color=f"C{j}", label=label)
        axes[0].scatter(*places[j], marker="*", s=120, color=f"C{j}", edgecolor="k")
    axes[0].set(aspect="equal", xlim=(-0.8, 0.8), ylim=(-0.8, 0.8))
    axes[0].set_title("places (stars: the truth)")
    axes[0].legend(fontsize=8, loc="upper left")
    axes[1].scatter(draws["gain"], draws["noise"], s=3, alpha=0.5)
    axes[1].plot(GAIN, NOISE, "k*", markersize=12)
    axes[1].set(xlabel="gain", ylabel="noise", title="what they share")
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "hierarchy.png"))
    return result


if __name__ == "__main__":
    main()
