"""Noise that level 0 leaves in tokens, and the composition without it.

A state that a factor makes less probable than noise makes it has the probability of its
neighbours at level 0. A product is small there either way. A quotient by that factor is
large there, and at level 0 too small.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import UniformDensity
from composeprob.density.evaluation import Position
from composeprob.density.once import compiled_by_size
from composeprob.density.points import in_blocks
from composeprob.schedule import Schedule

CLEAN = 1e-9
"""σ of a level at which the probability to be kept is rounded to 1."""


def log_weights_of_clean(
    density: UniformDensity, positions: Position
) -> Float[np.ndarray, " chains"]:
    r"""Return log F − log F₀ of chains at level 0, with F₀ the density of level 0 and F
    the composition of the factors without noise.

    Closed forms and energies are evaluated without noise. A network is not, as it was
    not trained there. Its log f − log f₀ is that of independent tokens,

    $$\sum_i \log \frac{p(x_{0,i} = x_i \mid x)}{q(x_i \mid x_i)},$$

    with p the probabilities of its clean tokens, and q those of the noise. Where
    several tokens of x are likely to be noise this is too great.
    """
    evaluator: Any = density.evaluator
    schedule = density.schedule
    alpha = np.asarray(schedule.alpha)
    sigma = np.asarray(schedule.sigma)
    cleaner = min(CLEAN, 0.1 * float(sigma[0] / alpha[0]))
    levels = Schedule.from_arrays(
        np.concatenate([[1.0], alpha]), np.concatenate([[cleaner], sigma])
    )
    evaluator = dataclasses.replace(evaluator, levels=levels)
    with_clean = dataclasses.replace(density, evaluator=evaluator)
    return in_blocks(partial(_log_weights, density, with_clean), positions)


@compiled_by_size
def _log_weights(
    density: AnnealedDensity, with_clean: AnnealedDensity, positions: Position
) -> Float[Array, " positions"]:
    """The log-weights of a block, by the density and by the same with a level without
    noise before its level 0."""
    evaluator = cast(UniformDensity, density).tokens
    finer = cast(UniformDensity, with_clean).tokens
    first = jnp.int32(0)

    def of_chain(position: Position) -> Float[Array, ""]:
        tokens = evaluator.row_of(position)
        places = jnp.arange(len(tokens))
        noised = finer.noised(tokens, first + 1, first)
        # Compiled code evaluates no network here: none of these values is a network's.
        at_level_0 = evaluator.noised(tokens, first, first).bases
        exact = finer.noised(tokens, first, first).bases
        before = []
        after = []
        for b, (base, clean) in enumerate(zip(at_level_0, exact, strict=True)):
            if base is not None and clean is not None:
                before.append(base)
                after.append(clean)
                continue
            # Only a mixture's responsibilities depend on log f itself, here that of
            # independent tokens.
            log_f = noised.at_top[b]
            growth = noised.onward[b][:, places, tokens]
            before.append(log_f)
            after.append(log_f + jnp.sum(growth, axis=1))
        without_noise = evaluator.log_density(tuple(after))
        return without_noise - evaluator.log_density(tuple(before))

    return jax.lax.map(of_chain, positions, batch_size=tuning.SHARES.at_once)
