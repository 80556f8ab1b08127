"""Promises of every kernel besides its law; each has a row in tests/registry.py.

Costs, one trace, `step` evaluation by evaluation, numbers that are not finite, walls,
single chains."""

from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
import composeprob.kernels
from composeprob.density.evaluation import Evaluation, Wall
from composeprob.kernels import (
    HMC,
    MALA,
    UHMC,
    ULA,
    BlackJAX,
    Gibbs,
    Kernel,
    LineIntegral,
)
from composeprob.kernels.gibbs import parts_of, replaced, with_parts
from kernel_chains import start, steps_of, transitions
from registry import KERNELS, concrete
from sampling_cases import Calls, slow
from targets import NESTED, evaluate, nested, two_modes

QUICK = ("MALA", "HMC, LineIntegral", "BlackJAX", "Gibbs")
"""Rows whose code the others share."""
OTHERS = [slow(name) for name in KERNELS if name not in QUICK]
ROWS = pytest.mark.parametrize("name", [*QUICK, *OTHERS])


class Counting(Calls):
    """A target that counts its traces and its calls."""

    def __init__(self, log_density):
        super().__init__()
        self.inner = evaluate(log_density)

    def __call__(self, position):
        super().__call__()
        return self.inner(position)


COSTS = [
    (HMC(0.1, 7, jitter=0.2), 7),
    (BlackJAX(blackjax.hmc, 0.1, num_integration_steps=5), 6),
    (MALA(0.1, log_ratio=LineIntegral(5)), 4),
    (HMC(0.1, 4, log_ratio=LineIntegral(None, "simpson")), 4),
    (HMC(0.1, 3, log_ratio=LineIntegral(5, "simpson")), 6),
    (Gibbs({("a", "b"): HMC(0.1, 3), "c": MALA(0.1)}), 4),
    (Gibbs({"a": ULA(0.1), "b": UHMC(0.1, 2), "c": BlackJAX(blackjax.mala, 0.1)}), 5),
]
THREE_SITES = {name: jnp.zeros(()) for name in "abc"}


def three_sites(x):
    return -(x["a"] ** 2 + x["b"] ** 2 + x["c"] ** 2)


@pytest.mark.parametrize(("kernel", "cost"), COSTS, ids=repr)
def test_cost_of_a_transition(kernel, cost):
    """The sum over blocks, and so of the other kernels too: nothing is evaluated when
    one hands on to the next, and once at a start or change of level."""
    position = jnp.zeros(3)
    log_density = two_modes(3).log_density
    if isinstance(kernel, Gibbs):
        position = THREE_SITES
        log_density = three_sites
    at_start = Counting(log_density)
    moving = Counting(log_density)
    at_end = Counting(log_density)

    @jax.jit
    def run(position):
        def step(state, key):
            state, _ = kernel.step(key, state, moving, steps_of(kernel))
            return state, None

        state = kernel.init(jax.random.key(0), position, at_start)
        moved, _ = jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 10))
        return kernel.relevel(moved, at_end)

    jax.block_until_ready(run(position))
    assert kernel.evaluations_per_step == cost
    assert at_start.run == 1
    assert moving.run == 10 * cost
    assert at_end.run == 1


GROWN = {
    "leapfrogs": lambda n: HMC(0.1, n),
    "points": lambda n: MALA(0.1, log_ratio=LineIntegral(n)),
    "points of a trajectory": lambda n: HMC(
        0.1, n - 1, log_ratio=LineIntegral(None, "simpson")
    ),
}


@pytest.mark.parametrize("make", GROWN.values(), ids=GROWN)
def test_the_program_does_not_grow(make):
    key = jax.random.key(0)
    target = evaluate(two_modes(2).log_density)

    def lines(kernel):
        def step(state):
            state, _ = kernel.step(key, state, target, 0.1)
            return state

        begun = jax.eval_shape(lambda x: kernel.init(key, x, target), jnp.zeros(2))
        return str(jax.make_jaxpr(step)(begun)).count("\n")

    assert lines(make(13)) == lines(make(97))


def described(tree):
    """Return shape and precision of every leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@ROWS
def test_a_state_keeps_its_structure_and_another_step_size_its_program(name):
    kernel = KERNELS[name]()
    target = Counting(nested().log_density)

    @jax.jit
    def step(kernel):
        state = kernel.init(jax.random.key(0), NESTED, target)
        after, info = kernel.step(jax.random.key(1), state, target, steps_of(kernel))
        return state, after, info, target(after.position)

    state, after, info, fresh = step(kernel)
    traced = target.traced
    longer = [replaced(part, step_size=2 * part.step_size) for part in parts_of(kernel)]
    _, moved, other, _ = step(with_parts(kernel, longer))
    assert target.traced == traced
    # Where both proposals were refused, their acceptances differ.
    same = np.allclose(moved.position["a"], after.position["a"])
    assert not same or not np.allclose(info.acceptance, other.acceptance)
    assert described(after) == described(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    # A cached value comes from inside a compiled loop, a fresh one need not: they agree
    # to rounding.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, after.evaluation, fresh)
    blocks = steps_of(kernel).shape
    assert info.acceptance.shape == blocks
    assert info.accepted.shape == blocks
    assert info.non_finite.shape == blocks
    assert np.all((info.acceptance >= 0) & (info.acceptance <= 1))
    assert kernel.requires <= {"score", "energy"}


@ROWS
def test_a_step_in_double_precision_does_not_promote_a_float32_chain(name):
    kernel = KERNELS[name]()
    target = evaluate(lambda x: -jnp.sum(x["a"] ** 2) - jnp.sum(x["b"] ** 2))
    position = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(1, jnp.float32)}
    with jax.enable_x64(True):
        step_size = jnp.asarray(steps_of(kernel), jnp.float64)

        def step(x, h):
            state = kernel.init(jax.random.key(0), x, target)
            return kernel.step(jax.random.key(1), state, target, h)[0]

        after = jax.eval_shape(step, position, step_size)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.position))
    assert jax.tree.leaves(after.evaluation.score)[0].dtype == jnp.float32


def broken(position):
    """Return the evaluation of a standard normal that breaks beyond |a| = 0.5: NaN or
    infinite in its value, its score, or both."""
    x = position["a"]
    b = position["b"]
    value = jnp.select(
        [x > 1.2, x > 0.8, x > 0.5, x < -0.8],
        [jnp.inf, -jnp.inf, jnp.nan, jnp.nan],
        -0.5 * x**2,
    )
    score = jnp.select([x < -1.2, x < -0.5], [jnp.inf, jnp.nan], -x)
    scores = {"a": score, "b": -b}
    return Evaluation(value - 0.5 * b**2, scores)


@ROWS
def test_non_finite_proposals_are_rejected_and_flagged(name):
    kernel = KERNELS[name]()
    states = start(
        kernel, broken, jax.random.key(0), {"a": jnp.zeros(500), "b": jnp.zeros(500)}
    )
    states, info = transitions(
        kernel, broken, jax.random.key(1), states, steps_of(kernel, 2.0), 50
    )
    assert np.all(np.abs(states.position["a"]) <= 0.5)
    assert np.std(states.position["a"]) > 0.1  # the chains still move
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states))
    assert 0 < np.mean(info.accepted) < 1
    # BlackJAX rejects inside, and reports only that the acceptance was low.
    if name != "BlackJAX":
        assert 0 < np.mean(info.non_finite) < 1
        assert not np.any(info.accepted & info.non_finite)
        assert np.all(info.acceptance[info.non_finite] == 0)


@ROWS
def test_every_chain_decides_for_itself(name):
    """A chain does the same alone as among many, and chains of a batch differ in what
    they accept."""
    kernel = KERNELS[name]()
    target = evaluate(lambda x: -2 * jnp.sum(x["a"] ** 2) - 2 * jnp.sum(x["b"] ** 2))
    a, b = jnp.split(jax.random.normal(jax.random.key(0), (256, 4)), 2, axis=1)
    positions = {"a": a, "b": b}
    keys = jax.random.split(jax.random.key(1), 256)

    @jax.jit
    def step(key, state):
        return kernel.step(key, state, target, steps_of(kernel, 1.6))

    states = start(kernel, target, jax.random.key(2), positions)
    batch, info = jax.vmap(step)(keys, states)
    for i in (0, 100, 255):
        state = jax.tree.map(lambda leaf, i=i: leaf[i], states)
        alone, alone_info = step(keys[i], state)
        for site, x in alone.position.items():
            np.testing.assert_allclose(x, batch.position[site][i], rtol=1e-5, atol=1e-6)
        assert np.all(alone_info.accepted == info.accepted[i])
    if parts_of(kernel)[0].optimal_acceptance is not None:
        assert 0 < np.mean(info.accepted) < 1
        assert len(np.unique(info.acceptance)) > 20


def test_unadjusted_kernels_need_no_more_than_a_score():
    def target(x):
        return Evaluation(None, -x)

    for kernel in (ULA(0.1), UHMC(0.1)):
        state = kernel.init(jax.random.key(0), jnp.zeros(2), target)
        state, info = kernel.step(jax.random.key(0), state, target, 0.1)
        assert float(info.acceptance) == 1.0
        assert np.any(state.position != 0)


# ── evaluation by evaluation ──────────────────────────────────────────────────────────

RESUMABLE = {name: make for name, make in KERNELS.items() if make().resumable}
RESUMABLE |= {
    "MALA, 5 points": lambda: MALA(0.15, log_ratio=LineIntegral(5, "simpson")),
    "HMC, 2 points": lambda: HMC(0.45, num_leapfrog=3, log_ratio=LineIntegral(2)),
    "HMC, 5 points": lambda: HMC(
        0.45, num_leapfrog=3, jitter=0.2, log_ratio=LineIntegral(5)
    ),
}
FLAT = two_modes(3)
POSITIONS = {
    "two sites": ({"a": NESTED["a"], "b": NESTED["b"]}, nested(NESTED).log_density),
    "one flat site": (
        {"a": jnp.zeros(3)},
        lambda position: FLAT.log_density(position["a"]),
    ),
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
        # Static fields can be compared, so that jit finds its cached program.
        hash(jax.tree.structure(kernel))


def test_kernels_that_override_step_are_not_resumable():
    class Stepping(MALA):
        def step(self, key, state, target, step_size):
            return super().step(key, state, target, step_size)

    assert set(KERNELS) - set(RESUMABLE) == {"BlackJAX", "Gibbs"}
    assert not Stepping(0.1).resumable


QUICK_ROWS = {
    "two sites": (
        "ULA",
        "UHMC",
        "HMC, jitter",
        "MALA, 5 points",
        "HMC, LineIntegral",
        "HMC, metric",
    ),
    "one flat site": ("MALA", "HMC, LineIntegral", "HMC, metric"),
}
"""The other rows are made of parts of these."""
QUICK_CASES = [(name, sites) for sites, names in QUICK_ROWS.items() for name in names]
CASES = [(name, sites) for name in RESUMABLE for sites in POSITIONS]
SLOW_CASES = [slow(*case) for case in CASES if case not in QUICK_CASES]


@pytest.mark.parametrize(("name", "sites"), [*QUICK_CASES, *SLOW_CASES])
def test_the_protocol_is_the_step(name, sites):
    """Bit for bit, where every operation is compiled by itself; and shapes and
    precisions stay on the way."""
    kernel = RESUMABLE[name]()
    position, log_density = POSITIONS[sites]
    if sites == "one flat site" and name == "HMC, metric":
        kernel = HMC(0.45, num_leapfrog=3, metric={"a": 1.44})
    target = evaluate(log_density)
    h = kernel.step_size
    state = kernel.init(jax.random.key(0), position, target)
    with jax.disable_jit():
        noise = jax.random.normal(jax.random.key(1), (kernel.noise_size(position),))
        expected = kernel.step(jax.random.key(1), state, target, h)
        trajectory, x = kernel.begin(noise, state, h)
        first = trajectory
        for i in range(kernel.evaluations_per_step - 1):
            trajectory, x = kernel.advance(jnp.asarray(i), trajectory, target(x))
        moved, info = kernel.finish(trajectory, target(x))
    assert np.any(moved.position["a"] != position["a"]) or not info.accepted
    assert jax.tree.structure((moved, info)) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, (moved, info), expected)
    assert jax.tree.structure(trajectory) == jax.tree.structure(first)
    assert described(trajectory) == described(first)


# ── a density of 0 beyond a wall ──────────────────────────────────────────────────────

WALL = 1.0


def walled(position):
    """Return the evaluation of a standard normal that is 0 below the wall."""
    x = position["a"]
    log_f = -0.5 * x**2
    log_g = jnp.where(x > WALL, 0.0, -jnp.inf)
    return Evaluation(log_f + log_g, {"a": -x}, Wall(jnp.isneginf(log_g), log_f))


@pytest.mark.parametrize(
    "kernel",
    [cp.MALA(0.3), cp.HMC(0.3, 3), cp.ULA(0.2)],
    ids=lambda k: type(k).__name__,
)
def test_chains_outside_come_in_and_stay(kernel):
    states = start(kernel, walled, jax.random.key(0), {"a": jnp.full(200, -3.0)})
    states, info = transitions(
        kernel, walled, jax.random.key(1), states, steps_of(kernel), 100
    )
    x = states.position["a"]
    assert np.mean(x > WALL) > 0.5  # without a walk outside none ever comes in
    assert not np.any(info.non_finite)
    again, _ = transitions(
        kernel, walled, jax.random.key(2), states, steps_of(kernel), 20
    )
    assert np.all(again.position["a"][x > WALL] > WALL)


def test_the_walk_outside_is_that_of_the_rest():
    """A wall that lets nothing in: MALA leaves the normal beyond it invariant."""

    def never(position):
        open_at = walled(position)
        wall = Wall(jnp.asarray(True), open_at.log_open)
        return Evaluation(jnp.asarray(-jnp.inf), open_at.score, wall)

    kernel = cp.MALA(1.0)
    x = jax.random.normal(jax.random.key(3), (4000,))
    states = start(kernel, never, jax.random.key(0), {"a": x})
    states, info = transitions(
        kernel, never, jax.random.key(1), states, steps_of(kernel), 20
    )
    assert 0.5 < np.mean(info.accepted) < 0.99
    # Accepted without a test they would have a variance of 2 at this step.
    assert abs(np.var(states.position["a"]) - 1.0) < 0.1


@pytest.mark.parametrize(
    "kernel", [cp.MALA(1.0), cp.HMC(1.0, 3)], ids=lambda k: type(k).__name__
)
def test_a_step_far_too_long_is_not_taken_for_a_density_that_is_nan(kernel):
    """In log s, where s = 1e-3 is far too small: the kick is of 10¹¹ nats, and e to the
    power of its end overflows."""

    def scale(position):
        def log_density(u):
            value = -0.5 * jnp.exp(-2 * u) - 0.5 * jnp.exp(2 * u)
            return value + jnp.where(u > 80.0, jnp.nan, 0.0)

        value, slope = jax.value_and_grad(log_density)(position["a"])
        return Evaluation(value, {"a": slope})

    def beyond(position):
        value = jnp.where(jnp.abs(position["a"]) > 0.1, jnp.nan, 0.0)
        return Evaluation(value, {"a": jnp.zeros(())})

    def one_transition(target, u):
        states = start(kernel, target, jax.random.key(0), {"a": jnp.full(200, u)})
        return transitions(
            kernel, target, jax.random.key(1), states, steps_of(kernel), 1
        )

    states, info = one_transition(scale, -7.0)
    assert np.mean(info.non_finite) == 0
    np.testing.assert_array_equal(states.position["a"], -7.0)
    _, info = one_transition(beyond, 0.0)
    assert np.mean(info.non_finite) > 0.5  # a negative control: no kick explains these
