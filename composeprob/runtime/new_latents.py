r"""New static latents, proposed near where their data put them.

Samples of π(z) go on to π'(z, η) with latents η that are new: members of a plate, or
the next ones of a walk. Drawn from their priors p(η | z) they may miss their data.
Newton's method finds the mode m of π'(z, ·) and its Hessian −H for each chain; then

$$q(\eta \mid z) = \delta\,p(\eta \mid z) + (1 - \delta)\,N(\eta; m, H^{-1}),\qquad
  w = \frac{\pi'(z, \eta)}{\pi(z)\,q(\eta \mid z)}.$$

Where π' is Gaussian in η, w is nearly p(y | z), whatever the data. The part δ of the
prior bounds w by that of draws from the prior, over δ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt32

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.kernels.metropolis import log_uniform
from composeprob.runtime.population import over_chains
from composeprob.samplers.layout import Layout
from composeprob.samplers.random import normals


class Logs(NamedTuple):
    """Logarithms of two densities π and π' at one position of π'.

    Attributes:
        base: log π, with the priors of the latents that π lacks.
        gain: log π' − base.
        prior: the part of the base that is those priors.
    """

    base: Float[Array, ""]
    gain: Float[Array, ""]
    prior: Float[Array, ""]


LogsOf = Callable[[Position], Logs]
"""Function of a position of π'."""


def new_entries(
    density: AnnealedDensity, before: AnnealedDensity
) -> Int[np.ndarray, " new"]:
    """Return the entries of a chain's vector that an earlier density lacks."""
    is_new = {}
    for name, site in density.sites.items():
        entries = np.ones(site.shape)
        if name in before.sites:
            entries[tuple(map(slice, before.sites[name].shape))] = 0
        is_new[name] = jnp.asarray(entries)
    vector = Layout.of_density(density).vector(is_new, 1.0)
    return np.flatnonzero(np.asarray(vector))


def evaluations(new: Int[np.ndarray, " new"]) -> int:
    """Return the evaluations of each chain that proposals take."""
    searched = len(tuning.NEW_LATENTS.shares)
    of_rounds = tuning.NEW_LATENTS.rounds * (1 + len(new) + searched)
    # The Hessian at the mode, and the weight of the proposal.
    return of_rounds + len(new) + 1


@eqx.filter_jit
def proposed(
    logs_of: LogsOf,
    density: AnnealedDensity,
    new: Int[np.ndarray, " new"],
    words: UInt32[Array, "chains 2"],
    points: Float[Array, "chains size"],
    chunk: int | None,
) -> tuple[Float[Array, "chains size"], Float[Array, " chains"]]:
    """Return the chains with their new latents proposed, and log w of each.

    Args:
        logs_of: of π and π'.
        density: π'.
        new: the entries of the new latents.
        words: random words of each chain.
        points: the chains, with new latents from their priors.
        chunk: chains that are evaluated at once.
    """
    layout = Layout.of_density(density)
    alpha = density.schedule.at(0).alpha
    # A search begins at the draw of another chain, as its own one is a proposal.
    starts = jnp.roll(points[:, new], 1, axis=0)

    def of_chain(
        words: Array, v: Array, start: Array
    ) -> tuple[Float[Array, " size"], Float[Array, ""]]:
        def logs(eta: Array) -> Logs:
            return logs_of(layout.position(v.at[new].set(eta), alpha))

        def log_joint(eta: Array) -> Array:
            at = logs(eta)
            return at.base + at.gain

        mode = searched(log_joint, start)
        values, vectors = _curvature(log_joint, mode)
        # Without a mode the chain keeps the draw from its prior.
        found = jnp.isfinite(mode).all() & jnp.isfinite(values).all()
        mode, values, vectors = jax.tree.map(
            lambda of_mode, none: jnp.where(found, of_mode, none),
            (mode, values, vectors),
            (start, jnp.ones_like(start), jnp.eye(len(start))),
        )
        z = normals(words, 0, len(start) + 1, v.dtype)
        log_share = jnp.log(tuning.NEW_LATENTS.prior)
        near = mode + vectors @ (z[:-1] / jnp.sqrt(values))
        by_prior = (log_uniform(z[-1]) < log_share) | ~found
        eta = jnp.where(by_prior, v[new], near)
        at = logs(eta)
        away = vectors.T @ (eta - mode)
        log_normal = 0.5 * jnp.sum(jnp.log(values) - values * away**2)
        log_normal -= 0.5 * len(start) * math.log(2 * math.pi)
        log_near = jnp.log1p(-tuning.NEW_LATENTS.prior) + log_normal
        log_q = jnp.logaddexp(log_share + at.prior, log_near)
        log_q = jnp.where(found, log_q, at.prior)
        return v.at[new].set(eta), at.gain + at.prior - log_q

    return over_chains(of_chain, chunk)(words, points, starts)


def searched(
    log_joint: Callable[[Array], Array], start: Float[Array, " new"]
) -> Float[Array, " new"]:
    """Return a point near the mode of a function, by Newton's method with shares of
    its steps."""
    shares = jnp.asarray(tuning.NEW_LATENTS.shares)

    def round_of(_: int, eta: Array) -> Array:
        values, vectors = _curvature(log_joint, eta)
        gradient = jax.grad(log_joint)(eta)
        step = vectors @ (vectors.T @ gradient / values)
        tried = eta + shares[:, None] * step
        heights = jax.vmap(log_joint)(tried)
        # The last share is 0: a round never leads down.
        best = jnp.argmax(jnp.where(jnp.isnan(heights), -jnp.inf, heights))
        return tried[best]

    return jax.lax.fori_loop(0, tuning.NEW_LATENTS.rounds, round_of, start)


def _curvature(
    log_joint: Callable[[Array], Array], eta: Float[Array, " new"]
) -> tuple[Float[Array, " new"], Float[Array, "new new"]]:
    """Return the absolute eigenvalues of the Hessian, none far below the greatest, and
    its eigenvectors: where the function is not concave, steps still lead up."""
    hessian = jax.jacfwd(jax.grad(log_joint))(eta)
    values, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
    values = jnp.abs(values)
    return jnp.maximum(values, 1e-6 * jnp.max(values) + 1e-30), vectors
