"""Gibbs: the law stays, evaluations are those of the blocks, and a scan is reversed by
the opposite order."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import composeprob as cp
from composeprob.errors import InvalidValueError
from composeprob.kernels import HMC, MALA, UHMC, ULA, Gibbs
from composeprob.kernels.gibbs import integrates_score
from composeprob.metrics.likelihood import Path, forward_walk, frozen, reverse_walk
from kernel_chains import from_exact_draws, start, steps_of, transitions
from refusals import refused
from sampling_cases import normal
from targets import evaluate, nested
from zscores import assert_agrees, assert_disagrees, z_scores

SITES = {"a": jnp.zeros(1), "b": jnp.zeros(1), "c": jnp.zeros(())}
LAW = nested(SITES)  # its sites hang together: two modes on the diagonal


def test_the_target_stays_invariant():
    kernel = Gibbs({("c", "a"): HMC(0.6, num_leapfrog=2), "b": MALA(0.3)})
    run = from_exact_draws(
        kernel, LAW, num_chains=5_000, num_transitions=40, num_draws=10
    )
    assert_agrees(run.scores)
    assert run.moved > 0.3
    assert 0.3 < run.acceptance < 0.97


def test_one_block_of_all_sites_is_its_kernel():
    target = evaluate(LAW.log_density)

    def moved(kernel, step_size):
        @jax.jit
        def step(x, step_size):
            state = kernel.init(jax.random.key(0), x, target)
            return kernel.step(jax.random.key(1), state, target, step_size)

        return step(SITES, step_size)

    alone = HMC(0.4)
    state, info = moved(Gibbs({("a", "b", "c"): alone}), jnp.array([0.4]))
    expected, expected_info = moved(alone, 0.4)
    for name, x in expected.position.items():
        np.testing.assert_allclose(state.position[name], x, rtol=1e-6)
    np.testing.assert_allclose(info.acceptance[0], expected_info.acceptance, rtol=1e-6)


def test_requirements_and_reversal_of_blocks():
    kernel = Gibbs({"a": ULA(0.1), "b": HMC(0.1)})
    assert kernel.requires == {"score", "energy"}
    assert Gibbs({"a": ULA(0.1), "b": UHMC(0.1)}).requires == {"score"}
    assert integrates_score(
        Gibbs({"a": MALA(0.1, log_ratio=cp.LineIntegral(3)), "b": ULA(0.1)})
    )
    assert repr(kernel.reversal).endswith("backwards=True)")
    assert kernel.reversal.reversal.backwards is False


def test_sites_of_no_block_stay_where_they_are():
    kernel = Gibbs({"a": MALA(0.1)})
    target = evaluate(LAW.log_density)

    @jax.jit
    def step(state):
        return kernel.step(jax.random.key(1), state, target, [0.1])

    state = jax.jit(lambda x: kernel.init(jax.random.key(0), x, target))(SITES)
    moved, _ = step(state)
    assert moved.position["a"] != state.position["a"]
    assert moved.position["b"] == state.position["b"]
    np.testing.assert_allclose(
        moved.evaluation.score["b"], target(moved.position).score["b"], rtol=1e-5
    )


# ── the reversal of a scan, which is not reversible: RAISE needs it ───────────────────

PRECISION = np.linalg.inv([[1.0, 0.8], [0.8, 1.0]])
SHIFT = np.array([0.5, -0.2])
H = 0.2
SD = 0.5


def pulled(position):
    """Return log N(Λ⁻¹·shift, Λ⁻¹) over two sites, up to a constant."""
    x = jnp.stack([position["x"], position["z"]])
    return -0.5 * x @ jnp.asarray(PRECISION) @ x + jnp.asarray(SHIFT) @ x


def after_one_scan():
    """Return the law of a scan of ULA from N(0, SD²): every move is affine, x first,
    then z given the new x."""
    mean = np.zeros(2)
    covariance = SD**2 * np.eye(2)
    for i in range(2):
        slope = np.eye(2)
        slope[i] -= H * PRECISION[i]
        mean = slope @ mean + H * SHIFT[i] * np.eye(2)[i]
        covariance = slope @ covariance @ slope.T + 2 * H * np.diag(np.eye(2)[i])
    return stats.multivariate_normal(mean, covariance)


@pytest.mark.parametrize("order", ["opposite", "same"])
def test_the_opposite_order_undoes_a_scan(order):
    """The density of a scan's output is E[q(x')·exp(log_reversal)] over its reversal;
    not over the scan itself."""
    target = evaluate(pulled)
    scan = Gibbs({"x": ULA(H), "z": ULA(H)})
    kernel = scan.reversal if order == "opposite" else scan
    points = np.array([[0.3, 0.1], [1.2, -0.4], [-0.5, 0.8]])
    x, z = jnp.repeat(jnp.asarray(points), 20_000, axis=0).T
    repeated = {"x": x, "z": z}
    states = start(kernel, target, jax.random.key(0), repeated)
    states, info = transitions(
        kernel, target, jax.random.key(1), states, steps_of(kernel), 1
    )
    came_from = stats.norm.logpdf(np.asarray(states.position["x"], float), scale=SD)
    came_from += stats.norm.logpdf(np.asarray(states.position["z"], float), scale=SD)
    logs = (came_from + np.asarray(info.log_reversal[0], float).sum(-1)).reshape(3, -1)
    ratios = np.exp(logs - after_one_scan().logpdf(points)[:, None])
    values = {f"point {i}": ratios[i] for i in range(3)}
    scores = z_scores(values, dict.fromkeys(values, 1.0))
    if order == "opposite":
        assert_agrees(scores)
    else:
        assert_disagrees(scores)


FEW = cp.Schedule.log_snr(3, min=-4.0, max=1.0)


@cp.program
def coupled(f, g):
    x = cp.sample("x", f)
    z = cp.sample("z", g)
    cp.observe("y", dist.Normal(x + z, 0.4), 0.7)


@pytest.mark.slow
def test_a_path_is_walked_back_by_the_reversal_and_down_by_the_scan(monkeypatch):
    density = cp.compile(coupled, normal(0.0, 1.0, FEW), normal(0.0, 0.6, FEW))
    sampler = cp.AnnealedMCMC(Gibbs({"x": ULA(0.1), "z": MALA(0.1)}), 2)
    path = Path.of_sampler(frozen(sampler, density, None), density)
    orders = []
    step = Gibbs.step

    def noting(self, *args):
        orders.append(self.backwards)
        return step(self, *args)

    monkeypatch.setattr(Gibbs, "step", noting)
    end = {"x": jnp.array(0.1), "z": jnp.array(0.2)}
    assert np.isfinite(eqx.filter_jit(reverse_walk)(path, jax.random.key(0), end))
    assert set(orders) == {True}
    orders.clear()
    assert np.isfinite(eqx.filter_jit(forward_walk)(path, jax.random.key(0)))
    assert set(orders) == {False}


def test_adaptive_blocks_can_be_retraced_at_the_steps_of_a_run():
    density = cp.compile(coupled, normal(0.0, 1.0, FEW), normal(0.0, 0.6, FEW))
    sampler = cp.AnnealedMCMC(Gibbs({"x": MALA(), "z": ULA(0.05)}), 1)
    steps = np.array([[0.1, 0.05], [np.nan, 0.05], [0.4, 0.05]])
    kernels = frozen(sampler, density, steps).moves.kernel.kernels
    frozen_steps = np.stack([kernel.step_size for kernel in kernels], axis=1)
    expected = [[0.1, 0.05], [0.1, 0.05], [0.4, 0.05]]
    np.testing.assert_allclose(frozen_steps, expected, rtol=1e-6)
    refused(
        lambda: frozen(sampler, density, steps[:, 0]),
        InvalidValueError,
    )
