"""The benchmark of image models: intervals, cells that are kept, and checks that can
fail."""

import images
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from pictures import shares
from pictures.cells import Cell, Kept, share
from pictures.drawn import draw
from scipy.stats import norm

import composeprob as cp
from sampling_cases import single

FIRST_ORDER = cp.ReverseStep(order=1, control="none")


def placed(objects, sampler, successes, trials=100):
    found = share(np.arange(trials) < successes)
    return {
        "part": "placed",
        "objects": objects,
        "sampler": sampler,
        "w": 2.0,
        "form": "energy",
        "all_placed": found,
    }


def test_intervals_of_a_share_and_of_several_runs():
    found = share([True] * 95 + [False] * 5)
    assert found["share"] == 0.95
    np.testing.assert_allclose(
        found["interval"], [0.8872, 0.9836], atol=1e-4
    )  # Clopper and Pearson's
    assert share([True] * 20)["interval"][1] == 1.0
    found = shares.between([0.3, 0.4, 0.5])
    assert found["share"] == pytest.approx(0.4)
    half = 4.3027 * 0.1 / 3**0.5  # Student's
    np.testing.assert_allclose(found["interval"], [0.4 - half, 0.4 + half], atol=1e-4)


def test_cells_are_kept_and_other_processes_may_add_some(tmp_path):
    file = tmp_path / "cells.json"
    ours, theirs = Kept(file, tmp_path / "images"), Kept(file, tmp_path / "images")
    one, other = (
        Cell("placed", {"objects": k, "sampler": "MALA"}, lambda: None) for k in (1, 3)
    )
    assert one not in ours
    ours.put(one, {"scenes": 4}, np.zeros((2, 8, 8, 3)))
    theirs.put(other, {"scenes": 5}, np.ones((2, 8, 8, 3)))
    assert one in theirs
    cell = ours.cells["placed objects=3 sampler=MALA"]
    assert set(cell.pop("made_at")) == {"commit", "paths", "changed"}  # by which code
    assert cell == {"part": "placed", "objects": 3, "sampler": "MALA", "scenes": 5}
    assert np.load(ours.images_of(other.name)).mean() == 1


def test_checks_fail_where_they_should():
    def checked(word, *cells):
        return [holds for text, holds in images.checks(cells).items() if word in text]

    assert checked("", placed(3, "reverse", 88), placed(3, "MALA", 90)) == [True, True]
    assert checked("at least", placed(3, "reverse", 60), placed(3, "MALA", 70)) == [
        False
    ]
    assert checked("not worse", placed(3, "reverse", 99), placed(3, "HMC", 86)) == [
        False
    ]
    for successes in (20, 30):
        chosen = placed(5, "default", successes, trials=30)
        assert checked("chooses", placed(5, "MALA", 97), chosen) == [successes == 30]
    mixed = {
        "part": "mixed",
        "classes": "3 and 8",
        "sampler": "SMC",
        "first": share(np.arange(1000) < 250),
    }
    assert checked("", mixed) == [False]
    for successes in (90, 97):
        told = {
            "part": "told",
            "wrong": "circle or square",
            "by_log_snr": {"6": share(np.arange(100) < successes)},
        }
        assert checked("", told) == [successes == 97]


def test_panels_and_lines_say_what_was_found():
    assert images.title(placed(3, "MALA", 90)) == "3 objects, w = 2, MALA: 0.90"
    told = {"sampler": "SMC", "satisfied": share([True, False])}
    assert (
        images.title({"part": "captions", "formula": "AND", **told}) == "AND, SMC: 0.50"
    )
    assert (
        images.title({"part": "tapestry", "counted": "once", **told})
        == "counted once, SMC: 0.50"
    )
    first = {"share": 0.3343, "interval": [0.319, 0.35]}
    cell = {
        "part": "shares",
        "ink": "thin",
        "first": first,
        "images": 4096,
        "evaluations": 59,
        "seconds": 112.6,
    }
    alone = images.row(cell | {"sampler": shares.ALONE})
    found = ["0.334 (0.32–0.35)", "4096 images of each, 59 evaluations", "112.6"]
    assert alone == ["shares", "3 (0.2) or 8 (0.8), thin", shares.ALONE, *found]
    drawn = images.row(
        cell | {"sampler": "SMC", "neither": 0.114, "findings": ["shares_frozen"]}
    )
    assert (
        drawn[4] == "neither 0.114, 4096 images, 59 evaluations, found: shares_frozen"
    )


def test_one_image_of_each_density():
    schedule = cp.Schedule.log_snr(12)
    near = [
        cp.Analytic(dist.Normal(jnp.full((4, 4, 3), mean), 0.01), schedule)
        for mean in (0.0, 1.0, 2.0)
    ]
    sampler = cp.AnnealedMCMC(cp.MALA(0.0001), 1, reverse_step=FIRST_ORDER)
    drawn = draw((cp.compile(single, f) for f in near), sampler, chains=2)
    assert drawn.images.shape == (3, 4, 4, 3)
    np.testing.assert_allclose(drawn.images.mean((1, 2, 3)), [0.0, 1.0, 2.0], atol=0.2)
    assert 0 < drawn.acceptance <= 1
    assert drawn.seconds > 0
    assert draw([cp.compile(single, near[0])], cp.Ancestral()).acceptance is None


def test_a_known_share_of_two_gaussians_under_a_measurement():
    """Classes N(μₖ, τ²) measured as y ± s: Zₖ and what the judge `x < 0` finds are in
    closed form."""
    rng = np.random.default_rng(0)
    means = (-0.5, 0.5)
    tau = 1.0
    y = -0.4
    s = 0.5
    drawn = [rng.normal(mean, tau, 200_000) for mean in means]
    likelihoods = [np.exp(-0.5 * ((x - y) / s) ** 2) for x in drawn]
    pairs = [
        g[:, None] * np.stack([x < 0, np.ones(len(x))], 1)
        for x, g in zip(drawn, likelihoods, strict=True)
    ]
    evidence = np.array(
        [
            w * norm.pdf(y, mean, np.hypot(tau, s))
            for w, mean in zip((0.2, 0.8), means, strict=True)
        ]
    )
    spread = tau * s / np.hypot(tau, s)
    centres = [(mean * s**2 + y * tau**2) / (tau**2 + s**2) for mean in means]
    exact = float(evidence @ norm.cdf(0, centres, spread) / evidence.sum())
    found, error = shares.ratio(pairs, (0.2, 0.8))
    assert 0 < error < 0.002
    assert abs(found - exact) < 4 * error
    # Of classes in equal shares, or without the measurement, it would be another
    # number.
    assert abs(shares.ratio(pairs, (0.5, 0.5))[0] - exact) > 10 * error
    assert abs(0.2 * norm.cdf(0.5) + 0.8 * norm.cdf(-0.5) - exact) > 10 * error
    several = [
        shares.ratio([part[i::500] for part in pairs], (0.2, 0.8)) for i in range(500)
    ]
    assert (
        0.88
        < np.std([value for value, _ in several])
        / np.mean([error for _, error in several])
        < 1.12
    )


def test_what_is_measured_is_what_the_program_measures():
    f = cp.Analytic(dist.Normal(jnp.zeros((8, 8, 1)), 1.0), cp.load("digits").schedule)
    density = cp.compile(shares.measured_ink, f, -0.5, 0.02, "tempered")
    some = np.random.default_rng(0).normal(-0.5, 0.3, (5, 8, 8, 1)).astype(np.float32)
    alpha = f.schedule.alpha[
        0
    ]  # what the program sees is x₀/α₀, whose logarithms to the power 1 are added
    prior = dist.Normal(0.0, 1.0).log_prob(some).sum((1, 2, 3))
    joint = np.asarray([density.log_density({"x": x}, 0) for x in some]) - np.asarray(
        prior
    )
    ours = shares.log_likelihood(some, -0.5, 0.02)
    assert alpha < 1
    np.testing.assert_allclose(joint - joint[0], ours - ours[0], rtol=1e-3, atol=0.05)


@pytest.mark.parametrize(
    ("reverse", "smc", "agrees", "apart"),
    [
        ((0.26, 0.30), (0.36, 0.46), True, True),
        ((0.26, 0.30), (0.45, 0.50), False, True),  # apart from what is known
        ((0.26, 0.37), (0.38, 0.46), True, True),
        ((0.26, 0.39), (0.40, 0.46), True, False),  # reaches into what is known
        ((0.26, 0.35), (0.34, 0.46), True, False),  # reaches into the other's interval
    ],
)
def test_shares_are_won_only_by_intervals_apart(reverse, smc, agrees, apart):
    cells = [
        {
            "part": "shares",
            "ink": "thin",
            "sampler": name,
            "first": {"share": sum(of) / 2, "interval": of},
        }
        for name, of in (
            (shares.ALONE, (0.38, 0.41)),
            ("reverse, tempered", reverse),
            ("SMC", smc),
        )
    ]
    assert list(shares.checks(cells).values()) == [agrees, apart]
    assert list(images.checks(cells).values()) == [agrees, apart]
    assert shares.checks(cells[1:]) == {}
