"""Reveals of categorical sites against enumeration: every law of tokens, their
log-evidence, counts of evaluations and traces, and mutants that must fail."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError
from composeprob.samplers import reveal as module
from token_cases import (
    EXPRESSIONS,
    KEY,
    LENGTH,
    NUM_CHAINS,
    NUM_VALUES,
    STATES,
    A,
    B,
    closed,
    run,
    scores,
    site,
    soft_energy,
    soft_values,
    with_clue,
)
from zscores import assert_agrees, assert_disagrees


def conditionals(probs: np.ndarray, tokens, visible):
    """Logits of every position of a table given what is visible."""
    states = jnp.asarray(STATES)
    match = jnp.all((states == tokens) | ~visible, axis=1)
    counted = match * jnp.asarray(probs.ravel())
    one_hot = jax.nn.one_hot(states, NUM_VALUES)
    return jnp.log(jnp.einsum("s,slv->lv", counted, one_hot) + 1e-30)


def network_of(probs: np.ndarray, mask: str, uneven: float = 0.0):
    """A network of a table's conditionals; ``uneven`` makes them depend on the order in
    which tokens became visible."""

    def given(tokens, visible):
        logits = conditionals(probs, tokens, visible)
        number = jnp.sum(visible)
        tilt = uneven * jnp.cos(jnp.arange(NUM_VALUES) * (1.0 + number))
        return logits + tilt

    def by_rank(tokens, rank):
        def of_position(i):
            return given(tokens, rank < rank[i])[i]

        return jax.vmap(of_position)(jnp.arange(LENGTH))

    function = given if mask == "boolean" else by_rank
    return cp.MaskedDiffusion(
        function, length=LENGTH, num_values=NUM_VALUES, mask=mask, label="network"
    )


def order_averaged(probs: np.ndarray, uneven: float, power: float) -> np.ndarray:
    """Σ over orders of the path's q^power, over the number of orders, for every state,
    of `network_of`."""
    total = np.zeros(len(STATES))
    orders = list(itertools.permutations(range(LENGTH)))
    for order in orders:
        logs = np.zeros(len(STATES))
        for number, position in enumerate(order):
            visible = np.zeros(LENGTH, bool)
            visible[list(order[:number])] = True
            keys = STATES[:, visible]
            for s, state in enumerate(STATES):
                match = (keys == state[visible]).all(1)
                row = np.array(
                    [
                        probs.ravel()[match & (STATES[:, position] == v)].sum()
                        for v in range(NUM_VALUES)
                    ]
                )
                tilt = uneven * np.cos(np.arange(NUM_VALUES) * (1.0 + number))
                row = row * np.exp(tilt)
                logs[s] += power * np.log(row[state[position]] / row.sum())
        total += np.exp(logs)
    return total / len(orders)


@pytest.mark.parametrize(
    "name",
    [
        "mixture",
        "energy",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("product", "quotient")),
        pytest.param("power", marks=pytest.mark.slow),
    ],
)
def test_expressions_have_their_law(name):
    make, target = EXPRESSIONS[name]
    result = run(site, make())
    assert result.status.ok, result.status
    assert_agrees(scores(result, target))


@pytest.mark.parametrize(
    "mask", ["rank", pytest.param("boolean", marks=pytest.mark.slow)]
)
def test_networks_of_one_joint_have_its_law(mask):
    result = run(site, network_of(A, mask) * closed(B))
    assert result.status.ok, result.status
    assert_agrees(scores(result, A * B))


@pytest.mark.parametrize(
    ("mask", "look_ahead"), [("rank", 0.5), ("rank", 1.0), ("boolean", 0.5)]
)
def test_order_dependent_networks_have_the_average_over_orders(mask, look_ahead):
    uneven = 0.8
    sampler = cp.Reveal(2, 2, look_ahead=look_ahead)
    result = run(site, network_of(A, mask, uneven) ** 2.0, sampler=sampler)
    assert_agrees(scores(result, order_averaged(A, uneven, 2.0)))


def test_looking_ahead_makes_weights_even_where_positions_are_independent():
    """With γ = 1 the weights are the whole normaliser from the first reveal on; without
    it they depend on which positions became visible."""
    logits = 2.0 * np.random.default_rng(3).normal(size=(LENGTH, NUM_VALUES))
    f = cp.MaskedDiffusion(
        lambda tokens, visible: jnp.asarray(logits) + 0.0 * tokens[:, None],
        length=LENGTH,
        num_values=NUM_VALUES,
        mask="boolean",
        label="independent",
    )
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    log_z = np.log((probs**2).sum(1)).sum()
    least = {}
    for look_ahead in (0.0, 1.0):
        sampler = cp.Reveal(0, 0, look_ahead=look_ahead)
        result = run(site, f**2.0, sampler=sampler, num_chains=64)
        least[look_ahead] = min(result.levels["ess"])
        if look_ahead:
            assert result.log_evidence == pytest.approx(log_z, abs=1e-5)
    assert least[1.0] == pytest.approx(1.0, abs=1e-5)
    assert least[0.0] < 0.98


@pytest.mark.parametrize("look_ahead", [-0.5, 1.5])
def test_a_power_outside_of_0_to_1_is_refused(look_ahead):
    with pytest.raises(InvalidValueError, match="look_ahead"):
        cp.Reveal(look_ahead=look_ahead)


def test_a_conditional_network_is_guided():
    def network(tokens, visible, label=-1):
        tilt = jnp.where(label >= 0, 1.0, 0.0) * jnp.arange(NUM_VALUES)
        return conditionals(A, tokens, visible) + tilt

    f = cp.MaskedDiffusion(
        network,
        length=LENGTH,
        num_values=NUM_VALUES,
        conditions=("label",),
        mask="boolean",
    )
    density = cp.compile(site, cp.guide(f, 2.0, label=1))
    assert "(s | label=1)²·network(s)⁻¹" in str(density)
    result = cp.infer(density, KEY, num_chains=256, progress=False)
    assert result.status.ok, result.status
    # The condition's tilt doubles, which only greater tokens gain by.
    plain = run(site, f, num_chains=256)
    assert result["s"].mean() > plain["s"].mean() + 0.3


def test_observed_tokens_are_visible_first():
    result = run(with_clue, closed(A) ** 2.0, jnp.array([2]))
    assert np.unique(result["s"][:, 1]).tolist() == [2]
    target = A.ravel() ** 2 * (STATES[:, 1] == 2)
    exact = target[STATES[:, 0] == 0].sum() / target.sum()
    estimate = result.mean(lambda s: s["s"][0] == 0)
    z = {"P(s0 = 0)": (estimate.value - exact) / estimate.error}
    off = result.log_evidence - np.log(target.sum())
    assert_agrees(z | {"log Z": off / max(result.log_evidence_error, 1e-5)})
    density = cp.prior(result.density)
    free = cp.infer(density, KEY, num_chains=64, progress=False)
    assert len(np.unique(free["s"][:, 1])) > 1


@pytest.mark.slow
def test_windows_and_products_over_data_act_on_their_positions():
    pair = np.array([[0.5, 0.1, 0.2], [0.1, 0.6, 0.1], [0.3, 0.1, 0.9]])
    pair = pair / pair.sum()
    neighbours = cp.window(
        closed(pair), (LENGTH,), over=np.stack([np.arange(2), np.arange(1, 3)], 1)
    )
    result = run(site, closed(A) * neighbours)
    target = A.copy().ravel()
    for i in range(2):
        target *= pair[STATES[:, i], STATES[:, i + 1]]
    assert_agrees(scores(result, target.reshape(A.shape)))

    def network(tokens, visible, y):
        return conditionals(A, tokens, visible) * y

    f = cp.MaskedDiffusion(
        network,
        length=LENGTH,
        num_values=NUM_VALUES,
        conditions=("y",),
        mask="boolean",
    )
    over = cp.product(f, over={"y": jnp.array([0.5, 1.0])})
    density = cp.compile(site, over)
    both = cp.compile(site, f.given(y=0.5) * f.given(y=1.0))
    results = [cp.infer(d, KEY, num_chains=64, progress=False) for d in (density, both)]
    np.testing.assert_array_equal(results[0]["s"], results[1]["s"])


@pytest.mark.slow
def test_a_classifier_of_visible_tokens_conditions():
    def network(tokens, visible):
        return jnp.stack([0.0, 1.0]) * jnp.sum(jnp.where(visible, tokens, 0))

    classifier = cp.Classifier(network, length=LENGTH, num_values=NUM_VALUES)
    result = run(site, cp.condition(closed(A), classifier, 1))
    likelihood = 1 / (1 + np.exp(-STATES.sum(1)))
    # Bayes' rule up to the classifier's probability of nothing, which is 1/2.
    assert_agrees(scores(result, A * likelihood.reshape(A.shape)))


@pytest.mark.slow
def test_blocks_are_exact_for_joints_and_weighted_for_networks():
    density = cp.compile(site, closed(A) * closed(B) * soft_energy())
    result = cp.infer(density, KEY, num_chains=NUM_CHAINS, levels=2, progress=False)
    assert len(result.levels["level"]) == 2
    assert_agrees(scores(result, A * B * soft_values()))
    # Of a network's own model the blocks have equal weights.
    network = cp.compile(site, network_of(A, "boolean"))
    alone = cp.infer(network, KEY, num_chains=64, levels=2, progress=False)
    assert alone.log_evidence == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_a_plate_of_sites_is_independent():
    import numpyro

    @cp.program
    def rows(f):
        with numpyro.plate("rows", 2):
            cp.sample("s", f)

    result = run(rows, closed(A) * closed(B), num_chains=1024)
    assert result["s"].shape == (1024, 2, LENGTH)
    error = 4 * result.log_evidence_error
    exact = 2 * np.log((A * B).sum())
    assert result.log_evidence == pytest.approx(exact, abs=error)


def remasked_counts(mask: str, passes: int = 8) -> dict[str, float]:
    """z score of the χ² of the counts of all states after many remasks, as chains are
    all but independent then."""
    make = closed
    if mask == "boolean":
        make = functools.partial(network_of, mask=mask)
    number = 20_000
    sampler = cp.Reveal(redraws=0, passes=passes)
    factor = make(A) ** 2.0 * make(B) ** 2.0
    result = run(site, factor, sampler=sampler, num_chains=number)
    target = (A * B).ravel() ** 2
    weights = target / target.sum()
    index = (result["s"] * np.array([9, 3, 1])).sum(1)
    counts = np.bincount(index, minlength=len(STATES))
    chi2 = np.sum((counts - number * weights) ** 2 / (number * weights))
    degrees = len(STATES) - 1
    return {"χ²": (chi2 - degrees) / np.sqrt(2 * degrees)}


@pytest.mark.parametrize("mask", ["table", "boolean"])
def test_remasks_leave_the_law_invariant(mask):
    assert_agrees(remasked_counts(mask))


class Counted:
    """A network that counts its evaluations, of all chains together."""

    def __init__(self):
        self.calls = 0
        self.traces = 0

    def __call__(self, tokens, rank):
        self.traces += 1

        def count(_):
            self.calls += 1
            return np.zeros((LENGTH, NUM_VALUES), np.float32)

        shape = jax.ShapeDtypeStruct((LENGTH, NUM_VALUES), jnp.float32)
        return jax.pure_callback(count, shape, tokens, vmap_method="sequential")


@pytest.mark.parametrize("levels", [None, 2])
def test_each_reveal_and_redraw_evaluates_a_factor_once(levels):
    network = Counted()
    f = cp.MaskedDiffusion(network, length=LENGTH, num_values=NUM_VALUES)
    density = cp.compile(site, f)
    network.calls = 0
    result = cp.infer(density, KEY, num_chains=4, progress=False, levels=levels)
    assert network.calls == 4 * result.evaluations
    assert network.traces <= 6
    if levels:
        assert result.evaluations == levels


def test_the_loop_is_compiled_once_for_all_reveals_and_tables(monkeypatch):
    from composeprob.samplers.reveal import RevealPhases

    traces = []
    phase = RevealPhases.phase
    monkeypatch.setattr(
        RevealPhases, "phase", lambda *args: traces.append(1) or phase(*args)
    )
    for probs in (A, B):
        run(site, closed(probs), num_chains=33)
    assert 1 <= len(traces) <= 2


@pytest.mark.slow
def test_draws_go_on_at_level_0():
    result = run(site, closed(A) * closed(B), num_chains=64, draws=30)
    assert result["s"].shape == (64, 30, LENGTH)
    weights = (A * B).ravel() / (A * B).sum()
    exact = weights[STATES[:, 0] == 1].sum()
    estimate = result.probability(lambda s: s["s"][0] == 1)
    assert abs(estimate.value - exact) < 4 * estimate.error


class Unweighted(module.RevealPhases):
    """A mutant: drops z."""

    def _weighed(self, *args):
        chain, gain = super()._weighed(*args)
        return chain, jnp.zeros_like(gain)


class Promising(module.RevealPhases):
    """A mutant: does not take back what its weights said of hidden positions."""

    def _weighed(self, chain, *args):
        nothing = dataclasses.replace(chain, ahead=jnp.zeros(()))
        return super()._weighed(nothing, *args)


class Untested(module.RevealPhases):
    """A mutant: Gibbs moves of a network that depends on the order."""

    def __post_init__(self):
        super().__post_init__()
        self.tested = False


class Unaccepted(module.RevealPhases):
    """A mutant: accepts every remask."""

    def hidden(self, *args):
        run, state = super().hidden(*args)
        return run, dataclasses.replace(
            state, log_ratio=jnp.full_like(state.log_ratio, 99.0)
        )


def test_remasks_without_a_test_fail(monkeypatch):
    monkeypatch.setattr(module, "RevealPhases", Unaccepted)
    # Another sampler, or the code that was compiled for the right one would run.
    assert_disagrees(remasked_counts("table", passes=7))


@pytest.mark.parametrize("mutant", [Unweighted, Promising, Untested])
def test_mutants_fail(mutant, monkeypatch):
    monkeypatch.setattr(module, "RevealPhases", mutant)
    uneven = 0.8
    f = network_of(A, "rank", uneven) ** 2.0
    sampler = cp.Reveal(2, 0)
    if mutant is not Untested:  # nothing after the reveals corrects the weights
        # Of a threshold each, or the code of one mutant would run for the other.
        threshold = 0.5 if mutant is Unweighted else 0.6
        sampler = cp.Reveal(0, 0, resample=threshold)
    target = order_averaged(A, uneven, 2.0)
    assert_disagrees(scores(run(site, f, sampler=sampler), target))
