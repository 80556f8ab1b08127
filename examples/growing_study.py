"""A study that grows: subjects join one after the other, and the posterior goes on from
the chains that are there, in place of a new run.

The weights of the chains are multiplied by the likelihood of the new subjects. Nothing
moves until few chains count, as for the last subject, which lies far off: its datum
comes in by powers. Exact means, by quadrature, stand beside those of the chains.

    python examples/growing_study.py
    composeprob run examples/growing_study.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist

import composeprob as cp

NUMBERS = (4, 6, 9, 10)
NOISE = 0.5
data = np.array([0.8, 1.7, 0.4, 1.2, 2.1, 0.9, 0.1, 1.5, 1.3, 4.5])


@cp.program
def study(ys):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("subjects", len(ys)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, NOISE), obs=ys)


def exact(ys):
    """Posterior means of mu and tau, by a grid of both."""
    mu, tau = np.meshgrid(np.linspace(-4, 6, 401), np.linspace(0.005, 5, 500))
    variance = tau**2 + NOISE**2
    log_density = -(mu**2) / 8 - tau**2 / 2
    for y in ys:
        log_density -= 0.5 * (y - mu) ** 2 / variance + 0.5 * np.log(variance)
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    return float(np.sum(weights * mu)), float(np.sum(weights * tau))


def main(num_chains=1000, out="out"):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    first = cp.compile(study, jnp.asarray(data[: NUMBERS[0]]))
    result = cp.infer(first, jax.random.key(0), num_chains=num_chains)
    means = []
    bands = []
    for number in NUMBERS:
        if number > NUMBERS[0]:
            spent = result.evaluations
            density = cp.compile(study, jnp.asarray(data[:number]))
            result = result.extend(density, jax.random.key(number))
            print(f"{number} subjects, {result.evaluations - spent} evaluations more")
        samples = result.unweighted()
        both = np.stack([samples["mu"], samples["tau"]])
        means.append(both.mean(axis=1))
        bands.append(np.quantile(both, [0.05, 0.95], axis=1))
    print(result.reason)
    print(result.summary())

    exactly = [exact(data[:number]) for number in NUMBERS]
    for i, name in enumerate(("μ", "τ")):
        low, high = np.array(bands)[:, :, i].T
        axes[i].fill_between(NUMBERS, low, high, alpha=0.3, label="90 %")
        axes[i].plot(NUMBERS, np.array(means)[:, i], "o-", label="mean")
        axes[i].plot(NUMBERS, np.array(exactly)[:, i], "k_", ms=14, label="exact mean")
        axes[i].set(xlabel="subjects", ylabel=name, xticks=NUMBERS)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "growing_study.png"))
    return result


if __name__ == "__main__":
    main()
