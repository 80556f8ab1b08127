"""Settles how each observation is annealed. Linear measurements with Gaussian noise are found, and annealed exactly or
by moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import block_diag

from composeprob import tuning
from composeprob.compiler.by_moments import ByMoments
from composeprob.compiler.check import node_capabilities, site_parts
from composeprob.compiler.conjugate import NotGaussian, Prior, check_size, connected, prior_of
from composeprob.compiler.likelihood import Likelihood, policies_of
from composeprob.compiler.linear_gaussian import Exact, Stack, measure, stack_of, stacked
from composeprob.compiler.linearity import Kind, Value
from composeprob.compiler.once import once
from composeprob.compiler.tempering import tempering
from composeprob.compiler.top import top_of
from composeprob.compiler.trace import Traced
from composeprob.compiler.unroll import unrolled
from composeprob.errors import CapabilityError
from composeprob.factors.base import LeafFactor
from composeprob.factors.gaussians import Gaussians, joint
from composeprob.factors.randomness import has_primitive
from composeprob.ir.nodes import Graph, Observation, Site, leaves
from composeprob.language.policies import POLICIES

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def anneal(graph: Graph, likelihood: Likelihood | None, traced: Traced) -> tuple[Graph, Likelihood | None]:
    """Settle the policy of every observation that left it open: ``exact`` where that is possible, else ``moments``
    where that is possible and pays, else ``tempered``.

    Both take y = A·x + b + noise, A, b and the noise's covariance constant or functions of static sites; ``exact``
    under a prior that is a mixture of Gaussians, ``moments`` under any score. That the mean is linear in x, and which
    entries of A and of the covariance can be other than zero, is read off the program's own trace, not off numbers.

    Raises:
        CapabilityError: an observation asks for ``exact`` or ``moments``, and it is not possible.
    """
    asking = [o for o in graph.observations if o.anneal is None or o.anneal.closed_form or o.anneal.by_moments]
    if likelihood is None:
        return graph, likelihood
    if not asking:
        return _tempered(graph, likelihood, traced)
    sites = {site.name: site for site in graph.sites}
    looked_at = {name for o in asking for name in o.looks_at}
    shapes = tuple((name, site.shape) for name, site in sites.items() if name in looked_at)
    priors = {name: _prior(site) for name, site in sites.items() if name in looked_at}
    rng, float_ = np.random.default_rng(0), np.dtype(jnp.result_type(float))
    xs = {name: rng.standard_normal(site.shape).astype(float_) for name, site in sites.items()}

    def why(of_site: Callable[[str], str | None], o: Observation) -> str | None:
        return next((reason for name in sorted(o.looks_at) if (reason := of_site(name))), None)

    no_mixture = {name: prior if isinstance(prior, str) else None for name, prior in priors.items()}
    wide = {o.name for o in asking if why(no_mixture.get, o)}  # under another prior than a mixture of Gaussians
    # Latents in them are moved best where what is known of them is in log-densities.
    alone = {o.name for o in asking if o.name in wide and not _bridged(graph, (o.name,))}
    paying = {o.name for o in asking if o.name in alone and not why(lambda name: _no_use(sites[name]), o)}
    wanted = [o for o in asking if (o.anneal.by_moments if o.anneal is not None else o.name in paying)]
    reasons = {o.name: reason for o in asking if (reason := traced.code.reasons[o.name])}
    linear = [o.name for o in asking if o.name not in reasons and (o.name not in wide or o in wanted)]
    reasons |= _not_linear(traced, linear, shapes) if linear else {}
    names = tuple(o.name for o in wanted if o.name not in reasons)
    reasons |= _bent(traced, names, shapes, xs) if names else {}
    no_moments = {o.name: reason for o in wanted if (reason := reasons.get(o.name) or why(_no_slope(sites), o))}
    reasons |= {o.name: reason for o in asking if (reason := why(no_mixture.get, o))}
    names = tuple(o.name for o in wanted if o.name not in no_moments)
    by_moments = ByMoments(names, _bridged(graph, names)) if names else None
    exact, others = None, [o.name for o in asking if o.name not in names]
    while (left := tuple(name for name in others if name not in reasons)) and exact is None:
        exact = _groups(traced, left, shapes, priors, xs, _bridged(graph, left), reasons)
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
        f"{o.name} {s.anneal}{cost if o.name in names else ''}{_since(o, reasons)}"
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
    assert graph.schedule is not None
    shapes = {site.name: site.shape for site in graph.sites}
    declared = {site.name: _prior(site) for site in graph.sites}
    priors = {name: prior if isinstance(prior, Prior) else None for name, prior in declared.items()}
    found = tempering(traced, names, priors, shapes, graph.schedule)
    if found.near is not None and any(likelihood.policies[name].plain for name in names):
        why = "tempered observations fall faster than any power of x/α, so they see x/α drawn towards the prior's mean"
        graph = graph.noted("temper", why)
    return graph, replace(likelihood, tempering=found)


def _since(o: Observation, reasons: dict[str, str]) -> str:
    return f", since {reasons[o.name]}" if o.name in reasons else ""


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


def _curved() -> str:
    return "its mean is not a linear function of what it measures"


def _no_use(site: Site) -> str | None:
    """Why moments are not taken of a site unless they are asked for.

    A factor with an energy has kernels with an accept test, which do without. Where powers do not sum to 1 the scores
    of noisy levels are not those of a noised density, and Tweedie's means are far from all data.
    """
    if "energy" in node_capabilities(site.root):
        return f"the factors of {site.name!r} have energies"
    power = top_of(unrolled(site.root), site.shape).power
    return None if np.allclose(power, 1.0) else f"the powers of the factors of {site.name!r} do not sum to 1"


def _no_slope(sites: Mapping[str, Site]) -> Callable[[str], str | None]:
    """Why the score of the noised marginals of a site has no Jacobian–vector products."""

    def of_site(name: str) -> str | None:
        marginal, _ = site_parts(sites[name].root)
        if marginal is None:
            return f"{name!r} has no prior with noised marginals"
        for leaf in leaves(marginal):
            x = jnp.zeros(leaf.factor.event_shape)

            def product(f: LeafFactor, x: Array) -> Array:
                conditions = f.call_conditions()
                return jax.jvp(lambda x: f.evaluate(x, f.schedule.at(0), conditions)[1], (x,), (x,))[1]

            traced, *_ = eqx.filter_make_jaxpr(product)(leaf.first, x)
            if has_primitive(traced.jaxpr, "custom_lin"):  # of a function whose derivative is given backwards alone
                return f"the score of factor '{leaf.label}' has no Jacobian–vector product (a jax.custom_vjp)"
        return None

    return of_site


@once
def _residuals_off(traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: dict[str, Array]) -> Array:
    """The greatest error of A·x + b of each observation at x, relative to what it is the sum of."""
    key = jax.random.key(0)
    latents = traced.draw(key, xs)

    def residuals(at: dict[str, Array]) -> list[Array]:
        found = traced.statements_at({**latents, **at}, key).moments
        return [found[name][0] for name in names]

    at = {name: xs[name] for name, _ in shapes}
    origin, slope = jax.jvp(residuals, (jax.tree.map(jnp.zeros_like, at),), (at,))
    each = zip(origin, slope, residuals(at), strict=True)
    return jnp.stack([jnp.max(jnp.abs(b + a - there) / (1 + jnp.abs(b) + jnp.abs(a))) for b, a, there in each])


def _bent(traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: dict[str, Any]) -> dict[str, str]:
    """Which observations have a derivative that was stopped or replaced."""
    off = np.asarray(_residuals_off(traced, names, shapes, xs)) > 1e-3
    return {n: _curved() for n, bent in zip(names, off, strict=True) if bent}


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
            reasons[name] = f"{_curved()} (JAX's `{mean.why}`)"
    return reasons


@once
def _measurements(
    traced: Traced, names: tuple[str, ...], shapes: Shapes, xs: dict[str, Array]
) -> tuple[Array, Array, Array]:
    """Which entries of A, (M, D), and of Σ, (M, M), can be other than zero; for some draws of the static sites the
    error of A·x + b at x, (4, M)."""

    def at_draw(key: Array) -> tuple[Array, Array, Array]:
        latents = traced.draw(key, xs)

        def moments_at(at: dict[str, Array]) -> list[tuple[Array, Array]]:
            found = traced.statements_at({**latents, **at}, key).moments
            return [found[name] for name in names]

        y, a, covariance = measure(shapes, moments_at, jax.tree.map(jnp.zeros_like, xs))
        there, _, _ = measure(shapes, moments_at, xs)
        flat = jnp.concatenate([jnp.ravel(xs[name]) for name, _ in shapes])
        return a, covariance, (y - a @ flat - there) / (1.0 + jnp.abs(y) + jnp.abs(a) @ jnp.abs(flat))

    slopes, covariances, errors = jax.vmap(at_draw)(jax.random.split(jax.random.key(0), 4))
    found, size = traced.linearity(shapes), slopes.shape[-1]
    pairs = [found[name] for name in names]
    slopes_of_means = [
        m.array.T if m.kind == Kind.LINEAR else jnp.zeros((len(noise.array), size)) for m, noise in pairs
    ]
    depends = (jnp.concatenate(slopes_of_means) != 0) | jnp.any(slopes != 0, 0)
    correlated = (block_diag(*[noise.array for _, noise in pairs]) != 0) | jnp.any(covariances != 0, 0)
    return depends, correlated, errors


def _groups(
    traced: Traced,
    names: tuple[str, ...],
    shapes: Shapes,
    priors: Mapping[str, Prior | str],
    xs: dict[str, Any],
    bridged: bool,
    reasons: dict[str, str],
) -> Exact | None:
    """The measurements sorted into groups that share nothing; None after a reason against some was added."""
    depends, correlated, errors = (np.asarray(a) for a in _measurements(traced, names, shapes, xs))
    sizes = [traced.code.shapes.moments[name][0].size for name in names]
    owner = np.repeat(np.arange(len(names)), sizes)  # the observation that each row of the measurement belongs to
    off = {names[i] for i in owner[np.abs(errors).max(0) > 1e-3]}
    if off:  # a derivative that was stopped or replaced
        reasons |= dict.fromkeys(off, _curved())
        return None
    offsets = dict(zip((n for n, _ in shapes), np.cumsum([0] + [int(np.prod(s)) for _, s in shapes[:-1]]), strict=True))
    parts = [
        replace(part, entries=part.entries + offsets[name])
        for name, _ in shapes
        if isinstance(prior := priors[name], Prior)
        for part in prior.parts
    ]
    count = len(owner)
    # What a row holds together: itself, the rows that its noise is correlated with, the parts that it depends on.
    members = [
        {("row", int(j)) for j in np.flatnonzero(correlated[i])} | {("row", i)}
        | {("part", p) for p, part in enumerate(parts) if depends[i, part.entries].any()}
        for i in range(count)
    ]  # fmt: skip
    inside, groups = np.zeros(depends.shape, bool), list[Stack]()
    for rows in connected(members):
        chosen = sorted({p for i in rows for kind, p in members[i] if kind == "part"})
        chosen_parts = [parts[p] for p in chosen]
        try:
            check_size(chosen_parts, len(rows))
        except NotGaussian as reason:  # without the observation that joins most, the others may do
            widest = max(rows, key=lambda i: len(members[i]))
            reasons[names[owner[widest]]] = str(reason)
            return None
        whole = (
            joint(chosen_parts)
            if chosen_parts
            else Gaussians(np.zeros(0, int), np.zeros(1), np.zeros((1, 0)), np.zeros((1, 0)))
        )
        inside[np.ix_(np.array(rows), whole.entries)] = True
        groups.append(stack_of(whole, np.array(rows), whole.entries))
    marginal = all(prior.marginal for prior in priors.values() if isinstance(prior, Prior))
    return Exact(stacked(groups), inside, names, shapes, marginal, bridged)
