"""Every file of examples/ runs, and its result is right."""

import importlib.util
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import norm

import composeprob as cp
from composeprob.models.worlds import captions, detector, digits
from sampling_cases import slow

EXAMPLES = Path(__file__).parent.parent / "examples"
CHAINS = 600
CENTRE = np.array([0.0, -0.35])
"""Centre of the arc that own_network learns."""
FEW = {
    "scene": 6,
    "captions": 6,
    "queens": 16,
    "separation": 100,
    "tapestry": 1,
    "two_scales": 1,
    "text_to_image": 4,
    "planning": 4,
    "two_backbones": 16,
}
"""Chains of examples whose models are large."""
NOISE = 4 * 0.5 / np.sqrt(CHAINS / 4)
"""Four standard errors of a share, with a quarter of the chains effective."""


def near(found, exact, tolerance=NOISE):
    np.testing.assert_allclose(found, exact, atol=tolerance)


def shares_near(result, modes, exact):
    near(cp.metrics.mode_weights(result["x"], modes, result.log_weights), exact)


def check_product(module, result):
    shares_near(result, [[0.0, 0.5], [0.0, -0.5]], [0.5, 0.5])
    assert np.mean(np.abs(result.unweighted()["x"][:, 0]) < 0.25) > 0.95


def check_mixture(module, result):
    shares_near(result, [[-0.5, 0.0], [0.5, 0.0]], [0.75, 0.25])


def check_growing_study(module, result):
    for name, mean in zip(("mu", "tau"), module.exact(module.data), strict=True):
        found = result.mean(lambda sample, name=name: sample[name])
        near(found.value, mean, 5 * found.error)


def check_calibration(module, result):
    shares_near(result, [module.centre, [0.0, 0.0]], [0.8, 0.2])


def check_negation(module, result):
    # In the box itself it is 0.184.
    near(module.share_inside(result["x"], result.log_weights), 0.041, 0.03)
    assert np.mean(np.abs(result["x"]).max(-1) < 0.73) > 0.97


def check_power(module, result):
    shares_near(result, module.centers, [0.64 / 0.68, 0.04 / 0.68])


def check_guidance(module, result):
    # Scale 1 would leave 0.16 on the other side.
    assert np.mean(result.unweighted()["x"][:, 0] < 0) < 0.08


def check_observation(module, result):
    shares_near(result, module.modes, module.exact_shares())


def check_two_sensors(module, result):
    exact = np.array(module.exact_noises())
    found = [result[f"noise_{name}"].mean() for name in module.NOISES]
    # The posterior spread is a third, and a quarter of the chains effective.
    near(found / exact, 1.0, 0.15)


def check_deblur(module, result):
    shares, noise = module.exact()
    draws = result.unweighted()
    near(draws["noise"].mean(), noise, 0.1 * noise)
    away = ((draws["x"][:, None] - module.steps) ** 2).sum(2)
    counts = np.bincount(away.argmin(1), minlength=len(shares))
    near(counts / len(away), shares, 1.5 * NOISE)


def check_hierarchy(module, result):
    for name, (mean, sd) in zip(("gain", "noise"), module.exact(), strict=True):
        log = np.log(result.unweighted()[name])
        near(log.mean(), mean, 0.3 * sd)
        near(log.std(), sd, 0.25 * sd)


def check_own_network(module, result):
    x = result.unweighted()["x"]
    assert np.mean(x[:, 0] > -0.05) > 0.97  # in the box
    # On the arc.
    radius = np.linalg.norm(x - CENTRE, axis=1)
    assert np.std(radius) < 0.12
    near(np.mean(radius), 0.7, 0.05)


def check_tall_posterior(module, result):
    theta = result.unweighted()["theta"]
    # The posterior on a grid has standard deviations 0.11 and 0.13.
    near(theta.mean(0), [0.51, -0.48], 0.1)
    assert np.all(theta.std(0) < 0.2)


def check_bayesflow_estimator(module, result):
    xs = module.observations()
    theta = result.unweighted()["theta"]
    precision = len(xs) + module.NOISE**2
    # Three times the network's own error.
    near(theta.mean(0), xs.sum(0) / precision, 0.25)
    near(theta.std(0), np.sqrt(module.NOISE**2 / precision), 0.1)


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
    truths = [captions.true_of(caption, found) for caption in asked]
    red, blue, green, triangle = truths
    assert np.mean(red & (blue | green) & ~triangle) > 0.6


def check_tapestry(module, result):
    words = module.CAPTIONS.split()
    windows = [
        result["x"][0, y : y + 32, x : x + 32]
        for y in module.STARTS
        for x in module.STARTS
    ]
    found = detector.detect(np.stack(windows))
    true = []
    for i, (colour, shape) in enumerate(zip(words[::2], words[1::2], strict=True)):
        caption = f"a {colour} {shape} in the middle"
        true.append(captions.true_of(caption, found)[i])
    assert np.mean(true) > 0.6  # 0.85 in the benchmark


def check_two_scales(module, result):
    inside = slice(module.EDGE, module.EDGE + module.LARGE)
    large = result["x"][:, inside, inside]
    blocks = large.reshape(-1, 32, module.SCALE, 32, module.SCALE, 3)
    found = detector.detect(blocks.mean((2, 4)))
    assert captions.true_of("a yellow triangle in the middle", found).all()


def check_planning(module, result):
    good = module.rooms.succeeds(result["x"], module.doors, module.start, module.goal)
    assert good.sum() >= 3  # of 4; benchmarks/planning.py counts more


def check_queens(module, result):
    boards = np.asarray(result["x"])
    right = module.solved(boards)
    assert right.mean() > 0.95
    assert len(np.unique(boards[right].round().astype(int), axis=0)) == module.SOLUTIONS


def check_tokens(module, result):
    found = np.unique(result["columns"], axis=0)
    assert len(found) == module.SOLUTIONS[3]
    assert (found[:, 0] == 3).all()
    off = result.log_evidence - np.log(module.SOLUTIONS[3])
    assert abs(off) < 4 * result.log_evidence_error


def check_two_backbones(module, result):
    sequences = np.asarray(result["s"])
    assert sequences.shape[1] == module.LENGTH
    assert len(np.unique(sequences, axis=0)) > len(sequences) / 2


def check_separation(module, result):
    for name, true in module.truth.items():
        draws = result.unweighted()[name]
        error = np.sqrt(np.mean((draws.mean(0) - true) ** 2))
        blind_error = np.sqrt(np.mean((module.mixed / 2 - true) ** 2))
        assert error < 0.75 * blind_error
        # Posterior deviations are of the size of the error.
        near(np.std(draws, axis=0).mean(), error, 0.5 * error)


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
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
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
def test_examples_say_how_to_run_them(path):
    text = path.read_text(encoding="utf-8")
    assert f"python examples/{path.name}" in text or f"make {path.stem}" in text


OPTIONAL = {"bayesflow_estimator": "bayesflow"}
"""Examples of packages that are not among the development dependencies."""
FOUND = {
    "text_to_image": {"out_of_training"},
    "planning": {"shares_frozen"},
    "tokens": {"ok"},
}
"""Findings that are true of an example.

A remark says that few of the chains of a puzzle count.

A network of random weights is a guess for products; the proportions of plans by either
way have no support where chains have no importance weights.
"""
QUICK = ("observation",)
"""The others compose learned networks, calibrate, or train one: slow tests."""


@pytest.mark.parametrize(
    "name", [*QUICK, *(slow(name) for name in CHECKS if name not in QUICK)]
)
def test_example(name, tmp_path):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    module = load(name)
    result = module.main(num_chains=FEW.get(name, CHAINS), out=tmp_path)
    if result is None:  # it showed what was recorded, for want of its weights
        assert name == "two_backbones"
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        return
    codes = {str(code) for code, _ in result.status.findings}
    assert codes <= FOUND.get(name, set()), result.status
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    CHECKS[name](module, result)


# ── make demo, with few chains ────────────────────────────────────────────────────────


def test_exact_product():
    """The quadrature against a sum over modes.

    A Gaussian's mass within the bar is given by the error function.
    """
    demo = load("demo")
    # σ₀ = 0.004 is negligible beside 0.075.
    schedule = cp.Schedule.log_snr(2, min=-9.0, max=11.0)
    log_density, weights, draws = demo.exact_product(schedule, 4000)
    x = np.asarray(demo.MODES)[:, 0]
    mass = norm.cdf((0.2 - x) / 0.075) - norm.cdf((-0.2 - x) / 0.075)
    # Points between two modes count for the nearer one, as samples do: hence the
    # tolerance.
    np.testing.assert_allclose(weights, mass / mass.sum(), atol=0.01)
    shares = cp.metrics.mode_weights(draws, demo.MODES)
    assert cp.metrics.total_variation(shares, weights) < 0.03
    # The height of the density at the top mode.
    inside = np.array([[0.0, 0.5]], np.float32)
    expected = np.log(1 / (2 * np.pi * 0.075**2 * mass.sum()))
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
    exact = rows["exact draws"]
    _, p, _ = demo.exact_product(cp.load("ring2d").schedule, 1)
    # Shares of 128 draws are nearly Gaussian.
    chance = 0.5 * np.sum(np.sqrt(2 * p * (1 - p) / (np.pi * 128)))
    assert exact["mode_tv"] == pytest.approx(chance, rel=0.25)
    assert 0.3 < exact["mode_tv_sd"] / exact["mode_tv"] < 1.0
    assert 0 < exact["log_density_sd"] < 0.3
    assert (tmp_path / "demo.png").stat().st_size > 30_000
    printed = capsys.readouterr().out
    assert "mode TV" in printed
    assert all(name in printed for name in rows)
