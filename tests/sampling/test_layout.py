"""Positions as vectors: there and back, where each site's entries are, and gradients of
what is said of them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.samplers.layout import Layout
from sampling_cases import SCHEDULE, normal, single

LEVEL = 11


@cp.program
def many(f, g):
    """Noised sites of three shapes, a static one of each kind, and one that is held."""
    m = numpyro.sample("m", dist.Normal(jnp.zeros((2, 1)), 1.0).to_event(2))
    z = cp.sample("z", f * g**2)
    a = cp.sample("a", g)
    with numpyro.plate("copies", 2):
        cp.sample("t", f)
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    c = numpyro.sample("c", dist.Normal(0.0, 1.0))
    cp.sample(
        "b", cp.Analytic(dist.Normal(c, 1.0), SCHEDULE) * normal(), conditional=True
    )
    cp.observe("y", dist.Normal(a[0] + m.sum() + z.sum(), s), 0.7, anneal="tempered")


@cp.program
def latents_alone():
    cp.observe(
        "y", dist.Normal(0.0, numpyro.sample("scale", dist.HalfNormal(1.0))), 1.0
    )


@pytest.fixture(scope="module")
def densities():
    plane = cp.Analytic(
        dist.Normal(jnp.zeros(3), jnp.array([1.0, 0.5, 2.0])).to_event(1), SCHEDULE
    )
    return {
        "many": cp.compile(many, plane, plane),
        "noised": cp.compile(single, plane),
        "static": cp.compile(latents_alone),  # of one level
    }


EVERY = pytest.mark.parametrize("name", ["many", "noised", "static"])


def at(density):
    """Its layout, a level, and its α."""
    level = min(LEVEL, density.num_levels - 1)
    return Layout.of_density(density), level, density.schedule.at(level).alpha


@EVERY
def test_positions_come_back_from_vectors(densities, name):
    """Of one chain and of many; noised entries come first and are divided by α, as in y
    = x/α."""
    density = densities[name]
    layout, level, alpha = at(density)
    position = density.initial(jax.random.key(0), level)
    vector = layout.vector(position, alpha)
    shapes = {site: jnp.shape(value) for site, value in position.items()}
    assert (
        dict(layout.noised + layout.static)
        == shapes
        == {n: s.shape for n, s in density.sites.items()}
    )
    assert vector.shape == (layout.size,)
    for lead in ((), (4, 3)):
        back = layout.position(jnp.broadcast_to(vector, (*lead, layout.size)), alpha)
        for site, value in position.items():
            np.testing.assert_allclose(
                back[site], jnp.broadcast_to(value, (*lead, *shapes[site])), rtol=1e-6
            )
    for site, info in density.sites.items():
        assert (site in dict(layout.noised)) == (info.kind == "noised")
        scale = alpha if info.kind == "noised" else 1.0
        np.testing.assert_allclose(
            scale * vector[layout.entries((site,))],
            position[site].reshape(-1),
            rtol=1e-6,
        )
    both = layout.entries(tuple(shapes))
    assert sorted(both.tolist()) == list(range(layout.size))
    assert layout.entries(()).size == 0
    assert layout.dims == sum(np.prod(shape, dtype=int) for _, shape in layout.noised)


def test_sites_are_in_alphabetical_order_and_held_ones_are_static(densities):
    layout, *_ = at(densities["many"])
    assert layout.noised == (("a", (3,)), ("b", ()), ("t", (2, 3)), ("z", (3,)))
    assert layout.static == (("c", ()), ("m", (2, 1)), ("s", ()))
    assert layout.entries(("t", "a")).tolist() == [0, 1, 2, *range(4, 10)]
    np.testing.assert_array_equal(
        layout.power(densities["many"], 0), [1.0] * 3 + [2.0] + [1.0] * 6 + [3.0] * 3
    )


@EVERY
def test_an_evaluations_score_is_the_gradient_of_its_log_density(densities, name):
    """With respect to the vector, by `jax.grad`; that of a held site is 0, as nothing
    may move it."""
    density = densities[name]
    layout, level, alpha = at(density)
    vector = layout.vector(density.initial(jax.random.key(1), level), alpha)
    found = jax.jit(lambda v: layout.evaluate(density, v, level))(vector)
    value, slope = jax.jit(
        jax.value_and_grad(lambda v: layout.evaluate(density, v, level).log_density)
    )(vector)
    held = layout.entries(
        tuple(site for site, info in density.sites.items() if info.kind == "held")
    )
    np.testing.assert_allclose(
        found.score, slope.at[held].set(0.0), rtol=1e-4, atol=1e-3
    )
    assert found.log_density == pytest.approx(float(value))
    assert float(jnp.abs(slope).max()) > 0.1


def test_drift_and_rate_are_those_of_y(densities):
    """In y = x/α the drift is α·∇ log F and the rate α² times that of x; without parts
    there are none."""
    density = densities["many"]
    layout, _, alpha = at(density)
    position = density.initial(jax.random.key(1), LEVEL)
    plain, found = (
        density.evaluate(position, LEVEL),
        layout.evaluate(density, layout.vector(position, alpha), LEVEL),
    )
    drift = np.concatenate(
        [alpha * plain.terms.drift[site].reshape(-1) for site, _ in layout.noised]
    )
    np.testing.assert_allclose(found.terms.drift, drift, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.terms.rate, alpha**2 * plain.terms.rate, rtol=1e-3)
    assert (
        layout.evaluate(
            density, layout.vector(position, alpha), LEVEL, terms=False
        ).terms
        is None
    )
    blank = layout.unevaluated(density)
    assert jax.tree.structure(blank) == jax.tree.structure(found)
    for one, other in zip(jax.tree.leaves(blank), jax.tree.leaves(found), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.dtype == bool or bool(jnp.all(jnp.isnan(one)))
