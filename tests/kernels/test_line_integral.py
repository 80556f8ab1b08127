"""Line integrals of the score, in double precision: value, order, symmetry, and the
error that they report.

And what MALA and HMC make of densities that offer their score only."""

from functools import partial

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import composeprob as cp
from composeprob.density.evaluation import Evaluation
from composeprob.kernels import HMC, MALA, KernelState, LineIntegral
from composeprob.kernels.hamiltonian import HamiltonianState
from composeprob.kernels.line_integral import coarse_stride
from kernel_chains import driven, start, transitions
from sampling_cases import normal, run, single, slow
from targets import evaluate, nested, score_only, two_modes

LAW = two_modes(2)
TARGET = score_only(evaluate(LAW.log_density))
RULES = ("trapezoid", "simpson")


def state(x, target=TARGET):
    return KernelState(x, target(x))


def straight(line, x, y, target=TARGET):
    """log π(y) − log π(x) along the straight line, and its error, evaluation by
    evaluation."""
    start, end = state(x, target), state(y, target)
    path, last = line.begin(start, 1), line.extra_evaluations

    def onward(i, carry):
        path, point = carry
        path = line.record(i, 1, path, start, point)
        return path, state(line.node(i + 1, path, start), target)

    path, point = jax.lax.fori_loop(0, last, onward, (path, end))
    return line.finish(1, path, start, point)[1:]


def along_trajectory(rule, x, v, target, h, num_leapfrog):
    """The end of a trajectory of HMC whose momentum is ``v``, and the integral along it
    with its error."""
    kernel = HMC(0.1, num_leapfrog, damping=0.0, log_ratio=LineIntegral(None, rule))
    begin = HamiltonianState(x, target(x), v)
    noise = jnp.append(
        jax.flatten_util.ravel_pytree(v)[0], jnp.array([-8.0, 0.0])
    )  # log U = −35: it is accepted
    end, info = driven(kernel, noise, begin, target, h)
    return end, (-info.log_reversal, info.quadrature_error)


@jax.jit
def true_ratio(x, y):
    return LAW.log_density(y) - LAW.log_density(x)


def of_a_line(rule, refine, x, v):
    y = x + 0.5 * v
    return straight(LineIntegral(16 * refine + 1, rule), x, y)[0] - true_ratio(x, y)


def of_a_trajectory(rule, refine, x, v):
    end, (found, _) = along_trajectory(rule, x, v, TARGET, 0.2 / refine, 6 * refine)
    return found - true_ratio(x, end.position)


@pytest.mark.parametrize("error", [of_a_line, of_a_trajectory])
@pytest.mark.parametrize(("rule", "expected"), [("trapezoid", 2), ("simpson", 4)])
def test_the_error_has_the_order_of_its_rule(error, rule, expected):
    refinements, errors = np.array([1, 2, 4, 8]), []
    with jax.enable_x64(True):
        x, v = (
            LAW.draw(jax.random.key(0), 100).astype(float),
            jax.random.normal(jax.random.key(1), (100, 2)),
        )
        for refine in refinements:
            found = jax.jit(jax.vmap(partial(error, rule, int(refine))))(x, v)
            errors.append(float(jnp.sqrt(jnp.mean(found**2))))
    order = -np.polyfit(np.log(refinements), np.log(errors), 1)[0]
    assert abs(order - expected) < 0.1 * expected, errors


LENGTHS = [
    (10, "trapezoid"),
    (31, "simpson"),
    slow(9, "trapezoid"),
    slow(33, "simpson"),
]


@pytest.mark.parametrize(("points", "rule"), LENGTHS)
def test_the_reported_error_is_the_error(points, rule):
    """Where moves are small beside the curvature of the target, as those are that get
    accepted."""
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
    assert [coarse_stride("trapezoid", n) for n in (1, 2, 3, 4, 9, 35)] == [
        None,
        2,
        3,
        2,
        3,
        5,
    ]
    assert [coarse_stride("simpson", n) for n in (2, 4, 6, 8, 10, 18)] == [
        None,
        2,
        3,
        2,
        5,
        3,
    ]


def test_errors_that_cannot_be_estimated():
    with jax.enable_x64(True):
        x, y = LAW.draw(jax.random.key(0), 2).astype(float)
        lines = LineIntegral(2), LineIntegral(3, "simpson"), LineIntegral(3)
        each = jax.jit(lambda a, b: [straight(line, a, b) for line in lines])
        (_, none), (found, estimate), (trapezoid, _) = each(x, y)
        assert np.isnan(none)
        np.testing.assert_allclose(estimate, abs(found - trapezoid), rtol=1e-10)


def along_a_line(points, rule, x, v):
    line, y = LineIntegral(points, rule), x + 0.5 * v
    return straight(line, x, y), straight(line, y, x)


def along_a_reversed_trajectory(points, rule, x, v):
    end, there = along_trajectory(rule, x, v, TARGET, 0.3, points - 1)
    return there, along_trajectory(
        rule, end.position, -end.momentum, TARGET, 0.3, points - 1
    )[1]


@pytest.mark.parametrize(
    ("path", "tolerance"), [(along_a_line, 1e-13), (along_a_reversed_trajectory, 1e-10)]
)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("points", [5, slow(3), slow(9)])
def test_antisymmetric(path, tolerance, points, rule):
    with jax.enable_x64(True):
        x, v = (
            LAW.draw(jax.random.key(0), 50).astype(float),
            jax.random.normal(jax.random.key(1), (50, 2)),
        )
        there, back = jax.jit(jax.vmap(partial(path, points, rule)))(x, v)
    assert np.abs(there[0]).max() > 1
    np.testing.assert_allclose(there[0], -back[0], atol=tolerance)
    np.testing.assert_allclose(there[1], back[1], atol=tolerance)


def test_exact_where_it_must_be():
    """The trapezoid on linear scores, Simpson's rule on cubic ones, on pytrees, and
    along bent trajectories."""
    gaussian = evaluate(
        lambda p: -0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
    )
    quartic = evaluate(
        lambda p: -0.25 * sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(p))
    )
    with jax.enable_x64(True):
        x, y = (
            jax.tree.map(
                lambda a: a[0].astype(float), nested().draw(jax.random.key(k), 1)
            )
            for k in (0, 1)
        )

        @jax.jit
        def found_and_true(x, y):
            difference = lambda target, end: (
                target(end).log_density - target(x).log_density
            )
            pairs = [
                (straight(line, x, y, target)[0], difference(target, y))
                for target, line in (
                    (gaussian, LineIntegral(2)),
                    (quartic, LineIntegral(3, "simpson")),
                )
            ]
            for rule in RULES:
                end, (found, _) = along_trajectory(rule, x, y, gaussian, 0.4, 4)
                pairs.append((found, difference(gaussian, end.position)))
            return pairs

        for found, true in found_and_true(x, y):
            np.testing.assert_allclose(found, true, rtol=1e-12)


# ── accept tests by scores alone ──────────────────────────────────────────────────────

SCORES = score_only(evaluate(two_modes(2).log_density))


def test_the_reversal_is_the_estimate():
    kernel = MALA(0.1, log_ratio=LineIntegral(3))

    @jax.jit
    def step(x):
        first = state(x, SCORES)
        noise = jnp.array([0.4, -0.7, -8.0])  # log U = −35: it is accepted
        after, info = driven(kernel, noise, first, SCORES, jnp.asarray(0.1))
        return info, straight(kernel.log_ratio, x, after.position, SCORES)

    info, (estimate, error) = step(jnp.array([0.3, 0.2]))
    assert info.accepted
    np.testing.assert_allclose(info.log_reversal, -estimate, rtol=1e-5)
    np.testing.assert_allclose(info.quadrature_error, error, rtol=1e-4)


def hole(x):
    """A standard normal whose score breaks inside (0.4, 0.6) and (−0.6, −0.4): NaN
    there, infinite here."""
    score = jnp.select(
        [jnp.abs(x - 0.5) < 0.1, jnp.abs(x + 0.5) < 0.1], [jnp.nan, jnp.inf], -x
    )
    return Evaluation(None, score)


def test_a_path_over_a_broken_place_is_not_taken():
    over = lambda points: jax.jit(
        lambda a, b: straight(LineIntegral(points), a, b, hole)[0]
    )
    three, five = over(3), over(5)
    assert np.isnan(five(-1.0, 1.0))  # nodes at ±0.5
    assert np.isfinite(three(-1.0, 1.0))  # a node at 0 only
    assert np.isnan(
        three(-1.0, 0.0)
    )  # an infinite score does not make a move infinitely good


def test_kernels_show_a_line_integral_and_only_that():
    assert repr(MALA(0.1)) == "MALA(step_size=0.1)"
    shown = repr(HMC(0.1, log_ratio=LineIntegral(None)))
    assert (
        "log_ratio=LineIntegral(num_points=None, rule='trapezoid', tolerance=inf)"
        in shown
    )


SHARE, CENTRES, WIDTHS = (
    np.array([0.6, 0.4]),
    np.array([-1.0, 2.0]),
    np.array([1.0, 0.5]),
)
UNEVEN = score_only(
    evaluate(
        lambda x: jax.nn.logsumexp(
            jnp.log(SHARE / WIDTHS) - 0.5 * ((x - CENTRES) / WIDTHS) ** 2
        )
    )
)


@pytest.mark.parametrize(
    ("line", "keeps"),
    [
        (LineIntegral(5, "simpson", tolerance=0.1), True),
        (LineIntegral(3, "simpson"), False),
    ],
    ids=["5 nodes, within 0.1 nats", "3 nodes"],
)
def test_steps_from_mode_to_mode(line, keeps):
    """Exact draws of a wide and a narrow mode, moved 30 times by steps as long as their
    distance: the share beyond ½ stays. Three nodes are too few, the negative
    control."""
    n, rng = 40_000, np.random.default_rng(0)
    which = rng.choice(2, n, p=SHARE)
    x = jnp.asarray(
        CENTRES[which] + WIDTHS[which] * rng.standard_normal(n), jnp.float32
    )
    share = SHARE @ norm.sf((0.5 - CENTRES) / WIDTHS)
    kernel = MALA(1.0, log_ratio=line)
    begun = start(kernel, UNEVEN, jax.random.key(0), x)
    states, _ = transitions(
        kernel, UNEVEN, jax.random.key(1), begun, kernel.step_size, 30
    )
    found = np.asarray(states.position) > 0.5
    assert np.mean(found != (np.asarray(x) > 0.5)) > 0.3  # they move
    away = abs(found.mean() - share) / np.sqrt(share * (1 - share) / n)
    assert away < 4 if keeps else away > 10


def test_a_step_recorded_by_a_run():
    """The mean over accepted moves at each level, zero for an exact kernel; in the
    summary where it was used."""
    density = cp.compile(single, normal([0.0, 0.0], schedule=cp.Schedule.log_snr(12)))
    for kernel, largest in (
        (MALA(), 0.0),
        (MALA(log_ratio=LineIntegral(3)), 1e-5),
    ):  # of a linear score
        result = run(density, sampler=cp.AnnealedMCMC(kernel, 1))
        errors = result.levels["quadrature_error"]
        assert np.all((errors >= 0) & (errors <= largest))
        assert ("quadrature" in str(result.summary())) == (largest > 0)
