"""The guide to a new kernel works when its blocks are copied one after the other."""

import re
from pathlib import Path

import registry

GUIDE = Path(__file__).parents[2] / "docs" / "add-a-kernel.md"


def test_the_guide_runs(monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    monkeypatch.setattr(registry, "KERNELS", dict(registry.KERNELS))  # the guide adds a row
    namespace = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), namespace)
    assert namespace["run"].scores
    assert "RandomWalk" in registry.KERNELS
