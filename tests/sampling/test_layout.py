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
    of_latent = cp.Analytic(dist.Normal(c, 1.0), SCHEDULE)
    cp.sample("b", of_latent * normal(), conditional=True)
    cp.observe("y", dist.Normal(a[0] + m.sum() + z.sum(), s), 0.7, anneal="tempered")


@cp.program
def latents_alone():
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    cp.observe("y", dist.Normal(0.0, scale), 1.0)


@pytest.fixture(scope="module")
def densities():
    law = dist.Normal(jnp.zeros(3), jnp.array([1.0, 0.5, 2.0])).to_event(1)
    plane = cp.Analytic(law, SCHEDULE)
    return {
        "many": cp.compile(many, plane, plane),
        "noised": cp.compile(single, plane),
        "static": cp.compile(latents_alone),  # of one level
    }


EVERY = pytest.mark.parametrize("name", ["many", "noised", "static"])


def at(density):
    """A density's layout, a level, and its α."""
    level = min(LEVEL, density.num_levels - 1)
    return Layout.of_density(density), level, density.schedule.at(level).alpha


@EVERY
def test_positions_come_back_from_vectors(densities, name):
    """Positions of one chain and of many; noised entries come first and are divided by
    α, as in y = x/α."""
    density = densities[name]
    layout, level, alpha = at(density)
    position = density.initial(jax.random.key(0), level)
    vector = layout.vector(position, alpha)
    shapes = {site: jnp.shape(value) for site, value in position.items()}
    assert dict(layout.noised + layout.static) == shapes
    assert shapes == {name: site.shape for name, site in density.sites.items()}
    assert vector.shape == (layout.size,)
    for lead in ((), (4, 3)):
        back = layout.position(jnp.broadcast_to(vector, (*lead, layout.size)), alpha)
        for site, value in position.items():
            expected = jnp.broadcast_to(value, (*lead, *shapes[site]))
            np.testing.assert_allclose(back[site], expected, rtol=1e-6)
    for site, info in density.sites.items():
        assert (site in dict(layout.noised)) == (info.kind == "noised")
        scale = alpha if info.kind == "noised" else 1.0
        entries = scale * vector[layout.entries((site,))]
        np.testing.assert_allclose(entries, position[site].reshape(-1), rtol=1e-6)
    all_entries = layout.entries(tuple(shapes))
    assert sorted(all_entries.tolist()) == list(range(layout.size))
    assert layout.entries(()).size == 0
    assert layout.dims == sum(np.prod(shape, dtype=int) for _, shape in layout.noised)


def test_sites_are_in_alphabetical_order_and_held_ones_are_static(densities):
    layout, *_ = at(densities["many"])
    assert layout.noised == (("a", (3,)), ("b", ()), ("t", (2, 3)), ("z", (3,)))
    assert layout.static == (("c", ()), ("m", (2, 1)), ("s", ()))
    assert layout.entries(("t", "a")).tolist() == [0, 1, 2, *range(4, 10)]
    power = [1.0] * 3 + [2.0] + [1.0] * 6 + [3.0] * 3
    np.testing.assert_array_equal(layout.power(densities["many"], 0), power)


@EVERY
def test_an_evaluations_score_is_the_gradient_of_its_log_density(densities, name):
    """The gradient with respect to the vector, by `jax.grad`; that of a held site is 0,
    as nothing may move it."""
    density = densities[name]
    layout, level, alpha = at(density)
    vector = layout.vector(density.initial(jax.random.key(1), level), alpha)

    def log_density(v):
        return layout.evaluate(density, v, level).log_density

    evaluation = jax.jit(lambda v: layout.evaluate(density, v, level))(vector)
    value, slope = jax.jit(jax.value_and_grad(log_density))(vector)
    held = [site for site, info in density.sites.items() if info.kind == "held"]
    expected = slope.at[layout.entries(tuple(held))].set(0.0)
    np.testing.assert_allclose(evaluation.score, expected, rtol=1e-4, atol=1e-3)
    assert evaluation.log_density == pytest.approx(float(value))
    assert float(jnp.abs(slope).max()) > 0.1


def test_drift_and_rate_are_those_of_y(densities):
    """In y = x/α the drift is α·∇ log F and the rate α² times that of x; without terms
    there are none."""
    density = densities["many"]
    layout, _, alpha = at(density)
    position = density.initial(jax.random.key(1), LEVEL)
    vector = layout.vector(position, alpha)
    in_x = density.evaluate(position, LEVEL).terms
    evaluation = layout.evaluate(density, vector, LEVEL)
    in_y = evaluation.terms
    drifts = [alpha * in_x.drift[site].reshape(-1) for site, _ in layout.noised]
    np.testing.assert_allclose(in_y.drift, np.concatenate(drifts), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(in_y.rate, alpha**2 * in_x.rate, rtol=1e-3)
    assert layout.evaluate(density, vector, LEVEL, terms=False).terms is None
    blank = layout.unevaluated(density)
    assert jax.tree.structure(blank) == jax.tree.structure(evaluation)
    leaves = zip(jax.tree.leaves(blank), jax.tree.leaves(evaluation), strict=True)
    for of_blank, of_evaluation in leaves:
        assert of_blank.shape == of_evaluation.shape
        assert of_blank.dtype == of_evaluation.dtype
        assert of_blank.dtype == bool or bool(jnp.all(jnp.isnan(of_blank)))
