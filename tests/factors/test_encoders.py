"""Encoders of conditions: `given` passes concrete values through them, but not the one that means "none"."""

import jax
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import ConditionError, InvalidValueError

NONE = (-9.0, -9.0)


PLACES = {"left": (0.2, 0.5), "right": (0.8, 0.5)}


def test_encoders_see_what_is_given():
    seen = []

    def to_place(value):
        seen.append(value)
        if isinstance(value, str):
            return np.float32(PLACES[value])
        if max(value) > 1:
            raise InvalidValueError(f"{value} is too large.")
        return np.float32(value)

    def network(x, t, place=NONE):
        return -x

    factor = cp.Diffusion(
        network, cp.Schedule.cosine(5), event_shape=(2,), conditions={"place": NONE}, encoders={"place": to_place}
    )
    np.testing.assert_allclose(factor.given(place="left").fixed["place"], PLACES["left"])
    assert factor.given(place=NONE).fixed["place"].tolist() == list(NONE)
    jax.jit(lambda x, y: factor.given(place=(x, y)).fixed["place"][0])(7.0, 7.0)
    assert seen == ["left"]
    with pytest.raises(InvalidValueError, match=r"too large. \(test_encoders.py:\d+\)"):
        (factor * factor).given(place=(2.0, 0.0))
    with pytest.raises(ConditionError, match="given twice"):
        factor.given(place="left").given(place="right")
