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
from composeprob.compiler.exact import grouped
from composeprob.compiler.likelihood import Likelihood, policies_of
from composeprob.compiler.linearity import Kind, Value
from composeprob.compiler.tempering import tempering
from composeprob.compiler.top import unrolled
from composeprob.compiler.trace import Shapes, Traced, not_linear
from composeprob.errors import CapabilityError
from composeprob.ir.nodes import Graph, Observation, Site
from composeprob.language.policies import POLICIES


def anneal(graph: Graph, likelihood: Likelihood, traced: Traced) -> tuple[Graph, Likelihood]:
    """Settle the policy of every observation that left it open: ``exact`` where that is possible, else ``moments``
    where that is possible and pays, else ``tempered``. One that asks for what is not possible is refused.

    Both take y = A·x + b + noise, A, b and the noise's covariance constant or functions of static sites; ``exact``
    under a prior that is a mixture of Gaussians, ``moments`` under any score. That the mean is linear in x, and which
    entries of A and of the covariance can be other than zero, is read off the program's own trace, not off numbers.
    """
    asking = [o for o in graph.observations if o.anneal is None or o.anneal.closed_form or o.anneal.by_moments]
    if not asking:
        return _tempered(graph, likelihood, traced)
    sites = {site.name: site for site in graph.sites}
    looked_at = {name for o in asking for name in o.looks_at}
    shapes = tuple((name, site.shape) for name, site in sites.items() if name in looked_at)
    priors = {name: _prior(site) for name, site in sites.items() if name in looked_at}
    rng, float_ = np.random.default_rng(0), np.dtype(jnp.result_type(float))
    xs: dict[str, Any] = {name: rng.standard_normal(site.shape).astype(float_) for name, site in sites.items()}

    def why(of_site: Callable[[str], str | None], o: Observation) -> str | None:
        return next((reason for name in sorted(o.looks_at) if (reason := of_site(name))), None)

    no_mixture = {name: prior if isinstance(prior, str) else None for name, prior in priors.items()}
    wide = {o.name for o in asking if why(no_mixture.get, o)}  # under another prior than a mixture of Gaussians
    # Latents in them are moved best where what is known of them is in log-densities.
    alone = {o.name for o in asking if o.name in wide and not _bridged(graph, (o.name,))}
    paying = {o.name for o in asking if o.name in alone and not why(lambda name: no_use(sites[name]), o)}
    wanted = [o for o in asking if (o.anneal.by_moments if o.anneal is not None else o.name in paying)]
    reasons = {o.name: reason for o in asking if (reason := traced.code.reasons[o.name])}
    linear = [o.name for o in asking if o.name not in reasons and (o.name not in wide or o in wanted)]
    reasons |= _not_linear(traced, linear, shapes) if linear else {}
    names = tuple(o.name for o in wanted if o.name not in reasons)
    reasons |= bent(traced, names, shapes, xs) if names else {}
    no_moments = {
        o.name: reason for o in wanted if (reason := reasons.get(o.name) or why(lambda name: no_slope(sites[name]), o))
    }
    reasons |= {o.name: reason for o in asking if (reason := why(no_mixture.get, o))}
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

    def settled(o: Observation) -> Observation:
        name = "moments" if o.name in names else "tempered" if o.name in reasons else "exact"
        return replace(o, anneal=POLICIES[name])

    observations = tuple(settled(o) if o in asking else o for o in graph.observations)
    size = sum(traced.code.shapes.moments[name][0].size for name in names)
    cost = f" ({min(size, tuning.MOMENTS.directions)} Jacobian–vector products an evaluation)" if names else ""
    reasons |= no_moments
    sentences = [
        f"{o.name} {s.anneal}{cost if o.name in names else ''}"
        + (f", since {reasons[o.name]}" if o.name in reasons else "")
        for o, s in zip(graph.observations, observations, strict=True)
        if o.anneal is None or o.name in names
    ]
    sentence = "; ".join(sentences)
    graph = replace(graph, observations=observations)
    graph = graph.noted("anneal", sentence) if sentence else graph
    likelihood = replace(likelihood, policies=policies_of(graph), exact=exact, by_moments=by_moments)
    return _tempered(graph, likelihood, traced)


def _bridged(graph: Graph, names: tuple[str, ...]) -> bool:
    """Whether some of these observations depend on static sites."""
    sites = {site.name for site in graph.sites}
    return any(o.depends_on - sites for o in graph.observations if o.name in names)


def _tempered(graph: Graph, likelihood: Likelihood, traced: Traced) -> tuple[Graph, Likelihood]:
    """The likelihood with the powers of what is raised to one, and the graph with what was found of it."""
    names = tuple(name for name, policy in likelihood.policies.items() if policy.measured)
    if not names:
        return graph, likelihood
    shapes = {site.name: site.shape for site in graph.sites}
    declared = {site.name: _prior(site) for site in graph.sites}
    priors = {name: prior if isinstance(prior, Prior) else None for name, prior in declared.items()}
    found = tempering(traced, names, priors, shapes, graph.levels)
    if found.near is not None and any(likelihood.policies[name].plain for name in names):
        why = "tempered observations fall faster than any power of x/α, so they see x/α drawn towards the prior's mean"
        graph = graph.noted("temper", why)
    return graph, replace(likelihood, tempering=found)


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
    found: dict[str, tuple[Value, Value]] = {}
    jax.eval_shape(lambda: found.update(traced.linearity(shapes)))  # kinds are known without numbers
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
