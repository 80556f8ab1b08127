"""`calibrate` finds the log-normaliser of a factor with an energy, by quadrature or by
sequential Monte Carlo."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.arguments import check_count, check_key
from composeprob.calibration.quadrature import integrals
from composeprob.compiler.pipeline import compile, lowered
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import (
    CapabilityError,
    ConditionError,
    InvalidValueError,
    LoadError,
    ShapeError,
    WrongTypeError,
)
from composeprob.factors.calibrated import (
    ERROR,
    KNOTS,
    LOG_NORMALISER,
    TABLES,
    Calibrated,
    CalibratedExpression,
)
from composeprob.factors.factor import Factor, LeafFactor, is_factor
from composeprob.factors.nodes import Combination, Product, leaves, walk
from composeprob.factors.passes import Pass
from composeprob.factors.window import Window
from composeprob.ir.leaves import same_factor
from composeprob.kernels import HMC, Adaptive
from composeprob.kernels.kernel import log_density_of
from composeprob.language.decorator import single
from composeprob.results.store import read_arrays, write_arrays
from composeprob.runtime.infer import infer
from composeprob.samplers.layout import Layout
from composeprob.samplers.resampling import log_mean_weight
from composeprob.samplers.run import Run, Visits, begin
from composeprob.samplers.sampler import SMC, Ancestral, Sampler
from composeprob.samplers.weights import first_weight
from composeprob.schedule import Schedule, log_snr_of
from composeprob.settings import usual


def calibrate(
    factor: Factor, key: Array, *, num_chains: int = 1000, repeats: int = 8
) -> Factor:
    """Normalises a factor at every level: log f̃(x, k) = log f(x, k) − log Z_k.

    An energy that was learned by matching scores is known up to a constant of each
    level. With its log-normaliser the weights of a mixture are shares: ``cp.mixture([f,
    g], weights=[0.2, 0.8])``. Events of one or two entries are integrated by a grid
    that follows the mass from level to level (of a diffusion model only where its own
    samples, noised, can be: elsewhere its network was never taught); larger ones by
    sequential Monte Carlo with the density's ratios between levels, several times over
    for a standard error.

    Products and mixtures are calibrated as a whole, after their leaves.

    Args:
        factor: with an energy, every condition given.
        key: a typed random key.
        num_chains: chains of one repeat of sequential Monte Carlo.
        repeats: independent repeats, at least 2.

    Returns:
        A factor with the attributes ``log_normaliser`` and ``standard_error``, one
        number for each level of its schedule. Its normalisers at other levels are
        interpolated in log-SNR. The parts of a product are normalised first, and its
        ``log_normaliser`` is that of the product of the normalised parts.

    Raises:
        CapabilityError: a leaf has only a score.
        ConditionError: a condition is left open.
        InvalidValueError: an energy is NaN, or no number.
        ImproperError: the factor cannot be normalised, as a classifier alone.
        ShapeError: a leaf does not state for which events it is.

    References:
        Du, Mordatch, Song et al. 2023, section 4, for why constants are free. Neal
        2001, *Annealed importance sampling*; Del Moral, Doucet and Jasra 2006.

    Example:
        >>> import jax, jax.numpy as jnp, composeprob as cp
        >>> schedule = cp.Schedule.log_snr(20)
        >>> def log_f(x, level):  # N(0, 1) at every level, times e³
        ...     return 3.0 - 0.5 * jnp.sum(x**2)
        >>> f = cp.calibrate(cp.Energy(log_f, schedule, event_shape=(1,)), jax.random.key(0))
        >>> round(float(f.log_normaliser[0]), 3)  # 3 + ½ log 2π
        3.919
        >>> "normalised" in f.capabilities
        True
    """
    _check(factor, key, num_chains, repeats)
    factor = factor.uncalibrated
    if not factor.children:
        return _leaf(leaves(factor)[0], key, num_chains, repeats)
    degree = degree_of(factor)
    leaf_key, key = jax.random.split(key)
    normal = _normalised_leaves(factor, [], leaf_key, num_chains, repeats)
    schedule = _levels(normal)
    with usual():
        density = lowered(single, (normal,), {}, schedule, growing=False)
    log_z, error = _log_normaliser(density, key, num_chains, repeats)
    excess = degree - math.prod(factor.event_shape)
    in_units_of_alpha = log_z + excess * np.log(np.asarray(schedule.alpha, np.float64))
    return CalibratedExpression(
        factor=normal,
        schedule=_native(normal),
        fixed=_tables(schedule, in_units_of_alpha, error),
        degree=degree,
        event_shape=factor.event_shape,
    )


def _leaf(factor: LeafFactor, key: Array, num_chains: int, repeats: int) -> Calibrated:
    schedule = _levels(factor)
    density = compile(single, factor, schedule=schedule)
    samples = None
    if math.prod(factor.event_shape) <= 2 and "exact_marginals" in factor.capabilities:
        # Reverse diffusion over levels that are close, where they shape events, finds
        # where events can be.
        fine = compile(single, factor, schedule=_levels(factor, 0.2))
        log_snr = np.asarray(fine.schedule.log_snr)
        if np.all(-np.diff(log_snr)[log_snr[:-1] > -3.0] < 1.0):
            without_noise = Ancestral(eta=jnp.zeros(()))  # DDIM, whose steps err less
            drawn = infer(
                fine,
                key,
                num_chains=4 * num_chains,
                sampler=without_noise,
                progress=False,
            )["x"]
            samples = np.asarray(drawn, np.float64) / float(fine.schedule.alpha[0])
    return Calibrated(
        factor,
        _tables(schedule, *_log_normaliser(density, key, num_chains, repeats, samples)),
    )


def _log_normaliser(
    density: AnnealedDensity,
    key: Array,
    num_chains: int,
    repeats: int,
    samples: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """log Z at every level of the density, and its standard errors, both (K,)."""
    if math.prod(density.sites["x"].shape) <= 2:
        return integrals(density, samples)
    return annealed(density, key, num_chains, repeats)


def _tables(
    schedule: Schedule, log_normaliser: np.ndarray, error: np.ndarray
) -> dict[str, Any]:
    """By increasing log-SNR, as interpolation wants them."""
    log_snr = log_snr_of(schedule.alpha, schedule.sigma)
    tables = {KNOTS: log_snr, LOG_NORMALISER: log_normaliser, ERROR: error}
    return {name: np.ascontiguousarray(table[::-1]) for name, table in tables.items()}


def _native(factor: Factor) -> Schedule:
    """The levels of a program of this factor alone."""
    native = compile(single, factor).schedule
    return Schedule.from_arrays(native.alpha, native.sigma)


def _levels(factor: Factor, widest: float | None = None) -> Schedule:
    """The levels to calibrate at: the factor's own with gaps filled, where it knows
    more than those, and as far as it does; with a ``widest`` gap within its own
    alone."""
    native, found, wide = _native(factor), leaves(factor), widest is None
    if widest is None:
        widest = (
            tuning.QUADRATURE_GAP
            if math.prod(factor.event_shape) <= 2
            else tuning.ANNEALED_GAP
        )
    if any(leaf.traits.levels == "own" for leaf in found):
        return native
    log_snr = log_snr_of(native.alpha, native.sigma)[::-1]
    if len(log_snr) > tuning.CALIBRATED_LEVELS:
        log_snr = np.linspace(log_snr[0], log_snr[-1], tuning.CALIBRATED_LEVELS)
    ranges = [
        leaf.log_snr_range for leaf in found if wide and leaf.traits.levels != "any"
    ]
    low, high = (
        max((r[0] for r in ranges), default=-np.inf),
        min((r[1] for r in ranges), default=np.inf),
    )
    below = [low] if -np.inf < low < log_snr[0] - 1e-3 else []
    above = [high] if log_snr[-1] + 1e-3 < high < np.inf else []
    ends = [*below, *log_snr, *above]
    gaps = [
        np.linspace(a, b, max(1, math.ceil((b - a) / widest)), endpoint=False)
        for a, b in itertools.pairwise(ends)
    ]
    knots = np.concatenate([*gaps, [ends[-1]]])[::-1]
    return Schedule.from_arrays(*native.noise_at(knots))


def _normalised_leaves(
    factor: Factor,
    known: list[tuple[LeafFactor, Calibrated]],
    key: Array,
    num_chains: int,
    repeats: int,
) -> Factor:
    """The same expression with its noised marginals normalised, equal ones once
    (``known``: leaves and what became of them). A mixture with raw multipliers is left
    as it is: normalised parts would get other shares."""

    def normalised(child: Factor) -> Factor:
        return _normalised_leaves(
            child, known, jax.random.fold_in(key, len(known)), num_chains, repeats
        )

    if factor.sealed:
        return factor
    if factor.children:
        return factor.with_children(tuple(map(normalised, factor.children)))
    (leaf,) = leaves(factor)
    if "normalised" in leaf.capabilities or "exact_marginals" not in leaf.capabilities:
        return leaf
    done = next((done for raw, done in known if same_factor(raw, leaf)), None)
    if done is None:
        done = _leaf(leaf, key, num_chains, repeats)
        known.append((leaf, done))
    return done


degree_of = Pass[float]("degree")
"""Σ powers × dimensions: how a factor scales with its events, (1/c)^degree where they
grow by c."""


@degree_of.rule(LeafFactor)
def _leaf_degree(factor: LeafFactor, _: list[float]) -> float:
    return factor.traits.top_power * math.prod(factor.event_shape)


@degree_of.rule(CalibratedExpression)
def _density_degree(factor: Factor, _: list[float]) -> float:
    return float(math.prod(factor.event_shape))


@degree_of.rule(Product)
def _product_degree(factor: Product, degrees: list[float]) -> float:
    return sum(w * degree for w, degree in factor.each(degrees))


@degree_of.rule(Window)
def _window_degree(factor: Window, degrees: list[float]) -> float:
    return (1 if factor.plate is None else factor.plate.count) * degrees[0]


@degree_of.rule(Combination)
def _sum_degree(factor: Factor, degrees: list[float]) -> float:
    if not np.allclose(degrees, degrees[0]):
        raise CapabilityError(
            f"A {type(factor).__name__.lower()} whose parts are products of different numbers of factors has no "
            "normaliser of its own: the shares of its parts depend on the schedule.",
            fix="calibrate its parts, and mix them by shares: cp.mixture([cp.calibrate(f * g, key), h], weights=…).",
        )
    return degrees[0]


def _check(factor: object, key: object, num_chains: object, repeats: object) -> None:
    if not is_factor(factor):
        raise WrongTypeError(
            f"calibrate takes a factor; got {type(factor).__name__}.",
            fix="pass cp.load('ring2d'), or f * g.",
        )
    if any(isinstance(node, Combination) and node.plate for node in walk(factor)):
        raise CapabilityError(
            f"A product or mixture over data (over=) cannot be calibrated: {factor!r}.",
            fix="calibrate the factor without data and multiply afterwards; or write the data out: "
            "cp.product(*[f.given(x=x) for x in xs]).",
        )
    check_key(key)
    check_count(num_chains, "num_chains", least=2)
    check_count(repeats, "repeats", least=2)
    if factor.event_shape is None:
        raise ShapeError(
            f"Factor '{getattr(factor, 'label', '')}' has no event shape, so there is nothing to integrate over.",
            fix="pass event_shape= to it.",
        )
    for leaf in leaves(factor):
        if "energy" not in leaf.capabilities:
            raise CapabilityError(
                f"Factor '{leaf.label}' offers only its score, and a score has no constant to calibrate.",
                fix="use a model with an energy parameterization.",
            )
        missing = [
            name
            for name in leaf.traits.conditions
            if name not in leaf.call_conditions()
        ]
        if missing:
            names = ", ".join(f"{name}=…" for name in missing)
            raise ConditionError(
                f"Factor '{leaf.label}' leaves {', '.join(map(repr, missing))} open, and its normaliser depends on it.",
                fix=f"give it first: cp.calibrate(factor.given({names}), key).",
            )


def annealed(
    density: AnnealedDensity, key: Array, num_chains: int, repeats: int
) -> tuple[np.ndarray, np.ndarray]:
    """Estimates log ∫F_k at every level; returns it with its standard errors, both
    (K,).

    Chains start with exact draws of N(0, σ²/power), weighted by F over it; from level
    to level weights gain log F_k − log F_{k+1}, and chains are resampled and moved by
    HMC, which leaves F_k invariant. The mean weight is an unbiased estimate of ∫F_k
    over that of the start, which is 1; repeats are averaged before the logarithm is
    taken.
    """
    sampler = SMC(
        HMC(Adaptive(), num_leapfrog=3), tuning.ANNEALED_MOVES, weights="density"
    ).prepare(density)
    found = np.stack(
        [
            np.asarray(_repeat(sampler, density, k, num_chains))
            for k in jax.random.split(key, repeats)
        ]
    )
    if not np.all(np.isfinite(found)):
        level = int(np.flatnonzero(~np.isfinite(found).all(0))[-1])
        raise InvalidValueError(
            f"The log-density is not finite at level {level}: no chain got there with a finite weight.",
            fix="look for overflow in the energy, or space the levels more closely.",
        )
    found = found.astype(np.float64)
    mean = np.logaddexp.reduce(found, axis=0) - np.log(repeats)
    return mean, found.std(axis=0, ddof=1) / np.sqrt(repeats)


@eqx.filter_jit
def _repeat(
    sampler: Sampler, density: AnnealedDensity, key: Array, num_chains: int
) -> Array:
    """One population's estimates of log ∫F_k, (K,)."""
    first, layout = density.num_levels - 1, Layout.of_density(density)
    run = sampler.start(
        begin(key, num_chains, Visits.every(first, density.num_levels)), density, first
    )
    noise = density.schedule.at(first)

    def correction(v: Array) -> Array:
        """What one draw weighs by the values of F, less what the sampler counts at its
        first visit."""
        found, position = (
            layout.evaluate(density, v, first),
            layout.position(v, noise.alpha),
        )
        value, drawn = (
            log_density_of(found),
            density.top.log_density(position, noise.sigma),
        )
        counted = first_weight(layout, density, v, found, first)
        return jnp.where(jnp.isfinite(value), value - drawn - counted, -jnp.inf)

    # The sampler counts diffusion factors as normalised; here their own values give the
    # constant.
    run = dataclasses.replace(
        run,
        log_weights=jax.vmap(correction)(run.chains.position),
        log_evidence=jnp.zeros(()),
    )

    def visit(run: Run, made: Array) -> tuple[Run, Array]:
        run = sampler.advance(run, density, made + 1)
        return run, run.log_evidence + log_mean_weight(run.log_weights)

    _, log_z = jax.lax.scan(visit, run, jnp.arange(density.num_levels))
    return log_z[::-1]


def save_calibration(
    factor: Calibrated, path: str | Path, *, weights: str | Path | None = None
) -> None:
    """Writes what `calibrate` found of a single factor: log-SNR, log-normalisers and
    their errors.

    Args:
        factor: a calibrated leaf.
        path: where to write.
        weights: the file of the network's weights, by whose digest `load_calibration`
            knows it again.
    """
    tables = {
        name.removeprefix("calibration "): table
        for name, table in factor.tables.items()
    }
    write_arrays(
        path, tables, None if weights is None else {"weights": _digest(weights)}
    )


def load_calibration(
    factor: LeafFactor, path: str | Path, *, weights: str | Path | None = None
) -> Calibrated:
    """Reads what `save_calibration` wrote; returns ``factor`` with it.

    Args:
        factor: the leaf that was calibrated.
        path: the file.
        weights: the file of its weights; refused where it is another than at
            calibration.

    Raises:
        LoadError: the file is missing or damaged, or is the calibration of other events
            or weights.
    """
    fix = f"calibrate it again: python tools/calibrate.py {factor.label}"
    stored, about = read_arrays(path, f"The calibration {path}", fix)
    tables = {f"calibration {name}": table for name, table in stored.items()}
    shapes = {table.shape for table in tables.values()}
    if set(tables) != set(TABLES) or len(shapes) != 1 or len(shapes.pop()) != 1:
        raise LoadError(
            f"The calibration {path} does not fit factor '{factor.label}'.", fix=fix
        )
    if weights is not None and about.get("weights") != _digest(weights):
        raise LoadError(
            f"The calibration {path} was made for other weights than those in {Path(weights).name}.",
            fix=fix,
        )
    return Calibrated(factor, tables)


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
