"""`make demo`, with few chains."""

import importlib.util
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import composeprob as cp


@pytest.fixture(scope="module")
def demo():
    path = Path(__file__).parent.parent / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("example_demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    plt.close("all")


def test_exact_product(demo):
    """The quadrature against a sum over modes: a Gaussian's mass within the bar, by the error function."""
    from scipy.stats import norm

    schedule = cp.Schedule.log_snr(2, min=-9.0, max=11.0)  # σ₀ = 0.004: next to nothing beside 0.075
    log_density, weights, draws = demo.exact_product(schedule, 4000)
    x = np.asarray(demo.MODES)[:, 0]
    mass = norm.cdf((0.2 - x) / 0.075) - norm.cdf((-0.2 - x) / 0.075)
    # points between two modes count for the nearer, here and for samples alike: hence the tolerance
    np.testing.assert_allclose(weights, mass / mass.sum(), atol=0.01)
    assert cp.metrics.total_variation(cp.metrics.mode_weights(draws, demo.MODES), weights) < 0.03
    inside = np.array([[0.0, 0.5]], np.float32)
    expected = np.log(1 / (2 * np.pi * 0.075**2 * mass.sum()))  # its height at the top mode
    np.testing.assert_allclose(log_density(inside), expected, atol=0.02)


@pytest.mark.slow
def test_demo_judges_every_sampler(demo, tmp_path, capsys):
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
    chance = 0.5 * np.sum(np.sqrt(2 * p * (1 - p) / (np.pi * 128)))  # shares of 128 draws are nearly Gaussian
    assert exact["mode_tv"] == pytest.approx(chance, rel=0.25)
    assert 0.3 < exact["mode_tv_sd"] / exact["mode_tv"] < 1.0
    assert 0 < exact["log_density_sd"] < 0.3
    assert (tmp_path / "demo.png").stat().st_size > 30_000
    printed = capsys.readouterr().out
    assert "mode TV" in printed
    assert all(name in printed for name in rows)
