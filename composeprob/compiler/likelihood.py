"""Static priors and observations: the part of a density that NumPyro's statements declare.

The program is run again with the position's values in place of its random choices, once for each annealing policy
in use, because a policy decides what the observations see of a noised site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.compiler.arguments import join, split
from composeprob.compiler.coordinates import bijection_of
from composeprob.compiler.linear_gaussian import Exact
from composeprob.ir.nodes import Graph
from composeprob.language.interpret import Statement, run
from composeprob.schedule import Noise, Schedule


class Likelihood(eqx.Module):
    """log p(z) and the annealed log-likelihood of a program.

    Attributes:
        function: the program's function.
        arguments: (args, kwargs), as `arguments.split` leaves them: arrays are leaves, so new data reuse compiled
            code.
        policies: the policy of each observation, ``"static"`` where it looks at no noised site.
        bridged: the observations in which static sites have a say, where there are noisy levels.
        exact: the observations under ``"exact"``; None where there are none.
        standardised: the static sites whose coordinate is relative to their prior's location and scale.
    """

    function: Callable[..., Any] = eqx.field(static=True)
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    policies: dict[str, str] = eqx.field(static=True)
    bridged: frozenset[str] = eqx.field(static=True, default=frozenset())
    exact: Exact | None = None
    standardised: frozenset[str] = eqx.field(static=True, default=frozenset())

    def __call__(
        self, xs: dict[str, Array], means: dict[str, Array], zs: dict[str, Array], schedule: Schedule, noise: Noise
    ) -> tuple[Array, Array]:
        """(log p(z) in unconstrained coordinates, Σ_j γ_j·log L_j without what is annealed exactly).

        Args:
            xs: the noised sites at this level.
            means: their Tweedie means.
            zs: the static sites, unconstrained.
            schedule: the levels.
            noise: this level's noise.
        """
        clean = {name: x / noise.alpha for name, x in xs.items()}
        # At level 0 every policy is the posterior that the program promises, seen at x/α.
        denoised = {name: jnp.where(noise.index == 0, clean[name], mean) for name, mean in means.items()}
        seen = {"static": clean, "tempered": clean, "denoised": denoised, "noised": xs}
        policies = sorted(set(self.policies.values()) - {"exact"} | {"static"}, key=lambda p: p != "static")
        log_prior = log_likelihood = jnp.zeros((), jnp.result_type(float))
        for policy in policies:
            own = {name for name, p in self.policies.items() if p == policy}
            statements, log_jacobian = self.replay(seen[policy], zs, noise.index)
            if policy == "static":  # each latent's prior counts once
                statics = [s.log_prob() for s in statements.values() if s.kind == "static"]
                log_prior = log_prior + sum(statics, log_jacobian)
            for name in (name for name in statements if name in own):
                log_likelihood = log_likelihood + self._power(name, schedule, noise) * statements[name].log_prob()
        return log_prior, log_likelihood

    def _power(self, name: str, schedule: Schedule, noise: Noise) -> Array | float:
        """γ_k of an observation."""
        if self.policies[name] == "tempered":
            return tempering(schedule, noise)
        power = sharpening(schedule, noise) if self.policies[name] == "denoised" else 1.0
        return power * bridge(schedule, noise) if name in self.bridged else power

    def exactly(self, xs: dict[str, Array], zs: dict[str, Array], noise: Noise) -> Array:
        """(log p(y | x), log p(y | x₀ = x/α), log p(x)) of the observations that are annealed exactly, shape (3,)."""
        assert self.exact is not None
        return self.exact(xs, lambda seen: self.replay(seen, zs, noise.index)[0], noise)

    def replay(self, xs: dict[str, Array], zs: dict[str, Array], level: Any) -> tuple[dict[str, Statement], Array]:
        """Every statement with these values, and Σ log|dz/du| of the static sites' bijections."""
        log_jacobian = jnp.zeros((), jnp.result_type(float))

        def provide(kind: str, name: str, distribution: Any) -> Array:
            nonlocal log_jacobian
            if kind == "noised":
                return xs[name]
            bijection = bijection_of(distribution, name in self.standardised)
            value = bijection(zs[name])
            log_jacobian = log_jacobian + jnp.sum(bijection.log_abs_det_jacobian(zs[name], value))
            return value

        args, kwargs = join(self.arguments)
        return run(self.function, args, kwargs, provide, level), log_jacobian

    def draw(self, key: Array, xs: dict[str, Array]) -> dict[str, Array]:
        """Static sites drawn from their priors given the noised sites in the data's units, unconstrained."""
        drawn: dict[str, Array] = {}

        def provide(kind: str, name: str, distribution: Any) -> Array:
            if kind == "noised":
                return xs[name]
            value = distribution.sample(jax.random.fold_in(key, len(drawn)))
            drawn[name] = bijection_of(distribution, name in self.standardised).inv(value)
            return value

        args, kwargs = join(self.arguments)
        run(self.function, args, kwargs, provide)
        return drawn


def tempering(schedule: Schedule, noise: Noise) -> Array:
    """γ_k = sigmoid(λ_k − 4)/sigmoid(λ_0 − 4): nearly 0 at noisy levels, 1 at level 0.

    Seen at x/α, an observation of standard deviation s is blurred by noise of standard deviation σ/α, and the power
    that suits it is s²/(s² + σ²/α²) = sigmoid(λ + 2·log s). The 4 stands for s = 0.14, in the data's units.
    """
    return jax.nn.sigmoid(noise.log_snr - 4.0) / jax.nn.sigmoid(schedule.log_snr[0] - 4.0)


def sharpening(schedule: Schedule, noise: Noise) -> Array:
    """γ_k = (s² + r_0²)/(s² + r_k²) with s² = e⁻⁴ and r_k² = sigmoid(−λ_k): from s² at noisy levels to 1 at level 0.

    r² = σ²/(α² + σ²) is what is left unknown of data of variance 1 seen in the noise of the level. L at the mean of x₀
    takes it for known: over d measurements that overstates what they tell by a factor of exp(d·r²/2s²), and weights
    between levels, which must take it back, would come to rest on few chains. As in `tempering`, s is 0.14.

    References:
        Song, Vahdat, Mardani and Kautz (2023), *Pseudoinverse-guided diffusion models*, for r².
    """
    s2 = jnp.exp(-4.0)
    return (s2 + jax.nn.sigmoid(-schedule.log_snr[0])) / (s2 + jax.nn.sigmoid(-noise.log_snr))


FULL = -2.0
"""log-SNR from which on observations that are not tempered count in full for static sites: α/σ = 0.37."""


def bridge(schedule: Schedule, noise: Noise) -> Array:
    """The power of p(y | x_k, z), or of what is put in its place: u² with u going from 0 at the noisiest level to 1 at
    log-SNR −2, and 1 from there on.

    Where no signal is left p(y | x_k, z) is p(y | z): without a power, static sites would meet all of the data at the
    first level, far from where their priors put them.
    """
    top = schedule.log_snr[-1]
    way = jnp.where(top < FULL, (noise.log_snr - top) / jnp.where(top < FULL, FULL - top, 1.0), 1.0)
    return jnp.clip(way, 0.0, 1.0) ** 2


def likelihood_of(
    graph: Graph, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Likelihood | None:
    """The likelihood of a program; None where it has neither static sites nor observations."""
    if not graph.statics and not graph.observations:
        return None
    policies = {o.name: str(o.anneal) for o in graph.observations}
    statics = {static.name for static in graph.statics}
    bridged = frozenset(o.name for o in graph.observations if o.depends_on & statics and o.anneal != "noised")
    standardised = frozenset(static.name for static in graph.statics if static.standardised)
    arguments = split(function, (args, kwargs))
    return Likelihood(function, arguments, policies, bridged if graph.sites else frozenset(), standardised=standardised)
