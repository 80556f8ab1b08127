"""Latents in standard coordinates whose data have a location that is affine in them:
those of a *non-centred* hierarchy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

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
    run: Run,
    statements: Statements,
    dependencies: Dependencies,
    placed: Collection[str],
) -> tuple[tuple[str, str], ...]:
    """Return pairs (ξ, y) of a latent and data of its shape whose location is m + s·ξ,
    entry by entry, where m or s depends on other latents and the prior of ξ does not;
    in an order in which they can be placed.

    A program may do anything with ξ: that the location is affine is tested at random
    values of all latents. Latents that are ``placed`` by others have coordinates too.
    """
    pairs = {}
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
        if len(candidates) == 1 and _is_affine(run, statements[candidates[0]], name):
            pairs[candidates[0]] = name
    return _in_order(pairs, dependencies, placed)


def _in_order(
    pairs: dict[str, str], dependencies: Dependencies, placed: Collection[str]
) -> tuple[tuple[str, str], ...]:
    """Order pairs so that m and s depend on no ξ of a later pair, and leave out those
    that have no such place.

    Coordinates become latents one after the other, those of ``placed`` latents first. m
    and s of a coordinate that is not a latent yet would be others on the way back.
    """
    waiting = dict(pairs)
    for latent in pairs:
        if any(latent in dependencies[name] for name in placed):
            del waiting[latent]
    ordered = []
    while waiting:
        ready = []
        for latent, data in waiting.items():
            if set(dependencies[data]) & waiting.keys() == {latent}:
                ready.append(latent)
        if not ready:  # a circle
            break
        for latent in ready:
            ordered.append((latent, waiting.pop(latent)))
    return tuple(ordered)


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


def _is_affine(run: Run, latent: Statement, data: str) -> bool:
    """Return whether the location of data is m + s·ξ, with no s of 0, as far as ξ
    goes: from draws of its prior to others that are scaled."""
    shape = jnp.shape(latent.value)
    for seed in range(tuning.CENTRING.trials):

        def location(xi: Array, seed: int = seed) -> Array:
            return _location(run, latent.name, xi, data, seed)

        near, far, direction = jax.random.split(jax.random.key(seed), 3)
        here = latent.distribution.sample(near)
        away = tuning.CENTRING.reach * latent.distribution.sample(far)
        along = jax.random.normal(direction, shape)
        for there in (away, -away):
            if not _is_affine_between(location, here, there, along):
                return False
    return True


def _is_affine_between(
    location: Callable[[Array], Array], here: Array, there: Array, along: Array
) -> bool:
    """Return whether a function is affine in each entry by itself, with no slope of 0,
    by its values and its change along a direction at two points."""
    first, slope = jax.jvp(location, (here,), (jnp.ones_like(here),))
    second, change = jax.jvp(location, (there,), (along,))
    if not jnp.all(slope != 0):
        return False
    alone = jnp.allclose(change, slope * along, 1e-3, 0.0)
    rounding = 16 * float(jnp.finfo(first.dtype).eps * jnp.abs(first).max())
    straight = jnp.allclose(second - first, slope * (there - here), 1e-3, rounding)
    return bool(alone and straight)


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
