"""Log-normalisers of factors with an energy: `calibrate`, and files of its results.

They come from quadrature or from sequential Monte Carlo.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from composeprob.arguments import check_count, check_key
from composeprob.calibration import tuning
from composeprob.calibration.quadrature import integrals
from composeprob.compiler.pipeline import lowered
from composeprob.core import (
    HMC,
    SMC,
    Adaptive,
    Ancestral,
    AnnealedDensity,
    Factor,
    LeafFactor,
    Sampler,
    Schedule,
    compile,
    infer,
    single,
)
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
from composeprob.factors.nodes import Combination, Product, leaves, walk
from composeprob.factors.passes import Pass
from composeprob.factors.window import Window
from composeprob.files import read_arrays, write_arrays
from composeprob.ir.leaves import same_factor
from composeprob.kernels.kernel import log_density_of
from composeprob.samplers.layout import Layout
from composeprob.samplers.resampling import log_mean_weight
from composeprob.samplers.run import Run, Visits, begin
from composeprob.samplers.weights import first_weight
from composeprob.schedule import log_snr_of
from composeprob.settings import usual


class LogNormalisers(NamedTuple):
    """log Z at every level of a density, and standard errors, both (K,)."""

    values: Float[np.ndarray, " levels"]
    errors: Float[np.ndarray, " levels"]


def calibrate(
    factor: Factor, key: Array, *, num_chains: int = 1000, repeats: int = 8
) -> Factor:
    """Normalise a factor at every level: log f̃(x, k) = log f(x, k) − log Z_k.

    An energy that was learned by matching scores is known up to a constant of each
    level. With its log-normaliser the weights of a mixture are shares: ``cp.mixture([f,
    g], weights=[0.2, 0.8])``. Events of one or two entries are integrated by a grid
    that follows the mass from level to level. The grid of a diffusion model is confined
    to where noised samples of the model can be: elsewhere its network was never
    trained. Larger events are integrated by sequential Monte Carlo with the density's
    ratios between levels, repeated for a standard error.

    Products and mixtures are calibrated as a whole, after their leaves.

    Args:
        factor: a factor with an energy and every condition given.
        key: a typed random key.
        num_chains: chains of one repeat of sequential Monte Carlo.
        repeats: independent repeats, at least 2.

    Returns:
        A factor with the attributes ``log_normaliser`` and ``standard_error``, one
        number for each level of its schedule. Its normalisers at other levels are
        interpolated in log-SNR. The operands of a product are normalised first, and its
        ``log_normaliser`` is that of the product of the normalised operands.

    Raises:
        CapabilityError: a leaf has only a score.
        ConditionError: a condition is left open.
        InvalidValueError: an energy is NaN or infinite.
        ImproperError: the factor cannot be normalised, as a classifier alone.
        ShapeError: a leaf does not state the shape of its events.

    References:
        Du, Mordatch, Song et al. 2023, section 4, for why constants are free. Neal
        2001, *Annealed importance sampling*; Del Moral, Doucet and Jasra 2006.

    Example:
        >>> import jax, jax.numpy as jnp, composeprob as cp
        >>> schedule = cp.Schedule.log_snr(20)
        >>> def log_f(x, level):  # N(0, 1) at every level, times e³
        ...     return 3.0 - 0.5 * jnp.sum(x**2)
        >>> energy = cp.Energy(log_f, schedule, event_shape=(1,))
        >>> f = cp.calibrate(energy, jax.random.key(0))
        >>> round(float(f.log_normaliser[0]), 3)  # 3 + ½ log 2π
        3.919
        >>> "normalised" in f.capabilities
        True
    """
    _check(factor, key, num_chains, repeats)
    factor = factor.uncalibrated
    # A leaf alone keeps its class, and a file of its own (`save_calibration`).
    if not factor.children:
        return _leaf(leaves(factor)[0], key, num_chains, repeats)
    degree = degree_of(factor)
    leaf_key, key = jax.random.split(key)
    normal = _normalised_leaves(factor, [], leaf_key, num_chains, repeats)
    schedule = _levels(normal)
    with usual():
        density = lowered(single, (normal,), {}, schedule, growing=False)
    log_z = _log_normaliser(density, key, num_chains, repeats)
    # Tables are in the coordinates x/α, in which a factor of another degree than the
    # dimension of its events changes by a power of α.
    excess = degree - math.prod(factor.event_shape)
    log_alpha = np.log(np.asarray(schedule.alpha, np.float64))
    in_units_of_alpha = log_z.values + excess * log_alpha
    return CalibratedExpression(
        factor=normal,
        schedule=_native(normal),
        fixed=_tables(schedule, LogNormalisers(in_units_of_alpha, log_z.errors)),
        degree=degree,
        event_shape=factor.event_shape,
    )


def _leaf(factor: LeafFactor, key: Array, num_chains: int, repeats: int) -> Calibrated:
    """Calibrate one leaf."""
    schedule = _levels(factor)
    density = compile(single, factor, schedule=schedule)
    samples = None
    if math.prod(factor.event_shape) <= 2 and "exact_marginals" in factor.capabilities:
        samples = _clean_samples(factor, key, 4 * num_chains)
    log_z = _log_normaliser(density, key, num_chains, repeats, samples)
    return Calibrated(factor, _tables(schedule, log_z))


def _clean_samples(
    factor: LeafFactor, key: Array, number: int
) -> Float[np.ndarray, "n ..."] | None:
    """Draw x/α at level 0 by reverse diffusion, to find where events can be.

    None where levels are too far apart for that.
    """
    density = compile(single, factor, schedule=_levels(factor, 0.2))
    log_snr = np.asarray(density.schedule.log_snr)
    # Below a log-SNR of −3 events are noise, whatever the distance of levels.
    gaps = -np.diff(log_snr)[log_snr[:-1] > -3.0]
    if not np.all(gaps < 1.0):
        return None
    # DDIM: deterministic steps have a smaller discretisation error.
    sampler = Ancestral(eta=jnp.zeros(()))
    result = infer(density, key, num_chains=number, sampler=sampler, progress=False)
    return np.asarray(result["x"], np.float64) / float(density.schedule.alpha[0])


def _log_normaliser(
    density: AnnealedDensity,
    key: Array,
    num_chains: int,
    repeats: int,
    samples: np.ndarray | None = None,
) -> LogNormalisers:
    """Return log Z at every level of the density, by the method for its dimension."""
    if math.prod(density.sites["x"].shape) <= 2:
        return LogNormalisers(*integrals(density, samples))
    return annealed(density, key, num_chains, repeats)


def _tables(schedule: Schedule, log_z: LogNormalisers) -> dict[str, Any]:
    """Return the tables of a calibration, by increasing log-SNR for interpolation."""
    tables = {
        KNOTS: log_snr_of(schedule.alpha, schedule.sigma),
        LOG_NORMALISER: log_z.values,
        ERROR: log_z.errors,
    }
    return {name: np.ascontiguousarray(table[::-1]) for name, table in tables.items()}


def _native(factor: Factor) -> Schedule:
    """Return the levels of a program of this factor alone."""
    native = compile(single, factor).schedule
    return Schedule.from_arrays(native.alpha, native.sigma)


def _levels(factor: Factor, widest: float | None = None) -> Schedule:
    """Return the levels to calibrate at: the factor's native levels, with gaps filled.

    They extend to the ends of the range of log-SNR that the leaves support, unless a
    ``widest`` gap is given. Factors that are defined at their levels only keep those.
    """
    native = _native(factor)
    members = leaves(factor)
    if any(leaf.traits.levels == "own" for leaf in members):
        return native
    log_snr = log_snr_of(native.alpha, native.sigma)[::-1]
    # Normalisers are smooth in log-SNR: more knots only cost time.
    if len(log_snr) > tuning.CALIBRATED_LEVELS:
        log_snr = np.linspace(log_snr[0], log_snr[-1], tuning.CALIBRATED_LEVELS)
    ends = list(log_snr)
    if widest is None:
        ends = _extended(ends, members)
        two_dimensional = math.prod(factor.event_shape) <= 2
        widest = tuning.QUADRATURE_GAP if two_dimensional else tuning.ANNEALED_GAP
    knots = []
    for low, high in itertools.pairwise(ends):
        pieces = max(1, math.ceil((high - low) / widest))
        knots.append(np.linspace(low, high, pieces, endpoint=False))
    increasing = np.concatenate([*knots, [ends[-1]]])
    return Schedule.from_arrays(*native.noise_at(increasing[::-1]))


def _extended(log_snr: list[float], members: Sequence[LeafFactor]) -> list[float]:
    """Return increasing log-SNR, extended to the ends of what all leaves support."""
    ranges = [leaf.log_snr_range for leaf in members if leaf.traits.levels != "any"]
    # The intersection of the leaves' ranges.
    low = max((least for least, _ in ranges), default=-np.inf)
    high = min((greatest for _, greatest in ranges), default=np.inf)
    extended = list(log_snr)
    if -np.inf < low < log_snr[0] - 1e-3:
        extended.insert(0, low)
    if log_snr[-1] + 1e-3 < high < np.inf:
        extended.append(high)
    return extended


def _normalised_leaves(
    factor: Factor,
    done: list[tuple[LeafFactor, Calibrated]],
    key: Array,
    num_chains: int,
    repeats: int,
) -> Factor:
    """Return the same expression with its noised marginals normalised.

    ``done`` collects leaves and their calibrations, so that equal leaves are calibrated
    once. A mixture with raw multipliers keeps its operands: normalised ones would get
    other shares.
    """
    if factor.sealed:
        return factor
    if factor.children:
        children = []
        for child in factor.children:
            child_key = jax.random.fold_in(key, len(done))
            normalised = _normalised_leaves(child, done, child_key, num_chains, repeats)
            children.append(normalised)
        return factor.with_children(tuple(children))
    (leaf,) = leaves(factor)
    # A factor that is not a noised marginal, such as a constraint, is not a density at
    # each level: only the whole has a normaliser.
    if "normalised" in leaf.capabilities or "exact_marginals" not in leaf.capabilities:
        return leaf
    for raw, calibrated in done:
        if same_factor(raw, leaf):
            return calibrated
    calibrated = _leaf(leaf, key, num_chains, repeats)
    done.append((leaf, calibrated))
    return calibrated


degree_of = Pass[float]("degree")
"""Σ powers × dimensions: the degree of a factor in its events.

Where events grow by c, it scales as (1/c)^degree.
"""


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
    windows = 1 if factor.plate is None else factor.plate.count
    return windows * degrees[0]


@degree_of.rule(Combination)
def _sum_degree(factor: Factor, degrees: list[float]) -> float:
    if not np.allclose(degrees, degrees[0]):
        raise CapabilityError(
            f"A {type(factor).__name__.lower()} whose parts are products of different "
            "numbers of factors has no normaliser of its own: the shares of its parts "
            "depend on the schedule.",
            fix="calibrate its parts, and mix them by shares: "
            "cp.mixture([cp.calibrate(f * g, key), h], weights=…).",
        )
    return degrees[0]


def _check(factor: object, key: object, num_chains: object, repeats: object) -> None:
    """Refuse arguments of `calibrate` that cannot work."""
    if not isinstance(factor, Factor):
        raise WrongTypeError(
            f"calibrate takes a factor; got {type(factor).__name__}.",
            fix="pass cp.load('ring2d'), or f * g.",
        )
    if any(isinstance(node, Combination) and node.plate for node in walk(factor)):
        raise CapabilityError(
            f"A product or mixture over data (over=) cannot be calibrated: {factor!r}.",
            fix="calibrate the factor without data and multiply afterwards; or write "
            "the data out: cp.product(*[f.given(x=x) for x in xs]).",
        )
    check_key(key)
    check_count(num_chains, "num_chains", least=2)
    check_count(repeats, "repeats", least=2)
    if factor.event_shape is None:
        raise ShapeError(
            f"Factor '{getattr(factor, 'label', '')}' has no event shape, so there is "
            "nothing to integrate over.",
            fix="pass event_shape= to it.",
        )
    for leaf in leaves(factor):
        _check_leaf(leaf)


def _check_leaf(leaf: LeafFactor) -> None:
    """Refuse a leaf without an energy, or with an open condition."""
    if "energy" not in leaf.capabilities:
        raise CapabilityError(
            f"Factor '{leaf.label}' offers only its score, and a score has no constant "
            "to calibrate.",
            fix="use a model with an energy parameterization.",
        )
    given = leaf.call_conditions()
    missing = [name for name in leaf.traits.conditions if name not in given]
    if missing:
        arguments = ", ".join(f"{name}=…" for name in missing)
        raise ConditionError(
            f"Factor '{leaf.label}' leaves {', '.join(map(repr, missing))} open, and "
            "its normaliser depends on it.",
            fix=f"give it first: cp.calibrate(factor.given({arguments}), key).",
        )


def annealed(
    density: AnnealedDensity, key: Array, num_chains: int, repeats: int
) -> LogNormalisers:
    """Estimate log ∫F_k at every level by sequential Monte Carlo.

    Chains start with exact draws of N(0, σ²/power), with the importance weight of F
    over it. From level to level log-weights grow by log F_k − log F_{k+1}, and chains
    are resampled and moved by HMC, which leaves F_k invariant. The mean weight is an
    unbiased estimate of ∫F_k over the integral of the first density, which is 1;
    repeats are averaged before the logarithm is taken.
    """
    kernel = HMC(Adaptive(), num_leapfrog=3)
    sampler = SMC(kernel, tuning.ANNEALED_MOVES, weights="density").prepare(density)
    estimates = []
    for repeat_key in jax.random.split(key, repeats):
        log_z = _repeat(sampler, density, repeat_key, num_chains)
        estimates.append(np.asarray(log_z))
    logs = np.stack(estimates)
    # Chains come from the noisiest level: the last one that fails is the first reached.
    if not np.all(np.isfinite(logs)):
        level = int(np.flatnonzero(~np.isfinite(logs).all(0))[-1])
        raise InvalidValueError(
            f"The log-density is not finite at level {level}: no chain got there with "
            "a finite weight.",
            fix="look for overflow in the energy, or space the levels more closely.",
        )
    logs = logs.astype(np.float64)
    mean = np.logaddexp.reduce(logs, axis=0) - np.log(repeats)
    return LogNormalisers(mean, logs.std(axis=0, ddof=1) / np.sqrt(repeats))


@eqx.filter_jit
def _repeat(
    sampler: Sampler, density: AnnealedDensity, key: Array, num_chains: int
) -> Array:
    """Return one population's estimates of log ∫F_k, (K,)."""
    first = density.num_levels - 1
    layout = Layout.of_density(density)
    visits = Visits.every(first, density.num_levels)
    run = sampler.start(begin(key, num_chains, visits), density, first)
    noise = density.schedule.at(first)

    def correction(y: Array) -> Float[Array, ""]:
        """Importance weight of a first draw, less the weight that the sampler adds."""
        evaluation = layout.evaluate(density, y, first)
        position = layout.position(y, noise.alpha)
        log_f = log_density_of(evaluation)
        proposal = density.top.log_density(position, noise.sigma)
        added = first_weight(layout, density, y, evaluation, first)
        return jnp.where(jnp.isfinite(log_f), log_f - proposal - added, -jnp.inf)

    # The sampler takes diffusion factors as normalised; here the values of F determine
    # the constant.
    run = dataclasses.replace(
        run,
        log_weights=jax.vmap(correction)(run.chains.position),
        log_evidence=jnp.zeros(()),
    )

    def visit(run: Run, visited: Array) -> tuple[Run, Array]:
        run = sampler.advance(run, density, visited + 1)
        return run, run.log_evidence + log_mean_weight(run.log_weights)

    _, log_z = jax.lax.scan(visit, run, jnp.arange(density.num_levels))
    return log_z[::-1]


def save_calibration(
    factor: Calibrated, path: str | Path, *, weights: str | Path | None = None
) -> None:
    """Write a calibration: log-SNR, log-normalisers and their errors.

    Args:
        factor: a calibrated leaf.
        path: the file to write.
        weights: the file of the network's weights. Its digest is stored, so that
            `load_calibration` can refuse other weights.
    """
    tables = {
        name.removeprefix("calibration "): table
        for name, table in factor.tables.items()
    }
    metadata = None
    if weights is not None:
        metadata = {"weights": _digest(weights)}
    write_arrays(path, tables, metadata)


def load_calibration(
    factor: LeafFactor, path: str | Path, *, weights: str | Path | None = None
) -> Calibrated:
    """Read a file of `save_calibration`; return ``factor`` with this calibration.

    Args:
        factor: the leaf that was calibrated.
        path: the file.
        weights: the file of its weights; refused unless it is the one at calibration.

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
            f"The calibration {path} was made for other weights than those in "
            f"{Path(weights).name}.",
            fix=fix,
        )
    return Calibrated(factor, tables)


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
