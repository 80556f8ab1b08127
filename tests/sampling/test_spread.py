"""Chains in equal shares: where their number does not divide, copies fill up, and have no part in what is shared."""

import jax.numpy as jnp
import numpy as np
import pytest

from composeprob.samplers.spread import Spread


@pytest.mark.parametrize(("number", "chunk", "copies"), [(10, 4, 2), (12, 4, 0), (3, 4, 1), (10, None, 0)])
def test_copies_fill_the_last_chunk_and_count_nowhere(number, chunk, copies):
    spread = Spread.checked(None, chunk, number)
    chains = {"x": jnp.arange(number) + 1, "y": jnp.arange(2.0 * number).reshape(number, 2)}
    padded = spread.padded(chains)
    assert spread.copies == copies
    assert len(padded["x"]) == number + copies == spread.number_of(padded["x"]) + copies
    np.testing.assert_array_equal(padded["x"][number:], chains["x"][:copies])
    np.testing.assert_array_equal(spread.cut(padded)["y"], chains["y"])
    assert spread.total(padded["x"]) == number * (number + 1) // 2
    np.testing.assert_array_equal(
        spread.total(jnp.stack([padded["x"], 0 * padded["x"]], 1)), [spread.total(padded["x"]), 0]
    )
    np.testing.assert_array_equal(spread.gather(padded["y"]), chains["y"])
    chosen = jnp.full(number, number - 1)
    np.testing.assert_array_equal(spread.exchange(padded, chosen)["x"], number)
    np.testing.assert_array_equal(spread.map(lambda x: 2 * x, padded["x"]), 2 * padded["x"])
