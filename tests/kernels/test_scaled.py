"""Scaled: the same chain in other units, so that sites of any width move together."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import ShapeError
from composeprob.kernels import HMC, MALA, UHMC, ULA, Gibbs, LineIntegral, Scaled
from kernel_chains import from_exact_draws, start, steps_of, transitions
from targets import NESTED, Law, evaluate, nested
from zscores import assert_agrees, assert_disagrees, z_scores

SDS = {"thin": 0.01, "wide": 100.0}
STARTS = {name: jnp.zeros(3) for name in SDS}


def log_density(position):
    return sum(jnp.sum(jax.scipy.stats.norm.logpdf(position[name], scale=sd)) for name, sd in SDS.items())


def statistics(position):
    units = {name: position[name] / sd for name, sd in SDS.items()}
    values = {name: jnp.mean(u) for name, u in units.items()} | {f"{n}²": jnp.mean(u**2) for n, u in units.items()}
    return values | {"both": jnp.mean(units["thin"] * units["wide"])}


EXPECTED = {"thin": 0.0, "wide": 0.0, "thin²": 1.0, "wide²": 1.0, "both": 0.0}
LAW = Law(
    "two widths",
    log_density,
    lambda key, n: {
        name: sd * jax.random.normal(k, (n, 3))
        for k, (name, sd) in zip(jax.random.split(key), SDS.items(), strict=True)
    },
    statistics,
    EXPECTED,
    3 * sum(sd**2 for sd in SDS.values()),
)


@pytest.mark.parametrize("kernel", [MALA(0.5), pytest.param(HMC(0.9), marks=pytest.mark.slow)], ids=repr)
def test_widths_of_a_hundredth_and_a_hundred(kernel):
    run = from_exact_draws(Scaled(kernel, SDS), LAW, num_chains=5_000, num_transitions=40, num_draws=10)
    assert_agrees(run.scores)
    assert run.moved > 0.4  # the wide site; the thin one:
    assert 0.3 < run.acceptance < 0.98


KERNELS = [ULA(0.1), UHMC(0.4), HMC(0.9), MALA(0.5, log_ratio=LineIntegral(3))]


@pytest.mark.parametrize("kernel", [MALA(0.5), *(pytest.param(k, marks=pytest.mark.slow) for k in KERNELS)], ids=repr)
def test_it_is_the_kernel_on_the_density_of_the_units(kernel):
    """Number for number: acceptance, moves, and how likely they are reversed."""
    key, count = jax.random.key(0), 20
    units = jax.random.normal(key, (2, 500, 3))
    target, unit_target = evaluate(log_density), evaluate(lambda u: -0.5 * sum(jnp.sum(x**2) for x in u.values()))
    scaled, ends = Scaled(kernel, SDS), {}
    for name, k, t, widths in (
        ("own", scaled, target, SDS),
        ("units", kernel, unit_target, {"thin": 1.0, "wide": 1.0}),
    ):
        positions = {site: sd * units[i] for i, (site, sd) in enumerate(widths.items())}
        states = start(k, t, jax.random.key(1), positions)
        states, info = transitions(k, t, jax.random.key(2), states, steps_of(k), count)
        ends[name] = {site: states.position[site] / sd for site, sd in widths.items()}, info
    for site in SDS:
        np.testing.assert_allclose(ends["own"][0][site], ends["units"][0][site], rtol=1e-3, atol=1e-3)
    own, plain = ends["own"][1], ends["units"][1]
    np.testing.assert_allclose(own.acceptance, plain.acceptance, atol=2e-3)
    np.testing.assert_allclose(own.log_reversal, plain.log_reversal, atol=5e-3)
    assert scaled.evaluations_per_step == kernel.evaluations_per_step
    assert scaled.requires == kernel.requires


@pytest.mark.slow
def test_without_scales_the_thin_site_holds_up_the_wide_one():
    """The negative control: one step for both either hardly moves the wide site or is always rejected."""
    for h, check in ((0.5 * 0.01**2, lambda run: run.moved < 1e-4), (0.5, lambda run: run.acceptance < 1e-3)):
        assert check(from_exact_draws(MALA(h), LAW, num_chains=500, num_transitions=20, num_draws=2))


class HalfScaled(Scaled):
    """Forgets that the score changes with the units."""

    def step(self, key, state, target, step_size):
        def unscaled(position):
            return target({name: self.scales[name] * u for name, u in position.items()})

        units = {name: x / self.scales[name] for name, x in state.position.items()}
        inner = type(state)(units, state.evaluation)
        inner, info = self.kernel.step(key, inner, unscaled, step_size)
        back = {name: self.scales[name] * u for name, u in inner.position.items()}
        return type(state)(back, inner.evaluation), info


def test_scores_of_other_units_fail():
    widths = {"thin": 0.7, "wide": 1.5}
    law = Law(
        "two", lambda p: -0.5 * sum(jnp.sum((p[n] / sd) ** 2) for n, sd in widths.items()),
        lambda key, n: {
            name: sd * jax.random.normal(k, (n, 3))
            for k, (name, sd) in zip(jax.random.split(key), widths.items(), strict=True)
        },
        lambda p: {f"{name}²": jnp.mean((p[name] / sd) ** 2) for name, sd in widths.items()},
        {"thin²": 1.0, "wide²": 1.0}, 8.0,
    )  # fmt: skip
    options = {"num_chains": 3_000, "num_transitions": 20, "num_draws": 5}
    assert_agrees(from_exact_draws(Scaled(ULA(0.02), widths), law, **options).scores | {"thin²": 0.0, "wide²": 0.0})
    assert_disagrees(from_exact_draws(HalfScaled(ULA(0.02), widths), law, **options).scores)


@pytest.mark.slow
def test_in_blocks_and_around_them():
    law = nested()
    blocks = Gibbs({"a": Scaled(MALA(0.3), {"a": 1.2}), "b": HMC(0.5)})
    for kernel in (blocks, Scaled(blocks, {"b": 0.9})):
        assert kernel.blocks == (("a",), ("b",))
        run = from_exact_draws(kernel, law, num_chains=2_000, num_transitions=20, num_draws=4)
        assert_agrees(run.scores)
    assert Scaled(blocks, {"b": 0.9}).reversal.kernel.backwards


def test_arrays_are_scales_of_their_entries():
    target = evaluate(lambda p: -0.5 * jnp.sum((p["a"] / jnp.array([0.1, 10.0])) ** 2) - 0.5 * p["b"] ** 2)
    kernel = Scaled(MALA(0.5), {"a": jnp.array([0.1, 10.0])})
    position = {"a": jnp.zeros((500, 2)), "b": jnp.zeros(500)}
    states, info = transitions(
        kernel, target, jax.random.key(1), start(kernel, target, jax.random.key(0), position), 0.5, 20
    )
    np.testing.assert_allclose(states.position["a"].std(0), [0.1, 10.0], rtol=0.2)
    assert info.acceptance.mean() > 0.7
    with pytest.raises(ShapeError, match=r"'a' has shape \(3,\)"):
        Scaled(MALA(0.5), {"a": jnp.ones(3)}).init(jax.random.key(0), NESTED, target)


@cp.program
def two_widths():
    cp.sample("thin", dist.Normal(0.0, 0.01).expand([3]).to_event(1))
    cp.sample("wide", dist.Normal(0.0, 100.0).expand([3]).to_event(1))


@pytest.mark.slow
def test_an_adaptive_step_is_common_to_all_scales():
    density = cp.compile(two_widths)
    sampler = cp.AnnealedMCMC(cp.Scaled(cp.MALA(cp.Adaptive(warmup=10)), SDS), 10)
    result = cp.infer(density, jax.random.key(0), num_chains=2048, sampler=sampler, progress=False)
    values = jax.vmap(statistics)({name: jnp.asarray(result[name]) for name in SDS})
    assert_agrees(z_scores({name: np.asarray(v) for name, v in values.items()}, EXPECTED))
    assert abs(result.acceptance[0] - 0.574) < 0.05
    assert "Scaled(MALA" in result.sampler
