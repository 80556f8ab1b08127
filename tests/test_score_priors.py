"""The page *From scarlet2, DDPRISM or azula*: its blocks run one after the other, and find what it says."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "score-priors.md"


@pytest.mark.slow
def test_the_page_runs_both_ways():
    """N(1, 1/2) in each of four numbers: found by the library, and not by NUTS under a prior of log-density 0."""
    names = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M):
        exec(compile(block, PAGE.name, "exec"), names)
    result = names["result"]
    assert result.status.ok
    assert result.effective_chains > 500
    assert np.all(np.abs(result["x"].mean(0) - 1.0) < 4 * np.sqrt(0.5 / result.effective_chains))
    np.testing.assert_allclose(result["x"].var(0), 0.5, rtol=0.2)
    assert abs(result.log_evidence + 9.0621) < 4 * result.log_evidence_error
    assert np.abs(np.asarray(names["chain"].get_samples()["x"]).mean(0) - 1.0).max() > 0.4
