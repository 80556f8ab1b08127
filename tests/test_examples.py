"""Every file of examples/ runs, and says what it should."""

import importlib.util
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import norm

import composeprob as cp
from composeprob.models.worlds import captions, detector, digits

EXAMPLES = Path(__file__).parent.parent / "examples"
CHAINS = 600
CENTRE = np.array([0.0, -0.35])  # of the arc that own_network learns
FEW = {"scene": 6, "captions": 6, "queens": 16, "separation": 100}
FEW |= {"tapestry": 1, "two_scales": 1, "text_to_image": 4, "planning": 4}
"""Chains of examples whose models are large."""
NOISE = (
    4 * 0.5 / np.sqrt(CHAINS / 4)
)  # four standard errors of a share, with a quarter of the chains effective


def near(found, exact, tolerance=NOISE):
    np.testing.assert_allclose(found, exact, atol=tolerance)


def shares_near(result, modes, exact):
    near(cp.metrics.mode_weights(result["x"], modes, result.log_weights), exact)


def check_product(module, result):
    shares_near(result, [[0.0, 0.5], [0.0, -0.5]], [0.5, 0.5])
    assert np.mean(np.abs(result.unweighted()["x"][:, 0]) < 0.25) > 0.95


def check_mixture(module, result):
    shares_near(result, [[-0.5, 0.0], [0.5, 0.0]], [0.75, 0.25])


def check_calibration(module, result):
    shares_near(result, [module.centre, [0.0, 0.0]], [0.8, 0.2])


def check_negation(module, result):
    near(
        module.share_inside(result["x"], result.log_weights), 0.041, 0.03
    )  # 0.184 in the box itself
    assert np.mean(np.abs(result["x"]).max(-1) < 0.73) > 0.97


def check_power(module, result):
    shares_near(result, module.centers, [0.64 / 0.68, 0.04 / 0.68])


def check_guidance(module, result):
    # scale 1 would leave 0.16 on the other side
    assert np.mean(result.unweighted()["x"][:, 0] < 0) < 0.08


def check_observation(module, result):
    shares_near(result, module.modes, module.exact_shares())


def check_two_sensors(module, result):
    exact = np.array(module.exact_noises())
    found = [result[f"noise_{name}"].mean() for name in module.NOISES]
    near(
        found / exact, 1.0, 0.15
    )  # a posterior spread of a third, a quarter of the chains effective


def check_deblur(module, result):
    shares, noise = module.exact()
    draws = result.unweighted()
    near(draws["noise"].mean(), noise, 0.1 * noise)
    away = ((draws["x"][:, None] - module.steps) ** 2).sum(2)
    near(
        np.bincount(away.argmin(1), minlength=len(shares)) / len(away),
        shares,
        1.5 * NOISE,
    )


def check_hierarchy(module, result):
    for name, (mean, sd) in zip(("gain", "noise"), module.exact(), strict=True):
        log = np.log(result.unweighted()[name])
        near(log.mean(), mean, 0.3 * sd)
        near(log.std(), sd, 0.25 * sd)


def check_own_network(module, result):
    x = result.unweighted()["x"]
    assert np.mean(x[:, 0] > -0.05) > 0.97  # in the box
    assert (
        np.std(np.linalg.norm(x - CENTRE, axis=1)) < 0.12
    )  # on the arc, whose radius is 0.7
    near(np.mean(np.linalg.norm(x - CENTRE, axis=1)), 0.7, 0.05)


def check_tall_posterior(module, result):
    theta = result.unweighted()["theta"]
    near(
        theta.mean(0), [0.51, -0.48], 0.1
    )  # the posterior on a grid: standard deviations 0.11 and 0.13
    assert np.all(theta.std(0) < 0.2)


def check_bayesflow_estimator(module, result):
    xs, theta = module.observations(), result.unweighted()["theta"]
    near(
        theta.mean(0), xs.sum(0) / (len(xs) + module.NOISE**2), 0.25
    )  # the network's own error, three times over
    near(theta.std(0), np.sqrt(module.NOISE**2 / (len(xs) + module.NOISE**2)), 0.1)


def check_own_energy(module, result):
    x = result.unweighted()["x"]
    near(x.prod(1).mean(), 0.1, 0.02)
    assert x.prod(1).std() < 0.06


def check_digits(module, result):
    assert np.mean(digits.judge(result["x"]) == 3) > 0.95  # 0.9 at scale 1


def check_two_digits(module, result):
    found = digits.judge(result.unweighted()["x"])
    near(np.mean(found == 3) / np.mean((found == 3) | (found == 8)), 0.2, 0.04 + NOISE)


def check_scene(module, result):
    places = np.broadcast_to(module.PLACES, (len(result["x"]), len(module.PLACES), 2))
    assert detector.placed(detector.detect(result["x"]), places).mean() > 0.8


def check_captions(module, result):
    found = detector.detect(result["x"])
    asked = (
        "a red object on the left",
        "a blue object on the right",
        "a green object on the right",
        "a triangle",
    )
    red, blue, green, triangle = (captions.true_of(caption, found) for caption in asked)
    assert np.mean(red & (blue | green) & ~triangle) > 0.6


def check_tapestry(module, result):
    words = module.CAPTIONS.split()
    shown = [
        result["x"][0, y : y + 32, x : x + 32]
        for y in module.STARTS
        for x in module.STARTS
    ]
    found = detector.detect(np.stack(shown))
    pairs = enumerate(zip(words[::2], words[1::2], strict=True))
    true = [
        captions.true_of(f"a {c} {s} in the middle", found)[i] for i, (c, s) in pairs
    ]
    assert np.mean(true) > 0.6  # 0.85 in the benchmark


def check_two_scales(module, result):
    inside = slice(module.EDGE, module.EDGE + module.LARGE)
    blocks = result["x"][:, inside, inside].reshape(
        -1, 32, module.SCALE, 32, module.SCALE, 3
    )
    assert captions.true_of(
        "a yellow triangle in the middle", detector.detect(blocks.mean((2, 4)))
    ).all()


def check_planning(module, result):
    good = module.rooms.succeeds(result["x"], module.doors, module.start, module.goal)
    assert good.sum() >= 3  # of 4; benchmarks/planning.py counts more


def check_queens(module, result):
    boards = np.asarray(result["x"])
    right = module.solved(boards)
    assert right.mean() > 0.95
    assert len(np.unique(boards[right].round().astype(int), axis=0)) == module.SOLUTIONS


def check_separation(module, result):
    for name, true in module.truth.items():
        draws = result.unweighted()[name]
        off, blind = (
            np.sqrt(np.mean((guess - true) ** 2))
            for guess in (draws.mean(0), module.mixed / 2)
        )
        assert off < 0.75 * blind
        near(
            np.std(draws, axis=0).mean(), off, 0.5 * off
        )  # error bars of the size of the error


def check_rare_event(module, result):
    exact = module.exact(module.THRESHOLDS[-1])
    assert 1e-7 < exact < 2e-6
    near(result.log_evidence, np.log(exact), 4 * result.log_evidence_error)
    assert result.log_evidence_error < 0.2


def check_text_to_image(module, result):
    assert result.images().shape == (FEW["text_to_image"], 16, 16, 3)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def load(name):
    spec = importlib.util.spec_from_file_location(
        f"example_{name}", EXAMPLES / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*CHECKS, "demo"}


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem
)
def test_examples_are_short_and_say_how_to_run_them(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert f"python examples/{path.name}" in text or f"make {path.stem}" in text


OPTIONAL = {"bayesflow_estimator": "bayesflow"}
"""Examples of packages that are not among the development dependencies."""
FOUND = {"text_to_image": {"out_of_training"}, "planning": {"shares_frozen"}}
"""Findings that are true of an example: what a network of random weights says of
products is a guess, and how often plans go one way and how often another rests on
nothing where chains do not weigh one another."""
QUICK = ("observation",)
"""The others compose learned networks, calibrate, or train one: slow tests."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CHECKS],
)
def test_example(name, tmp_path):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    module = load(name)
    result = module.main(num_chains=FEW.get(name, CHAINS), out=tmp_path)
    assert {str(code) for code, _ in result.status.findings} <= FOUND.get(
        name, set()
    ), result.status
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    CHECKS[name](module, result)


# ── make demo, with few chains ────────────────────────────────────────────────────────


def test_exact_product():
    """The quadrature against a sum over modes: a Gaussian's mass within the bar, by the
    error function."""
    demo = load("demo")
    schedule = cp.Schedule.log_snr(
        2, min=-9.0, max=11.0
    )  # σ₀ = 0.004: next to nothing beside 0.075
    log_density, weights, draws = demo.exact_product(schedule, 4000)
    x = np.asarray(demo.MODES)[:, 0]
    mass = norm.cdf((0.2 - x) / 0.075) - norm.cdf((-0.2 - x) / 0.075)
    # points between two modes count for the nearer, here and for samples alike: hence
    # the tolerance
    np.testing.assert_allclose(weights, mass / mass.sum(), atol=0.01)
    assert (
        cp.metrics.total_variation(cp.metrics.mode_weights(draws, demo.MODES), weights)
        < 0.03
    )
    inside = np.array([[0.0, 0.5]], np.float32)
    expected = np.log(
        1 / (2 * np.pi * 0.075**2 * mass.sum())
    )  # its height at the top mode
    np.testing.assert_allclose(log_density(inside), expected, atol=0.02)


@pytest.mark.slow
def test_demo_judges_every_sampler(tmp_path, capsys):
    demo = load("demo")
    demo.main(num_chains=128, out=tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows.pop("num_chains") == 128
    assert [*rows] == [*demo.SAMPLERS, "exact draws"]
    assert all(rows[name]["status"] == "ok" for name in demo.SAMPLERS)
    reverse, hmc, smc = (rows[name]["mode_tv"] for name in demo.SAMPLERS)
    assert reverse > 0.15  # the known bias of adding scores
    assert max(hmc, smc) < reverse
    for row in rows.values():
        assert np.isfinite(row["mean_log_density"])
    exact, p = rows["exact draws"], demo.exact_product(cp.load("ring2d").schedule, 1)[1]
    chance = 0.5 * np.sum(
        np.sqrt(2 * p * (1 - p) / (np.pi * 128))
    )  # shares of 128 draws are nearly Gaussian
    assert exact["mode_tv"] == pytest.approx(chance, rel=0.25)
    assert 0.3 < exact["mode_tv_sd"] / exact["mode_tv"] < 1.0
    assert 0 < exact["log_density_sd"] < 0.3
    assert (tmp_path / "demo.png").stat().st_size > 30_000
    printed = capsys.readouterr().out
    assert "mode TV" in printed
    assert all(name in printed for name in rows)
