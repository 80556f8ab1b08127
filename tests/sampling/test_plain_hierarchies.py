"""Hierarchies of latents alone: moves in both coordinates, and the memory of a
warm-up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.errors import WrongTypeError
from composeprob.kernels.hamiltonian import HamiltonianState
from composeprob.kernels.kernel import KernelState
from composeprob.results.status import Code
from composeprob.samplers.choose import choose
from composeprob.samplers.finishers import Trail, memory
from composeprob.samplers.hierarchy import (
    InBothCoordinates,
    NonCentred,
    ShortAndLong,
    StandardCoordinates,
    has_dependents,
    vague_entries,
)
from composeprob.samplers.layout import Layout
from composeprob.samplers.sampler import least_widths, likely_start
from messages import check_finding
from sampling_cases import run

MEMBERS = 4


@cp.program
def prior():
    """Hierarchy of three layers without data, whose exact draws are known."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.LogNormal(-1.0, 0.5))
    theta = numpyro.sample("theta", dist.Normal(mu, tau).expand([MEMBERS]).to_event(1))
    numpyro.sample("below", dist.Normal(theta, tau).to_event(1))


@cp.program
def vague(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("members", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, 0.5), obs=y)


@cp.program
def standard(y, noise):
    """A hierarchy whose members are in standard coordinates."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.LogNormal(-1.0, 0.5))
    xi = numpyro.sample("xi", dist.Normal(0.0, 1.0).expand([MEMBERS]).to_event(1))
    numpyro.sample("y", dist.Normal(mu + tau * xi, noise).to_event(1), obs=y)


def without_information():
    """Return it with data that tell nothing, so that exact draws are those of the
    prior."""
    return cp.compile(standard, jnp.zeros(MEMBERS), jnp.float32(1e4))


@cp.program
def mixture(means, sd):
    two = dist.MixtureSameFamily(
        dist.Categorical(probs=jnp.array([0.5, 0.5])), dist.Normal(means, sd)
    )
    numpyro.sample("x", two)


def mixture_of(apart, sd):
    """A mixture of two laws, whose numbers are data: code is compiled once for all."""
    return cp.compile(mixture, jnp.array([-apart, apart]), jnp.float32(sd))


def modes():
    """Two separated modes."""
    return mixture_of(3.0, 0.1)


def one_mode():
    """Two laws that overlap in one mode."""
    return mixture_of(0.3, 1.0)


def exact_draws(layout, number):
    """Return points of the prior, (number, D)."""
    rng = np.random.default_rng(0)
    mu = rng.standard_normal(number)
    log_tau = -1.0 + 0.5 * rng.standard_normal(number)
    tau = np.exp(log_tau)[:, None]
    theta = mu[:, None] + tau * rng.standard_normal((number, MEMBERS))
    below = theta + tau * rng.standard_normal((number, MEMBERS))
    xi = rng.standard_normal((number, MEMBERS))
    position = {"mu": mu, "tau": log_tau, "theta": theta, "below": below, "xi": xi}
    position = {name: position[name] for name, _ in layout.static}
    position = {name: jnp.float32(values) for name, values in position.items()}
    return jax.vmap(lambda one: layout.vector(one, 1.0))(position)


SOME = {
    "theta": jnp.array([True, True, False, False]),
    "below": jnp.array([False, True, True, False]),
}
"""Entries that are vague: the others stay as they are."""


def moved(
    transitions=15, number=2000, vague=None, step_size=0.4, density=None, inner=cp.HMC
):
    """Return log tau of exact draws after transitions in standard coordinates, or in
    those of the data."""
    density = density or cp.compile(prior)
    layout = Layout.of_density(density)
    kernel = NonCentred(step_size, 4, vague=vague, inner=inner)
    kernel = kernel.under(density, density.schedule.at(0))

    def target(position):
        evaluation = layout.evaluate(density, position["v"], 0, False)
        return evaluation.with_gradients({"v": each} for each in evaluation.gradients)

    @jax.jit
    @jax.vmap
    def chain(key, v):
        def step(state, key):
            return kernel.step(key, state, target, jnp.float32(step_size))

        start = KernelState({"v": v}, target({"v": v}))
        end, info = jax.lax.scan(step, start, jax.random.split(key, transitions))
        position = layout.position(end.position["v"], 1.0)
        return position["tau"], info.acceptance.mean()

    keys = jax.random.split(jax.random.key(1), number)
    log_tau, acceptance = chain(keys, exact_draws(layout, number))
    assert acceptance.mean() > 0.5
    return np.asarray(log_tau)


@pytest.mark.parametrize(("vague", "step_size"), [(None, 0.4), (SOME, 0.08)])
def test_moves_in_standard_coordinates_leave_the_density_invariant(vague, step_size):
    log_tau = moved(vague=vague, step_size=step_size)
    assert abs(log_tau.mean() + 1.0) < 4 * 0.5 / 2000**0.5
    assert abs(log_tau.std() / 0.5 - 1) < 4 / (2 * 2000) ** 0.5


@pytest.mark.parametrize("inner", [cp.HMC, ShortAndLong])
def test_moves_in_the_coordinates_of_data_leave_the_density_invariant(inner):
    density = without_information()
    log_tau = moved(step_size=0.1, density=density, inner=inner)
    assert abs(log_tau.mean() + 1.0) < 4 * 0.5 / 2000**0.5
    assert abs(log_tau.std() / 0.5 - 1) < 4 / (2 * 2000) ** 0.5


@pytest.mark.parametrize(
    ("density", "away", "step_size"),
    [(lambda: cp.compile(prior), -0.5, 0.4), (without_information, 0.2, 0.1)],
)
def test_without_the_change_of_volume_they_would_not(
    monkeypatch, density, away, step_size
):
    place = StandardCoordinates.place

    def without(self, u):
        v, log_volume, accurate = place(self, u)
        return v, 0.0 * log_volume, accurate

    monkeypatch.setattr(StandardCoordinates, "place", without)
    log_tau = moved(step_size=step_size, density=density())
    assert (log_tau.mean() + 1.0) / away > 1


def compiled(coordinates):
    """The way to standard coordinates and back, of many points: as single operations
    they would be compiled one by one."""
    there = jax.jit(jax.vmap(coordinates.standardise))
    back = jax.jit(jax.vmap(coordinates.place))
    return there, back


def test_coordinates_are_those_of_the_standard_normals_and_come_back():
    density = cp.compile(prior)
    layout = Layout.of_density(density)
    coordinates = StandardCoordinates(density, layout)
    standardise, place = compiled(coordinates)
    v = exact_draws(layout, 500)
    u = standardise(v)
    back, log_volume, accurate = place(u)
    np.testing.assert_allclose(back, v, atol=1e-5)
    assert accurate.all()
    log_tau = layout.position(v, 1.0)["tau"]
    np.testing.assert_allclose(log_volume, 2 * MEMBERS * log_tau, rtol=1e-4)
    xi = layout.position(u, 1.0)
    np.testing.assert_allclose(xi["theta"].std(), 1.0, atol=0.06)
    np.testing.assert_allclose(xi["below"].std(), 1.0, atol=0.06)
    # Below the rounding error of theta standard coordinates are lost.
    lost = v.at[:, 1 + MEMBERS].set(-18.0)
    assert layout.position(lost, 1.0)["tau"][0] == -18.0
    u = standardise(lost)
    _, _, accurate = place(u)
    assert not accurate.all()


def test_coordinates_of_data_are_their_locations_and_come_back():
    density = without_information()
    layout = Layout.of_density(density)
    coordinates = StandardCoordinates(density, layout)
    standardise, place = compiled(coordinates)
    v = exact_draws(layout, 50)
    u = standardise(v)
    back, log_volume, accurate = place(u)
    np.testing.assert_allclose(back, v, atol=1e-5)
    assert accurate.all()
    position = layout.position(v, 1.0)
    np.testing.assert_allclose(log_volume, -MEMBERS * position["tau"], rtol=1e-4)
    location = (
        position["mu"][:, None] + jnp.exp(position["tau"])[:, None] * (position["xi"])
    )
    found = layout.position(u, 1.0)["xi"]
    np.testing.assert_allclose(found, location, rtol=1e-4, atol=1e-5)
    # Near the rounding error of its location a datum tells nothing of ξ.
    lost = {**position, "mu": position["mu"] + 5, "tau": jnp.full(50, -14.0)}
    lost = jax.vmap(lambda one: layout.vector(one, 1.0))(lost)
    u = standardise(lost)
    _, _, accurate = place(u)
    assert not accurate.any()


def test_entries_that_data_hold_leave_standard_coordinates():
    """Members of a population with the location of their data, half of them narrow."""
    density = without_information()
    layout = Layout.of_density(density)
    position = dict(layout.position(exact_draws(layout, 300), 1.0))
    rng = np.random.default_rng(2)
    theta = np.array([0.1, 0.2, 0.3, 0.4]) + 0.01 * rng.standard_normal((300, 4))
    tau = np.exp(position["tau"])[:, None]
    held = (theta - position["mu"][:, None]) / tau
    position["xi"] = position["xi"].at[:, :2].set(held[:, :2])
    points = jax.vmap(lambda one: layout.vector(one, 1.0))(position)
    found = vague_entries(np.asarray(points), density)
    np.testing.assert_array_equal(found["xi"], [True, True, False, False])


LOCATIONS = {
    "affine": (lambda mu, tau, xi: mu - tau * xi, True),
    "each with a slope of its own": (
        lambda mu, tau, xi: mu + tau * jnp.arange(1.0, 5.0) * xi,
        True,
    ),
    "curved": (lambda mu, tau, xi: mu + tau * jnp.sinh(xi), False),
    "bent where few draws are": (
        lambda mu, tau, xi: mu + tau * jnp.where(xi > 2.2, 2 * xi - 2.2, xi),
        False,
    ),
    "curved by little near 0": (
        lambda mu, tau, xi: mu + 0.1 * tau * jnp.tanh(xi / 20),
        False,
    ),
    "in another order": (lambda mu, tau, xi: mu + tau * xi[::-1], False),
    "of neighbours": (lambda mu, tau, xi: mu + tau * jnp.cumsum(xi), False),
    "of some": (lambda mu, tau, xi: mu + tau * xi.at[0].set(0.0), False),
    "of one latent": (lambda mu, tau, xi: xi, False),
}
"""Locations of data, and whether these have coordinates for ξ."""


@pytest.mark.parametrize("name", LOCATIONS)
def test_data_have_coordinates_where_their_location_is_affine_in_each(name):
    location, expected = LOCATIONS[name]

    @cp.program
    def program(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = numpyro.sample("tau", dist.LogNormal(-1.0, 0.5))
        with numpyro.plate("members", MEMBERS):
            xi = numpyro.sample("xi", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(location(mu, tau, xi), 0.1), obs=y)

    density = cp.compile(program, jnp.zeros(MEMBERS))
    assert has_dependents(density) == expected
    zeros = {"mu": jnp.zeros(()), "tau": jnp.zeros(()), "xi": jnp.zeros(MEMBERS)}
    frames = density.evaluator.frames_by_data(zeros, 0)
    assert set(frames) == ({"xi"} if expected else set())


@cp.program
def of_two(y, z):
    """Data of a, whose location depends on b, before those of b."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.LogNormal(-1.0, 0.5))
    a = cp.sample("a", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    b = cp.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    cp.observe("y", dist.Normal(mu + tau * a + b.sum(), 0.1).to_event(1), y)
    cp.observe("z", dist.Normal(mu - tau * b, 0.1).to_event(1), z)


@cp.program
def in_a_circle(y, z):
    """Each location depends on the other latent."""
    tau = numpyro.sample("tau", dist.LogNormal(-1.0, 0.5))
    a = cp.sample("a", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    b = cp.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    cp.observe("y", dist.Normal(b.sum() + tau * a, 0.1).to_event(1), y)
    cp.observe("z", dist.Normal(a.sum() + tau * b, 0.1).to_event(1), z)


@cp.program
def below_xi(y, z):
    """A latent whose location depends on xi, which data have in standard
    coordinates."""
    tau = numpyro.sample("tau", dist.LogNormal(-1.0, 0.5))
    xi = cp.sample("xi", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    theta = cp.sample("theta", dist.Normal(xi[:3], tau).to_event(1))
    cp.observe("y", dist.Normal(theta.sum() + tau * xi, 0.1).to_event(1), y)
    cp.observe("z", dist.Normal(theta, 0.1).to_event(1), z)


@pytest.mark.parametrize(
    ("program", "moved"),
    [(of_two, ["b", "a"]), (in_a_circle, []), (below_xi, ["theta"])],
)
def test_coordinates_that_depend_on_one_another_come_back(program, moved):
    """Locations and scales must be the same on the way there and back."""
    density = cp.compile(program, jnp.zeros(4), jnp.zeros(3))
    layout = Layout.of_density(density)
    coordinates = StandardCoordinates(density, layout)
    v = jax.random.normal(jax.random.key(0), (layout.size,))
    assert list(coordinates.frames(layout.position(v, 1.0))) == moved
    back, log_volume, _ = coordinates.place(coordinates.standardise(v))
    np.testing.assert_allclose(back, v, atol=1e-4)

    def placed(u):
        return coordinates.place(u)[0]

    jacobian = jax.jacfwd(placed)(coordinates.standardise(v))
    _, log_determinant = np.linalg.slogdet(jacobian)
    np.testing.assert_allclose(log_volume, log_determinant, atol=1e-3)


@pytest.fixture
def wide_starts(monkeypatch):
    """Starts above a tenth of a scale's median, which few draws are below."""
    monkeypatch.setattr(tuning, "START", tuning.START._replace(narrow=0.1))


@pytest.mark.usefixtures("wide_starts")
def test_no_chain_starts_where_a_scale_is_near_0():
    """Members at their location are likelier than members that are spread at
    random."""
    density = cp.compile(vague, jnp.linspace(-1.0, 1.0, 8))
    layout = Layout.of_density(density)
    words = jax.random.bits(jax.random.key(0), (4000, 2), jnp.uint32)

    @jax.jit
    def starts(least):
        start = functools.partial(likely_start, layout, density, 0, least)
        points, _ = jax.vmap(start)(words)
        return layout.position(points, 1.0)["tau"]

    least = least_widths(layout, density, 0)
    (width,) = np.unique(least["theta"])
    # A tenth of the median of |z|.
    assert 0.04 < width < 0.1
    assert np.exp(starts(least)).min() >= width
    assert np.exp(starts({})).min() < width / 2


@pytest.mark.usefixtures("wide_starts")
def test_weights_of_starts_give_the_law_above_these_widths():
    y = jnp.array([0.3])
    density = cp.compile(vague, y)
    layout = Layout.of_density(density)
    words = jax.random.bits(jax.random.key(1), (4000, 2), jnp.uint32)
    least = least_widths(layout, density, 0)
    start = functools.partial(likely_start, layout, density, 0, least)
    points, log_weights = jax.jit(jax.vmap(start))(words)
    log_tau = np.asarray(layout.position(points, 1.0)["tau"])
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    grid = np.linspace(np.log(float(least["theta"][0])), 2.0, 2000)
    tau = np.exp(grid)
    variance = 4.0 + tau**2 + 0.25
    density_of = np.exp(-0.5 * tau**2 + grid - 0.045 / variance) / np.sqrt(variance)
    density_of /= density_of.sum()
    expected = density_of @ grid
    spread = np.sqrt(density_of @ (grid - expected) ** 2)
    worth = 1 / np.sum(weights**2)
    assert abs(weights @ log_tau - expected) < 4 * spread / worth**0.5


def test_entries_that_are_not_vague_stay_as_they_are():
    density = cp.compile(prior)
    layout = Layout.of_density(density)
    coordinates = StandardCoordinates(density, layout, SOME)
    standardise, place = compiled(coordinates)
    v = exact_draws(layout, 50)
    u = standardise(v)
    before = layout.position(v, 1.0)
    after = layout.position(u, 1.0)
    for name, vague in SOME.items():
        same = np.asarray(before[name] == after[name]).all(0)
        np.testing.assert_array_equal(same, ~vague)
    back, log_volume, _ = place(u)
    np.testing.assert_allclose(back, v, atol=1e-5)
    # Four entries of eight have the width tau.
    np.testing.assert_allclose(log_volume, 4 * before["tau"], rtol=1e-4)


def test_entries_that_data_hold_far_more_narrowly_than_their_prior_are_not_vague():
    density = cp.compile(prior)
    layout = Layout.of_density(density)
    v = np.array(exact_draws(layout, 300))
    free = vague_entries(v, density)
    assert all(entries.all() for entries in free.values())
    position = {name: np.array(x) for name, x in layout.position(v, 1.0).items()}
    rng = np.random.default_rng(1)
    sharp = 0.7 + 0.01 * rng.standard_normal((300, 2))
    # A few chains that are far from the others do not count.
    sharp[:5] += 3.0
    position["below"][:, :2] = sharp
    held = jax.vmap(lambda one: layout.vector(one, 1.0))(position)
    found = vague_entries(np.asarray(held), density)
    np.testing.assert_array_equal(found["below"], [False, False, True, True])
    assert found["theta"].all()
    # Where none is vague, all are taken for it.
    position["below"] = 0.01 * rng.standard_normal((300, MEMBERS))
    position["theta"] = 0.01 * rng.standard_normal((300, MEMBERS))
    held = jax.vmap(lambda one: layout.vector(one, 1.0))(position)
    found = vague_entries(np.asarray(held), density)
    assert all(entries.all() for entries in found.values())


def test_half_of_the_steps_are_shorter_whatever_the_place_is():
    """Their lengths are log-uniform down to a hundredth."""
    share, most = tuning.LATENTS.short
    kernel = ShortAndLong(0.3, 4)
    x = {"x": jnp.zeros(())}
    density = modes()

    @jax.jit
    def length(uniform):
        """Return the step that this number on (0, 1) chooses, over the step size."""
        noise = jnp.zeros(kernel.noise_size(x))
        noise = noise.at[-1].set(jax.scipy.special.ndtri(uniform))
        state = HamiltonianState(x, density.evaluator(x, 0), x)
        trajectory, _ = kernel.begin(noise, state, jnp.float32(0.3))
        return trajectory.step_size / 0.3

    assert length(share + 0.1) == pytest.approx(1.0, rel=1e-4)
    assert length(share / 2) == pytest.approx(most**-0.5, rel=1e-3)
    assert length(1e-6) == pytest.approx(1.0, rel=1e-3)


def test_a_transition_evaluates_as_often_as_it_says():
    density = cp.compile(prior)
    layout = Layout.of_density(density)
    kernel = NonCentred(0.4, 3).under(density, density.schedule.at(0))
    calls = []

    def target(position):
        calls.append(position)
        evaluation = layout.evaluate(density, position["v"], 0, False)
        return evaluation.with_gradients({"v": each} for each in evaluation.gradients)

    (v,) = exact_draws(layout, 1)
    state = KernelState({"v": v}, target({"v": v}))
    calls.clear()
    with jax.disable_jit():
        kernel.step(jax.random.key(0), state, target, jnp.float32(0.4))
    assert len(calls) == kernel.evaluations_per_step == 3


def test_only_hierarchies_of_latents_alone_are_moved_in_both_coordinates():
    hierarchy = cp.compile(prior)
    sampler, reason = choose(hierarchy, 100)
    assert has_dependents(hierarchy)
    assert isinstance(sampler.kernel, InBothCoordinates)
    assert sampler.kernel.evaluations_per_step == 8
    assert "centred and non-centred" in reason
    alone = modes()
    assert not has_dependents(alone)
    sampler, _ = choose(alone, 100)
    assert isinstance(sampler.kernel, cp.HMC)


@pytest.mark.slow
def test_a_group_mean_of_many_members_has_its_variance():
    """Given the data mu is all but N(mean of y, σ²/J)."""
    rng = np.random.default_rng(0)
    y = jnp.float32(0.4 + 0.5 * rng.standard_normal(100))
    result = run(cp.compile(vague, y), chains=256, sampler=None)
    assert result.status.ok
    assert result.about.blocks == ("mu, tau, theta", "mu, tau, theta, non-centred")
    assert abs(result["mu"].std() / 0.051 - 1) < 0.25
    assert abs(result["mu"].mean() - y.mean()) < 0.02


def test_a_population_that_hardly_moves_has_not_settled():
    density = modes()
    rng = np.random.default_rng(0)
    start = rng.standard_normal((400, 1))
    after = start + 0.1 * rng.standard_normal((400, 1))
    independent = rng.standard_normal((400, 1))

    def drift(end, supported):
        trail = Trail(start, np.arange(400))
        trail.add(start)
        trail.add(end)
        return cp.WarmUp().drift(trail, density, supported)

    assert drift(after, supported=False) > 0.9
    assert drift(after, supported=True) == 0.0
    assert drift(independent, supported=False) == 0.0


def test_chains_in_separated_modes_are_unsettled_unless_global_moves_renewed_them():
    density = modes()
    kernel = cp.HMC(0.05, num_leapfrog=4)
    sampler = cp.AnnealedMCMC(kernel, 20, then=cp.WarmUp())
    stuck = run(density, chains=200, sampler=sampler)
    assert stuck.status.has(Code.UNSETTLED)
    then = (cp.GlobalMoves(20), cp.WarmUp())
    renewed = run(density, chains=200, sampler=cp.AnnealedMCMC(kernel, 20, then=then))
    assert not renewed.status.has(Code.UNSETTLED)


@cp.program
def squared(y):
    """Members about the square of a latent, whose sign the data do not see."""
    x = numpyro.sample("x", dist.Normal(0.3, 1.0))
    with numpyro.plate("members", 12):
        theta = numpyro.sample("theta", dist.Normal(x**2, 0.5))
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def test_global_moves_take_turns_with_the_warm_up_where_there_are_no_levels():
    """P(x > 0) = ∫ over x > 0 of N(x; 0.3, 1)·exp(−n·(ȳ − x²)²/2v), v = 1.25."""
    y = np.linspace(0.4, 3.4, 12)
    density = cp.compile(squared, jnp.float32(y))
    sampler, reason = choose(density, 300)
    assert sampler.finishers == (cp.WarmUp(cp.GlobalMoves(20)),)
    assert "take turns with a warm-up" in reason

    x = np.linspace(-5, 5, 10_001)
    log_density = -0.5 * (x - 0.3) ** 2 - 12 * (y.mean() - x**2) ** 2 / 2.5
    weights = np.exp(log_density - log_density.max())
    exact = weights[x > 0].sum() / weights.sum()
    result = run(density, chains=300, sampler=None)
    share = result.probability(lambda s: s["x"] > 0)
    assert result.status.ok
    assert abs(share.value - exact) < 4 * share.error < 0.12

    # HMC alone keeps the chains where they began.
    alone = cp.AnnealedMCMC(sampler.kernel, 25, then=cp.WarmUp())
    stuck = run(density, chains=300, sampler=alone)
    assert not stuck.status.ok


def test_a_block_that_begins_with_global_moves_pays_for_both():
    density = modes()
    points = np.random.default_rng(0).choice([-3.0, 3.0], (200, 1))
    points = points + 0.1 * np.random.default_rng(1).standard_normal((200, 1))
    across = cp.WarmUp(across=cp.GlobalMoves(7))
    fitted = across.fit(points, density, None)
    alone = cp.WarmUp().evaluations(fitted.within)
    assert across.evaluations(fitted) == alone + 7
    # Too few points fit no mixture.
    few = across.fit(points[:2], density, None)
    assert across.evaluations(few) == alone


@pytest.mark.parametrize("across", [20, cp.GlobalMoves, cp.WarmUp()])
def test_a_warm_up_takes_global_moves_alone(across):
    with pytest.raises(WrongTypeError, match="WarmUp"):
        cp.WarmUp(across=across)


def test_heavy_tails_are_no_drift_and_a_change_of_their_width_is():
    density = modes()

    def drift(factor):
        rng = np.random.default_rng(5)
        trail = Trail(rng.standard_normal((400, 30)), np.arange(400))
        trail.add(rng.standard_t(3, (400, 30)))
        trail.add(factor * rng.standard_t(3, (400, 30)))
        return cp.WarmUp().drift(trail, density, supported=True)

    assert drift(1.0) == 0.0
    assert drift(4.0) > 1.0


class Still(cp.WarmUp):
    """A warm-up that moves no chain."""

    def move(self, run, density, fitted, number):
        return run


@pytest.mark.parametrize("made", [one_mode, modes])
def test_global_moves_excuse_memory_only_where_modes_keep_the_chains(made):
    """The proposals of the one may have missed what moves inside of its mode reach."""
    then = (cp.GlobalMoves(20), Still())
    sampler = cp.AnnealedMCMC(cp.HMC(0.05, num_leapfrog=4), 20, then=then)
    result = run(made(), chains=200, sampler=sampler)
    assert result.status.has(Code.UNSETTLED) == (made is one_mode)


def test_latents_of_runs_without_a_warm_up_have_to_forget_their_start_too(tmp_path):
    density = one_mode()

    def moved(step_size):
        kernel = cp.HMC(step_size, num_leapfrog=3, jitter=0.5)
        return cp.AnnealedMCMC(kernel, 20)

    slow = moved(0.002)  # of the other one's code
    result = run(density, chains=200, sampler=slow, checkpoint_dir=tmp_path)
    assert result.trust.memory > 0.9
    check_finding(result.status, Code.UNSETTLED)
    # A run that goes on from its checkpoint knows where its chains began.
    again = run(density, chains=200, sampler=slow, checkpoint_dir=tmp_path)
    assert again.trust.memory == result.trust.memory
    settled = run(density, chains=200, sampler=moved(1.0))
    assert settled.trust.memory == 0.0
    assert settled.status.ok


def test_chance_among_many_members_is_no_memory_and_hides_none_of_their_location():
    layout = Layout((), (("members", (1000,)), ("mu", ())))
    rng = np.random.default_rng(3)
    start = rng.standard_normal((64, 1001))
    after = rng.standard_normal((64, 1001))
    assert memory(start, after, layout) == 0.0
    # The greatest of a thousand correlations by chance.
    assert np.mean(start * after, axis=0).max() > 0.35
    after[:, -1] = start[:, -1] + rng.standard_normal(64)
    assert memory(start, after, layout) > 0.5
