"""Random numbers by counter: JAX's own hash, normal numbers of the right law, and
nothing that repeats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from composeprob.samplers import random
from composeprob.samplers.random import (
    Stream,
    key_of,
    normals,
    stream,
    threefry,
    words_of,
)
from zscores import assert_agrees, assert_disagrees, z_scores

RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 2**32, (1000, 2), dtype=np.uint32)
DRAW = jax.jit(jax.vmap(normals, (0, None, None)), static_argnums=2)
SIZE = 101


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_the_hash_is_jaxs_bit_for_bit(as_array):
    """On the host and where it is traced: every counter of a few chains, and numbers
    from 0 to 2³² − 1."""
    numbers = np.r_[0, 1, RNG.integers(0, 2**32, 5), 2**32 - 1].astype(np.uint32)
    for words, number in zip(WORDS, numbers, strict=False):
        with np.errstate(over="ignore"):
            hashed = threefry(as_array(words), as_array(number), as_array(numbers))
        counts = jnp.concatenate([jnp.full(8, number), numbers])
        expected = threefry_2x32(jnp.asarray(words), counts)
        np.testing.assert_array_equal(np.concatenate(hashed), expected)
    key = jax.random.wrap_key_data(WORDS[0], impl="threefry2x32")
    folded = jax.random.key_data(jax.random.fold_in(key, 7))
    np.testing.assert_array_equal(threefry(jnp.asarray(WORDS[0]), 0, 7), folded)


def test_numbers_are_normal():
    """Means of z, z², z³, z⁴ and the whole distribution, in single precision and in
    double."""
    drawn = np.asarray(DRAW(jnp.asarray(WORDS), 3, SIZE))
    assert drawn.dtype == np.float32
    drawn = drawn.astype(float)
    powers = {f"z^{p}": drawn**p for p in (1, 2, 3, 4)}
    assert_agrees(z_scores(powers, {"z^1": 0.0, "z^2": 1.0, "z^3": 0.0, "z^4": 3.0}))
    two_sided = 2 * stats.norm.sf(4.0)
    assert stats.kstest(drawn.ravel(), stats.norm.cdf).pvalue > two_sided
    assert stats.kstest(1.02 * drawn.ravel(), stats.norm.cdf).pvalue < two_sided
    with jax.enable_x64(True):
        double = normals(jnp.asarray(WORDS[0]), 3, SIZE, jnp.float64)
        np.testing.assert_allclose(double, drawn[0], atol=1e-5)


def test_extreme_words_give_numbers(monkeypatch):
    words = jnp.asarray([0, 1, 2**31, 2**32 - 129, 2**32 - 1], jnp.uint32)
    x, y = jnp.meshgrid(words, words)
    monkeypatch.setattr(random, "threefry", lambda *_: (x, y))
    drawn = np.asarray(normals(words, 0, 5))
    assert np.all(np.isfinite(drawn))
    assert 6 < np.abs(drawn).max() < 7


def test_neighbouring_numbers_are_not_correlated():
    """Chains i and i + 1, numbers i and i + 1, entries j and j + 1, and the bits of
    equal names: no correlation."""
    words, shared = words_of(jax.random.key(0), 1000)

    def drawn_by(words, number):
        return np.asarray(DRAW(jnp.asarray(words), number, SIZE), float)

    drawn = drawn_by(words, 4)
    of_stream = jax.vmap(stream, (0, None))(jnp.asarray(words), 4)
    pairs = {
        "chains": (drawn[:-1], drawn[1:]),
        "numbers": (drawn, drawn_by(words, 5)),
        "entries": (drawn[:, :-1], drawn[:, 1:]),
        "streams": (drawn, drawn_by(of_stream, 4)),
        "shared": (drawn, drawn_by(shared[None], 4)),
    }
    products = {}
    for name, (a, b) in pairs.items():
        products[name] = a * b
        products[f"{name}²"] = (a**2 - 1) * (b**2 - 1)
    assert_agrees(z_scores(products, dict.fromkeys(products, 0.0)))
    assert_disagrees(z_scores({"same": drawn * drawn_by(words, 4)}, {"same": 0.0}))


def test_a_chains_numbers_depend_on_its_own_words_alone():
    few = words_of(jax.random.key(7), 3)
    many = words_of(jax.random.key(7), 50)
    np.testing.assert_array_equal(few[0], many[0][:3])
    np.testing.assert_array_equal(few[1], many[1])
    traced = jax.jit(lambda key: words_of(key, 3))(jax.random.key(7))
    np.testing.assert_array_equal(few[0], traced[0])
    assert len(np.unique(np.concatenate([many[0], many[1][None]]), axis=0)) == 51
    words = jnp.asarray(few[0][0])
    longer = normals(words, 5, 9)
    np.testing.assert_array_equal(longer[:4], normals(words, 5, 4))
    keys = set()
    for number in (0, 1, Stream.INITIAL):
        data = jax.random.key_data(key_of(words, number))
        keys.add(tuple(np.asarray(data).tolist()))
    assert len(keys) == 3
    other = words_of(jax.random.key(7, impl="rbg"), 3)
    assert other[0].shape == (3, 2)
    assert len({int(number) for number in Stream}) == len(Stream) == 6
    assert min(Stream) > 2**32 - 100  # not the numbers of levels
