"""Every public kernel has a row in tests/registry.py, so that the contract tests run on it."""

import importlib
import inspect
import pkgutil

import jax

import composeprob.kernels
from composeprob.kernels import Kernel
from registry import KERNELS


def kernel_classes():
    modules = [
        importlib.import_module(f"composeprob.kernels.{m.name}")
        for m in pkgutil.iter_modules(composeprob.kernels.__path__)
    ]
    found = {c for module in modules for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Kernel)}
    return {c.__name__: c for c in found if not inspect.isabstract(c)}


def test_every_kernel_has_a_row_and_is_public():
    classes = {name.partition(",")[0] for name in KERNELS}
    assert classes == set(kernel_classes())
    assert classes <= set(composeprob.kernels.__all__)
    for name, make in KERNELS.items():
        assert type(make()).__name__ == name.partition(",")[0]


def test_public_names_are_documented():
    for name in composeprob.kernels.__all__:
        assert getattr(composeprob.kernels, name).__doc__


def test_kernels_are_pytrees_of_numbers():
    for make in KERNELS.values():
        kernel = make()
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(kernel))
        hash(jax.tree.structure(kernel))  # what is static can be compared, so that jit finds its cached program
