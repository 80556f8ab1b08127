"""A network trained with BayesFlow is a factor: its posterior of one observation,
multiplied over three.

Needs BayesFlow, which the tests do without where it is missing: `pip install
bayesflow`. `cp.from_estimator` reads its network, its adapter and its standardisation
(none here: these parameters are in units of their prior's spread anyhow).

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


def simulate(seed, n):
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal((n, 2)).astype("float32")
    x = theta + NOISE * rng.standard_normal((n, 2))
    return theta, x.astype("float32")


def train(epochs=60):
    theta, x = simulate(0, 8192)
    network = bf.networks.DiffusionModel(subnet_kwargs={"widths": (64, 64, 64)})
    estimator = bf.estimators.BasicEstimator(
        inference_network=network, standardize=None
    )
    estimator.compile(optimizer=keras.optimizers.Adam(1e-3))
    pairs = {"inference_variables": theta, "inference_conditions": x}
    estimator.fit(
        dataset=bf.OfflineDataset(pairs, batch_size=256, adapter=None),
        epochs=epochs,
        verbose=0,
    )
    return estimator


@cp.program
def tall(posterior, xs):
    normal = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    prior = cp.Analytic(normal, posterior.schedule, label="prior")
    return cp.sample("theta", prior * cp.product(posterior / prior, over={"x": xs}))


def observations(n=3, truth=(0.7, -0.4)):
    noise = np.random.default_rng(5).standard_normal((n, 2)).astype("float32")
    return np.asarray(truth, np.float32) + NOISE * noise


def main(num_chains=1000, out="out"):
    xs = observations()
    posterior = cp.from_estimator(train())
    density = cp.compile(tall, posterior, posterior.adapt(xs))
    result = cp.infer(density, jax.random.key(1), num_chains=num_chains)
    print(result.summary(), f"\nexact mean {xs.sum(0) / (len(xs) + NOISE**2)}")
    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "bayesflow_estimator.png"))
    return result


if __name__ == "__main__":
    main()
