"""`sampler=None`: the choice by density and number of chains, and its reason."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.results.status import Code
from composeprob.samplers.choose import choose, independent
from messages import check_finding
from sampling_cases import SCHEDULE, learned, measured, normal, run, single, unit_energy

FIRST_ORDER = cp.ReverseStep(order=1, control="none")


def unit_noise(x, t):
    return x


def user_energy(x, level):
    return -0.5 * jnp.sum(x**2)


FACTORS = {
    "closed": lambda: normal([0.0, 0.0]),
    "user's": lambda: cp.Energy(user_energy, SCHEDULE, event_shape=(2,)),
    "energy": lambda: learned(unit_energy, "energy", SCHEDULE, time="sigma"),
    "epsilon": lambda: learned(unit_noise, "epsilon", SCHEDULE, time="sigma"),
}


@cp.program
def squared(f):
    cp.sample("x", f**2)


@cp.program
def with_latent(f):
    x = cp.sample("x", f)
    scale = cp.sample("scale", dist.LogNormal(0.0, 1.0))
    cp.observe("y", dist.Normal(x, scale).to_event(1), jnp.zeros(2))


@cp.program
def with_evidence(f):
    x = cp.sample("x", f)
    cp.factor("w", -jnp.sum(x**2))


@cp.program
def no_diffusion(f):
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    cp.observe("y", dist.Normal(m, 0.5), 1.0)


MANY = tuning.MANY_CHAINS.compared
SOME = tuning.MANY_CHAINS.weighed
CASES = {
    "many chains, a rate and an energy": (single, "energy", MANY, cp.SMC, "tuned MALA"),
    "many chains, scores only": (single, "epsilon", MANY, cp.SMC, "steps alone"),
    "many chains, scores and soft evidence": (
        with_evidence,
        "epsilon",
        MANY,
        cp.SMC,
        "only its score",
    ),
    "some chains, a learned energy": (single, "energy", SOME, cp.SMC, "tuned MALA"),
    "some chains, a closed form": (
        single,
        "closed",
        255,
        cp.AnnealedMCMC,
        "fewer than 256",
    ),
    "few chains, a learned energy": (
        single,
        "energy",
        31,
        cp.AnnealedMCMC,
        "fewer than 32",
    ),
    "few chains, a power of a learned energy": (
        squared,
        "energy",
        tuning.MANY_CHAINS.tracked,
        cp.SMC,
        "16 chains are enough",
    ),
    "fewer chains, a power of a learned energy": (
        squared,
        "energy",
        tuning.MANY_CHAINS.tracked - 1,
        cp.AnnealedMCMC,
        "fewer than 16",
    ),
    "few chains, scores only": (
        single,
        "epsilon",
        12,
        cp.AnnealedMCMC,
        "only its score",
    ),
    "scores only and a latent": (
        with_latent,
        "epsilon",
        SOME,
        cp.SMC,
        "latents and their members move",
    ),
    "few chains and a latent": (
        with_latent,
        "epsilon",
        12,
        cp.AnnealedMCMC,
        "latents and their members",
    ),
    "many chains, a user's energy": (single, "user's", MANY, cp.SMC, "trusted"),
    "many chains without factors": (
        no_diffusion,
        "closed",
        MANY,
        cp.AnnealedMCMC,
        "NUTS fits as well: density.to_numpyro()",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_choice_and_reason(case):
    program, form, chains, kind, why = CASES[case]
    density = cp.compile(program, FACTORS[form]())
    sampler, reason = choose(density, chains)
    assert type(sampler) is kind
    assert why in reason
    assert form != "user's" or isinstance(sampler.weights, cp.DensityRatio)
    sampler.prepare(density)  # it can be used


@pytest.mark.parametrize("program", [single, squared])
def test_few_chains_without_weights_may_all_have_missed_a_mode_of_a_power(program):
    """The exponent moves the shares of modes that chains have chosen; a factor by
    itself has no exponent."""
    density = cp.compile(program, FACTORS["energy"]())
    result = run(density, chains=8, sampler=None)
    powered = program is squared
    assert result.status.ok != powered
    if powered:
        check_finding(result.status, Code.MODES_UNREACHED)
        assert np.isnan(result.mean(lambda s: s["x"]).error).all()


@pytest.mark.parametrize(
    ("program", "form", "chains", "draws", "transitions"),
    [
        (single, "energy", SOME - 1, 1, 1),
        (single, "energy", SOME - 1, 2, 5),
        (single, "closed", SOME - 1, 1, 5),
        (with_evidence, "energy", SOME - 1, 1, 5),
        (with_latent, "energy", SOME - 1, 1, 5),
    ],
)
def test_few_samples_of_learned_factors_are_moved_once_a_level(
    program, form, chains, draws, transitions
):
    density = cp.compile(program, FACTORS[form]())
    sampler, _ = choose(density, chains, draws)
    assert sampler.steps_per_level == transitions


def test_scores_of_factors_alone_are_not_moved():
    """Tall data: a posterior given each of 90 observations, by its score. Steps and the
    run over every other level are all evaluations; the mean is exact."""
    y = jnp.linspace(0.0, 1.0, 90)

    def score(x, log_snr, y):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        return -(x - alpha * y / 2) / (0.5 * alpha**2 + jax.nn.sigmoid(-log_snr))

    posterior = learned(score, "score", SCHEDULE, (), time="log_snr", conditions=("y",))
    prior = normal(0.0, 1.0)

    @cp.program
    def tall():
        return cp.sample("x", prior * cp.product(posterior / prior, over={"y": y}))

    density = cp.compile(tall)
    result = run(density, chains=MANY, sampler=None)
    levels = density.num_levels
    assert result.evaluations == 2 * levels - 1
    assert "steps alone" in result.reason
    estimate = result.mean(lambda s: s["x"])
    precision = 1 + len(y)
    assert abs(estimate.value - y.sum() / precision) < 4 / np.sqrt(precision * MANY)


@pytest.mark.parametrize("weighed", [True, False], ids=["default", "independent"])
def test_some_chains_keep_the_shares_of_learned_modes(weighed):
    """Three modes of a learned energy in the plane and a measurement between them. The
    means of eight runs of 100 chains agree with the exact one within their stated
    errors; chains without weights, the negative control, do not."""
    weights = np.array([0.5, 0.3, 0.2])
    sds = np.array([0.5, 0.35, 0.7])
    means = np.array([[-2.0, 0.0], [1.5, 1.5], [2.0, -2.0]])
    row = np.array([1.0, 0.5])
    y = 0.7
    noise = 0.4

    def energy(x, level):
        alpha = jnp.asarray(SCHEDULE.alpha)[level]
        sigma = jnp.asarray(SCHEDULE.sigma)[level]
        variance = alpha**2 * sds**2 + sigma**2
        square = jnp.sum((x - alpha * means) ** 2, -1)
        logs = jnp.log(weights / variance) - 0.5 * square / variance
        return -sigma * jax.nn.logsumexp(logs)

    factor = learned(energy, "energy", SCHEDULE, time="level")
    density = cp.compile(
        measured, factor, lambda x: dist.Normal(jnp.dot(row, x), noise), y
    )
    # Bayes' rule by modes: the variance of y, their shares given it, and the mean of
    # x[0] in each.
    variance = sds**2 * (row @ row) + noise**2
    log_likelihood = dist.Normal(means @ row, np.sqrt(variance)).log_prob(y)
    shares = jax.nn.softmax(np.log(weights) + log_likelihood)
    by_mode = means[:, 0] + sds**2 * row[0] / variance * (y - means @ row)
    exact = float(shares @ by_mode)
    sampler = None if weighed else independent(density, "")[0]
    estimates = []
    for key in range(8):
        result = run(density, key, 100, sampler=sampler)
        estimates.append(result.mean(lambda s: s["x"][0]))
    away = sum(estimate.value - exact for estimate in estimates)
    z = away / np.sqrt(sum(estimate.error**2 for estimate in estimates))
    assert abs(z) < 3.3 if weighed else abs(z) > 5


def test_scores_only_are_corrected_by_a_line_integral():
    """Five points and three steps: thirteen evaluations a level, and one that corrects
    the step to it."""
    density = cp.compile(single, FACTORS["epsilon"]())
    sampler, _ = choose(density, 12)
    assert sampler.kernel.log_ratio == cp.LineIntegral(5, "simpson", tolerance=0.1)
    for chains, draws, tolerance in (
        (12, 20, 240**-0.5),
        (10_000, 1, 0.01),
        (10_000, 4, 0.005),
    ):
        # Errors of moves are no larger than what is left to chance.
        chosen, _ = choose(density, chains, draws)
        assert chosen.kernel.log_ratio.tolerance == pytest.approx(tolerance)
    assert sampler.prepare(density).evaluations(32) == 32 * 13 + 31


@pytest.mark.parametrize(
    ("chains", "kernel"),
    [(MANY, cp.MALA()), (12, cp.HMC())],
    ids=["many chains", "few chains"],
)
def test_latents_get_a_separate_kernel_unless_one_is_named(chains, kernel):
    density = cp.compile(with_latent, normal([0.0, 0.0]))
    sampler = choose(density, chains)[0].prepare(density)
    assert sampler.kernel.sites == (("x",), ("scale",))
    assert [type(part) for part in sampler.kernel.kernels] == [type(kernel)] * 2
    assert all(
        isinstance(part.step_size, cp.Adaptive) for part in sampler.moves.kernel.kernels
    )
    assert all(part.log_ratio == kernel.log_ratio for part in sampler.kernel.kernels)
    assert isinstance(cp.SMC(kernel).prepare(density).kernel, type(kernel))


@cp.program
def unknown_scale(f, y):
    x = cp.sample("x", f)
    s = cp.sample("s", dist.HalfNormal(1.0))
    cp.observe("y", dist.Normal(x, s).expand([5]).to_event(1), y)


def test_no_chain_stays_where_a_prior_makes_the_noise_tiny():
    """The posterior has s < 0.1 with a probability below 10⁻²⁰, the prior with 0.08.
    With latents that meet the data as u² 5 of the chains stay there, under steps of one
    size 20, under both 40."""
    factor = cp.Analytic(dist.Normal(0.2, 0.6), cp.Schedule.log_snr(30))
    density = cp.compile(unknown_scale, factor, jnp.array([1.2, 0.7, 1.9, 1.4, 0.2]))
    default, _ = independent(density, "few chains")
    sampler = cp.AnnealedMCMC(
        default.kernel, default.steps_per_level, reverse_step=FIRST_ORDER
    )
    result = run(density, chains=1000, sampler=sampler)
    assert jnp.sum(result["s"] < 0.1) <= 2
