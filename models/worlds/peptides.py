"""Peptides of at most 48 residues: antimicrobial ones, and others of the same lengths.

The sequences are those of the package modlamp 4.3.3 (BSD-3-Clause; Müller, Gabernet,
Hiss and Schneider 2017, *modlAMP: Python for antimicrobial peptides*): those of the
Antimicrobial Peptide Database APD3 as of January 2016, and as many drawn from UniProt.
They are read from the installed package and are no part of this one.

An event has 48 tokens: residues by their place in `ALPHABET`, then `END` to the end.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from composeprob.errors import LoadError

ALPHABET = "ACDEFGHIKLMNPQRSTVWY"
END = len(ALPHABET)
"""Token of the places after a sequence."""
NUM_VALUES = END + 1
LENGTH = 48
SHORTEST = 8
_HELD_OUT = 0.1
_WORD = 4
_ALIKE = 0.5


class Peptides(NamedTuple):
    """Sequences of one kind.

    Attributes:
        training: tokens that models learn from, (n, 48).
        held_out: tokens of sequences that are not similar to them, (m, 48).
    """

    training: np.ndarray
    held_out: np.ndarray


@functools.cache
def split(antimicrobial: bool) -> Peptides:
    """Return the sequences of a kind, split so that none that is held out has half of
    its words of 4 residues in common with one that models learn from.

    Whole clusters of similar sequences are held out, a tenth of the sequences in all;
    the split is fixed.
    """
    sequences = _sequences(antimicrobial)
    clusters = _clusters(sequences)
    order = np.random.default_rng(0).permutation(clusters.max() + 1)
    held_out = np.zeros(len(sequences), bool)
    for cluster in order:
        members = clusters == cluster
        if held_out.sum() + members.sum() <= _HELD_OUT * len(sequences):
            held_out |= members
    tokens = np.stack([encode(sequence) for sequence in sequences])
    return Peptides(tokens[~held_out], tokens[held_out])


def encode(sequence: str) -> np.ndarray:
    """Return the tokens of a sequence of at most 48 letters."""
    tokens = np.full(LENGTH, END, np.int32)
    for i, letter in enumerate(sequence):
        tokens[i] = ALPHABET.index(letter)
    return tokens


def decode(tokens: np.ndarray) -> str:
    """Return the letters before the first `END`; a gap within them is shown as '-'."""
    letters = [(ALPHABET + "-")[token] for token in np.asarray(tokens)]
    return "".join(letters).rstrip("-")


def _sequences(antimicrobial: bool) -> list[str]:
    """Read the sequences of a kind, each once, in alphabetical order."""
    spec = importlib.util.find_spec("modlamp")
    if spec is None or spec.origin is None:
        raise LoadError(
            "The peptides are those of the package modlamp, which is not installed.",
            fix="pip install --no-deps modlamp==4.3.3",
        )
    table = Path(spec.origin).parent / "data" / "AMPvsUniProt.csv"
    found = set()
    for line in table.read_text(encoding="utf-8").splitlines()[1:]:
        sequence, _, label = line.partition(",")
        of_kind = (label.strip() == "1") == antimicrobial
        usual = set(sequence) <= set(ALPHABET)
        if of_kind and usual and SHORTEST <= len(sequence) <= LENGTH:
            found.add(sequence)
    return sorted(found)


def _clusters(sequences: list[str]) -> np.ndarray:
    """Return a cluster's number for each sequence: similar ones are linked, and so are
    those that are linked to the same one."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    words: dict[str, int] = {}
    rows = []
    columns = []
    for row, sequence in enumerate(sequences):
        for start in range(len(sequence) - _WORD + 1):
            word = sequence[start : start + _WORD]
            rows.append(row)
            columns.append(words.setdefault(word, len(words)))
    shape = (len(sequences), len(words))
    counts = csr_matrix((np.ones(len(rows)), (rows, columns)), shape)
    has = (counts > 0).astype(float)
    shared = (has @ has.T).tocoo()
    sizes = np.asarray(has.sum(axis=1)).ravel()
    smaller = np.minimum(sizes[shared.row], sizes[shared.col])
    alike = shared.data >= _ALIKE * smaller
    pairs = (shared.row[alike], shared.col[alike])
    links = csr_matrix((np.ones(alike.sum()), pairs), (len(sequences),) * 2)
    _, clusters = connected_components(links, directed=False)
    return clusters
