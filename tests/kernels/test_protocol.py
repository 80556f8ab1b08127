"""Transitions driven evaluation by evaluation do what `step` does; every kernel has a row in tests/registry.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob.kernels
from composeprob.kernels import HMC, MALA, Kernel, LineIntegral
from kernel_chains import steps_of
from kernels.test_transitions import Counting
from registry import KERNELS, concrete
from targets import NESTED, evaluate, nested, two_modes

RESUMABLE = {name: make for name, make in KERNELS.items() if make().resumable}
RESUMABLE |= {
    "MALA, 5 points": lambda: MALA(0.15, log_ratio=LineIntegral(5, "simpson")),
    "HMC, 2 points": lambda: HMC(0.45, num_leapfrog=3, log_ratio=LineIntegral(2)),
    "HMC, 5 points": lambda: HMC(0.45, num_leapfrog=3, jitter=0.2, log_ratio=LineIntegral(5)),
}
FLAT = two_modes(3)
POSITIONS = {
    "two sites": ({"a": NESTED["a"], "b": NESTED["b"]}, nested(NESTED).log_density),
    "one flat site": ({"a": jnp.zeros(3)}, lambda position: FLAT.log_density(position["a"])),
}


def test_every_kernel_has_a_row_and_is_public():
    classes = {name.partition(",")[0] for name in KERNELS}
    assert classes == set(concrete(composeprob.kernels, Kernel))
    assert classes <= set(composeprob.kernels.__all__)
    for name, make in KERNELS.items():
        assert type(make()).__name__ == name.partition(",")[0]


def test_kernels_are_pytrees_of_numbers():
    for make in KERNELS.values():
        kernel = make()
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(kernel))
        hash(jax.tree.structure(kernel))  # what is static can be compared, so that jit finds its cached program


def test_kernels_that_write_their_own_step_are_not_resumable():
    class Stepping(MALA):
        def step(self, key, state, target, step_size):
            return super().step(key, state, target, step_size)

    assert set(KERNELS) - set(RESUMABLE) == {"BlackJAX", "Gibbs"}
    assert not Stepping(0.1).resumable


QUICK = ("MALA", "HMC, LineIntegral", "HMC, metric")
"""Rows that one flat site is tried on in quick tests: what differs with it is how noise is laid out, as in all."""
CASES = [
    pytest.param(name, sites, marks=[] if sites == "two sites" or name in QUICK else pytest.mark.slow)
    for name in RESUMABLE
    for sites in POSITIONS
]


@pytest.mark.parametrize(("name", "sites"), CASES)
def test_the_protocol_is_the_step(name, sites):
    """Bit for bit, where every operation is compiled by itself; and shapes and precisions stay on the way."""
    kernel, (position, log_density) = RESUMABLE[name](), POSITIONS[sites]
    if sites == "one flat site" and name == "HMC, metric":
        kernel = HMC(0.45, num_leapfrog=3, metric={"a": 1.44})
    target, h = evaluate(log_density), kernel.step_size
    state = kernel.init(jax.random.key(0), position, target)
    with jax.disable_jit():
        noise = jax.random.normal(jax.random.key(1), (kernel.noise_size(position),))
        expected = kernel.step(jax.random.key(1), state, target, h)
        trajectory, x = kernel.begin(noise, state, h)
        first = trajectory
        for i in range(kernel.evaluations_per_step - 1):
            trajectory, x = kernel.advance(jnp.asarray(i), trajectory, target(x))
        found = kernel.finish(trajectory, target(x))
    assert np.any(found[0].position["a"] != position["a"]) or not found[1].accepted
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert jax.tree.structure(trajectory) == jax.tree.structure(first)
    assert described(trajectory) == described(first)


@pytest.mark.parametrize("name", RESUMABLE)
def test_the_target_is_traced_once(name):
    kernel, target = RESUMABLE[name](), Counting(nested(NESTED).log_density)
    state = jax.eval_shape(lambda x: kernel.init(jax.random.key(0), x, evaluate(nested(NESTED).log_density)), NESTED)
    jax.make_jaxpr(lambda s: kernel.step(jax.random.key(1), s, target, steps_of(kernel)))(state)
    assert target.traces == 1
