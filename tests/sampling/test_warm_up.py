"""`cp.WarmUp` at level 0, latents that follow a noised site, and SMC that gives way to
independent chains."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.results.status import Code
from composeprob.runtime import compiled, stages
from composeprob.samplers.choose import choose, independent
from composeprob.samplers.funnels import FunnelMoves
from composeprob.samplers.run import begin
from messages import check_finding, check_wording
from sampling_cases import both, normal, run, single
from targets import product_of_normals

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

SHORT = cp.Schedule.log_snr(12)
Y = jnp.array([0.9, 1.3, 1.1, 0.8])


@cp.program
def centred(f):
    x = cp.sample("x", f)
    tau = cp.sample("tau", dist.HalfNormal(0.5))
    theta = cp.sample("theta", dist.Normal(x, tau).expand([4]).to_event(1))
    cp.observe("y", dist.Normal(theta, 0.2).to_event(1), Y)


@cp.program
def non_centred(f):
    x = cp.sample("x", f)
    tau = cp.sample("tau", dist.HalfNormal(0.5))
    z = cp.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    cp.observe("y", dist.Normal(x + tau * z, 0.2).to_event(1), Y)


def test_centred_and_non_centred_are_one_density():
    """At every level the same position has the same density: a centred latent is
    measured from where its prior is."""
    one = cp.compile(centred, normal(0.0, 1.0, SHORT))
    other = cp.compile(non_centred, normal(0.0, 1.0, SHORT))
    initial = jax.jit(other.initial)
    log_density = jax.jit(one.log_density)
    other_log_density = jax.jit(other.log_density)
    alpha = float(one.schedule.alpha[0])
    for seed, level in ((0, 0), (1, 5), (2, 11)):
        position = initial(jax.random.key(seed), level)
        same = {"x": position["x"], "tau": position["tau"], "theta": position["z"]}
        np.testing.assert_allclose(
            log_density(same, level), other_log_density(position, level), rtol=1e-4
        )
        theta = one.to_samples(same)["theta"]
        expected = position["x"] / alpha + jnp.exp(position["tau"]) * position["z"]
        np.testing.assert_allclose(theta, expected, rtol=1e-4)
    assert "y exact" in str(one)
    check_wording(str(one), "centred")
    check_wording(str(other), "non-centred")


def test_a_log_normal_that_follows_a_noised_site_is_standardised_too():
    @cp.program
    def program(f):
        x = cp.sample("x", f)
        scale = cp.sample("scale", dist.LogNormal(x, 0.3))
        cp.observe("y", dist.Normal(0.0, scale), 1.0)

    density = cp.compile(program, normal(0.0, 1.0, SHORT))
    position = {"x": jnp.float32(0.4), "scale": jnp.float32(-1.2)}
    alpha = float(density.schedule.alpha[0])
    np.testing.assert_allclose(
        density.to_samples(position)["scale"],
        np.exp(0.4 / alpha - 0.3 * 1.2),
        rtol=1e-5,
    )
    density.log_density(position, 3)


def test_a_warm_up_moves_a_population_that_is_not_there_yet():
    """A kernel with tiny steps leaves chains where the noise of the levels had them; a
    warm-up in units of the population's widths brings both coordinates to theirs."""
    density = cp.compile(single, normal(jnp.zeros(2), jnp.array([1.0, 5.0]), SHORT))
    sampler = cp.AnnealedMCMC(cp.HMC(1e-4), 1, then=cp.WarmUp())
    result = run(density, chains=200, sampler=sampler)
    assert result.status.ok
    np.testing.assert_allclose(result["x"].std(0), [1.0, 5.0], rtol=0.2)
    per_block = 8 * (50 + 10)
    assert (result.evaluations - 12 * 4) % per_block == 0
    assert result.evaluations >= 12 * 4 + 2 * per_block
    again = run(density, chains=200, sampler=sampler)
    np.testing.assert_array_equal(result["x"], again["x"])


@pytest.mark.parametrize("draws", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_an_interrupted_warm_up_keeps_what_came_down_and_goes_on_to_the_same_end(
    monkeypatch, tmp_path, draws
):
    density = cp.compile(non_centred, normal(0.0, 1.0, SHORT))
    sampler = cp.AnnealedMCMC(cp.HMC(0.05), 1, then=cp.WarmUp())
    options = {
        "chains": 32,
        "sampler": sampler,
        "draws": draws,
        "checkpoint_dir": tmp_path / "stopped",
    }

    def pressed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "close", pressed)
        stopped = run(density, **options)
    assert stopped.status.code is Code.INTERRUPTED
    assert "checkpoint" in check_finding(stopped.status, Code.INTERRUPTED)
    assert np.isfinite(stopped["tau"]).all()
    error = stopped.mean(lambda s: s["tau"]).error
    assert error is None or np.isnan(error)
    whole = run(density, **options | {"checkpoint_dir": tmp_path / "whole"})
    np.testing.assert_array_equal(run(density, **options)["tau"], whole["tau"])
    assert not whole.status.has(Code.INTERRUPTED)


def test_density_terms_are_unknown_after_a_warm_up(monkeypatch):
    """They belonged to where the chains were before."""
    ended = []
    summarised = stages.summarised

    def noting(state, *rest):
        ended.append(state)
        return summarised(state, *rest)

    monkeypatch.setattr(stages, "summarised", noting)
    density = cp.compile(non_centred, normal(0.0, 1.0, SHORT))
    sampler = cp.SMC(cp.MALA(0.05), step=FIRST_ORDER, then=cp.WarmUp())
    run(density, chains=32, sampler=sampler)
    evaluation = ended[0].run.chains.evaluation
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(evaluation.terms))
    assert np.isfinite(evaluation.log_density).all()


def sharp_score(x, level):
    """Return the score of N(0, I), noised."""
    noise = SHARP.at(level)
    return -x / (noise.alpha**2 + noise.sigma**2)


SHARP = cp.Schedule.log_snr(40)


@cp.program
def sharp(f, noise):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x[:8], noise).to_event(1), jnp.linspace(-1.0, 1.0, 8))


def test_independent_chains_come_to_data_that_are_finer_than_level_0():
    """Half of 16 numbers seen with a quarter of level 0's noise: the step there leaves
    chains twice as wide as that."""
    f = cp.Diffusion(sharp_score, SHARP, event_shape=(16,), parameterization="score")
    density = cp.compile(sharp, f, 0.001)
    sampler, reason = independent(density, "asked", 128)
    assert sampler.finishers == (cp.WarmUp(),)
    assert "as the data are finer than it is" in reason
    coarser, _ = independent(cp.compile(sharp, f, 0.01), "asked", 128)
    assert coarser.finishers == ()

    def finished(then):
        kept = cp.AnnealedMCMC(sampler.kernel, 3, reverse_step=FIRST_ORDER, then=then)
        return run(density, chains=128, sampler=kept)

    def relative_width(result):
        away = result["x"][:, :8] - np.linspace(-1.0, 1.0, 8)
        return np.mean(away**2) ** 0.5 / 0.001

    assert relative_width(finished(())) > 1.5
    result = finished((cp.WarmUp(),))
    assert abs(relative_width(result) - 1) < 0.1
    assert not result.status.has("levels_too_few")  # as most of the chains count
    np.testing.assert_allclose(result["x"][:, 8:].std(0), 1.0, atol=0.3)


class TestGivingUp:
    """Weights so uneven that the default cannot be SMC."""

    coarse = cp.Schedule.log_snr(8)

    def density(self):
        """64 narrow modes under a Gaussian to one side of them: no fit could make their
        weights even."""
        bits = dist.MixtureSameFamily(
            dist.Categorical(jnp.full((6, 2), 0.5)),
            dist.Normal(jnp.tile(jnp.array([-1.0, 1.0]), (6, 1)), 0.1),
        )
        return cp.compile(
            both,
            cp.Analytic(bits, self.coarse),
            normal(jnp.full(6, 0.5), 0.3, self.coarse),
        )

    def test_independent_chains_take_its_place_on_levels_that_were_asked_for(
        self, tmp_path, monkeypatch
    ):
        density = self.density()
        words = []
        times = []

        def begun(*given, **more):
            made = begin(*given, **more)
            words.append(np.asarray(made.words))
            times.append(time.monotonic())
            return made

        monkeypatch.setattr(stages, "begin", begun)
        asked = {"levels": self.coarse.log_snr, "checkpoint_dir": tmp_path}
        result = run(density, chains=256, sampler=None, **asked)
        # The time of the run that was given up counts too.
        assert result.about.seconds > time.monotonic() - times[0]
        assert result.about.sampler.startswith("AnnealedMCMC")
        assert "; replaced because " in result.reason
        assert 0 < result.trust.path_weights <= 256
        assert "of 256  chains' worth of path weights" in str(result.trust)
        # The run that replaces the first, after that one's repetition, uses a fresh
        # random stream: the first one's outcome is the reason for it.
        first, repetition, instead = words
        assert not np.isin(instead, [first, repetition]).any()
        assert result.effective_chains == pytest.approx(256)
        assert not result.status.has(Code.ANCESTORS_COLLAPSED)
        sampler, _ = independent(density, "", 256)
        alone = run(density, chains=256, sampler=sampler, levels=self.coarse.log_snr)
        # The result counts the evaluations of the run that was given up.
        assert alone.evaluations < result.evaluations
        again = run(density, chains=256, sampler=None, **asked)  # from both checkpoints
        np.testing.assert_array_equal(result["x"], again["x"])
        assert again.reason == result.reason

    def test_else_closer_levels_do_and_know_the_evidence(self, tmp_path):
        """Six independent coordinates: a mode at +1 has all but nothing of the other
        one's mass under N(½, 0.3²)."""
        result = run(self.density(), chains=256, sampler=None, checkpoint_dir=tmp_path)
        assert "; replaced because " in result.reason
        assert "300 levels" in result.reason
        assert result.status.ok
        *_, by_mode = product_of_normals(
            self.coarse.alpha[0],
            self.coarse.sigma[0],
            means=[[1.0, -1.0], [0.5, 0.5]],
            sds=[[0.1, 0.1], [0.3, 0.3]],
        )
        one = np.logaddexp(*by_mode) - np.log(2)
        assert abs(result.log_evidence - 6 * one) < 4 * result.log_evidence_error < 2
        # From both checkpoints.
        again = run(self.density(), chains=256, sampler=None, checkpoint_dir=tmp_path)
        np.testing.assert_array_equal(result["x"], again["x"])
        assert again.evaluations == result.evaluations


def test_programs_with_latents_warm_up_by_default():
    hierarchy = cp.compile(centred, normal(0.0, 1.0, SHORT))
    sampler, reason = independent(hierarchy, "because")
    assert sampler.finishers == (cp.WarmUp(), FunnelMoves())
    assert reason.startswith("because: independent chains")

    def finishers(density):
        sampler, _ = choose(density, 1000)
        return sampler.finishers

    few_numbers = cp.compile(single, normal(jnp.zeros(2), 1.0, SHORT))
    many_numbers = cp.compile(single, normal(jnp.zeros(21), 1.0, SHORT))
    all_three = (cp.GlobalMoves(8), cp.WarmUp(), FunnelMoves())
    assert finishers(hierarchy) == all_three
    assert finishers(few_numbers) == (cp.GlobalMoves(8), FunnelMoves())
    assert finishers(many_numbers) == (FunnelMoves(),)
