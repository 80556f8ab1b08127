"""Weighed draws of the factors have the law they are weighed for, find what chains
lack, and let right ones be."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import norm

import composeprob as cp
from composeprob import tuning
from composeprob.compiler.pipeline import lowered
from composeprob.results import importance
from composeprob.results.estimates import Genealogy
from composeprob.results.importance import can_draw, unreached
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
    means, sds = np.asarray(means, float), np.asarray(sds, float)
    which = rng.choice(len(shares), n, p=np.asarray(shares) / np.sum(shares))
    return means[which] + sds[which].reshape(-1, *[1] * (means.ndim - 1)) * rng.normal(
        size=means[which].shape
    )


SQUARED = (WIDTHS**-10.0, 1.5 * np.stack([-np.ones(10), np.ones(10)]), WIDTHS / 2**0.5)
"""Shares, means and deviations of what `squared` is."""


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
    return (
        x
        / np.linalg.norm(x, axis=1, keepdims=True)
        * (1.5 + 0.05 * rng.normal(size=(n, 1)))
    )


def found(density, x, key=0, evaluations=ENOUGH):
    positions = {"x": np.asarray(x, np.float32)}
    families = Genealogy.from_ancestors(np.ones(len(x)), np.arange(len(x)))
    return [
        str(code)
        for code, _ in unreached(
            density, positions, families, jax.random.key(key), evaluations
        )
    ]


def corners(rng, n, d, fixed=()):
    ones = np.where(np.isin(np.arange(d), fixed), 1, rng.choice([-1, 1], (n, d)))
    return ones + 0.2 / 2**0.5 * rng.normal(size=(n, d))


# by name: a factor, and draws of its law or of a wrong one, with the finding
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
def test_right_chains_are_not_named(name):
    factor, draw = RIGHT[name]
    density, rng = cp.compile(single, factor()), np.random.default_rng(0)
    assert not any(
        found(density, draw(rng, n), key) for n in (64, 1000) for key in range(5)
    )


@pytest.mark.parametrize("name", WRONG)
def test_wrong_chains_are_named(name):
    factor, draw, code = WRONG[name]
    density, rng = cp.compile(single, factor()), np.random.default_rng(0)
    assert [found(density, draw(rng, 1000), key) for key in range(5)] == [[code]] * 5
    if code == "modes_unreached":
        assert (
            sum(found(density, draw(rng, 64), key) == [code] for key in range(5)) >= 4
        )


def spiked():
    """Nearly all of π₀ is in a spike that no draw of the prior comes near to, the rest
    about (−.4, −.4)."""

    def logs(x):
        return jnp.logaddexp(
            17 - 0.5 * jnp.sum((x - 1) ** 2) / 0.003**2,
            -0.5 * jnp.sum((x + 0.5) ** 2) / 0.25,
        )

    return cp.compile(single, energy(logs, 2)), 1 + 0.003 * np.random.default_rng(
        0
    ).normal(size=(200, 2))


def many_modes():
    return cp.compile(single, bits(12)), corners(np.random.default_rng(0), 200, 12)


MUTANTS = {
    "what draws cannot reach": (spiked, importance, "_unknown", lambda *_: 0.0),
    "modes that few chains cannot all reach": (
        many_modes,
        importance.Sample,
        "share",
        lambda *_, **__: (0.0, 0.0),
    ),
}


@pytest.mark.parametrize(
    ("make", "owner", "name", "mutant"), MUTANTS.values(), ids=MUTANTS
)
def test_modes_are_taken_for_missing_only_without_what_tells_them(
    make, owner, name, mutant, monkeypatch
):
    """Draws are few, and chains are held against one another."""
    density, x = make()
    assert found(density, x) == []
    monkeypatch.setattr(owner, name, mutant)
    assert found(density, x) == ["modes_unreached"]


def test_copies_of_one_chain_are_near_for_another_reason():
    density, rng = cp.compile(single, bits(12)), np.random.default_rng(0)
    origin = np.repeat(np.arange(100), 10)
    x = np.repeat(rng.choice([-1.0, 1.0], (100, 12)), 10, axis=0) + 0.14 * rng.normal(
        size=(1000, 12)
    )
    args = (
        {"x": x.astype(np.float32)},
        Genealogy.from_ancestors(np.ones(1000), origin),
        jax.random.key(0),
        ENOUGH,
    )
    assert unreached(density, *args) == []
    assert found(density, x) == ["modes_unreached"]  # as if they were independent


def test_few_evaluations_ask_nothing():
    density, x = (
        cp.compile(single, power()),
        -3 + np.random.default_rng(0).normal(size=200) / 20**0.5,
    )
    assert found(density, x, evaluations=tuning.IMPORTANCE.block - 1) == []
    assert found(density, x, evaluations=tuning.IMPORTANCE.block) == ["modes_unreached"]


def drawn(density, number=4000):
    """Draws of π₀'s proposal, and what each is weighed by; in one compilation."""

    def weighed(key):
        position = density.evaluator.draw(key)
        return position, density.evaluator.importance(position)

    return jax.jit(jax.vmap(weighed))(jax.random.split(jax.random.key(0), number))


def test_draws_have_the_density_that_they_are_weighed_by():
    """Of f²·g/h: half of the draws from f, half from g; what divides is not drawn
    from."""
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


def test_latents_are_drawn_before_what_follows_them_and_after_what_they_follow():
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
    # What is left of π₀/q is the likelihood.
    left = np.asarray(log_weight) - norm.logpdf(0.3, z, 1.0)
    np.testing.assert_allclose(left - left.mean(), 0.0, atol=1e-3)


def test_mixtures_are_drawn_from_and_what_is_learned_is_not():
    parts = [normal(m, 0.5, LEVELS) for m in (-2.0, 2.0)]
    positions, _ = drawn(cp.compile(single, cp.mixture(parts, weights=[0.2, 0.8])))
    assert_agrees(z_scores({"share": np.asarray(positions["x"] > 0)}, {"share": 0.8}))
    assert can_draw(cp.compile(single, cp.mixture(parts)))
    assert not can_draw(cp.compile(single, cp.load("ring2d")))
    one = cp.Analytic(dist.Normal(jnp.zeros(1), 0.5).to_event(1), LEVELS)
    assert not can_draw(
        cp.compile(single, cp.window(one, (2,), (0,)) * cp.window(one, (2,), (1,)))
    )


def test_runs_that_miss_the_same_mode_are_named_alone_and_in_comparison():
    """Reverse diffusion of summed scores puts next to nothing where a fifth of a
    squared mixture is."""
    factor = mixture([0.95, 0.05], [[-2.0, 0.0], [2.0, 0.0]], [0.5, 0.05])
    density = lowered(single, (factor**2,), {}, growing=False)
    one, other = (run(density, k, 1000, sampler=cp.Ancestral()) for k in range(2))
    assert np.mean(one["x"][:, 0] > 0) < 0.02
    found = one.compare(other)
    assert max(found.missing_here, found.missing_there) < tuning.COMPARISON.least
    assert found.status.has("modes_unreached")
    assert "x = (2" in found.status.message or "x = (1.9" in found.status.message
    assert np.isnan(one.mean(lambda s: s["x"][0]).error)


def test_a_comparison_reports_what_scouts_of_either_run_find():
    rng = np.random.default_rng(0)
    one, other = compared(rng), compared(rng)
    assert not one.compare(other).status.has("modes_unreached")
    object.__setattr__(
        other,
        "status",
        other.status.with_findings((importance.Code.MODES_UNREACHED, "found.")),
    )
    assert one.compare(other).status.has("modes_unreached")
    assert len(other.compare(other).status.findings) == 1
