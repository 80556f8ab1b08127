"""Discrete latents: summed out and drawn, or swept, beside continuous ones; compared
with enumeration of all their values by NumPyro's own log-densities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density as numpyro_log_density

import composeprob as cp
from composeprob import tuning
from composeprob.compiler.discrete import Summed
from composeprob.errors import CapabilityError, ProgramError
from composeprob.results.status import Code
from composeprob.samplers.discrete import DiscreteGibbs
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Transitions
from composeprob.samplers.random import key_of
from refusals import refused, rows
from sampling_cases import SCHEDULE
from zscores import assert_agrees, assert_disagrees, z_scores

KEY = jax.random.key(0)
CHAIN = jnp.array([[0.8, 0.2], [0.3, 0.7]])


# Every latent that is continuous has the real line as its support, so that its
# coordinate is its value and log-densities are NumPyro's.
def assignments(y):
    """A mixture's assignments, in one plate with the data."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
        numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def outliers(y):
    """Two discrete latents that one observation depends on."""
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        bad = numpyro.sample("bad", dist.Bernoulli(0.3))
        side = numpyro.sample("side", dist.DiscreteUniform(-1, 1))
        numpyro.sample("y", dist.Normal(m + bad * side, 0.5 + bad), obs=y)


def switch(y):
    """A switch point, of which the whole series depends."""
    before = numpyro.sample("before", dist.Normal(0.0, 1.0))
    after = numpyro.sample("after", dist.Normal(0.0, 1.0))
    at = numpyro.sample("at", dist.DiscreteUniform(0, len(y) - 1))
    mean = jnp.where(jnp.arange(len(y)) < at, before, after)
    numpyro.sample("y", dist.Normal(mean, 0.7).to_event(1), obs=y)


def groups(y):
    """Groups whose members share an assignment and a continuous latent under it."""
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", 2):
        z = numpyro.sample("z", dist.Bernoulli(logits=m))
        t = numpyro.sample("t", dist.Normal(m + 2.0 * z, 1.0))
        with numpyro.plate("members", len(y) // 2):
            numpyro.sample("y", dist.Normal(t, 1.0), obs=y.reshape(-1, 2))


def both(y):
    """A latent of all of the data, and one of each datum: the first is swept."""
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    s = numpyro.sample("s", dist.Bernoulli(0.4))
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.6, 0.4])))
        numpyro.sample("y", dist.Normal(m + 2.0 * z, 0.5 + s), obs=y)


def chain(y):
    """A hidden Markov chain."""
    m = numpyro.sample("m", dist.Normal(1.0, 1.0))
    states = []
    for t, datum in enumerate(y):
        shares = CHAIN[states[-1]] if states else jnp.array([0.5, 0.5])
        states.append(numpyro.sample(f"z{t}", dist.Categorical(shares)))
        numpyro.sample(f"y{t}", dist.Normal(m * states[-1], 1.0), obs=datum)


def joined(y):
    """Entries of one plate that depend on one another, against what it says."""
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("y", dist.Normal(m + z.sum(), 1.0), obs=y)


def no_plate(y):
    """Entries without a plate: their axis says nothing of what they depend on."""
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    z = numpyro.sample("z", dist.Categorical(jnp.ones((len(y), 2)) / 2).to_event(1))
    numpyro.sample("y", dist.Normal(m + z, 1.0).to_event(1), obs=y)


Y = jnp.array([-0.4, 1.3, 2.2, 0.1])
SUMMED = {
    "assignments": (assignments, {"mu": (3,)}, {"z": (4, range(3))}),
    "outliers": (outliers, {"m": ()}, {"bad": (4, range(2)), "side": (4, (-1, 0, 1))}),
    "switch": (switch, {"before": (), "after": ()}, {"at": ((), range(4))}),
    "groups": (groups, {"m": (), "t": (2,)}, {"z": (2, range(2))}),
    "chain": (chain, {"m": ()}, {f"z{t}": ((), range(2)) for t in range(4)}),
}
SWEPT = {
    "both": (both, {"m": ()}, {"s": ((), range(2)), "z": (4, range(2))}),
    "joined": (joined, {"m": ()}, {"z": (4, range(2))}),
    "no_plate": (no_plate, {"m": ()}, {"z": (4, range(2))}),
}


def size_of(shape):
    return int(np.prod(shape, dtype=int))


def joint_values(discrete):
    """Every joint value of discrete latents, {site: array (values, *shape)}."""
    axes = []
    for shape, values in discrete.values():
        axes += [values] * size_of(shape)
    table = np.array(list(itertools.product(*axes)))
    found = {}
    for name, (shape, _) in discrete.items():
        size = size_of(shape)
        of_site = table[:, :size]
        table = table[:, size:]
        shape = shape if isinstance(shape, tuple) else (shape,)
        found[name] = jnp.asarray(of_site.reshape(-1, *shape), int)
    return found


def log_joint(function, values, latents):
    """NumPyro's log p of each joint value with the continuous latents, (values,)."""

    def one(of_discrete):
        return numpyro_log_density(function, (Y,), {}, {**latents, **of_discrete})[0]

    return jax.jit(jax.vmap(one))(values)


def latents_at(shapes, seed=3):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.float32(0.2 * rng.normal(size=shape))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", SUMMED)
def test_a_density_is_the_sum_over_all_joint_values(name):
    function, shapes, discrete = SUMMED[name]
    density = cp.compile(cp.program(function), Y)
    assert set(density.sites) == set(shapes)
    assert set(density.summed) == set(discrete)
    values = joint_values(discrete)
    latents = latents_at(shapes)

    def expected(latents):
        return jax.nn.logsumexp(log_joint(function, values, latents))

    goal, gradient = jax.value_and_grad(expected)(latents)
    log_density, score = density.value_and_score(latents, 0)
    np.testing.assert_allclose(log_density, goal, rtol=1e-5)
    for site, of_site in gradient.items():
        np.testing.assert_allclose(score[site], of_site, rtol=1e-3, atol=1e-4)


def drawn(density, latents, number=4000):
    """Draws of the latents that are summed out, at positions that differ by little.

    Differences are as large as they must be for positions in single precision to
    differ, and change probabilities by less than a tenth of their errors.
    """
    rng = np.random.default_rng(0)

    def jittered(value):
        noise = 1e-3 * rng.normal(size=(number, *value.shape))
        return jnp.float32(value + noise)

    positions = jax.tree.map(jittered, latents)
    return jax.jit(jax.vmap(density.to_samples))(positions)


def shares(discrete, values, weights, samples):
    """Indicators of each value of each entry in samples, and their expectations."""
    indicators = {}
    expected = {}
    for name, (shape, options) in discrete.items():
        of_site = np.asarray(samples[name]).reshape(-1, size_of(shape))
        exact = np.asarray(values[name]).reshape(len(weights), -1)
        for entry, option in itertools.product(range(size_of(shape)), options):
            probability = float(weights[exact[:, entry] == option].sum())
            # An average of few events is not normal.
            if 0.01 < probability < 0.99:
                label = f"{name}[{entry}] = {option}"
                indicators[label] = of_site[:, entry] == option
                expected[label] = probability
    return indicators, expected


def conditional_shares(name):
    """Indicators of draws given the rest, and their exact expectations."""
    function, shapes, discrete = SUMMED[name]
    density = cp.compile(cp.program(function), Y)
    values = joint_values(discrete)
    latents = latents_at(shapes)
    weights = np.asarray(jax.nn.softmax(log_joint(function, values, latents)))
    samples = drawn(density, latents)
    return shares(discrete, values, weights, samples)


@pytest.mark.parametrize("name", SUMMED)
def test_draws_given_the_rest_have_the_exact_conditional(name):
    assert_agrees(z_scores(*conditional_shares(name)))


def without_data(self, statements, power):
    """A mutant: the terms of priors alone."""

    def of_prior(name):
        return power(name) if name in self.latents else None

    return right_terms(self, statements, of_prior)


right_terms = Summed.terms


def test_draws_that_ignore_the_data_are_detected(monkeypatch):
    monkeypatch.setattr(Summed, "terms", without_data)
    assert_disagrees(z_scores(*conditional_shares("assignments")))


def test_values_are_integers_and_follow_the_position():
    function, shapes, discrete = SUMMED["outliers"]
    density = cp.compile(cp.program(function), Y)
    latents = latents_at(shapes)
    first, second = (density.to_samples(latents) for _ in range(2))
    for name, (shape, options) in discrete.items():
        assert first[name].dtype == jnp.result_type(int)
        assert first[name].shape == (shape,)
        assert set(np.asarray(first[name]).tolist()) <= set(options)
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("name", SWEPT)
def test_entries_that_depend_on_one_another_stay_in_the_position(name):
    function, shapes, discrete = SWEPT[name]
    density = cp.compile(cp.program(function), Y)
    swept = set(discrete) - set(density.summed)
    assert swept == ({"s"} if name == "both" else {"z"})
    assert {density.sites[site].kind for site in swept} == {"discrete"}
    # The density at a position is the joint one, of what is in it.
    values = joint_values(discrete)
    latents = latents_at(shapes)
    log_joints = np.asarray(log_joint(function, values, latents))
    position = dict(latents)
    matching = np.ones(len(log_joints), bool)
    for site in swept:
        value = values[site][5]
        position[site] = value.astype(float)
        of_site = np.asarray(values[site] == value).reshape(len(matching), -1)
        matching &= of_site.all(axis=1)
    goal = np.logaddexp.reduce(log_joints[matching])
    np.testing.assert_allclose(density.log_density(position, 0), goal, rtol=1e-5)


@cp.program
def spins():
    """Three dependent bits, without anything else, whose law is eight numbers."""
    z = numpyro.sample("z", dist.Bernoulli(0.4).expand([3]).to_event(1))
    numpyro.factor("pull", 1.5 * z[0] * z[1] - 2.0 * z[1] * z[2])


STATES = np.array(list(itertools.product((0, 1), repeat=3)))


def spin_shares():
    z = STATES
    log_p = z @ np.full(3, np.log(0.4)) + (1 - z) @ np.full(3, np.log(0.6))
    log_p = log_p + 1.5 * z[:, 0] * z[:, 1] - 2.0 * z[:, 1] * z[:, 2]
    return np.exp(log_p - np.logaddexp.reduce(log_p))


def swept_spins(kernel, number=4000):
    """Exact draws after one sweep of a kernel."""
    density = cp.compile(spins)
    moves = Transitions.resolved(kernel, 1, density)
    layout = Layout.of_density(density)
    chosen = np.random.default_rng(0).choice(8, number, p=spin_shares())
    points = jnp.float32(STATES[chosen])
    noise = density.schedule.at(0)
    setting = (moves.untuned(number), noise)

    def one(i, point):
        words = jax.random.key_data(jax.random.fold_in(KEY, i))
        particle = moves.start(words, point, layout.evaluate(density, point, 0))
        key = key_of(words, 0)
        particle, _ = moves.step(density, True, setting, key, particle)
        return particle.position

    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(number), points))


def spin_scores(points):
    """z-scores of the eight states' shares."""
    index = points @ np.array([4, 2, 1])
    indicators = {str(i): index == i for i in range(8)}
    return z_scores(indicators, {str(i): p for i, p in enumerate(spin_shares())})


class Stale(DiscreteGibbs):
    """A mutant: every entry is drawn given where the others were before the sweep."""

    def step(self, key, state, target, step_size):
        moved = state
        drawn = {}
        for i, entry in enumerate(self.entries):
            one = DiscreteGibbs.step(
                Stale.alone(self, i), key, state, target, step_size
            )
            moved, info = one
            ((name, v),) = moved.position.items()
            drawn[entry] = v[entry]
        ((name, v),) = state.position.items()
        for entry, value in drawn.items():
            v = v.at[entry].set(value)
        position = {name: v}
        return type(state)(position, target(position)), info

    def alone(self, i):
        """The sweep over one entry."""
        kept = object.__new__(DiscreteGibbs)
        for field, value in vars(self).items():
            object.__setattr__(kept, field, value)
        object.__setattr__(kept, "entries", (self.entries[i],))
        object.__setattr__(kept, "counts", (self.counts[i],))
        return kept


def test_a_sweep_leaves_exact_draws_what_they_are():
    points = swept_spins(cp.HMC())
    assert set(np.unique(points)) == {0.0, 1.0}
    assert_agrees(spin_scores(points))


def test_a_sweep_of_stale_entries_is_detected():
    points = swept_spins(cp.Gibbs({"z": Stale()}))
    assert_disagrees(spin_scores(points))


def test_entries_of_a_plate_are_compared_before_they_are_summed():
    density = cp.compile(cp.program(joined), Y)
    assert density.summed == ()


FACTOR = cp.Analytic(dist.Normal(0.0, 1.0), SCHEDULE)


@cp.program
def noised(f, y):
    """A noised site, whose datum comes from one of two instruments."""
    x = cp.sample("x", f)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
    cp.observe("y", dist.Normal(x + 2.0 * z, 0.5).to_event(1), y)


def exact_of_noised(y):
    """E[x], E[z] by enumeration and a grid."""
    x = np.linspace(-5.0, 5.0, 2001)
    weights = np.exp(-0.5 * x**2)
    shares = []
    for datum in np.asarray(y):
        off = 0.7 * np.exp(-2.0 * (datum - x) ** 2)
        on = 0.3 * np.exp(-2.0 * (datum - x - 2.0) ** 2)
        weights = weights * (off + on)
        shares.append(on / (off + on))
    weights /= weights.sum()
    return weights @ x, [weights @ share for share in shares]


TWO = jnp.array([1.5, 0.2])


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(None, id="default"),
        pytest.param(cp.SMC(), id="SMC", marks=pytest.mark.slow),
        pytest.param(
            cp.AnnealedMCMC(cp.HMC(), 5), id="AnnealedMCMC", marks=pytest.mark.slow
        ),
        pytest.param(
            cp.ReplicaExchange(cp.MALA(cp.Adaptive()), num_levels=6, sweeps=100),
            id="ReplicaExchange",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_discrete_latents_stand_beside_noised_sites(sampler):
    density = cp.compile(noised, FACTOR, TWO)
    assert density.sites["z"].kind == "discrete"
    options = {} if sampler is None else {"sampler": sampler}
    result = cp.infer(density, KEY, num_chains=1000, progress=False, **options)
    assert result.status.code is Code.OK, result.status
    assert result["z"].dtype == jnp.result_type(int)
    x, z = exact_of_noised(TWO)
    estimate = result.mean(lambda s: jnp.concatenate([s["x"][None], s["z"]]))
    scores = (estimate.value - np.array([x, *z])) / estimate.error
    assert_agrees({"x": scores[0], "z[0]": scores[1], "z[1]": scores[2]})


@pytest.mark.parametrize(
    ("function", "swept"),
    [(chain, False), pytest.param(both, True, marks=pytest.mark.slow)],
)
def test_a_default_run_has_the_exact_means(function, swept):
    _, _, discrete = {**SUMMED, **SWEPT}[function.__name__]
    density = cp.compile(cp.program(function), Y)
    assert bool(set(discrete) - set(density.summed)) is swept
    result = cp.infer(density, KEY, num_chains=400, progress=False)
    assert result.status.code is Code.OK, result.status
    values = joint_values(discrete)
    grid = jnp.linspace(-6.0, 8.0, 1401)
    log_p = np.asarray(jax.vmap(lambda m: log_joint(function, values, {"m": m}))(grid))
    weights = np.exp(log_p - log_p.max())
    weights /= weights.sum()
    expected = {"m": float(weights.sum(1) @ np.asarray(grid))}
    samples = {"m": np.asarray(result["m"])}
    for name, (shape, _) in discrete.items():
        of_site = np.asarray(values[name]).reshape(len(weights.T), -1)
        for entry in range(size_of(shape)):
            label = f"{name}[{entry}]"
            expected[label] = float(weights.sum(0) @ of_site[:, entry])
            samples[label] = np.asarray(result[name]).reshape(400, -1)[:, entry]
    assert_agrees(z_scores(samples, expected))
    # Integers stay integers wherever a result goes.
    site = next(iter(discrete))
    assert np.asarray(result.to_arviz().posterior[site]).dtype.kind == "i"
    assert site in str(result.summary())


def test_a_prior_has_the_priors_shares():
    density = cp.prior(cp.compile(cp.program(assignments), Y))
    latents = latents_at({"mu": (3,)})
    np.testing.assert_allclose(
        density.log_density(latents, 0),
        dist.Normal(0.0, 2.0).log_prob(latents["mu"]).sum(),
        rtol=1e-5,
    )
    z = np.asarray(drawn(density, latents)["z"])
    scores = {}
    for value, share in enumerate((0.2, 0.3, 0.5)):
        scores |= z_scores(
            {str(value): (z == value).astype(float)}, {str(value): share}
        )
    assert_agrees(scores)


def latents_of_clusters():
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(4)))
    sd = numpyro.sample("sd", dist.HalfNormal(2.0))
    with numpyro.plate("clusters", 4):
        # Priors that tell the clusters apart: else 24 modes are all right.
        centres = jnp.array([-6.0, -2.0, 2.0, 6.0])
        mu = numpyro.sample("mu", dist.Normal(centres, 1.0))
    return shares, mu, sd


@cp.program
def clusters(y):
    """Four clusters with an assignment of each datum."""
    shares, mu, sd = latents_of_clusters()
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Categorical(shares))
        numpyro.sample("y", dist.Normal(mu[z], sd), obs=y)


def enumerated(y):
    """The same model, summed over assignments."""
    shares, mu, sd = latents_of_clusters()
    parts = dist.Categorical(shares), dist.Normal(mu, sd)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.MixtureSameFamily(*parts), obs=y)


@pytest.mark.slow
def test_assignments_of_500_data_are_as_enumeration_says():
    rng = np.random.default_rng(0)
    true = rng.choice(4, 500, p=[0.1, 0.2, 0.3, 0.4])
    y = np.array([-6.0, -2.0, 2.0, 7.0])[true] + 0.8 * rng.normal(size=500)
    y = jnp.float32(y)
    density = cp.compile(clusters, y)
    result = cp.infer(density, KEY, num_chains=400, progress=False)
    assert result.status.code is Code.OK, result.status

    nuts = numpyro.infer.MCMC(
        numpyro.infer.NUTS(enumerated),
        num_warmup=300,
        num_samples=1000,
        progress_bar=False,
    )
    nuts.run(jax.random.key(1), y)
    draws = nuts.get_samples()
    scores = {}
    for name in ("shares", "mu", "sd"):
        ours = np.asarray(result[name], float).reshape(400, -1)
        theirs = np.asarray(draws[name], float).reshape(1000, -1)
        effective = numpyro.diagnostics.effective_sample_size(theirs[None])
        variance = ours.var(0) / 400 + theirs.var(0) / effective
        difference = (ours.mean(0) - theirs.mean(0)) / np.sqrt(variance)
        scores |= {f"{name}[{i}]": z for i, z in enumerate(difference)}
    # The number of data in each cluster, whose mean given the rest is known.
    normal = dist.Normal(draws["mu"][:, None], draws["sd"][:, None, None])
    log_p = normal.log_prob(y[:, None]) + jnp.log(draws["shares"])[:, None]
    theirs = np.asarray(jax.nn.softmax(log_p, axis=-1).sum(1), float)
    for v in range(4):
        ours = np.sum(np.asarray(result["z"]) == v, axis=1)
        variance = ours.var() / 400 + theirs[:, v].var() / 300
        scores[f"count of {v}"] = (ours.mean() - theirs[:, v].mean()) / variance**0.5
    assert_agrees(scores)


# Refusals


def latent(make):
    """Compiles a program with one discrete latent."""

    @cp.program
    def program(y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        z = numpyro.sample("z", make(m))
        numpyro.sample("y", dist.Normal(m + jnp.sum(z), 1.0), obs=y)

    return lambda: cp.compile(program, 0.3)


def sampled(function, **options):
    """A run of a program that sweeps."""

    def call():
        density = cp.compile(cp.program(function), Y)
        return cp.infer(density, KEY, num_chains=64, progress=False, **options)

    return call


def long(y):
    z = numpyro.sample("z", dist.Bernoulli(0.5).expand([3000]).to_event(1))
    numpyro.sample("y", dist.Normal(z.mean(), 1.0), obs=y[0])


def normal_score(x, t):
    return -x


def score_only(y):
    """A network that offers its score alone, with an observation through it."""
    f = cp.Diffusion(normal_score, SCHEDULE, event_shape=(), parameterization="score")
    x = cp.sample("x", f)
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    cp.observe("y", dist.Normal(x + z, 1.0), y[0], anneal="denoised")


REFUSALS = {
    ProgramError: {
        "values without an end": latent(lambda m: dist.Poisson(2.0)),
        "a number that is a latent's": latent(
            lambda m: dist.Binomial(jnp.int32(jnp.abs(m) + 1.0), 0.5)
        ),
        "several numbers": latent(lambda m: dist.Binomial(jnp.array([1, 3]), 0.5)),
        "vectors": latent(lambda m: dist.Multinomial(3, jnp.ones(2) / 2)),
    },
    CapabilityError: {
        "a long sweep": sampled(long),
        "a discrete site in a block of HMC": sampled(
            no_plate, sampler=cp.AnnealedMCMC(cp.Gibbs({("m", "z"): cp.HMC()}))
        ),
        "global moves of a swept site": sampled(
            no_plate, sampler=cp.AnnealedMCMC(cp.HMC(), then=cp.GlobalMoves())
        ),
        "NUTS of a swept site": lambda: cp.compile(
            cp.program(no_plate), Y
        ).to_numpyro(),
        "values behind a score": sampled(score_only),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSALS))
def test_refusals_of_discrete_latents(kind, call):
    refused(call, kind)


def test_nuts_moves_what_is_summed_around():
    density = cp.compile(cp.program(assignments), Y)
    target = density.to_numpyro()
    position = latents_at({"mu": (3,)})
    assert target.postprocess_fn(position)["z"].shape == (4,)


def test_many_terms_are_swept_in_the_place_of_a_sum(monkeypatch):
    few = tuning.DISCRETE._replace(most_terms=16)
    monkeypatch.setattr(tuning, "DISCRETE", few)
    density = cp.compile(cp.program(chain), Y)
    assert density.summed == ()
    kinds = {site.kind for site in density.sites.values()}
    assert kinds == {"static", "discrete"}


def test_predictions_take_the_values_of_each_sample():
    density = cp.compile(cp.program(assignments), Y)
    samples = {
        "mu": jnp.tile(jnp.array([-50.0, 0.0, 50.0]), (3, 1)),
        "z": jnp.array([[0, 0, 1, 2], [1, 1, 1, 1], [2, 0, 2, 0]]),
    }
    predicted = density.predict(KEY, samples)["y"]
    expected = jnp.take_along_axis(samples["mu"], samples["z"], axis=1)
    assert jnp.all(jnp.abs(predicted - expected) < 10.0)
