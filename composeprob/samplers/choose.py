"""Which sampler to use when the user names none, and whether a sampler can be used at
all."""

from __future__ import annotations

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.points import lost_to_noise
from composeprob.errors import CapabilityError
from composeprob.kernels import HMC, MALA, Adaptive, Kernel
from composeprob.kernels.line_integral import bounded
from composeprob.samplers.finishers import Finisher, GlobalMoves, WarmUp, fewest_chains
from composeprob.samplers.hierarchy import Interweaving, interweaves
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import by_kind
from composeprob.samplers.sampler import SMC, AnnealedMCMC, Sampler
from composeprob.samplers.step import ReverseStep

ADVICE = {
    "energy": "use MALA or HMC with log_ratio=cp.LineIntegral() if that score is a gradient field, a kernel without a "
    "test (cp.ULA, cp.UHMC), or a model with an energy parameterization.",
    "feynman_kac": "use cp.AnnealedMCMC or, where all factors are analytic, cp.SMC(weights='density').",
    "mode_depth": "use weights='feynman_kac', which needs scores only: energies learned by score matching do not know "
    "how high separated modes are.",
    "score": "every factor needs a score.",
    "GlobalMoves": "leave cp.GlobalMoves out, as they compare densities between modes; or make the factor one that can "
    "be compared: cp.calibrate, or mode_depth=True if it is.",
}


TOGETHER = "latents move with what hangs on them; then a warm-up"
"""How a reason speaks of `Interweaving`."""


def by_score(samples: int, metric: str = "none") -> MALA:
    """A kernel for so many samples of densities that offer only their score."""
    return MALA(Adaptive(), log_ratio=bounded(samples), metric=metric)


def only_score(moved: str) -> str:
    """Why they are moved `by_score`."""
    return f"a factor offers only its score: a line integral of it corrects {moved}"


def choose(
    density: AnnealedDensity, num_chains: int, draws: int = 1
) -> tuple[Sampler, str]:
    """A sampler for this density, number of chains and of draws of each, and why it was
    chosen: `SMC` where weights can be trusted and chains are many enough. Where these
    leave too few of the chains, `infer` goes on to `patient` or `independent` ones.
    """
    energy, can = "energy" in density.capabilities, density.capabilities
    if energy and density.num_levels == 1:
        closings, then = closed_by(density, num_chains)
        sampler = AnnealedMCMC(
            HMC(Adaptive(warmup=200), num_leapfrog=8), 100, then=closings
        )
        return (
            sampler,
            f"one level only, so nothing anneals: HMC from the prior, tuned in a warm-up{then}",
        )
    comparable = {"energy", "mode_depth"} <= can
    many = tuning.MANY_CHAINS.compared if comparable else tuning.MANY_CHAINS.weighed
    if num_chains < many:
        return independent(density, f"fewer than {many} chains", num_chains, draws)
    closings, then = closed_by(density, num_chains, weighed=True)
    enough = f"{num_chains} chains are enough to resample"
    latents, together = (
        any(site.kind == "static" for site in density.sites.values()),
        interweaves(density),
    )
    if "feynman_kac" in can and (energy or together or not latents):
        why = f"{enough}, which keeps the modes' shares right"
        if energy:
            return SMC(then=closings), f"{why}; tuned MALA moves{then}"
        if together:
            return SMC(
                Interweaving(log_ratio=bounded(num_chains * draws)), then=(WarmUp(),)
            ), f"{why}; {TOGETHER}"
        return SMC(
            by_score(num_chains * draws, metric="auto")
        ), f"{why}; {only_score('its moves')}"
    if comparable:
        why = "no Feynman–Kac rate, but log-densities that can be trusted between modes"
        return SMC(weights="density", then=closings), f"{enough}; {why}{then}"
    return independent(density, "no weights can be trusted here", num_chains, draws)


def closed_by(
    density: AnnealedDensity, num_chains: int, weighed: bool = False
) -> tuple[tuple[Finisher, ...], str]:
    """What closes a default run at level 0, and how its reason says so: global moves
    where so many chains can fit what others accept, fewer of chains that are
    ``weighed`` on the way; a warm-up at the target where there are latents that HMC can
    move."""
    kinds, size = (
        {site.kind for site in density.sites.values()},
        Layout.of_density(density).size,
    )
    comparable = {"energy", "mode_depth"} <= density.capabilities
    closings: list[Finisher] = []
    then = ""
    if (
        comparable
        and size <= tuning.GLOBAL_MOVES.most_numbers
        and num_chains >= fewest_chains(size)
    ):
        moves = tuning.GLOBAL_MOVES
        closings.append(GlobalMoves(moves.of_weighed if weighed else moves.number))
        then = "; then global moves, which give modes their shares"
    if "energy" in density.capabilities and "static" in kinds and "held" not in kinds:
        closings.append(WarmUp())
        then += "; then a warm-up at level 0, as there are latents"
    return tuple(closings), then


def independent(
    density: AnnealedDensity, why: str, num_chains: int = 1, draws: int = 1
) -> tuple[Sampler, str]:
    """Chains that never weigh one another, and why these were chosen; with global
    moves, where so many can fit them."""
    step = ReverseStep(
        control="none"
    )  # of first order it leaves 0.85 of a variance, more than moves can mend
    if interweaves(density):
        together = Interweaving(log_ratio=bounded(num_chains * draws))
        sampler = AnnealedMCMC(together, 3, step, then=(WarmUp(),))
        return sampler, f"{why}: independent chains; {TOGETHER}"
    if "energy" in density.capabilities:
        closings, then = closed_by(density, num_chains)
        sampler = AnnealedMCMC(_hmc(density), 5, step, then=closings)
        return sampler, f"{why}: independent chains, corrected by HMC{then}"
    # Ring × bar of the zoo's scores, TV of the modes' shares: 0.02 with 3 points, 0.14
    # by five steps of ULA(0.1·σ²). On exact scores 0.02 and 0.10; with 2 points, or
    # along HMC's own trajectory, over 0.15.
    kernel = by_kind(lambda: by_score(num_chains * draws), density)
    # The step to level 0 leaves chains wider than the data are, and a few transitions
    # there do not narrow them.
    narrow = (
        all(site.kind == "noised" for site in density.sites.values())
        and lost_to_noise(density) > 0.5
    )
    then = (
        "; then a warm-up at level 0, as the data are finer than it is"
        if narrow
        else ""
    )
    sampler = AnnealedMCMC(kernel, 3, step, then=(WarmUp(),) if narrow else ())
    return sampler, f"{why}; {only_score('independent chains')}{then}"


def can_wait(density: AnnealedDensity) -> bool:
    """Whether `patient` chains may do what others cannot: log-densities can be
    compared, at levels of noise."""
    noised = any(site.kind == "noised" for site in density.sites.values())
    return (
        noised
        and density.num_levels > 1
        and {"energy", "mode_depth"} <= density.capabilities
    )


def without_data(density: AnnealedDensity) -> bool:
    """Whether a program is of factors alone, without observations and latents: where
    its weights are too uneven for `choose`'s levels, closer ones are the remedy."""
    return not density.observed() and all(
        site.kind == "noised" for site in density.sites.values()
    )


def patient(density: AnnealedDensity, why: str, num_chains: int) -> tuple[Sampler, str]:
    """Chains that weigh one another by log-densities that can be compared, on levels as
    close as these are, with so many transitions in all that they follow what the levels
    change; and why."""
    count = -(-tuning.PATIENT.transitions // density.num_levels)
    closings, then = closed_by(density, num_chains, weighed=True)
    reason = f"{why}: {density.num_levels} levels with {count} transitions of HMC at each, weighed by log-densities"
    return SMC(_hmc(density), count, weights="density", then=closings), reason + then


def _hmc(density: AnnealedDensity) -> Kernel:
    """HMC on all sites."""
    # Step sizes as unequal as that: a chain whose latents lie where the density is
    # steep would never leave, as the step that suits the others is too long for it. Of
    # 1,000 with a half-normal scale 25 stayed; 0 to 2 do now.
    return by_kind(
        lambda: HMC(Adaptive()), density, lambda: HMC(Adaptive(), jitter=0.9)
    )


def check_capabilities(sampler: Sampler, density: AnnealedDensity) -> None:
    """Refuse a sampler that needs what the density does not offer, naming the factor
    that lacks it, before anything is compiled."""
    held = ", ".join(
        repr(name) for name, site in density.sites.items() if site.kind == "held"
    )
    for who, needed in sampler.requires.items():
        for capability in sorted(needed - density.capabilities):
            if held and capability in ("feynman_kac", "mode_depth"):
                raise CapabilityError(
                    f"{who} weighs chains against one another, but the normaliser of a factor depends on {held}, so "
                    "that their weights cannot be compared.",
                    where=density.described.where,
                    fix=f"use cp.AnnealedMCMC, whose chains are independent and hold {held} at its prior draw.",
                )
            where, found = (
                density.described.where,
                f"{who} needs a Feynman–Kac rate, which this program does not have",
            )
            if capability != "feynman_kac":
                lacking = [
                    o for o in density.described.offers if capability not in o[2]
                ]
                name, where, offered = (
                    lacking[0] if lacking else ("?", where, frozenset())
                )
                has = ", ".join(f"`{c}`" for c in sorted(offered & {"score", "energy"}))
                found = (
                    f"{who} needs `{capability}`, but factor '{name}' offers only {has}"
                )
            raise CapabilityError(
                f"{found}.", where=where, fix=ADVICE.get(who, ADVICE.get(capability))
            )
