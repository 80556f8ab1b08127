"""Blocks of *Extending* and *From scarlet2, DDPRISM or azula* work when they are copied one after the other."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.results.status import Code
from sampling_cases import learned, measured
from zscores import LIMIT

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
RECIPES = {
    title: blocks
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    if (blocks := re.findall(r"^```python\n(.*?)^```", text, re.S | re.M))
}


@pytest.mark.parametrize("title", RECIPES)
def test_the_recipe_runs(title):
    assert len(RECIPES) == 7
    names = {"__name__": "page"}
    for block in RECIPES[title]:
        exec(compile(block, f"{PAGE.name}: {title}", "exec"), names)
    if title == "An annealing policy":
        assert "annealed 'widened(spread=0.2)'" in str(names["density"])
    if title == "A part of a sampler":
        score, result, right = names["score"], names["result"], names["right"]
        assert score(names["Residual"]()) < LIMIT < score(names["Heaviest"]())
        assert abs(right.value - names["exact"]) < LIMIT * right.error
        assert result.status.ok


# ── score priors ─────────────────────────────────────────────────────────────────────────────────────────────────────

PRIORS = Path(__file__).parents[1] / "docs" / "score-priors.md"


@pytest.mark.slow
def test_the_page_runs_both_ways():
    """N(1, 1/2) in each of four numbers: found by the library, and not by NUTS under a prior of log-density 0."""
    names = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", PRIORS.read_text(encoding="utf-8"), re.S | re.M):
        exec(compile(block, PRIORS.name, "exec"), names)
    result = names["result"]
    assert result.status.ok
    assert result.effective_chains > 500
    assert np.all(np.abs(result["x"].mean(0) - 1.0) < 4 * np.sqrt(0.5 / result.effective_chains))
    np.testing.assert_allclose(result["x"].var(0), 0.5, rtol=0.2)
    assert abs(result.log_evidence + 9.0621) < 4 * result.log_evidence_error
    assert np.abs(np.asarray(names["chain"].get_samples()["x"]).mean(0) - 1.0).max() > 0.4


class TestImpossibleData:
    """y = x with noise, x a standard normal number of which the score is known."""

    @staticmethod
    def run(noise, **settings):
        levels = cp.Schedule.edm(20, sigma_min=0.001, sigma_max=20.0)
        prior = learned(lambda x, sigma: -x / (1 + sigma**2), "score", levels, (1,), "sigma")
        density = cp.compile(measured, prior, lambda x: dist.Normal(x, noise).to_event(1), jnp.ones(1))
        return cp.infer(density, jax.random.key(0), num_chains=64, progress=False, **settings)

    def test_chains_that_never_moved_are_named(self):
        status = self.run(0.001, sampler=cp.AnnealedMCMC(cp.ULA(1e-9), 1)).status
        assert status.has(Code.ZERO_DENSITY)
        assert "the data are all but impossible" in str(status)

    def test_those_of_the_posterior_are_not(self):
        assert self.run(0.5).status.ok
