"""The recipes of *Extending* work when their blocks are copied one after the other."""

import re
from pathlib import Path

import pytest

from zscores import LIMIT

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
RECIPES = {
    title: blocks
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    if (blocks := re.findall(r"^```python\n(.*?)^```", text, re.S | re.M))
}


def test_there_are_seven():
    assert len(RECIPES) == 7


@pytest.mark.parametrize("title", RECIPES)
def test_the_recipe_runs(title):
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
