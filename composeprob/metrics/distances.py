"""Distances between two sets of samples: the maximum mean discrepancy and the Wasserstein distance."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.errors import InvalidValueError, ShapeError
from composeprob.metrics.points import as_pair, as_weights
from composeprob.results.estimates import systematic


def mmd(x: ArrayLike, y: ArrayLike, bandwidth: float, log_weights: ArrayLike | None = None) -> float:
    r"""Estimates the squared maximum mean discrepancy, $\mathrm{MMD}^2 = E\,k(X, X') - 2\,E\,k(X, Y) + E\,k(Y, Y')$.

    With the Gaussian kernel $k(x, y) = \exp(-\|x - y\|^2 / (2h^2))$, and without the pairs of a sample with itself: the
    U-statistic, whose expectation is exactly MMD². It is 0 on average where both distributions agree, so it comes out
    slightly negative half of the time then, and no root is taken. The bandwidth h is a fixed number by intention: a
    median of the pooled distances jumps between the modes' width and their distance, and makes values incomparable.

    Args:
        x: samples of shape (n, …), n ≥ 2.
        y: samples of shape (m, …), m ≥ 2, of the same event.
        bandwidth: h > 0, in the samples' units. About the width of one mode sees shapes; the distance between modes
            sees their shares.
        log_weights: of x, up to a constant, shape (n,): the first term then is Σ_{i≠j} wᵢwⱼk(xᵢ, xⱼ)/(1 − Σwᵢ²).

    Raises:
        ShapeError: events of different size, or fewer than two samples.
        InvalidValueError: samples that are not finite, or a bandwidth that is not positive.

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
        raise ShapeError("An unbiased MMD needs two samples or more on either side.", fix="pass more samples.")
    weights, equal = as_weights(log_weights, len(points)), as_weights(None, len(others))

    def mean(a: np.ndarray, w: np.ndarray, b: np.ndarray, v: np.ndarray) -> float:
        """Σ wᵢ vⱼ k(aᵢ, bⱼ), in blocks of rows."""
        total = 0.0
        for i in range(0, len(a), tuning.GRAM_ROWS):
            gram = np.exp(cdist(a[i : i + tuning.GRAM_ROWS], b, "sqeuclidean") / (-2.0 * bandwidth**2))
            total += float(w[i : i + tuning.GRAM_ROWS] @ gram @ v)
        return total

    def between(a: np.ndarray, w: np.ndarray) -> float:
        """The same over pairs of different points: k(a, a) = 1 is taken out of the diagonal."""
        self_weight = float(w @ w)
        if self_weight > 1 - 1e-12:
            raise InvalidValueError(
                "One sample has all the weight: there is no pair to compare.", fix="see result.status."
            )
        return (mean(a, w, a, w) - self_weight) / (1 - self_weight)

    return between(points, weights) - 2 * mean(points, weights, others, equal) + between(others, equal)


def wasserstein(x: ArrayLike, y: ArrayLike, p: float = 2.0, log_weights: ArrayLike | None = None) -> float:
    r"""Computes the p-Wasserstein distance of two sets of samples.

    $$W_p = \Big(\min_\pi \frac1n\sum_{i=1}^n \|x_i - y_{\pi(i)}\|^p\Big)^{1/p}.$$

    The best matching π is found exactly (O(n³): a second for 2000 samples, some ten for 4000). Sets of different size
    and weighted samples are resampled systematically to the larger size first. Between two sets of exact draws it is
    not 0 but of order n^{−1/d} (n^{−1/2p} in one dimension): compare with the same number of exact draws.

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
        Peyré and Cuturi 2019, *Computational optimal transport*, chapter 2. Crouse 2016 for the matching of SciPy.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    if not (np.ndim(p) == 0 and np.isfinite(p) and p >= 1):
        raise InvalidValueError(f"A Wasserstein distance has an order p ≥ 1; got {p!r}.", fix="use 1 or 2.")
    points, others = as_pair(x, y)
    weights, n = as_weights(log_weights, len(points)), max(len(points), len(others))
    if log_weights is not None or len(points) < n:
        points = points[systematic(weights, n)]
    if len(others) < n:
        others = others[systematic(as_weights(None, len(others)), n)]
    cost = cdist(points, others) ** p
    return float(cost[linear_sum_assignment(cost)].mean() ** (1 / p))
