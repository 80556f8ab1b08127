"""Whether many short chains have forgotten where they began."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from composeprob.errors import InvalidValueError, ShapeError


def nested_rhat(draws: ArrayLike) -> Float64[np.ndarray, "*event"]:
    r"""Computes nested R̂ for many short chains, $\hat R_\nu = \sqrt{1 + \hat B_\nu / \hat W_\nu}$.

    Chains come in superchains: those of one superchain begin at the same place, or belong to the same run of an
    interacting sampler such as `SMC`. B̂ is the variance between the superchains' means; Ŵ the mean over superchains
    of the variance between the means of their chains plus the mean variance within a chain. It works with a single
    draw a chain, where the usual R̂ cannot: all it then needs is that chains of a superchain vary independently once
    they have mixed. At least 1; chains that have forgotten their start have about √(1 + 1/M) with one draw a chain,
    and less with more.

    Args:
        draws: shape (superchains, chains, draws, …), with 2 superchains or more, and 2 chains or 2 draws or more.
            For R repeated runs of N chains: ``np.stack([r["x"] for r in results])[:, :, None]``.

    Returns:
        R̂ of each number of an event, shape (…); NaN where nothing varies.

    Raises:
        ShapeError: too few axes, superchains, chains or draws.
        InvalidValueError: draws that are not finite.

    Example:
        >>> import composeprob as cp, numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(8, 64, 1))
        >>> bool(cp.metrics.nested_rhat(draws) < 1.05)
        True
        >>> bool(cp.metrics.nested_rhat(draws + np.arange(8)[:, None, None]) > 2)  # each where it began
        True

    References:
        Margossian et al. 2024, *Nested R̂: assessing the convergence of Markov chain Monte Carlo when running many
        short chains* (arXiv 2110.13017).
    """
    values = np.asarray(draws, np.float64)
    if values.ndim < 3 or values.shape[0] < 2 or values.shape[1] * values.shape[2] < 2:
        raise ShapeError(
            f"Nested R̂ needs draws of shape (superchains, chains, draws, …); got {values.shape}.",
            fix="pass 2 superchains or more, each with 2 chains or 2 draws or more.",
        )
    if not np.isfinite(values).all():
        raise InvalidValueError("Some draws are not finite.", fix="look at result.status.")
    _, chains, length = values.shape[:3]
    of_chain = values.mean(2)
    between = of_chain.mean(1).var(0, ddof=1)
    inside = of_chain.var(1, ddof=min(1, chains - 1))  # 0 where there is one
    within = values.var(2, ddof=min(1, length - 1)).mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(1 + between / (inside + within).mean(0)))
