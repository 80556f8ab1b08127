"""A network trained with BayesFlow is a factor: its posterior of one observation, multiplied over three.

Needs BayesFlow, which the tests do without where it is missing: `pip install bayesflow`. Its score is a function of θ,
the log-SNR and x, which is what `cp.Diffusion` takes; BayesFlow's cosine schedule preserves variance, as ours does.

    KERAS_BACKEND=jax python examples/bayesflow_estimator.py
"""

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")  # before BayesFlow is imported

import bayesflow as bf
import jax
import jax.numpy as jnp
import keras
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

NOISE = 0.8
schedule = cp.Schedule.log_snr(60, min=-10.0, max=7.0)
prior = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0).to_event(1), schedule, label="prior")


def simulate(seed, n):
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal((n, 2)).astype("float32")
    return theta, (theta + NOISE * rng.standard_normal((n, 2))).astype("float32")


def train(epochs=60):
    theta, x = simulate(0, 8192)
    network = bf.networks.DiffusionModel(subnet_kwargs={"widths": (64, 64, 64)})
    estimator = bf.approximators.ContinuousApproximator(inference_network=network, adapter=None, standardize=None)
    estimator.compile(optimizer=keras.optimizers.Adam(1e-3))
    pairs = {"inference_variables": theta, "inference_conditions": x}
    estimator.fit(dataset=bf.OfflineDataset(pairs, batch_size=256, adapter=None), epochs=epochs, verbose=0)
    return network


def as_factor(network):
    def score(theta, log_snr, x):
        return network.score(theta[None], log_snr_t=jnp.full((1, 1), log_snr), conditions=x[None])[0]

    return cp.Diffusion(score, schedule, event_shape=(2,), parameterization="score", time="log_snr",
                        conditions=("x",), log_snr_range=(-15.0, 15.0), label="posterior")  # fmt: skip


@cp.program
def tall(posterior, xs):
    return cp.sample("theta", prior * cp.product(posterior / prior, over={"x": xs}))


def observations(n=3, truth=(0.7, -0.4)):
    return np.asarray(truth, np.float32) + NOISE * np.random.default_rng(5).standard_normal((n, 2)).astype("float32")


def main(num_chains=1000, out="out"):
    xs = observations()
    result = cp.infer(cp.compile(tall, as_factor(train()), xs), jax.random.key(1), num_chains=num_chains)
    print(result.summary(), f"\nexact mean {xs.sum(0) / (len(xs) + NOISE**2)}")
    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "bayesflow_estimator.png"))
    return result


if __name__ == "__main__":
    main()
