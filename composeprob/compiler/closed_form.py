"""What observations that are annealed in closed form add to a density: a marginal E_k, a potential, and a rate."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.compiler.likelihood import Likelihood
from composeprob.language.policies import bridge
from composeprob.schedule import Noise, Schedule

Sites = dict[str, Array]


class ClosedForm(NamedTuple):
    """log E and ∇log E; what the density has of it and the gradient of that, a power of E or, at level 0, the
    likelihood; and what the rate gains. Where E is tiny that power is no sum of log E and a correction: to rounding
    they would cancel."""

    log_exact: Array
    of_exact: Sites
    annealed: Array
    of_annealed: Sites
    crossed: Array

    @property
    def correction(self) -> Array:
        """The log-potential that makes of E what the density has of it."""
        return self.annealed - self.log_exact


def closed_form(
    likelihood: Likelihood | None, xs: Sites, zs: Sites, schedule: Schedule, noise: Noise, drift: Sites
) -> ClosedForm:
    """What is added at a position; zeros where no observation is annealed so.

    At level 0 every policy is the posterior that the program promises, seen at x/α; E has level 0's noise in it like a
    marginal, and the correction takes it out. At the noisiest levels it takes out a power of E that static sites shall
    not see yet. The rate of F·E is that of F where F is the noised prior q that E is derived from, as E·q is a noised
    marginal too; elsewhere ⟨∇log F − ∇log q, ∇log E⟩ more, by the rule for the product F·(E·q)·q⁻¹.

    Args:
        likelihood: the program's.
        xs, zs: the noised sites at this level, and the static ones, unconstrained.
        schedule, noise: the levels, and this one's noise.
        drift: ∇log F, with zeros at static sites.
    """
    zero = jnp.zeros((), jnp.result_type(float))
    exact = None if likelihood is None else likelihood.exact
    if likelihood is None or exact is None:
        zeros = jax.tree.map(jnp.zeros_like, {**xs, **zs})
        return ClosedForm(zero, zeros, zero, zeros, zero)
    terms, pull = jax.vjp(lambda xs, zs: likelihood.exactly(xs, zs, noise), xs, zs)

    def gradient(*cotangent: float) -> Sites:
        of_x, of_z = pull(jnp.asarray(cotangent, terms.dtype))
        return {**of_x, **of_z}

    of_exact, of_clean = gradient(1.0, 0.0, 0.0), gradient(0.0, 1.0, 0.0)
    last = noise.index == 0
    power = bridge(schedule, noise) if exact.bridged else jnp.ones_like(terms[0])
    annealed = jnp.where(last, terms[1], power * terms[0])
    of_annealed = {n: jnp.where(last, of_clean[n], power * s) for n, s in of_exact.items()}
    if not exact.marginal:
        of_prior = gradient(0.0, 0.0, 1.0)
        zero = sum((jnp.sum((drift[n] - of_prior[n]) * of_exact[n]) for n, _ in exact.shapes), zero)
    return ClosedForm(terms[0], of_exact, annealed, of_annealed, zero)
