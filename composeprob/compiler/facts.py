"""Facts of a program by which annealing policies bind its observations, and the terms
that they then have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from composeprob.compiler.check import site_parts
from composeprob.compiler.conjugate import NotGaussian, Prior, prior_of
from composeprob.compiler.evaluated import Evaluated, check_powers
from composeprob.compiler.linearity import Kind, Value
from composeprob.compiler.tempering import Tempering, tempering
from composeprob.compiler.top import unrolled
from composeprob.compiler.trace import Shapes, Traced, not_linear
from composeprob.ir.leaves import Graph, Observation, Site
from composeprob.language.policies import Policy

T = TypeVar("T")


@dataclass(frozen=True)
class Bound:
    """A policy that has bound an observation.

    Attributes:
        policy: the policy.
        join: makes the one term of all observations that it has bound, of their names.
        measured: True if the powers of such terms are measured, all together.
    """

    policy: Policy
    join: Callable[[Policy, tuple[str, ...], Facts], object]
    measured: bool = False


@dataclass(frozen=True, eq=False)
class Facts:
    """Facts of a program that decide by which policies its observations are annealed.

    Attributes:
        traced: the program.
        graph: its sites and observations.
        bound: the observations that are settled.
    """

    traced: Traced
    graph: Graph
    bound: dict[str, Bound] = field(default_factory=dict)
    _shared: dict[Callable[[Facts], Any], Any] = field(default_factory=dict)

    def shared(self, make: Callable[[Facts], T]) -> T:
        """Return what a function makes of the facts, which is made once."""
        if make not in self._shared:
            self._shared[make] = make(self)
        value: T = self._shared[make]
        return value

    # Terms that every policy may have: `language.policies.Binder`

    def evaluated(self, policy: Policy, *, network_free: bool) -> Bound:
        """The likelihood at what the policy sees, to the policy's power."""

        def join(policy: Policy, names: tuple[str, ...], facts: Facts) -> Evaluated:
            term = Evaluated(policy, names, network_free)
            if facts.graph.levels is not None:
                check_powers(term, facts.graph.levels)
            return term

        return Bound(policy, join)

    def measured(self, policy: Policy, *, network_free: bool) -> Bound:
        """The same to a power that the compiler measures."""

        def join(policy: Policy, names: tuple[str, ...], facts: Facts) -> Evaluated:
            return Evaluated(policy, names, network_free, facts.shared(_tempering))

        return Bound(policy, join, measured=True)

    # Facts

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The noised sites by their names."""
        return {site.name: site for site in self.graph.sites}

    @cached_property
    def candidates(self) -> list[Observation]:
        """The observations that may have a closed form: that left their policy open, or
        whose policy has a term of its own."""
        candidates = []
        for o in self.graph.observations:
            if o.anneal is None or type(o.anneal).bind is not Policy.bind:
                candidates.append(o)
        return candidates

    @cached_property
    def priors(self) -> dict[str, Prior | str]:
        """The prior of each noised site as mixtures of Gaussians, or the reason why it
        is not one."""
        return {name: _prior(site) for name, site in self.sites.items()}

    @cached_property
    def xs(self) -> dict[str, Any]:
        """Random values of the noised sites, at which derivatives are compared."""
        # Any values would do, but for those at which a wrong slope is right by chance.
        rng = np.random.default_rng(0)
        dtype = np.dtype(jnp.result_type(float))
        return {
            name: rng.standard_normal(site.shape).astype(dtype)
            for name, site in self.sites.items()
        }

    @cached_property
    def shapes(self) -> Shapes:
        """The noised sites that the candidates look at."""
        looked_at = {name for o in self.candidates for name in o.looks_at}
        return tuple(
            (name, site.shape) for name, site in self.sites.items() if name in looked_at
        )

    def depend_on_statics(self, names: Iterable[str]) -> bool:
        """Return whether one of these candidates depends on a static site."""
        return any(
            o.name in names and o.depends_on - self.sites.keys()
            for o in self.candidates
        )

    def first_reason(
        self, o: Observation, reason_of: Callable[[str], str | None]
    ) -> str | None:
        """The first reason that ``reason_of`` gives for a site that an observation
        looks at; None if it gives none."""
        for name in sorted(o.looks_at):
            reason = reason_of(name)
            if reason:
                return reason
        return None

    def not_mixture(self, o: Observation) -> str | None:
        """The reason why an observation looks at a prior that is not a mixture of
        Gaussians; None if it does not."""

        def reason_of(site: str) -> str | None:
            prior = self.priors[site]
            return prior if isinstance(prior, str) else None

        return self.first_reason(o, reason_of)

    def not_linear(self, o: Observation) -> str | None:
        """The reason why an observation is not A·x + b plus Gaussian noise, with A, b
        and the noise free of x; None if it is."""
        not_gaussian = self.traced.code.reasons[o.name]
        if not_gaussian:
            return not_gaussian
        mean, noise = self._kinds[o.name]
        # Latents may move A, b and the noise; x may not.
        if noise.kind > Kind.LATENT:
            return "the spread of its noise depends on what it measures"
        if mean.why == "custom_vjp_call":
            return f"the derivative of its mean cannot be taken (JAX's `{mean.why}`)"
        if mean.kind == Kind.OTHER:
            return not_linear(mean.why)
        return None

    @cached_property
    def _kinds(self) -> dict[str, tuple[Value, Value]]:
        """The kinds of functions that means and noises of observations are."""

        # Kinds need no numbers, so nothing is computed.
        def of_trace() -> dict[str, tuple[Value, Value]]:
            return self.traced.linearity(self.shapes)

        kinds: dict[str, tuple[Value, Value]] = jax.eval_shape(of_trace)
        return kinds


def _tempering(facts: Facts) -> Tempering:
    """Return the measured powers of all observations that are settled so."""
    names = [name for name, bound in facts.bound.items() if bound.measured]
    shapes = {name: site.shape for name, site in facts.sites.items()}
    return tempering(
        facts.traced, tuple(names), facts.priors, shapes, facts.graph.levels
    )


def _prior(site: Site) -> Prior | str:
    """The prior of a site as mixtures of Gaussians, or the reason why it is not one."""
    marginal, _ = site_parts(site.root)
    try:
        if marginal is None:
            raise NotGaussian("it has no prior with noised marginals")
        prior = prior_of(unrolled(marginal), site.shape)
        # p(y | x_k) averages over x₀ under the prior, so it must cover every entry.
        covered = sum(len(part.entries) for part in prior.parts)
        if covered < np.prod(site.shape, dtype=int):
            raise NotGaussian("its prior leaves entries free")
    except NotGaussian as reason:
        return f"the prior of {site.name!r} is not a mixture of Gaussians ({reason})"
    return prior
