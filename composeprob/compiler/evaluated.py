"""Observations whose likelihood itself is evaluated at each level, at what their policy
sees of the noised sites."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from composeprob.compiler.tempering import Tempering
from composeprob.compiler.trace import Sites
from composeprob.errors import InvalidValueError
from composeprob.language.interpret import Statement
from composeprob.language.policies import Policy
from composeprob.schedule import Noise, Schedule
from composeprob.user_code import array_from, is_own


class Evaluated(eqx.Module):
    """The likelihoods of the observations under one policy, to a power.

    Attributes:
        policy: the policy.
        names: the observations.
        network_free: True if the program sees x/α, and no network is evaluated for it.
        tempering: the powers, if they are measured; None for those of the policy.
    """

    policy: Policy = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    network_free: bool = eqx.field(static=True)
    tempering: Tempering | None = None

    @property
    def sees_clean(self) -> bool:
        """True if the program sees x/α, or a point near the prior, at every level."""
        return self.policy.sees_clean

    @property
    def sees_near(self) -> bool:
        """True if the program sees x/α drawn towards the prior's mean."""
        measured = self.tempering is not None and self.tempering.near is not None
        return measured and self.network_free

    def inputs(
        self, clean: Sites, xs: Sites, means: Sites, noise: Noise
    ) -> Sites | None:
        """The noised sites as the program takes them; None for ``clean`` = x/α."""
        near = None if self.tempering is None else self.tempering.near
        if near is None or not self.network_free:
            return self.policy.inputs(clean, xs, means, noise)
        above = near(clean, noise.sigma / noise.alpha)
        # Level 0 is the posterior that the program promises.
        return {
            name: jnp.where(noise.index == 0, clean[name], above[name]) for name in xs
        }

    def power(self, schedule: Schedule, noise: Noise) -> Array:
        """The policy's power γ_k; 1 at level 0, the posterior that the program
        promises."""
        above = array_from(
            f"The annealing policy '{self.policy}'",
            "power(schedule, noise)",
            lambda: self.policy.power(schedule, noise),
            (),
        )
        return jnp.where(noise.index == 0, 1.0, above)

    def __call__(
        self, statements: dict[str, Statement], schedule: Schedule, noise: Noise
    ) -> Float[Array, ""]:
        """Σ_j γ_j·log L_j of the observations, from the statements at `inputs`."""
        total = jnp.zeros((), jnp.result_type(float))
        for name, statement in statements.items():
            if name not in self.names:
                continue
            log_likelihood = statement.log_prob()
            if self.tempering is not None:
                tempered = self.tempering.log_likelihood(name, log_likelihood, noise)
                total = total + tempered
            else:
                total = total + self.power(schedule, noise) * log_likelihood
        return total


def check_powers(term: Evaluated, schedule: Schedule) -> None:
    """Refuse a policy of a user's own whose powers are negative or not finite at some
    level."""
    if not is_own(term.policy):
        return

    def of_level(level: Array) -> Array:
        return term.power(schedule, schedule.at(level))

    powers = np.asarray(jax.vmap(of_level)(jnp.arange(schedule.num_levels)))
    wrong = np.flatnonzero(~((powers >= 0) & (powers < np.inf)))
    if len(wrong):
        level = wrong[0]
        raise InvalidValueError(
            f"The annealing policy '{term.policy}' raises the likelihood to the power "
            f"{powers[level]:.3g} at level {level}.",
            fix="return 0 or a positive, finite number from power(schedule, noise).",
        )
