"""Five queens from three kinds of line: each row and column holds one queen, each
diagonal at most one.

Nothing knows the board. Each factor sees one line, `cp.window` puts it on all lines of
that length, and the product is the puzzle: 10 of the 3,125 ways to put a queen into
each column solve it. Chains that only descend end in boards that break a rule; replica
exchange goes back up to repair them.

    python examples/queens.py
    composeprob run examples/queens.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

N = 5
SOLUTIONS = 10
schedule = cp.Schedule.log_snr(200, min=-6.0, max=6.0)
num_chains = 16
sampler = cp.ReplicaExchange(num_levels=16, sweeps=300)
cells = np.arange(N * N).reshape(N, N)


def line(boards):
    """The factor of a line: near one of these equally likely rows of zeros and ones."""
    near = dist.Normal(jnp.asarray(boards), 0.1).to_event(1)
    choice = dist.Categorical(jnp.full(len(boards), 1 / len(boards)))
    return cp.Analytic(dist.MixtureSameFamily(choice, near), schedule)


@cp.program
def queens():
    factors = [cp.window(line(np.eye(N)), (N * N,), over=[*cells, *cells.T])]
    for length in range(2, N + 1):
        at_most_one = line(np.concatenate([np.eye(length), np.zeros((1, length))]))
        diagonals = [
            np.diagonal(grid, k)
            for grid in (cells, cells[::-1])
            for k in {N - length, length - N}
        ]
        factors.append(cp.window(at_most_one, (N * N,), over=diagonals))
    return cp.sample("x", cp.product(*factors))


def solved(x):
    """True for each of the boards (…, N²) that is a solution."""
    rows = x.reshape(*x.shape[:-1], N, N).argmax(-2)
    column = np.arange(N)
    # Rows and both diagonals of the queens must be different.
    lines = np.stack([rows, rows + column, rows - column])
    return (np.diff(np.sort(lines, -1), axis=-1) > 0).all((0, -1))


def main(num_chains=num_chains, out="out"):
    density = cp.compile(queens)
    print(density)
    runs = (
        ("reverse diffusion", cp.Ancestral(), {}),
        ("replica exchange", sampler, {"draws": 8, "thin": 20}),
    )
    for name, chosen, options in runs:
        result = cp.infer(
            density,
            jax.random.key(0),
            num_chains=num_chains,
            sampler=chosen,
            **options,
        )
        boards = np.asarray(result["x"]).reshape(-1, N * N)
        right = solved(boards)
        different = len(np.unique(boards[right].round().astype(int), axis=0))
        share = f"{right.mean():.2f} of {len(boards)} boards are solutions"
        print(f"{name}: {share}, {different} of {SOLUTIONS} different ones")
    print(result.summary())

    figure, axes = plt.subplots(3, 8, figsize=(10, 4.4), layout="constrained")
    shown = np.linspace(0, len(boards) - 1, axes.size).astype(int)
    for axis, board, good in zip(axes.flat, boards[shown], right[shown], strict=True):
        square = board.reshape(N, N)
        axis.pcolormesh(square, cmap="gray_r", vmin=0, vmax=1, edgecolors="0.8")
        # Rows of the queens, column by column.
        title = " ".join(map(str, 1 + square.argmax(0)))
        if not good:
            title += ", wrong"
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[], aspect="equal")
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "queens.png"), dpi=150)
    return result


if __name__ == "__main__":
    main()
