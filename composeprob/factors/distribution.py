"""A factor in the place of a NumPyro distribution, so that NumPyro's statements and
handlers apply to it."""

from __future__ import annotations

import numpyro.distributions as dist
from jax import Array

from composeprob.errors import ProgramError
from composeprob.factors.categorical import num_values_of
from composeprob.factors.factor import Factor


class FactorDistribution(dist.Distribution):
    """Distribution that `cp.sample` hands to NumPyro. It carries the factor; it neither
    draws nor has a normalised density."""

    # NumPyro's own convention for attributes of the class.
    arg_constraints: dict[str, dist.constraints.Constraint] = {}  # noqa: RUF012
    pytree_data_fields: tuple[str, ...] = ("factor",)

    def __init__(self, factor: Factor):
        self.factor = factor
        super().__init__(event_shape=factor.event_shape)

    @property
    def support(self) -> dist.constraints.Constraint:
        num_values = num_values_of(self.factor)
        if num_values:
            values = dist.constraints.integer_interval(0, num_values - 1)
            return dist.constraints.independent(values, len(self.event_shape))
        return dist.constraints.independent(
            dist.constraints.real, len(self.event_shape)
        )

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        raise ProgramError(
            "cp.sample of a factor was called outside a compiled program, where there "
            "is no value for it.",
            fix="decorate the function with @cp.program and pass it to cp.compile.",
        )

    def log_prob(self, value: Array) -> Array:
        raise ProgramError(
            "A factor has no normalised log-density.",
            fix="compile the program and use density.log_density.",
        )
