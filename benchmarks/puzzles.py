"""Puzzles of tokens: Sudoku from its rows, columns and boxes, and twelve queens.

A factor of nine tokens says that they are a permutation, and `cp.window` puts it on all
rows, columns and boxes. A rule of the whole board, which ends at 1, excludes boards on
which a hidden cell has no value left, or a value no cell. Clues are observed. A solver
that tries all values counts the solutions exactly.

    python -m benchmarks puzzles

Exits with 1 if a threshold is missed.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from exact.boards import are_peaceful, peaceful
from report import kept, publish

import composeprob as cp

QUEENS = 12
SOLUTIONS = 14_200
BOARDS = 16_384
"""Chains for queens."""
CHAINS = 512
"""Chains for Sudoku."""
KEYS = 2
COLUMNS = (
    "puzzle",
    "clues",
    "solutions",
    "runs",
    "chains",
    "boards that solve it",
    "different ones",
    "log Z off (± error)",
    "status",
    "evaluations",
    "seconds a run",
)
SOLVED = (
    "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
)
"""A Sudoku from which clues are taken."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """A Sudoku of size² cells, in boxes of ``box`` rows and columns.

    Attributes:
        box: of 3 for the usual one.
        clues: the values of all cells; −1 where none is given.
    """

    box: int
    clues: np.ndarray

    @property
    def size(self) -> int:
        """The number of values."""
        return self.box**2

    @property
    def units(self) -> np.ndarray:
        """The cells of every row, column and box."""
        cells = np.arange(self.size**2).reshape(self.size, self.size)
        split = cells.reshape(self.box, self.box, self.box, self.box)
        boxes = split.transpose(0, 2, 1, 3).reshape(self.size, self.size)
        return np.concatenate([cells, cells.T, boxes])

    @property
    def peers(self) -> np.ndarray:
        """True for pairs of different cells with a unit in common."""
        number = self.size**2
        together = np.zeros((number, number), bool)
        for unit in self.units:
            together[np.ix_(unit, unit)] = True
        return together & ~np.eye(number, dtype=bool)


def permutation(size: int) -> cp.Factor:
    """The uniform distribution of permutations, up to a constant: the number of those
    that agree with what is visible."""
    log_factorials = jnp.asarray([math.lgamma(k + 1) for k in range(size + 1)])

    def completions(tokens, visible):
        counts = jnp.sum(visible[:, None] & (tokens[:, None] == jnp.arange(size)), 0)
        hidden = size - jnp.sum(visible)
        return jnp.where(jnp.any(counts > 1), -jnp.inf, log_factorials[hidden])

    return cp.Energy(completions, length=size, num_values=size)


def alive(grid: Grid) -> cp.Factor:
    """1 for every complete board; 0 where a hidden cell has no value left or a value no
    cell in a unit; between, the root of the number of values of hidden cells, over that
    of the permutations of each unit."""
    peers = jnp.asarray(grid.peers)
    units = jnp.asarray(grid.units)
    size = grid.size
    log_factorials = jnp.asarray([math.lgamma(k + 1) for k in range(size + 1)])

    def fn(tokens, visible):
        shown = visible[:, None] & (tokens[:, None] == jnp.arange(size))
        excluded = peers.astype(jnp.float32) @ shown.astype(jnp.float32) > 0
        open_values = ~excluded & ~visible[:, None]
        left = jnp.sum(open_values, axis=1)
        stuck = jnp.any((left == 0) & ~visible)
        # Every value has a cell in every unit, or one that it can go to.
        placed = jnp.any((open_values | shown)[units], axis=1)
        stuck |= ~jnp.all(placed)
        guess = jnp.sum(jnp.where(visible, 0.0, jnp.log(jnp.maximum(left, 1))))
        hidden = size - jnp.sum(visible[units], axis=1)
        # What the factors of the units say of the same cells.
        counted = jnp.sum(log_factorials[hidden])
        return jnp.where(stuck, -jnp.inf, POWER * guess - counted)

    return cp.Energy(fn, length=size**2, num_values=size)


POWER = 0.5
"""Power of the number of values that are left for hidden cells."""


@cp.program
def sudoku(units, rule, cells, values):
    """A board whose cells are partly known."""
    board = cp.sample("board", units * rule)
    cp.observe("clues", dist.Delta(board[cells]), values)


@cp.program
def empty(units, rule):
    """A board without clues."""
    cp.sample("board", units * rule)


def solutions(grid: Grid) -> int:
    """The number of solutions, by trying all values of the cell with the fewest."""
    peers = [np.flatnonzero(row) for row in grid.peers]
    board = grid.clues.copy()

    def values(cell: int) -> list[int]:
        taken = set(board[peers[cell]])
        return [value for value in range(grid.size) if value not in taken]

    def count() -> int:
        hidden = np.flatnonzero(board < 0)
        if len(hidden) == 0:
            return 1
        options = {int(cell): values(int(cell)) for cell in hidden}
        cell = min(options, key=lambda cell: len(options[cell]))
        total = 0
        for value in options[cell]:
            board[cell] = value
            total += count()
            board[cell] = -1
        return total

    return count()


def clued(number: int, seed: int) -> Grid:
    """A Sudoku with so many of the clues of `SOLVED`, chosen at random."""
    values = np.array([int(digit) - 1 for digit in SOLVED])
    shown = np.random.default_rng(seed).permutation(81)[:number]
    clues = np.full(81, -1)
    clues[shown] = values[shown]
    return Grid(3, clues)


GRIDS = {
    "Sudoku 4 × 4, empty": Grid(2, np.full(16, -1)),
    "Sudoku, 40 clues": clued(40, 0),
    "Sudoku, 32 clues": clued(32, 1),
}


def of_grid(name: str) -> dict[str, object]:
    """Runs of the default call for one Sudoku."""
    grid = GRIDS[name]
    units = cp.window(permutation(grid.size), (grid.size**2,), over=grid.units)
    cells = np.flatnonzero(grid.clues >= 0)
    arguments = (units, alive(grid), jnp.asarray(cells), jnp.asarray(grid.clues[cells]))
    if len(cells):
        density = cp.compile(sudoku, *arguments)
    else:
        density = cp.compile(empty, *arguments[:2])

    def solved(boards: np.ndarray) -> np.ndarray:
        in_units = np.sort(boards[:, grid.units], axis=-1)
        return (in_units == np.arange(grid.size)).all((1, 2))

    facts = measured(density, "board", CHAINS, solved, solutions(grid))
    return {"clues": len(cells), **facts}


def measured(density, site, num_chains, solved, exact) -> dict[str, object]:
    """Facts of runs of the default call with several keys."""
    began = time.monotonic()
    shares = []
    different = []
    offs = []
    errors = []
    statuses = []
    for seed in range(KEYS):
        result = cp.infer(
            density, jax.random.key(seed), num_chains=num_chains, progress=False
        )
        boards = np.asarray(result[site])
        right = solved(boards)
        shares.append(float(right.mean()))
        different.append(len(np.unique(boards[right], axis=0)))
        offs.append(float(result.log_evidence - np.log(exact)))
        errors.append(float(result.log_evidence_error))
        codes = [str(code) for code, _ in result.status.findings]
        statuses.append(", ".join(codes))
    return {
        "solutions": exact,
        "chains": num_chains,
        "solved": shares,
        "different": different,
        "off": offs,
        "error": errors,
        "status": statuses,
        "evaluations": result.evaluations,
        "seconds": (time.monotonic() - began) / KEYS,
    }


@cp.program
def queens(rule):
    """The column of the queen of each row."""
    cp.sample("columns", rule)


def of_queens() -> dict[str, object]:
    """Runs of the default call for queens."""
    rule = cp.Energy(peaceful, length=QUEENS, num_values=QUEENS)
    density = cp.compile(queens, rule)
    facts = measured(density, "columns", BOARDS, are_peaceful, SOLUTIONS)
    return {"clues": 0, **facts}


def cells_of(name: str, facts: dict) -> list[str]:
    """A row of the table."""
    logs = []
    for off, error in zip(facts["off"], facts["error"], strict=True):
        shown = "withheld"
        if math.isfinite(error):
            shown = f"±{error:.2f}"
        logs.append(f"{off:+.2f} ({shown})")
    return [
        name,
        str(facts["clues"]),
        f"{facts['solutions']:,}",
        str(len(facts["off"])),
        f"{facts['chains']:,}",
        ", ".join(f"{share:.0%}" for share in facts["solved"]),
        ", ".join(f"{number:,}" for number in facts["different"]),
        ", ".join(logs),
        "; ".join(status or "ok" for status in facts["status"]),
        str(facts["evaluations"]),
        f"{facts['seconds']:.0f}",
    ]


def main() -> int:
    """Run all, and publish the table."""
    found = {name: kept("puzzles", name, lambda n=name: of_grid(n)) for name in GRIDS}
    twelve = kept("puzzles", "queens", of_queens)
    rows = [cells_of(name, facts) for name, facts in found.items()]
    rows.append(cells_of(f"{QUEENS} queens", twelve))
    # Exact draws would show this many different ones.
    expected = SOLUTIONS * (1 - (1 - 1 / SOLUTIONS) ** BOARDS)
    solved = [share for facts in found.values() for share in facts["solved"]]
    checks = {
        "Sudoku: every board of every run solves it": min(solved) == 1.0,
        "12 queens: every board is a solution": min(twelve["solved"]) == 1.0,
        "12 queens: log Z within 0.2": max(map(abs, twelve["off"])) <= 0.2,
    }
    notes = (
        "Clues are tokens of one solved board, chosen at random. The number of "
        "solutions is exact, by a solver that tries all values; Z is that number. "
        f"{BOARDS:,} exact draws of the solutions of {QUEENS} queens have "
        f"{expected:,.0f} different ones; chains that descend from few ancestors have "
        "fewer, as one token cannot move in a solution. Published: masked networks "
        "solve fewer than 7 % of Sudokus in a random order and about 90 % in an "
        "adaptive one (arXiv 2502.06768); they learn the rules, which are given here. "
        "Seconds include compilation."
    )
    details = {"rows": {**found, "queens": twelve}, "exact draws": expected}
    title = "Puzzles of tokens: Sudoku, and twelve queens"
    return publish("puzzles", title, list(COLUMNS), rows, checks, details, notes)


if __name__ == "__main__":
    sys.exit(main())
