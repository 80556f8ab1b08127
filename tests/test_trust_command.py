"""`composeprob trust`: runs that agree pass; a sampler that is not done is told from a wrong model."""

import pytest
from typer.testing import CliRunner

from composeprob.cli import app

PROGRAM = """
import composeprob as cp, jax, jax.numpy as jnp, numpyro.distributions as dist

schedule = cp.Schedule.log_snr(24)
f, g = (cp.Analytic(dist.Normal(jnp.full(2, c), 0.7), schedule) for c in (0.0, 1.0))
num_chains = 300
{extra}

@cp.program
def both(f, g):
    cp.sample("x", f * g)
"""
REFERENCE = """
def reference(key, num):  # f · g is N(0.5, 0.7²/2)
    return {mean} + 0.7 / jnp.sqrt(2) * jax.random.normal(key, (num, 2))
"""
SLOW = "sampler = cp.AnnealedMCMC(cp.ULA(0.01), 1)"
COARSE = "sampler = cp.AnnealedMCMC(cp.ULA(0.2), 8)"  # the variance s² = 0.245 becomes s²/(1 − 0.1/s²)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "chains", "exit_code", "said", "unsaid"),
    [
        ("", 300, 0, ["Nothing was found", "2 × levels", "2 × transitions", "x[0]²"], ["½ step", "error:"]),
        (SLOW, 3000, 1, ["2 × transitions: a difference"], []),
        (COARSE, 3000, 1, ["½ step, 2 × transitions: a difference"], []),
        (REFERENCE.format(mean=0.5), 300, 0, ["Nothing was found", "the model's"], ["error:"]),
        (REFERENCE.format(mean=0.8), 300, 1, ["The model's error"], ["The sampler's error"]),
        (SLOW + REFERENCE.format(mean=0.5), 3000, 1, ["The sampler's error"], []),
    ],
    ids=["right", "too few", "too coarse", "right, with reference", "wrong model", "too few, with reference"],
)
def test_the_error_is_found_with_whoever_makes_it(tmp_path, extra, chains, exit_code, said, unsaid):
    file = tmp_path / "both.py"
    file.write_text(PROGRAM.format(extra=extra))
    report = tmp_path / "run.html"
    arguments = ["trust", str(file), "--chains", str(chains), "--out", str(report), "--no-cache"]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "160", "TERM": "dumb"})
    assert shown.exit_code == exit_code, shown.output
    for text in said:
        assert text in shown.output, shown.output
    for text in unsaid:
        assert text not in shown.output, shown.output
    assert "samples of both" in report.read_text()
