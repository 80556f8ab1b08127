"""The rules of products: Π_i f_i(x)^{w_i}."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.compiler.check import has_rate, node_capabilities
from composeprob.compiler.conjugate import NotGaussian, Prior, check_size, connected, prior_of
from composeprob.compiler.experts import Raised, experts_of
from composeprob.compiler.expressions import (
    Expression,
    NodeValue,
    Outputs,
    Parts,
    Scattered,
    lower_expression,
    parts_of,
)
from composeprob.compiler.normalise import factors_of, normal_of, runs, same, same_of
from composeprob.compiler.proper import Tail, add, tail_of
from composeprob.compiler.top import Top, top_of
from composeprob.factors.base import Factor
from composeprob.factors.gaussians import Gaussians
from composeprob.factors.gaussians import product as product_of_gaussians
from composeprob.factors.nodes import Growth, Product
from composeprob.ir.render import formula_of, raised
from composeprob.schedule import Noise


@formula_of.rule(Product)
def _formula(node: Product, parts: list[str], site: str, letter: str) -> str:
    bracketed = [f"({p})" if isinstance(child, Product) else p for child, p in zip(node.factors, parts, strict=True)]
    factors = "·".join(map(raised, bracketed, node.powers))  # in a plate there is one part
    return f"Π_{{{letter}=1}}^{{{node.plate.count}}} {factors}" if node.plate else factors


@normal_of.rule(Product)
def _normal(node: Product) -> Factor | None:
    if node.powers == (1.0,):
        return normal_of.rule_for(node.factors[0])(node.factors[0])
    terms: list[tuple[Factor, float]] = []
    for child, power in factors_of.rule_for(node)(node, 1.0):
        for i, (known, known_power) in enumerate(terms):
            if same(child, known):
                terms[i] = (known, known_power + power)
                break
        else:
            terms.append((child, power))
    terms = [_raised(child, power) for child, power in terms if abs(power) > 1e-12]
    if not terms:
        return None
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    children, powers = zip(*terms, strict=True)
    return replace(node, factors=children, numbers=powers, plate=None)


def _raised(node: Factor, power: float) -> tuple[Factor, float]:
    """The power of a product over data is the product over data of powers."""
    return (replace(node, numbers=(power,) * len(node.numbers)), 1.0) if isinstance(node, Product) else (node, power)


@factors_of.rule(Product)
def _factors(node: Product, power: float) -> list[tuple[Factor, float]]:
    """Products over data are taken apart: Π_i f(x | c_i)^v·g(x)^w = (Π_i f(x | c_i))^v·g(x)^{n·w}."""
    pairs = zip(node.factors, node.powers, strict=False)  # in a plate there is one factor, and equal powers
    inner = [pair for child, exponent in pairs for pair in factors_of.rule_for(child)(child, power * exponent)]
    if (plate := node.plate) is None:
        return inner
    bare = replace(node, numbers=(1.0,) * plate.count)
    return [
        (bare.with_children((child,)), exponent) if runs(child, plate) else (child, plate.count * exponent)
        for child, exponent in inner
    ]


@same_of.rule(Product)
def _same(node: Product, other: Product) -> bool:
    return node.plate == other.plate and same(node.factors[0], other.factors[0])


@node_capabilities.rule(Product)
def _offers(node: Product, parts: list[frozenset[str]]) -> frozenset[str]:
    """Its normaliser is unknown, unless it was calibrated, and its level-k density is not a noised marginal."""
    offered = frozenset.intersection(*parts) - {"normalised", "exact_marginals"}
    return offered | {"normalised"} if node.calibrated else offered


@experts_of.rule(Product)
def _experts(node: Product, parts: list[Raised]) -> Raised:
    """In a plate there is one factor, and the powers of its n uses are equal; mixtures in it are not examined."""
    found = [(child, w * power) for part, w in zip(parts, node.powers, strict=False) for child, power in part]
    return [(child, power) for child, power in found if node.plate is None or not child.children]


has_rate.rule(Product)(lambda node, parts: all(parts))


@top_of.rule(Product)
def _top(node: Product, tops: list[Top], shape: tuple[int, ...]) -> Top:
    pairs = node.each(tops)
    power = sum((w * top.power for w, top in pairs), np.zeros(shape))
    degree, constant = sum(w * top.degree for w, top in pairs), sum(w * top.constant for w, top in pairs)
    entries = sum(abs(w) * top.entries for w, top in pairs)
    return Top(power, degree, constant, entries, all(top.exact for top in tops))


@tail_of.rule(Product)
def _tail(node: Product, tails: list[Tail], *_: object) -> Tail:
    pairs, fixed = node.each(tails), all(tail.fixed for tail in tails)
    return Tail(lambda u: functools.reduce(add, [power * tail.along(u) for power, tail in pairs]), fixed)


@prior_of.rule(Product)
def _prior(node: Product, priors: list[Prior], shape: tuple[int, ...]) -> Prior:
    """Parts that share entries multiply to one mixture; the others stay apart."""
    pending = [(part, power) for power, prior in node.each(priors) for part in prior.parts]
    marginal = all(prior.marginal for prior in priors)
    parts: list[Gaussians] = []
    for group in connected([part.entries for part, _ in pending]):
        members = [pending[i] for i in group]
        if len(members) == 1 and members[0][1] == 1.0:
            parts.append(members[0][0])
            continue
        marginal = False
        check_size([p for p, _ in members])
        found = product_of_gaussians(members)
        if found is None:
            raise NotGaussian("a power of a mixture, or a product with points or of negative precision, is none")
        parts.append(found)
    return Prior([part.normalised() for part in parts] if node.calibrated else parts, marginal)


class ProductExpression(Expression):
    """Π_i part_i^{w_i}; the powers, of a plate one for all, are arrays, so other powers reuse the compiled code."""

    parts: Parts
    powers: Array | Growth
    size: int = eqx.field(static=True)

    def __call__(self, outputs: Outputs, noise: Noise) -> NodeValue:
        powers, slopes = self.powers, dict[int, Array]()
        if isinstance(powers, Growth):
            growing, variance = powers.growing, noise.variance
            powers, slope = jax.jvp(powers, (variance,), (jnp.ones_like(variance),))
            slopes = {i: slope[i] for i in growing}

        def term(value: NodeValue, i: int) -> NodeValue:
            w, squared = powers[i], _squared(value.score)
            log_density = None if value.log_density is None else w * value.log_density
            rate = None if value.rate is None else w * (value.rate - 0.5 * squared)
            if rate is not None and i in slopes:
                assert value.log_density is not None  # no other exponent grows
                rate = rate - slopes[i] * value.log_density / noise.alpha**2
            return NodeValue(log_density, _times(w, value.score), rate, w * (value.excess + self.size))

        def total_of(terms: Array | Scattered) -> Array | Scattered:
            return terms.total(self.parts.over_sets) if isinstance(terms, Scattered) else jnp.sum(terms, axis=0)

        terms = self.parts(outputs, noise, term)
        total: NodeValue = jax.tree.map(total_of, terms, is_leaf=lambda node: isinstance(node, Scattered))
        rate = None if total.rate is None else total.rate + 0.5 * _squared(total.score)
        return NodeValue(total.log_density, total.score, rate, total.excess - self.size)


def _squared(score: Array | Scattered) -> Array:
    return jnp.sum((score.values if isinstance(score, Scattered) else score) ** 2)


def _times(w: Array, score: Array | Scattered) -> Array | Scattered:
    return replace(score, values=w * score.values) if isinstance(score, Scattered) else w * score


@lower_expression.rule(Product)
def _lower(node: Product, parts: list[Expression], site_shape: tuple[int, ...]) -> Expression:
    given = node.growth or np.asarray(node.powers[:1] if node.plate else node.powers)
    powers = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), given)
    return ProductExpression(parts_of(node, parts), powers, math.prod(site_shape))
