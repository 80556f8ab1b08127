"""Whether scores are gradients: the antisymmetric part of their Jacobians, estimated without forming these."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.pytree import axpy, squared_norm


def curl(
    density: AnnealedDensity, positions: Position, level: Array | int, key: Array, *, num_probes: int = 8
) -> dict[str, float]:
    r"""The relative curl of the score of every factor that does not promise that it is a gradient.

    With J the Jacobian of a factor's score and H that of the whole density's,

    $$\text{curl} = \frac{\|\tfrac12(J - J^\top)\|_F}{\max(\|J\|_F, \|H\|_F)} \in [0, 1],$$

    squared norms averaged over positions. A gradient field has 0, as its J is a symmetric Hessian; a pure rotation by
    itself has 1. H is there because a factor that is flat where the chains are has a J of nothing but noise, and turns
    them nowhere. Squared norms are estimated without bias by Hutchinson's method, $\|A\|_F^2 = E\|Av\|^2$ with
    independent signs v: a forward- and a reverse-mode product for each direction, no matrix.

    A network that learned a score is no exact gradient. Where its curl is large, a `LineIntegral` depends on its path,
    and no density has that score.

    Args:
        density: from `compile`.
        positions: ``{site: (N, …)}``, chains lead, static sites unconstrained; a few dozen are enough.
        level: where to look, 0 … K−1.
        key: a typed random key, for the directions.
        num_probes: directions at each position.

    Returns:
        ``{factor: relative curl}``; empty where every factor is a gradient by construction (an energy).

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
        Hutchinson (1990), a stochastic estimator of the trace. Chao et al. (2023), on investigating the conservative
        property of score-based generative models.
    """
    offers = density.described.offers
    suspects = tuple(dict.fromkeys(name for name, _, offered in offers if "conservative" not in offered))
    if not suspects:
        return {}
    # Names, and their order, stay outside of the compiled function: other conditions must not compile again.
    order = [name for name, *_ in offers]
    uses = tuple(tuple(i for i, other in enumerate(order) if other == name) for name in suspects)
    pairs = _squared_norms(density, uses, positions, jnp.asarray(level), key, num_probes)
    *factors, (_, composed) = [(float(antisymmetric), float(total)) for antisymmetric, total in pairs]
    sizes = {name: (part, max(total, composed)) for name, (part, total) in zip(suspects, factors, strict=True)}
    # a constant score is a gradient
    return {name: 0.0 if total == 0 else math.sqrt(part / total) for name, (part, total) in sizes.items()}


@eqx.filter_jit
def _squared_norms(
    density: AnnealedDensity,
    uses: tuple[tuple[int, ...], ...],
    positions: Position,
    level: Array,
    key: Array,
    num_probes: int,
) -> list[tuple[Array, Array]]:
    """‖(J − Jᵀ)/2‖² and ‖J‖² of each factor, averaged over finite positions, and last, beside a 0, ‖H‖²."""
    noised = [name for name, site in density.sites.items() if site.kind == "noised"]

    def norms(position: Position, signs: Position) -> list[tuple[Array, Array]]:
        xs = {name: position[name] for name in noised}

        def fields(xs: Position) -> list[Position]:
            scores = density.evaluator.leaf_scores({**position, **xs}, level)

            def factor_score(indices: tuple[int, ...]) -> Position:
                return {n: sum((scores[i].get(n, 0.0) for i in indices), jnp.zeros_like(x)) for n, x in xs.items()}

            return list(map(factor_score, uses))

        def composed_score(xs: Position) -> Position:
            score = density.evaluator({**position, **xs}, level).score
            return {n: score[n] for n in xs}

        # One forward product gives those of all fields; the reverse ones are one batch, each of one field's signs. Of
        # the whole score the forward one is enough.
        (forward, composed) = jax.jvp(lambda xs: (fields(xs), composed_score(xs)), (xs,), (signs,))[1]
        pull, count = jax.vjp(fields, xs)[1], len(uses)
        each = [
            jax.tree.map(lambda s, i=i: jnp.zeros((count, *s.shape), s.dtype).at[i].set(s), signs) for i in range(count)
        ]
        (backward,) = jax.vmap(pull)(each)
        found = []
        for i, product in enumerate(forward):
            antisymmetric = axpy(-1.0, jax.tree.map(lambda a, i=i: a[i], backward), product)
            found.append((0.25 * squared_norm(antisymmetric), squared_norm(product)))
        return [*found, (jnp.zeros(()), squared_norm(composed))]

    def probe(key: Array) -> list[tuple[Array, Array]]:
        xs = {name: positions[name] for name in noised}
        keys = jax.random.split(key, len(xs))
        signs = {n: jax.random.rademacher(k, x.shape, x.dtype) for k, (n, x) in zip(keys, xs.items(), strict=True)}
        return jax.vmap(norms)(positions, signs)

    def mean(antisymmetric: Array, total: Array) -> tuple[Array, Array]:
        usable = jnp.isfinite(antisymmetric) & jnp.isfinite(total)
        return jnp.mean(antisymmetric, where=usable), jnp.mean(total, where=usable)

    return [mean(*pair) for pair in jax.lax.map(probe, jax.random.split(key, num_probes))]
