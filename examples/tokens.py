"""Eight queens as eight tokens: the column of the queen of each row, one of them given.

A rule says of the queens that are visible whether two of them attack one another. They
become visible one after another, with exact weights: every board is a solution, and the
log-evidence says how many there are. Of the 92 solutions, 18 have a queen in column 3
of the first row.

    python examples/tokens.py
    composeprob run examples/tokens.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

N = 8
SOLUTIONS = {None: 92, 3: 18}
UPPER, LOWER = np.triu_indices(N, 1)


def peaceful(tokens, visible):
    """0 where no two of the visible queens attack one another, else −∞."""
    apart = jnp.abs(tokens[UPPER] - tokens[LOWER])
    attack = (apart == 0) | (apart == LOWER - UPPER)
    seen = visible[UPPER] & visible[LOWER]
    return jnp.where(jnp.any(attack & seen), -jnp.inf, 0.0)


rule = cp.Energy(peaceful, length=N, num_values=N)


@cp.program
def board(rule, first=None):
    columns = cp.sample("columns", rule)
    if first is not None:
        cp.observe("first", dist.Delta(columns[0]), first)


def main(num_chains=2000, out="out"):
    for first, number in SOLUTIONS.items():
        density = cp.compile(board, rule, first)
        result = cp.infer(density, jax.random.key(0), num_chains=num_chains)
        found = np.unique(result["columns"], axis=0)
        low, high = np.exp(result.log_evidence_interval(0.9))
        print(f"first queen {first}: {len(found)} different solutions of {number}")
        print(f"  by the evidence there are {low:.1f} to {high:.1f}")
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    result.plot().savefig(Path(out, "tokens.png"))
    return result


if __name__ == "__main__":
    main()
