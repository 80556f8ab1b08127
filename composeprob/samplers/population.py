"""Reweighting and resampling of a population of chains at a level, by every sampler
with weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from composeprob.samplers.random import stream
from composeprob.samplers.resampling import Resampler, have_descendants, statistics
from composeprob.samplers.run import Run


def reweighted(
    run: Run,
    rule: Resampler,
    level: Array,
    gain: Float[Array, " chains"],
    averaging: Float[Array, " chains"],
    error: Float[Array, " chains"],
) -> Run:
    """Add a level's increments to the log-weights, and resample the chains where the
    rule says so.

    Args:
        run: chains at this level, with the weights from before it.
        rule: of resampling.
        level: the level's number.
        gain: increments of the log-weights; NaN of chains that are lost.
        averaging: increments more if potentials were not averaged.
        error: how far the step's correction moved each chain.
    """
    spread = run.spread
    log_weights = run.log_weights + gain
    log_weights = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)
    # One gather for everything: each collective has a cost of its own.
    columns = [log_weights, ~jnp.isnan(gain), run.log_weights, gain, error]
    table = spread.gather(jnp.stack([*columns, averaging], axis=1))
    all_log_weights, usable, before, gains, errors, averagings = table.T
    facts = spread.on_population(
        statistics,
        all_log_weights,
        run.ancestors,
        averagings,
        before,
        gains,
        errors,
    )
    run = dataclasses.replace(run, averaging=run.averaging + facts.averaging)

    def resampled() -> Run:
        def choose(log_weights: Array) -> Array:
            return rule.ancestors(stream(run.shared, level), log_weights)

        chosen = spread.on_population(choose, all_log_weights)
        return dataclasses.replace(
            run,
            chains=spread.exchange(run.chains, chosen),
            ancestors=run.ancestors[chosen],
            log_evidence=run.log_evidence + facts.log_mean,
            log_weights=jnp.zeros_like(log_weights),
        )

    def kept() -> Run:
        return dataclasses.replace(run, log_weights=log_weights)

    # Samples must have equal weights, whatever the rule says at level 0.
    is_due = rule.should_resample(facts.ess, level) | (level == 0)
    run = jax.lax.cond(is_due, resampled, kept)
    counted = jnp.stack([usable == 0, have_descendants(run.ancestors)])
    number_lost, num_ancestors = jnp.sum(counted, axis=1, dtype=jnp.int32)
    records = run.records.counting(level, number_lost)
    records = records.at(
        level,
        ess=facts.ess,
        ancestors=num_ancestors.astype(facts.ess.dtype),
        weight_variance=facts.weight_variance,
        step_error=facts.step_error,
    )
    variance = facts.evidence_variance
    return dataclasses.replace(run, records=records, evidence_variance=variance)
