"""Metrics of samples: their distances from others and from a density, the shares and
widths of modes, and whether many short chains have forgotten where they began."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import over_chains
from composeprob.errors import InvalidValueError, ShapeError
from composeprob.results.estimates import systematic

Sites = ArrayLike | Mapping[str, ArrayLike]
"""One site's values, or ``{site: values}``."""


def mmd(
    x: ArrayLike, y: ArrayLike, bandwidth: float, log_weights: ArrayLike | None = None
) -> float:
    r"""Estimates the squared maximum mean discrepancy, $\mathrm{MMD}^2 = E\,k(X, X') -
    2\,E\,k(X, Y) + E\,k(Y, Y')$.

    With the Gaussian kernel $k(x, y) = \exp(-\|x - y\|^2 / (2h^2))$, and without the
    pairs of a sample with itself: the U-statistic, whose expectation is exactly MMD².
    It is 0 on average where both distributions agree, so it comes out slightly negative
    half of the time then, and no root is taken. The bandwidth h is a fixed number by
    intention: a median of the pooled distances jumps between the modes' width and their
    distance, and makes values incomparable.

    Args:
        x: samples of shape (n, …), n ≥ 2.
        y: samples of shape (m, …), m ≥ 2, of the same event.
        bandwidth: h > 0, in the samples' units. About the width of one mode sees
            shapes; the distance between modes sees their shares.
        log_weights: of x, up to a constant, shape (n,): the first term then is Σ_{i≠j}
            wᵢwⱼk(xᵢ, xⱼ)/(1 − Σwᵢ²).

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
        fix = "fix it once for a target, such as the width of one mode."
        raise InvalidValueError(
            f"The bandwidth of an MMD must be one positive number; got {bandwidth!r}.",
            fix=fix,
        )
    points, others = as_pair(x, y)
    if min(len(points), len(others)) < 2:
        raise ShapeError(
            "An unbiased MMD needs two samples or more on either side.",
            fix="pass more samples.",
        )
    weights, equal = as_weights(log_weights, len(points)), as_weights(None, len(others))

    def mean(a: np.ndarray, w: np.ndarray, b: np.ndarray, v: np.ndarray) -> float:
        """Σ wᵢ vⱼ k(aᵢ, bⱼ)."""
        return by_rows(
            lambda rows: np.exp(
                cdist(a[rows], b, "sqeuclidean") / (-2.0 * bandwidth**2)
            ),
            w,
            v,
        )

    def between(a: np.ndarray, w: np.ndarray) -> float:
        """The same over pairs of different points: k(a, a) = 1 is taken out of the
        diagonal."""
        self_weight = float(w @ w)
        if self_weight > 1 - 1e-12:
            fix = "see result.status."
            raise InvalidValueError(
                "One sample has all the weight: there is no pair to compare.", fix=fix
            )
        return (mean(a, w, a, w) - self_weight) / (1 - self_weight)

    return (
        between(points, weights)
        - 2 * mean(points, weights, others, equal)
        + between(others, equal)
    )


def wasserstein(
    x: ArrayLike, y: ArrayLike, p: float = 2.0, log_weights: ArrayLike | None = None
) -> float:
    r"""Computes the p-Wasserstein distance of two sets of samples.

    $$W_p = \Big(\min_\pi \frac1n\sum_{i=1}^n \|x_i - y_{\pi(i)}\|^p\Big)^{1/p}.$$

    The best matching π is found exactly (O(n³): a second for 2000 samples, some ten for
    4000). Sets of different size and weighted samples are resampled systematically to
    the larger size first. Between two sets of exact draws it is not 0 but of order
    n^{−1/d} (n^{−1/2p} in one dimension): compare with the same number of exact draws.

    Args:
        x: samples of shape (n, …).
        y: samples of shape (m, …), of the same event.
        p: order, ≥ 1.
        log_weights: of x, up to a constant, shape (n,).

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
    weights, n = as_weights(log_weights, len(points)), max(len(points), len(others))
    if log_weights is not None or len(points) < n:
        points = points[systematic(weights, n)]
    if len(others) < n:
        others = others[systematic(as_weights(None, len(others)), n)]
    cost = cdist(points, others) ** p
    return float(cost[linear_sum_assignment(cost)].mean() ** (1 / p))


def ksd(
    samples: Sites,
    score: AnnealedDensity | Callable[[Array], Array] | Sites,
    beta: float = -0.5,
    length: float = 1.0,
    log_weights: ArrayLike | None = None,
) -> float:
    r"""Computes the kernel Stein discrepancy with the kernel $k(x, y) = (c^2 + \|x -
    y\|^2)^\beta$.

    $$\mathrm{KSD}^2 = \sum_{ij} w_i w_j\, k_0(x_i, x_j), \qquad
      k_0 = \nabla_x\!\cdot\!\nabla_y k + \langle\nabla_x k, s(y)\rangle +
      \langle\nabla_y k, s(x)\rangle
            + k\,\langle s(x), s(y)\rangle,$$

    with s = ∇ log π. It needs no draws of π and no normaliser; E k₀ = 0 under π. Pairs
    of a sample with itself count (the V-statistic, as in the literature), so it is ≥ 0,
    and for n exact draws about √(E k₀(x, x)/n). It does **not** see the shares of modes
    that are far apart, nor one that is missing: report `mode_weights` beside it.

    Args:
        samples: shape (n, …), or ``{site: (n, …)}``.
        score: s: a compiled density, whose level 0 counts; a function of ONE event; or
            the scores themselves, shaped like the samples.
        beta: in (−1, 0): there KSD → 0 implies convergence in distribution, if the
            score grows linearly.
        length: c > 0, in the samples' units.
        log_weights: of the samples, up to a constant, shape (n,).

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
            f"The kernel (c² + r²)^β needs −1 < β < 0 and c > 0; got β = {beta!r}, c = {length!r}.",
            fix="beta=-0.5, length=1.0.",
        )
    if isinstance(score, AnnealedDensity):
        values: Sites = over_chains(
            eqx.Partial(score.score, level=0), as_positions(samples, score)
        )
    elif callable(score):
        values = jax.vmap(score)(jnp.asarray(samples, jnp.result_type(float)))
    else:
        values = score
    scores, points = _rows(values, "scores"), _rows(samples, "samples")
    if points.shape != scores.shape:
        raise ShapeError(
            f"{points.shape[0]} samples of {points.shape[1]} numbers have scores of shape {scores.shape}.",
            fix="a score is a gradient: one number for each of the sample's.",
        )
    weights, d = as_weights(log_weights, len(points)), points.shape[1]
    inner = (points * scores).sum(1)

    def stein(rows: slice) -> np.ndarray:
        x, s = points[rows], scores[rows]
        square = cdist(x, points, "sqeuclidean")
        q = length**2 + square
        # ⟨x − y, s(y) − s(x)⟩, without an (n, n, d) array
        along = x @ scores.T - inner[None] - inner[rows, None] + s @ points.T
        found = q**beta * (s @ scores.T) + 2 * beta * q ** (beta - 1) * (along - d)
        return found - 4 * beta * (beta - 1) * q ** (beta - 2) * square

    return float(np.sqrt(max(by_rows(stein, weights, weights), 0.0)))


def mode_weights(
    samples: ArrayLike, centers: ArrayLike, log_weights: ArrayLike | None = None
) -> Float64[np.ndarray, " modes"]:
    """Computes the share of the samples' weight that is nearest to each centre.

    Args:
        samples: shape (N, …); samples that are not finite belong to no mode.
        centers: shape (M, …), events of the same shape.
        log_weights: log-weights of the samples up to a constant, shape (N,); equal
            weights if left out.

    Returns:
        Shares of shape (M,). They sum to 1, or to less by the weight of samples that
            are not finite.

    Raises:
        ShapeError: events of different shape.

    Example:
        >>> import composeprob as cp
        >>> cp.metrics.mode_weights([[0.1], [0.9], [1.2], [0.8]], [[0.0], [1.0]]).tolist()
        [0.25, 0.75]
    """
    points, chosen = nearest_mode(samples, centers)
    weights = as_weights(log_weights, len(points))
    inside = chosen >= 0
    return np.bincount(
        chosen[inside], weights=weights[inside], minlength=len(np.asarray(centers))
    )


def nearest_mode(
    samples: ArrayLike, centers: ArrayLike
) -> tuple[Float64[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """Samples as rows, and the number of the centre that each is nearest to: −1 where
    it is not finite."""
    points, targets = np.asarray(samples, np.float64), np.asarray(centers, np.float64)
    if points.shape[1:] != targets.shape[1:]:
        raise ShapeError(
            f"Samples are events of shape {points.shape[1:]}, centres of shape {targets.shape[1:]}.",
            fix="pass samples of shape (N, …) and centres of shape (M, …) with the same trailing shape.",
        )
    points, targets = points.reshape(len(points), -1), targets.reshape(len(targets), -1)
    finite = np.asarray(np.isfinite(points).all(axis=1))
    # ‖x − c‖² up to ‖x‖², which all centres share: no (N, M, d) array
    distance = (targets**2).sum(1)[None] - 2 * np.where(
        finite[:, None], points, 0.0
    ) @ targets.T
    return points, np.where(finite, distance.argmin(1), -1)


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """Computes the total variation ½ Σᵢ |pᵢ − qᵢ|: 0 for equal distributions, 1 for
    disjoint ones.

    Args:
        p: probabilities, shape (M,).
        q: probabilities, shape (M,).

    Example:
        >>> import composeprob as cp
        >>> cp.metrics.total_variation([0.5, 0.5], [0.75, 0.25])
        0.25
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape:
        fix = "pass one weight for each of the same modes, 0 where one has none."
        raise ShapeError(
            f"Two distributions over {p.shape} and {q.shape} modes cannot be compared.",
            fix=fix,
        )
    return float(0.5 * np.abs(p - q).sum())


def covariance_error(
    samples: ArrayLike,
    centers: ArrayLike,
    covariances: ArrayLike,
    log_weights: ArrayLike | None = None,
) -> Float64[np.ndarray, " modes"]:
    r"""Computes the relative error of the covariance within each mode, $\|\hat C_m -
    C_m\|_F / \|C_m\|_F$.

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
        Errors of shape (M,); NaN for a mode that has no two samples.

    Raises:
        ShapeError: shapes that do not fit together.

    Example:
        >>> import composeprob as cp
        >>> cp.metrics.covariance_error([[-1.0], [1.0], [9.0], [11.0]], [[0.0], [10.0]], [[[2.0]], [[1.0]]]).tolist()
        [0.0, 1.0]
    """
    points, chosen = nearest_mode(samples, centers)
    (count, d), modes = points.shape, len(np.asarray(centers))
    truth = np.asarray(covariances, np.float64)
    if truth.shape not in ((modes, d, d), (d, d)):
        fix = (
            f"pass an array of shape ({modes}, {d}, {d}), or ({d}, {d}) for all modes."
        )
        raise ShapeError(
            f"{modes} modes of {d} numbers have covariances of shape {truth.shape}.",
            fix=fix,
        )
    truth = np.broadcast_to(truth, (modes, d, d))
    weights = as_weights(log_weights, count)
    errors = np.full(modes, np.nan)
    for m in range(modes):
        inside = chosen == m
        if not weights[inside].any():
            continue
        w = weights[inside] / weights[inside].sum()
        if 1 - w @ w < 1e-12:  # (n − 1)/n for equal weights
            continue
        found = np.cov(points[inside], rowvar=False, aweights=w).reshape(d, d)
        errors[m] = np.linalg.norm(found - truth[m]) / np.linalg.norm(truth[m])
    return errors


def nested_rhat(draws: ArrayLike) -> Float64[np.ndarray, "*event"]:
    r"""Computes nested R̂ for many short chains, $\hat R_\nu = \sqrt{1 + \hat B_\nu /
    \hat W_\nu}$.

    Chains come in superchains: those of one superchain begin at the same place, or
    belong to the same run of an interacting sampler such as `SMC`. B̂ is the variance
    between the superchains' means; Ŵ the mean over superchains of the variance between
    the means of their chains plus the mean variance within a chain. It works with a
    single draw a chain, where the usual R̂ cannot: all it then needs is that chains of
    a superchain vary independently once they have mixed. At least 1; chains that have
    forgotten their start have about √(1 + 1/M) with one draw a chain, and less with
    more.

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
        >>> bool(cp.metrics.nested_rhat(draws + np.arange(8)[:, None, None]) > 2)  # each where it began
        True

    References:
        Margossian et al. 2024, *Nested R̂: assessing the convergence of Markov chain
        Monte Carlo when running many short chains* (arXiv 2110.13017).
    """
    values = np.asarray(draws, np.float64)
    if values.ndim < 3 or values.shape[0] < 2 or values.shape[1] * values.shape[2] < 2:
        raise ShapeError(
            f"Nested R̂ needs draws of shape (superchains, chains, draws, …); got {values.shape}.",
            fix="pass 2 superchains or more, each with 2 chains or 2 draws or more.",
        )
    if not np.isfinite(values).all():
        raise InvalidValueError(
            "Some draws are not finite.", fix="look at result.status."
        )
    _, chains, length = values.shape[:3]
    of_chain = values.mean(2)
    between = of_chain.mean(1).var(0, ddof=1)
    inside = of_chain.var(1, ddof=min(1, chains - 1))  # 0 where there is one
    within = values.var(2, ddof=min(1, length - 1)).mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(1 + between / (inside + within).mean(0)))


def by_rows(gram: Callable[[slice], np.ndarray], w: np.ndarray, v: np.ndarray) -> float:
    """Σ wᵢ Gᵢⱼ vⱼ of a matrix that is made in blocks of rows."""
    blocks = [
        slice(i, i + tuning.GRAM_ROWS) for i in range(0, len(w), tuning.GRAM_ROWS)
    ]
    return sum(float(w[rows] @ gram(rows) @ v) for rows in blocks)


def _rows(tree: Sites, what: str) -> Float64[np.ndarray, "n d"]:
    """Rows of all sites together, in the order of their names."""
    if not isinstance(tree, Mapping):
        return as_rows(tree, what)
    return np.concatenate([as_rows(tree[name], what) for name in sorted(tree)], axis=1)


def as_rows(samples: ArrayLike, what: str) -> Float64[np.ndarray, "n d"]:
    """Finite samples of shape (n, …), at least one, as float64 of shape (n, d)."""
    points = np.asarray(samples, np.float64)
    if points.ndim == 0 or len(points) == 0:
        fix = "pass an array of shape (n, …), such as result['x']."
        raise ShapeError(
            f"{what} must have a leading axis of at least one sample; got shape {points.shape}.",
            fix=fix,
        )
    points = points.reshape(len(points), -1)
    bad = int((~np.isfinite(points)).any(1).sum())
    if bad:
        fix = "look at result.status; drop them only if you also report how many there were."
        raise InvalidValueError(
            f"{bad} of {len(points)} samples in {what} are not finite.", fix=fix
        )
    return points


def as_positions(points: object, density: AnnealedDensity) -> dict[str, Array]:
    """Finite points as ``{site: (n, …)}`` of a density's sites and shapes, of one site
    those of an array alone."""
    sites = density.sites
    given = (
        points
        if isinstance(points, Mapping)
        else dict.fromkeys(sites if len(sites) == 1 else (), points)
    )
    if given.keys() != sites.keys():
        raise ShapeError(
            f"This density has the sites {sorted(sites)}; got {sorted(given) or 'one array of points'}.",
            fix="pass {" + ", ".join(f"{name!r}: (n, …)" for name in sites) + "}.",
        )
    placed = {name: jnp.asarray(given[name], jnp.result_type(float)) for name in sites}
    numbers = {value.shape[:1] for value in placed.values()}
    wrong = [
        name
        for name, value in placed.items()
        if value.shape[1:] != sites[name].shape or value.ndim == 0
    ]
    if wrong or len(numbers) != 1 or numbers == {(0,)}:
        shapes = {name: value.shape for name, value in placed.items()}
        fix = (
            "pass "
            + ", ".join(
                f"(n, {', '.join(map(str, s.shape))}) for {k!r}"
                for k, s in sites.items()
            )
            + "."
        )
        raise ShapeError(f"Points have the shapes {shapes}.", fix=fix)
    if not all(bool(jnp.isfinite(value).all()) for value in placed.values()):
        raise InvalidValueError("Some points are not finite.", fix="drop them.")
    return placed


def as_pair(
    x: ArrayLike, y: ArrayLike
) -> tuple[Float64[np.ndarray, "n d"], Float64[np.ndarray, "m d"]]:
    """Two sets of samples as rows; refuses those of spaces of different dimension."""
    points, others = as_rows(x, "x"), as_rows(y, "y")
    if points.shape[1] != others.shape[1]:
        fix = "pass samples of one site."
        raise ShapeError(
            f"Events of {points.shape[1]} and of {others.shape[1]} numbers cannot be compared.",
            fix=fix,
        )
    return points, others


def as_weights(log_weights: ArrayLike | None, n: int) -> Float64[np.ndarray, " {n}"]:
    """Weights of shape (n,) that sum to 1; equal ones where ``log_weights``, one a
    sample, is None."""
    if log_weights is None:
        return np.full(n, 1.0 / max(n, 1))
    logs = np.asarray(log_weights, np.float64)
    if logs.shape != (n,):
        raise ShapeError(
            f"{n} samples have log-weights of shape {logs.shape}.",
            fix=f"pass an array of shape ({n},).",
        )
    if np.isnan(logs).any() or not np.isfinite(logs.max()):
        fix = "pass result.log_weights."
        raise InvalidValueError(
            "Log-weights must be numbers or −∞, with one of them finite.", fix=fix
        )
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()
