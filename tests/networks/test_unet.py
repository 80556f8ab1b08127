"""The UNet, its block with FiLM, and the matcher: shapes and dependence on inputs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composeprob.factors.networks import as_network
from composeprob.models.networks.film import FiLMBlock
from composeprob.models.networks.matcher import Matcher
from composeprob.models.networks.unet import UNet, from_patches, heat_map, to_patches
from composeprob.models.scenes import NOWHERE, PositionUNet, noisy_weight


def random_weights(build):
    """A network with every weight random, also those that start at zero.

    NumPy draws them, which compiles nothing.
    """
    rng = np.random.default_rng(3)

    def draw(a):
        scale = np.sqrt(np.prod(a.shape[:-1]))
        return (rng.normal(size=a.shape) / scale).astype(a.dtype)

    return jax.tree.map(draw, eqx.filter_eval_shape(build))


def small():
    return as_network(
        UNet(
            3,
            spatial=1,
            vector=4,
            widths=(8, 8, 16),
            blocks=1,
            embedding=16,
            rngs=nnx.Rngs(0),
        )
    )


def test_patches_are_undone():
    x = jnp.arange(8 * 4 * 3.0).reshape(8, 4, 3)
    assert to_patches(x).shape == (4, 2, 12)
    np.testing.assert_array_equal(from_patches(to_patches(x)), x)
    np.testing.assert_array_equal(to_patches(x)[1, 0], x[2:4, :2].ravel())


def test_every_input_counts():
    network = random_weights(small)
    inputs = (
        jnp.full((16, 24, 3), 0.1),
        jnp.float32(1.0),
        jnp.zeros((16, 24, 1)),
        jnp.zeros(4),
    )

    @jax.jit
    def run(x, t, spatial, vector):
        return network(x, t, spatial=spatial, vector=vector)

    output = run(*inputs)
    assert output.shape == (16, 24, 3)
    for i in range(4):
        changed = list(inputs)
        changed[i] = inputs[i] + 0.5
        assert float(jnp.abs(run(*changed) - output).max()) > 1e-3


@pytest.mark.slow
def test_it_starts_at_zero():
    @jax.jit
    def output(x):
        spatial = jnp.zeros((16, 16, 1))
        return small()(x, jnp.float32(0.0), spatial=spatial, vector=jnp.ones(4))

    np.testing.assert_array_equal(output(jnp.ones((16, 16, 3))), 0.0)


def test_it_is_small_enough_for_the_zoo():
    whole = eqx.filter_eval_shape(lambda: as_network(PositionUNet(rngs=nnx.Rngs(0))))
    leaves = jax.tree.leaves(whole)
    weights = sum(leaf.size for leaf in leaves if hasattr(leaf, "size"))
    assert 4 * weights < 7_500_000


def test_a_position_is_a_bump_there_and_nowhere_is_none():
    bump = np.asarray(heat_map(jnp.array([0.25, 0.75]), (32, 32)))[..., 0]
    row, column = np.unravel_index(bump.argmax(), bump.shape)
    assert abs(column + 0.5 - 8) <= 0.5
    assert abs(row + 0.5 - 24) <= 0.5
    assert 0.9 < bump.max() <= 1
    np.testing.assert_array_equal(heat_map(jnp.array(NOWHERE), (32, 32)), 0.0)


def test_the_weight_of_the_loss():
    log_snr = jnp.array([-8.0, 0.0, 8.0])
    alpha2 = 1 / (1 + np.exp(-np.asarray(log_snr)))
    expected = (1 - alpha2) / (alpha2 + 0.02) + 0.1
    np.testing.assert_allclose(noisy_weight(log_snr), expected, rtol=1e-4)


# ── the block ─────────────────────────────────────────────────────────────────────────


def test_the_first_half_is_the_gain_and_the_second_the_shift():
    rngs = nnx.Rngs(0)
    block = FiLMBlock(
        lambda: lambda x: x, lambda zero: nnx.Linear(5, 5, rngs=rngs), 5, 3, rngs=rngs
    )
    block.film.kernel[...] = jax.random.normal(jax.random.key(1), (3, 10))
    block.film.bias[...] = jnp.linspace(-1.0, 1.0, 10)
    x = jnp.linspace(-0.5, 0.8, 5)
    embedding = jnp.array([0.4, -0.3, 0.9])
    both = block.film(embedding)
    modulated = block.enter(nnx.swish(x)) * (1 + both[:5]) + both[5:]
    expected = x + block.leave(nnx.swish(modulated))
    np.testing.assert_allclose(block(x, embedding), expected, rtol=1e-5)


# ── the matcher: the mean over places of exp of a scalar product ──────────────────────


def small_matcher():
    return as_network(Matcher(3, 6, width=8, blocks=1, embedding=16, rngs=nnx.Rngs(0)))


def test_the_fit_of_a_text_depends_on_its_vector():
    network = eqx.filter_jit(random_weights(small_matcher))
    x = jax.random.normal(jax.random.key(0), (16, 8, 3))
    vector = jax.random.normal(jax.random.key(1), (6,))

    def fit(vector):
        return float(network(x, jnp.float32(0.0), vector=vector))

    np.testing.assert_allclose(fit(jnp.zeros(6)), 0.0, atol=1e-5)
    assert fit(vector) != 0
    # With a long vector the best of 32 places decides: the fit then grows in
    # proportion to the vector.
    best = fit(40 * vector) + np.log(32)
    twice = fit(80 * vector) + np.log(32)
    np.testing.assert_allclose(twice, 2 * best, rtol=0.1)


def test_image_noise_and_place_count():
    network = eqx.filter_jit(random_weights(small_matcher))
    # A square farther from the border than the receptive field of a patch.
    x = jnp.zeros((48, 48, 3)).at[16:20, 16:20].set(1.0)
    changed = [
        (x, 0.0),
        (x + 0.5, 0.0),
        (x, 2.0),
        (jnp.roll(x, 8, axis=1), 0.0),
        (jnp.roll(x, 8, axis=0), 0.0),
    ]
    fits = [network(image, jnp.float32(t), vector=jnp.ones(6)) for image, t in changed]
    fits = np.array(fits)
    assert np.all(np.abs(fits[1:] - fits[0]) > 1e-4), fits - fits[0]
