"""Deprecated names of an evaluation's fields and of classes still work, with a
warning."""

import jax.numpy as jnp
import pytest

from composeprob.density.evaluation import (
    ClosedFormTerm,
    DensityTerms,
    Evaluation,
)

ZERO = jnp.zeros(())
POSITION = {"x": ZERO}


@pytest.mark.parametrize(("old", "new"), [("parts", "terms"), ("known", "closed_form")])
def test_deprecated_fields_name_the_new_ones(old, new):
    terms = DensityTerms(POSITION, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO)
    closed_form = ClosedFormTerm(ZERO, POSITION)
    full = Evaluation(None, POSITION, closed_form=closed_form, terms=terms)
    with pytest.warns(DeprecationWarning, match=rf"Evaluation\.{new}\b") as warned:
        assert getattr(full, old) is getattr(full, new)
    assert warned[0].filename == __file__
