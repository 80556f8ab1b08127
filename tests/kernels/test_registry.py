"""Every public kernel has a row in tests/registry.py, so that the contract tests run on it."""

import jax

import composeprob.kernels
from composeprob.kernels import Kernel
from registry import KERNELS, concrete


def test_every_kernel_has_a_row_and_is_public():
    classes = {name.partition(",")[0] for name in KERNELS}
    assert classes == set(concrete(composeprob.kernels, Kernel))
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
