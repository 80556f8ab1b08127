"""The baseline: reverse diffusion along the composed score."""

from __future__ import annotations

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.kernels.step_size import as_scalar
from composeprob.pytree import all_finite
from composeprob.samplers.base import Route, Run, Sampler, draw_initial, level_keys
from composeprob.samplers.reverse import log_ratio_of_leaning, reverse_step
from composeprob.samplers.weights import feynman_kac_weight


class Ancestral(Sampler):
    """Reverse diffusion of the composed score: K − 1 evaluations, and the wrong law for products.

    The score of the noised product is not the sum of the noised scores, so this samples something else than the
    program's density; it is the baseline that the other samplers mend (Du et al. 2023, section 3).

    Args:
        eta: η in [0, 1]; 1 is DDPM's ancestral sampling, 0 deterministic DDIM.

    Raises:
        InvalidValueError: η outside [0, 1].

    References:
        Ho et al. 2020, *Denoising Diffusion Probabilistic Models*; Song, Meng and Ermon 2021 (DDIM).
    """

    eta: Array = eqx.field(default=1.0, converter=partial(as_scalar, what="Ancestral(eta=)"))

    def __check_init__(self) -> None:
        if not isinstance(self.eta, jax.core.Tracer) and not bool(jnp.all((self.eta >= 0) & (self.eta <= 1))):
            raise InvalidValueError(f"Ancestral's eta must lie in [0, 1]; got {self.eta}.", fix="1 is DDPM, 0 is DDIM.")

    @property
    def requires(self) -> dict[str, frozenset[str]]:
        return {"Ancestral": frozenset({"score"})}

    def prepare(self, density: AnnealedDensity) -> Ancestral:
        static = [name for name, site in density.sites.items() if site.kind == "static"]
        if static:
            raise CapabilityError(
                f"Ancestral moves only noised sites, but {', '.join(map(repr, static))} is a NumPyro latent.",
                where=density.described.where,
                fix="use cp.AnnealedMCMC or cp.SMC, which move all sites.",
            )
        return self

    def route(self, density: AnnealedDensity) -> Route:
        if float(self.eta) != 1.0:
            raise InvalidValueError(
                f"Ancestral(eta={float(self.eta):.3g}) has no likelihood that is known; eta=1 has.",
                fix="use cp.Ancestral(eta=1.0): its steps are DDPM's, whose reversal adds noise.",
            )
        return Route(reverse=True)

    def first_level(self, density: AnnealedDensity) -> int:
        return density.num_levels - 1

    def evaluations(self, first_level: int, completed: int) -> int:
        return max(completed - 1, 0)

    def proposals(self) -> int:
        return 1

    def start(self, run: Run, density: AnnealedDensity, level: int) -> Run:
        return eqx.tree_at(lambda r: r.chains, run, draw_initial(run, density, level), is_leaf=lambda x: x is None)

    def visit(self, run: Run, density: AnnealedDensity, level: Array, above: Array) -> Run:
        def move(key: Array, position: dict[str, Array]) -> tuple[dict[str, Array], Array, Array]:
            evaluation = density.evaluator(position, above)
            moved = reverse_step(key, position, evaluation.score, density, above, self.eta, level)
            gain = path_gain(position, evaluation, moved, density, level, above) if weighs else jnp.zeros(())
            return moved, gain, ~all_finite(evaluation.score)

        weighs = "feynman_kac" in density.capabilities
        moved, gain, bad = jax.lax.cond(  # the first level is where the draws already are
            level < above,
            lambda positions: run.spread.map(move, level_keys(run.keys, level), positions),
            lambda positions: (positions, jnp.zeros(run.keys.shape), jnp.zeros(run.keys.shape, bool)),
            run.chains,
        )
        gain = jnp.where(self.eta == 1, gain, 0.0)  # the weights are those of DDPM's steps
        run = dataclasses.replace(run, chains=moved, path_weights=run.path_weights + gain)
        return run.counting(level, run.spread.total(bad.astype(jnp.int32)))

    def positions(self, run: Run) -> dict[str, Array]:
        return run.chains

    def describe(self) -> str:
        return f"Ancestral(eta={float(self.eta):.3g})"


def path_gain(
    position: Position, evaluation: Evaluation, moved: Position, density: AnnealedDensity, level: Array, above: Array
) -> Array:
    """What one chain's log-weight gains by its step along ∇log π from the level above to level, a scalar.

    `SMC`'s Feynman–Kac weight, but that the rate is taken for that of the level above on the whole way, as nothing is
    evaluated where a step ends; of the potential G only what it is at both ends of the path is left.
    """
    parts = evaluation.parts
    gain = feynman_kac_weight(parts, parts, density.schedule, above, level)
    gain = gain + log_ratio_of_leaning(position, parts.drift, evaluation.score, moved, density, above, level)
    potential = parts.log_potential + parts.log_prior
    last, first = level == 0, above == density.num_levels - 1
    return gain + jnp.where(last, potential, 0.0) - jnp.where(first, potential, 0.0)
