"""Importance samples from the factors: their density, their findings about chains that
miss a mode, and none about right ones."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import norm

import composeprob as cp
from composeprob import tuning
from composeprob.compiler.pipeline import lowered
from composeprob.findings import Code, Finding
from composeprob.results import importance
from composeprob.results.checks.one_chain import OneChain
from composeprob.results.ended import Ending
from composeprob.results.estimates import Genealogy
from composeprob.results.importance import Unlike, can_draw, unlike
from messages import check_finding, check_wording
from sampling_cases import modes, normal, run, single
from test_comparison import drawn as compared
from zscores import assert_agrees, z_scores

LEVELS = cp.Schedule.log_snr(40)
ENOUGH = 1e6
TWO = ([0.3, 0.7], [-3.0, 3.0], [0.5, 0.3])
WIDTHS = np.array([0.5, 0.25])


def mixture(shares, means, sds, schedule=LEVELS):
    return cp.Analytic(modes(shares, means, sds), schedule)


def points(rng, n, shares, means, sds):
    """Draws of a Gaussian mixture."""
    means = np.asarray(means, float)
    sds = np.asarray(sds, float)
    which = rng.choice(len(shares), n, p=np.asarray(shares) / np.sum(shares))
    widths = sds[which].reshape(-1, *[1] * (means.ndim - 1))
    return means[which] + widths * rng.normal(size=means[which].shape)


SQUARED = (WIDTHS**-10.0, 1.5 * np.stack([-np.ones(10), np.ones(10)]), WIDTHS / 2**0.5)
"""Shares, means and standard deviations of the modes of `squared`."""


def squared():
    """(.5 N(−m, .5²) + .5 N(m, .25²))² in ten numbers."""
    return mixture([0.5, 0.5], SQUARED[1], WIDTHS) ** 2


def power():
    return mixture([0.6, 0.4], [-3.0, 3.0], [1.0, 0.1]) ** 20


def unimodal(d, power):
    return cp.Analytic(dist.Normal(jnp.zeros(d), 1.0).to_event(1), LEVELS) ** power


def bits(d):
    each = dist.MixtureSameFamily(
        dist.Categorical(probs=jnp.full((d, 2), 0.5)),
        dist.Normal(jnp.stack([-jnp.ones(d), jnp.ones(d)], -1), 0.2),
    )
    return cp.Analytic(each, LEVELS) ** 2


def energy(fn, d):
    prior = cp.Analytic(dist.Normal(jnp.zeros(d), 1.0).to_event(1), LEVELS)
    return prior * cp.Energy(lambda x, level: fn(x), LEVELS, event_shape=(d,))


def on_a_shell():
    return energy(
        lambda x: -0.5 * ((jnp.sqrt(jnp.sum(x**2) + 1e-9) - 1.5) / 0.05) ** 2, 3
    )


def shell(rng, n, d=3):
    x = rng.normal(size=(n, d))
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    return units * (1.5 + 0.05 * rng.normal(size=(n, 1)))


def codes(density, x, key=0, evaluations=ENOUGH):
    """Codes of the findings about independent chains at x."""
    positions = {"x": np.asarray(x, np.float32)}
    independent = Genealogy.from_ancestors(np.ones(len(x)), np.arange(len(x)))
    key = jax.random.key(key)
    found = unlike(density, positions, independent, key, evaluations)
    codes = []
    if found.unreached:
        codes.append("modes_unreached")
    if found.shares:
        codes.append("shares_frozen")
    return codes


def corners(rng, n, d, fixed=()):
    ones = np.where(np.isin(np.arange(d), fixed), 1, rng.choice([-1, 1], (n, d)))
    return ones + 0.2 / 2**0.5 * rng.normal(size=(n, d))


# By name: a factor, and draws of its distribution or of a wrong one, with the finding.
RIGHT = {
    "unimodal in 1": (
        lambda: unimodal(1, 3),
        lambda rng, n: rng.normal(size=(n, 1)) / 3**0.5,
    ),
    "unimodal in 40": (
        lambda: unimodal(40, 2),
        lambda rng, n: rng.normal(size=(n, 40)) / 2**0.5,
    ),
    "two modes": (lambda: mixture(*TWO), lambda rng, n: points(rng, n, *TWO)),
    "squared": (squared, lambda rng, n: points(rng, n, *SQUARED)),
    "power 20": (power, lambda rng, n: 3 + 0.1 / 20**0.5 * rng.normal(size=n)),
    "4,096 modes": (lambda: bits(12), lambda rng, n: corners(rng, n, 12)),
    "shell": (on_a_shell, shell),
}
WRONG = {
    "one of two modes": (
        lambda: mixture(*TWO),
        lambda rng, n: -3 + 0.5 * rng.normal(size=n),
        "modes_unreached",
    ),
    "wide mode of a power": (
        power,
        lambda rng, n: -3 + rng.normal(size=n) / 20**0.5,
        "modes_unreached",
    ),
    "wide mode squared": (
        squared,
        lambda rng, n: points(rng, n, [1.0, 0.0], *SQUARED[1:]),
        "modes_unreached",
    ),
    "one bit fixed": (
        lambda: bits(5),
        lambda rng, n: corners(rng, n, 5, [0]),
        "modes_unreached",
    ),
    "shares": (
        squared,
        lambda rng, n: points(rng, n, [0.5, 0.5], *SQUARED[1:]),
        "shares_frozen",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_chains_have_no_finding(name):
    factor, draw = RIGHT[name]
    density = cp.compile(single, factor())
    rng = np.random.default_rng(0)
    for n in (64, 1000):
        for key in range(5):
            assert codes(density, draw(rng, n), key) == []


@pytest.mark.parametrize("name", WRONG)
def test_wrong_chains_have_the_finding(name):
    factor, draw, code = WRONG[name]
    density = cp.compile(single, factor())
    rng = np.random.default_rng(0)
    assert [codes(density, draw(rng, 1000), key) for key in range(5)] == [[code]] * 5
    if code == "modes_unreached":
        few = [codes(density, draw(rng, 64), key) == [code] for key in range(5)]
        assert sum(few) >= 4


def spiked():
    """Nearly all of π₀ is in a spike that no draw of the prior comes near to, the rest
    about (−.4, −.4)."""

    def logs(x):
        spike = 17 - 0.5 * jnp.sum((x - 1) ** 2) / 0.003**2
        return jnp.logaddexp(spike, -0.5 * jnp.sum((x + 0.5) ** 2) / 0.25)

    noise = np.random.default_rng(0).normal(size=(200, 2))
    return cp.compile(single, energy(logs, 2)), 1 + 0.003 * noise


def many_modes():
    return cp.compile(single, bits(12)), corners(np.random.default_rng(0), 200, 12)


MUTANTS = {
    "places that importance samples cannot reach": (
        spiked,
        importance,
        "_share_unknown",
        lambda *_: 0.0,
    ),
    "modes that few chains cannot all reach": (
        many_modes,
        importance.WeightedSample,
        "share",
        lambda *_, **__: importance.Share(0.0, 0.0),
    ),
}


@pytest.mark.parametrize(
    ("make", "owner", "name", "mutant"), MUTANTS.values(), ids=MUTANTS
)
def test_modes_are_taken_for_missing_only_without_the_two_corrections(
    make, owner, name, mutant, monkeypatch
):
    """Importance samples are few, and chains are compared with one another."""
    density, x = make()
    assert codes(density, x) == []
    monkeypatch.setattr(owner, name, mutant)
    assert codes(density, x) == ["modes_unreached"]


def test_copies_of_one_chain_are_near_for_another_reason():
    density = cp.compile(single, bits(12))
    rng = np.random.default_rng(0)
    origin = np.repeat(np.arange(100), 10)
    signs = np.repeat(rng.choice([-1.0, 1.0], (100, 12)), 10, axis=0)
    x = signs + 0.14 * rng.normal(size=(1000, 12))
    positions = {"x": x.astype(np.float32)}
    genealogy = Genealogy.from_ancestors(np.ones(1000), origin)
    key = jax.random.key(0)
    assert unlike(density, positions, genealogy, key, ENOUGH) == Unlike()
    assert codes(density, x) == ["modes_unreached"]  # as if they were independent


def test_few_evaluations_leave_the_check_out():
    density = cp.compile(single, power())
    x = -3 + np.random.default_rng(0).normal(size=200) / 20**0.5
    block = tuning.IMPORTANCE.block
    assert codes(density, x, evaluations=block - 1) == []
    assert codes(density, x, evaluations=block) == ["modes_unreached"]


def drawn(density, number=4000):
    """Draws of π₀'s proposal, with log π₀ and log-weight; in one compilation."""

    def weighted(key):
        position = density.evaluator.draw(key)
        return position, density.evaluator.importance(position)

    return jax.jit(jax.vmap(weighted))(jax.random.split(jax.random.key(0), number))


def test_draws_have_the_density_of_their_weights():
    """Half of the draws of f²·g/h are from f, half from g, and none from the
    denominator."""
    f, g, h = (normal(m, s, LEVELS) for m, s in ((-1.0, 0.5), (2.0, 1.0), (0.0, 3.0)))
    density = cp.compile(single, f**2 * g / h)
    positions, (log_density, log_weight) = drawn(density)
    x = np.asarray(positions["x"])
    exact = np.log(0.5 * norm.pdf(x, -1, 0.5) + 0.5 * norm.pdf(x, 2, 1))
    np.testing.assert_allclose(np.asarray(log_density - log_weight), exact, atol=0.02)
    assert_agrees(
        z_scores({"x": x, "x²": x**2}, {"x": 0.5, "x²": 0.5 * (1 + 0.25 + 4 + 1)})
    )
    weights = np.exp(log_weight - log_weight.max())
    precision = 2 / 0.25 + 1 - 1 / 9
    assert abs(np.average(x, weights=weights) - (2 * -1 / 0.25 + 2) / precision) < 0.05


@cp.program
def study(y):
    mu = cp.sample("mu", dist.Normal(1.0, 0.5))
    tau = cp.sample("tau", dist.LogNormal(0.0, 0.3))
    x = cp.sample(
        "x", cp.Analytic(dist.Normal(mu * jnp.ones(2), tau).to_event(1), LEVELS)
    )
    z = cp.sample("z", dist.Normal(x[0], 0.1))
    cp.observe("y", dist.Normal(z, 1.0), y)


def test_latents_are_drawn_in_the_order_of_the_program():
    density = cp.compile(study, jnp.float32(0.3))
    positions, (_, log_weight) = drawn(density)
    values = {
        name: np.asarray(v)
        for name, v in jax.vmap(density.to_samples)(positions).items()
    }
    mu, tau, x, z = (values[name] for name in ("mu", "tau", "x", "z"))
    units = (x - mu[:, None]) / tau[:, None]
    values = {
        "mu": mu,
        "log tau": np.log(tau),
        "x": units,
        "x²": units**2,
        "z": (z - x[:, 0]) / 0.1,
    }
    assert_agrees(z_scores(values, {"mu": 1, "log tau": 0, "x": 0, "x²": 1, "z": 0}))
    # The likelihood alone is left of π₀/q.
    left = np.asarray(log_weight) - norm.logpdf(0.3, z, 1.0)
    np.testing.assert_allclose(left - left.mean(), 0.0, atol=1e-3)


def test_mixtures_can_be_drawn_from_and_networks_cannot():
    parts = [normal(m, 0.5, LEVELS) for m in (-2.0, 2.0)]
    positions, _ = drawn(cp.compile(single, cp.mixture(parts, weights=[0.2, 0.8])))
    assert_agrees(z_scores({"share": np.asarray(positions["x"] > 0)}, {"share": 0.8}))
    assert can_draw(cp.compile(single, cp.mixture(parts)))
    assert not can_draw(cp.compile(single, cp.load("ring2d")))
    one = cp.Analytic(dist.Normal(jnp.zeros(1), 0.5).to_event(1), LEVELS)
    windows = cp.window(one, (2,), (0,)) * cp.window(one, (2,), (1,))
    assert not can_draw(cp.compile(single, windows))


def test_runs_that_miss_the_same_mode_have_the_finding_alone_and_in_comparison():
    """Reverse diffusion of summed scores puts next to no chain into a mode that holds a
    fifth of a squared mixture."""
    factor = mixture([0.95, 0.05], [[-2.0, 0.0], [2.0, 0.0]], [0.5, 0.05])
    density = lowered(single, (factor**2,), {}, growing=False)
    one, other = (run(density, k, 1000, sampler=cp.Ancestral()) for k in range(2))
    assert np.mean(one["x"][:, 0] > 0) < 0.02
    comparison = one.compare(other)
    missing = max(comparison.missing_here, comparison.missing_there)
    assert missing < tuning.COMPARISON.least
    assert comparison.status.has("modes_unreached")
    message = check_finding(comparison.status, "modes_unreached")
    assert "x = (2" in message or "x = (1.9" in message
    assert np.isnan(one.mean(lambda s: s["x"][0]).error)


def test_a_comparison_reports_unreached_modes_of_either_run():
    rng = np.random.default_rng(0)
    one = compared(rng)
    other = compared(rng)
    assert not one.compare(other).status.has("modes_unreached")
    finding = Finding(Code.MODES_UNREACHED, "A mode was missed.", True)
    object.__setattr__(other, "status", other.status.with_findings(finding))
    assert one.compare(other).status.has("modes_unreached")
    third = compared(rng)
    object.__setattr__(third, "status", other.status)
    assert len(other.compare(third).status.findings) == 1


@pytest.mark.parametrize("apart", [True, False])
def test_draws_of_one_chain_are_compared_with_importance_samples(apart):
    """A chain that stays in one of two modes had a mean with the error of that mode."""
    means = TWO[1] if apart else [0.0, 0.1]
    density = cp.compile(single, mixture(TWO[0], means, TWO[2]))
    result = run(density, chains=1, draws=100)
    assert result.status.has(Code.MODES_UNREACHED) == apart
    assert np.isnan(result.mean(lambda s: s["x"]).error) == apart


def test_draws_that_nothing_can_be_compared_with_have_no_error():
    def asked(density, chains, drawn, round_trips=np.nan):
        return OneChain().ask(
            SimpleNamespace(
                density=density,
                num_chains=chains,
                ending=Ending(drawn=drawn, asked=drawn),
                trust=cp.Trust(num_chains=chains, round_trips=round_trips),
            )
        )

    closed_form = cp.compile(single, mixture(*TWO))
    learned = cp.compile(single, cp.load("ring2d"))
    (finding,) = asked(learned, 1, 1000)
    check_wording(finding.message)
    # Twenty draws are too few to be compared.
    assert asked(closed_form, 1, 20)
    assert not asked(closed_form, 1, 1000)
    assert not asked(learned, 2, 1000)
    assert not asked(learned, 1, 0)  # no draws, and so no error
    assert not asked(learned, 1, 1000, round_trips=3.0)  # replicas
