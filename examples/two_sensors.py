"""Two sensors with noises of their own look at one signal: which of them to trust is
found out on the way.

One sensor reads the signal everywhere, the other only every fourth point. Neither says
how noisy it is. The prior is a Gaussian process, so the compiler anneals both
measurements exactly: `print(density)` says so.

    python examples/two_sensors.py
    composeprob run examples/two_sensors.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

N = 32
time = np.arange(N)
covariance = np.exp(-0.5 * ((time[:, None] - time) / 4.0) ** 2) + 1e-3 * np.eye(N)
signal = cp.Analytic(
    dist.MultivariateNormal(jnp.zeros(N), jnp.asarray(covariance)),
    cp.Schedule.log_snr(60),
)
SOME = time[::4]
NOISES = {"everywhere": 0.6, "some": 0.1}  # the truth

rng = np.random.default_rng(3)
truth = rng.multivariate_normal(np.zeros(N), covariance)
everywhere = jnp.asarray(truth + NOISES["everywhere"] * rng.normal(size=N))
some = jnp.asarray(truth[SOME] + NOISES["some"] * rng.normal(size=SOME.size))


@cp.program
def two_sensors(signal, everywhere=everywhere, some=some):
    x = cp.sample("x", signal)
    first = cp.sample("noise_everywhere", dist.HalfNormal(1.0))
    second = cp.sample("noise_some", dist.HalfNormal(1.0))
    cp.observe("everywhere", dist.Normal(x, first), everywhere)
    cp.observe("some", dist.Normal(x[SOME], second), some)


def exact_noises():
    """Posterior means of the two noises, by quadrature.

    Given the noises, the readings are Gaussian.
    """
    grid = np.exp(np.linspace(-4, 1, 40))
    rows = np.concatenate([time, SOME])
    readings = np.concatenate([everywhere, some])
    prior = covariance[np.ix_(rows, rows)]
    log_weight = np.zeros((grid.size, grid.size))
    for i, a in enumerate(grid):
        for j, b in enumerate(grid):
            total = prior + np.diag(np.repeat([a**2, b**2], [N, SOME.size]))
            distance2 = readings @ np.linalg.solve(total, readings)
            fit = distance2 + np.linalg.slogdet(total)[1]
            log_weight[i, j] = -0.5 * (fit + a**2 + b**2) + np.log(a * b)
    weight = np.exp(log_weight - log_weight.max())
    return weight.sum(1) @ grid / weight.sum(), weight.sum(0) @ grid / weight.sum()


def main(num_chains=2000, out="out"):
    density = cp.compile(two_sensors, signal)
    print(density)
    result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
    print(result.summary())
    draws = result.unweighted()
    found = [float(draws[name].mean()) for name in ("noise_everywhere", "noise_some")]
    exact = np.round(exact_noises(), 3)
    print("means of the noises", np.round(found, 3), "exactly", exact)

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.set(xlabel="time", ylabel="signal")
    low, middle, high = np.quantile(draws["x"], [0.05, 0.5, 0.95], axis=0)
    axis.fill_between(time, low, high, alpha=0.3, label="posterior, 90 %")
    axis.plot(time, middle)
    axis.plot(time, truth, "k", lw=0.8, label="truth")
    axis.plot(time, everywhere, ".", label="sensor everywhere")
    axis.plot(SOME, some, "s", label="sensor at some points")
    axis.legend(ncols=4, fontsize=8)
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "two_sensors.png"))
    return result


if __name__ == "__main__":
    main()
