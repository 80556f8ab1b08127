"""Gaussian mixtures fitted to half of the chains: what the other half's independent proposals are drawn from."""

from __future__ import annotations

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning


class GaussianMixture(eqx.Module):
    """q(y) = Σ_j w_j·N(y; m_j, L_j·L_jᵀ) over flattened positions of d numbers."""

    log_weights: Array  # log w_j, (J,); −∞ of components that only fill up
    means: Array  # m_j, (J, d)
    roots: Array  # L_j, (J, d, d)
    inverses: Array  # L_j⁻¹

    def draw(self, noise: Array) -> Array:
        """The draw that d + 1 independent normal numbers make, (d,): the first says which component."""
        below = jnp.cumsum(jnp.exp(self.log_weights))
        j = jnp.minimum(jnp.sum(jax.scipy.special.ndtr(noise[0]) > below), len(below) - 1)
        return self.means[j] + self.roots[j] @ noise[1:]

    def log_prob(self, row: Array) -> Array:
        """log q at one row (d,)."""
        z = jnp.einsum("jab,jb->ja", self.inverses, row - self.means)
        heights = self.log_weights + jnp.sum(jnp.log(jnp.diagonal(self.inverses, axis1=1, axis2=2)), axis=1)
        return jax.nn.logsumexp(heights - 0.5 * jnp.sum(z**2, axis=1)) - 0.5 * len(row) * jnp.log(2 * jnp.pi)

    @classmethod
    def fitted(cls, points: np.ndarray, others: np.ndarray) -> GaussianMixture:
        """The mixture that maximises the likelihood of points, (M, d), by the EM algorithm (Dempster, Laird and Rubin
        1977), of as many components as give others of the same distribution, (M', d), the highest likelihood."""
        from sklearn.mixture import GaussianMixture as Fit  # takes a second to import, and most runs never fit one

        points, others = _some(points), _some(others)
        center, width = points.mean(0), points.std(0)
        width = np.where(width > 0, width, 1.0)
        best, highest, worse, single = None, -np.inf, 0, np.zeros(0)
        for count in tuning.MIXTURE.components:
            if worse == tuning.MIXTURE.patience or (count > 1 and count * (points.shape[1] + 1) > len(points)):
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a fit that has not converged, or of few distinct points, will do
                found = Fit(count, random_state=0).fit((points - center) / width)
            log_densities = found.score_samples((others - center) / width)
            single = log_densities if count == 1 else single
            mean = np.mean(np.maximum(log_densities, single - tuning.MIXTURE.most_lost))
            worse += 1
            if best is None or mean > highest:
                best, highest, worse = found, mean, 0
        assert best is not None
        roots = width[:, None] * np.linalg.cholesky(best.covariances_)
        arrays = np.log(best.weights_), center + width * best.means_, roots, np.linalg.inv(roots)
        return cls(*(jnp.asarray(each, jnp.result_type(float)) for each in arrays))

    @classmethod
    def beside(cls, *mixtures: GaussianMixture) -> GaussianMixture:
        """Several mixtures as one, whose arrays have an axis for them in front; filled up with components of no weight
        to 8, or the most that are tried, so that two numbers of them are all that is compiled."""
        most = max(len(mixture.means) for mixture in mixtures)
        room = 8 if most <= 8 else tuning.MIXTURE.components[-1]

        def filled(array: Array) -> np.ndarray:
            more = np.repeat(np.asarray(array)[:1], room - len(array), axis=0)
            return np.concatenate([array, more if array.ndim > 1 else np.full_like(more, -np.inf)])

        return jax.tree.map(lambda *arrays: jnp.stack([jnp.asarray(filled(a)) for a in arrays]), *mixtures)


def finite(points: np.ndarray) -> np.ndarray:
    """The rows that are numbers throughout, as their squares are."""
    with np.errstate(over="ignore"):
        return points[np.isfinite(np.square(points, dtype=np.float64)).all(1)]


def _some(points: np.ndarray) -> np.ndarray:
    """At most `tuning.MIXTURE.most_points` of the rows, in double precision."""
    chosen = np.linspace(0, len(points) - 1, min(len(points), tuning.MIXTURE.most_points)).astype(int)
    return points[chosen].astype(np.float64)
