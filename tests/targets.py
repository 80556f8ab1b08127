"""Laws in closed form: a log-density, exact draws, and functions with known
expectations.

A check compares averages of `statistics` over a sampler's draws with `expected`; see
zscores.py for the error rate.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from scipy import integrate, stats

from composeprob.density.evaluation import Evaluation, Target


@dataclasses.dataclass(frozen=True)
class Law:
    """A probability law in closed form.

    Attributes:
        name: for test ids.
        log_density: of one position, normalised.
        draw: (key, n) -> n independent positions, stacked on a leading axis.
        statistics: one position -> {name: number}.
        expected: their expectations.
        spread: E‖x − E x‖², the scale against which a move is large or small.
    """

    name: str
    log_density: Callable[[Any], Array]
    draw: Callable[[Array, int], Any]
    statistics: Callable[[Any], dict[str, Array]]
    expected: dict[str, float]
    spread: float

    def __repr__(self) -> str:
        return self.name


def evaluate(log_density: Callable[[Any], Array]) -> Target:
    """A target as kernels see it, from a log-density: one value-and-gradient an
    evaluation."""

    def target(position: Any) -> Evaluation:
        value, score = jax.value_and_grad(log_density)(position)
        return Evaluation(value, score)

    return target


def score_only(target: Target) -> Target:
    """The same density with its values withheld."""

    def scores(position: Any) -> Evaluation:
        score = target(position).score
        return Evaluation(None, score)

    return scores


def gaussian(dimension: int, variance: float) -> Law:
    """N(0, variance·I)."""

    def statistics(x: Array) -> dict[str, Array]:
        return {"mean": jnp.mean(x), "variance": jnp.mean(x**2)}

    return Law(
        f"gaussian{dimension}d",
        lambda x: jnp.sum(jax.scipy.stats.norm.logpdf(x, scale=variance**0.5)),
        lambda key, n: variance**0.5 * jax.random.normal(key, (n, dimension)),
        statistics,
        {"mean": 0.0, "variance": variance},
        dimension * variance,
    )


def two_modes(
    dimension: int,
    weights: tuple[float, float] = (0.3, 0.7),
    sds: tuple[float, float] = (0.5, 0.4),
    half_distance: float = 1.0,
) -> Law:
    """Two isotropic Gaussians of different weight and width at ∓half_distance on the
    diagonal.

    Statistics: mean and variance, the mass on the right, and of either side the mean
    square distance from its mode (within-mode sd; its expectation is taken off inside
    the side's indicator, so mass and sd are tested separately).
    """
    w = np.array(weights)
    s = np.array(sds)
    d = dimension
    side = np.array([-half_distance, half_distance])
    diagonal = np.full(d, d**-0.5)
    modes = side[:, None] * diagonal

    # Along the diagonal the law is a 1D mixture; across it, each component is N(0, s²)
    # in d − 1 dimensions.
    mass = np.array([w @ stats.norm.cdf(0, side, s), w @ stats.norm.sf(0, side, s)])

    def half(j: int, component: int) -> float:
        """∫ over side j of w·N(u; component)·[(u − mode_j)² + (d−1)s²]."""
        low, high = ((-np.inf, 0.0), (0.0, np.inf))[j]

        def integrand(u: float) -> float:
            square = (u - side[j]) ** 2 + (d - 1) * s[component] ** 2
            return square * stats.norm.pdf(u, side[component], s[component])

        return w[component] * integrate.quad(integrand, low, high)[0]

    within = [(half(j, 0) + half(j, 1)) / d / mass[j] for j in (0, 1)]
    mean = w @ side
    variance = w @ s**2 + (w @ side**2 - mean**2) / d

    def log_density(x: Array) -> Array:
        squares = jnp.sum((x - modes) ** 2, axis=-1)
        return jax.nn.logsumexp(
            jnp.log(w) - squares / (2 * s**2) - d * jnp.log(s * (2 * np.pi) ** 0.5)
        )

    def draw(key: Array, n: int) -> Array:
        key_mode, key_noise = jax.random.split(key)
        mode = (jax.random.uniform(key_mode, (n,)) < w[1]).astype(int)
        noise = jax.random.normal(key_noise, (n, d))
        return jnp.asarray(modes)[mode] + jnp.asarray(s)[mode][:, None] * noise

    def statistics(x: Array) -> dict[str, Array]:
        right = (x @ diagonal > 0).astype(float)
        distance = jnp.mean((x - modes) ** 2, axis=-1)
        return {
            "mean": x @ diagonal,
            "variance": jnp.mean((x - mean * diagonal) ** 2),
            "mode mass": right,
            "left sd": (1 - right) * (distance[0] - within[0]),
            "right sd": right * (distance[1] - within[1]),
            "covariance": d * jnp.mean(x - mean * diagonal) ** 2,
        }

    along = w @ (s**2 + side**2) - mean**2
    expected = {
        "mean": mean,
        "variance": variance,
        "mode mass": mass[1],
        "left sd": 0.0,
        "right sd": 0.0,
    }
    expected["covariance"] = along
    return Law(f"two_modes{d}d", log_density, draw, statistics, expected, d * variance)


NESTED = {"a": jnp.zeros(2), "b": {"c": jnp.zeros(()), "d": (jnp.zeros((2, 2)),)}}
"""A position with leaves of several shapes, one of them a scalar, two and three levels
deep."""


def nested(template: Any = NESTED) -> Law:
    """`two_modes` over the elements of a nested pytree."""
    flat, unravel = ravel_pytree(template)
    law = two_modes(flat.size)

    def flatten(position: Any) -> Array:
        return ravel_pytree(position)[0]

    return Law(
        "nested",
        lambda position: law.log_density(flatten(position)),
        lambda key, n: jax.vmap(unravel)(law.draw(key, n)),
        lambda position: law.statistics(flatten(position)),
        law.expected,
        law.spread,
    )


def product_of_normals(
    alpha: Any, sigma: Any, means: Any, sds: Any
) -> tuple[Any, Any, Any]:
    """Mean, variance and log Z of Π N(mᵢ, sᵢ²), each noised to α·X + σ·ε, by entries:
    factors are the leading axis."""
    means = float(alpha) * np.asarray(means)
    variances = (float(alpha) * np.asarray(sds)) ** 2 + float(sigma) ** 2
    variance = 1 / (1 / variances).sum(0)
    mean = variance * (means / variances).sum(0)
    at_zero = stats.norm.logpdf(0, means, np.sqrt(variances)).sum(0)
    return mean, variance, at_zero - stats.norm.logpdf(0, mean, np.sqrt(variance))


def network_outputs(
    x: Array, alpha: Any, sigma: Any, mean: Any, variance: float
) -> dict[str, Array]:
    """Outputs of exact networks of each parameterization for N(mean, variance·I),
    noised to x = α·X + σ·ε, and the "log_density"; energies up to a constant of the
    level."""
    total = alpha**2 * variance + sigma**2
    away = x - alpha * mean
    square = jnp.sum(away**2) / total
    log_density = -0.5 * square - 0.5 * x.size * jnp.log(2 * jnp.pi * total)
    clean = mean + alpha * variance / total * away
    noise = (x - alpha * clean) / sigma
    root = jnp.sqrt(sigma / total)
    return {
        "log_density": log_density,
        "score": -away / total,
        "x0": clean,
        "epsilon": noise,
        "v": (alpha * noise - sigma * clean) / jnp.sqrt(alpha**2 + sigma**2),
        "flow": noise - clean,
        "energy": -sigma * log_density,
        "energy_residual": x - root * away,  # ½‖x − out‖² = ½·σ·‖x − αμ‖²/total + const
        "energy_norm": root * away,
        "energy_inner": sigma / total * (0.5 * x - alpha * mean),
    }
