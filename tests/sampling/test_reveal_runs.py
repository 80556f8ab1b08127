"""Runs of categorical sites by the objects of all runs: checkpoints, devices, files,
pictures, statuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.results.status import Code
from messages import check_finding
from processes import HASTE, said
from sampling_cases import stop_after

KEY = jax.random.key(0)
TABLE = np.random.default_rng(0).gamma(0.5, size=(3, 3, 3, 3))


@cp.program
def site(f):
    return cp.sample("s", f)


@pytest.fixture(scope="module")
def density():
    return cp.compile(site, cp.Analytic.table(TABLE) ** 1.5)


def infer(density, **options):
    return cp.infer(density, KEY, num_chains=50, **options)


def same(result, other):
    np.testing.assert_array_equal(result["s"], other["s"])
    assert result.log_evidence == other.log_evidence
    assert result.evaluations == other.evaluations


def test_a_run_resumes(density, tmp_path, monkeypatch, every_level):
    whole = infer(density, draws=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        part = infer(density, draws=3, checkpoint_dir=tmp_path)
    assert part.status.code is Code.INTERRUPTED
    assert "hidden are 0" in check_finding(part.status, Code.INTERRUPTED)
    resume = cp.Checkpoint(tmp_path, resume=True)
    same(infer(density, draws=3, checkpoint_dir=resume), whole)


def test_a_run_under_uniform_noise_resumes(tmp_path, monkeypatch, every_level):
    levels = cp.Schedule.log_snr(6, min=-7.0, max=7.0)
    density = cp.compile(site, cp.Analytic.table(TABLE) ** 1.5, schedule=levels)
    whole = infer(density, draws=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        part = infer(density, draws=2, checkpoint_dir=tmp_path)
    assert part.status.code is Code.INTERRUPTED
    assert "carry the noise" in check_finding(part.status, Code.INTERRUPTED)
    resume = cp.Checkpoint(tmp_path, resume=True)
    same(infer(density, draws=2, checkpoint_dir=resume), whole)


def test_a_result_is_saved_shown_and_drawn(density, tmp_path):
    result = infer(density)
    path = tmp_path / "run.safetensors"
    result.save(path)
    loaded = cp.Result.load(path)
    same(loaded, result)
    assert "4 reveals" in str(loaded.summary())
    figure = result.plot()
    (panel, *_) = figure.axes
    assert panel.get_xlabel() == "position"
    image = np.asarray(panel.images[0].get_array())
    np.testing.assert_allclose(image.sum(0), 1.0, atol=1e-6)
    assert image.shape == (3, 4)
    assert result.to_arviz().posterior["s"].shape[-1] == 4


def test_weights_that_collapse_are_reported():
    # All is allowed until the last token, which then must be right.
    def secret(tokens, visible):
        wrong = jnp.any(tokens != jnp.array([1, 2, 0, 1, 2, 2]))
        return jnp.where(jnp.all(visible) & wrong, -jnp.inf, 0.0)

    f = cp.Energy(secret, length=6, num_values=3)
    result = cp.infer(cp.compile(site, f), KEY, num_chains=200, progress=False)
    assert not result.status.ok
    codes = {code for code, _ in result.status.findings}
    assert codes & {Code.WEIGHTS_COLLAPSED, Code.ANCESTORS_COLLAPSED}
    assert "cp.Schedule" not in str(result.status)
    uniform = cp.Analytic(dist.Categorical(jnp.ones(3) / 3).expand([6]).to_event(1))
    assert cp.infer(
        cp.compile(site, uniform), KEY, num_chains=200, progress=False
    ).status.ok


SCRIPT = """
import json
import jax, numpy as np, composeprob as cp
probs = np.random.default_rng(0).gamma(0.5, size=(3, 3, 3, 3))
site = cp.program(lambda f: cp.sample("s", f))
density = cp.compile(site, cp.Analytic.table(probs) ** 1.5, schedule=LEVELS)
runs = []
for number in (1, 2, 8):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:number]), ("chains",))
    result = cp.infer(
        density, jax.random.key(0), num_chains=50, chunk=4, mesh=mesh, progress=False
    )
    runs.append([result["s"].tolist(), result.log_evidence])
print(json.dumps([run == runs[0] for run in runs]))
"""


NOISE = "cp.Schedule.log_snr(4, min=-7.0, max=7.0)"


@pytest.mark.parametrize(
    "levels", ["None", pytest.param(NOISE, marks=pytest.mark.slow)]
)
def test_one_device_and_eight_give_the_same_bits(levels):
    (line,) = said(SCRIPT.replace("LEVELS", levels), devices=8, **HASTE)
    assert json.loads(line) == [True, True, True]
