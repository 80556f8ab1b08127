"""The Feynman–Kac rate is the residual of the Fokker–Planck equation, by automatic
differentiation in (x, t).

r is defined by ∂_t F = 𝓛F − g²·r·F with 𝓛F = −f·∇·(xF) + ½g²·ΔF, so

    g²·r = −f·(d + ⟨x, S⟩) + ½g²·(‖S‖² + ∇·S) − ∂_t log F,    S = ∇ log F.

The density's levels are replaced by functions α(t), σ(t) of a time that is
differentiated.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from compiler.networks import Moved, gaussian
from composeprob.factors.calibrated import (
    ERROR,
    KNOTS,
    LOG_NORMALISER,
    CalibratedExpression,
)
from refusals import refused
from sampling_cases import measured, modes, single, slow

pytestmark = pytest.mark.usefixtures("double_precision")

TIMES = np.linspace(0.05, 2.0, 821)
"""Times from almost no noise to noise alone."""


@dataclass(frozen=True)
class Diffusion:
    """A forward diffusion dx = f·x dt + g dW in closed form: α, σ and the coefficients
    as functions of t."""

    name: str
    alpha: object
    sigma: object

    def drift(self, t):
        """f = d log α/dt."""
        return jax.grad(lambda t: jnp.log(self.alpha(t)))(t)

    def squared_noise(self, t):
        """g² = dσ²/dt − 2f·σ²."""
        slope = jax.grad(lambda t: self.sigma(t) ** 2)(t)
        return slope - 2 * self.drift(t) * self.sigma(t) ** 2

    def schedule(self):
        return schedule_of(self)


@functools.cache
def schedule_of(diffusion):
    at_times = jax.vmap(lambda t: (diffusion.alpha(t), diffusion.sigma(t)))
    alpha, sigma = jax.jit(at_times)(TIMES)
    return cp.Schedule.from_arrays(alpha, sigma)


def log_alpha(t):
    return -0.25 * t**2 * 9.0 - 0.5 * t * 0.3


VP = Diffusion(
    "VP",
    lambda t: jnp.exp(log_alpha(t)),
    lambda t: jnp.sqrt(-jnp.expm1(2 * log_alpha(t))),
)
VE = Diffusion("VE", lambda t: jnp.ones_like(t), lambda t: 0.05 * jnp.exp(4.0 * t))
# Neither: its f/g² is not constant, and the schedule knows it only by differences
# between levels.
OTHER = Diffusion("other", lambda t: jnp.exp(-0.4 * t), lambda t: 0.1 + 0.9 * t**2)
DIFFUSIONS = [VP, VE, OTHER]


def one_of(which):
    """The diffusion of that number, which may be traced: code that is compiled for one
    serves all."""

    def alpha(t):
        return jnp.stack([diffusion.alpha(t) for diffusion in DIFFUSIONS])[which]

    def sigma(t):
        return jnp.stack([diffusion.sigma(t) for diffusion in DIFFUSIONS])[which]

    return Diffusion("one of all", alpha, sigma)


def at_time(density, diffusion, t):
    """The density with every level's noise replaced by that of time t."""
    alpha = diffusion.alpha(t)
    sigma = diffusion.sigma(t)
    levels = jnp.ones(density.num_levels)
    old = density.schedule
    drift_ratio = diffusion.drift(t) / diffusion.squared_noise(t)
    new = cp.Schedule(alpha * levels, sigma * levels, drift_ratio * levels)
    density = eqx.tree_at(
        lambda d: (d.schedule, d.evaluator.schedule), density, (new, new)
    )
    for i, batch in enumerate(density.evaluator.batches):
        if batch.own_noise is None:
            continue
        # Windows that average see noise divided by a constant.
        narrower = batch.own_noise.sigma / old.sigma
        own = eqx.tree_at(
            lambda n: (n.alpha, n.sigma),
            batch.own_noise,
            (alpha * levels, sigma * narrower),
        )
        density = eqx.tree_at(
            lambda d, i=i: d.evaluator.batches[i].own_noise, density, own
        )
    return density


def residual(density, diffusion, x, t):
    """The rate by the equation, at a flat x; the density's own rate; and its part from
    scores alone."""
    shapes = {name: info.shape for name, info in density.sites.items()}

    def position(x):
        parts = jnp.split(x, np.cumsum([math.prod(s) for s in shapes.values()])[:-1])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def value_and_score(x, t):
        here = at_time(density, diffusion, t)
        terms = here.evaluate(position(x), 0).terms
        _, rate = here.score_and_rate(position(x), 0)
        score = jnp.concatenate([terms.drift[name].ravel() for name in shapes])
        log_density = terms.log_marginal + terms.log_exact
        return (log_density, score), (score, rate, terms.rate)

    # One forward-mode pass gives ∂_t log F and, with the score of the library, the
    # divergence ∇·S.
    derivatives = jax.jacfwd(value_and_score, argnums=(0, 1), has_aux=True)
    ((_, change), (hessian, _)), (s, rate, of_scores) = derivatives(x, t)
    f = diffusion.drift(t)
    g2 = diffusion.squared_noise(t)
    drifted = f * (x.size + x @ s)
    diffused = 0.5 * g2 * (s @ s + jnp.trace(hessian))
    return (-drifted + diffused - change) / g2, rate, of_scores


POINTS = np.array([[0.3, -0.5], [1.0, 0.4], [-0.6, 0.2]])


def gaussians(seed, shape=(2,)):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(2, *shape))
    return modes([0.3, 0.7], means, rng.uniform(0.3, 0.9, (2, *shape)))


SCHEDULE = VP  # the factors are exact at any levels; compile chooses them


def moved():
    return Moved(SCHEDULE.schedule())


def leaf(seed, shape=(2,)):
    return cp.Analytic(gaussians(seed, shape), SCHEDULE.schedule())


def normalised(factor, degree):
    """A calibrated factor with made-up normalisers: the equation holds for any."""
    knots = np.linspace(-9.0, 7.0, 12)
    tables = {
        KNOTS: knots,
        LOG_NORMALISER: np.sin(knots) - 0.3 * knots,
        ERROR: np.zeros(12),
    }
    return CalibratedExpression(
        factor=factor,
        schedule=SCHEDULE.schedule(),
        fixed=tables,
        degree=degree,
        event_shape=factor.event_shape,
    )


def product():
    return leaf(0) * leaf(1)


EXPRESSIONS = {
    "leaf": lambda: leaf(0),
    "box": lambda: cp.Analytic(
        dist.Uniform(jnp.array([-0.5, 0.0]), jnp.array([0.4, 1.0])), SCHEDULE.schedule()
    ),
    "quotient": lambda: leaf(0) ** 3 / leaf(1),
    "mixture of calibrated products": lambda: cp.mixture(
        [normalised(product(), 4.0), leaf(2)], [0.3, 0.7]
    ),
    "window of a calibrated product": lambda: (
        cp.window(normalised(product(), 4.0), (4,), (0,), scale=2) ** 0.7
        * leaf(9, (4,))
    ),
    "product over a mixture of products": lambda: (
        leaf(4) * cp.mixture([product(), leaf(2)], log_weights=[0.0, 1.0]) ** 0.8
    ),
    "averaging window": lambda: (
        cp.window(leaf(0), (4,), (0,), scale=2) ** 0.7
        * leaf(9, (4,))
        * cp.window(leaf(3), (4,), (1,))
    ),
    "mixture over data": lambda: cp.mixture(
        moved(), over={"c": POINTS}, weights=[1, 2, 1]
    ),
    "product over mixtures over data": lambda: cp.product(
        cp.mixture([moved(), leaf(1)], [0.2, 0.8])
        * cp.mixture(moved(), over={"d": POINTS[:2]}),
        over={"c": POINTS},
    ),
    "mixture over products over data": lambda: cp.mixture(
        cp.product(moved() * leaf(1) ** 0.5, over={"d": POINTS}),
        over={"c": POINTS[:2]},
        log_weights=[0.0, 0.5],
    ),
}
"""Every rule of the rate is in one of these."""
WHOLE = "mixture of calibrated products"
NO_DRIFT_PART = {"leaf", "box", "mixture over data"}
"""Normalised densities of all entries: their rate is 0 without it."""


def rates(density, diffusion, seed=0):
    size = sum(math.prod(info.shape) for info in density.sites.values())
    x = jnp.asarray(np.random.default_rng(seed).normal(size=size))
    which = jnp.asarray(DIFFUSIONS.index(diffusion))
    return compiled(density, which, x, jnp.asarray(0.6))


@eqx.filter_jit
def compiled(density, which, x, t):
    return residual(density, one_of(which), x, t)


@pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=lambda d: d.name)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_rate_is_the_residual(diffusion, name):
    density = cp.compile(single, EXPRESSIONS[name](), schedule=diffusion.schedule())
    assert "feynman_kac" in density.capabilities
    expected, rate, without_drift = rates(density, diffusion)
    np.testing.assert_allclose(rate, expected, rtol=1e-8, atol=1e-8)
    if name in NO_DRIFT_PART:
        np.testing.assert_allclose(rate, 0.0, atol=1e-8)
    elif diffusion is VE or name == WHOLE:
        # VE has no drift, and a normalised mixture counts as one density.
        np.testing.assert_allclose(without_drift, rate, rtol=1e-12)
    else:
        # The negative control: without the drift's part the equation does not hold.
        assert abs(without_drift - expected) > 1e-2


@cp.program
def several(a, b, c):
    cp.sample("x", a * b)
    with numpyro.plate("copies", 2):
        cp.sample("y", c)


def test_rates_of_sites_and_plates_add_up():
    density = cp.compile(several, leaf(0), leaf(1), leaf(2), schedule=VP.schedule())
    expected, rate, _ = rates(density, VP)
    np.testing.assert_allclose(rate, expected, rtol=1e-8, atol=1e-8)


MATRIX = jnp.array([[1.0, 0.5], [0.3, -1.0], [0.2, 0.4]])


@pytest.mark.parametrize(
    "factor", [EXPRESSIONS["leaf"], slow(product)], ids=["leaf", "product"]
)
def test_rate_of_what_is_annealed_exactly(factor):
    """The noised posterior of one factor has the rate 0; with a product of factors it
    has the rate of the rule."""

    def law(x):
        return dist.Normal(MATRIX @ x, 0.6)

    y = jnp.array([0.3, -0.2, 0.5])
    density = cp.compile(measured, factor(), law, y, schedule=VP.schedule())
    expected, rate, _ = rates(density, VP)
    np.testing.assert_allclose(rate, expected, rtol=1e-8, atol=1e-8)
    if factor is not product:
        np.testing.assert_allclose(rate, 0.0, atol=1e-8)
        return
    # The negative control: as if the product of noised factors were the noised product.
    wrong = dataclasses.replace(density.evaluator.likelihood.exact, marginal=True)
    wrong = eqx.tree_at(lambda d: d.evaluator.likelihood.exact, density, wrong)
    _, wrong_rate, _ = rates(wrong, VP)
    assert abs(wrong_rate - expected) > 1e-2


@pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=lambda d: d.name)
def test_schedules_know_their_drift(diffusion):
    """f/g² from the levels: exact for VP and VE, by differences for others."""
    at_times = jax.vmap(lambda t: diffusion.drift(t) / diffusion.squared_noise(t))
    exact = jax.jit(at_times)(TIMES)
    ratio = diffusion.schedule().drift_ratio
    rtol = 2e-3 if diffusion is OTHER else 1e-9
    np.testing.assert_allclose(ratio[1:-1], exact[1:-1], rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("diffusion", [VP, VE], ids=lambda d: d.name)
def test_aligned_models_have_the_rate_of_their_own_density(diffusion):
    """A score-only model trained on other levels, next to an analytic factor: the rate
    of the exact product."""
    wide = cp.Schedule.log_snr(2, min=-20.0, max=20.0)
    network, _ = gaussian(
        "epsilon", (0.0, 0.0), (0.25, 0.25), wide, conditions={"c": 0.0}
    )
    exact = cp.Analytic(dist.Normal(jnp.zeros(2), 0.5), wide)
    schedule = diffusion.schedule()
    x = {"x": jnp.array([0.4, -1.1])}
    by_network = cp.compile(single, network * leaf(1) ** 0.5, schedule=schedule)
    by_formula = cp.compile(single, exact * leaf(1) ** 0.5, schedule=schedule)
    for level in (0, 200, 399):
        terms = by_network.evaluate(x, level).terms
        expected = by_formula.evaluate(x, level).terms
        np.testing.assert_allclose(terms.rate, expected.rate, rtol=1e-8)
        np.testing.assert_allclose(terms.drift["x"], expected.drift["x"], rtol=1e-8)


def test_mixtures_of_unnormalised_factors_have_no_rate():
    def energy(x, t):
        return 0.5 * jnp.sum(x**2)

    model = cp.Diffusion(
        energy, VP.schedule(), event_shape=(2,), parameterization="energy"
    )
    density = cp.compile(single, cp.mixture([model, leaf(0)], log_weights=[0.0, 0.0]))
    assert "feynman_kac" not in density.capabilities
    refused(
        lambda: density.score_and_rate({"x": jnp.zeros(2)}, 3),
        cp.errors.CapabilityError,
    )
