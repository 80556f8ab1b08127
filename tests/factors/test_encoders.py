"""Encoders of conditions: `given` passes concrete values through them, but not the one that means "none"."""

import jax
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError

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


def test_data_are_encoded_one_by_one():
    factor = cp.Diffusion(
        lambda x, t, place: -x * place,
        cp.Schedule.cosine(5),
        event_shape=(2,),
        conditions=("place",),
        encoders={"place": lambda name: np.float32(PLACES[name])},
    )
    over = cp.product(factor, over={"place": ["left", "right", "left"]})
    np.testing.assert_array_equal(over.factors[0].fixed["place"], np.float32([(0.2, 0.5), (0.8, 0.5), (0.2, 0.5)]))
    alone = cp.product(factor, over={"place": ("right",)})
    np.testing.assert_array_equal(alone.fixed["place"], np.float32(PLACES["right"]))
