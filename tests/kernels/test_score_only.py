"""MALA and HMC on densities that offer their score only: costs, refusals, and how far from the law they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gamma
from scipy.stats import norm

import composeprob as cp
from composeprob.density.evaluation import Evaluation
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels import HMC, MALA, LineIntegral
from kernel_chains import driven, start, transitions
from kernels.test_line_integral import state, straight
from refusals import refused
from sampling_cases import normal, single
from targets import evaluate, score_only, two_modes

TARGET = score_only(evaluate(two_modes(2).log_density))


def test_the_reversal_is_the_estimate():
    kernel = MALA(0.1, log_ratio=LineIntegral(3))

    @jax.jit
    def step(x):
        first = state(x)
        noise = jnp.array([0.4, -0.7, -8.0])  # log U = −35: it is accepted
        after, info = driven(kernel, noise, first, TARGET, jnp.asarray(0.1))
        return info, straight(kernel.log_ratio, x, after.position)

    info, (estimate, error) = step(jnp.array([0.3, 0.2]))
    assert info.accepted
    np.testing.assert_allclose(info.log_reversal, -estimate, rtol=1e-5)
    np.testing.assert_allclose(info.quadrature_error, error, rtol=1e-4)


def hole(x):
    """A standard normal whose score breaks inside (0.4, 0.6) and (−0.6, −0.4): NaN there, infinite here."""
    score = jnp.select([jnp.abs(x - 0.5) < 0.1, jnp.abs(x + 0.5) < 0.1], [jnp.nan, jnp.inf], -x)
    return Evaluation(None, score)


def test_a_path_over_a_broken_place_is_not_taken():
    over = lambda points: jax.jit(lambda a, b: straight(LineIntegral(points), a, b, hole)[0])
    three, five = over(3), over(5)
    assert np.isnan(five(-1.0, 1.0))  # nodes at ±0.5
    assert np.isfinite(three(-1.0, 1.0))  # a node at 0 only
    assert np.isnan(three(-1.0, 0.0))  # an infinite score does not make a move infinitely good


def test_what_cannot_work_is_refused_when_it_is_written():
    refused(lambda: LineIntegral(4, "simpson"), InvalidValueError, r"odd number.*4.*\n.*5 points")
    refused(lambda: LineIntegral(3, "midpoint"), InvalidValueError, r"Unknown rule 'midpoint'.*\n.*simpson")
    refused(lambda: LineIntegral(1), InvalidValueError, "at least 2")
    refused(lambda: LineIntegral(2.5), WrongTypeError, "whole number")
    refused(lambda: LineIntegral(tolerance=0.0), InvalidValueError, "accepts no move")
    refused(lambda: LineIntegral(2, tolerance=0.1), InvalidValueError, r"no estimate.*\n.*3 points")
    along = LineIntegral(None, tolerance=0.1)
    refused(lambda: HMC(0.1, 1, log_ratio=along), InvalidValueError, r"no estimate.*\n.*num_leapfrog=2")
    refused(lambda: MALA(0.1, log_ratio=LineIntegral(None)), InvalidValueError, r"no trajectory.*\n.*num_points=3")
    with pytest.raises(InvalidValueError, match=r"even number of leapfrogs.*3.*\n.*num_leapfrog=4"):
        HMC(0.1, 3, log_ratio=LineIntegral(None, "simpson"))
    for kernel in (MALA, HMC):
        refused(lambda: kernel(0.1, log_ratio="line"), WrongTypeError, "'line'")


def test_kernels_show_a_line_integral_and_only_that():
    assert repr(MALA(0.1)) == "MALA(step_size=0.1)"
    assert "log_ratio=LineIntegral(num_points=None, rule='trapezoid', tolerance=inf)" in repr(
        HMC(0.1, log_ratio=LineIntegral(None))
    )


QUARTIC = score_only(evaluate(lambda x: -(x**4) / 4))
SECOND_MOMENT = 2 * gamma(3 / 4) / gamma(1 / 4)
"""E x² of exp(−x⁴/4)."""


def second_moment(kernel, target=QUARTIC, num_chains=10_000, count=40):
    """E x² that chains settle at, and its standard error; they start from exact draws of exp(−x⁴/4)."""
    u = jax.random.gamma(jax.random.key(0), 0.25, (num_chains,))  # x⁴/4 ~ Gamma(1/4)
    x = jnp.sqrt(2 * jnp.sqrt(u)) * jax.random.rademacher(jax.random.key(1), (num_chains,))
    states = start(kernel, target, jax.random.key(2), x)
    states, _ = transitions(kernel, target, jax.random.key(3), states, kernel.step_size, count)
    x2 = np.asarray(states.position) ** 2
    return x2.mean(), x2.std() / np.sqrt(num_chains)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda n: MALA(0.3, log_ratio=n), lambda n: HMC(0.5, 3, log_ratio=n)])
def test_more_points_have_less_bias(make):
    errors = []
    for n in (2, 5):
        found, noise = second_moment(make(LineIntegral(n)))
        errors.append(abs(found - SECOND_MOMENT))
    assert errors[0] > 4 * noise  # a negative control: the trapezoid alone trusts the tails too little
    assert errors[0] > 3 * errors[1]
    exact, noise = second_moment(make(LineIntegral(3, "simpson")))  # exact for this cubic score
    assert abs(exact - SECOND_MOMENT) < 4 * noise


SHARE, CENTRES, WIDTHS = np.array([0.6, 0.4]), np.array([-1.0, 2.0]), np.array([1.0, 0.5])
UNEVEN = score_only(evaluate(lambda x: jax.nn.logsumexp(jnp.log(SHARE / WIDTHS) - 0.5 * ((x - CENTRES) / WIDTHS) ** 2)))


@pytest.mark.parametrize(
    ("line", "keeps"),
    [(LineIntegral(5, "simpson", tolerance=0.1), True), (LineIntegral(3, "simpson"), False)],
    ids=["5 nodes, within 0.1 nats", "3 nodes"],
)
def test_steps_from_mode_to_mode(line, keeps):
    """Exact draws of a wide and a narrow mode, moved 30 times by steps as long as their distance: the share beyond ½
    stays. Three nodes are too few, the negative control."""
    n, rng = 40_000, np.random.default_rng(0)
    which = rng.choice(2, n, p=SHARE)
    x = jnp.asarray(CENTRES[which] + WIDTHS[which] * rng.standard_normal(n), jnp.float32)
    share = SHARE @ norm.sf((0.5 - CENTRES) / WIDTHS)
    kernel = MALA(1.0, log_ratio=line)
    states, _ = transitions(
        kernel, UNEVEN, jax.random.key(1), start(kernel, UNEVEN, jax.random.key(0), x), kernel.step_size, 30
    )
    found = np.asarray(states.position) > 0.5
    assert np.mean(found != (np.asarray(x) > 0.5)) > 0.3  # they move
    away = abs(found.mean() - share) / np.sqrt(share * (1 - share) / n)
    assert away < 4 if keeps else away > 10


def test_a_step_recorded_by_a_run():
    """The mean over accepted moves at each level, zero for an exact kernel; in the summary where it was used."""
    density = cp.compile(single, normal([0.0, 0.0], schedule=cp.Schedule.log_snr(4)))
    results = {}
    for name, kernel in {
        "exact": MALA(),
        "line": MALA(log_ratio=LineIntegral(3)),
    }.items():
        sampler = cp.AnnealedMCMC(kernel, 1)
        results[name] = cp.infer(density, jax.random.key(0), num_chains=64, sampler=sampler, progress=False)
    assert np.all(results["exact"].levels["quadrature_error"] == 0)
    assert np.all(
        (results["line"].levels["quadrature_error"] >= 0) & (results["line"].levels["quadrature_error"] < 1e-5)
    )  # linear score
    assert "quadrature" in str(results["line"].summary())
    assert "quadrature" not in str(results["exact"].summary())
