"""How a run went: `Status`, and `diagnose`, which reads it off the diagnostics of every
level."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from composeprob import tuning
from composeprob.text import printable


class Code(enum.StrEnum):
    """What can be said of a run, in the order in which it matters; equal to its
    lower-case name as a string."""

    OK = "ok"
    INTERRUPTED = "interrupted"
    SAMPLES_DIVERGED = "samples_diverged"
    NON_FINITE = "non_finite"
    ZERO_DENSITY = "zero_density"
    NOT_CONSERVATIVE = "not_conservative"
    NETWORK_DOUBTED = "network_doubted"
    NO_OVERLAP = "no_overlap"
    OUT_OF_TRAINING = "out_of_training"
    ACCEPTANCE_COLLAPSED = "acceptance_collapsed"
    WEIGHTS_COLLAPSED = "weights_collapsed"
    ANCESTORS_COLLAPSED = "ancestors_collapsed"
    MODES_MISSING = "modes_missing"
    MODES_UNREACHED = "modes_unreached"
    SHARES_FROZEN = "shares_frozen"
    UNSETTLED = "unsettled"
    LEVELS_TOO_FEW = "levels_too_few"
    NOT_SAVED = "not_saved"

    @property
    def withholds(self) -> bool:
        """Whether standard errors would mislead; what factors say where they do not
        agree is the model's affair."""
        models = Code.NO_OVERLAP, Code.OUT_OF_TRAINING
        return self not in (
            Code.OK,
            Code.NON_FINITE,
            *models,
            Code.LEVELS_TOO_FEW,
            Code.NOT_SAVED,
        )


Findings = list[tuple[Code, str]]


@dataclass(frozen=True)
class Status:
    """The outcome of a run: nothing found, or one finding per problem with the levels,
    how much, and what to try.

    Args:
        findings: pairs (code, message), the gravest first; of a run without problems
            none, or one of the code `OK` that says why few of its chains count.

    Example:
        >>> from composeprob.results.status import Code, Status
        >>> Status().ok
        True
        >>> Status(((Code.INTERRUPTED, "Stopped at level 3."),)).code
        <Code.INTERRUPTED: 'interrupted'>
    """

    findings: tuple[tuple[Code, str], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return self.code is Code.OK

    @property
    def code(self) -> Code:
        """The gravest finding, `Code.OK` where there is none."""
        return self.findings[0][0] if self.findings else Code.OK

    @property
    def withholds(self) -> bool:
        """Whether standard errors would mislead, so that none is given."""
        return any(code.withholds for code, _ in self.findings)

    @property
    def message(self) -> str:
        """Every finding, one per line."""
        return "\n".join(text for _, text in self.findings) or "No problem was found."

    def has(self, code: Code | str) -> bool:
        """Whether ``code`` is among the findings, such as
        ``"acceptance_collapsed"``."""
        return any(found == code for found, _ in self.findings) or (
            self.ok and code == Code.OK
        )

    def with_findings(self, *findings: tuple[Code, str]) -> Status:
        """The same outcome, with more findings; the gravest stay first, and beside them
        `OK` has nothing to say."""
        known = sorted(
            (*self.findings, *findings), key=lambda found: list(Code).index(found[0])
        )
        return Status(
            tuple(
                found for found in known if found[0] is not Code.OK or len(known) == 1
            )
        )

    def noted(self, code: Code, text: str) -> Status:
        """The same outcome, with ``text`` at the end of what is said of this code."""
        return Status(
            tuple(
                (found, said + text if found is code else said)
                for found, said in self.findings
            )
        )

    def __str__(self) -> str:
        return printable(
            "\n".join(f"{code.name}: {text}" for code, text in self.findings) or "OK"
        )


def diverged(samples: Mapping[str, np.ndarray], alpha: float, sigma: float) -> Findings:
    """What is wrong with the size of samples of noised sites, ``{site: (N, …)}``: a run
    starts from noise, that of the noisiest level, which is to hide them, α·‖x‖ <
    σ·√d."""
    findings = []
    for name, values in samples.items():
        x = np.asarray(values, float).reshape(len(values), -1)
        with np.errstate(over="ignore"):
            size = np.sqrt(np.mean(x**2, axis=1))
        signal = np.where(np.isfinite(size), size * alpha / sigma, np.inf)
        known = tuning.FINDINGS
        if np.mean(signal > known.far_signal) > known.many or np.any(
            signal > known.farthest_signal
        ):
            text = (
                f"The samples of {name!r} are too large: up to {signal.max() * sigma / alpha:.3g} in root mean square, "
                f"and the noise of the noisiest level hides nothing above {sigma / alpha:.3g}. Look for a network that "
                "is plugged in wrongly, for a denominator that is narrower than what it divides, and for steps that "
                "are too large. For data of that size end the schedule at a lower log-SNR."
            )
            findings.append((Code.SAMPLES_DIVERGED, text))
    return findings


def diagnose(
    acceptance: np.ndarray,
    non_finite: np.ndarray,
    proposals: np.ndarray | int,
    ess: np.ndarray,
    num_chains: int,
    completed_levels: int,
    num_levels: int,
    adjusted: bool | Sequence[bool],
    blocks: Sequence[str] = (),
    outside: float = 0.0,
) -> Status:
    """Reads the status of a run off its diagnostics by level, as `Result.levels` has
    them, (K,).

    ``non_finite`` is out of so many ``proposals`` over all N chains; levels were
    completed from the noisiest downwards; a kernel, or each of its blocks, that is
    ``adjusted`` has a Metropolis test, so that its acceptance means something; and the
    density is 0 or NaN where a share ``outside`` of the chains is.
    """
    visited = np.arange(num_levels) >= num_levels - completed_levels
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.asarray(non_finite, float) / np.broadcast_to(
            np.asarray(proposals, float), (num_levels,)
        )
        bad = visited & (share > tuning.FINDINGS.non_finite_ceiling)
        accepted = np.asarray(acceptance, float).reshape(num_levels, -1)
        stuck = (
            visited[:, None]
            & (accepted < tuning.FINDINGS.acceptance_floor)
            & np.asarray(adjusted)
        )
        # With few chains the share alone says little: fewer than two effective chains
        # is a collapse at any N.
        thin = visited & (
            np.asarray(ess, float)
            < max(tuning.FINDINGS.ess_floor, min(2.0 / num_chains, 0.5))
        )
    level = num_levels - completed_levels
    state = (
        f"the samples carry the noise of level {level}"
        if completed_levels
        else "the samples are pure noise"
    )
    least = float(np.min(ess, where=thin, initial=1.0))
    rows = [
        (
            completed_levels < num_levels,
            Code.INTERRUPTED,
            f"Stopped after {completed_levels} of {num_levels} levels: {state}, not level 0. Run it again to the end, "
            "or with fewer chains or levels if it takes too long.",
        ),
        (
            bad.any(),
            Code.NON_FINITE,
            f"Up to {np.max(share, where=bad, initial=0.0):.1%} of the proposals had a NaN or infinite density or "
            f"score at {_levels(bad)}; they were rejected, so the chains cannot enter that region, and what it holds "
            "is missing from the samples and the evidence. Evaluate density.log_density there to find the factor that "
            "overflows; where the step size is fixed, try step_size=cp.Adaptive(). A factor that is meant to be 0 "
            "there must say so by -jnp.inf with a finite gradient: jnp.where(inside, log_weight, -jnp.inf).",
        ),
        (
            outside > 0,
            Code.ZERO_DENSITY,
            f"{outside:.2%} of the chains are where the density is 0 or NaN, outside of the "
            "walls that hold the posterior: they did not find the way in. Their samples belong to no posterior; "
            "leave them out. Try cp.SMC, which weighs such chains out, with more chains, or give the wall a slope, "
            "such as jax.nn.log_sigmoid(distance / width).",
        ),
        *(
            (
                still.any(),
                Code.ACCEPTANCE_COLLAPSED,
                f"Acceptance{f' of block {blocks[b]!r}' if blocks else ''} fell to "
                f"{np.min(accepted[:, b], where=still, initial=1.0):.2g} at {_levels(still)}: the chains hardly "
                "moved there. Where the step size is fixed, try step_size=cp.Adaptive(), or smaller at little noise "
                "(h ∝ σ² for MALA, h ∝ σ for HMC); where it adapts, cp.Adaptive(warmup=50), or more levels.",
            )
            for b, still in enumerate(stuck.T)
        ),
        (
            thin.any(),
            Code.WEIGHTS_COLLAPSED,
            f"The weights came to rest on {least * num_chains:.1f} of {num_chains} chains ({least:.2g}) at "
            f"{_levels(thin)}. Try levels evenly spaced in log-SNR (cp.Schedule.log_snr), more levels, more "
            "chains, or weights='feynman_kac' where the factors are learned.",
        ),
    ]
    return Status(tuple((code, text) for holds, code, text in rows if holds))


def not_conservative(curl: Mapping[str, float]) -> Findings:
    """The finding that scores are no gradients, if any is not, by the relative curl of
    the factors whose score a line integral relied on."""
    turning = {
        name: value
        for name, value in curl.items()
        if value > tuning.FINDINGS.curl_ceiling
    }
    if not turning:
        return []
    listed = ", ".join(
        f"{name} (relative curl {value:.2g})" for name, value in turning.items()
    )
    passes = tuning.FINDINGS.curl_ceiling
    text = (
        f"Not the gradient of any log-density: the score of {listed}; up to {passes:g} passes for one. A line "
        "integral of it depends on its path, so the Metropolis test aims at no law. Train that model longer or with an "
        "energy parameterization, or use a kernel without a test: cp.ULA, cp.UHMC, or cp.SMC with kernel=None."
    )
    return [(Code.NOT_CONSERVATIVE, text)]


def no_number(observed: Sequence[str]) -> str:
    """Which observations' likelihoods are no number where chains were turned away;
    nothing where none is."""
    if not observed:
        return ""
    return (
        f" The likelihood of {', '.join(map(repr, observed))} is no number near the chains: look for a scale of it "
        "that depends on a latent and is 0 or negative there, and write jnp.exp(s) or jax.nn.softplus(s) for s."
    )


def untrained_divisors(factors: Sequence[str]) -> Findings:
    """The finding that withholds errors where a program divides by these networks, and
    samples are where they were not trained."""
    if not factors:
        return []
    text = (
        f"Weights and steps take {', '.join(factors)} for distributions under noise, which networks are only where "
        "they were trained (see OUT_OF_TRAINING): shares and means may be far off, and no error is given."
    )
    return [(Code.NETWORK_DOUBTED, text)]


def fewest_families(num_chains: int) -> float:
    """Effective number of families under which a population of N chains is given up,
    and no error of it is stated."""
    least = min(
        tuning.ERRORS.fewest_ancestors + 1, num_chains / 8
    )  # three degrees of freedom
    return max(least, min(tuning.ERRORS.fewest_families, num_chains / 16))


def few_ancestors(
    worth: float, distinct: float, num_chains: int, ends: bool
) -> Findings:
    """The finding that N chains have become copies of too few for errors to be stated,
    if they have where a run ends.

    They descend from so many ``distinct`` ones, and are ``worth`` as many independent
    ones, by `known_chains`.
    """
    if not ends or worth >= fewest_families(num_chains):
        return []
    text = (
        f"The {num_chains} chains descend from {distinct:.0f} of the first ones, which are worth {worth:.1f}: "
        "shares of modes are as uncertain as with so few chains, and no standard error is given. "
        "Try more chains, more levels, steps_per_level=3 or more, or weights that differ less (anneal='moments' or "
        "'denoised' for observations); cp.ReplicaExchange; or cp.AnnealedMCMC, whose chains are independent."
    )
    return [(Code.ANCESTORS_COLLAPSED, text)]


def few_chains(
    worth: float, num_chains: int, ess: np.ndarray, log_snr: np.ndarray
) -> Findings:
    """What an outcome without problems says of a run of which fewer than half of N
    chains count: where they were lost.

    A level of relative effective size e, resampled or not, adds 1/e less that of the
    level before, or 1 if resampled, to the relative variance of the weights. ``ess``
    and ``log_snr`` are by level, (K,), from the least noise upwards.
    """
    if not worth < num_chains / 2:
        return []
    spread = 1 / np.clip(np.nan_to_num(np.asarray(ess, float), nan=1.0), 1e-12, 1.0)
    before = np.append(spread[1:], 1.0)
    lost = np.maximum(spread - np.where(before > spread, 1.0, before), 0.0)
    text = (
        f"No problem was found. Of {num_chains:,} chains as many count as {worth:,.0f} independent ones would, which "
        "errors include."
    )
    if lost.sum() > 0.5:
        reach = np.interp([0.1, 0.9], np.cumsum(lost) / lost.sum(), log_snr)
        text += (
            f" Most of the others were lost between log-SNR {reach[1]:.2g} and {reach[0]:.2g}, where single steps make "
            "weights uneven: the longer a step is, the less closely it follows the program, most of all where chains "
            f"part into modes. More levels keep more: compile with twice the {len(ess)} (schedule=)."
        )
    return [(Code.OK, text)]


def impossible_data(log_likelihood: np.ndarray, numbers: int) -> Findings:
    """The finding that chains are where the data are all but impossible.

    Of the posterior at most L/Z, Z = E_prior[L], is where the likelihood is at most L.
    Numbers of precision eps tell −log eps nats each, so that the best chain's log L is
    above log Z by that times ``numbers`` at most, those sampled or seen, whichever are
    fewer: what is twice as far below it has no share. ``log_likelihood`` is each
    chain's, (N,).
    """
    away = np.nanmax(log_likelihood, initial=-np.inf) - log_likelihood
    off = away > 2 * numbers * -np.log(np.finfo(np.float32).eps)
    if not off.any():
        return []
    text = (
        f"{off.mean():.2%} of the chains are where the data are all but impossible, {away[off].min():.0f} nats or more "
        "of log-likelihood below the best chain: they went where noisier levels led and cannot leave. Their samples "
        "belong to no posterior; leave them out. Try more chains, so that SMC weighs such ones out, or more levels."
    )
    return [(Code.ZERO_DENSITY, text)]


def erratic_weights(variance: np.ndarray) -> Findings:
    """The finding that one step multiplied weights by numbers that differ too much, if
    it did: of relative variance v, (K,), NaN where there was none. 1/(1 + v) is the
    conditional effective sample size (Zhou, Johansen and Aston 2016).
    """
    worth = 1 / (1 + np.asarray(variance, float))
    wild = worth < tuning.FINDINGS.ess_floor
    if not wild.any():
        return []
    text = (
        f"A single step multiplied the weights by numbers that differ so much that only {np.nanmin(worth):.2g} of the "
        f"chains count, at {_levels(wild)}: a factor changes over a shorter distance than a step is long, and the "
        "log-evidence comes out too low. Compile with many more levels, widen what is sharp, or try anneal='tempered'."
    )
    return [(Code.WEIGHTS_COLLAPSED, text)]


def not_converged(drift: float) -> Findings:
    """The finding that the warm-up at level 0 ended while the chains still drifted, if
    it did."""
    if drift == 0.0:
        return []
    text = (
        f"At level 0 the warm-up ended while the population still drifted: a block of it changed a mean or a width by, "
        f"or left latents correlated with where they were by, {drift:.2g} standard deviations. "
        "Go on with draws=, or try a smoother parameterization of the latents, such as a log-normal scale."
    )
    return [(Code.UNSETTLED, text)]


def few_levels(error: float) -> Findings:
    """The finding that the levels are too far apart for the evidence, if they are: its
    error from there, in nats."""
    if not error > tuning.FINDINGS.levels_error:
        return []
    text = f"The levels' distance puts the log-evidence off by about {error:.2g}, as half of them show. "
    return [(Code.LEVELS_TOO_FEW, text + "Compile with more levels (schedule=).")]


def fine_data(lost: float, log_snr: float, num_levels: int) -> Findings:
    """The finding that data are finer than level 0, of this log-SNR, if they are: its
    noise once more, σ/α, takes so many nats of log-likelihood from each number seen,
    ½·(σ/α)²/s² of an instrument whose noise is s."""
    if not lost > 0.5:
        return []
    finer = f"cp.Schedule.log_snr({num_levels}, max={math.ceil(log_snr + math.log(8 * lost))})"
    text = (
        f"The data are finer than level 0: noise of its size, {math.exp(-log_snr / 2):.2g}, takes {lost:.3g} nats of "
        "log-likelihood from each number seen, so that few of the chains that step there come to where the data are. "
        f"End the levels at less noise, as {finer}, or give the data noise of that size, which samples have anyway."
    )
    return [(Code.LEVELS_TOO_FEW, text)]


def _levels(mask: Sequence[bool] | np.ndarray) -> str:
    """``level 3`` or ``levels 0–4, 9`` for a boolean mask over levels."""
    index = np.flatnonzero(mask)
    runs = np.split(index, np.flatnonzero(np.diff(index) > 1) + 1)
    parts = [
        str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}"
        for run in runs
        if len(run)
    ]
    if len(parts) > 6:
        parts = [*parts[:5], f"… ({len(index)} levels in all)"]
    return ("level " if len(index) == 1 else "levels ") + ", ".join(parts)
