"""Weights as safetensors: they come back bit for bit, and what does not fit is named."""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from composeprob.errors import InvalidValueError, LoadError
from composeprob.models.networks import residual_mlp_nnx
from composeprob.training import load_weights, save_weights
from refusals import refused
from training.recipes import tiny

KEY = jax.random.key(0)


def nnx_network(key):
    return residual_mlp_nnx.ResidualMLP(2, hidden=8, blocks=1, embedding=4, rngs=nnx.Rngs(params=key))


@pytest.mark.parametrize("kind", ["equinox", "nnx"])
def test_round_trip(tmp_path, kind):
    recipe = tiny() if kind == "equinox" else dataclasses.replace(tiny(), network=nnx_network)
    network = eqx.filter_jit(recipe.untrained)(KEY)
    save_weights(network, tmp_path / "w.safetensors")
    loaded = load_weights(eqx.filter_eval_shape(recipe.untrained, KEY), tmp_path / "w.safetensors")
    leaves = jax.tree.leaves(eqx.filter(network, eqx.is_array))
    for one, other in zip(leaves, jax.tree.leaves(eqx.filter(loaded, eqx.is_array)), strict=True):
        np.testing.assert_array_equal(one, other)
    x, t = np.ones(2, np.float32), np.float32(1.0)
    np.testing.assert_array_equal(network(x, t), loaded(x, t))
    names = set(load_file(tmp_path / "w.safetensors"))
    assert ("blocks.0.enter.weight" if kind == "equinox" else "state.blocks.0.enter.kernel") in names


def test_weights_of_single_precision_load_where_double_is_the_default(tmp_path):
    shapes = eqx.filter_eval_shape(tiny().untrained, KEY)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    save_weights(zeros, tmp_path / "w.safetensors")
    double = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, np.float64), shapes)
    loaded = load_weights(double, tmp_path / "w.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


def test_half_precision_is_read_as_single(tmp_path):
    network, path = eqx.filter_jit(tiny().untrained)(KEY), tmp_path / "w.safetensors"
    save_weights(network, path, half=True)
    assert {array.dtype for array in load_file(path).values()} == {np.dtype(np.float16)}
    loaded = load_weights(eqx.filter_eval_shape(tiny().untrained, KEY), path)
    for one, other in zip(*(jax.tree.leaves(eqx.filter(n, eqx.is_array)) for n in (network, loaded)), strict=True):
        assert other.dtype == one.dtype
        np.testing.assert_allclose(one, other, rtol=2.0**-11, atol=1e-7)
    large = eqx.tree_at(lambda n: n.last.bias, network, np.full(2, 1e5, np.float32))
    with pytest.raises(InvalidValueError, match=r"'last.bias' holds 1e\+05, too large for half"):
        save_weights(large, path, half=True)


def test_what_does_not_fit_is_named(tmp_path):
    network, path = eqx.filter_jit(tiny().untrained)(KEY), tmp_path / "w.safetensors"
    save_weights(network, path)
    good = load_file(path)

    def refuses(tensors, told):
        save_file(tensors, path)
        refused(lambda: load_weights(network, path), LoadError, told)

    refuses({k: v for k, v in good.items() if k != "last.bias"}, r"lacks last\.bias")
    refuses({**good, "extra": np.zeros(3, np.float32)}, "it has extra, which the network has not")
    refuses({**good, "last.bias": np.zeros(3, np.float32)}, r"'last.bias' in .* is float32\[3\]; .* float32\[2\]")
    refuses({**good, "last.bias": np.zeros(2, np.float64)}, r"is float64\[2\]")
    path.write_bytes(b"not safetensors")
    refused(lambda: load_weights(network, path), LoadError, "cannot be read")
    refused(lambda: load_weights(network, tmp_path / "missing.safetensors"), LoadError, "cannot be read")
