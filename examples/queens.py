"""Five queens from three kinds of line: each row and column holds one queen, each
diagonal at most one.

Nothing knows the board. Each factor sees one line, `cp.window` puts it on all lines of
that length, and the product is the puzzle: 10 of the 3,125 ways to put a queen into
each column solve it. Chains that only descend end in boards that break a rule; replica
exchange goes back up to mend them.

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
    """The factor of a line: near one of these rows of zeros and ones, all equally
    likely."""
    near = dist.Normal(jnp.asarray(boards), 0.1).to_event(1)
    return cp.Analytic(
        dist.MixtureSameFamily(
            dist.Categorical(jnp.full(len(boards), 1 / len(boards))), near
        ),
        schedule,
    )


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
    """Which boards (…, N²) are solutions."""
    rows, column = x.reshape(*x.shape[:-1], N, N).argmax(-2), np.arange(N)
    lines = (rows, rows + column, rows - column)
    return np.all(
        [(np.diff(np.sort(line, -1), axis=-1) > 0).all(-1) for line in lines], axis=0
    )


def main(num_chains=num_chains, out="out"):
    density = cp.compile(queens)
    print(density)
    ways = (
        ("reverse diffusion", cp.Ancestral(), {}),
        ("replica exchange", sampler, {"draws": 8, "thin": 20}),
    )
    for name, way, more in ways:
        result = cp.infer(
            density, jax.random.key(0), num_chains=num_chains, sampler=way, **more
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
        axis.pcolormesh(
            board.reshape(N, N), cmap="gray_r", vmin=0, vmax=1, edgecolors="0.8"
        )
        rows = " ".join(
            map(str, 1 + board.reshape(N, N).argmax(0))
        )  # of the queens, column by column
        axis.set_title(rows if good else f"{rows}, wrong", fontsize=9)
        axis.set(xticks=[], yticks=[], aspect="equal")
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "queens.png"), dpi=150)
    return result


if __name__ == "__main__":
    main()
