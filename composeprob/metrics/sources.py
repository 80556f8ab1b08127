"""Errors of a run by their source: the sampler, the model, or too small an error bar.

A run is compared with refined runs, and with a reference, in units of standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.arguments import check_count, check_key
from composeprob.core import (
    AnnealedDensity,
    Result,
    Sampler,
    curl,
    fokker_planck,
    infer,
    noised,
)
from composeprob.errors import AlignmentError, ShapeError
from composeprob.events import shown_entries
from composeprob.kernels.gibbs import integrates_score, parts_of, replaced, with_parts
from composeprob.metrics import tuning as of_metrics
from composeprob.metrics.likelihood import filled
from composeprob.runtime.infer import on_levels
from composeprob.runtime.own_draws import own_scores
from composeprob.samplers.choose import choose
from composeprob.text import aligned, printable


class Estimate(NamedTuple):
    """A mean and its standard error, which is NaN where it is withheld."""

    mean: float
    error: float


Moments = dict[str, Estimate]
"""Label of a number → its estimate."""


@dataclass(frozen=True, repr=False, eq=False)
class ErrorSources:
    """`ErrorSources` holds the result of `error_sources`; ``print`` it.

    Attributes:
        first: the run whose errors are attributed.
        runs: the other runs, by what is different in them.
        differences: what was compared, and the largest difference in standard errors,
            less the largest that chance makes of as many numbers.
        findings: the differences above 3, and the findings of the first run's status;
            empty where the runs agree within their errors.
        checks: figures about the scores, each a line; they are not findings.
        tables: means of all runs, and their differences, as text.
    """

    first: Result
    runs: dict[str, Result]
    differences: dict[str, float]
    findings: tuple[str, ...]
    checks: tuple[str, ...]
    tables: tuple[str, ...]

    def __repr__(self) -> str:
        nothing = ("Nothing was found: the runs agree within their errors.",)
        parts = [*self.tables, *self.checks, *(self.findings or nothing)]
        return printable("\n".join(parts))


def error_sources(
    density: AnnealedDensity,
    key: Array,
    *,
    num_chains: int,
    sampler: Sampler | None = None,
    reference: Mapping[str, ArrayLike] | ArrayLike | None = None,
) -> ErrorSources:
    r"""Measure the errors of a program's samples, and attribute them.

    The program runs several times: as given, under another key, with a level between
    any two, with twice the transitions at each level, and with half the step of kernels
    whose distribution depends on it. Means of every number and of its square are
    compared, z = \|m − m'\|/√(e² + e'²). Changes with levels, transitions or steps are
    errors of the sampler. A change with the key is an error that the standard errors do
    not include. With reference draws the error is split: up to the run with all
    refinements it is the sampler's, the rest is the model's.

    Args:
        density: from `compile`.
        key: a typed random key.
        num_chains: N, of each run.
        sampler: as of `infer`; left out, the one that it chooses.
        reference: independent draws of the right distribution, such as held-out data:
            ``{site: (M, …)}``, or an array of the only site.

    Returns:
        The runs, their differences and the findings.

    Raises:
        ShapeError: the reference does not fit the program's sites.
        InvalidValueError, WrongTypeError: as of `infer`.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def single(f):
        ...     return cp.sample("x", f)
        >>> f = cp.Analytic(dist.Normal(1.0, 0.5), cp.Schedule.log_snr(20))
        >>> density = cp.compile(single, f)
        >>> key = jax.random.key(0)
        >>> sampler = cp.AnnealedMCMC(cp.MALA(), 2)
        >>> found = cp.metrics.error_sources(
        ...     density, key, num_chains=100, sampler=sampler
        ... )
        >>> found.findings, list(found.runs)
        ((), ['another key', '2 × levels', '2 × transitions'])
    """
    check_key(key)
    check_count(num_chains, "num_chains", 2)
    if sampler is None:
        sampler, _ = choose(density, num_chains)
    key, other_key = jax.random.split(key)

    def run(
        density: AnnealedDensity, sampler: Sampler, key: Array = other_key
    ) -> Result:
        return infer(density, key, num_chains=num_chains, sampler=sampler)

    first = run(density, sampler, key)
    # A reference that does not fit is refused here, before the other runs.
    expected = None
    if reference is not None:
        expected = draws_moments(first, named_draws(reference, list(first.samples)))
    relevelled = twice_the_levels(density)
    runs = {}
    for label, variant in variants(density, sampler, first, relevelled).items():
        runs[str(label)] = run(*variant)
    table, differences = run_differences(first, runs, sampler)
    tables = [table]
    if expected is not None:
        best = finest(run, sampler, runs, relevelled)
        table, errors = split(moments(first), moments(best), expected)
        tables.append(table)
        differences |= {f"The {who}'s error:": size for who, size in errors.items()}
    status = first.status
    if num_chains >= tuning.COMPARISON.fewest:
        status = first.compare(runs["another key"]).status
    findings = significant(differences)
    findings += [f"{code}: {text}" for code, text in status.findings]
    checks = score_checks(density, first, key)
    if not fits(relevelled.density, sampler):
        checks.append(
            "The sampler has one step for each level: no other number of levels was "
            "tried."
        )
    return ErrorSources(
        first, runs, differences, tuple(findings), tuple(checks), tuple(tables)
    )


def named_draws(
    reference: Mapping[str, ArrayLike] | ArrayLike, sites: list[str]
) -> dict[str, np.ndarray]:
    """Return reference draws as ``{site: (M, …)}``; a single array is of the only
    site."""
    if isinstance(reference, Mapping):
        return {name: np.asarray(values) for name, values in reference.items()}
    if len(sites) != 1:
        raise ShapeError(
            "The reference is one array, but the program has the sites "
            f"{', '.join(sites)}.",
            fix=f"name them: reference={{{sites[0]!r}: …, {sites[1]!r}: …}}.",
        )
    return {sites[0]: np.asarray(reference)}


def moments(result: Result) -> Moments:
    """Return the means of all numbers of a result, of their squares, and log Z.

    Of a large site they are two rows.
    """
    rows: Moments = {}
    for name in result.samples:
        values = np.asarray(result.drawn(name), np.float64)
        for labels, columns in _columns(name, values, 2):
            # Errors are withheld from runs that are wrong, whose source is asked here.
            means = result.mean_of(columns, even_withheld=True)
            rows |= _estimates(labels, means.value, means.error)
    if result.log_evidence is not None and result.log_evidence_error is not None:
        rows["log evidence"] = Estimate(result.log_evidence, result.log_evidence_error)
    return rows


def draws_moments(result: Result, draws: dict[str, np.ndarray]) -> Moments:
    """Return the same means of independent draws, ``{site: (M, …)}``.

    Draws that do not fit the result's sites are refused.
    """
    rows: Moments = {}
    for name, values in draws.items():
        _check_draws(result, name, values)
        for labels, columns in _columns(name, np.asarray(values, np.float64), 1):
            errors = columns.std(0, ddof=1) / math.sqrt(len(columns))
            rows |= _estimates(labels, columns.mean(0), errors)
    return rows


def _estimates(labels: list[str], means: np.ndarray, errors: np.ndarray) -> Moments:
    rows = zip(labels, means, errors, strict=True)
    return {label: Estimate(mean, error) for label, mean, error in rows}


def _check_draws(result: Result, name: str, values: np.ndarray) -> None:
    """Refuse draws of an unknown site, of another shape, or a single one."""
    # Samples of a result have an axis of chains, and one of draws where it took some.
    lead = 1 if result.about.draws is None else 2
    shapes = {site: np.shape(x)[lead:] for site, x in result.samples.items()}
    fitting = name in shapes and np.shape(values)[1:] == shapes[name]
    if not fitting or len(values) < 2:
        sites = ", ".join(f"{site!r} {shape}" for site, shape in shapes.items())
        raise ShapeError(
            f"The reference has draws of {name!r} of shape {np.shape(values)}; the "
            f"program's sites are {sites}.",
            fix="give it two draws or more, along the first axis, of one of these "
            "sites.",
        )


def _columns(
    name: str, values: np.ndarray, lead: int
) -> list[tuple[list[str], np.ndarray]]:
    """Return labels and columns of a site's numbers, and of their squares."""
    labels, squares = shown_entries(name, values**2, lead)
    return [
        shown_entries(name, values, lead),
        ([f"{label}²" for label in labels], squares),
    ]


def run_differences(
    first: Result, runs: dict[str, Result], sampler: Sampler
) -> tuple[str, dict[str, float]]:
    """Compare runs with the first: a table, and each run's largest difference.

    The difference is in standard errors, under a text that introduces it.
    """
    rows = {label: moments(result) for label, result in runs.items()}
    table, largest = compared(moments(first), rows)
    if Refinement.COARSER in largest:
        # Richardson: an error of order p is 1/(2^p − 1) of its change with half the
        # levels.
        largest[Refinement.COARSER] /= 2 ** (sampler.check_order or 1) - 1
    return table, {f"{run}: a difference of": size for run, size in largest.items()}


def significant(differences: dict[str, float]) -> list[str]:
    """Return the differences above the threshold of significance, as text."""
    return [
        f"{difference} {size:.1f} standard errors"
        for difference, size in differences.items()
        if size > of_metrics.REFINED_ERRORS
    ]


def compared(first: Moments, again: dict[str, Moments]) -> tuple[str, dict[str, float]]:
    """Return a table of runs' differences from the first, and the largest of each run.

    Differences are in standard errors. The largest is corrected for the number of rows.
    """
    cells = {}
    for label, (mean, error) in first.items():
        error_text = "–" if math.isnan(error) else f"{error:.2g}"
        cells[label] = (f"{mean:.4g}", error_text)
    pairs = {name: (rows, first) for name, rows in again.items()}
    return _differences(("mean", "±"), cells, pairs)


def split(
    first: Moments, finest: Moments, reference: Moments
) -> tuple[str, dict[str, float]]:
    """Return a table of a run's errors, split at the finest run.

    The error of the run relative to the finest run is the sampler's, that of the finest
    run relative to the reference the model's. The largest of either, in standard
    errors, is returned too, corrected for the number of rows.
    """
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
) -> tuple[str, dict[str, float]]:
    """Return a table of cells and each pair's differences, and the largest of a pair.

    The table has a row for each label, and a column for each pair. From the largest
    difference the expected maximum of as many normal numbers, √(2·log n), is
    subtracted.
    """
    by_chance = math.sqrt(2 * math.log(max(len(cells), 1)))
    lines = [("", *titles, *pairs)]
    largest = dict.fromkeys(pairs, 0.0)
    for label, lead in cells.items():
        texts = []
        for name, (rows, others) in pairs.items():
            size, text = _difference(rows.get(label), others[label])
            largest[name] = max(largest[name], size - by_chance)
            texts.append(text)
        lines.append((label, *lead, *texts))
    return aligned(lines), largest


def _difference(first: Estimate | None, second: Estimate) -> tuple[float, str]:
    """Return first − second in standard errors, and as text; 0 without an error."""
    if first is None:
        return 0.0, "–"
    first_mean, first_error = first
    second_mean, second_error = second
    error = math.hypot(first_error, second_error)
    difference = first_mean - second_mean
    if not error > 0 or not math.isfinite(difference):
        return 0.0, "–"
    size = abs(difference) / error
    return size, f"{difference:+.3g} ({size:.1f} ±)"


class Refinement(StrEnum):
    """Refinement of a run that is compared with the first, or its coarsening."""

    LEVELS = "2 × levels"
    COARSER = "½ × levels"
    TRANSITIONS = "2 × transitions"
    STEP = "½ step, 2 × transitions"


class Relevelled(NamedTuple):
    """A program on other levels, and the label of a run of it."""

    label: str
    density: AnnealedDensity


def variants(
    density: AnnealedDensity, sampler: Sampler, first: Result, relevelled: Relevelled
) -> dict[str, tuple[AnnealedDensity, Sampler]]:
    """Return the runs to compare with the first, each a density and a sampler.

    Refinements that the sampler does not admit are left out.
    """
    runs = {"another key": (density, sampler)}
    if fits(relevelled.density, sampler):
        runs[relevelled.label] = (relevelled.density, sampler)
    more_transitions = longer(density, sampler)
    if more_transitions is not None:
        runs[Refinement.TRANSITIONS] = (density, more_transitions)
    halved = shorter_steps(density, sampler, first)
    if halved is not None:
        runs[Refinement.STEP] = (density, halved)
    return runs


def longer(density: AnnealedDensity, sampler: Sampler) -> Sampler | None:
    """Return the sampler with twice the transitions at each level; None without any."""
    moves = sampler.prepare(density).moves
    if moves is None:
        return None
    return sampler.with_moves(sampler.kernel or moves.kernel, 2 * moves.count)


def shorter_steps(
    density: AnnealedDensity, sampler: Sampler, first: Result
) -> Sampler | None:
    """Return the sampler with twice as many steps, each half as long as those of the
    first run.

    Steps are halved of kernels whose distribution depends on the step: those without a
    Metropolis test, and those whose test is a quadrature. Other kernels keep theirs.
    None without any such kernel.
    """
    prepared = sampler.prepare(density)
    moves = prepared.moves
    if moves is None:
        return None
    kernel = sampler.kernel or moves.kernel
    block_kernels = parts_of(kernel)
    biased = [
        block.optimal_acceptance is None or integrates_score(block)
        for block in block_kernels
    ]
    if not any(biased):
        return None
    steps = filled(first.step_size, density.num_levels, prepared)
    halved = []
    for block, sizes, is_biased in zip(block_kernels, steps.T, biased, strict=True):
        if is_biased:
            block = replaced(block, step_size=0.5 * sizes)
        halved.append(block)
    return sampler.with_moves(with_parts(kernel, halved), 2 * moves.count)


def twice_the_levels(density: AnnealedDensity) -> Relevelled:
    """Return the program with a level between any two.

    Where a factor is defined at its levels only, the program gets every other level.
    """
    log_snr = np.asarray(density.schedule.log_snr, np.float64)
    index = np.arange(len(log_snr))
    finer = np.interp(np.arange(2 * len(log_snr) - 1) / 2, index, log_snr)
    try:
        refined, _ = on_levels(density, finer, 1)
    except AlignmentError:
        coarser = density.on(density.schedule.every(2))
        return Relevelled(Refinement.COARSER, coarser)
    return Relevelled(Refinement.LEVELS, refined)


def fits(density: AnnealedDensity, sampler: Sampler) -> bool:
    """Return whether the sampler can be used on the density's levels.

    One with a step size for each level fits no other number of levels.
    """
    try:
        sampler.prepare(density)
    except ShapeError:
        return False
    return True


def finest(
    run: Callable[..., Result],
    sampler: Sampler,
    runs: dict[str, Result],
    relevelled: Relevelled,
) -> Result:
    """Return the finest run: twice the levels, twice the transitions, half the step.

    Refinements that are impossible are left out.
    """
    label, density = relevelled
    if label != Refinement.LEVELS or label not in runs:
        order = (Refinement.STEP, Refinement.TRANSITIONS, "another key")
        return next(runs[candidate] for candidate in order if candidate in runs)
    refined = shorter_steps(density, sampler, runs[label]) or longer(density, sampler)
    if refined is None:
        return runs[label]
    return run(density, refined)


def score_checks(density: AnnealedDensity, result: Result, key: Array) -> list[str]:
    """Check the model by scores at the samples, and return a line for each check.

    There are none where the program has latents other than noised sites.
    """
    if any(site.kind != "noised" for site in density.sites.values()):
        return []
    samples = result.unweighted()
    positions = {name: jax.numpy.asarray(samples[name][:64]) for name in density.sites}
    lines = []
    for name, size in curl(density, positions, 0, key).items():
        lines.append(f"curl of {name}: {size:.2g} (a gradient has 0)")
    for name, scores in own_scores(density, positions, key).items():
        lines.append(
            f"score of {name} at the factor's own samples: {scores.steepness:.2g} "
            f"times as steep as their spread says, shifted by {scores.shift:.2g} sd (1 "
            "and 0 are right)"
        )
    return lines + _residual_checks(density, positions, key)


def _residual_checks(
    density: AnnealedDensity, positions: dict[str, Array], key: Array
) -> list[str]:
    """Return the greatest Fokker–Planck residual of each learned factor, as text."""
    learned = {expert.name for expert in density.described.experts if expert.trained}
    if not learned:
        return []
    five = np.linspace(0, density.num_levels - 1, 5)
    worst: dict[str, tuple[float, int]] = {}
    for level in np.unique(five.round().astype(int)).tolist():
        points = noised(density, positions, level, jax.random.fold_in(key, level))
        # JAX raises these for custom rules and callbacks, which have no derivative.
        try:
            residuals = fokker_planck(density, points, level, key)
        except (TypeError, ValueError, NotImplementedError):
            return [
                "Fokker–Planck residual: a network cannot be differentiated so often."
            ]
        for name in learned & residuals.keys():
            candidate = (residuals[name], level)
            if not math.isnan(candidate[0]):
                worst[name] = max(worst.get(name, (0.0, 0)), candidate)
    return [
        f"Fokker–Planck residual of {name}: at most {value:.2g}, at level {level} "
        "(a noised distribution has 0)"
        for name, (value, level) in worst.items()
    ]
