"""Tapestries: every entry of the canvas counts once, and the energy keeps its
gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.compiler.top import top_of
from sampling_cases import learned, single
from targets import network_outputs

SCHEDULE = cp.Schedule.log_snr(12, -6.0, 6.0)
SPREAD = 0.5
CANVAS = (7, 5)


def independent(form):
    """A network of N(0, v) in every entry."""

    def network(x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        return network_outputs(x, alpha, sigma, 0.0, SPREAD**2)[form]

    return network


def mixing(x, t, towards=0.0):
    """A network in which entries depend on one another."""
    return (
        jnp.tanh(x + 0.5 * jnp.roll(x, 1, 0) - 0.3 * jnp.roll(x, 2, 1) + 0.1 * t)
        + towards
    )


def model(network, form, shape=(4, 3), **conditions):
    return learned(network, form, SCHEDULE, shape, conditions=conditions, label="m")


def windows(factor, offsets=((0, 0), (3, 0), (0, 2), (3, 2)), shape=CANVAS):
    return [cp.window(factor, shape, offset) for offset in offsets]


def variance(level):
    noise = SCHEDULE.at(level)
    return float(noise.alpha**2 * SPREAD**2 + noise.sigma**2)


@pytest.mark.parametrize("form", ["energy_residual", "epsilon"])
def test_windows_that_agree_make_the_canvas_that_they_agree_on(form):
    pieces = windows(model(independent(form), form))
    once = cp.compile(single, cp.tapestry(*pieces))
    twice = cp.compile(single, cp.product(*pieces))
    x = jax.random.normal(jax.random.key(0), CANVAS)
    for level in (0, 5, 11):
        expected = -x / variance(level)
        np.testing.assert_allclose(
            once.score({"x": x}, level)["x"], expected, rtol=2e-4, atol=1e-5
        )
        # In the product overlaps count twice.
        assert not np.allclose(twice.score({"x": x}, level)["x"], expected, rtol=0.5)
        if form == "energy_residual":
            at_zero = once.log_density({"x": jnp.zeros(CANVAS)}, level)
            change = once.log_density({"x": x}, level) - at_zero
            np.testing.assert_allclose(
                change, -0.5 * jnp.sum(x**2) / variance(level), rtol=2e-4
            )


def test_the_energy_keeps_its_gradient():
    factor = cp.guide(model(mixing, "energy_residual", towards=0.0), 1.5, towards=0.4)
    density = cp.compile(single, cp.tapestry(*windows(factor)))
    # No Feynman–Kac rate, which importance weights of chains would need.
    assert density.capabilities == {"score", "energy", "conservative"}
    x = {"x": jax.random.normal(jax.random.key(1), CANVAS)}
    by_grad = jax.jit(jax.grad(density.log_density))
    for level in (1, 8):
        by_autodiff = by_grad(x, level)
        np.testing.assert_allclose(
            density.score(x, level)["x"], by_autodiff["x"], rtol=1e-4, atol=1e-4
        )


def test_scores_are_averaged():
    left, right = windows(model(mixing, "epsilon"), ((0, 0), (0, 2)), (4, 5))
    density = cp.compile(single, cp.tapestry(left, right))
    level = 4
    x = jax.random.normal(jax.random.key(2), (4, 5))
    noise = SCHEDULE.at(level)
    a, b = (-mixing(part, noise.log_snr) / noise.sigma for part in (x[:, :3], x[:, 2:]))
    expected = jnp.concatenate([a[:, :2], (a[:, 2:] + b[:, :1]) / 2, b[:, 1:]], axis=1)
    np.testing.assert_allclose(
        density.score({"x": x}, level)["x"], expected, rtol=1e-4, atol=1e-5
    )
    assert density.capabilities == {"score"}  # averages of scores are no gradient


def test_a_window_that_averages_has_the_mean_weight_of_its_entries():
    fine = cp.window(model(mixing, "epsilon"), (8, 6), (0, 0))
    coarse = cp.window(model(mixing, "epsilon"), (8, 6), (0, 0), scale=2)
    weights = [
        leaf.fixed["weights of entries"]
        for leaf in map(_leaf, cp.tapestry(fine, coarse).factors)
    ]
    np.testing.assert_array_equal(weights[0], np.full((4, 3), 0.5))
    half, both = 0.5, 0.75  # columns 0-1 are seen by both, columns 2-3 half so
    np.testing.assert_array_equal(
        weights[1], [[half, both, 1], [half, both, 1], [1, 1, 1], [1, 1, 1]]
    )


def _leaf(factor):
    return factor if hasattr(factor, "fixed") else _leaf(factor.factor)


def test_the_noisiest_level_counts_every_entry_once_and_one_batch_evaluates_all():
    guided = cp.guide(model(mixing, "energy_residual", towards=0.0), 2.0, towards=1.0)
    tapestry, product = (
        cp.compile(single, combine(*windows(guided)))
        for combine in (cp.tapestry, cp.product)
    )
    assert re.search("share: 8 .* 1 ", str(tapestry))

    def power(density):
        return top_of(density.graph.sites[0].root, CANVAS).power

    np.testing.assert_allclose(power(tapestry), 1.0, rtol=1e-6)
    assert power(product).max() == 4.0


def test_data_and_conditions_may_be_given_within_windows_or_to_all():
    factor = model(mixing, "energy_residual", towards=0.0)
    values = [0.4, -0.3, 1.0]
    written = cp.product(*[factor.given(towards=value) for value in values])
    pairs = [
        (
            cp.tapestry(*windows(cp.product(factor, over={"towards": values}))),
            cp.tapestry(*windows(written)),
        ),
        (
            cp.tapestry(*windows(factor)).given(towards=2.0),
            cp.tapestry(*windows(factor.given(towards=2.0))),
        ),
    ]
    x = {"x": jax.random.normal(jax.random.key(3), CANVAS)}
    for given_within, given_to_all in pairs:
        value, score = cp.compile(single, given_within).value_and_score(x, 4)
        other, wanted = cp.compile(single, given_to_all).value_and_score(x, 4)
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(score["x"], wanted["x"], rtol=1e-4, atol=1e-4)
