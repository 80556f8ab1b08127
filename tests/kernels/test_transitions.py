"""What every kernel promises besides its law: costs, one trace, non-finite proposals, chains on their own."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composeprob.density.evaluation import Evaluation
from composeprob.errors import CapabilityError
from composeprob.kernels import HMC, MALA, UHMC, ULA, BlackJAX, Gibbs, LineIntegral
from composeprob.kernels.gibbs import parts_of, with_field, with_parts
from kernel_chains import start, steps_of, transitions
from registry import KERNELS
from targets import NESTED, evaluate, nested, two_modes

QUICK = ("MALA", "HMC, LineIntegral", "BlackJAX", "Gibbs")
"""Rows whose code the others share."""
ROWS = pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in KERNELS])


class Counting:
    """A target that counts how often it is traced and how often it is run."""

    def __init__(self, log_density):
        self.traces = self.runs = 0
        self.inner = evaluate(log_density)

    def __call__(self, position):
        self.traces += 1
        jax.debug.callback(self._ran)
        return self.inner(position)

    def _ran(self):
        self.runs += 1


@pytest.mark.parametrize(
    ("kernel", "cost"),
    [(ULA(0.1), 1), (MALA(0.1), 1), (UHMC(0.1, 4), 4), (HMC(0.1, 7), 7), (HMC(0.1, 7, jitter=0.2), 7),
     (BlackJAX(blackjax.hmc, 0.1, num_integration_steps=5), 6), (BlackJAX(blackjax.mala, 0.1), 2),
     (MALA(0.1, log_ratio=LineIntegral(5)), 4), (HMC(0.1, 4, log_ratio=LineIntegral(None, "simpson")), 4),
     (HMC(0.1, 3, log_ratio=LineIntegral(5, "simpson")), 6),
     (Gibbs({("a", "b"): HMC(0.1, 3), "c": MALA(0.1)}), 4),
     (Gibbs({"a": ULA(0.1), "b": UHMC(0.1, 2), "c": BlackJAX(blackjax.mala, 0.1)}), 5)],
    ids=repr,
)  # fmt: skip
def test_cost_of_a_transition(kernel, cost):
    """Of blocks the sum: nothing is evaluated when one hands on to the next, and once at a start or change of level."""
    position, log_density = jnp.zeros(3), two_modes(3).log_density
    if isinstance(kernel, Gibbs):
        position, log_density = dict(zip("abc", position, strict=True)), lambda x: -sum(x[n] ** 2 for n in "abc")
    first, then, last = targets = [Counting(log_density) for _ in range(3)]
    key = jax.random.key(0)

    @jax.jit
    def run(position):
        step = lambda s, k: (kernel.step(k, s, then, steps_of(kernel))[0], None)
        moved = jax.lax.scan(step, kernel.init(key, position, first), jax.random.split(key, 10))[0]
        return kernel.relevel(moved, last)

    jax.block_until_ready(run(position))
    jax.effects_barrier()
    assert kernel.evaluations_per_step == cost
    assert [target.runs for target in targets] == [1, 10 * cost, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: HMC(0.1, n),
        lambda n: MALA(0.1, log_ratio=LineIntegral(n)),
        lambda n: HMC(0.1, n - 1, log_ratio=LineIntegral(None, "simpson")),
    ],
    ids=["leapfrogs", "points", "points of a trajectory"],
)
def test_the_program_does_not_grow(make):
    def lines(kernel):
        state = jax.eval_shape(lambda x: kernel.init(jax.random.key(0), x, target), jnp.zeros(2))
        return str(jax.make_jaxpr(lambda s: kernel.step(jax.random.key(0), s, target, 0.1)[0])(state)).count("\n")

    target = evaluate(two_modes(2).log_density)
    assert lines(make(13)) == lines(make(97))


@ROWS
def test_state_keeps_its_structure_and_its_cache_and_another_step_size_does_not_compile_again(name):
    kernel, target = KERNELS[name](), Counting(nested().log_density)

    @jax.jit
    def step(kernel):
        state = kernel.init(jax.random.key(0), NESTED, target)
        after, info = kernel.step(jax.random.key(1), state, target, steps_of(kernel))
        return state, after, info, target(after.position)

    state, after, info, fresh = step(kernel)
    traces = target.traces
    longer = [with_field(part, "step_size", 2 * part.step_size) for part in parts_of(kernel)]
    _, moved, other, _ = step(with_parts(kernel, longer))
    assert target.traces == traces
    # Where both proposals were refused, their acceptances differ.
    same = np.allclose(moved.position["a"], after.position["a"])
    assert not same or not np.allclose(info.acceptance, other.acceptance)
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert described(after) == described(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    # A cached value comes from inside a compiled loop, a fresh one need not: they agree to rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), after.evaluation, fresh)
    assert info.acceptance.shape == info.accepted.shape == info.non_finite.shape == steps_of(kernel).shape
    assert np.all((info.acceptance >= 0) & (info.acceptance <= 1))
    assert kernel.requires <= {"score", "energy"}


@ROWS
def test_a_step_in_double_precision_does_not_promote_a_float32_chain(name):
    kernel = KERNELS[name]()
    target = evaluate(lambda x: -jnp.sum(x["a"] ** 2) - jnp.sum(x["b"] ** 2))
    position = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(1, jnp.float32)}
    with jax.enable_x64(True):
        step_size = jnp.asarray(steps_of(kernel), jnp.float64)
        step = lambda x, h: kernel.step(jax.random.key(1), kernel.init(jax.random.key(0), x, target), target, h)[0]
        after = jax.eval_shape(step, position, step_size)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.position)} == {jnp.dtype(jnp.float32)}
    assert jax.tree.leaves(after.evaluation.score)[0].dtype == jnp.float32


def broken(position):
    """A standard normal that breaks beyond |a| = 0.5: NaN or infinite in its value, its score, or both."""
    x, b = position["a"], position["b"]
    value = jnp.select([x > 1.2, x > 0.8, x > 0.5, x < -0.8], [jnp.inf, -jnp.inf, jnp.nan, jnp.nan], -0.5 * x**2)
    score = jnp.select([x < -1.2, x < -0.5], [jnp.inf, jnp.nan], -x)
    scores = {"a": score, "b": -b}
    return Evaluation(value - 0.5 * b**2, scores)


@ROWS
def test_non_finite_proposals_are_rejected_and_flagged(name):
    kernel = KERNELS[name]()
    states = start(kernel, broken, jax.random.key(0), {"a": jnp.zeros(500), "b": jnp.zeros(500)})
    states, info = transitions(kernel, broken, jax.random.key(1), states, steps_of(kernel, 2.0), 50)
    assert np.all(np.abs(states.position["a"]) <= 0.5)
    assert np.std(states.position["a"]) > 0.1  # the chains still move
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states))
    assert 0 < np.mean(info.accepted) < 1
    if name != "BlackJAX":  # BlackJAX rejects inside, and says only that the acceptance was low
        assert 0 < np.mean(info.non_finite) < 1
        assert not np.any(info.accepted & info.non_finite)
        assert np.all(info.acceptance[info.non_finite] == 0)


@ROWS
def test_every_chain_decides_for_itself(name):
    """A chain does the same alone as among many, and chains of a batch differ in what they accept."""
    kernel, target = KERNELS[name](), evaluate(lambda x: -2 * jnp.sum(x["a"] ** 2) - 2 * jnp.sum(x["b"] ** 2))
    a, b = jnp.split(jax.random.normal(jax.random.key(0), (256, 4)), 2, axis=1)
    positions = {"a": a, "b": b}
    keys = jax.random.split(jax.random.key(1), 256)
    step = jax.jit(lambda k, s: kernel.step(k, s, target, steps_of(kernel, 1.6)))
    states = start(kernel, target, jax.random.key(2), positions)
    batch, info = jax.vmap(step)(keys, states)
    for i in (0, 100, 255):
        alone, alone_info = step(keys[i], jax.tree.map(lambda leaf, i=i: leaf[i], states))
        for site, x in alone.position.items():
            np.testing.assert_allclose(x, batch.position[site][i], rtol=1e-5, atol=1e-6)
        assert np.all(alone_info.accepted == info.accepted[i])
    if parts_of(kernel)[0].optimal_acceptance is not None:
        assert 0 < np.mean(info.accepted) < 1
        assert len(np.unique(info.acceptance)) > 20


def test_elements_get_noise_of_their_own():
    flat = evaluate(lambda x: 0.0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(x)))
    position = {"a": jnp.zeros(500), "b": jnp.zeros(500)}
    for kernel in (ULA(0.1), UHMC(0.1)):  # which MALA and HMC are, but for their tests

        @jax.jit
        def step(x, kernel=kernel):
            return kernel.step(jax.random.key(1), kernel.init(jax.random.key(0), x, flat), flat, kernel.step_size)

        moved, _ = step(position)
        noise = np.concatenate([moved.position["a"], moved.position["b"]])
        assert len(np.unique(noise)) > 990
        assert abs(np.corrcoef(moved.position["a"], moved.position["b"])[0, 1]) < 0.2


@pytest.mark.parametrize("kernel", [MALA(0.1), HMC(0.1)], ids=repr)
def test_accept_tests_refuse_a_score_only_density(kernel):
    target = lambda x: Evaluation(None, -x)
    state = kernel.init(jax.random.key(0), jnp.zeros(2), target)
    with pytest.raises(CapabilityError, match=r"needs `energy`.*\n.*ULA or UHMC.*LineIntegral"):
        kernel.step(jax.random.key(0), state, target, 0.1)


@pytest.mark.parametrize("kernel", [ULA(0.1), UHMC(0.1)], ids=repr)
def test_unadjusted_kernels_need_scores_only(kernel):
    target = lambda x: Evaluation(None, -x)
    state = kernel.init(jax.random.key(0), jnp.zeros(2), target)
    state, info = kernel.step(jax.random.key(0), state, target, 0.1)
    assert float(info.acceptance) == 1.0
    assert np.any(state.position != 0)
