"""Results that go on with more data: against closed forms, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import composeprob as cp
from composeprob.errors import (
    CapabilityError,
    InvalidValueError,
    ShapeError,
    WrongTypeError,
)
from composeprob.findings import Code
from composeprob.runtime import extend
from composeprob.runtime.extend import Change, Course, can_extend
from composeprob.runtime.population import Execution
from composeprob.samplers.finishers import WarmUp
from messages import check_wording
from refusals import refused
from sampling_cases import both, learned, normal, run, single, slow, unit_energy
from zscores import LIMIT, assert_agrees, assert_disagrees

LEVELS = cp.Schedule.log_snr(16, -8.0, 8.0)
ALPHA = float(LEVELS.alpha[0])
NOISE = float(LEVELS.sigma[0] / LEVELS.alpha[0])
YS = jnp.array([1.6, 2.9, 0.4, 1.1])
FAR = jnp.array([1.6, 9.0])


@cp.program
def study(f, ys):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x, 1.0).expand(ys.shape).to_event(1), ys)


def compiled(ys):
    return cp.compile(study, normal(0.0, 1.0, LEVELS), ys)


def scores(result, ys):
    """z-scores of the mean and the log-evidence of a Gaussian study."""
    ys = np.asarray(ys)
    width = 1 + NOISE**2
    variance = 1 / (1 / width + len(ys))
    law = stats.multivariate_normal(np.zeros(len(ys)), np.eye(len(ys)) + width)
    found = result.mean(lambda sample: sample["x"] / ALPHA)
    mean = variance * ys.sum()
    error = result.log_evidence_error
    return {
        "mean": (found.value - mean) / found.error,
        "log Z": (result.log_evidence - law.logpdf(ys)) / error,
    }


def start(ys, seed=0):
    # Level weights are exact here, up to those of 1,000 chains.
    return run(compiled(ys), seed, chains=1000)


@pytest.mark.parametrize("last", [2, 3, slow(4)])  # each size is compiled for
def test_a_study_goes_on_datum_by_datum(last):
    result = start(YS[:1])
    spent = result.evaluations
    for n in range(2, last + 1):
        result = result.extend(compiled(YS[:n]), jax.random.key(n))
        assert_agrees(scores(result, YS[:n]))
        assert result.status.ok
    assert spent < result.evaluations < 2 * spent + 1000
    assert "1 of 'y'" in result.reason


def test_without_the_weights_of_the_data_it_stays_where_it_was(monkeypatch):
    result = start(YS[:1])
    nothing = jnp.zeros(1000)
    monkeypatch.setattr(extend, "_gains", lambda *arguments: nothing)
    result = result.extend(compiled(YS[:2]), jax.random.key(2))
    assert_disagrees(scores(result, YS[:2]))


def test_a_datum_far_away_comes_in_by_powers():
    result = start(FAR[:1])
    result = result.extend(compiled(FAR), jax.random.key(2))
    assert_agrees(scores(result, FAR))
    # Half of the chains count after the last power, which ends without resampling.
    assert result.effective_chains > 400
    assert result.about.draws is None


def test_a_network_of_scores_needs_no_log_density():
    def network(x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        return sigma * x / (alpha**2 + sigma**2)

    levels = cp.Schedule.log_snr(40, -8.0, 8.0)
    f = learned(network, "epsilon", levels, shape=())
    before = cp.compile(study, f, FAR[:1])
    assert "energy" not in before.capabilities
    sampler = cp.SMC(check_levels=False)
    result = run(before, chains=1000, sampler=sampler)
    result = result.extend(cp.compile(study, f, FAR), jax.random.key(1))
    found = scores(result, FAR)
    assert abs(found["mean"]) < LIMIT


@cp.program
def squared_study(f, ys):
    x = cp.sample("x", f**2)
    cp.observe("y", dist.Normal(x[0], 1.0).expand(ys.shape).to_event(1), ys)


def test_a_far_datum_under_a_power_of_a_learned_energy():
    """Its exponents grow by what chains carry, which moves between data leave out."""
    ys = jnp.array([1.6, 6.0])
    f = learned(unit_energy, "energy", LEVELS, shape=(1,), time="sigma")
    before = cp.compile(squared_study, f, ys[:1])
    assert before.tracks
    result = run(before, chains=1000, sampler=cp.SMC(check_levels=False))
    result = result.extend(cp.compile(squared_study, f, ys), jax.random.key(1))
    assert "with 0 blocks" not in result.reason
    found = result.mean(lambda sample: sample["x"][0] / ALPHA)
    exact = float(ys.sum()) / (2 / (1 + NOISE**2) + 2)
    assert abs(found.value - exact) < LIMIT * found.error
    assert result.density.tracks


@cp.program
def walk(ys):
    """A random walk of latents that are seen with noise."""
    z = numpyro.sample("z0", dist.Normal(0.0, 1.0))
    for t, y in enumerate(ys):
        z = numpyro.sample(f"z{t + 1}", dist.Normal(z, 0.5))
        numpyro.sample(f"y{t + 1}", dist.Normal(z, 1.0), obs=y)


def test_time_goes_on_by_new_latents():
    """From the prior, whose evidence is 1; the exact one is a Gaussian's."""
    prior = run(cp.compile(walk, ()), chains=1000, sampler=None)
    result = prior
    for n in (1, 2):
        result = result.extend(cp.compile(walk, tuple(YS[:n])), jax.random.key(n))
    steps = 1 + 0.25 * np.array([[1.0, 1.0], [1.0, 2.0]])
    covariance = steps + np.eye(2)
    ys = np.asarray(YS[:2])
    exact = stats.multivariate_normal(np.zeros(2), covariance).logpdf(ys)
    found = result.mean(lambda sample: sample["z2"])
    mean = (steps @ np.linalg.solve(covariance, ys))[1]
    assert_agrees(
        {
            "log Z": (result.log_evidence - exact) / result.log_evidence_error,
            "mean": (found.value - mean) / found.error,
        }
    )
    assert set(result.samples) == {"z0", "z1", "z2"}


# ── new latents near their data ───────────────────────────────────────────────────────
FAR_STEP = (1.6, 9.0)


@pytest.fixture(scope="module")
def walked():
    """A walk of one datum, whose next one is eight standard deviations away."""
    density = cp.compile(walk, FAR_STEP[:1])
    return cp.infer(density, jax.random.key(0), num_chains=1000, progress=False)


def far_scores(walked, result):
    """z-scores of log p(y2 | y1) and of the mean of z2."""
    steps = 1 + 0.25 * np.array([[1.0, 1.0], [1.0, 2.0]])
    covariance = steps + np.eye(2)
    ys = np.asarray(FAR_STEP)
    exact = stats.multivariate_normal(np.zeros(2), covariance).logpdf(ys)
    exact -= stats.norm.logpdf(ys[0], 0, np.sqrt(covariance[0, 0]))
    found = result.mean(lambda sample: sample["z2"])
    mean = (steps @ np.linalg.solve(covariance, ys))[1]
    added, error = increment(result)
    return {
        "log Z": (added - exact) / error,
        "mean": (found.value - mean) / found.error,
    }


def increment(result):
    """log p of what was new, and its error, as the reason states them."""
    ((value, error),) = re.findall(r"log p (\S+) ± ([^\s,]+)", result.reason)
    return float(value), float(error)


def test_a_new_latent_whose_datum_is_far_is_proposed_near_it(walked, monkeypatch):
    asked = []
    near = extend.proposed

    def recorded(*arguments):
        asked.append(arguments)
        return near(*arguments)

    monkeypatch.setattr(extend, "proposed", recorded)
    density = cp.compile(walk, FAR_STEP)
    result = walked.extend(density, jax.random.key(2))
    assert_agrees(far_scores(walked, result))
    assert len(asked) == 1
    # What is left of the weights is p(y2 | z1) of the chains.
    assert increment(result)[1] < 0.3

    def unweighted(*arguments):
        points, log_weights = near(*arguments)
        return points, jnp.zeros_like(log_weights)

    monkeypatch.setattr(extend, "proposed", unweighted)
    assert_disagrees(far_scores(walked, walked.extend(density, jax.random.key(2))))


def test_a_result_that_was_saved_goes_on_under_its_density(walked, tmp_path):
    density = cp.compile(walk, FAR_STEP)
    key = jax.random.key(2)
    expected = walked.extend(density, key)
    walked.save(tmp_path / "run")
    loaded = cp.Result.load(tmp_path / "run.safetensors")
    before = cp.compile(walk, FAR_STEP[:1])
    result = loaded.extend(density, key, before=before)
    for name in expected:
        np.testing.assert_array_equal(result[name], expected[name])
    assert increment(result) == increment(expected)
    assert result.status.code == expected.status.code
    # It has a density now, and goes on as any other.
    refused(lambda: result.extend(density, key, before=before), InvalidValueError)
    refused(lambda: loaded.extend(density, key, before=density), ShapeError)
    refused(lambda: loaded.extend(density, key, before=walk), WrongTypeError)


@cp.program
def counts(ys):
    """Counts whose posterior is not Gaussian."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("members", len(ys)):
        rate = numpyro.sample("rate", dist.Normal(mu, 0.5))
        numpyro.sample("y", dist.Poisson(jnp.exp(rate)), obs=ys)


def test_proposals_near_counts_have_exact_weights():
    """Against quadrature of log p(y) for members that were not there before."""
    ys = np.array([3, 30])
    first = cp.infer(
        cp.compile(counts, jnp.asarray(ys[:1])),
        jax.random.key(0),
        num_chains=1000,
        progress=False,
    )
    result = first.extend(cp.compile(counts, jnp.asarray(ys)), jax.random.key(1))
    mu = np.linspace(-5, 5, 801)
    rates = np.linspace(-6, 7, 2001)
    likelihoods = []
    for y in ys:
        of_rate = stats.poisson.pmf(y, np.exp(rates))
        given_mu = stats.norm.pdf(rates, mu[:, None], 0.5) @ of_rate
        likelihoods.append(given_mu * (rates[1] - rates[0]))
    prior = stats.norm.pdf(mu)
    one = np.sum(prior * likelihoods[0])
    both_of_them = np.sum(prior * likelihoods[0] * likelihoods[1])
    mean = np.sum(prior * likelihoods[0] * likelihoods[1] * mu) / both_of_them
    added, error = increment(result)
    found = result.mean(lambda sample: sample["mu"])
    assert_agrees(
        {
            "log Z": (added - np.log(both_of_them / one)) / error,
            "mean": (found.value - mean) / found.error,
        }
    )


def test_what_follows_a_run_evaluates_as_many_chains_at_once(walked):
    density = cp.compile(walk, FAR_STEP)
    key = jax.random.key(2)
    expected = walked.extend(density, key)
    course = Course(Execution(chunk=300))
    chunked = can_extend(dataclasses.replace(walked), course).extend(density, key)
    for name in expected:
        np.testing.assert_allclose(chunked[name], expected[name], rtol=1e-3, atol=1e-3)


@cp.program
def hierarchy(ys):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("members", len(ys)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, 0.5), obs=ys)


@pytest.mark.slow
def test_a_hierarchy_that_grows_agrees_with_the_whole_run():
    rng = np.random.default_rng(0)
    ys = jnp.asarray(1 + 0.8 * rng.standard_normal(12) + 0.5 * rng.standard_normal(12))

    def inferred(n, seed):
        density = cp.compile(hierarchy, ys[:n])
        return cp.infer(density, jax.random.key(seed), num_chains=1000, progress=False)

    grown = inferred(8, 0)
    for n in (9, 12):
        grown = grown.extend(cp.compile(hierarchy, ys[:n]), jax.random.key(n))
    whole = inferred(12, 2)
    assert grown.status.ok
    assert grown["theta"].shape == (1000, 12)
    compared = {}
    for name in ("mu", "tau"):
        one = grown.mean(lambda sample, name=name: sample[name])
        other = whole.mean(lambda sample, name=name: sample[name])
        error = np.hypot(one.error, other.error)
        compared[name] = (one.value - other.value) / error
    assert_agrees(compared)


@cp.program
def members(mean, width, ys):
    mu = numpyro.sample("mu", dist.Normal(0.0, width))
    with numpyro.plate("members", len(ys)):
        theta = numpyro.sample("theta", dist.Normal(mu + mean, 1.0))
        numpyro.sample("y", dist.Normal(theta, 0.5), obs=ys)


def members_given(number, mean=0.0, width=1.0):
    return cp.compile(members, mean, width, YS[:number])


def test_another_prior_beside_more_members_is_refused():
    """The prior is that of the latent above the members, or of a member: weights would
    not tell its change."""
    before = members_given(2)
    assert Change.between(before, members_given(3)).grows
    for after in (members_given(3, width=2.0), members_given(3, mean=0.5)):
        refused(lambda after=after: Change.between(before, after), InvalidValueError)
    # With data alone the weights are of the whole densities.
    wider = cp.compile(mean_of, YS[:2], 9.0)
    assert not Change.between(wider, cp.compile(mean_of, YS[:3], 9.0)).grows


@cp.program
def windows(pair, length):
    """A series of successive states by a model of two."""
    places = range(length - 1)
    cp.sample("x", cp.product(*(cp.window(pair, (length,), (t,)) for t in places)))


def test_a_series_of_windows_does_not_grow():
    pair = normal(jnp.zeros(2), 1.0, LEVELS)
    before = cp.compile(windows, pair, 2)
    after = cp.compile(windows, pair, 3)
    fix = "cp.training.estimator"
    refused(lambda: Change.between(before, after), InvalidValueError, fix=fix)


def test_other_densities_are_refused(tmp_path):
    result = start(YS[:2])
    f = normal(0.0, 1.0, LEVELS)
    key = jax.random.key(0)

    def extended(density):
        return lambda: result.extend(density, key)

    other_levels = normal(0.0, 1.0, cp.Schedule.log_snr(16, -8.0, 7.0))
    for density in (
        compiled(YS[:2]),
        compiled(YS[:2] + 1),
        compiled(YS[:1]),
        cp.compile(study, other_levels, YS[:3]),
        cp.compile(single, f),
        cp.compile(both, normal(jnp.zeros(2), 1.0, LEVELS), normal(jnp.zeros(2))),
    ):
        refused(extended(density), InvalidValueError)
    refused(lambda: result.extend(study, key), WrongTypeError)
    result.save(tmp_path / "run.nc")
    loaded = cp.Result.load(tmp_path / "run.nc")
    refused(lambda: loaded.extend(compiled(YS), key), CapabilityError)


def test_the_reason_says_what_was_new():
    result = start(YS[:2]).extend(compiled(YS[:3]), jax.random.key(2))
    check_wording(result.reason, estimated=True)


# ── latents alone ─────────────────────────────────────────────────────────────────────


@cp.program
def mean_of(ys, limit):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    numpyro.factor("limit", jnp.where(mean > limit, 0.0, -jnp.inf))
    with numpyro.plate("data", len(ys)):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=ys)


@cp.program
def awaited(ys):
    """Data that have not arrived are NaN."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(ys)):
        seen = dist.Normal(mean, 1.0).mask(jnp.isfinite(ys))
        numpyro.sample("y", seen, obs=ys)


@pytest.fixture
def compilations():
    """A list that grows with each program that XLA compiles."""
    found: list[float] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def thirty():
    """Data of a mean that is unknown."""
    rng = np.random.default_rng(3)
    return rng.standard_normal() + rng.standard_normal(30)


def awaiting(number):
    """The density where so many of the thirty data have arrived."""
    some = np.where(np.arange(30) < number, thirty(), np.nan)
    return cp.compile(awaited, jnp.asarray(some, jnp.float32))


@pytest.fixture(scope="module")
def prior():
    """A run that awaits all of the thirty data."""
    return cp.infer(awaiting(0), jax.random.key(0), num_chains=1000, progress=False)


def test_thirty_awaited_data_are_compiled_for_once(prior, compilations):
    """Gaussian: from the prior, datum by datum; nothing has another shape."""
    ys = thirty()
    result = prior
    moved = []
    for n in range(1, 31):
        before = len(compilations)
        result = result.extend(awaiting(n), jax.random.key(n))
        moved.append("with 1 blocks of moves" in result.reason)
        if any(moved[:-1]) or (n > 1 and not moved[-1]):
            # The first datum and the first block of moves are what is compiled for.
            assert len(compilations) == before
        seen = ys[:n]
        law = stats.multivariate_normal(np.zeros(n), np.eye(n) + 1)
        found = result.mean(lambda sample: sample["mean"])
        assert_agrees(
            {
                "log Z": (result.log_evidence - law.logpdf(seen))
                / result.log_evidence_error,
                "mean": (found.value - seen.sum() / (n + 1)) / found.error,
            }
        )
    assert 1 < sum(moved) < 10
    assert result.status.ok
    assert "extended 30 times, the last by 1 of 'y'" in result.reason


def test_a_saved_extension_goes_on_in_the_same_words(prior, tmp_path):
    """Its reason states the last extension only, and how many there were."""
    result = prior.extend(awaiting(1), jax.random.key(1))
    result.save(tmp_path / "study")
    loaded = cp.Result.load(tmp_path / "study.safetensors")
    after = awaiting(2)
    expected = result.extend(after, jax.random.key(2))
    found = loaded.extend(after, jax.random.key(2), before=awaiting(1))
    assert found.reason == expected.reason
    assert found.reason.count("extended") == 1
    assert found.about.extensions == expected.about.extensions == 2
    assert str(found.status) == str(expected.status)


@pytest.fixture(scope="module")
def drawn():
    """A run with draws of each chain."""
    density = cp.compile(mean_of, YS[:2], -20.0)
    return cp.infer(density, jax.random.key(0), num_chains=100, draws=4, progress=False)


def test_a_run_with_draws_goes_on_from_the_last_ones(drawn):
    result = drawn.extend(cp.compile(mean_of, YS[:3], -20.0), jax.random.key(1))
    assert result["mean"].shape == (100,)
    assert result.about.draws is None
    found = result.mean(lambda sample: sample["mean"])
    assert abs(found.value - float(YS[:3].sum()) / 4) < LIMIT * found.error
    assert "mean" in str(result.summary())


def test_data_that_exclude_every_chain_are_named(drawn):
    result = drawn.extend(cp.compile(mean_of, YS[:3], 20.0), jax.random.key(1))
    assert result.status.code == Code.ZERO_DENSITY
    assert result.status.withholds
    assert np.isfinite(result.log_weights).all()


def test_a_warm_up_that_does_not_settle_is_in_the_trust_too(drawn, monkeypatch):
    monkeypatch.setattr(WarmUp, "drift", lambda self, points, density, supported: 0.5)
    monkeypatch.setattr(WarmUp, "rounds", 2)
    ys = jnp.append(YS[:2], 40.0)
    result = drawn.extend(cp.compile(mean_of, ys, -20.0), jax.random.key(1))
    assert result.status.has(Code.UNSETTLED)
    assert result.trust.drift == 0.5
