"""Factors with a known normaliser: made by `calibrate`, read by the compiler; smooth
curves through their tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from composeprob.errors import ConditionError
from composeprob.factors import show
from composeprob.factors.factor import (
    Around,
    Factor,
    LeafFactor,
    Traits,
    check_conditions,
)
from composeprob.schedule import Noise, Schedule, log_snr_of

KNOTS, LOG_NORMALISER, ERROR = TABLES = (
    "calibration log-SNR",
    "calibration log Z",
    "calibration error",
)
"""The tables of a calibration. They lie among the conditions, so that one network with
several calibrations (one for each condition) stays one batched evaluation."""


class _Calibration(eqx.Module):
    """Result of a calibration: tables in ``fixed`` over n values of log-SNR, for the
    levels of a schedule."""

    schedule: eqx.AbstractVar[Schedule]
    fixed: eqx.AbstractVar[Mapping[str, Array]]

    @property
    def excess(self) -> float:
        """Degree minus dimension: the powers of α by which densities of x/α, in the
        tables, and of x differ."""
        return 0.0

    @property
    def log_normaliser(self) -> Float[np.ndarray, " K"]:
        """log Z at each of the schedule's levels; of an expression, that of normalised
        leaves."""
        # Z of x is α^(d − G) times that of x/α.
        log_alpha = np.log(np.asarray(self.schedule.alpha, np.float64))
        return self._at_levels(LOG_NORMALISER) - self.excess * log_alpha

    @property
    def standard_error(self) -> Float[np.ndarray, " K"]:
        """Standard errors of `log_normaliser`; for a quadrature, the change by a
        refinement."""
        return self._at_levels(ERROR)

    def _at_levels(self, table: str) -> Float[np.ndarray, " K"]:
        """Entries of a table at the schedule's levels, which are among its knots."""
        log_snr = log_snr_of(self.schedule.alpha, self.schedule.sigma)
        return np.interp(
            log_snr, np.asarray(self.fixed[KNOTS]), np.asarray(self.fixed[table])
        )

    def _constants(self) -> str:
        """Format the log-normaliser at the ends of the schedule, with its standard
        error."""
        arrays = jax.tree.leaves((self.fixed, self.schedule))
        if any(isinstance(array, jax.core.Tracer) for array in arrays):
            return "log Z traced"
        log_z = self.log_normaliser
        error = self.standard_error
        shown = [
            f"{log_z[k]:.4g} ± {error[k]:.2g} at level {k}"
            for k in (0, self.schedule.num_levels - 1)
        ]
        return f"log Z {', '.join(shown)}"


class Calibrated(LeafFactor, _Calibration):
    """A leaf factor with its log-normaliser: log f̃(x, k) = log f(x, k) − log Z_k, and
    the score of f.

    `calibrate` makes it. Between the levels where it was calibrated log Z is
    interpolated in log-SNR.

    Attributes:
        base: f, without the conditions given to it.
        fixed: the conditions of f, and the tables of the calibration over n values of
            log-SNR.
    """

    base: LeafFactor

    def __init__(self, factor: LeafFactor, tables: Mapping[str, ArrayLike]):
        # The conditions are held here, beside the tables, and not by the base.
        self.base = factor.holding({})
        self.schedule = factor.schedule
        self.event_shape = factor.event_shape
        self.label = factor.label
        added = {name: np.asarray(table, np.float64) for name, table in tables.items()}
        self.fixed = {**factor.fixed, **added}  # type: ignore[dict-item]

    @property
    def uncalibrated(self) -> LeafFactor:
        return self.base.holding(_without_tables(self.fixed))

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """Tables of the calibration, by name, as `save_calibration` stores them."""
        return {name: np.asarray(self.fixed[name]) for name in TABLES}

    @property
    def traits(self) -> Traits:
        traits = self.base.traits
        return dataclasses.replace(traits, offers=traits.offers | {"normalised"})

    def given(self, **conditions: object) -> LeafFactor:
        check_conditions(self, conditions)
        raise _too_late(self.label, conditions)

    def call_conditions(self) -> dict[str, Array]:
        # Standard errors are reported, and do not enter an evaluation.
        needed = {name: v for name, v in self.fixed.items() if name != ERROR}
        return {**self.base.call_conditions(), **needed}

    def evaluate(
        self, x: Float[Array, "*event"], noise: Noise, conditions: Mapping[str, Array]
    ) -> tuple[Float[Array, ""] | None, Float[Array, "*event"]]:
        log_f, score = self.base.evaluate(x, noise, _without_tables(conditions))
        knots = jnp.asarray(conditions[KNOTS], x.dtype)
        log_z = jnp.asarray(conditions[LOG_NORMALISER], x.dtype)
        assert log_f is not None  # only factors with an energy are calibrated
        return log_f - interpolate(knots, log_z, noise.log_snr), score

    def _about(self) -> tuple[str, ...]:
        return (*super()._about(), self._constants())


class CalibratedExpression(Around, _Calibration):
    """A product or mixture of factors with its log-normaliser, F(x, k)/Z_k.

    The tables hold log-normalisers in the coordinates x/α, where schedules of every
    kind agree; in the coordinates of α they are less by (G − d)·log α, for F of degree
    G: Σ powers × dimensions.

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
        """Degree G minus dimension d."""
        return self.degree - float(np.prod(self.event_shape))  # d entries

    def given(self, **conditions: object) -> Factor:
        raise _too_late("expression", conditions)

    def terms(self) -> list[tuple[str, float]]:
        inner = show.formula(self.factor.terms())
        return [(f"calibrated({inner}; {self._constants()})", 1.0)]


def _without_tables(conditions: Mapping[str, Array]) -> dict[str, Array]:
    return {name: value for name, value in conditions.items() if name not in TABLES}


def _too_late(label: str, conditions: Mapping[str, object]) -> ConditionError:
    names = ", ".join(f"{name}=…" for name in conditions)
    return ConditionError(
        f"The calibrated {label} has the normaliser of the conditions that it was "
        f"calibrated with; {names} would change it.",
        fix=f"give conditions first: cp.calibrate(factor.given({names}), key).",
    )


def interpolate(
    knots: Float[Array, " n"], values: Float[Array, "n ..."], at: Float[Array, ""]
) -> Float[Array, " ..."]:
    """Evaluate the cubic Hermite curve through ``values`` at increasing knots;
    differentiable in ``at``.

    Its slopes are those of the parabolas through three knots. It goes on as straight
    lines outside of the knots, as log-normalisers are in log-SNR where there is no
    signal, and (with slope 0) where there is no noise.
    """
    if len(knots) == 1:
        return values[0]
    last = len(knots) - 2
    # The interval that holds the point, or the nearest one, between its neighbours.
    i = jnp.clip(jnp.sum(knots <= at) - 1, 0, last)
    near = jnp.clip(i + np.arange(-1, 3), 0, last + 1)
    before, start, end, after = knots[near]
    below, low, high, above = values[near]
    width = end - start
    rise = high - low

    def parabola(beside: Array, rise_beside: Array, inner: Array) -> Array:
        """Slope at the knot between two intervals: each secant by the other's width. At
        the ends of the table that of the one interval."""
        beside = jnp.where(inner, beside, width)
        rise_beside = jnp.where(inner, rise_beside, rise)
        both = rise / width * beside + rise_beside / beside * width
        return both / (width + beside)

    slope_at_start = parabola(start - before, low - below, i > 0)
    slope_at_end = parabola(after - end, above - high, i < last)
    t = (at - start) / width
    inside = jnp.clip(t, 0.0, 1.0)
    beyond = (t - inside) * width
    # The Hermite basis: 3t² − 2t³ for values, t(1 − t)² and −t²(1 − t) for slopes.
    curve = low + inside**2 * (3 - 2 * inside) * rise
    bend = (1 - inside) * slope_at_start - inside * slope_at_end
    curve = curve + inside * (1 - inside) * width * bend
    return curve + beyond * jnp.where(t < 0, slope_at_start, slope_at_end)
