"""Samples that contradict Stein's identity at level 0."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.density import points, stein
from composeprob.density.annealed import AnnealedDensity
from composeprob.findings import Code, Finding
from composeprob.results.checks.check import Check, Need
from composeprob.results.ended import EndedRun
from composeprob.results.geometry import chosen, rows, spaced

Sites = dict[str, np.ndarray]


class OffTarget(Check):
    """Ask whether samples satisfy Stein's identity under π₀, E[∇log π₀] = 0 and its
    kin, by the statistic of `composeprob.density.stein`.

    It takes the scores that the last transition left with the chains, and evaluates the
    density only where there are none, or where it finds something, to tell edges of π₀
    from wrong samples.
    """

    code = Code.OFF_TARGET
    withholds = True
    meaning = (
        "samples contradict Stein's identity under the density of level 0, by more "
        "than the standard errors of a mean or a variance cover; with the change that "
        "the identity implies"
    )
    needs = frozenset({Need.LEVEL_0, Need.EVALUATIONS, Need.FINITE, Need.NUMBERS})

    def chains(self, run: EndedRun) -> Int[np.ndarray, " some"]:
        most = tuning.SHARES.entries // max(run.size, 1)
        return spaced(run.num_chains, max(min(tuning.STEIN.chains, most), 1))

    def ask(self, run: EndedRun) -> list[Finding]:
        some = self.chains(run)
        weights = run.genealogy.weights[some]
        # Sites that are held are where they began.
        held = {name for name, site in run.density.sites.items() if site.kind == "held"}
        if not weights.sum() > 0 or held == set(run.positions):
            return []
        weighted = np.flatnonzero(weights)
        positions = chosen(run.positions, weighted)
        scores = _scores(run, positions, weighted)
        moved = {name: positions[name] for name in positions if name not in held}
        x, _, names = rows(moved)
        s, _, _ = rows({name: scores[name] for name in moved})
        weights = weights[weighted] / weights.sum()
        _, ancestors = np.unique(
            run.genealogy.index[some][weighted], return_inverse=True
        )
        found = stein.departure(x, s, weights, ancestors)
        if found is None or not found.significant:
            return []
        fixed = {name: positions[name] for name in positions if name in held}
        target = _Target(run.density, moved, fixed)
        if stein.has_edges(target, x, s, found.entry):
            return []
        return [self.finding(_text(names[found.entry], found))]


def _scores(
    run: EndedRun, positions: Sites, weighted: Int[np.ndarray, " some"]
) -> Sites:
    """∇log π₀ at positions of the run."""
    if run.scores is not None:
        return chosen(run.scores, weighted)
    return _by_site(points.scores(run.density, positions).score, positions)


class _Target:
    """The part of log π₀ that has a value, and its gradient, at rows of numbers."""

    def __init__(self, density: AnnealedDensity, moved: Sites, held: Sites):
        self.density = density
        self.moved = moved
        self.held = held

    def __call__(
        self, flat: Float[np.ndarray, "n d"]
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n d"]]:
        there = _by_site(flat, self.moved)
        for name, values in self.held.items():
            there[name] = np.concatenate([values] * (len(flat) // len(values)))
        found = points.scores(self.density, there)
        return found.value, found.gradient[:, : flat.shape[1]]


def _by_site(flat: Float[np.ndarray, "n size"], like: Sites) -> Sites:
    """Rows of numbers as values of sites, in the order, shapes and types of
    ``like``."""
    sizes = [np.size(values[0]) for values in like.values()]
    pieces = np.split(flat, np.cumsum(sizes)[:-1], axis=1)
    sites = {}
    for (name, values), piece in zip(like.items(), pieces, strict=True):
        sites[name] = piece.reshape(-1, *values.shape[1:]).astype(values.dtype)
    return sites


def _text(name: str, found: stein.Departure) -> str:
    change = f"the mean of {name} would change by {found.shift:+.2g} of its standard "
    change += "deviations"
    if found.square:
        change = f"the variance of {name} would change by {found.shift:+.0%}"
    return (
        "The samples contradict Stein's identity at level 0, E[∇log π₀] = 0 and "
        f"E[(x − c)·∇log π₀] = −d: corrected by it {change}, {found.errors:.2g} of its "
        "standard errors. The chains have not converged at level 0, or its density is "
        "not the limit of those at noisier levels, as of energies that a network has "
        "learned. Let them move there: draws=20, or then=cp.WarmUp(), as in "
        "cp.SMC(then=cp.WarmUp()). Steps without a Metropolis test, such as those of "
        "cp.Ancestral(), need more levels instead (schedule=)."
    )
