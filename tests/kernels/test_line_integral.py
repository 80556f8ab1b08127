"""Line integrals of the score, in double precision: value, order, symmetry, and the error that they report."""

from functools import partial

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from composeprob.kernels import HMC, HamiltonianState, KernelState, LineIntegral
from composeprob.kernels.line_integral import coarse_stride
from kernel_chains import driven
from targets import evaluate, nested, score_only, two_modes

LAW = two_modes(2)
TARGET = score_only(evaluate(LAW.log_density))
RULES = ("trapezoid", "simpson")


def state(x, target=TARGET):
    return KernelState(x, target(x))


def straight(line, x, y, target=TARGET):
    """log π(y) − log π(x) along the straight line, and its error, evaluation by evaluation."""
    start, end = state(x, target), state(y, target)
    path, last = line.begin(start, 1), line.extra_evaluations

    def onward(i, carry):
        path, point = carry
        path = line.record(i, 1, path, start, point)
        return path, state(line.node(i + 1, path, start), target)

    path, point = jax.lax.fori_loop(0, last, onward, (path, end))
    return line.finish(1, path, start, point)[1:]


def along_trajectory(rule, x, v, target, h, num_leapfrog):
    """The end of a trajectory of HMC whose momentum is ``v``, and the integral along it with its error."""
    kernel = HMC(0.1, num_leapfrog, damping=0.0, log_ratio=LineIntegral(None, rule))
    begin = HamiltonianState(x, target(x), v)
    noise = jnp.append(jax.flatten_util.ravel_pytree(v)[0], jnp.array([-8.0, 0.0]))  # log U = −35: it is accepted
    end, info = driven(kernel, noise, begin, target, h)
    return end, (-info.log_reversal, info.quadrature_error)


@jax.jit
def true_ratio(x, y):
    return LAW.log_density(y) - LAW.log_density(x)


def order(errors, refinements):
    return -np.polyfit(np.log(refinements), np.log(errors), 1)[0]


@pytest.mark.parametrize(("rule", "expected"), [("trapezoid", 2), ("simpson", 4)])
def test_error_of_the_straight_line_has_the_order_of_its_rule(rule, expected):
    intervals = np.array([16, 32, 64, 128])
    with jax.enable_x64(True):
        x = LAW.draw(jax.random.key(0), 100).astype(float)
        y = x + 0.5 * jax.random.normal(jax.random.key(1), x.shape)
        errors = []
        for n in intervals:
            difference = lambda a, b, n=n: straight(LineIntegral(int(n) + 1, rule), a, b)[0]
            found = jax.jit(jax.vmap(difference))(x, y)
            errors.append(float(jnp.sqrt(jnp.mean((found - jax.vmap(true_ratio)(x, y)) ** 2))))
    assert abs(order(errors, intervals) - expected) < 0.1 * expected, errors


@pytest.mark.parametrize(("rule", "expected"), [("trapezoid", 2), ("simpson", 4)])
def test_error_along_the_trajectory_has_the_order_of_its_rule(rule, expected):
    refinements, errors = np.array([1, 2, 4, 8]), []
    with jax.enable_x64(True):
        x, v = LAW.draw(jax.random.key(0), 100).astype(float), jax.random.normal(jax.random.key(1), (100, 2))
        for r in refinements:

            def error(x, v, r=int(r)):
                end, (found, _) = along_trajectory(rule, x, v, TARGET, 0.2 / r, 6 * r)
                return found - true_ratio(x, end.position)

            errors.append(float(jnp.sqrt(jnp.mean(jax.jit(jax.vmap(error))(x, v) ** 2))))
    assert abs(order(errors, refinements) - expected) < 0.1 * expected, errors


@pytest.mark.parametrize(
    ("points", "rule"),
    [
        (10, "trapezoid"),
        (31, "simpson"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((9, "trapezoid"), (33, "simpson"))),
    ],
)
def test_the_reported_error_is_the_error(points, rule):
    """Where moves are small beside the curvature of the target, as those are that get accepted."""
    with jax.enable_x64(True):
        x = LAW.draw(jax.random.key(0), 200).astype(float)
        y = x + 0.3 * jax.random.normal(jax.random.key(1), x.shape)
        line = LineIntegral(points, rule)
        found, estimate = jax.jit(jax.vmap(partial(straight, line)))(x, y)
        error = np.abs(found - jax.vmap(true_ratio)(x, y))
        found, estimate = np.asarray(found), np.asarray(estimate)
    assert np.median(estimate) == pytest.approx(np.median(error), rel=0.15)
    assert np.mean(estimate) == pytest.approx(np.mean(error), rel=0.15)


def test_the_coarse_rule():
    assert [coarse_stride("trapezoid", n) for n in (1, 2, 3, 4, 9, 35)] == [None, 2, 3, 2, 3, 5]
    assert [coarse_stride("simpson", n) for n in (2, 4, 6, 8, 10, 18)] == [None, 2, 3, 2, 5, 3]


def test_errors_that_cannot_be_estimated():
    with jax.enable_x64(True):
        x, y = LAW.draw(jax.random.key(0), 2).astype(float)
        lines = LineIntegral(2), LineIntegral(3, "simpson"), LineIntegral(3)
        each = jax.jit(lambda a, b: [straight(line, a, b) for line in lines])
        (_, none), (found, estimate), (trapezoid, _) = each(x, y)
        assert np.isnan(none)
        np.testing.assert_allclose(estimate, abs(found - trapezoid), rtol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("points", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 9))])
def test_antisymmetric(points, rule):
    line = LineIntegral(points, rule)
    with jax.enable_x64(True):
        x, y = (LAW.draw(jax.random.key(k), 50).astype(float) for k in (0, 1))
        difference = jax.jit(jax.vmap(partial(straight, line)))
        there, back = difference(x, y), difference(y, x)
    assert np.abs(there[0]).max() > 1
    np.testing.assert_allclose(there[0], -back[0], atol=1e-13)
    np.testing.assert_allclose(there[1], back[1], atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_antisymmetric_along_the_reversed_trajectory(rule):
    def there_and_back(x, v):
        end, there = along_trajectory(rule, x, v, TARGET, 0.3, 4)
        return there, along_trajectory(rule, end.position, -end.momentum, TARGET, 0.3, 4)[1]

    with jax.enable_x64(True):
        x, v = LAW.draw(jax.random.key(0), 50).astype(float), jax.random.normal(jax.random.key(1), (50, 2))
        there, back = jax.jit(jax.vmap(there_and_back))(x, v)
    assert np.abs(there[0]).max() > 1
    np.testing.assert_allclose(there[0], -back[0], atol=1e-10)
    np.testing.assert_allclose(there[1], back[1], atol=1e-10)


def test_exact_where_it_must_be():
    """The trapezoid on linear scores, Simpson's rule on cubic ones, on pytrees, and along bent trajectories."""
    gaussian = evaluate(lambda p: -0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p)))
    quartic = evaluate(lambda p: -0.25 * sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(p)))
    with jax.enable_x64(True):
        x, y = (jax.tree.map(lambda a: a[0].astype(float), nested().draw(jax.random.key(k), 1)) for k in (0, 1))

        @jax.jit
        def found_and_true(x, y):
            difference = lambda target, end: target(end).log_density - target(x).log_density
            pairs = [
                (straight(line, x, y, target)[0], difference(target, y))
                for target, line in ((gaussian, LineIntegral(2)), (quartic, LineIntegral(3, "simpson")))
            ]
            for rule in RULES:
                end, (found, _) = along_trajectory(rule, x, y, gaussian, 0.4, 4)
                pairs.append((found, difference(gaussian, end.position)))
            return pairs

        for found, true in found_and_true(x, y):
            np.testing.assert_allclose(found, true, rtol=1e-12)
