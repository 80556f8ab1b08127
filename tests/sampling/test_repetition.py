"""The repetition of a run over every other level: the weights that it gives the run's
chains, and the errors that it adds to those of the genealogy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit

import composeprob as cp
from composeprob.results.estimates import Genealogy
from composeprob.results.record import About, Record
from composeprob.results.repetition import Repetition, repeated_weights
from composeprob.results.status import Status
from composeprob.runtime.population import Population
from sampling_cases import learned, normal, squared

SCHEDULE = cp.Schedule.log_snr(12, min=-8.0, max=5.0)
SAMPLER = cp.SMC(step=cp.ReverseStep(order=1))
SETS = 300
SHARE = 0.4


def repeated(**positions):
    return Repetition(0.0, 0.0, positions)


def test_a_chain_has_the_share_of_the_repetition_that_it_is_nearest_to():
    x = np.array([0.0, 1.0, 10.0, 11.0])
    found = repeated_weights({"x": x}, repeated(x=np.array([0.1, -3.0, 1.2, 30.0])))
    np.testing.assert_allclose(found, [0.5, 0.25, 0.0, 0.25])


def test_sites_are_compared_in_units_of_their_spread():
    """The second site, a thousand times as wide, does not decide alone."""
    wide = np.array([1000.0, -1000.0, 1000.0, -1000.0])
    narrow = np.array([[1.0], [1.0], [-1.0], [-1.0]])
    other = repeated(narrow=np.full((2, 1), -1.0), wide=np.array([900.0, -1200.0]))
    found = repeated_weights({"wide": wide, "narrow": narrow}, other)
    np.testing.assert_allclose(found, [0.0, 0.0, 0.5, 0.5])


def test_tokens_are_compared_by_how_many_are_equal():
    """Their numbers are names: others in their place change nothing."""
    tokens = np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2]])
    others = np.array([[0, 0, 2], [2, 2, 2], [2, 0, 2], [1, 1, 0]])
    expected = [0.25, 0.25, 0.5]
    for names in ([0, 1, 2], [2, 0, 1], [0, 9, 1]):
        named = np.array(names)
        found = repeated_weights({"s": named[tokens]}, repeated(s=named[others]))
        np.testing.assert_allclose(found, expected)


def test_many_chains_are_compared_in_blocks():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 3))
    others = rng.normal(size=(1300, 3))
    found = repeated_weights({"x": points}, repeated(x=others))
    scale = np.sqrt(points.var(0).mean())
    distances = np.linalg.norm((others[:, None] - points) / scale, axis=-1)
    expected = np.bincount(distances.argmin(1), minlength=40) / 1300
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    "other",
    [None, Repetition(0.0, 0.0, None), repeated(x=np.array([np.nan, 1.0]))],
    ids=["none", "without positions", "NaN"],
)
def test_without_another_population_there_are_no_weights(other):
    assert repeated_weights({"x": np.array([0.0, 1.0])}, other) is None


# ── errors that whole modes have in common ────────────────────────────────────────────


class Made(Record):
    """Samples without a run."""

    def __init__(self, values, weights):
        n = len(values)
        genealogy = Genealogy(np.full(n, 1 / n), np.arange(n), weights)
        # A record is frozen.
        vars(self).update(
            samples={"x": values}, about=About(), status=Status(), _genealogy=genealogy
        )


def population(rng, n=300):
    """Two modes, whose log-odds are off by a number that all chains share."""
    share = expit(logit(SHARE) + 0.5 * rng.normal())
    signs = np.where(rng.random(n) < share, -1.0, 1.0)
    return 2.0 * signs + 0.3 * rng.normal(size=n)


def far(weigh):
    """The part of sets whose share is off by more than four stated errors."""
    rng = np.random.default_rng(0)
    z = []
    for _ in range(SETS):
        x = population(rng)
        result = Made(x, weigh({"x": x}, repeated(x=population(rng))))
        found = result.mean_of((x < 0.0)[:, None])
        z.append((found.value - SHARE) / found.error)
    return np.mean(np.abs(z) > 4)


def test_errors_of_whole_modes_are_stated():
    """Two numbers of one distribution are within a quarter of one another in 8 % of
    cases, and must be large, too, to be far."""
    assert far(repeated_weights) < 0.08


def test_negative_control_the_spread_over_chains_does_not_show_them():
    assert far(lambda positions, other: None) > 0.25


def test_the_distance_is_added_in_quadrature():
    """For means, probabilities and quantiles, and for draws of each chain."""
    n = 200
    values = np.linspace(-1.0, 1.0, n)
    weights = np.linspace(0.0, 2.0, n) / n
    alone = Made(values, None)
    both = Made(values, weights)
    moved = weights @ values
    mean = both.mean(lambda sample: sample["x"])
    of_chains = alone.mean(lambda sample: sample["x"]).error
    assert mean.error == pytest.approx(np.hypot(of_chains, moved), rel=0.01)
    assert mean.value == alone.mean(lambda sample: sample["x"]).value
    event = both.probability(lambda sample: sample["x"] > 0)
    assert event.error > 0.2
    low, high = event.interval(0.9)
    assert low < 0.3
    assert high > 0.7
    quantile = both.quantile(lambda sample: sample["x"], 0.5)
    assert quantile.error > 1.5 * alone.quantile(lambda sample: sample["x"], 0.5).error
    assert both.effective_chains == alone.effective_chains


def test_a_population_that_goes_on_keeps_them():
    """Its own weights and those of the repetition multiply and are resampled alike."""
    n = 4000
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    other = np.exp(0.5 * x)
    added = -0.5 * (x - 1) ** 2
    words = jnp.zeros(2, jnp.uint32)
    population = Population(
        None, x, np.arange(n), None, words, np.zeros(n), None, repeated=other
    )
    expected = np.average(x, weights=other * np.exp(added))
    population.weigh(added)
    assert population.genealogy.repeated @ x == pytest.approx(expected)
    chosen = population.resample()
    found = population.genealogy.repeated @ x[chosen]
    assert found == pytest.approx(expected, abs=0.05)
    assert abs(np.mean(x[chosen]) - expected) > 0.15
    few = np.zeros(n, bool)
    population.renew(few)
    assert population.genealogy.repeated is not None
    population.renew(~few)
    assert population.genealogy.repeated is None


# ── runs ──────────────────────────────────────────────────────────────────────────────


def score(x, log_snr):
    """Score of N(0, 1), whose noised marginals are N(0, 1) too."""
    return -x


@pytest.fixture(scope="module")
def result():
    density = cp.compile(squared, learned(score, "score", SCHEDULE))
    assert not density.comparable_modes
    return run(density)


def run(density, sampler=SAMPLER):
    return cp.infer(
        density, jax.random.key(0), num_chains=64, sampler=sampler, progress=False
    )


def test_a_run_of_scores_states_the_distance_of_its_repetition(result):
    genealogy = result._genealogy
    assert genealogy.repeated.sum() == pytest.approx(1.0)
    x = np.asarray(result["x"])
    departure = (genealogy.repeated - genealogy.weights) @ x
    assert np.all(np.abs(departure) > 1e-4)  # another population
    assert np.all(np.abs(departure) < 1.0)
    assert np.all(result.mean(lambda sample: sample["x"]).error > np.abs(departure))


def test_files_keep_it(result, tmp_path):
    loaded = cp.Result.load(result.save(tmp_path / "result.safetensors"))
    np.testing.assert_array_equal(
        loaded._genealogy.repeated, result._genealogy.repeated
    )
    found, kept = (each.mean(lambda s: s["x"]).error for each in (result, loaded))
    np.testing.assert_array_equal(found, kept)


def test_closed_forms_state_none():
    """Log-densities judge their mode proportions."""
    density = cp.compile(squared, normal(jnp.zeros(2), 1.0, SCHEDULE))
    assert density.comparable_modes
    assert run(density)._genealogy.repeated is None


@pytest.mark.slow
def test_runs_that_finishers_went_on_with_state_none(result):
    moved = cp.SMC(cp.ULA(0.01), step=cp.ReverseStep(order=1), then=cp.WarmUp())
    assert run(result.density, moved)._genealogy.repeated is None
