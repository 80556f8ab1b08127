"""Recipe and quality of masked diffusion models of peptides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import composeprob as cp
from composeprob.training.masked import MaskedBatch, cross_entropies

from .networks.masked_transformer import MaskedTransformer
from .rates import cosine
from .worlds import peptides

ORDERS = 20
"""Random orders over which the bound on log q is averaged."""
PSEUDOCOUNT = 10.0
"""Counts of the unigram model that each row of the bigram model begins with."""


def recipe(antimicrobial: bool, **settings: Any) -> cp.training.MaskedRecipe:
    """Return the recipe of a kind of peptides.

    Args:
        antimicrobial: whether antimicrobial ones, or others.
        settings: settings of the recipe.
    """

    def network(key: Array) -> MaskedTransformer:
        return MaskedTransformer(peptides.LENGTH, peptides.NUM_VALUES, key=key)

    def data(key: Array, n: int) -> Array:
        sequences = jnp.asarray(peptides.split(antimicrobial).training)
        return sequences[jax.random.randint(key, (n,), 0, len(sequences))]

    return cp.training.MaskedRecipe(
        network=network,
        data=data,
        length=peptides.LENGTH,
        num_values=peptides.NUM_VALUES,
        learning_rate=cosine(2e-3),
        ema=0.998,
        **settings,
    )


def quality(factor: cp.MaskedDiffusion, antimicrobial: bool) -> dict[str, Any]:
    """Return the bits a residue of sequences that are held out, under a model, and
    under a unigram and a bigram model of the training data.

    Ends of sequences are counted among the bits.
    """
    training, held_out = peptides.split(antimicrobial)
    bits = {
        "unigram": _unigram(training, held_out),
        "bigram": _bigram(training, held_out),
        "this model (upper bound)": _masked(factor, held_out),
    }
    return {"bits": {name: float(f"{value:.4g}") for name, value in bits.items()}}


def _masked(factor: cp.MaskedDiffusion, events: np.ndarray) -> float:
    """Return the bound on bits a residue, over random orders."""
    key = jax.random.key(1)
    n = len(events)
    mean = eqx.filter_jit(cross_entropies)
    total = 0.0
    for i in range(ORDERS):
        count_key, order_key = jax.random.split(jax.random.fold_in(key, i))
        strata = jnp.arange(n) + jax.random.uniform(count_key, (n,))
        count = jnp.floor(peptides.LENGTH * strata / n).astype(int)
        count = jax.random.permutation(count_key, count)
        noise = jax.random.uniform(order_key, (n, peptides.LENGTH))
        rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
        batch = MaskedBatch(jnp.asarray(events), rank < count[:, None], {})
        total += float(jnp.sum(mean(factor, batch)))
    nats = total * peptides.LENGTH / ORDERS
    return nats / np.log(2) / _residues(events)


def _unigram(training: np.ndarray, events: np.ndarray) -> float:
    """Return bits a residue by the letters' shares."""
    log_p = np.log2(_shares(training))
    total = sum(log_p[letters].sum() for letters in _letters(events))
    return -total / _residues(events)


def _bigram(training: np.ndarray, events: np.ndarray) -> float:
    """Return bits a residue by the letters' shares given the letter before."""
    first = peptides.NUM_VALUES  # the row of the first letter
    counts = np.tile(PSEUDOCOUNT * _shares(training), (first + 1, 1))
    for letters in _letters(training):
        before = np.concatenate([[first], letters[:-1]])
        np.add.at(counts, (before, letters), 1.0)
    log_p = np.log2(counts / counts.sum(1, keepdims=True))
    total = 0.0
    for letters in _letters(events):
        before = np.concatenate([[first], letters[:-1]])
        total += log_p[before, letters].sum()
    return -total / _residues(events)


def _shares(events: np.ndarray) -> np.ndarray:
    """Return shares of the letters and of ends, each counted once more."""
    letters = np.concatenate(list(_letters(events)))
    counts = 1.0 + np.bincount(letters, minlength=peptides.NUM_VALUES)
    return counts / counts.sum()


def _letters(events: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the tokens of each sequence up to its first end."""
    for event in events:
        length = int((event != peptides.END).sum())
        yield event[: length + 1]


def _residues(events: np.ndarray) -> int:
    return int((events != peptides.END).sum())
