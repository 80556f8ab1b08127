"""Former names work, are the same objects, and warn at the line that uses them."""

import importlib
import sys

import pytest

import composeprob as cp
from composeprob import renamed
from composeprob.density import evaluation
from composeprob.language.policies import POLICIES, as_policy
from composeprob.samplers import finishers, resampling

NAMES = {
    "Meet": (resampling, "Resampler"),
    "Closing": (finishers, "Finisher"),
    "Parts": (evaluation, "DensityTerms"),
    "Known": (evaluation, "ClosedFormTerm"),
}


@pytest.mark.parametrize("old", renamed.MODULES)
def test_a_module_is_imported_by_its_former_name(old):
    new = renamed.MODULES[old]
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=new) as caught:
        former = importlib.import_module(old)
    assert caught[0].filename == __file__
    current = importlib.import_module(new)
    public = [name for name in vars(current) if not name.startswith("_")]
    assert public
    assert all(getattr(former, name) is getattr(current, name) for name in public)
    assert current.__spec__.name == new


def test_importing_a_name_warns_where_it_stands():
    sys.modules.pop("composeprob.factors.base", None)
    with pytest.warns(DeprecationWarning, match="factors.factor") as caught:
        from composeprob.factors.base import Traits
    from composeprob.factors import factor

    assert Traits is factor.Traits
    assert caught[0].filename == __file__


@pytest.mark.parametrize("old", NAMES)
def test_a_class_is_found_by_its_former_name(old):
    module, new = NAMES[old]
    with pytest.warns(DeprecationWarning, match=new) as caught:
        former = getattr(module, old)
    assert former is getattr(module, new)
    assert caught[0].filename == __file__


def test_the_public_former_name_warns_and_is_not_listed():
    with pytest.warns(DeprecationWarning, match="Resampler"):
        former = cp.Meet
    assert former is cp.Resampler
    assert "Meet" not in cp.__all__


def test_names_that_never_were_are_refused():
    with pytest.raises(AttributeError, match="Partial"):
        _ = evaluation.Partial
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("composeprob.factors.bass")


def test_a_policy_with_the_former_name_of_a_flag_works():
    with pytest.warns(DeprecationWarning, match="network_free") as caught:

        class Tempered(cp.Policy):
            plain = True

    assert Tempered.network_free
    assert caught[0].filename == __file__


def test_a_policy_with_a_former_flag_stands_for_the_policy_that_it_chose():
    with pytest.warns(DeprecationWarning, match="anneal='exact'") as caught:

        class Closed(cp.Policy):
            closed_form = True

    assert as_policy("y", Closed()) is POLICIES["exact"]
    assert caught[0].filename == __file__
