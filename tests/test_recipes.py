"""Blocks of *Extending* and *From scarlet2, DDPRISM or azula* run in their order.

The code of *Extending* also passes the repository's lint as it stands.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import WrongTypeError
from composeprob.results.checks import Check
from composeprob.results.status import Code
from messages import check_finding
from sampling_cases import learned, measured, run
from tools import style
from zscores import LIMIT

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"


def blocks_of(text):
    """Blocks of Python in a page's text."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def recipes():
    """Blocks of each section that has some, by its title."""
    text = PAGE.read_text(encoding="utf-8")
    sections = re.findall(
        r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE
    )
    return {title: blocks_of(text) for title, text in sections if blocks_of(text)}


RECIPES = recipes()


@pytest.mark.parametrize("title", RECIPES)
def test_the_recipe_runs(title):
    assert len(RECIPES) == 9
    names = {"__name__": "page"}
    for block in RECIPES[title]:
        exec(compile(block, f"{PAGE.name}: {title}", "exec"), names)
    if title == "An annealing policy":
        assert "'widened(spread=0.2)'" in str(names["density"])
    if title == "A check":
        assert not names["right"].has("asymmetric")
        assert names["wrong"].has("asymmetric")
        assert names["wrong"].withholds
        own = names["Asymmetric"]("x")
        with pytest.raises(WrongTypeError, match="checks"):
            cp.infer(
                names["cp"].compile(names["product"], names["f"], names["f"]),
                names["jax"].random.key(0),
                num_chains=4,
                checks=[own, type(own)],
            )
        silent = type("Silent", (Check,), {"code": "silent", "ask": lambda *_: []})
        with pytest.raises(WrongTypeError, match="Silent has no withholds"):
            cp.infer(
                names["cp"].compile(names["product"], names["f"], names["f"]),
                names["jax"].random.key(0),
                num_chains=4,
                checks=silent(),
            )
        told = own.ask
        for wrong in ("text", None):
            type(own).ask = lambda self, run, wrong=wrong: wrong
            result = cp.infer(
                cp.compile(names["product"], names["f"], names["f"]),
                names["jax"].random.key(0),
                num_chains=4,
                checks=own,
                progress=False,
            )
            assert result["x"].shape == (4,)
            message = check_finding(result.status, "check_failed")
            assert "The check Asymmetric failed" in message
            assert not result.status.withholds
        type(own).ask = told
    if title == "A part of a sampler":
        score, result, right = names["score"], names["result"], names["right"]
        assert score(names["Residual"]()) < LIMIT < score(names["Heaviest"]())
        assert abs(right.value - names["exact"]) < LIMIT * right.error
        assert result.status.ok
    if title == "Weights":
        score = names["score"]
        assert score(names["KernelRatio"]()) < LIMIT < score(names["Forgetful"]())


def complaints(block, name):
    """Text of all that ruff and tools/style.py object to in a block.

    Args:
        block: the code.
        name: the file that it would stand in, by which ruff chooses its rules.
    """
    # D100: a block has no module docstring. F821: blocks use names that earlier blocks
    # of the same recipe define.
    ignored = "D100,F821"
    checks = [
        ["check", "--quiet", "--no-cache", "--extend-ignore", ignored],
        ["format", "--check", "--diff", "--no-cache"],
    ]
    found = []
    for check in checks:
        ruff = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "--stdin-filename", name, "-"],
            cwd=ROOT,
            input=block,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        if ruff.returncode:
            found.append(ruff.stdout + ruff.stderr)
    found += map(str, style.violations(ast.parse(block), Path(name)))
    return "\n".join(found)


@pytest.mark.parametrize("title", RECIPES)
def test_the_recipe_passes_lint(title):
    """The part is linted by the package's rules, its programs by those of tests."""
    part, *programs = RECIPES[title]
    assert complaints(part, "composeprob/recipe.py") == ""
    for program in programs:
        assert complaints(program, "tests/recipe.py") == ""


@pytest.mark.parametrize(
    ("block", "rule"),
    [
        ("import os\n", "F401"),
        ("def part(x):\n    return x\n", "D103"),
        (f'x = "{"a" * 90}"\n', "E501"),
        ("x = f( 1 )\n", "+x = f(1)"),
        ("a, b = f(x), y\n", "parallel-assignment"),
    ],
)
def test_lint_of_a_recipe_finds_what_is_wrong(block, rule):
    assert rule in complaints(block, "composeprob/recipe.py")


# ── score priors ──────────────────────────────────────────────────────────────────────

PRIORS = ROOT / "docs" / "score-priors.md"


@pytest.mark.slow
def test_the_page_runs_both_ways():
    """N(1, 1/2) in each of four numbers.

    The library finds it, and NUTS under a prior of log-density 0 does not.
    """
    names = {"__name__": "page"}
    for block in blocks_of(PRIORS.read_text(encoding="utf-8")):
        exec(compile(block, PRIORS.name, "exec"), names)
    result = names["result"]
    assert result.status.ok
    assert result.effective_chains > 500
    error = np.sqrt(0.5 / result.effective_chains)
    assert np.all(np.abs(result["x"].mean(0) - 1.0) < 4 * error)
    np.testing.assert_allclose(result["x"].var(0), 0.5, rtol=0.2)
    assert abs(result.log_evidence + 9.0621) < 4 * result.log_evidence_error
    by_nuts = np.asarray(names["chain"].get_samples()["x"])
    assert np.abs(by_nuts.mean(0) - 1.0).max() > 0.4


@pytest.mark.parametrize("step", [1e-9, 0.5])
def test_data_are_impossible_for_chains_that_never_moved(step):
    """They are possible for chains of the posterior.

    y = x with noise, x a standard normal number with a score in closed form.
    """
    levels = cp.Schedule.edm(20, sigma_min=0.001, sigma_max=20.0)
    prior = learned(
        lambda x, sigma: -x / (1 + sigma**2), "score", levels, (1,), "sigma"
    )

    def likelihood(x):
        return dist.Normal(x, 0.5).to_event(1)

    density = cp.compile(measured, prior, likelihood, jnp.ones(1))
    sampler = cp.AnnealedMCMC(cp.ULA(step * levels.sigma**2), 10)
    status = run(density, sampler=sampler).status
    never_moved = step < 0.5
    assert status.has(Code.ZERO_DENSITY) == never_moved
    if never_moved:
        check_finding(status, Code.ZERO_DENSITY)
    assert status.ok != never_moved
