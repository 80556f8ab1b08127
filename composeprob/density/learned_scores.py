"""Consistency of learned scores with one distribution: their curl, as a gradient has
none, and the residual of the Fokker–Planck equation, which the scores of its levels
obey."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position
from composeprob.errors import ShapeError
from composeprob.pytree import axpy, squared_norm


class Misfit(NamedTuple):
    """Noise in a factor's own samples against the noise that its score predicts, at the
    level where they differ most."""

    slope: float  # of the regression of the one on the other; 1 if right
    shift: float  # of the mean of their difference, the greatest over the numbers
    log_snr: float
    log_snr_offset: float = 0.0  # of a network that is told too great a log-SNR

    def __str__(self) -> str:
        if self.log_snr_offset:
            side = "less" if self.log_snr_offset > 0 else "greater"
            return (
                f"at a log-SNR of {self.log_snr:.2g} its samples have the noise that "
                f"it predicts for one that is {side} by {abs(self.log_snr_offset):.1f}"
            )
        return (
            f"the noise in its samples is {self.slope:.2f} times the noise that it "
            f"predicts, with a mean off by {self.shift:.2f}, at a log-SNR of "
            f"{self.log_snr:.2g}"
        )


class OwnScore(NamedTuple):
    """The worst disagreement of a factor's score with its own samples at level 0.

    It is taken over all numbers of the site, and over those of a plate's members
    together, less four standard errors; shift 0 and steepness 1 where nothing is wrong.
    """

    shift: float  # of the number, or of an entry of the group's mean or covariance
    steepness: float
    # The cleanest level from which on both are about right; None where no level is.
    right_from: int | None
    members: int = 1  # of a plate, J
    misfit: Misfit | None = None  # None where the predicted noise is right

    @property
    def wrong(self) -> bool:
        """True if chains are led away from the factor's own samples; not where nothing
        is finite."""
        off = max(2 * self.shift, abs(self.steepness - 1))
        return off > tuning.FINDINGS.own_score

    def __str__(self) -> str:
        text = (
            f"{self.steepness:.2g} times as steep as their spread says, and shifted by "
            f"{self.shift:.2g} sd"
        )
        if self.members > 1:
            text += (
                f" (the worst of {self.members} members, or in sd of their group's "
                "mean or covariance)"
            )
        return text


class Stencil(NamedTuple):
    """Finite difference in log(σ/α) at a level: levels around it, and their weights."""

    levels: Array
    weights: Array


def curl(
    density: AnnealedDensity,
    positions: Position,
    level: Array | int,
    key: Array,
    *,
    num_probes: int = 8,
) -> dict[str, float]:
    r"""The relative curl of every factor whose score is not promised to be a gradient.

    With J the Jacobian of a factor's score and H that of the whole density's,

    $$\text{curl} =
    \frac{\|\tfrac12(J - J^\top)\|_F}{\max(\|J\|_F, \|H\|_F)} \in [0, 1],$$

    squared norms averaged over positions. A gradient field has 0, as its J is a
    symmetric Hessian; a pure rotation by itself has 1. H is in the denominator because
    a factor that is flat where the chains are has a J of nothing but noise, which does
    not turn them. Squared norms are estimated without bias by Hutchinson's method,
    $\|A\|_F^2 = E\|Av\|^2$ with independent signs v: a forward- and a reverse-mode
    product for each direction, no matrix.

    A network that learned a score is not an exact gradient. Where its curl is large, a
    `LineIntegral` depends on its path, and no density has that score.

    Args:
        density: from `compile`.
        positions: ``{site: (N, …)}``, chains lead, static sites unconstrained; a few
            dozen are enough.
        level: the level k, 0 … K−1.
        key: a typed random key, for the directions.
        num_probes: directions at each position.

    Returns:
        ``{factor: relative curl}``; empty where every factor is a gradient by
            construction (an energy).

    Raises:
        LevelError: a level that does not exist.
        ShapeError: positions of other sites or shapes.

    Example:
        >>> import composeprob as cp, jax, jax.numpy as jnp
        >>> turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])
        >>> schedule = cp.Schedule.log_snr(20)
        >>> def field(x, level):
        ...     return -x + turn @ x
        >>> settings = {"event_shape": (2,), "parameterization": "score"}
        >>> f = cp.Diffusion(field, schedule, **settings)
        >>> density = cp.compile(cp.program(lambda f: cp.sample("x", f)), f)
        >>> x = {"x": jnp.ones((4, 2))}
        >>> curls = cp.metrics.curl(density, x, 0, jax.random.key(0))
        >>> round(next(iter(curls.values())), 3)
        0.707

    References:
        Hutchinson (1990), a stochastic estimator of the trace. Chao et al. (2023), on
        investigating the conservative property of score-based generative models.
    """
    density.schedule.check_level(level)
    _check_positions(density, positions)
    leaves_of_suspects: dict[str, list[int]] = {}
    for name, _, offered in density.described.offers:
        if "conservative" not in offered:
            leaves_of_suspects.setdefault(name, [])
    for i, (name, *_) in enumerate(density.described.offers):
        if name in leaves_of_suspects:
            leaves_of_suspects[name].append(i)
    if not leaves_of_suspects:
        return {}
    # Names, and their order, stay outside of the compiled function: other conditions
    # must not compile again.
    uses = tuple(tuple(indices) for indices in leaves_of_suspects.values())
    *of_factors, of_density = _squared_curls(
        density, uses, positions, jnp.asarray(level), key, num_probes
    )
    curls = {}
    for name, norms in zip(leaves_of_suspects, of_factors, strict=True):
        antisymmetric = float(norms.antisymmetric)
        total = max(float(norms.total), float(of_density.total))
        # A constant score is a gradient.
        curls[name] = 0.0 if total == 0 else math.sqrt(antisymmetric / total)
    return curls


class _SquaredNorms(NamedTuple):
    """‖(J − Jᵀ)/2‖² and ‖J‖² of a field with the Jacobian J."""

    antisymmetric: Array
    total: Array


@eqx.filter_jit
def _squared_curls(
    density: AnnealedDensity,
    uses: tuple[tuple[int, ...], ...],
    positions: Position,
    level: Array,
    key: Array,
    num_probes: int,
) -> list[_SquaredNorms]:
    """Squared norms of each factor's field, averaged over finite positions; the last
    ones are those of the whole density, with ‖H‖² as the total.

    ``uses`` are the indices of the leaves of each factor.
    """
    noised = [name for name, site in density.sites.items() if site.kind == "noised"]

    def norms(position: Position, signs: Position) -> list[_SquaredNorms]:
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

        # One forward product gives J·v of all fields; the reverse ones, Jᵀ·v, are one
        # batch, each with the signs in one field alone. Of the composed score the
        # forward one is enough.
        _, (forward, composed) = jax.jvp(
            lambda xs: (fields(xs), composed_score(xs)), (xs,), (signs,)
        )
        _, pull_back = jax.vjp(fields, xs)
        count = len(uses)

        def signs_in_field(i: int) -> Position:
            return jax.tree.map(
                lambda s: jnp.zeros((count, *s.shape), s.dtype).at[i].set(s), signs
            )

        (backward,) = jax.vmap(pull_back)([signs_in_field(i) for i in range(count)])
        of_fields = []
        for i, product in enumerate(forward):
            transposed_product = jax.tree.map(lambda a, i=i: a[i], backward)
            difference = axpy(-1.0, transposed_product, product)
            of_fields.append(
                _SquaredNorms(0.25 * squared_norm(difference), squared_norm(product))
            )
        return [*of_fields, _SquaredNorms(jnp.zeros(()), squared_norm(composed))]

    def probe(key: Array) -> list[_SquaredNorms]:
        xs = {name: positions[name] for name in noised}
        keys = jax.random.split(key, len(xs))
        signs = {
            n: jax.random.rademacher(k, x.shape, x.dtype)
            for k, (n, x) in zip(keys, xs.items(), strict=True)
        }
        return jax.vmap(norms)(positions, signs)

    def mean(norms: _SquaredNorms) -> _SquaredNorms:
        usable = jnp.isfinite(norms.antisymmetric) & jnp.isfinite(norms.total)
        return _SquaredNorms(
            jnp.mean(norms.antisymmetric, where=usable),
            jnp.mean(norms.total, where=usable),
        )

    of_probes = jax.lax.map(probe, jax.random.split(key, num_probes))
    return [mean(norms) for norms in of_probes]


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

    $$\rho = \frac{\partial e}{\partial\log\tau} - e
    - \nabla_y\big(\tau^2\,\nabla_y\!\cdot e - \tau\|e\|^2\big) = 0,$$

    for any distribution of $x_0$. A network that learned each level separately, with an
    error, has another ρ. The relative residual is
    $\sqrt{\mathrm{med}\|\rho\|^2/\mathrm{med}\|e\|^2}$ over positions: the share of
    the noise prediction that changes wrongly while σ/α grows by a factor of e. It is 0
    for an exact factor, up to the finite difference that stands for ∂/∂log τ: of 5
    levels, about a thousandth where neighbours are 0.2 apart in log τ. It does not find
    a network that has learned another distribution well.

    Args:
        density: from `compile`.
        positions: ``{site: (N, …)}`` at this level, chains lead, static sites
            unconstrained; a few dozen are enough.
        level: the level k, 0 … K−1.
        key: a typed random key, for random directions in more than 16 dimensions.
        num_probes: pairs of directions at each position, there.

    Returns:
        ``{factor: relative residual}``, of the worst of at most 4 conditions in a
        plate; NaN where the levels around are more than 0.5 apart in log τ, or fewer
        than 5. Factors that see means of blocks are left out.

    Raises:
        LevelError: a level that does not exist.
        ShapeError: positions of other sites or shapes.

    Example:
        >>> import composeprob as cp, jax, jax.numpy as jnp
        >>> schedule = cp.Schedule.log_snr(60)
        >>> def half(x, t):  # half of the noise that is there, for N(0, 1)
        ...     return 0.5 * x * t / jnp.sqrt(1 + t**2)
        >>> f = cp.Diffusion(half, schedule, event_shape=(1,), time="sigma")
        >>> density = cp.compile(cp.program(lambda f: cp.sample("x", f)), f)
        >>> x = {"x": jax.random.normal(jax.random.key(0), (64, 1))}
        >>> residuals = cp.metrics.fokker_planck(density, x, 30, jax.random.key(1))
        >>> round(residuals["f(x)"], 2)  # σ² = 0.30 at this level
        0.3

    References:
        Lai et al. 2023, *FP-Diffusion: improving score-based diffusion models by
        enforcing the underlying score Fokker–Planck equation* (arXiv 2210.04296).
    """
    density.schedule.check_level(level)
    _check_positions(density, positions)
    experts = density.described.experts
    checked = [i for i, expert in enumerate(experts) if expert.averaged == 1.0]
    if not checked:
        return {}
    stencil = _stencil(density, int(level))
    if stencil is None:
        return dict.fromkeys((experts[i].name for i in checked), math.nan)
    # Names stay outside of the compiled function: other conditions must not compile
    # again.
    sites = tuple((i, experts[i].site) for i in checked)
    squares = _squared_residuals(
        density, sites, positions, jnp.asarray(level), stencil, key, num_probes
    )
    residuals: dict[str, float] = {}
    for i, (squared_residual, squared_noise) in zip(checked, squares, strict=True):
        # A prediction below 0.1 of a standard deviation counts as that.
        least = 0.1**2 * experts[i].dimension
        residual = np.maximum(np.asarray(squared_residual, float), 0.0)
        size = np.maximum(np.asarray(squared_noise, float), least)
        worst = float(np.sqrt(residual / size).max())
        name = experts[i].name
        residuals[name] = max(worst, residuals.get(name, 0.0))
    return residuals


def _check_positions(density: AnnealedDensity, positions: Position) -> None:
    """Refuse positions of many chains with other sites, or of other shapes."""
    found: dict[str, tuple[int, ...]] = {}
    if isinstance(positions, dict):
        found = {name: np.shape(value) for name, value in positions.items()}
    wanted = {name: site.shape for name, site in density.sites.items()}
    events = {name: shape[1:] for name, shape in found.items()}
    numbers = {shape[:1] for shape in found.values()}
    if events == wanted and len(numbers) == 1 and numbers.isdisjoint({(), (0,)}):
        return
    shapes = ", ".join(
        f"{name!r}: (N, {', '.join(map(str, shape))})" for name, shape in wanted.items()
    )
    raise ShapeError(
        f"Positions have the shapes {found or type(positions).__name__}.",
        fix=f"chains lead; pass arrays of these shapes, {{{shapes}}}.",
    )


def _stencil(density: AnnealedDensity, level: int) -> Stencil | None:
    """Levels around one, and the weights of the derivative by log(σ/α) of the
    polynomial through values at them; None where there are too few, or neighbours too
    far apart."""
    number = 5  # of levels whose noise predictions make one derivative
    first = min(max(level - number // 2, 0), density.num_levels - number)
    if first < 0:
        return None
    levels = np.arange(first, first + number)
    # log(σ/α) is −½ of the log-SNR.
    log_tau = -0.5 * np.asarray(density.schedule.log_snr, np.float64)[levels]
    if np.diff(log_tau).max() > 0.5:
        return None
    # The weights w are exact for powers: Σ_j w_j·offset_j^n = 1 for n = 1, else 0.
    powers = np.arange(number)
    offsets = log_tau - log_tau[level - first]
    weights = np.linalg.solve(
        offsets[None, :] ** powers[:, None], (powers == 1).astype(float)
    )
    return Stencil(jnp.asarray(levels), jnp.asarray(weights, float))


@eqx.filter_jit
def _squared_residuals(
    density: AnnealedDensity,
    checked: tuple[tuple[int, str], ...],
    positions: Position,
    level: Array,
    stencil: Stencil,
    key: Array,
    num_probes: int,
) -> list[tuple[Float[Array, " rows"], Float[Array, " rows"]]]:
    """‖ρ‖² and ‖e‖² of each row of the checked experts, (index, site): medians over
    finite positions."""
    noise = density.schedule.at(level)

    def squared_norms(
        expert: int, site: str, position: Position, key: Array
    ) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
        shape = position[site].shape
        size = position[site].size
        x = position[site].ravel()

        def predicted_noise(x: Array, level: Array) -> Float[Array, "rows entries"]:
            """Return e of each row."""
            moved = {**position, site: x.reshape(shape)}
            value = density.evaluator.expert_values(moved, level)[expert]
            # At most four conditions of a plate.
            return -density.schedule.at(level).sigma * value.score[:4]

        def predicted_at(level: Array) -> Array:
            # The same y = x/α at another level.
            x_at_level = density.schedule.at(level).alpha / noise.alpha * x
            return predicted_noise(x_at_level, level)

        def potential(x: Array, directions: Array) -> Float[Array, " rows"]:
            """τ²∇·e − τ‖e‖² of each row, in units of α: ∇_y is α∇_x."""
            e = predicted_noise(x, level)

            def quadratic_form(v: Array) -> Array:
                """vᵀ·(∂e/∂x)·v of each row."""
                _, product = jax.jvp(lambda x: predicted_noise(x, level), (x,), (v,))
                return product @ v

            forms = jax.vmap(quadratic_form)(directions)
            divergence = jnp.sum(forms, 0) / repeats
            return noise.sigma**2 * divergence - noise.sigma * jnp.sum(e**2, 1)

        # Two independent estimates of a divergence, whose product has no bias; in few
        # dimensions the exact divergence, over all unit vectors.
        if size > 16:
            directions = jax.random.rademacher(key, (2, num_probes, size), x.dtype)
            repeats = num_probes
        else:
            directions = jnp.eye(size, dtype=x.dtype)[None]
            repeats = 1
        e = predicted_noise(x, level)
        predictions = jax.lax.map(predicted_at, stencil.levels)
        growth = jnp.tensordot(stencil.weights.astype(x.dtype), predictions, 1)
        gradients = jax.lax.map(
            lambda signs: jax.jacrev(potential)(x, signs), directions
        )
        residuals = growth - e - gradients
        return jnp.sum(residuals[0] * residuals[-1], 1), jnp.sum(e**2, 1)

    def median(values: Array) -> Array:
        return jnp.nanmedian(jnp.where(jnp.isfinite(values), values, jnp.nan), axis=0)

    number = jax.tree.leaves(positions)[0].shape[0]
    keys = jax.random.split(key, number)
    medians = []
    for i, site in checked:
        squares = jax.vmap(partial(squared_norms, i, site))(positions, keys)
        medians.append(jax.tree.map(median, squares))
    return medians
