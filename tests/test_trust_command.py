"""`composeprob trust`: runs that agree pass, and a sampler that is not done is told by twice its transitions."""

import pytest
from typer.testing import CliRunner

from composeprob.cli import app

PROGRAM = """
import composeprob as cp, jax.numpy as jnp, numpyro.distributions as dist

schedule = cp.Schedule.log_snr(24)
f, g = (cp.Analytic(dist.Normal(jnp.full(2, c), 0.7), schedule) for c in (0.0, 1.0))
num_chains = 300
{sampler}

@cp.program
def both(f, g):
    cp.sample("x", f * g)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "exit_code", "said"),
    [
        ("", 0, "Nothing was found"),
        ("sampler = cp.AnnealedMCMC(cp.ULA(0.01), 1)", 1, "2 × transitions: a difference"),
    ],
)
def test_the_sampler_is_told_from_a_finer_one(tmp_path, sampler, exit_code, said):
    file = tmp_path / "both.py"
    file.write_text(PROGRAM.format(sampler=sampler))
    report = tmp_path / "run.html"
    arguments = ["trust", str(file), "--chains", "3000" if sampler else "300", "--out", str(report)]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "160", "TERM": "dumb"})
    assert shown.exit_code == exit_code, shown.output
    assert said in shown.output
    for column in ("another key", "2 × levels", "2 × transitions", "x[0]"):
        assert column in shown.output
    assert "samples of both" in report.read_text()
