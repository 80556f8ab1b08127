r"""Constraints as products of one-hot mixtures: each is a mixture of narrow Gaussians
at the corners that it allows.

Over the corners C_c of constraint c, of which entry i belongs to n_i, with v the
variance of an entry at level 0,

    ∫ Π_c 1/|C_c| Σ_{b ∈ C_c} N(x_c; α·b, v·I) dx = S · Π_c 1/|C_c| · Π_i (2π·v)^{(1 −
    n_i)/2} · n_i^{−1/2}

with S the number of places that satisfy all of them, by symmetry each with the same
share. Places that break one lie α²/(4v) = 25 nats lower, or more, for each entry that
corners disagree about. Weights instead of 1/|C_c| give each place the product of the
weights of its corners.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy.special import ndtr

import composeprob as cp
from exact.case import Answer, Case, schedule, share, single

WIDTH = 0.1
"""Standard deviation of each entry around 0 or 1."""


@dataclass(frozen=True)
class Group:
    """Constraints with the same corners: cells (n, L), corners (C, L), weights (C,) or
    None where all are equal."""

    cells: np.ndarray
    corners: np.ndarray
    weights: np.ndarray | None = None

    @property
    def shares(self) -> np.ndarray:
        """Normalised weights, (C,)."""
        equal = np.full(len(self.corners), 1 / len(self.corners))
        return equal if self.weights is None else self.weights / self.weights.sum()


@dataclass(frozen=True)
class Puzzle:
    """Constraints on entries that are 0 or 1, and the places that satisfy all of them.

    Attributes:
        size: number of entries.
        groups: the constraints.
        solutions: S, or the sum of their weights.
        share: of the solutions in ``event``, where that is asked for instead of whether
            a sample is valid.
        event: of one sample's entries, rounded.
    """

    size: int
    groups: list[Group]
    solutions: float
    share: float | None = None
    event: Callable[[Any], Any] | None = None

    def factor(self) -> cp.Factor:
        """All constraints."""

        def one_hot(group: Group) -> cp.Analytic:
            parts = dist.Normal(jnp.asarray(group.corners, float), WIDTH).to_event(1)
            return cp.Analytic(
                dist.MixtureSameFamily(
                    dist.Categorical(jnp.asarray(group.shares)), parts
                ),
                schedule(),
            )

        return cp.product(
            *(
                cp.window(one_hot(group), (self.size,), over=group.cells)
                for group in self.groups
            )
        )

    def valid(self, x: Any) -> Any:
        """Return whether one sample's entries, rounded, satisfy every constraint."""
        holds = [
            ((x > 0.5)[group.cells][:, None] == (group.corners > 0.5))
            .all(-1)
            .any(-1)
            .all()
            for group in self.groups
        ]
        return jnp.stack(holds).all()

    def exact(self) -> Answer:
        """Log-evidence, and the probability of a valid sample or the share of the
        solutions asked for."""
        levels = schedule()
        alpha, sigma = float(levels.alpha[0]), float(levels.sigma[0])
        variance = (alpha * WIDTH) ** 2 + sigma**2
        count = np.bincount(
            np.concatenate([group.cells.ravel() for group in self.groups]),
            minlength=self.size,
        )
        volumes = 0.5 * (1 - count) * np.log(2 * np.pi * variance) - 0.5 * np.log(count)
        log_evidence = float(np.log(self.solutions) + volumes.sum())
        if self.share is None:
            log_evidence -= sum(
                len(group.cells) * np.log(len(group.corners)) for group in self.groups
            )
            # The probability of each entry's side of 0.5.
            rounded = ndtr((alpha - 0.5) * np.sqrt(count / variance))
            return Answer(float(np.prod(rounded)), float(log_evidence))
        return Answer(self.share, log_evidence)


def one_hot(n: int) -> np.ndarray:
    """The corners of which one entry of n is 1."""
    return np.eye(n)


def permutations(n: int) -> Puzzle:
    """Rows and columns of an n × n table hold one 1 each."""
    cells = np.arange(n * n).reshape(n, n)
    return Puzzle(
        n * n,
        [Group(np.concatenate([cells, cells.T]), one_hot(n))],
        int(np.prod(np.arange(1, n + 1))),
    )


def weighted_permutations(n: int = 5) -> Puzzle:
    """Permutations whose rows prefer some columns: the share of those that leave the
    first row in its place."""
    weights = np.exp(np.random.default_rng(3).normal(0, 0.8, (n, n)))
    weights /= weights.sum(1, keepdims=True)
    cells = np.arange(n * n).reshape(n, n)
    rows = [Group(cells[i : i + 1], one_hot(n), weights[i]) for i in range(n)]
    every = np.array(list(itertools.permutations(range(n))))
    each = np.prod(weights[np.arange(n), every], axis=1)
    # As many solutions of equal weight 1 as the sum of the weights, times 1/n for each
    # column.
    total = float(each.sum()) * n**-n
    share = float(each[every[:, 0] == 0].sum() / each.sum())
    return Puzzle(
        n * n,
        [*rows, Group(cells.T, one_hot(n))],
        total,
        share,
        lambda x: x[:n].argmax() == 0,
    )


def parity(bits: int = 24, checks: int = 16) -> Puzzle:
    """Three bits each with an even sum: random checks that leave no bit out."""
    rng = np.random.default_rng(0)
    cells = np.concatenate(
        [rng.permutation(bits).reshape(-1, 3) for _ in range(-(-3 * checks // bits))]
    )[:checks]
    matrix = np.zeros((checks, bits), int)
    np.put_along_axis(matrix, cells, 1, axis=1)
    rank = 0
    for column in range(bits):  # elimination modulo 2
        pivot = next((row for row in range(rank, checks) if matrix[row, column]), None)
        if pivot is None:
            continue
        matrix[[rank, pivot]] = matrix[[pivot, rank]]
        others = [row for row in range(checks) if row != rank and matrix[row, column]]
        matrix[others] ^= matrix[rank]
        rank += 1
    corners = np.array(
        [
            corner
            for corner in itertools.product((0, 1), repeat=3)
            if sum(corner) % 2 == 0
        ]
    )
    return Puzzle(bits, [Group(cells, corners)], 2 ** (bits - rank))


def satisfiability(bits: int = 12, clauses: int = 40) -> Puzzle:
    """Random clauses of three literals: each forbids one corner of eight."""
    rng = np.random.default_rng(5)
    every = np.array(list(itertools.product((0, 1), repeat=bits)))
    by_corner: dict[tuple[int, ...], list[np.ndarray]] = {}
    holds = np.ones(len(every), bool)
    for _ in range(clauses):
        cells = rng.choice(bits, 3, replace=False)
        forbidden = tuple(map(int, rng.integers(0, 2, 3)))
        by_corner.setdefault(forbidden, []).append(cells)
        holds &= (every[:, cells] != forbidden).any(1)
    groups = [
        Group(
            np.array(cells),
            np.array(
                [c for c in itertools.product((0, 1), repeat=3) if c != forbidden]
            ),
        )
        for forbidden, cells in by_corner.items()
    ]
    return Puzzle(bits, groups, int(holds.sum()))


def queens(n: int = 6) -> Puzzle:
    """Rows and columns hold one queen, diagonals at most one."""
    cells = np.arange(n * n).reshape(n, n)
    groups = [Group(np.concatenate([cells, cells.T]), one_hot(n))]
    for length in range(2, n + 1):
        some = [
            np.diagonal(grid, k)
            for grid in (cells, cells[::-1])
            for k in sorted({n - length, length - n})
        ]
        groups.append(
            Group(
                np.array(some), np.concatenate([one_hot(length), np.zeros((1, length))])
            )
        )
    columns = np.arange(n)
    every = np.array(list(itertools.permutations(range(n))))
    safe = [len(set(q + columns)) == n == len(set(q - columns)) for q in every]
    return Puzzle(n * n, groups, sum(safe))


def latin_squares(n: int = 4) -> Puzzle:
    """Every symbol once in every row and column; each cell holds one."""
    cells = np.arange(n**3).reshape(n, n, n)
    lines = np.concatenate(
        [np.moveaxis(cells, axis, -1).reshape(-1, n) for axis in range(3)]
    )
    return Puzzle(n**3, [Group(lines, one_hot(n))], {3: 12, 4: 576}[n])


def colourings(edges: list[tuple[int, int]], vertices: int, colours: int = 3) -> Puzzle:
    """Neighbours have different colours."""
    cells = np.arange(vertices * colours).reshape(vertices, colours)
    pairs = [
        np.concatenate([one_hot(colours)[i], one_hot(colours)[j]])
        for i in range(colours)
        for j in range(colours)
    ]
    differing = np.array(
        [pair for k, pair in enumerate(pairs) if k // colours != k % colours]
    )
    every = np.array(list(itertools.product(range(colours), repeat=vertices)))
    proper = np.logical_and.reduce([every[:, a] != every[:, b] for a, b in edges])
    both = np.array([np.concatenate([cells[a], cells[b]]) for a, b in edges])
    return Puzzle(
        vertices * colours,
        [Group(cells, one_hot(colours)), Group(both, differing)],
        int(proper.sum()),
    )


def petersen() -> Puzzle:
    """Petersen's graph in three colours."""
    ring = [(i, (i + 1) % 5) for i in range(5)]
    star = [(5 + i, 5 + (i + 2) % 5) for i in range(5)]
    return colourings(ring + star + [(i, i + 5) for i in range(5)], 10)


def posed(family: str, name: str, puzzle: Puzzle) -> Case:
    """The case of a puzzle."""
    event = puzzle.valid if puzzle.event is None else puzzle.event
    asked = share(lambda s: event(s["x"]))
    return Case(
        family, name, lambda: cp.compile(single, puzzle.factor()), asked, puzzle.exact
    )


def common_cases() -> list[Case]:
    """Checks of parity, permutations, queens, Latin squares, colourings."""
    return [
        posed("parity checks", "16 checks of 24 bits", parity()),
        posed("permutations", "8 × 8 permutations", permutations(8)),
        posed("queens", "six queens", queens()),
        posed("Latin squares", "4 × 4 Latin squares", latin_squares()),
        posed("colourings", "Petersen's graph", petersen()),
    ]


def more_cases() -> list[Case]:
    """Clauses, a ring in three colours, permutations with weights."""
    ring = [(i, (i + 1) % 7) for i in range(7)]
    return [
        posed("clauses", "40 clauses of 12 bits", satisfiability()),
        posed("clauses", "a ring of 7 in three colours", colourings(ring, 7)),
        posed(
            "weighted permutations",
            "5 × 5 weighted permutations",
            weighted_permutations(),
        ),
    ]
