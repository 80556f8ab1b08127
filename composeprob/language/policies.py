"""Annealing policies: observations of a noised site above level 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from composeprob import tuning
from composeprob.errors import InvalidValueError, ProgramError, WrongTypeError
from composeprob.schedule import Noise, Schedule
from composeprob.user_code import array_from

Sites: TypeAlias = dict[str, Array]
T = TypeVar("T")


class Binder(Protocol):
    """The compiler, as a policy that binds an observation sees it: it makes terms of
    the density."""

    def evaluated(self, policy: Policy, *, network_free: bool) -> object:
        """The likelihood at what the policy sees, to the policy's power."""

    def measured(self, policy: Policy, *, network_free: bool) -> object:
        """The same to a power that the compiler measures."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """The value that an observation sees of a noised site at each level, and the power
    of its likelihood.

    Derive a frozen dataclass from it, with settings as fields, and pass an object of it
    to `observe`, `factor` or `annealed`. Whatever it returns, level 0 is evaluated at
    x/α and counts in full. A policy of another form, with a term of its own in the
    place of the likelihood, is a file of the compiler and says when it applies
    (`bind`).

    Attributes:
        measured: True if the power is the one that the compiler measures, as for
            ``"tempered"``; `power` is not called.
        network_free: True if the program sees x/α, and samplers may evaluate the
            likelihood at many x, as it takes no network.
        takes_levels: True if the user gives a function of the level, which defines
            level 0 too.
    """

    measured: ClassVar[bool] = False
    network_free: ClassVar[bool] = False
    takes_levels: ClassVar[bool] = False

    def bind(self, observation: Any, facts: Any) -> Any:
        """Return the term of the density that this policy makes of an observation, or
        the reason why it makes none.

        Args:
            observation: of the program's graph.
            facts: of the program: its trace, the priors of its sites, and the terms
                that there are, as a `Binder`.
        """
        binder: Binder = facts
        if self.measured:
            return binder.measured(self, network_free=self.network_free)
        return binder.evaluated(self, network_free=self.network_free)

    def inputs(
        self, clean: Sites, xs: Sites, means: Sites, noise: Noise
    ) -> Sites | None:
        """The noised sites as the program takes them; None for ``clean`` = x/α.

        At level 0 every policy sees x/α, since level 0 is the posterior that the
        program promises. A policy that takes levels is the exception: the user's
        function defines level 0 too.
        """
        if self.sees_clean:
            return None
        above = {}
        for name, x in xs.items():
            above[name] = self._site_value(name, x, means[name], noise)
        if self.takes_levels:
            return above
        return {
            name: jnp.where(noise.index == 0, clean[name], above[name]) for name in xs
        }

    def _site_value(self, name: str, x: Array, mean: Array, noise: Noise) -> Array:
        """Return the value of a site that `seen` gives; refuse one of another
        shape."""
        return array_from(
            f"The annealing policy '{self}'",
            f"seen(x, mean, noise) for the site {name!r}",
            lambda: self.seen(x, mean, noise),
            x.shape,
        )

    def of_level(self, name: str, function: Callable[[Array], T], level: Array) -> T:
        """Return the value of a user's function of the level, which only a policy that
        takes levels evaluates."""
        if self.takes_levels:
            return function(level)
        raise ProgramError(
            f"{name!r} is a function of the level, which only the policy 'noised' "
            "evaluates.",
            fix="pass anneal='noised', or the value itself.",
        )

    def seen(self, x: Array, mean: Array, noise: Noise) -> Array:
        """The value that the program sees of a noised site above level 0; by default
        x/α.

        Args:
            x: the site at this level, x_k = α·x₀ + σ·ε.
            mean: the Tweedie mean of x₀ given x_k under the site's factors. Its use
                costs a derivative of the score.
            noise: the level's index, α, σ and log-SNR.
        """
        return x / noise.alpha

    def power(self, schedule: Schedule, noise: Noise) -> Array | float:
        """The power of the likelihood above level 0; by default 1."""
        return 1.0

    @property
    def form(self) -> str:
        """The policy in a sentence: an observation is annealed …"""
        return f"by {self}"

    @property
    def sees_clean(self) -> bool:
        """True if the program sees x/α at every level."""
        return type(self).seen is Policy.seen

    def __str__(self) -> str:
        name = type(self).__name__.lower()
        settings = []
        for field in dataclasses.fields(self):
            settings.append(f"{field.name}={getattr(self, field.name)!r}")
        return f"{name}({', '.join(settings)})" if settings else name


class Rising(Policy):
    """The policy of an observation that depends on no noised site, while there are
    some: its power rises to 1 at level 0."""

    def power(self, schedule: Schedule, noise: Noise) -> Array:
        return bridge(schedule, noise)


POLICIES: dict[str, Policy] = {}
"""Policies by their short names: the compiler, which has their terms, fills it."""


def bridge(schedule: Schedule, noise: Noise) -> Float[Array, ""]:
    """The power of p(y | x_k, z) where static sites take part: u⁴, with u from 0 at the
    noisiest level to 1 at log-SNR −2, and 1 from there on.

    Where no signal is left p(y | x_k, z) is p(y | z): without a power, all of the data
    would act on static sites at the first level, far from where their priors put them.
    The power starts slowly because of chains whose scales their priors made tiny: there
    log p is −10⁵, and they must be led away before it is too steep for their steps.
    """
    top = schedule.log_snr[-1]
    full = tuning.STATIC_FULL_LOG_SNR
    # A schedule without levels below that log-SNR has no bridge, and nothing to divide
    # by.
    length = jnp.where(top < full, full - top, 1.0)
    u = jnp.where(top < full, (noise.log_snr - top) / length, 1.0)
    return jnp.clip(u, 0.0, 1.0) ** 4


def as_policy(name: str, policy: str | Policy | None) -> Policy | None:
    """The policy of this short name, or the policy itself.

    Any other value is refused, and so is a policy that holds an array.
    """
    if policy is None:
        return None
    if isinstance(policy, Policy):
        # JAX finds compiled code by the hash of a density's static parts.
        try:
            hash(policy)
        except TypeError as error:
            raise WrongTypeError(
                f"The settings of the annealing policy {policy} for {name!r} must be "
                "numbers or text, as compiled code is cached by them.",
                fix="give a tuple in the place of an array or a list.",
            ) from error
        return policy
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]
    raise InvalidValueError(
        f"Unknown annealing policy {policy!r} for {name!r}.",
        fix=f"use one of: {', '.join(POLICIES)}; or an object of a class of your own, "
        "derived from Policy.",
    )
