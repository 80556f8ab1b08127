"""Whether learned scores belong to one distribution: their curl, as a gradient has
none, and the residual of the Fokker–Planck equation, which the scores of its levels
obey."""

from __future__ import annotations

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.pytree import axpy, squared_norm


def curl(
    density: AnnealedDensity,
    positions: Position,
    level: Array | int,
    key: Array,
    *,
    num_probes: int = 8,
) -> dict[str, float]:
    r"""The relative curl of the score of every factor that does not promise that it is
    a gradient.

    With J the Jacobian of a factor's score and H that of the whole density's,

    $$\text{curl} = \frac{\|\tfrac12(J - J^\top)\|_F}{\max(\|J\|_F, \|H\|_F)} \in [0, 1],$$

    squared norms averaged over positions. A gradient field has 0, as its J is a
    symmetric Hessian; a pure rotation by itself has 1. H is there because a factor that
    is flat where the chains are has a J of nothing but noise, and turns them nowhere.
    Squared norms are estimated without bias by Hutchinson's method, $\|A\|_F^2 =
    E\|Av\|^2$ with independent signs v: a forward- and a reverse-mode product for each
    direction, no matrix.

    A network that learned a score is no exact gradient. Where its curl is large, a
    `LineIntegral` depends on its path, and no density has that score.

    Args:
        density: from `compile`.
        positions: ``{site: (N, …)}``, chains lead, static sites unconstrained; a few
            dozen are enough.
        level: where to look, 0 … K−1.
        key: a typed random key, for the directions.
        num_probes: directions at each position.

    Returns:
        ``{factor: relative curl}``; empty where every factor is a gradient by
            construction (an energy).

    Example:
        >>> import composeprob as cp, jax, jax.numpy as jnp
        >>> turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])
        >>> schedule = cp.Schedule.log_snr(20)
        >>> field = lambda x, level: -x + turn @ x
        >>> f = cp.Diffusion(field, schedule, event_shape=(2,), parameterization="score")
        >>> density = cp.compile(cp.program(lambda f: cp.sample("x", f)), f)
        >>> found = cp.metrics.curl(density, {"x": jnp.ones((4, 2))}, 0, jax.random.key(0))
        >>> round(next(iter(found.values())), 3)
        0.707

    References:
        Hutchinson (1990), a stochastic estimator of the trace. Chao et al. (2023), on
        investigating the conservative property of score-based generative models.
    """
    offers = density.described.offers
    suspects = tuple(
        dict.fromkeys(
            name for name, _, offered in offers if "conservative" not in offered
        )
    )
    if not suspects:
        return {}
    # Names, and their order, stay outside of the compiled function: other conditions
    # must not compile again.
    order = [name for name, *_ in offers]
    uses = tuple(
        tuple(i for i, other in enumerate(order) if other == name) for name in suspects
    )
    pairs = _squared_curls(
        density, uses, positions, jnp.asarray(level), key, num_probes
    )
    *factors, (_, composed) = [
        (float(antisymmetric), float(total)) for antisymmetric, total in pairs
    ]
    sizes = {
        name: (part, max(total, composed))
        for name, (part, total) in zip(suspects, factors, strict=True)
    }
    # a constant score is a gradient
    return {
        name: 0.0 if total == 0 else math.sqrt(part / total)
        for name, (part, total) in sizes.items()
    }


@eqx.filter_jit
def _squared_curls(
    density: AnnealedDensity,
    uses: tuple[tuple[int, ...], ...],
    positions: Position,
    level: Array,
    key: Array,
    num_probes: int,
) -> list[tuple[Array, Array]]:
    """‖(J − Jᵀ)/2‖² and ‖J‖² of each factor, averaged over finite positions, and last,
    beside a 0, ‖H‖²."""
    noised = [name for name, site in density.sites.items() if site.kind == "noised"]

    def norms(position: Position, signs: Position) -> list[tuple[Array, Array]]:
        xs = {name: position[name] for name in noised}

        def fields(xs: Position) -> list[Position]:
            scores = density.evaluator.leaf_scores({**position, **xs}, level)

            def factor_score(indices: tuple[int, ...]) -> Position:
                return {
                    n: sum((scores[i].get(n, 0.0) for i in indices), jnp.zeros_like(x))
                    for n, x in xs.items()
                }

            return list(map(factor_score, uses))

        def composed_score(xs: Position) -> Position:
            score = density.evaluator({**position, **xs}, level).score
            return {n: score[n] for n in xs}

        # One forward product gives those of all fields; the reverse ones are one batch,
        # each of one field's signs. Of the whole score the forward one is enough.
        (forward, composed) = jax.jvp(
            lambda xs: (fields(xs), composed_score(xs)), (xs,), (signs,)
        )[1]
        pull, count = jax.vjp(fields, xs)[1], len(uses)
        each = [
            jax.tree.map(
                lambda s, i=i: jnp.zeros((count, *s.shape), s.dtype).at[i].set(s), signs
            )
            for i in range(count)
        ]
        (backward,) = jax.vmap(pull)(each)
        found = []
        for i, product in enumerate(forward):
            antisymmetric = axpy(
                -1.0, jax.tree.map(lambda a, i=i: a[i], backward), product
            )
            found.append((0.25 * squared_norm(antisymmetric), squared_norm(product)))
        return [*found, (jnp.zeros(()), squared_norm(composed))]

    def probe(key: Array) -> list[tuple[Array, Array]]:
        xs = {name: positions[name] for name in noised}
        keys = jax.random.split(key, len(xs))
        signs = {
            n: jax.random.rademacher(k, x.shape, x.dtype)
            for k, (n, x) in zip(keys, xs.items(), strict=True)
        }
        return jax.vmap(norms)(positions, signs)

    def mean(antisymmetric: Array, total: Array) -> tuple[Array, Array]:
        usable = jnp.isfinite(antisymmetric) & jnp.isfinite(total)
        return jnp.mean(antisymmetric, where=usable), jnp.mean(total, where=usable)

    return [
        mean(*pair) for pair in jax.lax.map(probe, jax.random.split(key, num_probes))
    ]


def fokker_planck(
    density: AnnealedDensity,
    positions: Position,
    level: int,
    key: Array,
    *,
    num_probes: int = 8,
) -> dict[str, float]:
    r"""The relative residual of the Fokker–Planck equation of every factor that claims
    to be a noised distribution.

    Let $y = x/\alpha$, $\tau = \sigma/\alpha$ and $e = -\sigma\nabla_x\log f$, the
    noise that a factor sees in x. The density of $x_0 + \tau\varepsilon$ obeys the heat
    equation, $\partial_\tau p = \tau\Delta p$, whose gradient is

    $$\rho = \frac{\partial e}{\partial\log\tau} - e - \nabla_y\big(\tau^2\,\nabla_y\!\cdot e - \tau\|e\|^2\big) = 0,$$

    for any distribution of $x_0$. A network that learned each level separately, with an
    error, has another ρ. Returned is
    $\sqrt{\mathrm{med}\|\rho\|^2/\mathrm{med}\|e\|^2}$ over positions: which share of
    the noise prediction changes wrongly while σ/α grows by a factor of e. It is 0 of an
    exact factor, up to the finite difference that stands for ∂/∂log τ: of 5 levels,
    about a thousandth where neighbours are 0.2 apart in log τ. It does not find a
    network that has learned another distribution well.

    Args:
        density: from `compile`.
        positions: ``{site: (N, …)}`` at this level, chains lead, static sites
            unconstrained; a few dozen are enough.
        level: where to look, 0 … K−1.
        key: a typed random key, for random directions in more than 16 dimensions.
        num_probes: pairs of directions at each position, there.

    Returns:
        ``{factor: relative residual}``, of the worst of at most 4 conditions in a
        plate; NaN where the levels around are more than 0.5 apart in log τ, or fewer
        than 5. Factors that see means of blocks are left out.

    Example:
        >>> import composeprob as cp, jax, jax.numpy as jnp
        >>> schedule = cp.Schedule.log_snr(60)
        >>> half = lambda x, t: 0.5 * x * t / jnp.sqrt(1 + t**2)  # of N(0, 1): half of the noise that is there
        >>> f = cp.Diffusion(half, schedule, event_shape=(1,), parameterization="epsilon", time="sigma", label="half")
        >>> density = cp.compile(cp.program(lambda f: cp.sample("x", f)), f)
        >>> x = {"x": jax.random.normal(jax.random.key(0), (64, 1))}
        >>> found = cp.metrics.fokker_planck(density, x, 30, jax.random.key(1))
        >>> round(found["f(x)"], 2)  # σ² = 0.30 at this level
        0.3

    References:
        Lai et al. 2023, *FP-Diffusion: improving score-based diffusion models by
        enforcing the underlying score Fokker–Planck equation* (arXiv 2210.04296).
    """
    experts = density.described.experts
    asked = [i for i, expert in enumerate(experts) if expert.averaged == 1.0]
    if not asked:
        return {}
    if (stencil := _stencil(density, int(level))) is None:
        return dict.fromkeys((experts[i].name for i in asked), math.nan)
    # Names stay outside of the compiled function: other conditions must not compile
    # again.
    sites = tuple((i, experts[i].site) for i in asked)
    arguments = density, sites, positions, jnp.asarray(level), *stencil, key, num_probes
    pairs = dict(zip(asked, _squared_residuals(*arguments), strict=True))
    found: dict[str, float] = {}
    for i in asked:
        residual, size = (np.asarray(values, float) for values in pairs[i])
        least = (
            0.1**2 * experts[i].dimension
        )  # a prediction below 0.1 of a standard deviation counts as that
        worst = float(
            np.sqrt(np.maximum(residual, 0.0) / np.maximum(size, least)).max()
        )
        found[experts[i].name] = max(worst, found.get(experts[i].name, 0.0))
    return found


def _stencil(density: AnnealedDensity, level: int) -> tuple[Array, Array] | None:
    """The levels around one, and the weights of the derivative by log(σ/α) of what is
    interpolated between them; None where there are too few, or neighbours too far
    apart."""
    number = 5  # of levels whose noise predictions make one derivative
    first = min(max(level - number // 2, 0), density.num_levels - number)
    if first < 0:
        return None
    levels = np.arange(first, first + number)
    at = -0.5 * np.asarray(density.schedule.log_snr, np.float64)[levels]
    if np.diff(at).max() > 0.5:
        return None
    powers = np.arange(number)
    offsets = at - at[level - first]
    weights = np.linalg.solve(
        offsets[None, :] ** powers[:, None], (powers == 1).astype(float)
    )
    return jnp.asarray(levels), jnp.asarray(weights, float)


@eqx.filter_jit
def _squared_residuals(
    density: AnnealedDensity,
    asked: tuple[tuple[int, str], ...],
    positions: Position,
    level: Array,
    levels: Array,
    weights: Array,
    key: Array,
    num_probes: int,
) -> list[tuple[Array, Array]]:
    """‖ρ‖² and ‖e‖² of each row of every expert that is asked: medians over finite
    positions."""
    noise = density.schedule.at(level)

    def squared_norms(
        expert: int, site: str, position: Position, key: Array
    ) -> tuple[Array, Array]:
        shape, size = position[site].shape, position[site].size
        x = position[site].ravel()

        def predicted_noise(x: Array, level: Array) -> Array:
            """e of each row, (rows, entries)."""
            value = density.evaluator.expert_values(
                {**position, site: x.reshape(shape)}, level
            )[expert]
            return (
                -density.schedule.at(level).sigma * value.score[:4]
            )  # at most four conditions of a plate

        def predicted_at(level: Array) -> Array:
            return predicted_noise(
                density.schedule.at(level).alpha / noise.alpha * x, level
            )

        def potential(x: Array, directions: Array) -> Array:
            """τ²∇·e − τ‖e‖² of each row, in units of α: ∇_y is α∇_x."""
            e = predicted_noise(x, level)
            pulled_back = jax.vmap(
                lambda v: (
                    jax.jvp(lambda x: predicted_noise(x, level), (x,), (v,))[1] @ v
                )
            )(directions)
            divergence = jnp.sum(pulled_back, 0) / repeats
            return noise.sigma**2 * divergence - noise.sigma * jnp.sum(e**2, 1)

        # Two independent estimates of a divergence, whose product has no bias; one
        # where there is nothing to estimate.
        if size > 16:
            directions, repeats = (
                jax.random.rademacher(key, (2, num_probes, size), x.dtype),
                num_probes,
            )
        else:
            directions, repeats = jnp.eye(size, dtype=x.dtype)[None], 1
        e = predicted_noise(x, level)
        grown = jnp.tensordot(
            weights.astype(x.dtype), jax.lax.map(predicted_at, levels), 1
        )
        pulled = jax.lax.map(lambda signs: jax.jacrev(potential)(x, signs), directions)
        residuals = grown - e - pulled
        return jnp.sum(residuals[0] * residuals[-1], 1), jnp.sum(e**2, 1)

    def median(values: Array) -> Array:
        return jnp.nanmedian(jnp.where(jnp.isfinite(values), values, jnp.nan), axis=0)

    number = jax.tree.leaves(positions)[0].shape[0]
    keys = jax.random.split(key, number)
    return [
        jax.tree.map(median, jax.vmap(partial(squared_norms, i, site))(positions, keys))
        for i, site in asked
    ]
