r"""An unconditional network beside the mixture of its conditional ones.

Guidance and negations divide by an unconditional network. Under shares $p_c$ of the
labels it is the mixture $f(x) = \sum_c p_c\,f(x \mid c)$ of the conditional ones, at
every level. So noise in samples of the conditionals, each label as often as its share
says, has the mean that the unconditional predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from composeprob.arguments import check_count, check_key
from composeprob.core import Factor, Misfit, compile, program, sample
from composeprob.errors import InvalidValueError, WrongTypeError, a_kind
from composeprob.runtime.own_draws import (
    Noised,
    misfit,
    noised_draws,
    own_levels,
    regressed,
)


@program
def _pair(conditional: Factor, unconditional: Factor) -> Array:
    return sample("x", conditional * unconditional)


def misfit_of_mixture(
    unconditional: Factor,
    conditionals: Sequence[Factor],
    key: Array,
    *,
    shares: Sequence[float] | None = None,
    num: int = 256,
) -> Misfit | None:
    r"""Compare an unconditional network with the mixture of conditional ones.

    Samples of each conditional by its own reverse diffusion are noised again. Over all
    labels together, each as often as its share, an unconditional network that is their
    mixture predicts the mean of that noise. A run sees the conditions of its program
    alone, and cannot ask this.

    Args:
        unconditional: the factor that guidance divides by, f.
        conditionals: the factors f(· | c) of all labels c, such as
            ``[model.given(label=c) for c in range(10)]``.
        key: a typed random key.
        shares: of the labels, in that order; left out, those that suit the networks
            best, so that only what no shares explain is found.
        num: the number of samples of the label with the largest share. Each takes an
            evaluation of both networks at every level, and at eight more.

    Returns:
        The level at which the predicted noise differs most, as text by ``print``; None
        where the networks agree.

    Raises:
        InvalidValueError, WrongTypeError: fewer than two conditionals, or shares that
            do not fit them.

    Example:
        >>> import composeprob as cp, jax, jax.numpy as jnp
        >>> schedule = cp.Schedule.log_snr(20)
        >>> def score(x, log_snr, mean=0.0):  # of N(mean, 1)
        ...     return jnp.sqrt(jax.nn.sigmoid(log_snr)) * mean - x
        >>> model = cp.Diffusion(
        ...     score,
        ...     schedule,
        ...     event_shape=(1,),
        ...     parameterization="score",
        ...     time="log_snr",
        ...     conditions=("mean",),
        ... )
        >>> parts = [model.given(mean=mean) for mean in (1.0, 2.0)]
        >>> key = jax.random.key(0)
        >>> found = cp.training.misfit_of_mixture(model, parts, key, num=64)
        >>> found.shift > 0.1  # no mixture of N(1, 1) and N(2, 1) is N(0, 1)
        True
    """
    check_key(key)
    check_count(num, "num", 32)
    weights = _checked(conditionals, shares)
    noised = noised_labels(unconditional, conditionals, key, num)
    if weights is None:
        weights = best_shares(noised.of_labels)
    pooled = _pooled(noised.of_labels, weights)
    slopes = jax.lax.map(regressed, pooled)
    return misfit(slopes, pooled.noise.shape[1], noised.log_snr)


class NoisedLabels(NamedTuple):
    """Noised samples of the conditional of each label, and the noise that the
    unconditional predicts in them; levels lead."""

    of_labels: list[Noised]
    log_snr: Float[np.ndarray, " levels"]


def noised_labels(
    unconditional: Factor, conditionals: Sequence[Factor], key: Array, num: int
) -> NoisedLabels:
    """Draw samples of every conditional, and noise them."""
    noised = []
    for i, conditional in enumerate(conditionals):
        density = compile(_pair, conditional, unconditional)
        levels = own_levels(density)
        draw_key, position_key = jax.random.split(jax.random.fold_in(key, i))
        keys = jax.random.split(position_key, num)
        positions = jax.vmap(density.initial)(keys)
        noised.append(noised_draws(density, 0, 1, positions, draw_key, levels))
    log_snr = np.asarray(density.schedule.log_snr)[list(levels.noised)]
    return NoisedLabels(noised, log_snr)


def _checked(
    conditionals: Sequence[Factor], shares: Sequence[float] | None
) -> Float[np.ndarray, " labels"] | None:
    """The shares as numbers, of sum 1."""
    if not isinstance(conditionals, Sequence):
        raise WrongTypeError(
            f"conditionals must be a list of factors; got {a_kind(conditionals)}.",
            fix="give the factors of all labels: "
            "[model.given(label=c) for c in range(10)].",
        )
    if len(conditionals) < 2:
        raise InvalidValueError(
            f"conditionals has {len(conditionals)} factors.",
            fix="give the factors of all labels: "
            "[model.given(label=c) for c in range(10)].",
        )
    if shares is None:
        return None
    weights = np.asarray(shares, float)
    fits = weights.shape == (len(conditionals),)
    if not (fits and (weights >= 0).all() and weights.sum() > 0):
        raise InvalidValueError(
            f"shares {shares} do not fit {len(conditionals)} conditionals.",
            fix="give a share of each label, none below 0, or leave shares out.",
        )
    return weights / weights.sum()


def _pooled(noised: Sequence[Noised], shares: Float[np.ndarray, " labels"]) -> Noised:
    """Samples of all labels, each as often as its share."""
    number = noised[0].noise.shape[1]
    kept = np.round(number * shares / shares.max()).astype(int)
    parts = []
    for of_label, count in zip(noised, kept, strict=True):
        parts.append(jax.tree.map(lambda leaf, count=count: leaf[:, :count], of_label))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)


def best_shares(noised: Sequence[Noised]) -> Float[np.ndarray, " labels"]:
    """Shares under which the noise in samples is what is predicted, by least squares.

    ε − ε̂ has the mean 0 at every level, and so has its product with ε̂, over the
    mixture: equations that are linear in the shares.
    """
    from scipy.optimize import nnls

    rows = []
    for of_label in noised:
        missed = np.asarray(of_label.noise - of_label.predicted, float)
        predicted = np.asarray(of_label.predicted, float)
        means = missed.mean(1).ravel()
        products = (missed * predicted).mean((1, 2))
        rows.append(np.concatenate([means, products]))
    equations = np.stack(rows, axis=1)
    # The shares sum to 1, beyond what the others can outweigh.
    heavy = 1e3 * max(np.abs(equations).max(), 1e-6)
    matrix = np.vstack([equations, np.full(len(noised), heavy)])
    wanted = np.append(np.zeros(len(equations)), heavy)
    shares, _ = nnls(matrix, wanted)
    return np.asarray(shares / shares.sum())
