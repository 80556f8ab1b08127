"""Importance weights as objects: short names, weights of one's own, and their
evidence."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import CapabilityError, LoadError
from composeprob.kernels.kernel import log_density_of
from sampling_cases import both, learned, normal
from zscores import LIMIT

LEVELS = cp.Schedule.log_snr(16, min=-6.0, max=6.0)
KEY = jax.random.key(0)


class Scaled(cp.DensityRatio):
    """The ratio of densities, times a number: right where the number is 1."""

    scale: jax.Array | float = 1.0

    def gained(self, passage):
        change = log_density_of(passage.after) - log_density_of(passage.before)
        return self.scale * change


@pytest.fixture(scope="module")
def density():
    return cp.compile(both, normal(0.0, 1.0, LEVELS), normal(3.0, 0.5, LEVELS))


def infer(density, weights, **options):
    sampler = cp.SMC(cp.MALA(cp.Adaptive()), weights=weights)
    return cp.infer(
        density, KEY, num_chains=512, sampler=sampler, progress=False, **options
    )


@pytest.fixture(scope="module")
def short_name(density):
    return infer(density, "density")


def test_short_names_stand_for_objects():
    assert isinstance(cp.SMC().weights, cp.FeynmanKac)
    named = cp.SMC(weights="density")
    assert isinstance(named.weights, cp.DensityRatio)
    assert cp.SMC(weights=cp.DensityRatio()).describe() == named.describe()
    assert cp.SMC(weights=cp.FeynmanKac()).describe() == cp.SMC().describe()


def test_own_weights_are_printed_as_themselves():
    described = cp.SMC(weights=Scaled(scale=0.5)).describe()
    assert "weights=Scaled(scale=0.5)" in described
    assert list(cp.SMC(weights=Scaled()).requires) == ["SMC(weights=Scaled(scale=1))"]


def test_own_weights_run_as_those_of_the_library(density, short_name):
    """The same formula gives the same bits, and the closed form of the evidence."""
    result = infer(density, Scaled())
    np.testing.assert_array_equal(result["x"], short_name["x"])
    assert result.log_evidence == short_name.log_evidence
    noise = LEVELS.at(0)
    variances = noise.alpha**2 * jnp.array([1.0, 0.5]) ** 2 + noise.sigma**2
    overlap = dist.Normal(0.0, jnp.sqrt(variances.sum()))
    exact = float(overlap.log_prob(3 * noise.alpha))
    error = abs(result.log_evidence - exact)
    assert error < LIMIT * result.log_evidence_error

    halved = infer(density, Scaled(scale=0.5))
    error = abs(halved.log_evidence - exact)
    assert error > LIMIT * halved.log_evidence_error


def test_a_run_with_other_weights_is_another_run(density, tmp_path):
    infer(density, Scaled(), checkpoint_dir=tmp_path)
    with pytest.raises(LoadError, match="Scaled"):
        infer(density, Scaled(scale=0.5), checkpoint_dir=tmp_path)


def test_capabilities_of_own_weights_are_asked_for():
    score = learned(lambda x, level: -x, "score", LEVELS, ())
    density = cp.compile(both, score, score)
    with pytest.raises(CapabilityError, match=r"Scaled\(scale=1\)\) needs `energy`"):
        infer(density, Scaled())
