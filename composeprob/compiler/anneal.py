"""Settles how each observation is annealed. Linear measurements with Gaussian noise are found, and annealed exactly or
by moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from composeprob import tuning
from composeprob.compiler.by_moments import ByMoments, bent, eigendecomposed, no_slope, no_use
from composeprob.compiler.check import site_parts
from composeprob.compiler.conjugate import NotGaussian, Prior, prior_of
from composeprob.compiler.exact import Exact, grouped
from composeprob.compiler.likelihood import Likelihood
from composeprob.compiler.linearity import Kind, Value
from composeprob.compiler.tempering import tempering
from composeprob.compiler.top import unrolled
from composeprob.compiler.trace import Shapes, Traced, not_linear
from composeprob.errors import CapabilityError
from composeprob.ir.nodes import Graph, Observation, Site
from composeprob.language.policies import POLICIES


def anneal(graph: Graph, traced: Traced) -> tuple[Graph, Likelihood]:
    """Settle the policy of every observation that left it open: ``exact`` where that is possible, else ``moments``
    where that is possible and pays, else ``tempered``. One that asks for what is not possible is refused.

    Both take y = A·x + b + noise, A, b and the noise's covariance constant or functions of static sites; ``exact``
    under a prior that is a mixture of Gaussians, ``moments`` under any score. That the mean is linear in x, and which
    entries of A and of the covariance can be other than zero, is read off the program's own trace, not off numbers.
    """
    if not graph.observations:
        more = len(graph.dims) > len(graph.sites)  # static sites or deterministics
        return graph, Likelihood(traced if more else None, {})
    priors = {site.name: _prior(site) for site in graph.sites}
    graph, exact, by_moments = _settled(graph, traced, priors)
    policies = {o.name: o.anneal for o in graph.observations if o.anneal is not None}
    measured, powers = tuple(name for name, policy in policies.items() if policy.measured), None
    if measured:
        powers = tempering(traced, measured, priors, {site.name: site.shape for site in graph.sites}, graph.levels)
        if powers.near is not None and any(policies[name].plain for name in measured):
            why = "tempered observations fall faster than any power of x/α"
            graph = graph.noted("temper", f"{why}, so they see x/α drawn towards the prior's mean")
    return graph, Likelihood(traced, policies, exact, powers, by_moments)


def _settled(
    graph: Graph, traced: Traced, priors: dict[str, Prior | str]
) -> tuple[Graph, Exact | None, ByMoments | None]:
    """The graph with every policy settled, and those of its observations that are annealed exactly and by moments."""
    asking = [o for o in graph.observations if o.anneal is None or o.anneal.closed_form or o.anneal.by_moments]
    if not asking:
        return graph, None, None
    sites = {site.name: site for site in graph.sites}
    looked_at = {name for o in asking for name in o.looks_at}
    shapes = tuple((name, site.shape) for name, site in sites.items() if name in looked_at)
    priors = {name: prior for name, prior in priors.items() if name in looked_at}
    rng, float_ = np.random.default_rng(0), np.dtype(jnp.result_type(float))
    xs: dict[str, Any] = {name: rng.standard_normal(site.shape).astype(float_) for name, site in sites.items()}

    def why(of_site: Callable[[str], str | None], o: Observation) -> str | None:
        return next((reason for name in sorted(o.looks_at) if (reason := of_site(name))), None)

    no_mixture = {name: prior if isinstance(prior, str) else None for name, prior in priors.items()}
    wide = {o.name: reason for o in asking if (reason := why(no_mixture.get, o))}

    def pays(o: Observation) -> bool:
        """Latents in it are moved best where what is known of them is in log-densities."""
        alone = o.name in wide and not _bridged(graph, (o.name,))
        return alone and not why(lambda name: no_use(sites[name]), o)

    wanted = [o for o in asking if (pays(o) if o.anneal is None else o.anneal.by_moments)]
    reasons = {o.name: reason for o in asking if (reason := traced.code.reasons[o.name])}
    linear = [o.name for o in asking if o.name not in reasons and (o.name not in wide or o in wanted)]
    reasons |= _not_linear(traced, linear, shapes) if linear else {}
    names = tuple(o.name for o in wanted if o.name not in reasons)
    off = np.asarray(bent(traced, names, shapes, xs)) if names else np.zeros(0)
    reasons |= {name: not_linear() for name, here in zip(names, off, strict=True) if here}
    no_moments = {
        o.name: reason for o in wanted if (reason := reasons.get(o.name) or why(lambda name: no_slope(sites[name]), o))
    }
    reasons |= wide
    names = tuple(o.name for o in wanted if o.name not in no_moments)
    by_moments = None
    if names:
        bridged = _bridged(graph, names)
        by_moments = ByMoments(names, bridged, None if bridged else eigendecomposed(traced, names, shapes, xs))
    exact, others = None, [o.name for o in asking if o.name not in names]
    while (left := tuple(name for name in others if name not in reasons)) and exact is None:
        exact = grouped(traced, left, shapes, priors, xs, _bridged(graph, left), reasons)
    for o in asking:
        by_name = o.anneal is not None and o.anneal.by_moments
        refused = None if o.anneal is None else (no_moments if by_name else reasons).get(o.name)
        if refused is not None:
            raise CapabilityError(
                f"Observation {o.name!r} cannot be annealed {'by moments' if by_name else 'exactly'}: {refused}.",
                where=o.where,
                fix="leave anneal= out, or use anneal='tempered' or 'denoised'.",
            )

    policies = {
        o.name: POLICIES["moments" if o.name in names else "tempered" if o.name in reasons else "exact"] for o in asking
    }
    observations = tuple(replace(o, anneal=policies.get(o.name, o.anneal)) for o in graph.observations)
    directions = min(sum(traced.sizes(names)), tuning.MOMENTS.directions)
    cost = f" ({directions} Jacobian–vector products an evaluation)" if names else ""
    reasons |= no_moments
    sentences = [
        f"{o.name} {s.anneal}{cost if o.name in names else ''}"
        + (f", since {reasons[o.name]}" if o.name in reasons else "")
        for o, s in zip(graph.observations, observations, strict=True)
        if o.anneal is None or o.name in names
    ]
    sentence = "; ".join(sentences)
    graph = replace(graph, observations=observations)
    return graph.noted("anneal", sentence) if sentence else graph, exact, by_moments


def _bridged(graph: Graph, names: tuple[str, ...]) -> bool:
    """Whether some of these observations depend on static sites."""
    sites = {site.name for site in graph.sites}
    return any(o.depends_on - sites for o in graph.observations if o.name in names)


def _prior(site: Site) -> Prior | str:
    """The prior of a site as mixtures of Gaussians, or why it is none."""
    marginal, _ = site_parts(site.root)
    try:
        if marginal is None:
            raise NotGaussian("it has no prior with noised marginals")
        prior = prior_of(unrolled(marginal), site.shape)
        if sum(len(part.entries) for part in prior.parts) < np.prod(site.shape, dtype=int):
            raise NotGaussian("its prior leaves entries free")
    except NotGaussian as reason:
        return f"the prior of {site.name!r} is no mixture of Gaussians ({reason})"
    return prior


def _not_linear(traced: Traced, names: list[str], shapes: Shapes) -> dict[str, str]:
    """Why measurements are not A·x + b + noise with A, b and the noise free of x, by name."""
    found: dict[str, tuple[Value, Value]] = jax.eval_shape(lambda: traced.linearity(shapes))  # kinds need no numbers
    reasons = {}
    for name in names:
        mean, noise = found[name]
        if noise.kind > Kind.LATENT:
            reasons[name] = "the spread of its noise depends on what it measures"
        elif mean.why == "custom_vjp_call":
            reasons[name] = f"the derivative of its mean cannot be taken (JAX's `{mean.why}`)"
        elif mean.kind == Kind.OTHER:
            reasons[name] = not_linear(mean.why)
    return reasons
