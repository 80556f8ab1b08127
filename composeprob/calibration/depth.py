"""The share of every mode at every level, as the scores know it, and as the energy has it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.calibration.quadrature import integrals, log_densities
from composeprob.calibration.settle import settle
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import InvalidValueError
from composeprob.runtime.infer import infer
from composeprob.samplers.ancestral import Ancestral

SAMPLES = 10
"""Samples that tell the shares, for each of ``num_chains``."""
CHAINS = 4
"""Of these so many for each of ``num_chains`` are moved, and tell the integrals of more than two dimensions."""
FEWEST = 32
"""A mode needs this many samples to be told apart from none."""


@dataclass(frozen=True)
class Depth:
    """What is known of M modes at K levels.

    Attributes:
        log_integrals: log ∫ of the energy's density over each cell, (K, M).
        log_shares: log of the true share of each cell, (K, M).
        error: standard error of the whole log-normaliser, (K,).
        share_error: standard errors of ``log_shares``, (K, M).
    """

    log_integrals: np.ndarray
    log_shares: np.ndarray
    error: np.ndarray
    share_error: np.ndarray


def mode_depth(
    own: AnnealedDensity, density: AnnealedDensity, centres: np.ndarray, key: Array, num_chains: int, repeats: int
) -> Depth:
    """True shares and the energy's integrals over the cell of every centre.

    The reverse diffusion carries shares from levels where the modes are one, so its samples have the true ones;
    noised again they tell the shares of all levels above. It is run without noise of its own
    (DDIM), whose steps err less.

    Args:
        own: the factor alone, on the levels of its reverse diffusion.
        density: the same, on the levels to calibrate.
        centres: (M, \\*event), in units of x/α.
    """
    run_key, noise_key, bridge_key = jax.random.split(key, 3)
    number = SAMPLES * num_chains
    clean = clean_samples(own, run_key, number)
    noise = np.asarray(jax.random.normal(noise_key, clean.shape), np.float64)  # one for all levels: shares are smooth
    variance = np.exp(-np.asarray(density.schedule.log_snr, np.float64))  # of x/α
    floor = float(np.exp(-float(own.schedule.log_snr[0])))

    def noised(level: int) -> np.ndarray:
        return clean + math.sqrt(max(variance[level] - floor, 0.0)) * noise

    cells = [_cell(noised(k), centres) for k in range(density.num_levels)]
    counts = np.stack([np.bincount(cell, minlength=len(centres)) for cell in cells])
    if counts.min() < FEWEST:
        rare, mode = (int(i) for i in np.unravel_index(int(counts.argmin()), counts.shape))
        raise InvalidValueError(
            f"Mode {mode} at {np.round(centres[mode], 3).tolist()} got {counts.min()} of {number} samples at level "
            f"{rare}, too few to tell its share.",
            fix="drop a centre that is no mode, or raise num_chains.",
        )
    shares = counts / number
    share_error = np.sqrt((1 - shares) / (shares * number))
    if math.prod(centres.shape[1:]) <= 2:
        found, error = integrals(density, "x", centres, clean)
        return Depth(found, np.log(shares), error, share_error)
    found, errors = np.zeros(shares.shape), np.zeros(shares.shape)
    log_scale = jnp.zeros(())
    for level in reversed(range(density.num_levels)):  # from noisy to clean, as step sizes are tuned along
        settle_key, draw_key = jax.random.split(jax.random.fold_in(bridge_key, level))
        alpha, cell = float(density.schedule.alpha[level]), cells[level][: CHAINS * num_chains]
        x = jnp.asarray(alpha * noised(level)[: len(cell)], jnp.result_type(float))
        middles = jnp.asarray(centres, x.dtype)
        moved, log_scale = settle(density, jnp.asarray(level), x, jnp.asarray(cell), middles, settle_key, log_scale)
        settled = np.asarray(moved, np.float64)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(draw_key)))
        for mode in range(len(centres)):
            inside = settled[(cell == mode) & (_cell(settled, alpha * centres) == mode)]  # rounding at borders
            found[level, mode], errors[level, mode] = _bridge(
                density, level, inside, alpha * centres, mode, rng, repeats
            )
    weights = np.exp(found - np.logaddexp.reduce(found, axis=1, keepdims=True))
    return Depth(found, np.log(shares), np.sqrt(np.sum((weights * errors) ** 2, axis=1)), share_error)


def clean_samples(own: AnnealedDensity, key: Array, number: int) -> np.ndarray:
    """What the reverse diffusion of a factor makes, in units of x/α."""
    drawn = infer(own, key, num_chains=number, sampler=Ancestral(eta=jnp.zeros(())), progress=False)["x"]
    return np.asarray(drawn, np.float64) / float(own.schedule.alpha[0])


def _cell(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index of the centre nearest to each point."""
    flat, targets = points.reshape(len(points), -1), centres.reshape(len(centres), -1)
    return ((targets**2).sum(1)[None] - 2 * flat @ targets.T).argmin(1)


def _bridge(
    density: AnnealedDensity,
    level: int,
    inside: np.ndarray,
    centres: np.ndarray,
    mode: int,
    rng: np.random.Generator,
    repeats: int,
) -> tuple[float, float]:
    """log ∫ over one cell by bridge sampling against a Gaussian, and its standard error over parts of the samples.

    Half of the cell's samples fit the Gaussian, the others are compared with as many draws of it; a draw outside of
    the cell has density 0.
    """
    flat = inside.reshape(len(inside), -1)
    fitted, kept = flat[::2], flat[1::2]
    mean, size = fitted.mean(0), flat.shape[1]
    spread = np.atleast_2d(np.cov(fitted.T)) if len(fitted) > 5 * size else np.diag(fitted.var(0))
    root = np.linalg.cholesky(spread + 1e-9 * np.trace(spread) / size * np.eye(size))
    drawn = mean + rng.standard_normal((len(kept), size)) @ root.T

    def log_ratio(points: np.ndarray) -> np.ndarray:
        z = np.linalg.solve(root, (points - mean).T)
        log_q = -0.5 * (z**2).sum(0) - np.log(np.diag(root)).sum() - 0.5 * size * np.log(2 * np.pi)
        log_f = log_densities(density, "x", points.reshape(-1, *inside.shape[1:]), level)
        return np.where(_cell(points, centres) == mode, log_f, -np.inf) - log_q

    ours, theirs = log_ratio(kept), log_ratio(drawn)
    if not np.all(np.isfinite(ours)) or np.any(np.isnan(theirs)):
        raise InvalidValueError(
            f"The log-density is not finite at level {level}, at samples of its own reverse diffusion.",
            fix="look for overflow in the energy.",
        )
    parts = [_solve(a, b) for a, b in zip(np.array_split(ours, repeats), np.array_split(theirs, repeats), strict=True)]
    return _solve(ours, theirs), float(np.std(parts, ddof=1) / np.sqrt(repeats))


def _solve(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Meng and Wong's optimal bridge for as many samples of both: a fixed point in log Z."""
    log_z = float(np.median(ours))
    for _ in range(200):
        upper = np.logaddexp.reduce(theirs - np.logaddexp(theirs, log_z)) - np.log(len(theirs))
        lower = np.logaddexp.reduce(-np.logaddexp(ours, log_z)) - np.log(len(ours))
        moved = float(upper - lower)
        if abs(moved - log_z) < 1e-8:
            break
        log_z = moved
    return moved
