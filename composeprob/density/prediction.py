"""What a density predicts about data: the methods `observed`, `predict` and `log_likelihood` of `AnnealedDensity`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from numpy.typing import ArrayLike

from composeprob.density.evaluation import over_chains
from composeprob.errors import CapabilityError, ShapeError

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity

Values = dict[str, Array]


@eqx.filter_jit
def observed(density: AnnealedDensity) -> Values:
    """See `AnnealedDensity.observed`."""
    return density.evaluator.data()


def predict(density: AnnealedDensity, key: Array, samples: Mapping[str, ArrayLike]) -> Values:
    """See `AnnealedDensity.predict`."""
    latents = _latents(density, samples)
    num_samples = next(iter(latents.values())).shape[0]
    return over_chains(density.evaluator.predict, jax.random.split(key, num_samples), latents)


def log_likelihood(density: AnnealedDensity, samples: Mapping[str, ArrayLike]) -> Values:
    """See `AnnealedDensity.log_likelihood`."""
    return over_chains(density.evaluator.log_likelihood, _latents(density, samples))


def _latents(density: AnnealedDensity, samples: Mapping[str, ArrayLike]) -> Values:
    """The latents among the samples, checked."""
    if not observed(density):
        raise CapabilityError(
            "This program observes nothing, so it has no data to predict.",
            where=density.described.where,
            fix="add cp.observe(name, distribution, value), or compile with data.",
        )
    missing = [name for name in density.sites if name not in samples]
    if missing:
        raise ShapeError(
            f"Samples of this program hold a value of every latent; {', '.join(map(repr, missing))} is missing.",
            fix="pass result.samples, or the samples of a NumPyro run on density.to_numpyro().",
        )
    latents = {name: jnp.asarray(samples[name]) for name in density.sites}
    if len({values.shape[:1] for values in latents.values()}) > 1 or () in {v.shape for v in latents.values()}:
        raise ShapeError(
            f"All samples must have the same leading axis; got the shapes {[v.shape for v in latents.values()]}.",
            fix="of several chains, flatten the first two axes.",
        )
    return latents
