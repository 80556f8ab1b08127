"""Curl: against full Jacobians, and reported by runs that rely on a gradient."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.density.learned_scores import curl
from composeprob.errors import LevelError, ShapeError
from composeprob.kernels.gibbs import integrates_score
from messages import check_finding
from refusals import refused, rows
from sampling_cases import SCHEDULE, both, normal, run, single, unit_energy


def scored(network, size=2, schedule=SCHEDULE):
    return cp.Diffusion(
        network, schedule, event_shape=(size,), parameterization="score", time="sigma"
    )


def linear(matrix):
    """A factor with a linear score: −x + matrix·x at every level (d = 2 or more)."""
    matrix = jnp.asarray(matrix, float)

    def score(x, t):
        return (matrix @ x.reshape(-1)).reshape(x.shape) - x

    return scored(score, len(matrix))


def rotation(speed):
    """−x with a rotation of the plane: curl speed/√(1 + speed²)."""
    return linear([[0.0, -speed], [speed, 0.0]])


def points(shape, n=64):
    return {"x": jax.random.normal(jax.random.key(0), (n, *shape))}


def curls(*factors):
    """Curls by factor, for one alone or for a product of two."""
    program = single if len(factors) == 1 else both
    density = cp.compile(program, *factors)
    return curl(density, points((2,)), 0, jax.random.key(0))


def test_against_the_whole_jacobian():
    """For a nonlinear field, with a Jacobian that differs from place to place."""
    a = jax.random.normal(jax.random.key(1), (3, 3))
    f = scored(lambda x, t: jnp.tanh(a @ x) * (1 + x[0] ** 2), 3)
    density = cp.compile(single, f)
    x = points((3,))
    jacobian = jax.jacobian(lambda x: density.score({"x": x}, 0)["x"])
    jacobians = jax.jit(jax.vmap(jacobian))(x["x"])
    turning = 0.5 * (jacobians - jacobians.transpose(0, 2, 1))
    exact = np.sqrt((turning**2).sum() / (jacobians**2).sum())
    found = curl(density, x, 0, jax.random.key(2), num_probes=200)
    assert found == {"f(x)": pytest.approx(exact, rel=0.05)}  # 12,800 directions


@pytest.mark.parametrize("speed", [0.01, 0.3, 10.0])
def test_a_rotation_in_closed_form(speed):
    found = curl(
        cp.compile(single, rotation(speed)), points((2,)), 3, jax.random.key(0)
    )
    assert found["f(x)"] == pytest.approx(speed / np.sqrt(1 + speed**2), rel=0.05)


def test_gradients_have_none_and_energies_are_left_out():
    assert curls(linear([[0.3, 0.7], [0.7, -2.0]]))["f(x)"] < 1e-6
    assert curls(scored(lambda x, t: 100 * jnp.ones(2))) == {"f(x)": 0.0}
    energy = cp.Diffusion(
        unit_energy, SCHEDULE, event_shape=(2,), parameterization="energy", time="sigma"
    )
    assert curls(energy, normal([0.0, 0.0])) == {}
    assert list(curls(energy, rotation(0.3))) == ["g(x)"]


def test_a_factor_that_is_flat_beside_the_others_is_measured_against_the_density():
    sharp = normal([0.0, 0.0], [0.1, 0.1])
    # J is a slow rotation and nothing else.
    flat = linear(np.eye(2) + 0.1 * np.array([[0.0, -1.0], [1.0, 0.0]]))
    assert curls(flat)["f(x)"] == pytest.approx(1.0, rel=1e-5)
    assert curls(sharp, flat)["g(x)"] < 2e-3


@cp.program
def plate_and_window(f, g):
    import numpyro

    with numpyro.plate("images", 3):
        cp.sample("x", f)
    cp.sample(
        "canvas", cp.window(g, (4,), offset=(0,)) * cp.window(g, (4,), offset=(2,))
    )


@pytest.mark.slow
def test_plates_windows_and_sites_of_their_own():
    density = cp.compile(
        plate_and_window, rotation(0.3), linear([[0.0, -0.5], [0.5, 0.0]])
    )
    positions = {"x": points((3, 2))["x"], "canvas": points((4,))["x"]}
    by_factor = density.leaf_scores(jax.tree.map(lambda a: a[0], positions), 0)
    assert {name: list(scores) for name, scores in by_factor.items()} == {
        "f(x)": ["x"],
        "g(x)": ["canvas"],
    }
    found = curl(density, positions, 0, jax.random.key(0))
    # ‖H‖: three images and two windows, all independent.
    of_density = np.sqrt(6 * (1 + 0.3**2) + 4 * (1 + 0.5**2))
    assert found["f(x)"] == pytest.approx(0.3 * np.sqrt(6) / of_density, rel=0.05)
    assert found["g(x)"] == pytest.approx(0.5 * np.sqrt(4) / of_density, rel=0.05)


def test_positions_that_are_not_finite_do_not_count():
    broken = {"x": points((2,))["x"].at[3].set(jnp.nan)}
    density = cp.compile(single, linear([[0.0, -0.3], [0.3, 0.1]]))
    assert curl(density, broken, 0, jax.random.key(0))["f(x)"] == pytest.approx(
        0.3, rel=0.2
    )


def test_other_conditions_are_not_compiled_again():
    """In any order of their names: here 0.3 and −0.5, then −0.5 and 0.3."""
    traces = []

    class Network(eqx.Module):
        def __call__(self, x, level, c):
            traces.append(c)
            return -x + c * jnp.asarray([[0.0, -1.0], [1.0, 0.0]]) @ x

    f = cp.Diffusion(
        Network(),
        SCHEDULE,
        event_shape=(2,),
        parameterization="score",
        conditions={"c": 0.0},
    )
    found = []
    counts = []
    for one, other in ((0.3, -0.5), (-0.5, 0.3)):
        density = cp.compile(both, f.given(c=one), f.given(c=other))
        before = len(traces)
        found.append(curl(density, points((2,)), 0, jax.random.key(0)))
        counts.append(len(traces) - before)
    assert counts[0] > 0
    assert counts[1] == 0
    np.testing.assert_allclose(
        list(found[0].values()), list(found[1].values())[::-1], rtol=0.05
    )


KERNEL = cp.MALA(log_ratio=cp.LineIntegral(3))
SAMPLER = cp.AnnealedMCMC(KERNEL, 1)


def test_a_run_names_the_factor_that_is_not_a_gradient():
    result = run(
        cp.compile(both, rotation(0.4), linear(np.zeros((2, 2)))), sampler=SAMPLER
    )
    assert result.about.curl["f(x)"] == pytest.approx(
        0.4 / np.sqrt(4 + 0.4**2), rel=0.05
    )
    assert result.about.curl["g(x)"] < 1e-6
    assert result.status.code == "not_conservative"
    message = check_finding(result.status, "not_conservative")
    assert re.search(r"f\(x\).*0\.2", message)
    assert "g(x)" not in message
    assert "curl" in str(result.summary())


def test_only_line_integrals_need_gradients():
    line = cp.HMC(log_ratio=cp.LineIntegral(None))
    for kernel, needs_gradient in (
        (cp.MALA(), False),
        (cp.ULA(0.1), False),
        (cp.HMC(), False),
        (KERNEL, True),
        (line, True),
    ):
        assert integrates_score(kernel) is needs_gradient
    assert not integrates_score(cp.SMC().kernel)
    assert not integrates_score(cp.Ancestral().kernel)


@pytest.mark.slow
def test_a_network_without_derivatives_does_not_cost_the_run():
    def network(x, t):
        return jax.pure_callback(
            lambda x: -np.asarray(x),
            jax.ShapeDtypeStruct((2,), x.dtype),
            x,
            vmap_method="sequential",
        )

    f = scored(network, schedule=cp.Schedule.log_snr(4))
    result = run(cp.compile(single, f), chains=4, sampler=SAMPLER)
    assert np.isnan(result.about.curl["f(x)"])
    assert result.status.ok
    assert np.all(np.isfinite(result["x"]))


DENSITY = cp.compile(single, rotation(1.0))
KEY = jax.random.key(0)
REFUSED = {
    LevelError: {
        "beyond the last level": lambda: curl(DENSITY, points((2,)), 99, KEY),
        "from the end": lambda: curl(DENSITY, points((2,)), -1, KEY),
        "half a level": lambda: curl(DENSITY, points((2,)), 1.5, KEY),
        "half a level of the equation": lambda: cp.metrics.fokker_planck(
            DENSITY, points((2,)), 1.5, KEY
        ),
    },
    ShapeError: {
        "one chain": lambda: curl(DENSITY, {"x": jnp.zeros(2)}, 0, KEY),
        "another site": lambda: curl(DENSITY, {"y": jnp.zeros((4, 2))}, 0, KEY),
        "an array": lambda: curl(DENSITY, jnp.zeros((4, 2)), 0, KEY),
        "samples of a site that is not there": lambda: DENSITY.to_samples(
            {"y": jnp.zeros(2)}
        ),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSED))
def test_levels_and_positions_that_do_not_exist_are_refused(kind, call):
    refused(call, kind)
