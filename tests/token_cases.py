"""Programs of three tokens whose laws are known by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

NUM_VALUES = 3
LENGTH = 3
STATES = np.array(list(itertools.product(range(NUM_VALUES), repeat=LENGTH)))
NUM_CHAINS = 4096
KEY = jax.random.key(0)


def table(seed: int, scale: float = 0.5) -> np.ndarray:
    """A joint of three dependent tokens."""
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
    for i, j in ((0, 1), (1, 2)):
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


SOFT = 0.4 * np.array([0.0, 1.0, -1.0])
NOTHING = 0.7
"""An energy where nothing is visible."""


def soft_energy() -> cp.Factor:
    """exp of a sum over equal neighbours, of what is visible."""

    def fn(tokens, visible):
        pairs = visible[1:] & visible[:-1] & (tokens[1:] == tokens[:-1])
        return (
            NOTHING
            + 0.8 * jnp.sum(pairs)
            + jnp.sum(jnp.where(visible, jnp.asarray(SOFT)[tokens], 0.0))
        )

    return cp.Energy(fn, length=LENGTH, num_values=NUM_VALUES)


def soft_values() -> np.ndarray:
    """`soft_energy` of every state."""
    equal = (STATES[:, 1:] == STATES[:, :-1]).sum(1)
    return np.exp(NOTHING + 0.8 * equal + SOFT[STATES].sum(1)).reshape(A.shape)


def mixed() -> cp.Factor:
    """A mixture inside of a product."""
    return cp.mixture([closed(A), closed(B)], weights=[0.3, 0.7]) * closed(B)


EXPRESSIONS = {
    "product": (lambda: closed(A) * closed(B), A * B),
    "quotient": (lambda: closed(A) / closed(B) ** 0.5, A / B**0.5),
    "power": (lambda: closed(A) ** 2.5, A**2.5),
    "mixture": (mixed, (0.3 * A + 0.7 * B) * B),
    "energy": (
        lambda: closed(A) * soft_energy() / closed(B) ** 0.3,
        A * soft_values() / B**0.3,
    ),
}


@cp.program
def with_clue(f, tokens):
    """One site, a position of which is known."""
    s = cp.sample("s", f)
    cp.observe("clue", dist.Delta(s[jnp.array([1])]), tokens)
