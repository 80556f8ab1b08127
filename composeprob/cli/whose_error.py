"""Whose error it is: a run beside finer ones, and beside a reference, in their standard
errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
from jax import Array
from rich.table import Column, Table

from composeprob import metrics
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.overlap import noised
from composeprob.errors import AlignmentError, LoadError, ShapeError, WrongTypeError
from composeprob.kernels.gibbs import integrates_score, parts_of, replaced, with_parts
from composeprob.metrics.likelihood import filled
from composeprob.results.geometry import shown_entries
from composeprob.results.result import Result
from composeprob.runtime.infer import on_levels
from composeprob.runtime.own_draws import own_scores
from composeprob.samplers.sampler import Sampler

Moments = dict[
    str, tuple[float, float]
]  # {label: (mean, its standard error)}; NaN where the error is withheld


def moments(result: Result) -> Moments:
    """Means of all numbers of a result and of their squares, and the log-evidence;
    large sites have two rows."""
    rows: Moments = {}
    for name in result.samples:
        for labels, columns in _columns(
            name, np.asarray(result.drawn(name), np.float64), 2
        ):
            found = result.mean_of(columns)
            rows |= dict(
                zip(labels, zip(found.value, found.error, strict=True), strict=True)
            )
    if result.log_evidence is not None and result.log_evidence_error is not None:
        rows["log evidence"] = result.log_evidence, result.log_evidence_error
    return rows


def draws_moments(result: Result, draws: dict[str, np.ndarray]) -> Moments:
    """The same of independent draws, ``{site: (M, …)}``."""
    lead = 1 if result.about.draws is None else 2
    rows: Moments = {}
    for name, values in draws.items():
        shape = (
            np.shape(result.samples[name])[lead:] if name in result.samples else None
        )
        if shape is None or np.shape(values)[1:] != shape or len(values) < 2:
            known = ", ".join(
                f"{n!r} {np.shape(x)[lead:]}" for n, x in result.samples.items()
            )
            raise ShapeError(
                f"The reference has draws of {name!r} of shape {np.shape(values)}; the program's sites are {known}.",
                fix="give it two draws or more, along the first axis, of one of these sites.",
            )
        for labels, columns in _columns(name, np.asarray(values, np.float64), 1):
            errors = columns.std(0, ddof=1) / math.sqrt(len(columns))
            rows |= dict(
                zip(labels, zip(columns.mean(0), errors, strict=True), strict=True)
            )
    return rows


def _columns(
    name: str, values: np.ndarray, lead: int
) -> list[tuple[list[str], np.ndarray]]:
    """Labels and columns of a site's numbers, and of their squares."""
    labels, squares = shown_entries(name, values**2, lead)
    return [
        shown_entries(name, values, lead),
        ([f"{label}²" for label in labels], squares),
    ]


def compared(
    first: Moments, again: dict[str, Moments]
) -> tuple[Table, dict[str, float]]:
    """A table of differences in their standard errors, and the largest of each run, for
    how many there are."""
    cells = {
        label: (f"{mean:.4g}", "–" if math.isnan(e) else f"{e:.2g}")
        for label, (mean, e) in first.items()
    }
    return _differences(
        ("mean", "±"), cells, {name: (rows, first) for name, rows in again.items()}
    )


def split(
    first: Moments, finest: Moments, reference: Moments
) -> tuple[Table, dict[str, float]]:
    """A table of a run's errors, split at the finest run: up to it the sampler's, from
    there on the model's; and the largest of either in standard errors, for how many
    there are."""
    cells = {label: (f"{mean:.4g}",) for label, (mean, _) in reference.items()}
    pairs = {
        "off by": (first, reference),
        "the sampler's": (first, finest),
        "the model's": (finest, reference),
    }
    table, largest = _differences(("reference",), cells, pairs)
    return table, {"sampler": largest["the sampler's"], "model": largest["the model's"]}


def _differences(
    titles: Sequence[str],
    cells: Mapping[str, tuple[str, ...]],
    pairs: dict[str, tuple[Moments, Moments]],
) -> tuple[Table, dict[str, float]]:
    """A table with a row for each label, of these cells and a pair's difference in each
    column; and by how much each column's largest exceeds what about arises by chance
    among so many."""
    table = Table("", *titles, *(Column(name, justify="right") for name in pairs))
    largest, allowed = (
        dict.fromkeys(pairs, 0.0),
        math.sqrt(2 * math.log(max(len(cells), 1))),
    )
    for label, lead in cells.items():
        found = {
            name: _difference(rows.get(label), others[label])
            for name, (rows, others) in pairs.items()
        }
        largest = {
            name: max(largest[name], size - allowed)
            for name, (size, _) in found.items()
        }
        table.add_row(label, *lead, *(text for _, text in found.values()))
    return table, largest


def _difference(
    first: tuple[float, float] | None, second: tuple[float, float]
) -> tuple[float, str]:
    """one − other in standard errors, 0 where these are not known, and as text."""
    if first is None:
        return 0.0, "–"
    error = math.hypot(first[1], second[1])
    if not error > 0 or not math.isfinite(first[0] - second[0]):
        return 0.0, "–"
    size = abs(first[0] - second[0]) / error
    return size, f"{first[0] - second[0]:+.3g} ({size:.1f} ±)"


def reference_draws(
    module: ModuleType, file: Path | None, key: Array, num: int, sites: list[str]
) -> dict[str, np.ndarray] | None:
    """Draws of what a program's samples should be, ``{site: (M, …)}``, from a file or
    the module's ``reference(key, num)``; an array is of the only site. None without
    either."""
    make = getattr(module, "reference", None)
    if file is not None:
        try:
            given = np.load(file)
            given = dict(given) if hasattr(given, "keys") else given
        except (OSError, ValueError) as error:
            fix = "write it by np.save, or by np.savez for several sites."
            raise LoadError(f"{str(file)!r} has no arrays: {error}", fix=fix) from error
    elif make is None:
        return None
    elif callable(make):
        given = make(key, num)
    else:
        raise WrongTypeError(
            f"The file's variable reference, which composeprob trust uses, is of type {type(make).__name__}.",
            fix="make it a function reference(key, num) that returns draws, or rename it.",
        )
    if hasattr(given, "keys"):
        return {name: np.asarray(given[name]) for name in given}
    if len(sites) != 1:
        fix = "name them: np.savez('reference.npz', x=…, z=…), or return a dictionary."
        raise ShapeError(
            f"The reference is one array, but the program has the sites {', '.join(sites)}.",
            fix=fix,
        )
    return {sites[0]: np.asarray(given)}


class Refinement(StrEnum):
    """What is finer, or coarser, in a run that is compared with the first."""

    LEVELS, COARSER = "2 × levels", "½ × levels"
    TRANSITIONS, STEP = "2 × transitions", "½ step, 2 × transitions"


def longer(density: AnnealedDensity, sampler: Sampler) -> Sampler | None:
    """The same sampler with twice the transitions at each level; None where it makes
    none."""
    moves = sampler.prepare(density).moves
    return (
        None
        if moves is None
        else sampler.with_moves(sampler.kernel or moves.kernel, 2 * moves.count)
    )


def shorter_steps(
    density: AnnealedDensity, sampler: Sampler, first: Result
) -> Sampler | None:
    """The same sampler with half the steps that the first run adapted, and twice as
    many of them. Only of kernels whose distribution depends on the step, those without
    a Metropolis test and those whose test is a quadrature; others keep theirs. None
    where there is no such kernel."""
    prepared = sampler.prepare(density)
    if (moves := prepared.moves) is None:
        return None
    kernel = sampler.kernel or moves.kernel
    parts = parts_of(kernel)
    biased = [
        part.optimal_acceptance is None or integrates_score(part) for part in parts
    ]
    if not any(biased):
        return None
    steps = filled(first.step_size, density.num_levels, prepared)
    halved = [
        replaced(part, step_size=0.5 * steps_of_part) if wrong else part
        for part, steps_of_part, wrong in zip(parts, steps.T, biased, strict=True)
    ]
    return sampler.with_moves(with_parts(kernel, halved), 2 * moves.count)


def twice_the_levels(density: AnnealedDensity) -> tuple[str, AnnealedDensity]:
    """The program with a level between any two; with every other level where a factor
    knows only its own."""
    log_snr = np.asarray(density.schedule.log_snr, np.float64)
    finer = np.interp(
        np.arange(2 * len(log_snr) - 1) / 2, np.arange(len(log_snr)), log_snr
    )
    try:
        return Refinement.LEVELS, on_levels(density, finer, 1)[0]
    except AlignmentError:
        return Refinement.COARSER, density.on(density.schedule.every(2))


def fits(density: AnnealedDensity, sampler: Sampler) -> bool:
    """Whether the sampler can be used on this number of levels; one step for each level
    fits no other number."""
    try:
        sampler.prepare(density)
    except ShapeError:
        return False
    return True


def finest(
    run: Callable[..., Result],
    chosen: Sampler,
    again: dict[str, Result],
    name: str,
    relevelled: AnnealedDensity,
) -> Result:
    """The finest run: twice the levels, twice the transitions, half the step, as far as
    each is possible."""
    if name != Refinement.LEVELS or name not in again:
        order = (Refinement.STEP, Refinement.TRANSITIONS, "another key")
        return next(again[label] for label in order if label in again)
    sampler = shorter_steps(relevelled, chosen, again[name]) or longer(
        relevelled, chosen
    )
    return again[name] if sampler is None else run(relevelled, sampler)


def score_checks(density: AnnealedDensity, result: Result, key: Array) -> list[str]:
    """Checks of the model by scores at the samples, where the program's latents are all
    noised sites."""
    if any(site.kind != "noised" for site in density.sites.values()):
        return []
    positions = {
        name: jax.numpy.asarray(result.unweighted()[name][:64])
        for name in density.sites
    }
    curls = metrics.curl(density, positions, 0, key)
    lines = [
        f"curl of {name}: {value:.2g} (a gradient has 0)"
        for name, value in curls.items()
    ]
    lines += [
        f"score of {name} at its own draws: {own.steepness:.2g} times as steep as their spread says, shifted by "
        f"{own.shift:.2g} sd (1 and 0 are right)"
        for name, own in own_scores(density, positions, key).items()
    ]
    learned = {expert.name for expert in density.described.experts if expert.trained}
    worst: dict[str, tuple[float, int]] = {}
    for level in (
        np.unique(np.linspace(0, density.num_levels - 1, 5).round().astype(int))
        if learned
        else ()
    ):
        at = noised(density, positions, int(level), jax.random.fold_in(key, int(level)))
        try:
            residuals = metrics.fokker_planck(density, at, int(level), key)
        except (
            TypeError,
            ValueError,
            NotImplementedError,
        ):  # what JAX raises for custom rules and callbacks
            return [
                *lines,
                "Fokker–Planck residual: a network cannot be differentiated so often.",
            ]
        for name in learned & residuals.keys():
            if not math.isnan(residuals[name]):
                worst[name] = max(
                    worst.get(name, (0.0, 0)), (residuals[name], int(level))
                )
    return lines + [
        f"Fokker–Planck residual of {name}: at most {value:.2g}, at level {level} (a noised distribution has 0)"
        for name, (value, level) in worst.items()
    ]
