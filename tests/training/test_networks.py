"""The residual MLP is one function in Flax NNX and in Equinox; its output scale."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import composeprob as cp
from composeprob.factors.networks import as_network
from composeprob.models.networks import residual_mlp_eqx, residual_mlp_nnx
from composeprob.models.networks.conditioning import OutputScale, log_snr_features
from networks.test_unet import random_weights
from sampling_cases import learned

SIZES = {"hidden": 16, "blocks": 2, "embedding": 8}


def as_nnx(network, **settings):
    """The NNX network with the weights of an Equinox one."""
    twin = residual_mlp_nnx.ResidualMLP(2, rngs=nnx.Rngs(0), **SIZES, **settings)

    def copy(to, source):
        to.kernel[...] = source.weight.T
        to.bias[...] = source.bias

    if network.table is not None:
        twin.table.embedding[...] = network.table.weight
    copy(twin.first, network.first)
    copy(twin.last, network.last)
    for to, source in zip(twin.blocks, network.blocks, strict=True):
        to.norm.scale[...] = source.norm.weight
        to.norm.bias[...] = source.norm.bias
        for layer in ("enter", "time", "middle", "leave"):
            copy(getattr(to, layer), getattr(source, layer))
    return twin


SETTINGS = {"plain": {}, "levels": {"num_levels": 10}, "scalar": {"outputs": 1}}
SETTINGS["epsilon"] = {"output_scale": OutputScale("epsilon", 0.4, 0.1)}
SETTINGS["energy"] = {"output_scale": OutputScale("energy_norm", 0.4, 0.0)}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equinox_and_nnx_are_the_same_function(settings):
    x = jax.random.normal(jax.random.key(1), (20, 2))
    t = jnp.arange(20) % 10 if "num_levels" in settings else jnp.linspace(-10, 9, 20)

    @jax.jit
    def both(network):
        return jax.vmap(network)(x, t), jax.vmap(as_nnx(network, **settings))(x, t)

    def build():
        key = jax.random.key(0)
        return residual_mlp_eqx.ResidualMLP(2, key=key, **SIZES, **settings)

    ours, theirs = both(random_weights(build))
    assert ours.shape == (20, settings.get("outputs", 2))
    assert float(jnp.std(ours)) > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["equinox", "nnx"])
def test_it_starts_at_zero_and_has_the_paper_s_size(kind):
    def build(key):
        if kind == "equinox":
            return as_network(residual_mlp_eqx.ResidualMLP(2, key=key))
        return as_network(residual_mlp_nnx.ResidualMLP(2, rngs=nnx.Rngs(params=key)))

    @jax.jit
    def output(key):
        return build(key)(jnp.ones(2), jnp.float32(1.0))

    np.testing.assert_array_equal(output(jax.random.key(0)), 0.0)
    norm = 2 * 128
    layers = ((128, 256), (32, 256), (256, 256), (256, 128))
    block = norm + sum(inputs * outputs + outputs for inputs, outputs in layers)
    first = 2 * 128 + 128
    last = 128 * 2 + 2
    network = eqx.filter_eval_shape(build, jax.random.key(0))
    arrays = eqx.filter(network, lambda leaf: hasattr(leaf, "shape"))
    sizes = [array.size for array in jax.tree.leaves(arrays)]
    assert sum(sizes) == first + 4 * block + last


@pytest.mark.parametrize("parameterization", ["epsilon", "energy_norm"])
def test_with_no_correction_the_scaled_network_is_the_gaussian_of_the_data_s_variance(
    parameterization,
):
    schedule = cp.Schedule.log_snr(20)
    scale = OutputScale(parameterization, 0.4, 0.1)
    build = eqx.filter_jit(residual_mlp_eqx.ResidualMLP)
    network = build(2, output_scale=scale, key=jax.random.key(0), **SIZES)
    factor = learned(network, parameterization, schedule, label="untrained")
    x = jnp.array([0.3, -0.7])
    for level in (0, 10, 19):
        noise = schedule.at(level)
        variance = (0.4 * noise.alpha) ** 2 + noise.sigma**2
        log_density, score = jax.jit(lambda noise: factor.evaluate(x, noise, {}))(noise)
        np.testing.assert_allclose(score, -x / variance, rtol=1e-4)
        if parameterization == "energy_norm":
            expected = -0.5 * jnp.sum(x**2) / variance
            np.testing.assert_allclose(log_density, expected, rtol=1e-4)


def test_time_features_tell_all_log_snr_apart():
    features = jax.vmap(lambda t: log_snr_features(t, 32))(jnp.linspace(-16, 12, 57))
    distance = jnp.linalg.norm(features[:, None] - features[None], axis=-1)
    distance = distance + 10 * jnp.eye(57)
    assert features.shape == (57, 32)
    assert float(distance.min()) > 0.3
