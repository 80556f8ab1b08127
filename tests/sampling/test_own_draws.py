"""Scores that are wrong where there is little noise: a comparison with the factor's own
samples, and a finding about runs that follow them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.results.checks.own_scores import OwnScores
from composeprob.results.status import Code
from composeprob.runtime.own_draws import misfit, own_levels, own_moments, own_scores
from composeprob.runtime.progress import Progress
from composeprob.samplers.choose import kernel_by_scores
from messages import check_finding
from sampling_cases import learned, run, single

SCHEDULE = cp.Schedule.log_snr(32)
SD = np.array([1.0, 0.5])


class Epsilon(eqx.Module):
    """The noise in x of N(0, diag(SD²)), with an error where there is little noise,
    which does not fall with the noise."""

    error: jax.Array

    def __call__(self, x, level):
        alpha = jnp.asarray(SCHEDULE.alpha)[level]
        sigma = jnp.asarray(SCHEDULE.sigma)[level]
        noise = sigma * x / (alpha**2 * SD**2 + sigma**2)
        return noise + self.error * alpha**16 * x


def gaussian(error):
    # The error is an array, so that the code is compiled once.
    network = Epsilon(jnp.float32(error))
    return learned(network, "epsilon", SCHEDULE, time="level")


def compared(density, samples=256, evaluations=np.inf):
    """The comparison of each factor's score with its samples, by name."""
    keys = jax.random.split(jax.random.key(0), samples)
    positions = jax.vmap(density.initial)(keys)
    return own_scores(density, positions, jax.random.key(1), evaluations)


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_a_score_is_compared_with_its_own_samples(error):
    """With an error ε the score of N(0, s²) is too steep by ε·s²/σ at level 0."""
    (score,) = compared(cp.compile(single, gaussian(error))).values()
    assert score.wrong == (error > 0)
    if not error:
        assert score.right_from == 0
        return
    # Of the wider number; its own samples are too narrow, which makes it less.
    off = error / SCHEDULE.sigma
    assert 0.3 * off[0] < score.steepness - 1 < off[0]
    assert 0.1 < off[score.right_from] < 1


def test_a_run_that_follows_a_wrong_score_has_the_finding():
    """The Metropolis test makes it N(0, 1/(1 + 0.1/σ)); reverse diffusion, which has no
    test, is close to N(0, 1)."""
    density = cp.compile(single, gaussian(0.1))
    moved = {"chains": 1000, "sampler": cp.SMC(kernel_by_scores(1000, metric="auto"))}
    result = run(density, **moved)
    check_finding(result.status, Code.NETWORK_DOUBTED)
    assert np.isnan(result.mean(lambda s: s["x"]).error).all()
    assert result.unweighted()["x"][:, 0].std() < 0.5
    for steps in (cp.Ancestral(), None):
        assert run(density, chains=1000, sampler=steps)["x"][:, 0].std() > 0.75
    assert run(cp.compile(single, gaussian(0.0)), **moved).status.ok


class Scaled(eqx.Module):
    """``factor`` times the exact ε̂ of N(0, I)."""

    factor: jax.Array

    def __call__(self, x, log_snr):
        return self.factor * jnp.sqrt(jax.nn.sigmoid(-log_snr)) * x


@pytest.mark.parametrize("factor", [1.0, 1.15])
def test_scores_that_only_weights_rely_on_are_asked_about_noise(factor):
    """A square by reverse steps alone, along which log f is tracked; of as few chains
    as a default run weighs."""

    @cp.program
    def squared():
        return cp.sample("x", learned(network, "epsilon", SCHEDULE) ** 2)

    network = Scaled(jnp.float32(factor))
    result = run(cp.compile(squared), chains=64, sampler=None)
    assert "steps alone" in result.reason
    assert result.status.has(Code.NETWORK_DOUBTED) == (factor > 1)
    # Every other of 32 levels and level 0, each twice but one.
    of_repetition = 17 + 16
    # 24 levels lead to a sample, which is noised twice to eight; at three of these the
    # network is told the next level too.
    assert result.about.checks == of_repetition + 24 + 2 * (8 + 3)
    assert f"and {result.about.checks} to check it" in str(result.summary())


MEMBER_SD, GROUP_SD = 0.5, 1.0


class Member(eqx.Module):
    """The score of N(m, 0.5²), wrong where there is little noise, in units of 1/0.5: by
    a constant, by a share of m − 0.3 and by one of (x − m)/0.5.

    The shares are arrays, so that the code is compiled once for a number of members.
    """

    constant: jax.Array
    of_m: jax.Array
    of_x: jax.Array

    @classmethod
    def by(cls, constant=0.0, of_m=0.0, of_x=0.0):
        return cls(jnp.float32(constant), jnp.float32(of_m), jnp.float32(of_x))

    def __call__(self, x, log_snr, m):
        alpha2 = jax.nn.sigmoid(log_snr)
        variance = jax.nn.sigmoid(-log_snr)
        away = x - jnp.sqrt(alpha2) * m
        right = -away / (alpha2 * MEMBER_SD**2 + variance)
        wrong = self.constant + self.of_m * (m - 0.3) + self.of_x * away / MEMBER_SD
        return right + wrong / MEMBER_SD * alpha2**100


def skewed_member(x, log_snr, m):
    """The score of 0.7·N(m, 0.3²) + 0.3·N(m + 0.8, 0.6²)."""
    alpha2 = jax.nn.sigmoid(log_snr)
    variance = jax.nn.sigmoid(-log_snr)
    means = m + jnp.array([0.0, 0.8])
    widths = jnp.array([0.3, 0.6])
    spreads = jnp.sqrt(alpha2 * widths**2 + variance)
    components = dist.Normal(jnp.sqrt(alpha2) * means, spreads)

    def log_density(x):
        log_weights = jnp.log(jnp.array([0.7, 0.3]))
        return jax.nn.logsumexp(log_weights + components.log_prob(x))

    return jax.grad(log_density)(x)


def study(members, score, mask=True):
    """A group of members with m_j ~ N(0.3, 1)."""
    one = learned(score, "score", SCHEDULE, (), conditions=("m",), label="one")
    ms = np.random.default_rng(members).normal(size=members)
    ms = jnp.asarray(0.3 + GROUP_SD * (ms - ms.mean()) / ms.std(), jnp.float32)

    @cp.program
    def group():
        mu = cp.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("members", members):
            eta = cp.sample("eta", dist.Normal(mu, GROUP_SD))
            with numpyro.handlers.mask(mask=mask):
                cp.factor("data", one.given(m=ms), at=eta)

    return cp.compile(group)


@pytest.mark.parametrize(
    ("members", "score"),
    [(20, Member.by()), (500, skewed_member)],
)
def test_members_of_a_plate_that_are_right(members, score):
    (score,) = compared(study(members, score)).values()
    assert not score.wrong
    assert score.members == members
    assert score.right_from == 0


POOLED = GROUP_SD**2 + MEMBER_SD**2


@pytest.mark.parametrize(
    ("wrong", "led"),
    [
        ({"constant": 0.1}, 0.1 * MEMBER_SD * (500 / POOLED) ** 0.5),
        (
            {"of_m": 0.1},
            2 * 0.1 * MEMBER_SD * GROUP_SD**2 / POOLED * (500 / 2) ** 0.5,
        ),
        ({"of_x": -0.4}, 0.4 * MEMBER_SD**2 / POOLED * (500 / 2) ** 0.5),
    ],
    ids=["the group's mean", "its variance", "its variance, as members are too narrow"],
)
def test_small_errors_of_members_add_up_in_their_group(wrong, led):
    """They do not matter for each member, nor for 20. The mean of J is uncertain by
    √(P/J), its variance by P·√(2/J)."""
    member = Member.by(**wrong)
    (few,) = compared(study(20, member)).values()
    (many,) = compared(study(500, member)).values()
    assert not few.wrong
    assert many.wrong
    assert 0.7 * led < many.shift < 1.05 * led  # less four errors
    assert 0 < many.right_from < 20


def test_a_plate_with_a_mask_is_left_out():
    member = Member.by(constant=5.0)
    mask = np.array([True, True, False, True])
    assert not compared(study(4, member, mask))


@pytest.mark.slow
@pytest.mark.parametrize("error", [0.0, 0.15])
def test_a_run_over_a_plate_has_the_finding(error):
    """Given the group's width its mean is N(0.3, P/J), up to a prior that is vague
    beside that."""
    members = 300
    density = study(members, Member.by(constant=error))
    result = run(density, 2, 300, sampler=None)
    off = (np.asarray(result["mu"]).mean() - 0.3) / (POOLED / members) ** 0.5
    assert result.status.has(Code.NETWORK_DOUBTED) == (error > 0)
    if error:
        check_finding(result.status, Code.NETWORK_DOUBTED)
        assert off > 0.4
    else:
        assert result.status.ok
        assert abs(off) < 0.25


WRONG = {
    "right": ((), False),
    "score × 1.05": (("scale", 1.05), True),
    "score × 1.15": (("scale", 1.15), True),
    "score × 0.8": (("scale", 0.8), True),
    "log-SNR + 1": (("later", 1.0), True),
    "half the log-SNR": (("stretch", 0.5), True),
    "three times at little noise": (("steeper", 2.0), True),
    "score + 0.3": (("added", 0.3), True),
}


@pytest.mark.parametrize("error", WRONG)
def test_a_score_predicts_the_noise_that_its_own_samples_are_given(error):
    """Its own samples are those of a score that is wrong in the same way."""
    change, wrong = WRONG[error]
    density = cp.compile(single, learned(Wrong.by(*change), "score", SCHEDULE))
    (found,) = compared(density).values()
    assert (found.misfit is not None) == wrong
    findings = OwnScores().findings({"f(x)": found}, density)
    assert bool(findings) == (wrong or found.wrong)


@pytest.mark.parametrize("error", ["right", "score × 1.15", "half the log-SNR"])
def test_few_samples_by_few_levels_show_it_too(error):
    """64 samples on 24 levels, as in default runs of as many chains."""
    change, wrong = WRONG[error]
    density = cp.compile(single, learned(Wrong.by(*change), "score", SCHEDULE))
    assert own_levels(density, 0).evaluations == 24 + 2 * (8 + 3)
    (found,) = compared(density, samples=64, evaluations=0).values()
    assert (found.misfit is not None) == wrong


class ToldLater(eqx.Module):
    """The noise that is right at a log-SNR which is greater by ``later``, in samples of
    0.65·N(−1.8, 0.7²) + 0.35·N(2.1, 0.4²) along the diagonal of two numbers."""

    later: jax.Array

    def __call__(self, x, log_snr):
        alpha2 = jax.nn.sigmoid(log_snr + self.later)
        variances = alpha2 * jnp.array([0.7, 0.4]) ** 2 + 1 - alpha2
        along = jnp.sqrt(alpha2) * jnp.array([-1.8, 2.1])
        means = along[:, None] * 0.5**0.5

        def log_density(x):
            away = jnp.sum((x - means) ** 2, 1) / variances
            log_weights = jnp.log(jnp.array([0.65, 0.35]) / variances)
            return jax.nn.logsumexp(log_weights - away / 2)

        return -jnp.sqrt(1 - alpha2) * jax.grad(log_density)(x)


@pytest.mark.parametrize("later", [0.0, 1.0])
def test_a_network_that_is_told_another_level_predicts_the_noise_of_that(later):
    """Its noise has about the right size, so that slope and mean do not show it. It is
    off along what ε̂ changes by from level to level."""
    network = ToldLater(jnp.float32(later))
    density = cp.compile(single, learned(network, "epsilon", SCHEDULE))
    samples = 256
    keys = jax.random.split(jax.random.key(0), samples)
    positions = jax.vmap(density.initial)(keys)
    levels = own_levels(density)
    _, slopes = own_moments(density, 0, positions, jax.random.key(1), 1, levels)
    log_snr = SCHEDULE.log_snr[np.array(levels.noised)]

    found = misfit(slopes, samples, log_snr)
    if not later:
        assert found is None
        return
    assert 0.3 < found.log_snr_offset < 2
    assert "for one that is less by" in str(found)
    assert misfit(slopes._replace(along=None), samples, log_snr) is None


def test_levels_that_samples_are_noised_to_span_signal_and_noise():
    """The noisiest level tells the scale of a score to a thousandth."""
    density = cp.compile(single, learned(Wrong.by(), "score", SCHEDULE))
    levels = own_levels(density)
    log_snr = SCHEDULE.log_snr[np.array(levels.noised)]
    assert levels.path == tuple(range(32))
    assert levels.noised[-1] == 31
    assert len(levels.noised) == tuning.FINDINGS.slope_levels
    assert np.all(np.diff(log_snr) > -4.5)
    assert log_snr[0] > 6


def test_the_path_of_own_samples_is_whole_where_it_can_be_paid():
    """Moments at level 0 are asked on whole paths only."""
    density = cp.compile(single, learned(Wrong.by(), "score", SCHEDULE))
    whole = 32 + 2 * (8 + 3)
    assert own_levels(density, whole).path == tuple(range(32))
    assert len(own_levels(density, whole - 1).path) == 31


class Wall(eqx.Module):
    """The score of a box of two numbers, of which samples next to a wall alone say
    anything."""

    height: jax.Array

    def __call__(self, x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))

        def log_density(x):
            upper = jax.scipy.special.log_ndtr((alpha * self.height - x) / sigma)
            lower = jax.scipy.special.log_ndtr((-alpha * self.height - x) / sigma)
            return jnp.sum(upper + jnp.log1p(-jnp.exp(lower - upper)))

        return jax.grad(log_density)(x)


def test_a_box_whose_walls_are_thinner_than_its_samples_are_dense():
    """At level 0 its score is 0 at most samples, which is no error."""
    network = Wall(jnp.float32(1.0))
    density = cp.compile(single, learned(network, "score", SCHEDULE))
    (found,) = compared(density, samples=64).values()
    assert found.misfit is None


def test_a_long_run_warns_of_a_network_before_its_end(monkeypatch):
    monkeypatch.setattr(tuning, "CHECKS", tuning.CHECKS._replace(long_seconds=0.0))
    monkeypatch.setattr(Progress, "pause", 1e-9)
    score = Wrong.by("scale", 1.15)
    density = cp.compile(single, learned(score, "score", SCHEDULE))
    with pytest.warns(UserWarning, match="does not predict the noise.*Ctrl-C"):
        result = run(density, chains=1000, sampler=None)
    check_finding(result.status, Code.NETWORK_DOUBTED)


class Wrong(eqx.Module):
    """The score of 0.3·N(−1, 0.3²) + 0.7·N(1.5, 0.5²) in each of two numbers, with an
    error of each kind."""

    scale: jax.Array
    later: jax.Array  # added to the log-SNR
    stretch: jax.Array  # by which the log-SNR is multiplied
    steeper: jax.Array  # relative error where there is little noise
    added: jax.Array

    @classmethod
    def by(cls, error="scale", value=1.0):
        right = {"scale": 1, "later": 0, "stretch": 1, "steeper": 0, "added": 0}
        errors = {**right, error: value}
        return cls(**{name: jnp.float32(size) for name, size in errors.items()})

    def __call__(self, x, log_snr):
        told = self.stretch * log_snr + self.later
        alpha2 = jax.nn.sigmoid(told)
        means = jnp.sqrt(alpha2) * jnp.array([-1.0, 1.5])
        variances = alpha2 * jnp.array([0.3, 0.5]) ** 2 + 1 - alpha2

        def log_density(x):
            away = (x[:, None] - means) ** 2 / variances + jnp.log(variances)
            return jnp.sum(
                jax.nn.logsumexp(jnp.log(jnp.array([0.3, 0.7])) - away / 2, 1)
            )

        steeper = 1 + self.steeper * jax.nn.sigmoid(log_snr - 4)
        return self.scale * steeper * jax.grad(log_density)(x) + self.added
