"""SLCP with a network that was learned, against chains on the true likelihood."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neural_network import MLPClassifier

import composeprob as cp
from composeprob.models.worlds import slcp

from .ours import tall


def data(seed: int, n: int) -> np.ndarray:
    """The first n of the observations of one θ from the prior, (n, 8)."""
    theta_key, key = jax.random.split(jax.random.key(seed))
    theta = slcp.prior().sample(theta_key, (1,))
    return np.asarray(slcp.simulate(key, jnp.repeat(theta, 100, axis=0)))[:n]


def reference(xs: Any, seed: int, count: int) -> np.ndarray:
    """Draws by NUTS. The posterior is the same under either sign of θ₃ and of θ₄: these
    are drawn apart."""
    low = jnp.array([-slcp.BOUND] * 2 + [0.0] * 2 + [-slcp.BOUND])

    def model() -> None:
        theta = numpyro.sample(
            "theta", dist.Uniform(low, jnp.full(slcp.SIZE, slcp.BOUND)).to_event(1)
        )
        numpyro.factor(
            "data",
            jnp.sum(jax.vmap(slcp.log_likelihood, (None, 0))(theta, jnp.asarray(xs))),
        )

    chains = MCMC(
        NUTS(model, target_accept_prob=0.95),
        num_warmup=1000,
        num_samples=-(-count // 4) * 5,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    chains.run(jax.random.key(seed))
    draws = np.array(chains.get_samples(group_by_chain=True)["theta"])[:, ::5].reshape(
        -1, slcp.SIZE
    )[:count]
    draws[:, 2:4] *= np.random.default_rng(seed).choice([-1.0, 1.0], (len(draws), 2))
    return draws


def c2st(a: np.ndarray, b: np.ndarray, seed: int = 0) -> float:
    """Accuracy of a classifier of two sets of draws, by five-fold cross-validation: 0.5
    for equal laws."""
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        return float("nan")
    points = np.concatenate([a, b])
    # The classifier computes in the precision of its inputs.
    points = ((points - a.mean(0)) / a.std(0)).astype(np.float32)
    labels = np.repeat([0, 1], [len(a), len(b)])
    hidden = (10 * a.shape[1],) * 2
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    classifier = MLPClassifier(hidden, max_iter=1000, random_state=seed)
    return float(cross_val_score(classifier, points, labels, cv=folds).mean())


def draw(xs: Any, seed: int, count: int) -> tuple[np.ndarray, str]:
    """Draws of the default run over all observations, and what its status says."""
    posterior: Any = cp.load("slcp-posterior")
    prior = cp.Analytic(slcp.prior(), posterior.schedule, label="prior")
    density = cp.compile(tall, posterior, prior, {"x": jnp.asarray(xs)})
    result = cp.infer(density, jax.random.key(seed), num_chains=count, progress=False)
    return result.unweighted()["theta"], str(result.status.code)
