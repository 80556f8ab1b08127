"""`cp.calibrated`: ranks of a right program are uniform, those of a wrong kernel not.

Interrupted runs are resumed.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.calibration import simulated
from composeprob.calibration.simulated import Calibration, uniformity
from composeprob.errors import CapabilityError, InvalidValueError, LoadError
from composeprob.results.estimates import Genealogy
from messages import check_wording
from refusals import refused
from sampling_cases import normal, single

KEY = jax.random.key(0)


@cp.program
def measurement(f, y):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x, 0.5), y)


F = normal(schedule=cp.Schedule.log_snr(12))


def ranked(kernel, **options):
    """Ranks of the measurement under a kernel."""
    defaults = {
        "num": 40,
        "num_chains": 32,
        "key": KEY,
        "sampler": cp.AnnealedMCMC(kernel, 3),
    }
    options = defaults | options
    return cp.calibrated(measurement, F, 0.25, progress=False, **options)


@pytest.mark.slow
def test_right_and_wrong_kernels_and_resumption(tmp_path):
    right = ranked(cp.MALA(0.3), checkpoint_dir=tmp_path)
    assert right.calibrated, str(right)
    assert set(right.ranks) == {"x", "log-likelihood"}
    check_wording(str(right), "right", estimated=True)
    # As if it had stopped before the last data set.
    checkpoint = tmp_path / "ranks.json"
    saved = json.loads(checkpoint.read_text())
    partial = saved | {"rows": saved["rows"][:-1]}
    checkpoint.write_text(json.dumps(partial))
    resumed = ranked(cp.MALA(0.3), checkpoint_dir=tmp_path)
    np.testing.assert_array_equal(resumed.ranks["x"], right.ranks["x"])
    refused(
        lambda: ranked(cp.ULA(0.3), checkpoint_dir=tmp_path),
        LoadError,
    )
    wrong = ranked(cp.ULA(0.3))  # without a test the posterior is four times as wide
    assert not wrong.calibrated
    check_wording(str(wrong), "wrong", estimated=True)
    assert len(wrong.plot().axes) == 2


@cp.program
def shifted(f, y):
    """Readings of two numbers behind a shift, with a noise of unknown size."""
    x = cp.sample("x", f)
    m = cp.sample("m", dist.Normal(0.3, 0.5))
    s = cp.sample("s", dist.LogNormal(-0.5, 0.4))
    cp.observe("y", dist.Normal(x + m, s).expand([3, 2]), y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [cp.HMC(0.25, num_leapfrog=4), cp.UHMC(0.7, num_leapfrog=1)],
    ids=["right", "wrong"],
)
def test_noised_sites_and_latents_in_blocks(kernel):
    factor = normal([0.0, 0.5], [1.0, 0.7], cp.Schedule.log_snr(12, min=-6.0, max=8.0))
    sampler = cp.AnnealedMCMC(cp.Gibbs({"x": kernel, ("m", "s"): kernel}), 4)
    options = {
        "num": 100,
        "num_chains": 31,
        "key": KEY,
        "sampler": sampler,
        "progress": False,
    }
    found = cp.calibrated(shifted, factor, jnp.zeros((3, 2)), **options)
    assert found.calibrated == isinstance(kernel, cp.HMC), str(found)


def test_copies_of_one_chain_are_ranked_once(monkeypatch):
    """With half of the weights 0, the other chains are twice among resampled ones."""
    infer = simulated.infer
    ranks = simulated._ranks
    ranked_draws = []

    def weighted(density, key, *, num_chains, **options):
        result = infer(density, key, num_chains=num_chains, **options)
        log_weights = np.where(np.arange(num_chains) % 2, 0.0, -np.inf)
        return dataclasses.replace(
            result,
            log_weights=log_weights,
            _genealogy=Genealogy.from_log_weights(log_weights),
        )

    def recorded(density, truth, drawn, rng):
        ranked_draws.append(drawn["x"])
        return ranks(density, truth, drawn, rng)

    monkeypatch.setattr(simulated, "infer", weighted)
    monkeypatch.setattr(simulated, "_ranks", recorded)
    ranked(cp.MALA(0.3), num=20)
    assert len(ranked_draws) == 20
    assert all(len(x) == len(np.unique(x)) == 16 for x in ranked_draws)


def test_uniformity():
    rng = np.random.default_rng(0)
    p = [uniformity(rng.uniform(size=100)) for _ in range(400)]
    assert 0.02 < np.mean(np.array(p) < 0.1) < 0.15
    assert uniformity(rng.beta(3, 3, size=100)) < 0.01
    assert not Calibration({"x": rng.beta(3, 3, 100)}, {"x": 1e-5}).calibrated


def test_what_is_refused():
    refused(lambda: ranked(cp.MALA(0.3), num=5), InvalidValueError)
    refused(lambda: cp.calibrated(single, F, key=KEY), CapabilityError)

    @cp.program
    def moved(f, y):
        x = cp.sample("x", f)
        cp.observe("y", dist.Normal(x, 0.5), 2.0 * y)

    refused(
        lambda: cp.calibrated(moved, F, jnp.array(0.25), key=KEY),
        InvalidValueError,
    )
