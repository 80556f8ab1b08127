"""Guidance: conditions with a strength, expressed in the algebra."""

from __future__ import annotations

from numpy.typing import ArrayLike

from composeprob.errors import ConditionError, WrongTypeError
from composeprob.factors.algebra import check_factors, leaves, power, product
from composeprob.factors.base import Factor
from composeprob.factors.classifier import Classifier


def guide(factor: Factor, scale: float, **conditions: object) -> Factor:
    """Classifier-free guidance, f(x | c)^s · f(x)^{1−s}.

    s = 1 is the conditional model, s > 1 sharpens it; the total power stays 1. Exponents grow as noise falls where they
    can (`power`): the noisiest level is then the conditional model's.

    Args:
        factor: a factor with conditions, able to run without them (dropout of the condition in training).
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
        names = sorted({name for leaf in leaves(factor) for name in leaf.traits.conditions})
        raise ConditionError(
            "guide needs a condition to be guided by.",
            fix=f"pass one of the factor's conditions: {', '.join(names)}."
            if names
            else "this factor has none: build it with conditions=(…,).",
        )
    return product(power(factor.given(**conditions), scale), power(factor, 1.0 - scale))


def condition(factor: Factor, classifier: Classifier, label: ArrayLike, scale: float = 1.0) -> Factor:
    """Classifier guidance, f(x)·p(label | x)^s.

    Args:
        factor: what is guided.
        classifier: a noise-conditioned `Classifier` of events of the same shape.
        label: the class's index.
        scale: the guidance scale s; 1 is Bayes' rule.

    Example:
        >>> import composeprob as cp
        >>> cp.condition(cp.load("digits"), cp.load("digits-classifier"), label=3, scale=8.0)
        digits * digits-classifier(label=3) ** 8

    References:
        Dhariwal & Nichol 2021, *Diffusion Models Beat GANs on Image Synthesis*, section 4.
    """
    if not isinstance(classifier, Classifier):
        raise WrongTypeError(
            f"condition takes a cp.Classifier; got {type(classifier).__name__}.",
            fix="wrap the network: cp.Classifier(network, schedule).",
        )
    return product(factor, power(classifier.over(factor.event_shape).given(label=label), scale))
