"""Factors with a known normaliser: made by `calibrate`, read by the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from composeprob.errors import ConditionError
from composeprob.factors import show
from composeprob.factors.base import AroundLeaf, Factor, LeafFactor, check_conditions
from composeprob.factors.interpolation import interpolate
from composeprob.schedule import Noise, Schedule

KNOTS, LOG_NORMALISER, ERROR = TABLES = ("calibration log-SNR", "calibration log Z", "calibration error")
"""The tables of a calibration. They lie among the conditions, so that one network with several calibrations (one for
each condition) stays one batched evaluation."""


class Calibrated(AroundLeaf):
    """A leaf factor with its log-normaliser: log f̃(x, k) = log f(x, k) − log Z_k, and the score of f.

    `calibrate` makes it. Between the levels where it was calibrated log Z is interpolated in log-SNR.

    Attributes:
        base: f, without the conditions given to it.
        fixed: the conditions of f, and the tables of the calibration over n values of log-SNR.
    """

    base: LeafFactor
    schedule: Schedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    fixed: Mapping[str, Array]
    label: str = eqx.field(static=True)

    def __init__(self, factor: LeafFactor, tables: Mapping[str, ArrayLike]):
        self.base = factor.holding({})
        self.schedule, self.event_shape, self.label = factor.schedule, factor.event_shape, factor.label
        arrays = {name: np.asarray(table, np.float64) for name, table in tables.items()}
        self.fixed = {**factor.fixed, **arrays}  # type: ignore[dict-item]

    @property
    def uncalibrated(self) -> LeafFactor:
        """f, with the conditions given to it."""
        return self.base.given(**{name: v for name, v in self.fixed.items() if name not in TABLES})

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """What the calibration found, by name, as `save_calibration` stores it."""
        return {name: np.asarray(self.fixed[name]) for name in TABLES}

    @property
    def log_normaliser(self) -> np.ndarray:
        """log Z of f at each of its own levels, shape (K,)."""
        return _at_levels(self.schedule, self.fixed[KNOTS], self.fixed[LOG_NORMALISER])

    @property
    def standard_error(self) -> np.ndarray:
        """Standard errors of `log_normaliser`, shape (K,); for a quadrature, what a refinement changed."""
        return _at_levels(self.schedule, self.fixed[KNOTS], self.fixed[ERROR])

    @property
    def capabilities(self) -> frozenset[str]:
        return self.base.capabilities | {"normalised"}

    def given(self, **conditions: object) -> LeafFactor:
        check_conditions(self, conditions)
        raise _too_late(self.label, conditions)

    def call_conditions(self) -> dict[str, Array]:
        needed = {name: v for name, v in self.fixed.items() if name != ERROR}
        return {**self.base.call_conditions(), **needed}

    def evaluate(self, x: Array, noise: Noise, conditions: Mapping[str, Array]) -> tuple[Array | None, Array]:
        of_base = {name: value for name, value in conditions.items() if name not in TABLES}
        log_f, score = self.base.evaluate(x, noise, of_base)
        knots, log_z = (jnp.asarray(conditions[name], x.dtype) for name in (KNOTS, LOG_NORMALISER))
        assert log_f is not None  # nothing else is calibrated
        return log_f - interpolate(knots, log_z, noise.log_snr), score

    @property
    def about(self) -> tuple[str, ...]:
        return (*super().about, _constants(self))


class CalibratedExpression(Factor):
    """A product or mixture of factors with its log-normaliser, F(x, k)/Z_k.

    Stored are log-normalisers in the coordinates x/α, where schedules of every kind agree; in the coordinates of α
    they are less by (G − d)·log α, for F of degree G: Σ powers × dimensions.

    Attributes:
        factor: F, whose leaves are calibrated themselves.
        schedule: the levels that it was calibrated on.
        fixed: the tables of the calibration over n values of log-SNR.
        degree: G.
    """

    factor: Factor
    schedule: Schedule
    fixed: Mapping[str, Array]
    degree: float = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def children(self) -> tuple[Factor, ...]:
        return (self.factor,)

    def with_children(self, children: tuple[Factor, ...]) -> Factor:
        return dataclasses.replace(self, factor=children[0])

    @property
    def normalised(self) -> bool:
        return True

    @property
    def uncalibrated(self) -> Factor:
        return self.factor

    @property
    def sealed(self) -> bool:
        return True

    @property
    def excess(self) -> float:
        """G − d."""
        return self.degree - float(np.prod(self.event_shape))

    @property
    def log_normaliser(self) -> np.ndarray:
        """log Z of F, whose leaves are normalised, at each level that it was calibrated on, shape (K,)."""
        log_alpha = np.log(np.asarray(self.schedule.alpha, np.float64))
        return _at_levels(self.schedule, self.fixed[KNOTS], self.fixed[LOG_NORMALISER]) - self.excess * log_alpha

    @property
    def standard_error(self) -> np.ndarray:
        """Standard errors of `log_normaliser`, shape (K,); for a quadrature, what a refinement changed."""
        return _at_levels(self.schedule, self.fixed[KNOTS], self.fixed[ERROR])

    def given(self, **conditions: object) -> Factor:
        raise _too_late("expression", conditions)

    def terms(self) -> list[tuple[str, float]]:
        return [(f"calibrated({show.formula(self.factor.terms())}; {_constants(self)})", 1.0)]


def _at_levels(schedule: Schedule, knots: Array, values: Array) -> np.ndarray:
    """The table's entries at the schedule's levels, which are among its knots."""
    log_snr = 2 * (np.log(np.asarray(schedule.alpha, np.float64)) - np.log(np.asarray(schedule.sigma, np.float64)))
    return np.interp(log_snr, np.asarray(knots), np.asarray(values))


def _too_late(label: str, conditions: Mapping[str, object]) -> ConditionError:
    names = ", ".join(f"{name}=…" for name in conditions)
    return ConditionError(
        f"The calibrated {label} has the normaliser of the conditions that it was calibrated with; {names} would "
        "change it.",
        fix=f"give conditions first: cp.calibrate(factor.given({names}), key).",
    )


def _constants(factor: Calibrated | CalibratedExpression) -> str:
    """The log-normaliser at the ends of the schedule, with its standard error."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((factor.fixed, factor.schedule))):
        return "log Z traced"
    log_z, error, last = factor.log_normaliser, factor.standard_error, factor.schedule.num_levels - 1
    return "log Z " + ", ".join(f"{log_z[k]:.4g} ± {error[k]:.2g} at level {k}" for k in (0, last))
