"""Line integrals of the score, in double precision: value, order, symmetry, and the
error that they report.

And accept tests of MALA and HMC for densities that offer only their score."""

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
    """Return log π(y) − log π(x) along the straight line, and its error, evaluation by
    evaluation."""
    start = state(x, target)
    end = state(y, target)
    last = line.extra_evaluations

    def onward(i, carry):
        path, point = carry
        path = line.record(i, 1, path, start, point)
        return path, state(line.node(i + 1, path, start), target)

    path, point = jax.lax.fori_loop(0, last, onward, (line.begin(start, 1), end))
    return line.finish(1, path, start, point)[1:]


def along_trajectory(rule, x, v, target, h, num_leapfrog):
    """Return the end of a trajectory of HMC whose momentum is ``v``, and the integral
    along it with its error."""
    kernel = HMC(0.1, num_leapfrog, damping=0.0, log_ratio=LineIntegral(None, rule))
    begin = HamiltonianState(x, target(x), v)
    momentum = jax.flatten_util.ravel_pytree(v)[0]
    # log U = −35: it is accepted.
    noise = jnp.append(momentum, jnp.array([-8.0, 0.0]))
    end, info = driven(kernel, noise, begin, target, h)
    return end, (-info.log_reversal, info.quadrature_error)


@jax.jit
def true_ratio(x, y):
    return LAW.log_density(y) - LAW.log_density(x)


def of_a_line(rule, refine, x, v):
    y = x + 0.5 * v
    return straight(LineIntegral(16 * refine + 1, rule), x, y)[0] - true_ratio(x, y)


def of_a_trajectory(rule, refine, x, v):
    end, (log_ratio, _) = along_trajectory(rule, x, v, TARGET, 0.2 / refine, 6 * refine)
    return log_ratio - true_ratio(x, end.position)


def points_and_momenta(count):
    """Return draws of the law and of momenta, in double precision if that is on."""
    x = LAW.draw(jax.random.key(0), count).astype(float)
    return x, jax.random.normal(jax.random.key(1), x.shape)


@pytest.mark.parametrize("error", [of_a_line, of_a_trajectory])
@pytest.mark.parametrize(("rule", "expected"), [("trapezoid", 2), ("simpson", 4)])
def test_the_error_has_the_order_of_its_rule(error, rule, expected):
    refinements = np.array([1, 2, 4, 8])
    errors = []
    with jax.enable_x64(True):
        x, v = points_and_momenta(100)
        for refine in refinements:
            differences = jax.jit(jax.vmap(partial(error, rule, int(refine))))(x, v)
            errors.append(float(jnp.sqrt(jnp.mean(differences**2))))
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
    """Moves are small beside the curvature of the target, as accepted ones are."""
    with jax.enable_x64(True):
        x, v = points_and_momenta(200)
        y = x + 0.3 * v
        line = LineIntegral(points, rule)
        log_ratio, estimate = jax.jit(jax.vmap(partial(straight, line)))(x, y)
        error = np.abs(log_ratio - jax.vmap(true_ratio)(x, y))
        estimate = np.asarray(estimate)
    assert np.median(estimate) == pytest.approx(np.median(error), rel=0.15)
    assert np.mean(estimate) == pytest.approx(np.mean(error), rel=0.15)


def test_the_coarse_rule():
    trapezoid = {1: None, 2: 2, 3: 3, 4: 2, 9: 3, 35: 5}
    assert {n: coarse_stride("trapezoid", n) for n in trapezoid} == trapezoid
    simpson = {2: None, 4: 2, 6: 3, 8: 2, 10: 5, 18: 3}
    assert {n: coarse_stride("simpson", n) for n in simpson} == simpson


def test_errors_that_cannot_be_estimated():
    with jax.enable_x64(True):
        x, y = LAW.draw(jax.random.key(0), 2).astype(float)
        lines = LineIntegral(2), LineIntegral(3, "simpson"), LineIntegral(3)
        integrals = jax.jit(lambda a, b: [straight(line, a, b) for line in lines])
        (_, none), (simpson, estimate), (trapezoid, _) = integrals(x, y)
        assert np.isnan(none)
        np.testing.assert_allclose(estimate, abs(simpson - trapezoid), rtol=1e-10)


def along_a_line(points, rule, x, v):
    line = LineIntegral(points, rule)
    y = x + 0.5 * v
    return straight(line, x, y), straight(line, y, x)


def along_a_reversed_trajectory(points, rule, x, v):
    end, there = along_trajectory(rule, x, v, TARGET, 0.3, points - 1)
    _, back = along_trajectory(
        rule, end.position, -end.momentum, TARGET, 0.3, points - 1
    )
    return there, back


@pytest.mark.parametrize(
    ("path", "tolerance"), [(along_a_line, 1e-13), (along_a_reversed_trajectory, 1e-10)]
)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("points", [5, slow(3), slow(9)])
def test_antisymmetric(path, tolerance, points, rule):
    with jax.enable_x64(True):
        x, v = points_and_momenta(50)
        there, back = jax.jit(jax.vmap(partial(path, points, rule)))(x, v)
    assert np.abs(there[0]).max() > 1
    np.testing.assert_allclose(there[0], -back[0], atol=tolerance)
    np.testing.assert_allclose(there[1], back[1], atol=tolerance)


def power(exponent):
    """Return a target whose log-density is −Σ xᵖ/p over the leaves of a pytree."""

    def log_density(position):
        sums = [jnp.sum(leaf**exponent) for leaf in jax.tree.leaves(position)]
        return -sum(sums) / exponent

    return evaluate(log_density)


def test_exact_where_it_must_be():
    """The trapezoid on linear scores, Simpson's rule on cubic ones, on pytrees, and
    along bent trajectories."""
    gaussian = power(2)
    quartic = power(4)

    def position(seed):
        draws = nested().draw(jax.random.key(seed), 1)
        return jax.tree.map(lambda leaf: leaf[0].astype(float), draws)

    @jax.jit
    def estimates_and_truths(x, y):
        def difference(target, end):
            return target(end).log_density - target(x).log_density

        pairs = []
        for target, line in (
            (gaussian, LineIntegral(2)),
            (quartic, LineIntegral(3, "simpson")),
        ):
            log_ratio, _ = straight(line, x, y, target)
            pairs.append((log_ratio, difference(target, y)))
        for rule in RULES:
            end, (log_ratio, _) = along_trajectory(rule, x, y, gaussian, 0.4, 4)
            pairs.append((log_ratio, difference(gaussian, end.position)))
        return pairs

    with jax.enable_x64(True):
        for estimate, true in estimates_and_truths(position(0), position(1)):
            np.testing.assert_allclose(estimate, true, rtol=1e-12)


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
    """Return the evaluation of a standard normal whose score is NaN inside (0.4, 0.6)
    and infinite inside (−0.6, −0.4)."""
    score = jnp.select(
        [jnp.abs(x - 0.5) < 0.1, jnp.abs(x + 0.5) < 0.1], [jnp.nan, jnp.inf], -x
    )
    return Evaluation(None, score)


def test_a_path_over_a_broken_place_is_not_taken():
    def log_ratio(points):
        line = LineIntegral(points)
        return jax.jit(lambda a, b: straight(line, a, b, hole)[0])

    three = log_ratio(3)
    five = log_ratio(5)
    assert np.isnan(five(-1.0, 1.0))  # nodes at ±0.5
    assert np.isfinite(three(-1.0, 1.0))  # a node at 0 only
    # An infinite score does not make a move infinitely good.
    assert np.isnan(three(-1.0, 0.0))


def test_kernels_show_a_line_integral_and_only_that():
    assert repr(MALA(0.1)) == "MALA(step_size=0.1)"
    line = "LineIntegral(num_points=None, rule='trapezoid', tolerance=inf)"
    assert f"log_ratio={line}" in repr(HMC(0.1, log_ratio=LineIntegral(None)))


SHARE = np.array([0.6, 0.4])
CENTRES = np.array([-1.0, 2.0])
WIDTHS = np.array([1.0, 0.5])


def uneven(x):
    """Return the log-density of a wide and a narrow mode, up to a constant."""
    squares = ((x - CENTRES) / WIDTHS) ** 2
    return jax.nn.logsumexp(jnp.log(SHARE / WIDTHS) - 0.5 * squares)


UNEVEN = score_only(evaluate(uneven))


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
    n = 40_000
    rng = np.random.default_rng(0)
    mode = rng.choice(2, n, p=SHARE)
    draws = CENTRES[mode] + WIDTHS[mode] * rng.standard_normal(n)
    x = jnp.asarray(draws, jnp.float32)
    share = SHARE @ norm.sf((0.5 - CENTRES) / WIDTHS)
    kernel = MALA(1.0, log_ratio=line)
    begun = start(kernel, UNEVEN, jax.random.key(0), x)
    states, _ = transitions(
        kernel, UNEVEN, jax.random.key(1), begun, kernel.step_size, 30
    )
    beyond = np.asarray(states.position) > 0.5
    assert np.mean(beyond != (np.asarray(x) > 0.5)) > 0.3  # they move
    z = abs(beyond.mean() - share) / np.sqrt(share * (1 - share) / n)
    assert z < 4 if keeps else z > 10


def test_a_step_recorded_by_a_run():
    """The mean over accepted moves at each level, zero for an exact kernel; in the
    summary where it was used."""
    density = cp.compile(single, normal([0.0, 0.0], schedule=cp.Schedule.log_snr(12)))
    by_score = MALA(log_ratio=LineIntegral(3))  # of a linear score: exact but rounding
    for kernel, largest in ((MALA(), 0.0), (by_score, 1e-5)):
        result = run(density, sampler=cp.AnnealedMCMC(kernel, 1))
        errors = result.levels["quadrature_error"]
        assert np.all((errors >= 0) & (errors <= largest))
        assert ("quadrature" in str(result.summary())) == (largest > 0)
