"""The control: a drift that leaves the law alone and takes the noise out of the weights."""

import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.samplers.control import steered
from sampling_cases import both, normal, run

squared = cp.program(lambda f: cp.sample("x", f**2))


def test_the_potential_of_a_power_of_noise_is_a_constant():
    """r + ∇·u + ⟨u, S⟩ of f² under N(0, I): the same at every x; without u it is a quadratic function."""
    density = cp.compile(squared, normal(jnp.zeros(3)))
    for level in (0, 12, 31):
        points = [{"x": jnp.asarray(x)} for x in ([0.0, 0.0, 0.0], [1.0, -0.5, 0.3], [-2.0, 1.0, 0.1])]
        seen = [density.evaluate(p, level) for p in points]
        rates = [float(steered(e, p, density, level).parts.rate) for e, p in zip(seen, points, strict=True)]
        np.testing.assert_allclose(rates, rates[0], rtol=1e-3, atol=1e-4)
        assert np.ptp([float(e.parts.rate) for e in seen]) > 0.3


def test_what_is_followed_moves_by_u():
    density = cp.compile(squared, normal(jnp.zeros(3)))
    position = {"x": jnp.array([1.0, -0.5, 0.3])}
    noise, seen = density.schedule.at(9), density.evaluate(position, 9)
    expected = seen.parts.drift["x"] + 0.5 * position["x"] / (noise.alpha**2 + noise.sigma**2)
    np.testing.assert_allclose(steered(seen, position, density, 9).parts.drift["x"], expected, rtol=1e-5)


def test_powers_of_a_gaussian_lose_no_chain_and_have_the_right_evidence():
    """f² in ten dimensions on 32 levels, −5·log 4π: exact to 1e-3, and no chain is ever copied."""
    density = cp.compile(squared, normal(jnp.zeros(10)))
    result = run(density, chains=64, sampler=cp.SMC(cp.MALA(0.05)))
    np.testing.assert_allclose(result.log_evidence, -5 * np.log(4 * np.pi), atol=2e-3)
    assert result.log_evidence_error < 0.02
    assert np.nanmin(result.ancestors) == 64
    without = run(density, chains=64, sampler=cp.SMC(cp.MALA(0.05), control="none", check_levels=False))
    assert np.nanmin(without.ancestors) < 32


@pytest.mark.parametrize(
    "options",
    [("affine", "fitted"), *(pytest.param((name, "explicit"), marks=pytest.mark.slow) for name in ("affine", "none"))],
)
def test_the_law_is_the_same_with_and_without(options):
    """Mean 0.8 and 0, variances 1/(1 + 1/0.25) of a product of two Gaussians; no kernel repairs anything."""
    density = cp.compile(both, normal([0.0, 0.0], 1.0), normal([1.0, 0.0], 0.5))
    control, integrator = options
    sampler = cp.SMC(cp.MALA(1e-6), control=control, integrator=integrator, check_levels=False)
    result = run(density, chains=2048, sampler=sampler)
    mean = result.mean(lambda s: s["x"])
    assert np.all(np.abs(mean.value - [0.8, 0.0]) < 4 * mean.error + 0.02)
    second = result.mean(lambda s: (s["x"] - jnp.array([0.8, 0.0])) ** 2)
    assert np.all(np.abs(second.value - 0.2) < 4 * second.error + 0.02)


def test_a_control_of_another_name_is_refused():
    with pytest.raises(cp.errors.InvalidValueError, match="Unknown control 'linear'"):
        cp.SMC(control="linear")
    assert "control='none'" in cp.SMC(control="none").describe()
