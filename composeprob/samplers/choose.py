"""Default samplers, where the user names none, and the check whether a sampler can be
used at all."""

from __future__ import annotations

from typing import NamedTuple

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import (
    CategoricalDensity,
    TokenDensity,
    UniformDensity,
)
from composeprob.density.points import lost_to_noise
from composeprob.errors import CapabilityError
from composeprob.kernels import HMC, MALA, Adaptive, Kernel
from composeprob.kernels.line_integral import bounded
from composeprob.samplers.finishers import (
    Finisher,
    GlobalMoves,
    Relaxation,
    WarmUp,
)
from composeprob.samplers.funnels import FunnelMoves
from composeprob.samplers.hierarchy import (
    InBothCoordinates,
    Interweaving,
    NonCentred,
    ShortAndLong,
    has_dependents,
    interweaves,
    is_non_centred,
)
from composeprob.samplers.layout import Layout
from composeprob.samplers.leaping import TauLeaping
from composeprob.samplers.moves import by_kind
from composeprob.samplers.reveal import Reveal
from composeprob.samplers.sampler import SMC, AnnealedMCMC, Sampler
from composeprob.samplers.step import ReverseStep

ADVICE = {
    "energy": "use MALA or HMC with log_ratio=cp.LineIntegral() if that score is a "
    "gradient field, a kernel without a test (cp.ULA, cp.UHMC), or a model with an "
    "energy parameterization.",
    "feynman_kac": "use cp.AnnealedMCMC or, where all factors are analytic, "
    "cp.SMC(weights='density').",
    "mode_depth": "use weights='feynman_kac', which needs scores only: energies "
    "learned by score matching do not know how high separated modes are.",
    "score": "every factor needs a score.",
    "categorical": "leave sampler= out, or use cp.SMC: reveals are for programs of "
    "tokens.",
    "uniform_noise": "leave sampler= out, or use cp.SMC: leaps are for programs of "
    "tokens under uniform noise.",
    "GlobalMoves": "leave cp.GlobalMoves out, as they compare densities between modes; "
    "or make the factor one that can be compared: cp.calibrate, or mode_depth=True if "
    "it is.",
}
"""Fixes for a missing capability, or for the part of a sampler that needs it."""

TOGETHER = "latents and their members move together; then a warm-up"
"""Words of a reason for `Interweaving`."""


class Finish(NamedTuple):
    """Finishers of a default run, and the words for them in its reason."""

    finishers: tuple[Finisher, ...]
    then: str


def kernel_by_scores(samples: int, metric: str = "none") -> MALA:
    """Return the default kernel for densities that offer only their score, for this
    number of samples."""
    return MALA(Adaptive(), log_ratio=bounded(samples), metric=metric)


def reason_of_line_integrals(moved: str) -> str:
    """Return the reason for a kernel of line integrals."""
    return f"a factor offers only its score: a line integral of it corrects {moved}"


def choose(
    density: AnnealedDensity, num_chains: int, draws: int | None = None
) -> tuple[Sampler, str]:
    """Return a sampler for this density, number of chains and draws of each at level 0,
    if there are to be any, and the reason: `SMC` where weights can be trusted and
    chains are many enough.

    Where weights leave too few effective chains, `infer` goes on to `patient` or
    `independent` ones.
    """
    if isinstance(density, TokenDensity):
        return of_tokens(density)
    capabilities = density.capabilities
    energy = "energy" in capabilities
    if energy and density.num_levels == 1:
        return _at_one_level(density, num_chains)
    comparable = density.comparable_modes
    fewest = tuning.MANY_CHAINS.weighed
    if tracks_alone(density):
        fewest = tuning.MANY_CHAINS.tracked
    if comparable:
        fewest = tuning.MANY_CHAINS.compared
    if num_chains < fewest:
        why = f"fewer than {fewest} chains"
        return independent(density, why, num_chains, draws or 1)
    enough = f"{num_chains} chains are enough to resample"
    finishers, then = closed_by(density, num_chains, weighed=True)
    kinds = {site.kind for site in density.sites.values()}
    latents = bool(kinds & {"static", "discrete"})
    together = interweaves(density)
    if "feynman_kac" in capabilities and (energy or together or not latents):
        why = f"{enough}, which keeps the modes' shares right"
        if energy:
            return SMC(then=finishers), f"{why}; tuned MALA moves{then}"
        sampler, then = _smc_by_scores(density, num_chains, draws)
        return sampler, f"{why}; {then}"
    if comparable:
        why = "no Feynman–Kac rate, but log-densities that can be trusted between modes"
        return SMC(weights="density", then=finishers), f"{enough}; {why}{then}"
    reason = "no weights can be trusted here"
    return independent(density, reason, num_chains, draws or 1)


def _smc_by_scores(
    density: AnnealedDensity, num_chains: int, draws: int | None
) -> tuple[Sampler, str]:
    """Return `SMC` of a density that offers only its score, and the words for its
    moves."""
    if steps_suffice(density) and draws is None:
        if not density.tracks:
            return SMC(), "reverse steps alone, which the weights correct"
        # A move across a valley whose integral misses a narrow mode would carry the
        # height of that mode to another.
        return SMC(), "reverse steps alone, along which log f is tracked"
    samples = num_chains * (draws or 1)
    if interweaves(density):
        together = Interweaving(log_ratio=bounded(samples))
        return SMC(together, then=_finishers_of_hierarchy(density)), TOGETHER
    kernel = kernel_by_scores(samples, metric="auto")
    return SMC(kernel), reason_of_line_integrals("its moves")


def _finishers_of_hierarchy(density: AnnealedDensity) -> tuple[Finisher, ...]:
    """Return the finishers of runs that move latents together with their members."""
    if FunnelMoves.suits(density):
        return WarmUp(), FunnelMoves()
    return (WarmUp(),)


def of_tokens(density: TokenDensity) -> tuple[Sampler, str]:
    """Return the sampler of a program of tokens, and the reason for its moves."""
    if isinstance(density, UniformDensity):
        return leaps(density)
    assert isinstance(density, CategoricalDensity)
    return reveals(density)


def reveals(density: CategoricalDensity) -> tuple[Sampler, str]:
    """Return the reveals of a program of tokens, and the reason for their redraws."""
    why = "tokens become visible one by one, with weights that are exact"
    if density.in_blocks and not density.one_joint:
        why = "tokens become visible in blocks, with the weights of these"
        return Reveal(0, 0), f"{why}; none is drawn anew, as their order matters"
    if density.one_joint:
        return Reveal(), f"{why}; Gibbs moves draw visible ones anew"
    if density.tokens.path_evaluations > 1:
        text = "single ones are not, as that takes an evaluation for every place"
        why = f"{why}; several are drawn anew at level 0, with a test"
        return Reveal(0), f"{why} ({text} of the order)"
    return Reveal(), f"{why}; visible ones are drawn anew, with a test of the order"


def leaps(density: UniformDensity) -> tuple[Sampler, str]:
    """Return the leaps of a program of tokens under uniform noise, and the reason for
    their weights."""
    why = "all tokens leap from level to level, with weights"
    if density.one_joint:
        return TauLeaping(), f"{why} that are exact; Gibbs moves draw single ones anew"
    carried = "of the ratios of networks along each path"
    return TauLeaping(), f"{why} {carried}; single ones are drawn anew, with a test"


def _at_one_level(density: AnnealedDensity, num_chains: int) -> tuple[Sampler, str]:
    """Return chains that start at the prior, where there are no levels to anneal."""
    finishers, then = closed_by(density, num_chains)
    tuned = Adaptive(warmup=200)
    kernel: Kernel = HMC(tuned, num_leapfrog=8)
    moved = "HMC"
    if has_dependents(density):
        # Half of the evaluations in either coordinates. A chain that starts where the
        # density is steep needs shorter steps than the others.
        centred: Kernel = ShortAndLong(tuned, num_leapfrog=4, jitter=0.9)
        others: Kernel = NonCentred(tuned, num_leapfrog=4, jitter=0.9)
        if is_non_centred(density):
            centred = NonCentred(tuned, num_leapfrog=4, jitter=0.9, inner=ShortAndLong)
            others = HMC(tuned, num_leapfrog=4, jitter=0.9)
        kernel = InBothCoordinates(centred, others, density)
        moved = "HMC in centred and non-centred coordinates in turn"
    why = (
        f"one level only, so nothing anneals: {moved} from the prior, tuned in a "
        "warm-up"
    )
    reason = why + then
    kinds = {site.kind for site in density.sites.values()}
    if kinds == {"static"}:
        # A trajectory that turns by itself suits one long chain better than these do.
        reason += (
            "; no factor is a diffusion model, so NumPyro's NUTS fits as well: "
            "density.to_numpyro()"
        )
    return AnnealedMCMC(kernel, 100, then=finishers), reason


def closed_by(
    density: AnnealedDensity, num_chains: int, weighed: bool = False
) -> Finish:
    """Return the finishers of a default run, and the words for them in its reason.

    Global moves where so many chains can fit what others accept, fewer of chains that
    are ``weighed`` on the way; a warm-up at the target where there are latents that HMC
    can move; moves into the necks of funnels.
    """
    kinds = {site.kind for site in density.sites.values()}
    finishers: list[Finisher] = []
    then = ""
    across = None
    if GlobalMoves.suits(density, num_chains):
        number = tuning.GLOBAL_MOVES.number
        if weighed:
            number = tuning.GLOBAL_MOVES.of_weighed
        across = GlobalMoves(number)
        finishers.append(across)
        then = "; then global moves, which give modes their shares"
    latents = kinds & {"static", "discrete"}
    if "energy" in density.capabilities and latents and "held" not in kinds:
        if across is not None and density.num_levels == 1:
            # Nothing else gives modes their shares where there are no levels.
            finishers = [WarmUp(across)]
            then += " and take turns with a warm-up at level 0, as there are latents"
        else:
            finishers.append(WarmUp())
            then += "; then a warm-up at level 0, as there are latents"
    elif weighed and "held" not in kinds and learned_energy(density):
        finishers.append(Relaxation())
        then += (
            "; then moves at level 0 until Stein's identity holds there, as energies "
            "are learned"
        )
    if FunnelMoves.suits(density) and (latents or not learned_energy(density)):
        finishers.append(FunnelMoves())  # says by itself where it is needed
    return Finish(tuple(finishers), then)


def learned_energy(density: AnnealedDensity) -> bool:
    """Return whether a factor is an energy that was learned, whose level 0 need not be
    the limit of its noisier levels."""
    trained = any(expert.trained for expert in density.described.experts)
    return trained and "energy" in density.capabilities


def independent(
    density: AnnealedDensity, why: str, num_chains: int = 1, draws: int = 1
) -> tuple[Sampler, str]:
    """Return independent chains, without weights, and the reason; with global moves,
    where so many chains can fit them."""
    # Of second order: a step of first order leaves 0.85 of a variance, more than moves
    # can correct.
    step = ReverseStep(control="none")
    if interweaves(density):
        together = Interweaving(log_ratio=bounded(num_chains * draws))
        sampler = AnnealedMCMC(together, 3, step, then=_finishers_of_hierarchy(density))
        return sampler, f"{why}: independent chains; {TOGETHER}"
    if "energy" in density.capabilities:
        finishers, then = closed_by(density, num_chains)
        count = tuning.INDEPENDENT.transitions
        if one_transition_suffices(density, num_chains * draws):
            count = tuning.INDEPENDENT.of_few
        sampler = AnnealedMCMC(_hmc(density), count, step, then=finishers)
        return sampler, f"{why}: independent chains, corrected by HMC{then}"
    # Ring × bar of the zoo's scores, TV of the modes' shares: 0.02 with 3 points, 0.14
    # by five steps of ULA(0.1·σ²). On exact scores 0.02 and 0.10; with 2 points, or
    # along HMC's own trajectory, over 0.15.
    kernel = by_kind(lambda: kernel_by_scores(num_chains * draws), density)
    # The step to level 0 leaves chains wider than the data are, and a few transitions
    # there do not narrow them.
    noised_only = all(site.kind == "noised" for site in density.sites.values())
    finishers, then = Finish((), "")
    if noised_only and lost_to_noise(density) > 0.5:
        finishers = (WarmUp(),)
        then = "; then a warm-up at level 0, as the data are finer than it is"
    sampler = AnnealedMCMC(kernel, 3, step, then=finishers)
    return sampler, f"{why}; {reason_of_line_integrals('independent chains')}{then}"


def one_transition_suffices(density: AnnealedDensity, samples: int) -> bool:
    """Return whether one transition of HMC at each level is enough: so few samples hide
    what it leaves uncorrected, in programs of learned factors alone.

    Closed forms are not among them: where proportions lack support, `patient` chains
    follow, which cost more than the transitions.
    """
    if density.comparable_modes or density.graph.observations:
        return False
    return samples < tuning.MANY_CHAINS.weighed and without_data(density)


def can_wait(density: AnnealedDensity) -> bool:
    """Return whether `patient` chains are possible: log-densities can be compared
    between modes, and there are levels of noise."""
    noised = any(site.kind == "noised" for site in density.sites.values())
    return noised and density.num_levels > 1 and density.comparable_modes


def without_data(density: AnnealedDensity) -> bool:
    """Return whether a program has factors alone, without measurements and latents;
    log-weights of `cp.factor` count as factors.

    If its weights are too uneven on `choose`'s levels, closer levels are the remedy.
    """
    noised_only = all(site.kind == "noised" for site in density.sites.values())
    return not density.observed() and noised_only


def steps_suffice(density: AnnealedDensity) -> bool:
    """Return whether weighted reverse steps by scores need no moves beside them: in
    programs of factors alone, of few numbers, without soft evidence.

    Line integrals along moves cost twice the evaluations of such steps, and lead chains
    where an error of a network at level 0 leads. Where the weights leave too few
    ancestors, independent chains follow, which are moved.
    """
    if tracks_alone(density):
        return True
    few = Layout.of_density(density).size <= tuning.TRACKING.most_numbers
    return few and without_data(density) and not density.graph.observations


def tracks_alone(density: AnnealedDensity) -> bool:
    """Return whether chains carry log-densities in a program of factors alone.

    Independent chains, which carry none, are no remedy for uneven weights there.
    """
    return density.tracks and without_data(density)


def patient(density: AnnealedDensity, why: str, num_chains: int) -> tuple[Sampler, str]:
    """Return chains weighted by log-densities, on levels as close as these are, and the
    reason. They make so many transitions in all that they follow what the levels
    change."""
    count = -(-tuning.PATIENT.transitions // density.num_levels)
    finishers, then = closed_by(density, num_chains, weighed=True)
    reason = (
        f"{why}: {density.num_levels} levels with {count} transitions of HMC at each, "
        "weighted by log-densities"
    )
    sampler = SMC(_hmc(density), count, weights="density", then=finishers)
    return sampler, reason + then


def _hmc(density: AnnealedDensity) -> Kernel:
    """Return HMC on all sites."""
    # Step sizes as unequal as that: a chain whose latents lie where the density is
    # steep would never leave, as the step that suits the others is too long for it. Of
    # 1,000 with a half-normal scale 25 stayed; 0 to 2 do now.
    return by_kind(
        lambda: HMC(Adaptive()), density, lambda: HMC(Adaptive(), jitter=0.9)
    )


def check_capabilities(sampler: Sampler, density: AnnealedDensity) -> None:
    """Refuse a sampler that needs a capability which the density lacks, and name the
    factor without it; nothing is compiled yet."""
    for part, needed in sampler.requires.items():
        for capability in sorted(needed - density.capabilities):
            raise _missing(part, capability, density)


def _missing(part: str, capability: str, density: AnnealedDensity) -> CapabilityError:
    """Return the error for a part of a sampler that needs a missing capability."""
    where = density.described.where
    if isinstance(density, TokenDensity):
        found = f"{part} moves numbers, and this program's sites have tokens"
        fix: str | None = "leave sampler= out, or use cp.Reveal()."
        if part == "Reveal":
            found = "Reveal makes hidden tokens visible, and this program replaces them"
        if isinstance(density, UniformDensity):
            fix = "leave sampler= out, or use cp.TauLeaping()."
        elif part == "TauLeaping":
            found = "TauLeaping moves replaced tokens, and this program hides them"
        return CapabilityError(f"{found}.", where=where, fix=fix)
    held = [name for name, site in density.sites.items() if site.kind == "held"]
    if held and capability in ("feynman_kac", "mode_depth"):
        names = ", ".join(map(repr, held))
        return CapabilityError(
            f"{part} compares chains by importance weights, but the normaliser of a "
            f"factor depends on {names}, so that their weights cannot be compared.",
            where=where,
            fix="use cp.AnnealedMCMC, whose chains are independent and hold "
            f"{names} at its prior draw.",
        )
    problem = f"{part} needs a Feynman–Kac rate, which this program does not have"
    if capability != "feynman_kac":
        name = "?"
        offered: frozenset[str] = frozenset()
        lacking = [o for o in density.described.offers if capability not in o[2]]
        if lacking:
            name, where, offered = lacking[0]
        has = ", ".join(f"`{c}`" for c in sorted(offered & {"score", "energy"}))
        problem = f"{part} needs `{capability}`, but factor '{name}' offers only {has}"
    fix = ADVICE.get(part, ADVICE.get(capability))
    return CapabilityError(f"{problem}.", where=where, fix=fix)
