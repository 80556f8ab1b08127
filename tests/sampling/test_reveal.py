"""Reveals of categorical sites against enumeration: every law of tokens, their
log-evidence, counts of evaluations and traces, and mutants that must fail."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from zscores import assert_agrees, assert_disagrees

import composeprob as cp
from composeprob.samplers import reveal as module

NUM_VALUES = 3
LENGTH = 4
STATES = np.array(list(itertools.product(range(NUM_VALUES), repeat=LENGTH)))
NUM_CHAINS = 4096
KEY = jax.random.key(0)


def table(seed: int, scale: float = 0.7) -> np.ndarray:
    """A joint of four dependent tokens."""
    rng = np.random.default_rng(seed)
    logs = np.zeros(len(STATES))
    for i, j in itertools.combinations(range(LENGTH), 2):
        pair = scale * rng.normal(size=(NUM_VALUES, NUM_VALUES))
        logs += pair[STATES[:, i], STATES[:, j]]
    probs = np.exp(logs)
    return (probs / probs.sum()).reshape((NUM_VALUES,) * LENGTH)


A = table(1)
B = table(2)


@cp.program
def site(f):
    """One site of tokens."""
    return cp.sample("s", f)


def run(program, *args, sampler=None, num_chains=NUM_CHAINS, key=KEY, **kwargs):
    """The result of a program."""
    density = cp.compile(program, *args)
    return cp.infer(
        density, key, num_chains=num_chains, sampler=sampler, progress=False, **kwargs
    )


def scores(result, target: np.ndarray) -> dict[str, float]:
    """z scores of the means of functions of two tokens, and of the log-evidence,
    against unnormalised probabilities of all states."""
    weights = target.ravel() / target.sum()
    values = {}
    for i, j in ((0, 1), (1, 3), (2, 3)):
        for a, b in ((0, 0), (1, 2)):
            exact = weights[(STATES[:, i] == a) & (STATES[:, j] == b)].sum()
            estimate = result.mean(
                lambda s, i=i, j=j, a=a, b=b: (s["s"][i] == a) & (s["s"][j] == b)
            )
            name = f"P(s{i} = {a}, s{j} = {b})"
            values[name] = (estimate.value - exact) / estimate.error
    error = result.log_evidence_error
    values["log Z"] = (result.log_evidence - np.log(target.sum())) / error
    return values


def closed(probs: np.ndarray) -> cp.Factor:
    """A factor of a table."""
    return cp.Analytic.table(probs)


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


SOFT = 0.4 * np.array([0.0, 1.0, -1.0])


def soft_energy() -> cp.Factor:
    """exp of a sum over equal neighbours, of what is visible."""

    def fn(tokens, visible):
        pairs = visible[1:] & visible[:-1] & (tokens[1:] == tokens[:-1])
        return 0.8 * jnp.sum(pairs) + jnp.sum(jnp.where(visible, jnp.asarray(SOFT)[tokens], 0.0))

    return cp.Energy(fn, length=LENGTH, num_values=NUM_VALUES)


def soft_values() -> np.ndarray:
    """`soft_energy` of every state."""
    equal = (STATES[:, 1:] == STATES[:, :-1]).sum(1)
    return np.exp(0.8 * equal + SOFT[STATES].sum(1)).reshape(A.shape)


def mixed() -> cp.Factor:
    """A mixture inside of a product."""
    return cp.mixture([closed(A), closed(B)], weights=[0.3, 0.7]) * closed(B)


EXPRESSIONS = {
    "product": (lambda: closed(A) * closed(B), A * B),
    "quotient": (lambda: closed(A) / closed(B) ** 0.5, A / B**0.5),
    "power": (lambda: closed(A) ** 2.5, A**2.5),
    "mixture": (mixed, (0.3 * A + 0.7 * B) * B),
    "energy": (lambda: closed(A) * soft_energy() / closed(B) ** 0.3, A * soft_values() / B**0.3),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_have_their_law(name):
    make, target = EXPRESSIONS[name]
    result = run(site, make())
    assert result.status.ok, result.status
    assert_agrees(scores(result, target))


@pytest.mark.parametrize("mask", ["rank", "boolean"])
def test_networks_of_one_joint_have_its_law(mask):
    result = run(site, network_of(A, mask) * closed(B))
    assert result.status.ok, result.status
    assert_agrees(scores(result, A * B))


@pytest.mark.parametrize("mask", ["rank", "boolean"])
def test_order_dependent_networks_have_the_average_over_orders(mask):
    uneven = 0.8
    result = run(site, network_of(A, mask, uneven) ** 2.0, sampler=cp.Reveal(2, 2))
    assert_agrees(scores(result, order_averaged(A, uneven, 2.0)))
