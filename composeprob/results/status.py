"""The outcome of a run: `Status`, and `diagnose`, which reads it off the diagnostics of
every level."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from composeprob import tuning
from composeprob.text import printable


class Code(enum.StrEnum):
    """Codes of findings about a run, the gravest first after `OK`; as a string, each is
    its lower-case name."""

    OK = "ok"
    INTERRUPTED = "interrupted"  # by Ctrl-C, before the run was complete
    SAMPLES_DIVERGED = "samples_diverged"
    NON_FINITE = "non_finite"  # proposals were NaN
    ZERO_DENSITY = (
        "zero_density"  # chains outside of the support, or of what the data allow
    )
    NOT_CONSERVATIVE = (
        "not_conservative"  # a score under a Metropolis test is not a gradient
    )
    NETWORK_DOUBTED = (
        "network_doubted"  # a network is not the distribution that it stands for
    )
    NO_OVERLAP = "no_overlap"  # factors disagree where the samples are
    OUT_OF_TRAINING = "out_of_training"  # samples are where a network was not trained
    ACCEPTANCE_COLLAPSED = "acceptance_collapsed"
    WEIGHTS_COLLAPSED = "weights_collapsed"  # few effective chains at a level
    ANCESTORS_COLLAPSED = "ancestors_collapsed"  # few effective ancestors at the end
    MODES_MISSING = "modes_missing"
    MODES_UNREACHED = "modes_unreached"  # importance samples lie where no chain is
    SHARES_FROZEN = "shares_frozen"  # mode proportions are unreliable
    UNSETTLED = "unsettled"  # the warm-up at level 0 did not converge
    LEVELS_TOO_FEW = "levels_too_few"  # discretisation error of the evidence
    NOT_SAVED = "not_saved"  # a file could not be written

    @property
    def withholds(self) -> bool:
        """True if standard errors would mislead.

        They do not where factors disagree, as errors are those of the model, nor where
        the evidence alone is concerned.
        """
        return self not in (
            Code.OK,
            Code.NON_FINITE,
            Code.NO_OVERLAP,
            Code.OUT_OF_TRAINING,
            Code.LEVELS_TOO_FEW,
            Code.NOT_SAVED,
        )


Findings = list[tuple[Code, str]]


@dataclass(frozen=True)
class Status:
    """The outcome of a run: nothing found, or one finding per problem with the levels,
    how much, and what to try.

    Args:
        findings: pairs (code, message), the gravest first. A run without problems has
            none, or one of code `OK` that says why few of its chains count.

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
        """True if there is no finding of a problem."""
        return self.code is Code.OK

    @property
    def code(self) -> Code:
        """The gravest finding, `Code.OK` where there is none."""
        return self.findings[0][0] if self.findings else Code.OK

    @property
    def withholds(self) -> bool:
        """True if standard errors would mislead, so that none is given."""
        return any(code.withholds for code, _ in self.findings)

    @property
    def message(self) -> str:
        """Every finding, one per line."""
        return "\n".join(text for _, text in self.findings) or "No problem was found."

    def has(self, code: Code | str) -> bool:
        """Return whether ``code``, such as ``"acceptance_collapsed"``, is among the
        findings."""
        if self.ok and code == Code.OK:
            return True
        return any(finding == code for finding, _ in self.findings)

    def with_findings(self, *findings: tuple[Code, str]) -> Status:
        """The same outcome with more findings, the gravest first; a remark of code `OK`
        stays only where it is alone."""
        gravity = list(Code)
        merged = sorted(
            (*self.findings, *findings), key=lambda finding: gravity.index(finding[0])
        )
        if len(merged) > 1:
            merged = [finding for finding in merged if finding[0] is not Code.OK]
        return Status(tuple(merged))

    def noted(self, code: Code, text: str) -> Status:
        """The same outcome with ``text`` at the end of the messages of this code."""
        findings = []
        for finding, message in self.findings:
            if finding is code:
                message += text
            findings.append((finding, message))
        return Status(tuple(findings))

    def __str__(self) -> str:
        lines = [f"{code.name}: {text}" for code, text in self.findings]
        return printable("\n".join(lines) or "OK")


def diverged(samples: Mapping[str, np.ndarray], alpha: float, sigma: float) -> Findings:
    """The finding that samples of noised sites, ``{site: (N, …)}``, are too large.

    A run starts from the noise of the noisiest level, which must hide them:
    α·‖x‖ < σ·√d.
    """
    limits = tuning.FINDINGS
    findings = []
    for name, values in samples.items():
        x = np.asarray(values, float).reshape(len(values), -1)
        with np.errstate(over="ignore"):
            size = np.sqrt(np.mean(x**2, axis=1))
        signal = np.where(np.isfinite(size), size * alpha / sigma, np.inf)
        many_far = np.mean(signal > limits.far_signal) > limits.many
        if not many_far and not np.any(signal > limits.farthest_signal):
            continue
        text = (
            f"The samples of {name!r} are too large: their root mean square is up to "
            f"{signal.max() * sigma / alpha:.3g}, and the noise of the noisiest level "
            f"hides nothing above {sigma / alpha:.3g}. Look for a network that is "
            "plugged in wrongly, for a denominator that is narrower than its "
            "numerator, and for steps that are too large. For data of that size end "
            "the schedule at a lower log-SNR."
        )
        findings.append((Code.SAMPLES_DIVERGED, text))
    return findings


def diagnose(
    acceptance: Float[np.ndarray, "levels ..."],
    non_finite: Float[np.ndarray, " levels"],
    proposals: np.ndarray | int,
    ess: Float[np.ndarray, " levels"],
    num_chains: int,
    completed_levels: int,
    num_levels: int,
    adjusted: bool | Sequence[bool],
    blocks: Sequence[str] = (),
    outside: float = 0.0,
) -> Status:
    """Return the status of a run from its diagnostics by level, which are those of
    `Result.levels`.

    Args:
        acceptance: mean acceptance probability, (K,) or (K, B) of B blocks.
        non_finite: number of proposals whose density or score was not finite, (K,).
        proposals: number of all proposals over all chains, (K,) or one for all levels.
        ess: effective sample size relative to N, (K,).
        num_chains: N.
        completed_levels: number of levels that were completed, from the noisiest.
        num_levels: K.
        adjusted: whether the kernel, or each block, has a Metropolis test, without
            which its acceptance means nothing.
        blocks: names of the blocks; empty for a kernel that moves all sites together.
        outside: share of the chains at which the density is 0 or NaN.
    """
    visited = np.arange(num_levels) >= num_levels - completed_levels
    accepted = np.asarray(acceptance, float).reshape(num_levels, -1)
    with np.errstate(invalid="ignore"):
        too_low = accepted < tuning.FINDINGS.acceptance_floor
    findings = [
        *_unfinished(completed_levels, num_levels),
        *_non_finite(np.asarray(non_finite, float), proposals, visited),
        *_outside_of_walls(outside),
        *_stuck(accepted, visited[:, None] & too_low & np.asarray(adjusted), blocks),
        *_few_effective(np.asarray(ess, float), visited, num_chains),
    ]
    return Status(tuple(findings))


def _unfinished(completed: int, num_levels: int) -> Findings:
    """The finding that a run was stopped above level 0."""
    if completed >= num_levels:
        return []
    state = "the samples are pure noise"
    if completed:
        state = f"the samples carry the noise of level {num_levels - completed}"
    text = (
        f"Stopped after {completed} of {num_levels} levels: {state}, not level 0. Run "
        "it again to the end, or with fewer chains or levels if it takes too long."
    )
    return [(Code.INTERRUPTED, text)]


def _non_finite(
    count: np.ndarray, proposals: np.ndarray | int, visited: Bool[np.ndarray, " levels"]
) -> Findings:
    """The finding that too many proposals had no finite density or score."""
    of_levels = np.broadcast_to(np.asarray(proposals, float), visited.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = count / of_levels
        bad = visited & (share > tuning.FINDINGS.non_finite_ceiling)
    if not bad.any():
        return []
    text = (
        f"Up to {np.max(share, where=bad, initial=0.0):.1%} of the proposals had a NaN "
        f"or infinite density or score at {_levels(bad)}. They were rejected, so the "
        "chains cannot enter that region, and its probability is missing from the "
        "samples and the evidence. Evaluate density.log_density there to find the "
        "factor that overflows; where the step size is fixed, try "
        "step_size=cp.Adaptive(). A factor that is meant to be 0 there must return "
        "-jnp.inf with a finite gradient: jnp.where(inside, log_weight, -jnp.inf)."
    )
    return [(Code.NON_FINITE, text)]


def _outside_of_walls(share: float) -> Findings:
    """The finding that a share of the chains ended at density 0."""
    if not share > 0:
        return []
    text = (
        f"{share:.2%} of the chains are at points of density 0 or NaN, outside of the "
        "walls that bound the posterior: they did not find the way in. Their samples "
        "belong to no posterior; leave them out. Try cp.SMC, which gives such chains "
        "no weight, with more chains, or give the wall a slope, such as "
        "jax.nn.log_sigmoid(distance / width)."
    )
    return [(Code.ZERO_DENSITY, text)]


def _stuck(
    accepted: Float[np.ndarray, "levels blocks"],
    stuck: Bool[np.ndarray, "levels blocks"],
    blocks: Sequence[str],
) -> Findings:
    """The findings of blocks whose moves were hardly ever accepted."""
    findings = []
    for b, levels in enumerate(stuck.T):
        if not levels.any():
            continue
        block = f" of block {blocks[b]!r}" if blocks else ""
        least = np.min(accepted[:, b], where=levels, initial=1.0)
        text = (
            f"Acceptance{block} fell to {least:.2g} at {_levels(levels)}: the chains "
            "hardly moved there. Where the step size is fixed, try "
            "step_size=cp.Adaptive(), or smaller steps at little noise (h ∝ σ² for "
            "MALA, h ∝ σ for HMC); where it adapts, cp.Adaptive(warmup=50), or more "
            "levels."
        )
        findings.append((Code.ACCEPTANCE_COLLAPSED, text))
    return findings


def _few_effective(
    ess: Float[np.ndarray, " levels"],
    visited: Bool[np.ndarray, " levels"],
    num_chains: int,
) -> Findings:
    """The finding that the importance weights of a level are worth few chains."""
    # With few chains the share alone says little: fewer than two effective chains is a
    # collapse at any N.
    floor = max(tuning.FINDINGS.ess_floor, min(2.0 / num_chains, 0.5))
    with np.errstate(invalid="ignore"):
        collapsed = visited & (ess < floor)
    if not collapsed.any():
        return []
    least = float(np.min(ess, where=collapsed, initial=1.0))
    text = (
        f"The importance weights are worth {least * num_chains:.1f} of {num_chains} "
        f"chains ({least:.2g}) at {_levels(collapsed)}. Try levels evenly spaced in "
        "log-SNR (cp.Schedule.log_snr), more levels, more chains, or "
        "weights='feynman_kac' where the factors are learned."
    )
    return [(Code.WEIGHTS_COLLAPSED, text)]


def not_conservative(curl: Mapping[str, float]) -> Findings:
    """The finding that scores are not gradients, by the relative curl of the factors
    whose score a line integral relied on."""
    ceiling = tuning.FINDINGS.curl_ceiling
    listed = ", ".join(
        f"{name} (relative curl {value:.2g})"
        for name, value in curl.items()
        if value > ceiling
    )
    if not listed:
        return []
    text = (
        f"Not the gradient of any log-density: the score of {listed}. A relative curl "
        f"up to {ceiling:g} is accepted. A line integral of this score depends on its "
        "path, so the Metropolis test targets no distribution. Train that model longer "
        "or with an energy parameterization, or use a kernel without a test: cp.ULA, "
        "cp.UHMC, or cp.SMC with kernel=None."
    )
    return [(Code.NOT_CONSERVATIVE, text)]


def nan_likelihood(observed: Sequence[str]) -> str:
    """A remark on observations whose likelihood is NaN where proposals were rejected;
    empty where there are none."""
    if not observed:
        return ""
    return (
        f" The likelihood of {', '.join(map(repr, observed))} is NaN near the chains: "
        "look for a scale of it that depends on a latent and is 0 or negative there, "
        "and write jnp.exp(s) or jax.nn.softplus(s) for s."
    )


def untrained_divisors(factors: Sequence[str]) -> Findings:
    """The finding that withholds errors where a program divides by networks at samples
    on which they were not trained."""
    if not factors:
        return []
    text = (
        f"Weights and steps treat {', '.join(factors)} as distributions under noise. "
        "Networks are distributions only where they were trained (see "
        "OUT_OF_TRAINING): mode proportions and means may be far off, and no error is "
        "given."
    )
    return [(Code.NETWORK_DOUBTED, text)]


def least_effective_ancestors(num_chains: int) -> float:
    """Effective number of ancestors below which a population of N chains is abandoned,
    and no error of it is stated."""
    # Three degrees of freedom, or what few chains can have.
    least = min(tuning.ERRORS.fewest_ancestors + 1, num_chains / 8)
    return max(least, min(tuning.ERRORS.fewest_families, num_chains / 16))


def few_ancestors(
    worth: float, distinct: float, num_chains: int, ends: bool
) -> Findings:
    """The finding that the N chains of a run that ``ends`` have too few ancestors for
    errors to be stated.

    Args:
        worth: number of independent chains that they are worth, by
            `effective_chains_bound`.
        distinct: number of distinct ancestors.
        num_chains: N.
        ends: whether the chains are at level 0.
    """
    if not ends or worth >= least_effective_ancestors(num_chains):
        return []
    text = (
        f"After resampling, the {num_chains} chains have {distinct:.0f} distinct "
        f"ancestors (effective number {worth:.1f}): mode proportions are as uncertain "
        "as with so few chains, and no standard error is given. Try more chains, more "
        "levels, steps_per_level=3 or more, or weights that differ less "
        "(anneal='moments' or 'denoised' for observations); cp.ReplicaExchange; or "
        "cp.AnnealedMCMC, whose chains are independent."
    )
    return [(Code.ANCESTORS_COLLAPSED, text)]


def few_chains(
    worth: float,
    num_chains: int,
    ess: Float[np.ndarray, " levels"],
    log_snr: Float[np.ndarray, " levels"],
) -> Findings:
    """A remark on a run without problems if fewer than half of its N chains count, with
    the levels where they were lost.

    A level of relative effective size e, resampled or not, adds 1/e less that of the
    level before, or 1 if resampled, to the relative variance of the weights. ``ess``
    and ``log_snr`` are ordered from the least noise upwards.
    """
    if not worth < num_chains / 2:
        return []
    text = (
        f"No problem was found. The {num_chains:,} chains are worth {worth:,.0f} "
        "independent ones; the errors account for this."
    )
    spread = 1 / np.clip(np.nan_to_num(np.asarray(ess, float), nan=1.0), 1e-12, 1.0)
    before = np.append(spread[1:], 1.0)
    # A level that was resampled starts again from equal weights.
    lost = np.maximum(spread - np.where(before > spread, 1.0, before), 0.0)
    if lost.sum() > 0.5:
        shares = np.cumsum(lost) / lost.sum()
        high, low = np.interp([0.1, 0.9], shares, log_snr)
        text += (
            f" Most of the others were lost between log-SNR {low:.2g} and {high:.2g}, "
            "where single steps make the weights uneven: the longer a step is, the "
            "less closely it follows the program, most of all where chains separate "
            "into modes. More levels keep more chains: compile with twice the "
            f"{len(ess)} (schedule=)."
        )
    return [(Code.OK, text)]


def impossible_data(
    log_likelihood: Float[np.ndarray, " chains"], numbers: int
) -> Findings:
    """The finding that chains are where the data are all but impossible.

    At most a share L/Z of the posterior, Z = E_prior[L], is where the likelihood is at
    most L. Numbers of precision eps tell −log eps nats each, so that the best chain's
    log L is above log Z by that times ``numbers`` at most, those sampled or measured,
    whichever are fewer: points twice as far below it have no share.
    """
    below = np.nanmax(log_likelihood, initial=-np.inf) - log_likelihood
    off = below > 2 * numbers * -np.log(np.finfo(np.float32).eps)
    if not off.any():
        return []
    text = (
        f"{off.mean():.2%} of the chains are where the data are all but impossible, "
        f"{below[off].min():.0f} nats or more of log-likelihood below the best chain: "
        "noisier levels led them there, and they cannot leave. Their samples belong to "
        "no posterior; leave them out. Try more chains, so that SMC gives such chains "
        "no weight, or more levels."
    )
    return [(Code.ZERO_DENSITY, text)]


def erratic_weights(variance: Float[np.ndarray, " levels"]) -> Findings:
    """The finding that the weight increments of one step differ too much.

    A step whose increments have relative variance v, NaN where there was none, has the
    conditional effective sample size 1/(1 + v) (Zhou, Johansen and Aston 2016).
    """
    effective = 1 / (1 + np.asarray(variance, float))
    erratic = effective < tuning.FINDINGS.ess_floor
    if not erratic.any():
        return []
    text = (
        "The weight increments of a single step differ so much that only "
        f"{np.nanmin(effective):.2g} of the chains count, at {_levels(erratic)}: a "
        "factor changes over a shorter distance than the step is long, and the "
        "log-evidence comes out too low. Compile with many more levels, widen the "
        "sharp factor, or try anneal='tempered'."
    )
    return [(Code.WEIGHTS_COLLAPSED, text)]


def not_converged(drift: float) -> Findings:
    """The finding that the warm-up at level 0 ended while the chains still drifted."""
    if drift == 0.0:
        return []
    text = (
        "The warm-up at level 0 ended while the population still drifted: its last "
        "block changed a mean or a width, or left latents correlated with their "
        f"earlier values, by {drift:.2g} standard deviations. Go on with draws=, or "
        "try a smoother parameterization of the latents, such as a log-normal scale."
    )
    return [(Code.UNSETTLED, text)]


def few_levels(error: float) -> Findings:
    """The finding that the levels are too far apart for the evidence, by its
    discretisation error in nats."""
    if not error > tuning.FINDINGS.levels_error:
        return []
    text = (
        f"The discretisation error of log Z is about {error:.2g} (estimated by using "
        "every other level). Compile with more levels (schedule=)."
    )
    return [(Code.LEVELS_TOO_FEW, text)]


def fine_data(lost: float, log_snr: float, num_levels: int) -> Findings:
    """The finding that data are finer than level 0, of this log-SNR.

    Its noise once more, σ/α, takes ½·(σ/α)²/s² nats of log-likelihood, ``lost``, from
    each measured number of an instrument whose noise is s.
    """
    if not lost > 0.5:
        return []
    highest = math.ceil(log_snr + math.log(8 * lost))
    text = (
        "The data are finer than level 0: noise of its size, "
        f"{math.exp(-log_snr / 2):.2g}, takes {lost:.3g} nats of log-likelihood from "
        "each measured number, so that few of the chains that step there reach the "
        "data. End the levels at less noise, as "
        f"cp.Schedule.log_snr({num_levels}, max={highest}), or give the data noise of "
        "that size, which samples have anyway."
    )
    return [(Code.LEVELS_TOO_FEW, text)]


def _levels(mask: Sequence[bool] | np.ndarray) -> str:
    """``level 3`` or ``levels 0–4, 9`` for a boolean mask over levels."""
    index = np.flatnonzero(mask)
    runs = np.split(index, np.flatnonzero(np.diff(index) > 1) + 1)
    ranges = []
    for run in runs:
        if len(run) == 1:
            ranges.append(str(run[0]))
        elif len(run):
            ranges.append(f"{run[0]}–{run[-1]}")
    if len(ranges) > 6:
        ranges = [*ranges[:5], f"… ({len(index)} levels in all)"]
    noun = "level" if len(index) == 1 else "levels"
    return f"{noun} {', '.join(ranges)}"
