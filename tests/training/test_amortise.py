"""The recipe of amortised inference: estimators of a program's posterior, weighted by
the program's density, beside the exact posterior of a Gaussian program."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

import composeprob as cp
from zscores import assert_agrees, assert_disagrees

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def blocks(title: str) -> list[str]:
    """Blocks of a section of the page."""
    text = PAGE.read_text(encoding="utf-8")
    section = text.split(f"\n## {title}\n", 1)[-1].split("\n## ", 1)[0]
    cell = r"^```\{code-cell\} ipython3\n(.*?)^```"
    return re.findall(cell, section, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page():
    """The names that the recipe binds."""
    header, *_ = blocks("Recipes")
    names: dict[str, object] = {"__name__": "page"}
    for block in (header, *blocks("Amortise a program")):
        # In the page's own words, so that what it shows is what is tested.
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def scores(page, y, thetas, log_weights) -> dict[str, float]:
    """z-scores of the posterior's means and of log p(y)."""
    design = np.asarray(page["design"], float)
    y = np.asarray(y, float)
    thetas = np.asarray(thetas, float)
    law = stats.multivariate_normal(np.zeros(3), 0.25 * np.eye(3) + design @ design.T)
    precision = np.eye(2) + design.T @ design / 0.25
    exact = np.linalg.solve(precision, design.T @ y / 0.25)

    # Relative to the exact evidence, so that their mean is 1.
    relative = np.exp(np.asarray(log_weights, float) - law.logpdf(y))
    weights = relative / relative.sum()
    error = relative.std() / np.sqrt(len(relative))
    found = {"evidence": (relative.mean() - 1) / error}
    for i, mean in enumerate(exact):
        away = thetas[:, i] - mean
        found[f"theta {i}"] = weights @ away / np.sqrt(np.sum((weights * away) ** 2))
    return found


@pytest.mark.slow
def test_the_recipe_has_the_exact_posterior(page):
    found = scores(page, page["y"], page["thetas"], page["log_weights"])
    assert_agrees(found)
    assert page["pareto_k"] < 0.7


@pytest.mark.slow
def test_weights_correct_an_estimator_that_is_off(page):
    """An estimator of other data proposes; without weights its draws disagree."""
    y = page["y"]
    other = cp.compile(page["answer"], page["trained"].factor, y + 0.3)
    target = cp.compile(page["line"], y)
    keys = jax.random.split(jax.random.key(4), 1000)
    thetas, log_weights = page["weighted"](other, target, keys)
    found = scores(page, y, thetas, log_weights)
    assert_agrees(found)
    unweighted = scores(page, y, thetas, np.zeros(len(thetas)))
    del unweighted["evidence"]
    assert_disagrees(unweighted)
