"""Annealing policies: observations of a noised site above level 0."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from composeprob import tuning
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.renamed import warn_renamed
from composeprob.schedule import Noise, Schedule


@dataclasses.dataclass(frozen=True)
class Policy:
    """The value that an observation sees of a noised site at each level, and the power
    of its likelihood.

    Derive a frozen dataclass from it, with settings as fields, and pass an object of it
    to `observe`, `factor` or `annealed`. Whatever it returns, level 0 is evaluated at
    x/α and counts in full. The compiler reads the attributes in `compiler.anneal`: they
    choose among its forms of a likelihood, and a policy of another form is added there.

    Attributes:
        measured: True if the power is the one that the compiler measures, as for
            ``"tempered"``; `power` is not called.
        network_free: True if the program sees x/α, and samplers may evaluate the
            likelihood at many x, as it takes no network.
        takes_levels: True if the user gives a function of the level, which defines
            level 0 too.
        closed_form: True if the density of the value given x_k itself takes the place
            of the likelihood.
        by_moments: True if a Gaussian with that density's mean and covariance takes the
            place of the likelihood.
    """

    measured: ClassVar[bool] = False
    network_free: ClassVar[bool] = False
    takes_levels: ClassVar[bool] = False
    closed_form: ClassVar[bool] = False
    by_moments: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "plain" in vars(cls):
            warn_renamed(f"{cls.__name__}.plain", "network_free")
            cls.network_free = vars(cls)["plain"]

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
    def sees_clean(self) -> bool:
        """True if the program sees x/α at every level."""
        return type(self).seen is Policy.seen

    def __str__(self) -> str:
        name = type(self).__name__.lower()
        settings = []
        for field in dataclasses.fields(self):
            settings.append(f"{field.name}={getattr(self, field.name)!r}")
        return f"{name}({', '.join(settings)})" if settings else name


class Tempered(Policy):
    """The program sees x/α, and the power suits the sharpness of the likelihood.

    Where log L falls faster than any power of x/α, the compiler draws x/α towards the
    prior's mean (`tempering.Near`).
    """

    measured = True
    network_free = True


class Denoised(Policy):
    """The program sees the Tweedie mean of x₀, and the power is that of `Tempered`."""

    measured = True

    def seen(self, x: Array, mean: Array, noise: Noise) -> Array:
        return mean


class Noised(Policy):
    """The program sees x_k itself, at level 0 too, and the user's function of the level
    returns its likelihood."""

    takes_levels = True

    def seen(self, x: Array, mean: Array, noise: Noise) -> Array:
        return x


class Exact(Policy):
    """The density of the value given x_k in closed form."""

    closed_form = True


class Moments(Policy):
    """The density of the value given x_k, from the first two moments of x₀ given
    x_k."""

    by_moments = True


class Rising(Policy):
    """The policy of an observation that depends on no noised site, while there are
    some: its power rises to 1 at level 0."""

    def power(self, schedule: Schedule, noise: Noise) -> Array:
        return bridge(schedule, noise)


POLICIES: dict[str, Policy] = {
    str(each): each for each in (Exact(), Moments(), Tempered(), Denoised(), Noised())
}
"""Policies by their short names."""


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
