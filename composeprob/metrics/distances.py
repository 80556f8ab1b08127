"""Metrics of samples: distances, Stein discrepancy, shares of modes, nested R̂."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike

from composeprob.core import AnnealedDensity, Position, systematic
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError, a_kind
from composeprob.metrics import tuning

Sites = ArrayLike | Mapping[str, ArrayLike]
"""One site's values, or ``{site: values}``."""


def mmd(
    x: ArrayLike, y: ArrayLike, bandwidth: float, log_weights: ArrayLike | None = None
) -> float:
    r"""Estimate the squared maximum mean discrepancy of two sets of samples.

    $$\mathrm{MMD}^2 = E\,k(X, X') - 2\,E\,k(X, Y) + E\,k(Y, Y'), \qquad
      k(x, y) = \exp(-\|x - y\|^2 / (2h^2)).$$

    The estimate leaves out the pairs of a sample with itself: it is the U-statistic,
    whose expectation is exactly MMD². Where both distributions agree it is 0 on average
    and slightly negative half of the time, so no root is taken. The bandwidth h is a
    fixed number by intention: a median of the pooled distances jumps between the modes'
    width and their distance, which makes values incomparable.

    Args:
        x: samples of shape (n, …), n ≥ 2.
        y: samples of shape (m, …), m ≥ 2, of the same event.
        bandwidth: h > 0, in the samples' units. A bandwidth of about the width of one
            mode compares shapes; one of the distance between modes compares their
            shares.
        log_weights: log-weights of x up to a constant, shape (n,). The first term then
            is Σ_{i≠j} wᵢwⱼk(xᵢ, xⱼ)/(1 − Σwᵢ²).

    Raises:
        ShapeError: events of different size, or fewer than two samples.
        InvalidValueError: samples that are not finite, or a bandwidth that is not
            positive.

    Example:
        >>> import composeprob as cp
        >>> round(cp.metrics.mmd([[0.0], [1.0]], [[0.0], [1.0]], bandwidth=1.0), 4)
        -0.3935

    References:
        Gretton et al. 2012, *A kernel two-sample test*, lemma 6.
    """
    from scipy.spatial.distance import cdist

    if not (np.ndim(bandwidth) == 0 and np.isfinite(bandwidth) and bandwidth > 0):
        raise InvalidValueError(
            f"The bandwidth of an MMD must be one positive number; got {bandwidth!r}.",
            fix="fix it once for a target, such as the width of one mode.",
        )
    points, others = as_pair(x, y)
    if min(len(points), len(others)) < 2:
        raise ShapeError(
            "An unbiased MMD needs two samples or more on either side.",
            fix="pass more samples.",
        )
    weights = as_weights(log_weights, len(points))
    equal = as_weights(None, len(others))

    def mean(a: np.ndarray, w: np.ndarray, b: np.ndarray, v: np.ndarray) -> float:
        """Return Σ wᵢ vⱼ k(aᵢ, bⱼ)."""

        def kernel(rows: slice) -> np.ndarray:
            squares = cdist(a[rows], b, "sqeuclidean")
            return np.exp(squares / (-2.0 * bandwidth**2))

        return by_rows(kernel, w, v)

    def mean_of_pairs(a: np.ndarray, w: np.ndarray) -> float:
        """Return the mean of k over pairs of different samples of one set."""
        self_weight = float(w @ w)
        if self_weight > 1 - 1e-12:
            raise InvalidValueError(
                "One sample has all the weight: there is no pair to compare.",
                fix="see result.status.",
            )
        # k(a, a) = 1, so that the diagonal adds up to Σ wᵢ².
        return (mean(a, w, a, w) - self_weight) / (1 - self_weight)

    return (
        mean_of_pairs(points, weights)
        - 2 * mean(points, weights, others, equal)
        + mean_of_pairs(others, equal)
    )


def wasserstein(
    x: ArrayLike, y: ArrayLike, p: float = 2.0, log_weights: ArrayLike | None = None
) -> float:
    r"""Compute the p-Wasserstein distance of two sets of samples.

    $$W_p = \Big(\min_\pi \frac1n\sum_{i=1}^n \|x_i - y_{\pi(i)}\|^p\Big)^{1/p}.$$

    The best matching π is found exactly (O(n³): a second for 2000 samples, about ten
    seconds for 4000). Sets of different size and weighted samples are first resampled
    systematically to the larger size. Between two sets of exact draws the distance is
    not 0 but of order n^{−1/d} (n^{−1/2p} in one dimension): compare with the same
    number of exact draws.

    Args:
        x: samples of shape (n, …).
        y: samples of shape (m, …), of the same event.
        p: order, ≥ 1.
        log_weights: log-weights of x up to a constant, shape (n,).

    Raises:
        ShapeError: events of different size.
        InvalidValueError: samples that are not finite, or p < 1.

    Example:
        >>> import composeprob as cp
        >>> cp.metrics.wasserstein([[0.0], [1.0]], [[3.0], [2.0]])
        2.0

    References:
        Peyré and Cuturi 2019, *Computational optimal transport*, chapter 2. Crouse 2016
        for the matching of SciPy.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    if not (np.ndim(p) == 0 and np.isfinite(p) and p >= 1):
        raise InvalidValueError(
            f"A Wasserstein distance has an order p ≥ 1; got {p!r}.", fix="use 1 or 2."
        )
    points, others = as_pair(x, y)
    # The matching is one to one: both sets get n points of equal weight.
    weights = as_weights(log_weights, len(points))
    n = max(len(points), len(others))
    if log_weights is not None or len(points) < n:
        points = points[systematic(weights, n)]
    if len(others) < n:
        equal = as_weights(None, len(others))
        others = others[systematic(equal, n)]
    # (n, n): memory of n² numbers, as the time is n³ anyhow.
    cost = cdist(points, others) ** p
    matching = linear_sum_assignment(cost)
    return float(cost[matching].mean() ** (1 / p))


def ksd(
    samples: Sites,
    score: AnnealedDensity | Callable[[Array], Array] | Sites,
    beta: float = -0.5,
    length: float = 1.0,
    log_weights: ArrayLike | None = None,
) -> float:
    r"""Compute the kernel Stein discrepancy of samples from a density.

    $$\mathrm{KSD}^2 = \sum_{ij} w_i w_j\, k_0(x_i, x_j), \qquad
      k_0 = \nabla_x\!\cdot\!\nabla_y k + \langle\nabla_x k, s(y)\rangle +
      \langle\nabla_y k, s(x)\rangle
            + k\,\langle s(x), s(y)\rangle,$$

    with s = ∇ log π and $k(x, y) = (c^2 + \|x - y\|^2)^\beta$. It needs neither draws
    of π nor its normaliser; E k₀ = 0 under π. Pairs of a sample with itself count (the
    V-statistic, as in the literature), so it is ≥ 0, and for n exact draws about √(E
    k₀(x, x)/n). It does **not** see the shares of separated modes, nor a missing mode:
    report `mode_weights` beside it.

    Args:
        samples: shape (n, …), or ``{site: (n, …)}``.
        score: s, as a compiled density (at its level 0), a function of ONE event, or an
            array of scores, shaped like the samples.
        beta: β in (−1, 0): there KSD → 0 implies convergence in distribution, if the
            score grows linearly.
        length: c > 0, in the samples' units.
        log_weights: log-weights of the samples up to a constant, shape (n,).

    Raises:
        ShapeError: scores or samples of the wrong shape.
        InvalidValueError: samples or scores that are not finite, β outside (−1, 0), or
            c ≤ 0.

    Example:
        >>> import composeprob as cp, jax
        >>> x = jax.random.normal(jax.random.key(0), (500, 2))
        >>> cp.metrics.ksd(x, lambda x: -x) < 0.1 < cp.metrics.ksd(x + 1, lambda x: -x)
        True

    References:
        Gorham and Mackey 2017, *Measuring sample quality with kernels*. Liu, Lee and
        Jordan 2016.
    """
    from scipy.spatial.distance import cdist

    if not -1 < beta < 0 or not (np.isfinite(length) and length > 0):
        raise InvalidValueError(
            "The kernel (c² + r²)^β needs −1 < β < 0 and c > 0; "
            f"got β = {beta!r}, c = {length!r}.",
            fix="beta=-0.5, length=1.0.",
        )
    scores = _rows(_scores(samples, score), "scores")
    points = _rows(samples, "samples")
    if points.shape != scores.shape:
        raise ShapeError(
            f"{points.shape[0]} samples of {points.shape[1]} numbers have scores of "
            f"shape {scores.shape}.",
            fix="a score is a gradient: one number for each of the sample's.",
        )
    weights = as_weights(log_weights, len(points))
    d = points.shape[1]
    inner = (points * scores).sum(1)

    def stein_kernel(rows: slice) -> np.ndarray:
        x = points[rows]
        s = scores[rows]
        square = cdist(x, points, "sqeuclidean")
        q = length**2 + square
        # ⟨x − y, s(y) − s(x)⟩, without an (n, n, d) array
        along = x @ scores.T - inner[None] - inner[rows, None] + s @ points.T
        # ⟨s(x), s(y)⟩·k and the two terms of one gradient, with ∇ₓk = 2β(x − y)q^(β−1);
        # then what is left of ∇ₓ·∇ᵧk.
        k0 = q**beta * (s @ scores.T) + 2 * beta * q ** (beta - 1) * (along - d)
        return k0 - 4 * beta * (beta - 1) * q ** (beta - 2) * square

    squared = by_rows(stein_kernel, weights, weights)
    # Rounding can make the square of a tiny discrepancy negative.
    return float(np.sqrt(max(squared, 0.0)))


def _scores(
    samples: Sites, score: AnnealedDensity | Callable[[Array], Array] | Sites
) -> Sites:
    """Return the scores of samples, of a density at its level 0."""
    if isinstance(score, AnnealedDensity):
        return _scores_of(score, as_positions(samples, score))
    if callable(score):
        return jax.vmap(score)(jnp.asarray(samples, jnp.result_type(float)))
    return score


@eqx.filter_jit
def _scores_of(density: AnnealedDensity, positions: Position) -> Position:
    """Return the scores of a density's level 0 at the positions of chains."""
    return jax.vmap(partial(density.score, level=0))(positions)


def mode_weights(
    samples: ArrayLike, centers: ArrayLike, log_weights: ArrayLike | None = None
) -> Float64[np.ndarray, " modes"]:
    """Compute the share of the samples' weight that is nearest to each centre.

    Args:
        samples: shape (N, …); samples that are not finite belong to no mode.
        centers: shape (M, …), events of the same shape.
        log_weights: log-weights of the samples up to a constant, shape (N,); equal
            weights if left out.

    Returns:
        Shares of shape (M,). They sum to 1 less the weight of samples that are not
            finite.

    Raises:
        ShapeError: events of different shape.

    Example:
        >>> import composeprob as cp
        >>> x = [[0.1], [0.9], [1.2], [0.8]]
        >>> cp.metrics.mode_weights(x, [[0.0], [1.0]]).tolist()
        [0.25, 0.75]
    """
    points, nearest = nearest_mode(samples, centers)
    weights = as_weights(log_weights, len(points))
    finite = nearest >= 0
    modes = len(np.asarray(centers))
    return np.bincount(nearest[finite], weights=weights[finite], minlength=modes)


def nearest_mode(
    samples: ArrayLike, centers: ArrayLike
) -> tuple[Float64[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """Return samples as rows, and the index of the centre nearest to each.

    The index is −1 for a sample that is not finite.
    """
    points = _numbers(samples, "samples")
    targets = _numbers(centers, "centers")
    if points.shape[1:] != targets.shape[1:]:
        raise ShapeError(
            f"Samples are events of shape {points.shape[1:]}, centres of shape "
            f"{targets.shape[1:]}.",
            fix="pass samples of shape (N, …) and centres of shape (M, …) with the "
            "same trailing shape.",
        )
    points = points.reshape(len(points), -1)
    targets = targets.reshape(len(targets), -1)
    finite = np.asarray(np.isfinite(points).all(axis=1))
    # ‖x − c‖² up to ‖x‖², which all centres share: no (N, M, d) array
    inner = np.where(finite[:, None], points, 0.0) @ targets.T
    distance = (targets**2).sum(1)[None] - 2 * inner
    return points, np.where(finite, distance.argmin(1), -1)


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """Compute the total variation ½ Σᵢ |pᵢ − qᵢ|.

    It is 0 for equal distributions and 1 for disjoint ones.

    Args:
        p: probabilities, shape (M,).
        q: probabilities, shape (M,). Those that add up to less than 1 leave out what
            belongs to no mode.

    Raises:
        ShapeError: distributions over different numbers of modes.
        InvalidValueError: numbers that are not probabilities.

    Example:
        >>> import composeprob as cp
        >>> cp.metrics.total_variation([0.5, 0.5], [0.75, 0.25])
        0.25
    """
    p = np.asarray(p, np.float64)
    q = np.asarray(q, np.float64)
    if p.shape != q.shape:
        raise ShapeError(
            f"Two distributions over {p.shape} and {q.shape} modes cannot be compared.",
            fix="pass one weight for each of the same modes, 0 where one has none.",
        )
    for name, values in (("p", p), ("q", q)):
        # Shares of single precision add up to 1 but for rounding.
        if not np.all(values >= 0) or values.sum() > 1 + 1e-3:
            raise InvalidValueError(
                f"{name} has the sum {values.sum():.4g} and the least entry "
                f"{values.min():.4g}: it is not a distribution.",
                fix=f"divide counts by their sum: {name} / {name}.sum().",
            )
    return float(0.5 * np.abs(p - q).sum())


def covariance_error(
    samples: ArrayLike,
    centers: ArrayLike,
    covariances: ArrayLike,
    log_weights: ArrayLike | None = None,
) -> Float64[np.ndarray, " modes"]:
    r"""Compute the relative error of the covariance within each mode.

    $$\|\hat C_m - C_m\|_F / \|C_m\|_F$$

    Ĉ_m is the unbiased covariance, about their own mean, of the samples that are
    nearest to centre m (`mode_weights` counts the same ones). Where modes overlap this
    cuts their tails, and exact draws do not reach 0 either.

    Args:
        samples: shape (N, …); samples that are not finite belong to no mode.
        centers: shape (M, …), events of the same shape.
        covariances: C_m, shape (M, d, d) with d the number of elements of an event, or
            (d, d) for all modes.
        log_weights: log-weights of the samples up to a constant, shape (N,); equal
            weights if left out.

    Returns:
        Errors of shape (M,); NaN for a mode with fewer than two samples.

    Raises:
        ShapeError: shapes that do not fit together.

    Example:
        >>> import composeprob as cp
        >>> x = [[-1.0], [1.0], [9.0], [11.0]]
        >>> centers, covariances = [[0.0], [10.0]], [[[2.0]], [[1.0]]]
        >>> cp.metrics.covariance_error(x, centers, covariances).tolist()
        [0.0, 1.0]
    """
    points, nearest = nearest_mode(samples, centers)
    count, d = points.shape
    modes = len(np.asarray(centers))
    truth = np.asarray(covariances, np.float64)
    if truth.shape not in ((modes, d, d), (d, d)):
        raise ShapeError(
            f"{modes} modes of {d} numbers have covariances of shape {truth.shape}.",
            fix=f"pass an array of shape ({modes}, {d}, {d}), or ({d}, {d}) for all "
            "modes.",
        )
    truth = np.broadcast_to(truth, (modes, d, d))
    weights = as_weights(log_weights, count)
    errors = np.full(modes, np.nan)
    for m in range(modes):
        inside = nearest == m
        if not weights[inside].any():
            continue
        w = weights[inside] / weights[inside].sum()
        # 1 − Σwᵢ², (n − 1)/n for equal weights, is the divisor of the unbiased
        # covariance.
        if 1 - w @ w < 1e-12:
            continue
        covariance = np.cov(points[inside], rowvar=False, aweights=w).reshape(d, d)
        error = np.linalg.norm(covariance - truth[m])
        errors[m] = error / np.linalg.norm(truth[m])
    return errors


def nested_rhat(draws: ArrayLike) -> Float64[np.ndarray, "*event"]:
    r"""Compute nested R̂ for many short chains.

    $$\hat R_\nu = \sqrt{1 + \hat B_\nu / \hat W_\nu}$$

    Chains come in superchains: those of one superchain begin at the same place, or
    belong to the same run of an interacting sampler such as `SMC`. B̂ is the variance
    between the superchains' means; Ŵ is the mean, over superchains, of the variance
    between the means of their chains plus the mean variance within a chain. Nested R̂
    works with a single draw a chain, where the usual R̂ does not: it then needs only
    that chains of a superchain vary independently once they have mixed. It is at least
    1. With M chains a superchain that have forgotten their start it is about √(1 + 1/M)
    for one draw a chain, and less for more.

    Args:
        draws: shape (superchains, chains, draws, …), with 2 superchains or more, and 2
            chains or 2 draws or more. For R repeated runs of N chains:
            ``np.stack([r["x"] for r in results])[:, :, None]``.

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
        >>> start = np.arange(8)[:, None, None]  # each superchain still where it began
        >>> bool(cp.metrics.nested_rhat(draws + start) > 2)
        True

    References:
        Margossian et al. 2024, *Nested R̂: assessing the convergence of Markov chain
        Monte Carlo when running many short chains* (arXiv 2110.13017).
    """
    values = np.asarray(draws, np.float64)
    if values.ndim < 3 or values.shape[0] < 2 or values.shape[1] * values.shape[2] < 2:
        raise ShapeError(
            "Nested R̂ needs draws of shape (superchains, chains, draws, …); "
            f"got {values.shape}.",
            fix="pass 2 superchains or more, each with 2 chains or 2 draws or more.",
        )
    if not np.isfinite(values).all():
        raise InvalidValueError(
            "Some draws are not finite.", fix="look at result.status."
        )
    # Names as in Margossian et al.: B̂ between superchains, Ŵ = B̃ + W̃ within.
    _, chains, length = values.shape[:3]
    chain_means = values.mean(2)
    between = chain_means.mean(1).var(0, ddof=1)
    # A variance of a single value is 0, not NaN: ddof is 0 there.
    between_chains = chain_means.var(1, ddof=min(1, chains - 1))
    within_chains = values.var(2, ddof=min(1, length - 1)).mean(1)
    within = (between_chains + within_chains).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(1 + between / within))


def by_rows(
    gram: Callable[[slice], np.ndarray],
    w: Float64[np.ndarray, " n"],
    v: Float64[np.ndarray, " m"],
) -> float:
    """Return Σ wᵢ Gᵢⱼ vⱼ of a matrix that is made in blocks of rows."""
    total = 0.0
    # The whole matrix would not fit into memory for tens of thousands of samples.
    for start in range(0, len(w), tuning.GRAM_ROWS):
        rows = slice(start, start + tuning.GRAM_ROWS)
        total += float(w[rows] @ gram(rows) @ v)
    return total


def _rows(tree: Sites, name: str) -> Float64[np.ndarray, "n d"]:
    """Return the rows of all sites side by side, in the order of the sites' names."""
    if not isinstance(tree, Mapping):
        return as_rows(tree, name)
    rows = [as_rows(tree[site], name) for site in sorted(tree)]
    return np.concatenate(rows, axis=1)


def _numbers(samples: ArrayLike, name: str) -> Float64[np.ndarray, "n ..."]:
    """Return samples as an array; refuse none, and what is no array."""
    try:
        points = np.asarray(samples, np.float64)
    except (TypeError, ValueError) as error:
        raise WrongTypeError(
            f"{name} must be an array of numbers; got {a_kind(samples)}.",
            fix="pass the values of one site, such as result['x'].",
        ) from error
    if points.ndim == 0 or len(points) == 0:
        raise ShapeError(
            f"{name} must have a leading axis of at least one sample; got shape "
            f"{points.shape}.",
            fix="pass an array of shape (n, …), such as result['x'].",
        )
    return points


def as_rows(samples: ArrayLike, name: str) -> Float64[np.ndarray, "n d"]:
    """Return samples of shape (n, …) as rows; refuse none, and those not finite.

    ``name`` is that of the argument, for messages.
    """
    points = _numbers(samples, name)
    points = points.reshape(len(points), -1)
    bad = int((~np.isfinite(points)).any(1).sum())
    if bad:
        raise InvalidValueError(
            f"{bad} of {len(points)} samples in {name} are not finite.",
            fix="look at result.status; drop them only if you also report how many "
            "there were.",
        )
    return points


def as_positions(points: Sites, density: AnnealedDensity) -> dict[str, Array]:
    """Return points as ``{site: (n, …)}`` of a density's sites; refuse other shapes.

    An array alone is of the density's only site. Points that are not finite are refused
    too.
    """
    sites = density.sites
    given: Mapping[str, ArrayLike] = {}
    if isinstance(points, Mapping):
        given = points
    elif len(sites) == 1:
        given = dict.fromkeys(sites, points)
    if given.keys() != sites.keys():
        got = sorted(given) or "one array of points"
        shapes = ", ".join(f"{name!r}: (n, …)" for name in sites)
        raise ShapeError(
            f"This density has the sites {sorted(sites)}; got {got}.",
            fix=f"pass {{{shapes}}}.",
        )
    placed = {name: jnp.asarray(given[name], jnp.result_type(float)) for name in sites}
    fitting = all(
        value.ndim > 0 and value.shape[1:] == sites[name].shape
        for name, value in placed.items()
    )
    numbers = {value.shape[:1] for value in placed.values()}
    if not fitting or len(numbers) != 1 or numbers == {(0,)}:
        found = {name: value.shape for name, value in placed.items()}
        expected = ", ".join(
            f"(n, {', '.join(map(str, site.shape))}) for {name!r}"
            for name, site in sites.items()
        )
        raise ShapeError(f"Points have the shapes {found}.", fix=f"pass {expected}.")
    if not all(bool(jnp.isfinite(value).all()) for value in placed.values()):
        raise InvalidValueError("Some points are not finite.", fix="drop them.")
    return placed


def as_pair(
    x: ArrayLike, y: ArrayLike
) -> tuple[Float64[np.ndarray, "n d"], Float64[np.ndarray, "m d"]]:
    """Return two sets of samples as rows; refuse those of different dimension."""
    points = as_rows(x, "x")
    others = as_rows(y, "y")
    if points.shape[1] != others.shape[1]:
        raise ShapeError(
            f"Events of {points.shape[1]} and of {others.shape[1]} numbers cannot be "
            "compared.",
            fix="pass samples of one site.",
        )
    return points, others


def as_weights(log_weights: ArrayLike | None, n: int) -> Float64[np.ndarray, " {n}"]:
    """Return n weights that sum to 1; equal ones without ``log_weights``."""
    if log_weights is None:
        return np.full(n, 1.0 / max(n, 1))
    logs = np.asarray(log_weights, np.float64)
    if logs.shape != (n,):
        raise ShapeError(
            f"{n} samples have log-weights of shape {logs.shape}.",
            fix=f"pass an array of shape ({n},).",
        )
    if np.isnan(logs).any() or not np.isfinite(logs.max()):
        raise InvalidValueError(
            "Log-weights must be numbers or −∞, with one of them finite.",
            fix="pass result.log_weights.",
        )
    # Relative to the greatest: exp neither overflows nor vanishes everywhere.
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()
