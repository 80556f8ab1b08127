"""The examples in the kernels' docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import composeprob.kernels

MODULES = [f"composeprob.kernels.{m.name}" for m in pkgutil.iter_modules(composeprob.kernels.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
