"""The pages on what one can add work when their blocks are copied one after the other."""

import re
import textwrap
from pathlib import Path

import pytest

import registry
from zscores import LIMIT

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["combinator", "kernel", "metric", "pass", "sampler"])
def test_the_page_runs(page, monkeypatch):
    text = (DOCS / f"add-a-{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    monkeypatch.setattr(registry, "KERNELS", dict(registry.KERNELS))  # the kernel's page adds a row
    namespace = {"__name__": "page"}
    for block in blocks:
        exec(compile(textwrap.dedent(block), f"add-a-{page}.md", "exec"), namespace)
    if page == "kernel":
        assert "RandomWalk" in registry.KERNELS
    if page == "sampler":
        score, result = namespace["score"], namespace["result"]
        assert score(namespace["Residual"]()) < LIMIT < score(namespace["Heaviest"]())
        right = namespace["right"]
        assert abs(right.value - namespace["exact"]) < LIMIT * right.error
        assert result.status.ok
