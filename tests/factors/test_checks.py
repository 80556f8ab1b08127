"""Checks of conditions: called by `given` with concrete values, but not with the one that means "none"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError

NONE = (-9.0, -9.0)


def test_checks_see_what_is_given():
    seen = []

    def check(value):
        seen.append(value)
        if value.max() > 1:
            raise InvalidValueError(f"{value.tolist()} is too large.")

    def network(x, t, place=NONE):
        return -x

    factor = cp.Diffusion(
        network, cp.Schedule.cosine(5), event_shape=(2,), conditions={"place": NONE}, checks={"place": check}
    )
    factor.given(place=(0.5, 0.25))
    np.testing.assert_array_equal(seen, [np.float32([0.5, 0.25])])
    assert factor.given(place=NONE).fixed["place"].tolist() == list(NONE)
    jax.jit(lambda place: factor.given(place=place).fixed["place"])(jnp.array([7.0, 7.0]))
    assert len(seen) == 1
    with pytest.raises(InvalidValueError, match=r"too large. \(test_checks.py:\d+\)"):
        (factor * factor).given(place=(2.0, 0.0))
