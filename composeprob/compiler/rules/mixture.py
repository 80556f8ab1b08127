"""The rules of mixtures: Σ_i exp(l_i)·f_i(x)."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.compiler.check import has_rate, node_capabilities
from composeprob.compiler.conjugate import NotGaussian, Prior, check_size, prior_of
from composeprob.compiler.experts import Raised, expert, experts_of
from composeprob.compiler.expressions import Expression, NodeValue, Outputs, Parts, dense, lower_expression, parts_of
from composeprob.compiler.latents import stays_normalised
from composeprob.compiler.normalise import each_normal, normal_of, runs
from composeprob.compiler.proper import Tail, tail_of, widest
from composeprob.compiler.top import Top, top_of
from composeprob.errors import CapabilityError
from composeprob.factors.gaussians import Gaussians, joint
from composeprob.factors.nodes import Mixture
from composeprob.ir.nodes import leaves
from composeprob.ir.render import formula_of
from composeprob.schedule import Noise


@formula_of.rule(Mixture)
def _formula(node: Mixture, parts: list[str], site: str, letter: str) -> str:
    shares = [f"{math.exp(w):.3g}·{part}" for w, part in node.each(parts)]
    if node.plate is None:
        return f"[{' + '.join(shares)}]"
    share = shares[0] if len(set(node.log_weights)) == 1 else f"w_{letter}·{parts[0]}"
    return f"[Σ_{{{letter}=1}}^{{{node.plate.count}}} {share}]"


stays_normalised.rule(Mixture)(lambda node, parts: node.calibrated and all(parts))


@normal_of.rule(Mixture)
def _normal(node: Mixture) -> Mixture:
    """A mixture stays where it is, as one factor of a product: to distribute the product over it would multiply the
    number of leaves and save no evaluation. One over data that does not depend on them is n times the same."""
    node = each_normal(node)
    if node.plate is None or runs(node.factors[0], node.plate):
        return node
    return replace(node, numbers=(float(np.logaddexp.reduce(node.log_weights)),), plate=None)


@node_capabilities.rule(Mixture)
def _offers(node: Mixture, parts: list[frozenset[str]]) -> frozenset[str]:
    """Of normalised parts with shares it keeps everything."""
    common = frozenset.intersection(*parts)
    if "energy" not in common:
        raise CapabilityError(
            f"A mixture needs the log-density of its parts, but one of {', '.join(leaf.name for leaf in leaves(node))} "
            "offers only its score.",
            fix="use a model trained with an energy parameterization.",
        )
    return common if "normalised" in common else common - {"exact_marginals"}


@experts_of.rule(Mixture)
def _experts(node: Mixture, parts: list[Raised]) -> Raised:
    """A part that is improbable at a sample is what mixtures are for: they are evaluated as a whole."""
    return expert(node) if all(parts) else []


@has_rate.rule(Mixture)
def _rate(node: Mixture, parts: list[bool]) -> bool:
    """Its parts must be normalised: with unknown constants that change from level to level its shares would drift, and
    no rate describes that."""
    return all(parts) and all("normalised" in leaf.factor.capabilities for leaf in leaves(node))


@top_of.rule(Mixture)
def _top(node: Mixture, tops: list[Top], shape: tuple[int, ...]) -> Top:
    exact = all(top.exact and np.allclose(top.power, tops[0].power) for top in tops)
    degree = tops[0].degree if exact and all(top.degree == tops[0].degree for top in tops) else math.nan
    constant = np.logaddexp.reduce([w + top.constant for w, top in node.each(tops)])
    entries = max(top.entries for top in tops)
    return Top(np.min([top.power for top in tops], axis=0), degree, float(constant), entries, exact)


@tail_of.rule(Mixture)
def _tail(node: Mixture, tails: list[Tail], *_: object) -> Tail:
    return Tail(lambda u: widest((tail.along(u) for tail in tails), u))


@prior_of.rule(Mixture)
def _prior(node: Mixture, priors: list[Prior], shape: tuple[int, ...]) -> Prior:
    """A mixture of whole priors: their components side by side."""
    for prior in priors:
        check_size(prior.parts)
    whole = [(log_weight, _sorted(joint(prior.parts))) for log_weight, prior in node.each(priors)]
    entries = whole[0][1].entries
    if any(not np.array_equal(part.entries, entries) for _, part in whole):
        raise NotGaussian("the parts of a mixture see different entries of the site")
    diagonal = all(part.covariances.ndim == 2 for _, part in whole)
    mixed = Gaussians(
        entries,
        np.concatenate([log_weight + part.log_weights for log_weight, part in whole]),
        np.concatenate([part.means for _, part in whole]),
        np.concatenate([part.covariances if diagonal else part.full for _, part in whole]),
    )
    return Prior([mixed], all(prior.marginal for prior in priors))


def _sorted(part: Gaussians) -> Gaussians:
    order = np.argsort(part.entries)
    covariances = part.covariances[:, order]
    covariances = covariances[:, :, order] if covariances.ndim == 3 else covariances
    return Gaussians(part.entries[order], part.log_weights, part.means[:, order], covariances)


class MixtureExpression(Expression):
    """Σ_i exp(l_i)·part_i: score and rate are averages under the responsibilities."""

    parts: Parts
    log_weights: Array

    def __call__(self, outputs: Outputs, noise: Noise) -> NodeValue:
        values = self.parts(outputs, noise, lambda value, _: replace(value, score=dense(value.score)))
        assert values.log_density is not None
        joint = self.log_weights + values.log_density
        responsibilities = jax.nn.softmax(joint)

        def mean(values: Array) -> Array:
            return jnp.tensordot(responsibilities, values, axes=1, precision="highest")

        rate = None if values.rate is None else mean(values.rate)
        return NodeValue(jax.nn.logsumexp(joint), mean(values.score), rate, mean(values.excess))


@lower_expression.rule(Mixture)
def _lower(node: Mixture, parts: list[Expression], site_shape: tuple[int, ...]) -> Expression:
    return MixtureExpression(parts_of(node, parts), jnp.asarray(node.log_weights, jnp.result_type(float)))
