"""Renoising of tokens: detailed balance by enumeration, laws, ancestors, counts of
evaluations, and mutants that must fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.samplers.leaping import LeapPhases
from composeprob.samplers.renoise_tokens import TokenTurns, TokenWalks, candidates
from composeprob.samplers.resampling import Resample
from composeprob.samplers.reveal import RevealPhases
from refusals import refused
from sampling.test_leaping import network_of
from token_cases import (
    KEY,
    NUM_CHAINS,
    STATES,
    A,
    B,
    closed,
    run,
    scores,
    site,
    table,
)
from zscores import assert_agrees, assert_disagrees

LEVELS = cp.Schedule.log_snr(8, -8.0, 6.0)  # rungs 2 apart: steps are inexact
TARGET = A * B
"""Unnormalised probabilities of the product of two joints."""


def product():
    return closed(A) * closed(B)


def noised_density(factor):
    return cp.compile(site, factor, schedule=LEVELS)


def stops(density, walks, rung):
    """Every state at a rung, evaluated."""
    leaps = LeapPhases(density, Resample(), 0, 0, leads=False)
    below = walks.levels[max(rung - 1, 0)]

    @jax.jit
    def at(tokens):
        answer = density.tokens.noised(tokens, walks.levels[rung], below)
        logs = tuple(base for base in answer.bases)
        return leaps.evaluated(tokens, logs, answer)

    return jax.vmap(at)(jnp.asarray(STATES))


def transition(density, mutant=False):
    """The transition matrix of proposals that turn at the first rung, by enumeration of
    the states there, and the probabilities of all ways."""
    walks = TokenWalks(density, jnp.asarray([0, 2], jnp.int32))
    above = stops(density, walks, 1)
    place = walks.step_from(jnp.int32(1))

    @jax.jit
    def edges(above):
        def log_edge(below):
            return walks.log_edge(below, above, place)

        def log_up(below):
            kept = walks.leaps.log_noising(place, above.position)
            return jnp.sum(kept[jnp.arange(len(below)), below])

        states = jnp.asarray(STATES)
        return jax.vmap(log_edge)(states), jax.vmap(log_up)(states)

    log_edge, log_up = (np.asarray(a, float) for a in jax.vmap(edges)(above))
    up = np.exp(log_up).T  # from x to the upper state u
    down = np.exp(log_up - log_edge)  # from u to y
    log_f = np.asarray(stops(density, walks, 0).log_density, float)
    moves = np.zeros((len(STATES), len(STATES)))
    for u in range(len(STATES)):
        log_ratio = log_f[None] - log_f[:, None]
        if not mutant:
            log_ratio = log_ratio + log_edge[u][None] - log_edge[u][:, None]
        accepted = np.minimum(np.exp(log_ratio), 1)
        moves += up[:, u, None] * down[u][None] * accepted
    return moves, up.sum(1), down.sum(1), np.exp(log_f - log_f.max())


def test_uniform_noise_is_in_detailed_balance():
    moves, up, down, target = transition(noised_density(product()))
    np.testing.assert_allclose(up, 1, atol=1e-5)
    np.testing.assert_allclose(down, 1, atol=1e-5)
    flow = target[:, None] * moves
    np.testing.assert_allclose(flow, flow.T, atol=2e-6)
    # Most of the flow goes to other states.
    assert (flow.sum() - np.trace(flow)) / target.sum() > 0.3


def test_without_the_ratio_of_the_steps_it_is_not():
    moves, _, _, target = transition(noised_density(product()), mutant=True)
    flow = target[:, None] * moves
    assert np.abs(flow - flow.T).max() > 1e-3


def test_a_single_network_accepts_all():
    density = noised_density(network_of(A, "ratios"))
    sampler = cp.TauLeaping(0, 0, then=cp.Renoise(3))
    result = cp.infer(density, KEY, num_chains=256, sampler=sampler, progress=False)
    assert result.about.global_acceptance == pytest.approx(1.0, abs=1e-3)


def noised_run(then):
    """A run under uniform noise whose chains are equal to few ancestors before the
    moves."""
    sampler = cp.TauLeaping(0, 0, resample=0.9, then=then)
    return cp.infer(
        noised_density(product()),
        KEY,
        num_chains=NUM_CHAINS,
        sampler=sampler,
        progress=False,
    )


def test_uniform_noise_leaves_the_law_and_renews_ancestors():
    none = noised_run(())
    moved = noised_run(cp.Renoise(12))
    assert_agrees(scores(moved, noised_target()))
    assert len(np.unique(moved._genealogy.index)) > 0.95 * NUM_CHAINS
    assert len(np.unique(none._genealogy.index)) < 0.9 * NUM_CHAINS
    assert 0.2 < moved.about.global_acceptance < 1


def noised_target():
    """The product of the two joints under the noise of level 0."""
    density = noised_density(product())
    logs = [density.log_density({"s": jnp.asarray(state)}, 0) for state in STATES]
    return np.exp(np.asarray(logs, float)).reshape(A.shape)


def test_without_the_ratio_the_law_of_uniform_noise_is_lost(monkeypatch):
    monkeypatch.setattr(TokenWalks, "log_edge", lambda *_: jnp.zeros(()))
    moved = noised_run(cp.Renoise(13))
    assert_disagrees(scores(moved, noised_target()))


def hidden_run(then, factor=None):
    if factor is None:
        factor = product()
    return run(site, factor, sampler=cp.Reveal(0, 0, then=then))


def test_remasks_leave_the_law_and_renew_ancestors():
    moved = hidden_run(cp.Renoise(8))
    assert_agrees(scores(moved, TARGET))
    assert len(np.unique(moved._genealogy.index)) > 0.95 * NUM_CHAINS
    assert 0.3 < moved.about.global_acceptance < 1
    assert "then Renoise(8)" in moved.about.sampler
    near = hidden_run(cp.Renoise(8, levels=(1, 2)))
    none = hidden_run(())
    np.testing.assert_array_equal(near._genealogy.index, none._genealogy.index)


def test_without_their_ratio_they_do_not(monkeypatch):
    hidden = RevealPhases.hidden

    def without(self, now, run, state, words, proposals, answers):
        run, after = hidden(self, now, run, state, words, proposals, answers)
        return run, type(after)(
            after.turn,
            after.accepted,
            after.remasked,
            after.trial,
            jnp.zeros_like(after.log_ratio),
            after.renewed,
        )

    monkeypatch.setattr(RevealPhases, "hidden", without)
    c = table(3, 1.5)
    d = table(4, 1.5)
    sharp = hidden_run(cp.Renoise(9), closed(c) * closed(d))
    assert_disagrees(scores(sharp, c * d))


def test_each_step_costs_an_evaluation():
    density = cp.compile(site, product())
    tried = candidates(density, None)
    assert tried.turns == (3, 1)
    moved = hidden_run(cp.Renoise(8))
    none = hidden_run(())
    spent = moved.evaluations - none.evaluations
    pilots = 2 * sum(tried.turns)
    # Turns are those of whole remasks, or of single tokens.
    assert pilots + 8 * 2 <= spent <= pilots + 8 * 6
    assert TokenTurns((2, 3), (0.5, 1.0), (), 4).evaluations == 14


@cp.program
def hidden(f):
    cp.sample("s", f)


def test_they_are_refused_in_words():
    density = cp.compile(hidden, product())

    def run_with(then):
        cp.infer(density, KEY, num_chains=4, sampler=cp.Reveal(then=then))

    refused(lambda: run_with(cp.Renoise(levels=(20, 30))), InvalidValueError)
    refused(lambda: run_with(cp.Renoise(factor="f")), CapabilityError)
    refused(lambda: cp.TauLeaping(then=cp.WarmUp()), CapabilityError)
