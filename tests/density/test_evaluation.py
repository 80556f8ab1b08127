"""Deprecated names of an evaluation's fields and of classes still work, with a
warning."""

import jax.numpy as jnp
import pytest

from composeprob.density import evaluation, overlap
from composeprob.density.evaluation import (
    ClosedFormTerm,
    DensityTerms,
    Evaluation,
)
from composeprob.density.overlap import FactorFinding

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


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (evaluation, "Parts", DensityTerms),
        (evaluation, "Known", ClosedFormTerm),
        (overlap, "Finding", FactorFinding),
    ],
)
def test_deprecated_classes_name_the_new_ones(module, old, new):
    with pytest.warns(DeprecationWarning, match=new.__name__):
        assert getattr(module, old) is new


@pytest.mark.parametrize("module", [evaluation, overlap])
def test_other_names_of_a_module_are_refused(module):
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        module.Nothing  # noqa: B018


def test_current_names_do_not_warn(recwarn):
    empty = Evaluation(ZERO, POSITION)
    assert empty.terms is None
    assert empty.closed_form is None
    assert not recwarn.list
