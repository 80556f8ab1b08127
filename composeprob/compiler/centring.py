"""Latents in standard coordinates whose data have a location that is affine in them:
those of a *non-centred* hierarchy."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from numpyro.distributions import Distribution, biject_to
from numpyro.distributions.transforms import IdentityTransform

from composeprob import tuning
from composeprob.compiler.discrete import Run
from composeprob.compiler.latents import Dependencies, Statements, place_of
from composeprob.language.finite import is_discrete
from composeprob.language.interpret import Statement


def centred_by_data(
    run: Run, statements: Statements, dependencies: Dependencies
) -> tuple[tuple[str, str], ...]:
    """Return pairs (ξ, y) of a latent and data of its shape whose location is m + s·ξ,
    entry by entry, where m or s depends on other latents and the prior of ξ does not.

    A program may do anything with ξ: that the location is affine is tested at random
    values of all latents.
    """
    pairs = []
    for name, statement in statements.items():
        place = None
        if statement.kind == "observed" and len(dependencies[name]) > 1:
            place = place_of(statement.distribution)
        if place is None:
            continue
        shape = jnp.shape(place[0])
        candidates = []
        for latent in sorted(dependencies[name]):
            if not dependencies[latent] and _is_standard(statements[latent], shape):
                candidates.append(latent)
        if len(candidates) == 1 and _is_affine(run, candidates[0], name, shape):
            pairs.append((candidates[0], name))
    return tuple(pairs)


def _is_standard(statement: Statement, shape: tuple[int, ...]) -> bool:
    """Return whether a latent has a real entry for each datum."""
    if statement.kind != "static" or shape == ():
        return False
    if is_discrete(statement.distribution) or jnp.shape(statement.value) != shape:
        return False
    support = statement.distribution.support
    # Event dimensions wrap the constraint of their entries.
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return isinstance(biject_to(support), IdentityTransform)


def _is_affine(run: Run, latent: str, data: str, shape: tuple[int, ...]) -> bool:
    """Return whether the location of data is m + s·ξ, with no s of 0."""
    for seed in range(tuning.CENTRING_TRIALS):

        def location(xi: Array, seed: int = seed) -> Array:
            return _location(run, latent, xi, data, seed)

        points = jax.random.normal(jax.random.key(seed), (3, *shape))
        first, second, along = points
        here, slope = jax.jvp(location, (first,), (jnp.ones(shape),))
        there, change = jax.jvp(location, (second,), (along,))
        steep = bool(jnp.all(slope != 0))
        alone = jnp.allclose(change, slope * along, 1e-3, 1e-4)
        straight = jnp.allclose(there - here, slope * (second - first), 1e-3, 1e-4)
        if not (steep and alone and straight):
            return False
    return True


def _location(
    run: Run, latent: str, xi: Array, data: str, seed: int
) -> Float[Array, "*shape"]:
    """Return the location of data at ξ and draws of all other latents."""
    key = jax.random.key(seed)
    count = itertools.count()

    def provide(kind: str, name: str, distribution: Distribution) -> Array:
        drawn = distribution.sample(jax.random.fold_in(key, next(count)))
        return xi if name == latent else drawn

    place = place_of(run(provide)[data].distribution)
    assert place is not None  # it was found so
    return place[0]
