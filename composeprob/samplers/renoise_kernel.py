"""Renoising at every level: the kernel that `cp.Renoise` is among the moves of a
sampler."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Target
from composeprob.errors import CapabilityError
from composeprob.kernels import Adaptive, Info, Kernel, KernelState
from composeprob.kernels.gibbs import replaced
from composeprob.kernels.metropolis import log_density_ratio
from composeprob.kernels.step_size import StepSizeLike, as_step_size
from composeprob.samplers.layout import Layout
from composeprob.samplers.renoise import (
    Ladder,
    OneFactor,
    Renoising,
    accept,
    check_levels,
    check_noised,
    longest_step,
    one_factor,
)
from composeprob.schedule import Noise


class RenoiseKernel(Kernel[KernelState]):
    """One proposal from the level of a chain up to a turn and down again.

    The step size is the height of the turn above the level, in log-SNR. It adapts to
    the mean acceptance of all chains, and a transition has the same number of steps
    whatever it is. The target is the density of the level, with all its terms there.

    Attributes:
        within: the range of log-SNR where chains may turn; None for all.
        factor: the name of the factor whose reverse steps are made; None for those of
            the whole program.
    """

    sees_whole: ClassVar[bool] = True
    carries: ClassVar[bool] = False

    step_size: StepSizeLike = eqx.field(
        default_factory=lambda: Adaptive(initial=1.0), converter=as_step_size
    )
    within: tuple[float, float] | None = eqx.field(static=True, default=None)
    factor: str | None = eqx.field(static=True, default=None)
    # Resolved for a density: the number of steps up, whether log-densities decide, the
    # factor, and the noised entries that are moved.
    steps: int = eqx.field(static=True, default=tuning.RENOISE.steps)
    by_values: bool = eqx.field(static=True, default=True)
    guide: OneFactor | None = eqx.field(static=True, default=None)
    moves: Bool[Array, " dims"] | None = None
    # Set for one level by `under`.
    density: AnnealedDensity | None = None
    level: Int[Array, ""] | None = None

    optimal_acceptance = tuning.RENOISE.acceptance
    scale_exponent = 0
    requires = frozenset({"score"})

    def __repr__(self) -> str:
        settings = []
        if self.within is not None:
            settings.append(f"levels={self.within}")
        if self.factor is not None:
            settings.append(f"factor={self.factor!r}")
        return f"Renoise({', '.join(settings)})"

    @property
    def evaluations_per_step(self) -> int:
        # By scores the start is evaluated with its terms. One factor's steps end where
        # the program is evaluated; by scores it is asked of their start, too.
        beside = int(not self.by_values)
        if self.guide is not None:
            beside += 1 + (not self.by_values)
        return 2 * self.steps + beside

    @property
    def longest(self) -> float:
        """The greatest height of a turn."""
        if self.by_values:
            return tuning.RENOISE.highest
        return self.steps * tuning.RENOISE.spacing_by_score

    def resolved(
        self, sites: tuple[str, ...], density: AnnealedDensity
    ) -> RenoiseKernel:
        check_noised(density)
        check_levels(density, self.within)
        by_values = longest_step(density) == tuning.RENOISE.spacing
        guide = one_factor(density, self.factor, above=True)
        self._check_block(sites, density, guide, by_values)
        layout = Layout.of_density(density)
        moved = layout.entries(sites)
        if guide is not None:
            moved = layout.entries((guide.site,))
        steps = tuning.RENOISE.steps
        if not by_values:
            steps = tuning.RENOISE.steps_by_score
        moves = np.isin(np.arange(layout.dims), moved)
        return replaced(
            self,
            steps=steps,
            by_values=by_values,
            guide=guide,
            moves=jnp.asarray(moves),
        )

    def _check_block(
        self,
        sites: tuple[str, ...],
        density: AnnealedDensity,
        guide: OneFactor | None,
        by_values: bool,
    ) -> None:
        """Refuse a block with latents, without the site of the one factor, or, by
        scores alone, without all noised sites."""
        where = density.described.where
        latents = [name for name in sites if density.sites[name].kind != "noised"]
        if latents:
            noised = [n for n, site in density.sites.items() if site.kind == "noised"]
            raise CapabilityError(
                f"cp.Renoise moves noised sites, and {latents[0]!r} is a latent of "
                "NumPyro's.",
                where=where,
                fix=f"give each a kernel: cp.Gibbs({{{noised[0]!r}: cp.Renoise(), "
                f"{latents[0]!r}: cp.HMC()}}).",
            )
        if guide is not None and guide.site not in sites:
            raise CapabilityError(
                f"cp.Renoise(factor={self.factor!r}) moves {guide.site!r}, and its "
                f"block has {', '.join(map(repr, sites))}.",
                where=where,
                fix=f"give {guide.site!r} this kernel.",
            )
        layout = Layout.of_density(density)
        partial = len(layout.entries(sites)) < layout.dims
        if guide is None and not by_values and partial:
            raise CapabilityError(
                "By scores alone cp.Renoise moves all noised sites together, and its "
                f"block has only {', '.join(map(repr, sites))}.",
                where=where,
                fix="put all noised sites into its block.",
            )

    def under(self, density: AnnealedDensity, noise: Noise) -> RenoiseKernel:
        return replaced(self, density=density, level=noise.index)

    def ladder(self, height: Float[Array, ""]) -> Ladder:
        """Return the rungs from the level up to a turn of about this height, at levels
        of about the same distance; some may be one level where there are fewer."""
        assert self.density is not None
        assert self.level is not None
        log_snr = jnp.asarray(self.density.schedule.log_snr)
        here = log_snr[self.level]
        allowed = jnp.arange(len(log_snr)) > self.level
        if self.within is not None:
            allowed &= (log_snr >= min(self.within)) & (log_snr <= max(self.within))
        away = jnp.abs(here - height - log_snr)
        turn = jnp.argmin(jnp.where(allowed, away, jnp.inf))
        # At the noisiest level, and above the range, chains stay.
        turn = jnp.where(jnp.any(allowed), turn, self.level)
        places = jnp.linspace(here, log_snr[turn], self.steps + 1)
        rungs = jnp.argmin(jnp.abs(log_snr[:, None] - places), axis=0)
        ends = rungs.at[0].set(self.level).at[-1].set(turn)
        return Ladder(
            levels=jnp.clip(ends, self.level, turn),
            narrowing=None,
            turns=jnp.zeros((0,), jnp.int32),
            renews=jnp.zeros((self.steps + 1,)),
        )

    def step(
        self,
        key: Key[Array, ""],
        state: KernelState,
        target: Target,
        step_size: Array,
    ) -> tuple[KernelState, Info]:
        assert self.density is not None
        ((name, v),) = state.position.items()
        renoising = Renoising(
            self.density,
            Layout.of_density(self.density),
            self.ladder(step_size),
            self.guide,
            self.moves,
        )
        words = jax.random.bits(key, (2,), jnp.uint32)
        # The block is the whole vector of a chain, and its terms the whole evaluation.
        whole: Evaluation = state.evaluation.terms
        start = KernelState(v, whole)
        if not self.by_values:
            start = renoising.state(v)
        excursion = renoising.excursion(words, start, jnp.int32(self.steps))
        proposed = excursion.state
        bare = KernelState(v, whole.without_terms)
        proposal = KernelState(proposed.position, proposed.evaluation.without_terms)
        log_target_ratio = jnp.asarray(jnp.nan)
        if self.by_values:
            log_target_ratio = log_density_ratio(proposal, bare)
            log_ratio = log_target_ratio + excursion.log_steps
        else:
            log_quotient = renoising.log_quotient(start, excursion)
            log_ratio = log_quotient + renoising.log_rest(start, proposed)
        _, info = accept(words, proposal, bare, log_ratio, log_target_ratio)
        there = KernelState(
            {name: proposed.position},
            _of_block(name, proposed.evaluation, whole),
        )
        moved: KernelState = jax.tree.map(
            lambda new, old: jnp.where(info.accepted, new, old), there, state
        )
        return moved, info


def _of_block(name: str, proposed: Evaluation, like: Evaluation) -> Evaluation:
    """Return an evaluation as that of the block of all entries, with the terms that the
    chain's has."""
    if like.terms is None:
        proposed = proposed.without_terms
    gradients = ({name: gradient} for gradient in proposed.gradients)
    return dataclasses.replace(proposed.with_gradients(gradients), terms=proposed)
