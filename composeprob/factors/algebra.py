"""Makes products, powers and mixtures of factors. They record what is combined; the compiler evaluates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from composeprob.errors import CapabilityError, InvalidValueError, ShapeError, WrongTypeError
from composeprob.factors.base import Factor, is_factor
from composeprob.factors.nodes import Mixture, Product, leaves


def product(*factors: Factor, over: Mapping[str, object] | None = None, block: int | None = None) -> Factor:
    """The product Π_i f_i(x): "this AND that"; with ``over`` the product over data, Π_i f(x | c_i).

    At the levels above 0 it is the product of the noised factors, which is not the noised product; only level 0 is
    the promise, the levels above are the path that leads there. Exponents other than 1 may grow along it (`power`).

    Args:
        factors: at least one factor, all of one event shape.
        over: ``{condition: values}``, the values of n observations along a leading axis: the product then is
            Π_{i=1}^n of the factors with ``condition=values[i]``, from one batched evaluation of each network and
            compiled in a time that does not depend on n. A factor that has none of the conditions counts n times and
            is evaluated once. New values of the same shape reuse compiled code. In a `numpyro.plate` every copy of the
            site has all n observations; groups with data of their own are sites of a Python loop, evaluated in one
            batch all the same.
        block: how many of the n are evaluated at once, where memory does not hold n times the number of chains.

    Returns:
        A factor of the same event shape; with n = 1 the factor under its one observation.

    Raises:
        ShapeError: events of different shape; values without a leading axis, or of different lengths.
        WrongTypeError: something that is no factor, such as a list of them; ``over`` that is no dict.
        ConditionError: a condition that no factor has, or that was given before.
        InvalidValueError: no observation (n = 0), a ``block`` below 1 or without ``over``.

    Example:
        The posterior of all data from one network of single observations, p(x)·Π_i p(x | y_i)/p(x):

        >>> import composeprob as cp, jax.numpy as jnp, numpyro.distributions as dist
        >>> schedule = cp.Schedule.log_snr(20)
        >>> prior = cp.Analytic(dist.Normal(0.0, 1.0), schedule)
        >>> def posterior(x, t, y):  # y = x + ε with noise ε of variance 1: x | y is N(y/2, 1/2)
        ...     variance = 1.0 / (1.0 + jnp.exp(-t))
        ...     return -(x - jnp.sqrt(variance) * y / 2) / (1.0 - variance / 2)
        >>> f = cp.Diffusion(
        ...     posterior, schedule, event_shape=(), parameterization="score", time="log_snr", conditions=("y",)
        ... )
        >>> tall = prior * cp.product(f / prior, over={"y": jnp.linspace(0.0, 2.0, 90)})
        >>> density = cp.compile(cp.program(lambda tall: cp.sample("x", tall)), tall)
        >>> print(cp.product(f / prior, over={"y": jnp.ones(90)}))
        cp.product(posterior / Normal, over={'y': (90,)})
    """
    if len(factors) == 1 and isinstance(factors[0], Iterable):
        raise WrongTypeError(
            f"cp.product takes factors one by one; got one {type(factors[0]).__name__}.",
            fix="write cp.product(f, g), or cp.product(*factors) of a list.",
        )
    shape = common_shape("A product", factors)
    whole = Product(factors=factors, numbers=(1.0,) * len(factors), event_shape=shape)
    if over is None and block is None:
        return whole
    from composeprob.factors.over import product_over

    return product_over(factors[0] if len(factors) == 1 else whole, over, block)


def power(factor: Factor, exponent: float) -> Factor:
    """f(x)^w, for any real w: w > 1 sharpens, 0 < w < 1 flattens, w < 0 divides ("but NOT that").

    That is level 0. Where log f is known with its constants and its modes' heights, as of closed forms, the exponent
    grows as noise falls: alone from 1, as w(1 + s)/(1 + w·s) with s = σ²/α² of the level less that of level 0, which is
    the exact path of a Gaussian of variance 1; of what divides, as in guidance or a negation, from 0. Elsewhere it is w
    at every level. ``print(density)`` shows which exponents grow.

    Raises:
        InvalidValueError: w is NaN or infinite.

    Example:
        >>> import composeprob as cp
        >>> cp.load("ring2d") * cp.power(cp.load("bar2d"), 0.5)
        ring2d * bar2d ** 0.5
    """
    check_factors("A power", (factor,))
    try:
        if isinstance(exponent, (str, bytes)):
            raise TypeError("text")
        exponent = float(exponent)
    except Exception as error:
        raise WrongTypeError(
            f"A power must be a number known before compilation; got {type(exponent).__name__}.",
            fix="pass a float. A power that is a latent of the program would make the normaliser depend on it.",
        ) from error
    if not math.isfinite(exponent):
        raise InvalidValueError(f"A power must be finite; got {exponent}.", fix="pass a finite float.")
    return Product(factors=(factor,), numbers=(exponent,), event_shape=factor.event_shape)


def mixture(
    factors: Sequence[Factor] | Factor,
    weights: Sequence[float] | None = None,
    *,
    log_weights: Sequence[float] | None = None,
    over: Mapping[str, object] | None = None,
    block: int | None = None,
) -> Factor:
    """The mixture Σ_i w_i·f_i(x): "this OR that"; with ``over`` the mixture over data, Σ_i w_i·f(x | c_i).

    Args:
        factors: at least one factor, all of one event shape, each with an energy; with ``over`` the one factor f.
        weights: shares of the components, non-negative, normalised to sum to 1; equal when left out. They mean
            shares only if every factor is normalised, as `Analytic` ones and those from `calibrate` are.
        log_weights: raw multipliers on a log scale, Σ_i exp(l_i)·f_i(x), for factors whose normalisers are unknown:
            what share each component gets then depends on the factors' unknown constants.
        over, block: as for `product`; a weight for each of the n.

    Returns:
        A factor of the same event shape.

    Raises:
        WrongTypeError: factors that are not in a list, or something that is no factor; ``over`` that is no dict.
        CapabilityError: ``weights`` with factors that are not normalised, or a factor with no energy.
        InvalidValueError: weights that are negative, not finite, all zero, or not one per factor; and as for `product`.
        ShapeError: events of different shape; and as for `product`.
        ConditionError: as for `product`.

    Example:
        >>> import composeprob as cp, jax.numpy as jnp
        >>> schedule = cp.Schedule.log_snr(20)
        >>> def digit(x, t, label):
        ...     return 0.5 * jnp.sum((x - label) ** 2)
        >>> f = cp.Diffusion(
        ...     digit, schedule, event_shape=(2,), parameterization="energy", time="log_snr", conditions=("label",)
        ... )
        >>> cp.mixture([f.given(label=0), f.given(label=1)], log_weights=[0.0, 0.0])
        mixture(digit(label=0), digit(label=1); equal log_weights)
        >>> cp.mixture(f, log_weights=jnp.zeros(10), over={"label": jnp.arange(10)})
        cp.mixture(digit, over={'label': (10,)}, equal log_weights)
    """
    if over is not None or block is not None:
        from composeprob.factors.over import mixture_over

        return mixture_over(factors, over, block, weights, log_weights)
    if not isinstance(factors, Iterable):
        raise WrongTypeError(
            f"cp.mixture takes a list of factors; got {type(factors).__name__}.",
            fix="write cp.mixture([f, g], weights=[0.7, 0.3]).",
        )
    factors = tuple(factors)
    shape = common_shape("A mixture", factors)
    shares = shares_of(factors, len(factors), weights, log_weights, "cp.calibrate(factor, key)")
    kept = [(f, w) for f, w in zip(factors, shares.log_weights, strict=True) if w > -math.inf]
    return Mixture(
        factors=tuple(f for f, _ in kept),
        numbers=tuple(w for _, w in kept),
        event_shape=shape,
        calibrated=shares.calibrated,
        total=shares.total,
    )


class Shares(NamedTuple):
    """The weights of a mixture: a log-weight for each part (−∞ for none), whether they are shares of normalised factors
    (``weights=``) and not raw multipliers, and what shares summed to as they were given."""

    log_weights: tuple[float, ...]
    calibrated: bool
    total: float


def shares_of(factors: Sequence[Factor], count: int, weights: object, log_weights: object, calibrated: str) -> Shares:
    """The weights of a mixture of ``count`` parts, which are made of ``factors``; refuses what cannot be mixed so.
    ``calibrated`` is how to write the parts with known normalisers."""
    for factor in factors:
        for leaf in leaves(factor):
            if "energy" not in leaf.capabilities:
                raise CapabilityError(
                    f"A mixture needs the log-density of its parts, but factor '{leaf.label}' offers only its score.",
                    fix="scores do not contain the heights of two modes: use a model trained with an energy "
                    "parameterization. Where the mixture is a whole site, run each of its parts alone, for its share "
                    "of the chains.",
                )
    if log_weights is not None:
        if weights is not None:
            raise InvalidValueError("A mixture got both weights and log_weights.", fix="pass one of them.")
        raw = _numbers("log_weights", log_weights)
        if raw.shape != (count,) or not np.all(np.isfinite(raw)):
            raise InvalidValueError(
                f"log_weights must be {count} finite numbers, one per factor; got {log_weights!r}.",
                fix="leave out a component whose share is 0.",
            )
        return Shares(tuple(raw.tolist()), False, 1.0)
    for factor in factors:
        if not factor.normalised:
            parts = leaves(factor)
            what = f"'{parts[0].label}'" if parts == [factor] else f"the part {factor}"
            raise CapabilityError(
                f"Mixture weights are shares only of normalised densities, and the normaliser of {what} is unknown.",
                fix=f"find it first: {calibrated}; or give raw multipliers with log_weights=[…] and accept that the "
                "shares follow from the unknown normalisers.",
            )
    given = np.ones(count) if weights is None else _numbers("weights", weights)
    if given.shape != (count,) or not np.all(np.isfinite(given)) or np.any(given < 0) or given.sum() == 0:
        raise InvalidValueError(
            f"weights must be {count} non-negative finite numbers with a positive sum; got {weights!r}.",
            fix="pass one share per factor; they are normalised to sum to 1.",
        )
    logs = tuple(math.log(w) if w > 0 else -math.inf for w in given / given.sum())
    return Shares(logs, True, 1.0 if weights is None else float(given.sum()))


def _numbers(what: str, values: object) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except Exception as error:  # array types raise errors of every kind here
        raise WrongTypeError(
            f"{what} must be numbers known before compilation; got {type(values).__name__}.",
            fix="pass a list of floats; weights that are latents would make the normaliser depend on them.",
        ) from error


def check_factors(what: str, factors: tuple[object, ...]) -> None:
    """Refuse what is no factor, and to combine none."""
    if not factors:
        raise InvalidValueError(f"{what} needs at least one factor; got none.", fix="pass the factors to combine.")
    for factor in factors:
        if not is_factor(factor):
            raise WrongTypeError(
                f"{what} combines factors; got {type(factor).__name__}.",
                fix="wrap it: cp.Diffusion for a network, cp.Analytic for a distribution, cp.Energy for a function.",
            )


def common_shape(what: str, factors: tuple[Factor, ...]) -> tuple[int, ...]:
    """The shape of the events of all of these factors; refuses factors over others."""
    check_factors(what, factors)
    for factor in factors:
        if factor.event_shape is None:
            raise ShapeError(
                f"{what} needs to know the event shape of '{factor.label}', which has none.",
                fix="use cp.condition(f, classifier, label), or pass event_shape= to cp.Classifier.",
            )
    shapes = {factor.event_shape for factor in factors}
    if len(shapes) > 1:
        found = ", ".join(f"'{leaves(f)[0].label}' has {f.event_shape}" for f in factors)
        raise ShapeError(
            f"{what} needs factors over events of one shape; {found}.",
            fix="use cp.window to let a factor act on a region of a larger event.",
        )
    return shapes.pop()
