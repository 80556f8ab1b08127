r"""Whether independent chains lie in the modes in the shares that their densities have.

Chains that no longer cross from mode to mode keep the shares of the level at which they parted, which are those of
level 0 only where noise changes none of them. At level 0, where chains are in equilibrium inside of each mode m,

$$\log Z_m = E_m[\log \pi] + H_m, \qquad H_m \approx \tfrac12\log\det(2\pi e\,\Sigma_m),$$

the mean log-density there and the entropy, of a Gaussian with the mode's covariance. Shares of chains are compared with
$Z_m/\sum Z$.
"""

from __future__ import annotations

import math

import numpy as np

from composeprob.results.comparison import nearest, scaled
from composeprob.results.status import Code

OFF = 1.5
"""Nats between log Z_m − log Z_n and the chains' shares that are worth a finding: what the entropy of a mode that is no
Gaussian may be off by is less."""
MOST = 1000
"""Chains that are looked at."""


def frozen_shares(sites: dict[str, np.ndarray], log_density: np.ndarray) -> list[tuple[Code, str]]:
    """The finding that modes hold other shares of the chains than of the density, if they do.

    Args:
        sites: positions at level 0 in the coordinates of the density, ``{site: (N, …)}``.
        log_density: log π of each, (N,), comparable between modes.
    """
    some = np.unique(np.linspace(0, len(log_density) - 1, min(MOST, len(log_density))).astype(int))
    parts, values = [np.asarray(x, float)[some].reshape(len(some), -1) for x in sites.values()], log_density[some]
    points = np.concatenate(parts, axis=1)
    if not np.isfinite(points).all() or not np.isfinite(values).all():
        return []
    modes = _modes(scaled(points, [part.shape[1] for part in parts]))
    sizes = np.bincount(modes)
    if len(sizes) < 2 or sizes.min() < 5 * points.shape[1]:
        return []
    held = [(values[modes == m], points[modes == m]) for m in range(len(sizes))]
    log_z = np.array([inside.mean() + _entropy(where) for inside, where in held])
    error = np.array([inside.std() / math.sqrt(len(inside)) for inside, _ in held])
    off = log_z - np.log(sizes)
    low, high = int(np.argmin(off)), int(np.argmax(off))
    if off[high] - off[low] < OFF + 3 * math.hypot(error[high], error[low]):
        return []
    shares = np.exp(log_z - np.logaddexp.reduce(log_z))
    text = (
        f"The chains lie in {len(sizes)} groups that they do not cross between, in shares that noisier levels decided: "
        f"one group holds {sizes[high] / sizes.sum():.1%} of them, and by its log-density it should hold about "
        f"{shares[high]:.1%}. Means over all groups are wrong; each group by itself is not. Try cp.SMC with more "
        "chains or more levels, or cp.ReplicaExchange, whose chains move between modes."
    )
    return [(Code.SHARES_FROZEN, text)]


def _modes(points: np.ndarray) -> np.ndarray:
    """The number of each point's group: what the graph of nearest neighbours connects, (n,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(points)
    k = min(max(10, n // 50), n - 1)
    near = nearest(points, np.arange(n), k)
    graph = coo_array((np.ones(n * k), (np.repeat(np.arange(n), k), near.ravel())), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1])


def _entropy(points: np.ndarray) -> float:
    """Of a Gaussian with the points' covariance, in nats."""
    covariance = np.atleast_2d(np.cov(points, rowvar=False))
    return 0.5 * float(np.linalg.slogdet(2 * np.pi * np.e * covariance)[1])
