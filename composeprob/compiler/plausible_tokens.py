"""Check that networks of tokens are what their factors declare, by two evaluations of
each at random tokens.

Positions of a masked network may see tokens of lower rank alone: weights of a network
that sees more would be those of no model, and nothing in its samples would show it.
Logits and log-ratios differ visibly from probabilities and ratios.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from composeprob import tuning
from composeprob.density.once import once
from composeprob.errors import NetworkError
from composeprob.factors.categorical import MaskedDiffusion
from composeprob.factors.uniform_diffusion import UniformDiffusion
from composeprob.ir.leaves import Graph
from composeprob.schedule import Schedule

Network = MaskedDiffusion | UniformDiffusion


class Defect(NamedTuple):
    """The way in which a network's outputs contradict its factor.

    Attributes:
        found: what they are, as the end of a sentence about the network.
        fix: the change of the network that is needed.
    """

    found: str
    fix: str


def check_token_networks(graph: Graph, noise: Schedule | None) -> None:
    """Refuse networks that see tokens which they must not see, or that return
    probabilities or ratios in the place of logarithms.

    Networks whose weights are not known yet, and those that latents choose, are not
    examined.

    Args:
        graph: with the groups of equal networks.
        noise: levels of uniform noise; None of reveals.
    """
    sites = {site.name: site for site in graph.sites}
    for group in graph.groups:
        factor = group.factor.uncalibrated
        if not isinstance(factor, Network) or group.latent is not None:
            continue
        given = {n: group.first[n] for n in factor.names if n in group.first}
        unknown = (jax.core.Tracer, jax.ShapeDtypeStruct)
        inputs = jax.tree.leaves((factor.network, given))
        if any(isinstance(leaf, unknown) for leaf in inputs):
            continue
        defect = _defect(factor, given, noise)
        if defect is not None:
            raise NetworkError(
                f"The network of factor '{factor.label}' {defect.found}",
                where=sites[group.members[0].site].where,
                fix=defect.fix,
            )


@once
def _outputs(
    network: Any, tokens: Array, second: Array, given: dict[str, Array]
) -> Float[Array, "events length values"]:
    """Outputs of a network for some events, ``second`` being its second argument."""

    def of_event(row: Array) -> Array:
        return jnp.asarray(network(row, second, **given), jnp.result_type(float))

    return jax.vmap(of_event)(tokens)


def _random(factor: Network, rng: np.random.Generator) -> Int[np.ndarray, " length"]:
    """Independent, uniform tokens."""
    return rng.integers(factor.num_values, size=factor.length).astype(np.int32)


@functools.singledispatch
def _defect(
    factor: Network, given: dict[str, Array], noise: Schedule | None
) -> Defect | None:
    """The defect of a network's outputs; None without one."""
    raise NotImplementedError(type(factor))


@_defect.register(MaskedDiffusion)
def _defect_of_masked(
    factor: MaskedDiffusion, given: dict[str, Array], noise: Schedule | None
) -> Defect | None:
    """The defect of a masked network's outputs; it has no noise."""
    rng = np.random.default_rng(0)
    rank = rng.permutation(factor.length).astype(np.int32)
    cut = factor.length // 2
    hidden = rank >= cut
    tokens = _random(factor, rng)
    # Every hidden token differs.
    shift = rng.integers(1, factor.num_values, size=factor.length)
    changed = np.where(hidden, (tokens + shift) % factor.num_values, tokens)
    second: Any = rank
    if factor.mask == "boolean":
        second = ~hidden
        changed = np.where(hidden, 0, tokens)
    pair = jnp.asarray(np.stack([tokens, changed]), jnp.int32)
    outputs = np.asarray(_outputs(factor.network, pair, jnp.asarray(second), given))
    if _are_probabilities(outputs[1]):
        return PROBABILITIES
    if factor.mask == "boolean":  # it is never shown a hidden token
        return None
    logs = np.asarray(jax.nn.log_softmax(jnp.asarray(outputs), axis=-1))
    may_not_differ = rank <= cut
    with np.errstate(invalid="ignore"):  # logits of −∞ in both
        changes = np.abs(logs[0] - logs[1])[may_not_differ]
    change = float(np.nanmax(changes, initial=0.0))
    if change <= tuning.UNSEEN_TOKENS:
        return None
    found = (
        "sees tokens that it must not see: other tokens at positions of rank "
        f"{cut} and above change its log-probabilities at positions of rank {cut} and "
        f"below, by up to {change:.2g}."
    )
    fix = (
        "let position i depend on the tokens of positions of lower rank alone: in "
        "attention by the mask rank[None, :] < rank[:, None]. A network that is told "
        "which tokens are visible takes mask='boolean'."
    )
    return Defect(found, fix)


@_defect.register(UniformDiffusion)
def _defect_of_noised(
    factor: UniformDiffusion, given: dict[str, Array], noise: Schedule | None
) -> Defect | None:
    """The defect of the outputs of a network of noised tokens at the noisiest
    level."""
    assert noise is not None
    rng = np.random.default_rng(0)
    tokens = _random(factor, rng)
    kept = jnp.asarray(np.asarray(noise.kept)[-1])
    row = jnp.asarray(tokens)[None]
    outputs = np.asarray(_outputs(factor.network, row, kept, given))[0]
    if factor.output == "x0":
        return PROBABILITIES if _are_probabilities(outputs) else None
    others = np.arange(factor.num_values) != tokens[:, None]
    # Noise alone: all neighbours are as probable, and log-ratios are 0.
    if np.abs(outputs[others] - 1).max() > tuning.RATIO_ERROR:
        return None
    found = (
        "returned ratios: at the noisiest level, where all neighbours are equally "
        f"probable, they are {outputs[others].mean():.2g} on average, and the "
        "logarithms of ratios would be 0."
    )
    return Defect(found, fix="return jnp.log of the ratios.")


PROBABILITIES = Defect(
    "returned probabilities: at every position they are numbers from 0 to 1 whose sum "
    "is 1.",
    "return the logits, without a softmax, or jnp.log of the probabilities.",
)


def _are_probabilities(outputs: Float[np.ndarray, "length values"]) -> bool:
    """Return whether outputs are the probabilities of values at each position."""
    inside = (outputs >= 0) & (outputs <= 1)
    return bool(inside.all() and np.abs(outputs.sum(-1) - 1).max() < 1e-3)
