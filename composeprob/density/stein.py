r"""Stein's identity of samples under a density: moments that its score contradicts.

For x ~ π and any field g that grows slowly, integration by parts gives

$$E_\pi[\psi_g] = 0, \qquad \psi_g(x) = \nabla\cdot g(x) + g(x)\cdot\nabla\log\pi(x),$$

of which $E[\nabla\log\pi] = 0$ and $E[(x - c)\cdot\nabla\log\pi] = -d$ are two. It
holds whatever the normaliser of π, and needs no other samples. So it shows samples that
are not those of π, whichever sampler made them; but not wrong proportions of separated
modes, under which each mode still satisfies it.

A significant mean of $\psi_g$ need not matter: two narrow modes may be a hundredth too
wide. So these functions serve as control variates (Assaraf and Caffarel 1999; Mira,
Solgi and Imparato 2013). The least-squares fit $f \approx a + b\cdot\psi$ of a
number's mean or square over the samples has the two estimates $\bar f$ and
$\bar f - b\cdot\bar\psi$ of the same expectation under π. Their difference
$b\cdot\bar\psi$ varies less than $\bar f$ does. Where it exceeds the standard error of
$\bar f$ by far, the samples contradict π in a moment that is reported. For a Gaussian π
the second estimate is exact, and the difference is the error itself.

References:
    Stein 1972, *A bound for the error in the normal approximation*. Assaraf and
    Caffarel 1999, *Zero-variance principle for Monte Carlo algorithms*. Mira, Solgi and
    Imparato 2013, *Zero variance Markov chain Monte Carlo for Bayesian estimators*.
    Gorham and Mackey 2015, *Measuring sample quality with Stein's method*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from composeprob import tuning

Points = Float[np.ndarray, "n d"]


class Departure(NamedTuple):
    """The moment of samples that Stein's identity contradicts most.

    Attributes:
        entry: its number of the positions.
        square: whether it is the mean square about the samples' centre, not the mean.
        shift: by how much the identity changes it, in standard deviations, or as a
            share of the mean square.
        errors: the same in standard errors of the moment.
        chance: an upper bound on the probability that samples of π show as much.
    """

    entry: int
    square: bool
    shift: float
    errors: float
    chance: float

    @property
    def significant(self) -> bool:
        """True if samples of π would hardly ever show as much."""
        return self.chance < tuning.STEIN.by_chance


class _Samples(NamedTuple):
    """Samples in units of their standard deviations, about their mean."""

    points: Points
    scores: Points
    weights: Float[np.ndarray, " n"]
    ancestors: Int[np.ndarray, " n"]
    worth: float  # effective number of ancestors

    def centred(self, values: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        """Values less their weighted mean."""
        return values - self.weights @ values

    def errors(self, centred: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " k"]:
        """Standard errors of the means of values, by the genealogy."""
        totals = np.zeros((int(self.ancestors.max()) + 1, centred.shape[1]))
        np.add.at(totals, self.ancestors, self.weights[:, None] * centred)
        return np.sqrt((totals**2).sum(0))


def departure(
    points: Points,
    scores: Points,
    weights: Float[np.ndarray, " n"],
    ancestors: Int[np.ndarray, " n"],
) -> Departure | None:
    r"""Return the moment that Stein's identity contradicts most; None where it says
    nothing.

    The moments are the mean and the mean square of each number. A number whose scores
    rest on few samples, as those of a box whose walls are thinner than the samples are
    dense, is left out.

    Args:
        points: samples, in coordinates in which π has a density and no boundary.
        scores: ∇ log π there, in the same coordinates.
        weights: of the samples, normalised.
        ancestors: of the samples, 0 … E − 1; samples of different ancestors are
            independent.
    """
    scores = np.asarray(scores, np.float64)
    points = np.asarray(points, np.float64)
    if not (np.isfinite(points).all() and np.isfinite(scores).all()):
        return None
    worth = 1.0 / float(np.sum(np.bincount(ancestors, weights) ** 2))
    centre = weights @ points
    width = np.sqrt(weights @ (points - centre) ** 2)
    asked = np.flatnonzero(_supported(scores, weights, worth) & (width > 0))
    if not len(asked) or worth < tuning.STEIN.fewest:
        return None
    width = width[asked]
    standard = _Samples(
        points=(points[:, asked] - centre[asked]) / width,
        scores=scores[:, asked] * width,
        weights=weights,
        ancestors=ancestors,
        worth=worth,
    )
    return _largest(standard, asked)


def _supported(
    scores: Points, weights: Float[np.ndarray, " n"], worth: float
) -> Bool[np.ndarray, " d"]:
    """Mark numbers whose squared scores rest on enough samples, (Σs²)²/Σs⁴.

    Where few samples carry them a mean of scores says nothing: the walls of a box,
    which make its mean 0, are sampled once in N, or not at all.
    """
    limits = tuning.STEIN
    return carried_by(scores, weights) >= max(limits.carried * worth, limits.fewest)


def carried_by(
    scores: Points, weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " d"]:
    r"""Return the effective number of samples that carry the mean square of each
    number's score, $(\sum_i w_i s_i^2)^2 / \sum_i w_i^2 s_i^4$: n/3 of a Gaussian."""
    squares = scores**2
    fourth = weights**2 @ squares**2
    carried: Float[np.ndarray, " d"]
    carried = (weights @ squares) ** 2 / np.maximum(fourth, 1e-300)
    return carried


def _largest(samples: _Samples, asked: Int[np.ndarray, " entries"]) -> Departure:
    """Compare both estimates of every moment."""
    number = samples.points.shape[1]
    moments = samples.centred(np.hstack([samples.points, samples.points**2]))
    shifts, controls, directions = _controlled(samples, moments)
    errors = np.maximum(samples.errors(moments), samples.errors(controls))
    # Samples that are too narrow state too small errors: those of the widths that the
    # identity implies count.
    implied = np.maximum(1 - shifts[number:], 1.0)
    errors = errors * np.concatenate([np.sqrt(implied), implied])
    ratios = np.abs(shifts) / np.maximum(errors, 1e-30)
    free = samples.worth - directions - 1
    chances = bounds_on_chance(ratios, controls, samples.weights, free)
    most = int(np.argmin(chances))
    return Departure(
        entry=int(asked[most % number]),
        square=most >= number,
        shift=float(-shifts[most]),
        errors=float(ratios[most]),
        chance=float(min(chances[most], 1.0)),
    )


def bounds_on_chance(
    ratios: Float[np.ndarray, " k"],
    values: Float[np.ndarray, "n k"],
    weights: Float[np.ndarray, " n"],
    free: float,
) -> Float[np.ndarray, " k"]:
    """Return Bonferroni's bounds on the chances that means of ``values`` are so many
    standard errors from 0, by Student's t.

    Heavy tails of what is averaged leave fewer degrees of freedom to its variance than
    the ``free`` ones of a normal.
    """
    from scipy.special import stdtr

    variance = weights @ values**2
    kurtosis = weights @ values**4 / np.maximum(variance**2, 1e-300)
    degrees = np.maximum(2 * max(free, 1.0) / np.maximum(kurtosis - 1, 2.0), 1.0)
    bounds: Float[np.ndarray, " k"] = 2 * len(ratios) * stdtr(degrees, -ratios)
    return bounds


class _Controlled(NamedTuple):
    """Control variates of moments."""

    shifts: Float[np.ndarray, " k"]  # b·ψ̄
    controls: Float[np.ndarray, "n k"]  # b·(ψ − ψ̄)
    directions: int  # number of functions that were fitted


def _controlled(samples: _Samples, moments: Float[np.ndarray, "n k"]) -> _Controlled:
    """Fit the control variates: jointly, where the samples are many enough, or else of
    each number alone."""
    functions = _functions(samples)
    if functions is None:
        return _each_alone(samples, moments)
    scale = np.sqrt(samples.weights @ samples.centred(functions) ** 2)
    functions = functions / np.where(scale > 0, scale, 1.0)
    # Each half of the ancestors has the coefficients of the other half: those of its
    # own would fit what chance has made of the few samples of a light mode.
    controls = np.zeros_like(moments)
    directions = 0
    for half in (0, 1):
        mine = samples.ancestors % 2 == half
        loadings, fitted = _fitted(
            functions[~mine], moments[~mine], samples.weights[~mine]
        )
        controls[mine] = functions[mine] @ loadings
        directions = max(directions, fitted)
    return _Controlled(
        samples.weights @ controls, samples.centred(controls), directions
    )


def _fitted(
    functions: Float[np.ndarray, "m q"],
    moments: Float[np.ndarray, "m k"],
    weights: Float[np.ndarray, " m"],
) -> tuple[Float[np.ndarray, "q k"], int]:
    """Return the coefficients of moments by least squares on centred functions, and the
    number of directions that these have."""
    weights = weights / weights.sum()
    roots = np.sqrt(weights)[:, None]
    centred = roots * (functions - weights @ functions)
    basis, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    kept = sizes > 1e-4 * sizes[0]
    moments = roots * (moments - weights @ moments)
    loadings = (axes[kept].T / sizes[kept]) @ (basis[:, kept].T @ moments)
    return loadings, int(kept.sum())


def _functions(samples: _Samples) -> Float[np.ndarray, "n k"] | None:
    """Functions ψ of the richest family that the samples support: of g = e_k, x_i·e_k
    and x_i·x_j·e_k, of the first two, or of e_k and x_k·e_k; None where they are too
    few for these.

    Quadratic fields follow a bent ridge, along which linear ones are all but noise.
    """
    limits = tuning.STEIN
    x = samples.points
    s = samples.scores
    n, d = x.shape
    most = min(samples.worth / limits.samples, limits.most)
    linear = d + d * d
    if linear > most:
        if 2 * d > most:
            return None
        return np.hstack([s, 1 + x * s])
    functions = [s, (x[:, :, None] * s[:, None, :] + np.eye(d)).reshape(n, -1)]
    if linear + d * d * (d + 1) // 2 <= most:
        i, j = np.triu_indices(d)
        products = (x[:, i] * x[:, j])[:, :, None] * s[:, None, :]
        slopes = np.eye(d)[i] * x[:, j, None] + np.eye(d)[j] * x[:, i, None]
        functions.append((products + slopes).reshape(n, -1))
    return np.hstack(functions)


def _each_alone(samples: _Samples, moments: Float[np.ndarray, "n k"]) -> _Controlled:
    """Control variates e_k and x_k·e_k of the moments of each number alone."""
    w = samples.weights[:, None]
    x = samples.points
    first = samples.scores
    second = 1 + x * samples.scores
    means = np.stack([samples.weights @ first, samples.weights @ second])
    first = first - means[0]
    second = second - means[1]
    # Normal equations of two unknowns, in units of both functions' variance.
    units = np.stack([np.sqrt((w * f**2).sum(0)) for f in (first, second)])
    units = np.where(units > 0, units, 1.0)
    first = first / units[0]
    second = second / units[1]
    means = means / units
    cross = (w * first * second).sum(0)
    determinant = np.maximum(1 - cross**2, 1e-6)
    shifts = []
    controls = []
    for of_moment in np.split(moments, 2, axis=1):
        a = (w * first * of_moment).sum(0)
        b = (w * second * of_moment).sum(0)
        on_first = (a - cross * b) / determinant
        on_second = (b - cross * a) / determinant
        shifts.append(on_first * means[0] + on_second * means[1])
        controls.append(on_first * first + on_second * second)
    return _Controlled(np.concatenate(shifts), np.hstack(controls), 2)


def has_edges(
    log_density: Callable[[Points], tuple[np.ndarray, np.ndarray]],
    points: Points,
    scores: Points,
    entry: int,
) -> bool:
    r"""Return whether π ends or jumps near the samples, where Stein's identity has
    boundary terms.

    Samples move by a fraction of the width that their scores imply, and log π changes
    by the trapezoidal rule of its gradient, which is exact where log π is a parabola:
    more than half a nat beside that is an edge.

    Args:
        log_density: the part of log π that has a value, and its gradient, at points,
            ((n,), (n, d)); −∞ where π is 0.
        points: samples, (n, d).
        scores: ∇ log π there.
        entry: the number that moves alone where points have many.
    """
    limits = tuning.STEIN
    rng = np.random.default_rng(0)
    with np.errstate(divide="ignore"):
        local = 1 / np.median(np.abs(scores), axis=0)
    step = limits.step * np.minimum(points.std(0), local)
    # Few samples move several times, so that enough moves meet an edge.
    points = np.tile(points, (-(-limits.moves // len(points)), 1))
    n, d = points.shape
    moves = step * rng.standard_normal((n, d))
    if d > limits.together:
        moves[:, np.arange(d) != entry] = 0.0
    here, gradient_here = log_density(points)
    there, gradient_there = log_density(points + moves)
    with np.errstate(invalid="ignore"):
        expected = 0.5 * ((gradient_here + gradient_there) * moves).sum(1)
        smooth = np.abs(there - here - expected) <= limits.jump
    ends = np.isneginf(there) & np.isfinite(here)
    return bool(ends.any() or np.mean(~smooth) > limits.edges)
