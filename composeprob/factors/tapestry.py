"""Windows that overlap, with every entry of the canvas counted once."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np

from composeprob.errors import CapabilityError, WrongTypeError
from composeprob.factors.algebra import common_shape
from composeprob.factors.base import Factor
from composeprob.factors.calibrated import Calibrated
from composeprob.factors.diffusion import WEIGHTS, Diffusion
from composeprob.factors.nodes import SETS, Product
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells, Window


def tapestry(*windows: Factor) -> Factor:
    """The product of windows on one canvas, in which every entry of the canvas counts once however many overlap there.

    Where n windows see an entry of the canvas, its weight is 1/n in each: an energy that is a sum over entries,
    log f(x) = −Σ_i E_i(x)/σ, becomes −Σ_i m_i·E_i(x)/σ, and the score of a score-only model m·∇log f, the average of
    the windows' scores. An averaged entry of a window with ``scale`` > 1 has the mean of the weights of what it
    averages; a scalar that a network returns beside its array is added whole. At the noisiest level the canvas then is
    N(0, σ²I) wherever windows of scale 1 lie. In a plain product of windows overlaps count twice, and images there are
    sharper than the model's.

    The energy keeps its gradient, so MALA and HMC are exact for it; weighted scores are no gradient field. Neither is a
    noised marginal, so there are no Feynman–Kac weights.

    Args:
        windows: made by `window`, boxes or cells, of diffusion models, their products, powers and guidance.

    Returns:
        A factor over the canvas. A window of scale s leaves the differences within its blocks free: where no other
        window lies, multiply a factor over the canvas for them.

    Raises:
        WrongTypeError: something that is no window.
        ShapeError: canvases of different shape.
        CapabilityError: a model with a scalar energy, which is no sum over entries, or no diffusion model.

    References:
        Du et al. 2023, section 5.4, and Bar-Tal et al. 2023, *MultiDiffusion*, average scores so; for energies it is a
        composite likelihood with weights (Varin, Reid and Firth 2011).

    Example:
        >>> import composeprob as cp
        >>> scenes = cp.load("shapes-position")
        >>> canvas = (32, 48, 3)
        >>> left, right = cp.window(scenes, canvas, (0, 0)), cp.window(scenes, canvas, (0, 16))
        >>> cp.tapestry(left, right).event_shape
        (32, 48, 3)
    """
    for factor in windows:
        if not isinstance(factor, Window):
            raise WrongTypeError(
                f"A tapestry is made of windows; got {type(factor).__name__}.",
                fix="cp.window(factor, canvas_shape, offset); multiply factors over the whole canvas with its result.",
            )
    canvas = common_shape("A tapestry", windows)
    count: np.ndarray = np.zeros(canvas, np.float32)
    for window in cast("tuple[Window, ...]", windows):
        np.add.at(count.reshape(-1), window.entries, 1)
    weights = 1 / np.maximum(count, 1)
    return Product(
        factors=tuple(_weigh(factor, weights) for factor in windows), numbers=(1.0,) * len(windows), event_shape=canvas
    )


def _weigh(factor: Factor, weights: np.ndarray) -> Factor:
    """The same expression, the entries of its events weighed."""
    return weighed.rule_for(factor)(factor, weights)


def _refuse(factor: Factor, weights: np.ndarray) -> Factor:
    label = getattr(factor, "label", None)
    what = f"a {type(factor).__name__.lower()}" if label is None else f"'{label}'"
    raise CapabilityError(
        f"A tapestry weighs the entries of what its windows show, and {what} is not a sum over entries.",
        fix="use diffusion models of the energy_residual form, or score-only ones, and their products and powers; "
        "multiply anything else with the tapestry: cp.tapestry(…) * cp.window(f, canvas_shape, offset).",
    )


weighed = Pass[Factor]("weighed", _refuse)
"""Rules (factor, weights) for the same expression with the entries of its events weighed."""


@weighed.rule(Window)
def _window(window: Window, weights: np.ndarray) -> Factor:
    event, region = window.factor.event_shape, window.region
    lead = weights.shape[: weights.ndim - len(window.event_shape)]  # axes of sets of cells
    if isinstance(region, Cells):
        inner = weights.reshape(*lead, -1)[..., window.entries]
        inner = inner.reshape(*inner.shape[:-1], *event)
    else:
        pairs = zip(event, region.block, strict=True)
        blocks = weights[(slice(None),) * len(lead) + region.slices]
        blocks = blocks.reshape([*lead, *(n for pair in pairs for n in pair)])
        inner = blocks.mean(axis=tuple(range(len(lead) + 1, blocks.ndim, 2)))
    plate = window.plate and dataclasses.replace(window.plate, names=(SETS, WEIGHTS))
    return dataclasses.replace(window, factor=_weigh(window.factor, inner), plate=plate)


@weighed.rule(Product)
def _product(product: Product, weights: np.ndarray) -> Factor:
    return product.with_children(tuple(_weigh(part, weights) for part in product.factors))


@weighed.rule(Calibrated)
def _calibrated(factor: Calibrated, weights: np.ndarray) -> Factor:
    return _weigh(factor.uncalibrated, weights)  # its constants would not hold


@weighed.rule(Diffusion)
def _diffusion(factor: Diffusion, weights: np.ndarray) -> Factor:
    # A scalar head is no sum over entries, so that they cannot be weighed; other energies and scores are.
    if factor.parameterization == "energy" or WEIGHTS in factor.fixed:
        return _refuse(factor, weights)
    return factor.holding({**factor.fixed, WEIGHTS: np.asarray(weights, np.float32)})  # type: ignore[dict-item]
