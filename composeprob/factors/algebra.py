"""Products, powers and mixtures of factors. They record their operands; the compiler
evaluates them.

Over data, one factor under n values of its conditions is kept as one, in a `Plate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from composeprob.arguments import check_count
from composeprob.errors import (
    CapabilityError,
    ConditionError,
    InvalidValueError,
    ShapeError,
    WrongTypeError,
    a_kind,
)
from composeprob.factors.categorical import CategoricalClassifier
from composeprob.factors.classifier import Classifier
from composeprob.factors.factor import Factor, LeafFactor, is_factor
from composeprob.factors.formula import Formula, check_heads
from composeprob.factors.nodes import (
    Mixture,
    Plate,
    Product,
    condition_names,
    leaves,
    rewrite_leaves,
)

Columns = dict[str, PyTree[Array]]
"""Values of conditions along a leading axis: arrays, or pytrees of them."""


class Weights(NamedTuple):
    """Weights of the components of a mixture.

    Attributes:
        logs: the log-weight of each component; −∞ where its share is 0.
        total: the sum of shares of normalised factors as they were given; None for raw
            multipliers.
    """

    logs: np.ndarray
    total: float | None


def product(
    *factors: Factor, over: Mapping[str, object] | None = None, block: int | None = None
) -> Factor:
    """The product Π_i f_i(x): "this AND that"; with ``over`` the product over data, Π_i
    f(x | c_i).

    At the levels above 0 it is the product of the noised factors, which is not the
    noised product; only level 0 is the promise, the levels above are the path that
    leads there. Exponents other than 1 may grow along it (`power`), and those of three
    or more learned factors, whose log f the chains of `SMC` carry: together these take
    the path of the power of one.

    Args:
        factors: at least one factor, all of one event shape.
        over: ``{condition: values}``, the values of n observations along a leading
            axis: the product then is Π_{i=1}^n of the factors with
            ``condition=values[i]``, from one batched evaluation of each network and
            compiled in a time that does not depend on n. A factor that has none of the
            conditions counts n times and is evaluated once. New values of the same
            shape reuse compiled code. In a `numpyro.plate` every copy of the site has
            all n observations; groups with data of their own are sites of a Python
            loop, evaluated in one batch all the same.
        block: how many of the n are evaluated at once, where memory does not hold n
            times the number of chains.

    Returns:
        A factor of the same event shape; with n = 1 the factor under its one
            observation.

    Raises:
        ShapeError: events of different shape; values without a leading axis, or of
            different lengths.
        WrongTypeError: an argument that is not a factor, such as a list of them;
            ``over`` that is not a dict.
        ConditionError: a condition that no factor has, or that was given before.
        InvalidValueError: no observation (n = 0), a ``block`` below 1 or without
            ``over``.

    Example:
        The posterior of all data from one network of single observations, p(x)·Π_i p(x
            | y_i)/p(x). With y = x + ε, ε ~ N(0, 1), x | y is N(y/2, 1/2):

        >>> import composeprob as cp, jax.numpy as jnp, numpyro.distributions as dist
        >>> schedule = cp.Schedule.log_snr(20)
        >>> prior = cp.Analytic(dist.Normal(0.0, 1.0), schedule)
        >>> def posterior(x, t, y):
        ...     variance = 1.0 / (1.0 + jnp.exp(-t))
        ...     return -(x - jnp.sqrt(variance) * y / 2) / (1.0 - variance / 2)
        >>> f = cp.Diffusion(
        ...     posterior,
        ...     schedule,
        ...     event_shape=(),
        ...     parameterization="score",
        ...     time="log_snr",
        ...     conditions=("y",),
        ... )
        >>> tall = prior * cp.product(f / prior, over={"y": jnp.linspace(0.0, 2.0, 90)})
        >>> density = cp.compile(cp.program(lambda tall: cp.sample("x", tall)), tall)
        >>> print(cp.product(f / prior, over={"y": jnp.ones(90)}))
        cp.product(posterior / Normal, over={'y': (90,)})
    """
    if len(factors) == 1 and isinstance(factors[0], Iterable):
        raise WrongTypeError(
            "cp.product takes factors one by one; got one "
            f"{type(factors[0]).__name__}.",
            fix="write cp.product(f, g), or cp.product(*factors) of a list.",
        )
    shape = common_shape("A product", factors)
    # All factors have the power 1; `power` makes a product of one factor.
    ones = (1.0,) * len(factors)
    combined = Product(factors=factors, numbers=ones, event_shape=shape)
    if over is None and block is None:
        return combined
    factor = factors[0] if len(factors) == 1 else combined
    columns, count = _columns("cp.product", factor, over, block)
    member, plate = _in_plate(factor, columns, count, block)
    # The product of one factor is the factor.
    if plate is None:
        return member
    return Product(
        factors=(member,), numbers=(1.0,) * count, event_shape=shape, plate=plate
    )


def power(factor: Factor, exponent: float) -> Factor:
    """f(x)^w, for any real w: w > 1 sharpens, 0 < w < 1 flattens, w < 0 divides ("but
    NOT that").

    That is level 0. Where log f is known with its constants and its modes' heights, as
    of closed forms, or carried by the chains of `SMC`, the exponent grows as noise
    falls: alone from 1, as w(1 + s)/(1 + w·s) with s = σ²/α² of the level less that of
    level 0, which is the exact path of a Gaussian of variance 1; that of a divisor, as
    in guidance or a negation, from 0.
    Elsewhere it is w at every level. ``print(density)`` shows which exponents grow.

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
            raise TypeError("text")  # float("2") would take it
        exponent = float(exponent)
    except Exception as error:
        raise WrongTypeError(
            "A power must be a number known before compilation; got "
            f"{type(exponent).__name__}.",
            fix="pass a float. A power that is a latent of the program would make the "
            "normaliser depend on it.",
        ) from error
    if not math.isfinite(exponent):
        raise InvalidValueError(
            f"A power must be finite; got {exponent}.", fix="pass a finite float."
        )
    return Product(
        factors=(factor,), numbers=(exponent,), event_shape=factor.event_shape
    )


def mixture(
    factors: Sequence[Factor] | Factor,
    weights: Sequence[float] | None = None,
    *,
    log_weights: Sequence[float] | None = None,
    over: Mapping[str, object] | None = None,
    block: int | None = None,
) -> Factor:
    """The mixture Σ_i w_i·f_i(x): "this OR that"; with ``over`` the mixture over data,
    Σ_i w_i·f(x | c_i).

    Args:
        factors: at least one factor, all of one event shape, each with an energy; with
            ``over`` the one factor f.
        weights: shares of the components, non-negative, normalised to sum to 1; equal
            when left out. They are shares only if every factor is normalised, as
            `Analytic` ones and those from `calibrate` are.
        log_weights: raw multipliers on a log scale, Σ_i exp(l_i)·f_i(x), for factors
            whose normalisers are unknown: the share of each component then depends on
            the factors' unknown constants.
        over, block: as for `product`; a weight for each of the n.

    Returns:
        A factor of the same event shape.

    Raises:
        WrongTypeError: factors that are not in a list, or an entry that is not a
            factor; ``over`` that is not a dict.
        CapabilityError: ``weights`` with factors that are not normalised, or a factor
            with no energy.
        InvalidValueError: weights that are negative, not finite, all zero, or not one
            per factor; and as for `product`.
        ShapeError: events of different shape; and as for `product`.
        ConditionError: as for `product`.

    Example:
        >>> import composeprob as cp, jax.numpy as jnp
        >>> schedule = cp.Schedule.log_snr(20)
        >>> def digit(x, t, label):
        ...     return 0.5 * jnp.sum((x - label) ** 2)
        >>> f = cp.Diffusion(
        ...     digit,
        ...     schedule,
        ...     event_shape=(2,),
        ...     parameterization="energy",
        ...     time="log_snr",
        ...     conditions=("label",),
        ... )
        >>> cp.mixture([f.given(label=0), f.given(label=1)], log_weights=[0.0, 0.0])
        mixture(digit(label=0), digit(label=1); equal log_weights)
        >>> cp.mixture(f, log_weights=jnp.zeros(10), over={"label": jnp.arange(10)})
        cp.mixture(digit, over={'label': (10,)}, equal log_weights)
    """
    if over is not None or block is not None:
        return _mixture_over_data(factors, weights, log_weights, over, block)
    if not isinstance(factors, Iterable):
        raise WrongTypeError(
            f"cp.mixture takes a list of factors; got {type(factors).__name__}.",
            fix="write cp.mixture([f, g], weights=[0.7, 0.3]).",
        )
    components = tuple(factors)
    shape = common_shape("A mixture", components)
    numbers = _weights(
        components,
        len(components),
        weights,
        log_weights,
        calibrated="cp.calibrate(factor, key)",
    )
    # Components without a share are left out.
    kept = np.flatnonzero(np.isfinite(numbers.logs))
    return _mixture(tuple(components[i] for i in kept), shape, numbers, kept)


def _mixture_over_data(
    factor: object,
    weights: object,
    log_weights: object,
    over: Mapping[str, object] | None,
    block: int | None,
) -> Factor:
    """Return the `mixture` of one factor over values of its conditions."""
    if not is_factor(factor):
        raise WrongTypeError(
            f"cp.mixture over data takes one factor; got {type(factor).__name__}.",
            fix='write cp.mixture(f, over={"label": labels}, weights=[…]).',
        )
    columns, count = _columns("cp.mixture", factor, over, block)
    shape = common_shape("A mixture over data", (factor,))
    given = f"f.given({next(iter(columns))}=v)"
    numbers = _weights(
        (factor,),
        count,
        weights,
        log_weights,
        calibrated=f"cp.mixture([cp.calibrate({given}, key) for v in values], "
        "weights=[…])",
    )
    kept = np.flatnonzero(np.isfinite(numbers.logs))
    # Values without a share are not evaluated.
    if len(kept) < count:
        columns = jax.tree.map(lambda column: column[kept], columns)
    member, plate = _in_plate(factor, columns, len(kept), block)
    # One normalised component is the factor itself; one with a raw multiplier is not.
    if plate is None and numbers.total is not None:
        return member
    return _mixture((member,), shape, numbers, kept, plate)


def _mixture(
    components: tuple[Factor, ...],
    shape: tuple[int, ...],
    weights: Weights,
    kept: np.ndarray,
    plate: Plate | None = None,
) -> Mixture:
    """Return the node for the components, with the weights at the indices ``kept``."""
    numbers = tuple(weights.logs[kept].tolist())
    node = Mixture(factors=components, numbers=numbers, event_shape=shape, plate=plate)
    if weights.total is None:
        return node
    return dataclasses.replace(node, calibrated=True, total=weights.total)


def guide(factor: Factor, scale: float, **conditions: object) -> Factor:
    """Classifier-free guidance, f(x | c)^s · f(x)^{1−s}.

    s = 1 is the conditional model, s > 1 sharpens it; the total power stays 1.
    Exponents grow as noise falls where they can (`power`): the noisiest level is then
    the conditional model's.

    Args:
        factor: a factor with conditions, able to run without them (dropout of the
            condition in training).
        scale: the guidance scale s.
        conditions: at least one of the factor's conditions.

    Raises:
        ConditionError: no condition, or one that the factor does not have.

    Example:
        >>> import composeprob as cp
        >>> cp.guide(cp.load("digits"), 2.0, label=3)
        digits(label=3) ** 2 / digits

    References:
        Ho & Salimans 2022, *Classifier-Free Diffusion Guidance* (their w is s − 1).
    """
    check_factors("Guidance", (factor,))
    if not conditions:
        names = sorted(condition_names(factor))
        if names:
            fix = f"pass one of the factor's conditions: {', '.join(names)}."
        else:
            fix = "this factor has none: build it with conditions=(…,)."
        raise ConditionError("guide needs a condition to be guided by.", fix=fix)
    return product(power(factor.given(**conditions), scale), power(factor, 1.0 - scale))


def condition(
    factor: Factor,
    classifier: Classifier | CategoricalClassifier | Mapping[str, Classifier],
    label: ArrayLike | str,
    scale: float = 1.0,
) -> Factor:
    r"""Classifier guidance, f(x)·p(label | x)^s, or f(x)·P(φ | x)^s for a Boolean
    formula φ over attributes.

    Under noise the attributes a_i count as independent given x_k, as their classifiers
    know no more. Then, by enumeration,

    $$P(\varphi \mid x_k) = \sum_{a \models \varphi} \prod_i p(a_i \mid x_k).$$

    Args:
        factor: the factor to guide.
        classifier: a noise-conditioned `Classifier` of events of the same shape; of a
            formula ``{name: classifier}``, each of two classes, of which class 1 is
            true, or with the label that is true, ``classifier.given(label=3)``. Labels
            of one classifier exclude each other.
        label: the class's index; or the formula, such as ``"red & (left | ~big)"``, of
            names, ``&``, ``|``, ``~`` and parentheses, with at most 2¹⁶ combinations of
            its attributes.
        scale: the guidance scale s; 1 is Bayes' rule.

    Raises:
        InvalidValueError: a formula with other syntax or names than these, shown with
            the place; one that nothing satisfies, or of too many combinations.

    Example:
        >>> import composeprob as cp
        >>> digits = cp.load("digits")
        >>> classifier = cp.load("digits-classifier")
        >>> cp.condition(digits, classifier, label=3, scale=8.0)
        digits * digits-classifier(label=3) ** 8
        >>> three, eight = (classifier.given(label=n) for n in (3, 8))
        >>> cp.condition(digits, {"three": three, "eight": eight}, "three | eight")
        digits * P(three | eight)

    References:
        Dhariwal & Nichol 2021, *Diffusion Models Beat GANs on Image Synthesis*, section
        4.
    """
    if isinstance(classifier, Mapping):
        check_heads(classifier)
        if not isinstance(label, str):
            raise WrongTypeError(
                "condition with several heads takes a formula of their names; got "
                f"{a_kind(label)}.",
                fix=f"for example {' & '.join(classifier)!r}.",
            )
        formula = Formula(classifier, label, factor.event_shape)
        return product(factor, power(formula, scale))
    if not isinstance(classifier, (Classifier, CategoricalClassifier)):
        raise WrongTypeError(
            f"condition takes a cp.Classifier; got {type(classifier).__name__}.",
            fix="wrap the network: cp.Classifier(network, schedule).",
        )
    over = classifier.over(factor.event_shape)
    likelihood = over.given(label=label)
    return product(factor, power(likelihood, scale))


def _weights(
    factors: Sequence[Factor],
    count: int,
    weights: object,
    log_weights: object,
    calibrated: str,
) -> Weights:
    """Return the weights of a mixture of ``count`` components.

    Refuse factors that cannot be mixed with them. ``calibrated`` is the code for
    components with known normalisers.
    """
    # log Σ_i w_i·f_i needs the heights of the f_i, which scores do not have.
    for factor in factors:
        for leaf in leaves(factor):
            if "energy" not in leaf.capabilities:
                raise CapabilityError(
                    "A mixture needs the log-density of its parts, but factor "
                    f"'{leaf.label}' offers only its score.",
                    fix="scores do not contain the heights of two modes: use a model "
                    "trained with an energy parameterization. Where the mixture is a "
                    "whole site, run each of its parts alone, for its share of the "
                    "chains.",
                )
    if log_weights is None:
        return _shares(factors, count, weights, calibrated)
    if weights is not None:
        raise InvalidValueError(
            "A mixture got both weights and log_weights.", fix="pass one of them."
        )
    raw = _numbers("log_weights", log_weights)
    if raw.shape != (count,) or not np.all(np.isfinite(raw)):
        raise InvalidValueError(
            f"log_weights must be {count} finite numbers, one per factor; got "
            f"{log_weights!r}.",
            fix="leave out a component whose share is 0.",
        )
    return Weights(raw, None)


def _shares(
    factors: Sequence[Factor], count: int, weights: object, calibrated: str
) -> Weights:
    """Return weights that are shares; refuse factors that are not normalised."""
    for factor in factors:
        if factor.normalised:
            continue
        inner = leaves(factor)
        is_leaf = inner == [factor]
        name = f"'{inner[0].label}'" if is_leaf else f"the part {factor}"
        raise CapabilityError(
            "Mixture weights are shares only of normalised densities, and the "
            f"normaliser of {name} is unknown.",
            fix=f"find it first: {calibrated}; or give raw multipliers with "
            "log_weights=[…] and accept that the shares follow from the unknown "
            "normalisers.",
        )
    shares = np.ones(count) if weights is None else _numbers("weights", weights)
    are_valid = shares.shape == (count,) and np.all(np.isfinite(shares))
    if not are_valid or np.any(shares < 0) or shares.sum() == 0:
        raise InvalidValueError(
            f"weights must be {count} non-negative finite numbers with a positive sum; "
            f"got {weights!r}.",
            fix="pass one share per factor; they are normalised to sum to 1.",
        )
    # Equal weights that were left out count as given with the sum 1.
    total = 1.0 if weights is None else float(shares.sum())
    logs = np.full(count, -math.inf)
    for i, share in enumerate(shares / shares.sum()):
        if share > 0:
            logs[i] = math.log(share)
    return Weights(logs, total)


def _numbers(what: str, values: object) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except Exception as error:  # array types raise errors of every kind here
        raise WrongTypeError(
            f"{what} must be numbers known before compilation; got "
            f"{type(values).__name__}.",
            fix="pass a list of floats; weights that are latents would make the "
            "normaliser depend on them.",
        ) from error


def check_factors(what: str, factors: tuple[object, ...]) -> None:
    """Refuse an empty combination, and anything but factors."""
    if not factors:
        raise InvalidValueError(
            f"{what} needs at least one factor; got none.",
            fix="pass the factors to combine.",
        )
    for factor in factors:
        if not is_factor(factor):
            raise WrongTypeError(
                f"{what} combines factors; got {type(factor).__name__}.",
                fix="wrap it: cp.Diffusion for a network, cp.Analytic for a "
                "distribution, cp.Energy for a function.",
            )


def common_shape(what: str, factors: tuple[Factor, ...]) -> tuple[int, ...]:
    """Return the event shape of the factors; refuse factors of different shapes."""
    check_factors(what, factors)
    for factor in factors:
        if factor.event_shape is None:
            raise ShapeError(
                f"{what} needs to know the event shape of '{factor.label}', which has "
                "none.",
                fix="use cp.condition(f, classifier, label), or pass event_shape= to "
                "cp.Classifier.",
            )
    shapes = {factor.event_shape for factor in factors}
    if len(shapes) > 1:
        listed = ", ".join(
            f"'{leaves(f)[0].label}' has {f.event_shape}" for f in factors
        )
        raise ShapeError(
            f"{what} needs factors over events of one shape; {listed}.",
            fix="use cp.window to let a factor act on a region of a larger event.",
        )
    return shapes.pop()


def _in_plate(
    factor: Factor, columns: Columns, count: int, block: int | None
) -> tuple[Factor, Plate | None]:
    """Return the factor with all values of its conditions, and their plate; with one
    value, the factor given that and no plate."""
    # Refuses conditions that would change a normaliser.
    first = factor.given(**_row(columns, 0))
    if count == 1:
        return first, None
    member = rewrite_leaves(factor, lambda leaf: _with_columns(leaf, columns, count))
    return member, Plate(tuple(columns), count, block)


def _with_columns(leaf: LeafFactor, columns: Columns, count: int) -> LeafFactor:
    """Return the leaf with all values of the conditions that it has, in the form that
    `given` takes."""
    columns_of_leaf = {
        name: column
        for name, column in columns.items()
        if name in leaf.traits.conditions
    }
    if not columns_of_leaf:
        return leaf
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(columns_of_leaf)):
        # Traced values cannot be encoded one by one; they are taken as arrays.
        first = leaf.given(**_row(columns_of_leaf, 0))
        values = {name: jnp.asarray(column) for name, column in columns_of_leaf.items()}
    else:
        # Values are encoded and checked now, also where a program is being traced.
        with jax.ensure_compile_time_eval():
            rows = [leaf.given(**_row(columns_of_leaf, i)) for i in range(count)]
            first = rows[0]
            values = {
                name: _stack(name, [row.fixed[name] for row in rows])
                for name in columns_of_leaf
            }
    return first.holding({**first.fixed, **values})


def _stack(name: str, rows: list[Array]) -> Array:
    shapes = {jnp.shape(row) for row in rows}
    if len(shapes) > 1:
        listed = ", ".join(map(str, sorted(shapes)))
        raise ShapeError(
            f"The values of condition {name!r} have the shapes {listed}.",
            fix="pass values of one shape: one network evaluates all of them as a "
            "batch.",
        )
    return jnp.asarray(np.stack([np.asarray(row) for row in rows]))


def _row(columns: Columns, i: int) -> Columns:
    return jax.tree.map(lambda column: column[i], columns)


def _columns(
    what: str, factor: Factor, values: object, block: int | None
) -> tuple[Columns, int]:
    """Return the values as arrays of one leading axis, and its length n; refuse values
    that are not data for this factor."""
    if values is None:
        raise InvalidValueError(
            f"{what} got a block but no data.",
            fix='pass over={"x": xs}, or leave block= out.',
        )
    if not isinstance(values, Mapping) or not values:
        got = type(values).__name__
        if isinstance(values, Mapping):
            got = f"an empty {got}"
        raise WrongTypeError(
            f"over must be a dict of conditions and their values; got {got}.",
            fix=f'write {what}(f, over={{"x": xs}}), where x is a condition of f.',
        )
    _check_names(what, factor, values)
    if block is not None:
        check_count(block, "block")
    columns = {name: _column(value) for name, value in values.items()}
    return columns, _common_length(what, columns)


def _check_names(what: str, factor: Factor, names: Iterable[str]) -> None:
    """Refuse names of conditions that no leaf of the factor has."""
    conditions = condition_names(factor)
    listed = ", ".join(map(repr, conditions)) or "none"
    for name in names:
        if name in conditions:
            continue
        if conditions:
            fix = f"use one of: {listed}."
        else:
            fix = "build the factor with conditions=(…,)."
        raise ConditionError(
            f"{what} over {name!r}: no factor of {factor!r} has that condition; their "
            f"conditions are: {listed}.",
            fix=fix,
        )


def _common_length(what: str, columns: Columns) -> int:
    """Return n, the length of the leading axis of all arrays; refuse values without
    one, and of different lengths."""
    lengths: dict[str, list[int]] = {}  # one entry, where they agree
    for name, column in columns.items():
        shapes = [jnp.shape(array) for array in jax.tree.leaves(column)]
        if not shapes or () in shapes:
            raise ShapeError(
                f"{what} over {name!r} needs values with a leading axis of "
                "observations; got a single number.",
                fix=f"give one value by f.given({name}=…), or pass an array of shape "
                "(n, …).",
            )
        lengths[name] = sorted({shape[0] for shape in shapes})
    all_lengths = set().union(*lengths.values())
    if len(all_lengths) > 1:
        listed = ", ".join(
            f"{name!r} has {' and '.join(map(str, lengths_of_column))}"
            for name, lengths_of_column in lengths.items()
        )
        raise ShapeError(
            f"{what} runs over values with leading axes of one length; {listed}.",
            fix="pass one value of each condition for each observation.",
        )
    count: int = all_lengths.pop()
    if count == 0:
        raise InvalidValueError(
            f"{what} over {', '.join(map(repr, columns))} has no values: n = 0.",
            fix="pass at least one observation; without any, leave the factor out.",
        )
    return count


def _column(value: object) -> PyTree[Array]:
    """Return values that can be indexed along one leading axis: lists as arrays, of
    objects (such as texts) if need be."""
    if isinstance(value, list | tuple):
        try:
            return jnp.asarray(value)
        except (TypeError, ValueError):
            # Texts, or values of different shapes: `given` encodes one at a time.
            column = np.empty(len(value), object)
            column[:] = value
            return column

    def as_array(leaf: object) -> object:
        return leaf if isinstance(leaf, jax.core.Tracer) else np.asarray(leaf)

    return jax.tree.map(as_array, value)
