"""Global moves at level 0: what they leave invariant, what they mend, what is said of
them, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import composeprob as cp
from composeprob.samplers import finishers
from composeprob.samplers.choose import independent
from composeprob.samplers.finishers import (
    GaussianMixture,
    finite_rows,
    renewed_ancestors,
)
from refusals import refused
from sampling_cases import Calls, Counted, both, modes, normal, run, single
from zscores import LIMIT, assert_agrees, assert_disagrees, z_scores

SHORT = cp.Schedule.log_snr(6, -4.0, 6.0)
MEANS = np.array([[-2.0, 1.0], [2.0, 0.0], [1.0, -3.0]])
SDS, SHARES = np.array([0.3, 0.8, 0.5]), np.array([0.5, 0.2, 0.3])
EXACT = {str(j): share for j, share in enumerate(SHARES)}


def three_modes(schedule=SHORT):
    return cp.Analytic(modes(SHARES, MEANS, SDS), schedule)


def mode(x):
    return np.argmin(
        np.linalg.norm((x[:, None] - MEANS) / SDS[:, None], axis=2), axis=1
    )


def test_a_mixture_fits_what_points_come_from():
    rng = np.random.default_rng(0)
    which = rng.choice(3, 2000, p=SHARES)
    points = MEANS[which] + SDS[which, None] * rng.standard_normal((2000, 2))
    fit = GaussianMixture.fitted(points[:1000], points[1000:])
    found = np.exp(np.asarray(fit.log_weights))
    order = np.argsort(-found)[:3]
    np.testing.assert_allclose(found[order], [0.5, 0.3, 0.2], atol=0.05)
    np.testing.assert_allclose(np.asarray(fit.means)[order], MEANS[[0, 2, 1]], atol=0.2)
    means, roots = np.asarray(fit.means), np.asarray(fit.roots)
    law = [
        stats.multivariate_normal(mean, root @ root.T)
        for mean, root in zip(means, roots, strict=True)
    ]
    exact = np.log(
        sum(w * each.pdf(points[:5]) for w, each in zip(found, law, strict=True))
    )
    np.testing.assert_allclose(
        jax.vmap(fit.log_prob)(jnp.asarray(points[:5], jnp.float32)), exact, rtol=1e-4
    )
    draws = np.asarray(
        jax.vmap(fit.draw)(jax.random.normal(jax.random.key(0), (4000, 3)))
    )
    share = np.bincount(mode(draws), minlength=3) / 4000
    np.testing.assert_allclose(
        share, np.bincount(mode(points), minlength=3) / 2000, atol=0.04
    )


def test_a_chain_that_was_left_behind_forbids_no_mixture():
    points = np.repeat([-0.4, 1.0], 150)[:, None] + 1e-3 * np.random.default_rng(
        0
    ).standard_normal((300, 1))
    other = points.copy()
    other[0] = -1.9
    for pair in ((points, other), (other, points)):
        fit = GaussianMixture.fitted(*pair)
        assert (
            np.exp(
                np.asarray(jax.vmap(fit.log_prob)(jnp.asarray(points, jnp.float32)))
            ).min()
            > 1
        )


def test_chains_that_are_at_no_number_are_not_fitted(monkeypatch):
    """Nor is anything where there are no others: the run ends as its levels left it."""
    points = np.random.default_rng(0).standard_normal((60, 2))
    points[::7, 0], points[1, 1], points[2, 0] = np.nan, 1e200, 1e30
    assert len(finite_rows(points)) == 50
    assert np.isfinite(
        np.asarray(GaussianMixture.fitted(finite_rows(points), finite_rows(points)).means)
    ).all()
    monkeypatch.setattr(finishers, "finite", lambda points: points[:1])
    result, plain = (
        frozen(cp.compile(single, three_modes()), 0, then)
        for then in (cp.GlobalMoves(5), ())
    )
    assert result.about.global_acceptance is None
    np.testing.assert_array_equal(result["x"], plain["x"])
    assert result.evaluations == plain.evaluations


def frozen(density, seed, then=()):
    """Chains that are too few levels apart to have the modes' shares, under kernels
    that never cross."""
    return run(
        density, seed, chains=400, sampler=cp.AnnealedMCMC(cp.MALA(), 1, then=then)
    )


def shares(results):
    """Each run's share of each mode, by name."""
    all_ = np.array(
        [np.bincount(mode(r["x"]), minlength=3) / len(r["x"]) for r in results]
    )
    return {str(j): all_[:, j] for j in range(3)}


def test_modes_get_their_shares_and_without_global_moves_they_do_not():
    density = cp.compile(single, three_modes())
    moved = [frozen(density, seed, cp.GlobalMoves()) for seed in range(8)]
    assert_agrees(z_scores(shares(moved), EXACT))
    assert_disagrees(
        z_scores(shares([frozen(density, seed) for seed in range(8)]), EXACT)
    )
    assert all(result.about.global_acceptance > 0.3 for result in moved)
    spread = np.std(shares(moved)["0"]) / np.sqrt(0.25 / 400)
    assert 0.4 < spread < 1.8  # of 8 runs; chains are as good as independent ones


def test_a_proposal_whose_own_density_is_left_out_is_found_out(monkeypatch):
    monkeypatch.setattr(GaussianMixture, "log_prob", lambda self, row: jnp.zeros(()))
    density = cp.compile(
        single, three_modes(cp.Schedule.log_snr(5, -4.0, 6.0))
    )  # another shape: compiled anew
    moved = [frozen(density, seed, cp.GlobalMoves()) for seed in range(8)]
    assert_disagrees(z_scores(shares(moved), EXACT))


def test_chains_are_independent_again_only_where_nearly_all_went():
    """Where one move takes four fifths elsewhere the others still tell what few first
    chains there were."""
    ancestors, went = (
        jnp.array([3, 3, 3, 0, 0, 5]),
        jnp.array([True, False, False, True, False, True]),
    )
    assert renewed_ancestors(ancestors, went).tolist() == [0, 1, 1, 3, 4, 5]
    assert renewed_ancestors(ancestors, jnp.zeros(6, bool)).tolist() == [0, 0, 0, 3, 3, 5]
    assert renewed_ancestors(ancestors, jnp.ones(6, bool)).tolist() == list(range(6))
    density = cp.compile(single, three_modes())
    sampler = lambda then: cp.SMC(steps_per_level=1, weights="density", then=then)
    closings = (), cp.GlobalMoves(1), cp.GlobalMoves(20)
    none, one, many = (
        run(density, 1, chains=400, sampler=sampler(then)) for then in closings
    )
    assert none.about.global_acceptance is None
    assert len(np.unique(none._genealogy.index)) < 200
    assert 0.3 < one.about.global_acceptance < 0.9
    np.testing.assert_array_equal(one._genealogy.index, none._genealogy.index)
    assert none.effective_chains < 100
    assert many.effective_chains > 380
    assert many.log_evidence == none.log_evidence
    assert many.log_evidence_error == none.log_evidence_error
    assert many.evaluations == none.evaluations + 20
    assert "global moves" in str(many.summary())
    assert "then GlobalMoves(20)" in many.about.sampler


def test_where_all_chains_moved_weights_of_levels_are_the_evidences_affair_alone():
    """A hill of width 0.2 that no noisier level shows, on which weights leave 16 of
    1,000 chains."""
    levels = cp.Schedule.log_snr(12)
    hill = lambda x, level: jnp.logaddexp(
        0.0, 6.4 - 0.5 * jnp.sum((x - 2.0) ** 2) / 0.2**2
    )
    energy = cp.Energy(hill, levels, event_shape=(2,), top_power=0.0)
    density = cp.compile(both, normal(jnp.zeros(2), 1.0, levels), energy)
    gained = (
        np.exp(6.4) * 0.04 / 1.04 * np.exp(-4.0 / 1.04)
    )  # of N(0, I) times the hill alone

    def descended(seed, weights, then):
        sampler = cp.SMC(cp.MALA(cp.Adaptive()), 3, weights=weights, then=then)
        result = run(density, seed, chains=1000, sampler=sampler)
        assert 0.01 < np.nanmin(result.levels["ess"]) < 0.05
        return result

    moved = [descended(seed, "density", cp.GlobalMoves(8)) for seed in (0, 2, 4)]
    assert all(result.status.ok and result.log_evidence is None for result in moved)
    on_hill = [np.mean(((result["x"] - 2) ** 2).sum(1) < 0.7**2) for result in moved]
    share = gained / (1 + gained)
    assert abs(np.mean(on_hill) - share) < LIMIT * np.sqrt(share * (1 - share) / 3000)
    # Without moves; where many chains have not moved; with an evidence; and of 10
    # chains that know too little of modes.
    moves, one = cp.GlobalMoves(8), cp.GlobalMoves(1)
    controls = (
        (0, "density", ()),
        (0, "density", one),
        (0, "feynman_kac", moves),
        (3, "density", moves),
    )
    for seed, weights, then in controls:
        assert descended(seed, weights, then).status.has("weights_collapsed")


def test_they_cost_one_evaluation_each():
    calls = Calls()
    density = cp.compile(
        single,
        normal(jnp.zeros(2), 1.0, SHORT)
        * cp.Energy(Counted(calls), SHORT, event_shape=(2,)),
    )
    counts = []
    for then in ((), cp.GlobalMoves(7)):
        calls.reset()
        result = run(
            density, chains=16, sampler=cp.AnnealedMCMC(cp.MALA(0.1), 1, then=then)
        )
        counts.append((calls.run, result.evaluations))
    assert counts[1][0] - counts[0][0] == 7  # of all chains at once
    assert counts[1][1] - counts[0][1] == 7


def test_few_chains_have_the_modes_shares_by_default():
    """A second factor weighs the modes anew, and at noisier levels otherwise."""
    levels = cp.Schedule.log_snr(20)
    density = cp.compile(
        both,
        cp.Analytic(modes([0.3, 0.7], [-3.0, 3.0], 0.3), levels),
        normal(1.0, 2.0, levels),
    )
    one, other = (
        w * stats.norm.pdf(m, 1.0, np.hypot(2.0, 0.3))
        for w, m in ((0.7, 3.0), (0.3, -3.0))
    )
    exact = {"x": one / (one + other)}

    def right(seed, sampler=None):
        return np.mean(run(density, seed, chains=100, sampler=sampler)["x"] > 0)

    assert_agrees(z_scores({"x": np.array([right(seed) for seed in range(8)])}, exact))
    without, _ = independent(density, "few chains")
    assert_disagrees(
        z_scores({"x": np.array([right(seed, without) for seed in range(8)])}, exact)
    )


def test_a_run_that_goes_on_does_not_make_them_twice(tmp_path):
    density = cp.compile(single, three_modes())
    options = {
        "chains": 400,
        "sampler": cp.AnnealedMCMC(cp.MALA(), 1, then=cp.GlobalMoves(5)),
    }
    whole = run(density, draws=6, **options)
    run(density, draws=3, checkpoint_dir=tmp_path, **options)
    again = run(density, draws=6, checkpoint_dir=tmp_path, **options)
    np.testing.assert_array_equal(again["x"], whole["x"])
    assert again.about.global_acceptance == whole.about.global_acceptance
    assert again.evaluations == whole.evaluations


@pytest.mark.parametrize(
    "then", [20, None, cp.GlobalMoves, (cp.WarmUp(), "GlobalMoves")]
)
def test_only_closings_close_a_run(then):
    words = r"then= takes post-processing moves at level 0"
    refused(lambda: cp.SMC(then=then), cp.errors.WrongTypeError, words)
    refused(
        lambda: cp.AnnealedMCMC(cp.MALA(), 1, then=then),
        cp.errors.WrongTypeError,
        words,
    )


def test_what_they_need():
    """A whole number of them, chains enough for a mixture, and how deep the modes
    are."""
    for count, kind, words in (
        *((count, cp.errors.InvalidValueError, "at least 1") for count in (-1, 0)),
        *(
            (count, cp.errors.WrongTypeError, "a whole number")
            for count in (2.5, True, "many")
        ),
    ):
        refused(
            lambda: cp.GlobalMoves(count),
            kind,
            rf"GlobalMoves\(number=\) must be {words}; got",
        )
    learned = cp.Diffusion(
        lambda x, t: jnp.sum(x**2),
        SHORT,
        event_shape=(2,),
        parameterization="energy",
        time="sigma",
    )
    for factor, chains, kind, words in (
        (
            three_modes(),
            15,
            cp.errors.InvalidValueError,
            "positions of 2 numbers.*16 chains or more",
        ),
        (
            learned,
            400,
            cp.errors.CapabilityError,
            "needs `mode_depth`, but factor.*leave cp.GlobalMoves out",
        ),
    ):
        density = cp.compile(single, factor)
        refused(
            lambda: run(density, chains=chains, sampler=cp.SMC(then=cp.GlobalMoves())),
            kind,
            words,
        )
