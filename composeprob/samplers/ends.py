"""How a run ends at level 0, after the last visit: global moves, and then a stay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.samplers.base import Sampler

PER_NUMBER = 4
"""Points for each number of a position that a fit takes at least."""
GLOBAL_MOVES = "global_moves="
"""What needs capabilities on their account, in messages."""


def check_global_moves(count: object) -> Array:
    """The number of global moves.

    Raises:
        InvalidValueError: what is no whole number ≥ 0.
    """
    whole = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
    if not whole or count < 0:  # type: ignore[operator]
        raise InvalidValueError(
            f"global_moves must be a whole number ≥ 0; got {count!r}.", fix="for example global_moves=20; 0 for none."
        )
    return jnp.int32(count)


def needs_global(count: Array | int) -> dict[str, frozenset[str]]:
    """What a density must offer for so many global moves: they compare densities between modes."""
    return {GLOBAL_MOVES: frozenset({"energy", "mode_depth"})} if count else {}


def numbers(density: AnnealedDensity) -> int:
    """How many numbers a position has."""
    shapes = jax.eval_shape(density.initial, jax.random.key(0), 0)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def enough(size: int) -> int:
    """Chains from which on mixtures over so many numbers are fitted to each half of them."""
    return 2 * PER_NUMBER * size


def check_enough(num_chains: int, density: AnnealedDensity) -> None:
    """Refuse to fit anything to too few chains.

    Raises:
        InvalidValueError: fewer than `enough`.
    """
    size = numbers(density)
    if num_chains < enough(size):
        raise InvalidValueError(
            f"global_moves= fits a Gaussian mixture to each half of the chains, and {num_chains} are too few for "
            f"positions of {size} number{'s' * (size != 1)}.",
            fix=f"use {enough(size)} chains or more, or leave global_moves out.",
        )


def check_stay(density: AnnealedDensity, has_kernel: bool) -> None:
    """Refuse a stay at level 0 where HMC cannot move all sites."""
    if "energy" not in density.capabilities or not has_kernel:
        raise CapabilityError(
            "stay=True takes HMC on all sites, but a factor of this program offers only its score.",
            where=density.described.where,
            fix="leave stay out; or use models trained with an energy parameterization.",
        )
    held = [name for name, site in density.sites.items() if site.kind == "held"]
    if held:
        raise CapabilityError(
            f"stay=True would move {', '.join(map(repr, held))}, which a factor's unknown normaliser depends on.",
            where=density.described.where,
            fix="leave stay out.",
        )


def ending(sampler: Sampler) -> str:
    """What a sampler's description says of it."""
    moves = f", {int(sampler.global_moves)} global moves" if sampler.global_moves else ""
    return moves + (", stay at level 0" if sampler.stay else "")
