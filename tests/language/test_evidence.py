"""Evidence at a site: a factor that multiplies the density where a site keeps a prior of its own."""

import contextlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.errors import DoublyIntractableError, InvalidValueError, ProgramError, ShapeError, WrongTypeError
from composeprob.kernels.line_integral import LineIntegral, bounded
from composeprob.samplers import hierarchy
from composeprob.samplers.choose import choose
from composeprob.samplers.hierarchy import Interweaving
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Transitions
from refusals import refused
from zscores import assert_agrees, assert_disagrees, z_scores

LEVELS = cp.Schedule.log_snr(30)
BROAD, NOISE = 3.0, 0.5
"""Of the prior that estimators were trained under, and of what a subject's data say."""
WIDTH = float((BROAD**-2 + NOISE**-2) ** -0.5)


def gaussian(width, shape=(), names=("m",)):
    """The score of the noised N(m, width²), as a network's: nothing but a score."""

    def score(x, log_snr, m=0.0):
        alpha2 = jax.nn.sigmoid(log_snr)
        return -(x - jnp.sqrt(alpha2) * m) / (alpha2 * width**2 + jax.nn.sigmoid(-log_snr))

    return cp.Diffusion(score, LEVELS, event_shape=shape, parameterization="score", time="log_snr", conditions=names)


POSTERIOR, PRIOR = gaussian(WIDTH), gaussian(BROAD, names=())


def means(y):
    """What the estimator makes of data y: the mean of its posterior."""
    return jnp.asarray(WIDTH**2 / NOISE**2 * np.asarray(y), jnp.float32)


@cp.program
def study(posterior, prior, ms):
    mu = cp.sample("mu", dist.Normal(0.0, 1.0))
    tau = cp.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("subjects", len(ms)):
        eta = cp.sample("eta", dist.Normal(mu, tau))
        cp.factor("x", posterior.given(m=ms) / prior, at=eta)


def group(y, noise=NOISE):
    """Mean and standard deviation of mu and tau given data, and the log-evidence, by quadrature."""
    mu, tau = np.meshgrid(np.linspace(-4, 4, 801), np.linspace(1e-3, 4, 1600), indexing="ij")
    variance = tau**2 + noise**2
    log_p = -0.5 * (mu**2 + tau**2) - 0.5 * len(y) * np.log(variance)
    log_p -= 0.5 * sum((value - mu) ** 2 for value in y) / variance
    weights = np.exp(log_p - log_p.max())
    cell, broad = 0.01 * (4 - 1e-3) / 1599 / np.pi, BROAD**2 + noise**2  # p(mu)·p(tau) = exp(−…)/π
    log_z = log_p.max() + np.log(weights.sum() * cell) + np.sum(0.5 * y**2 / broad + 0.5 * np.log(broad))
    weights /= weights.sum()

    def moments(values):
        mean = np.sum(weights * values)
        return mean, np.sqrt(np.sum(weights * values**2) - mean**2)

    return moments(mu), moments(tau), log_z


def assert_is_the_group(result, y, noise=NOISE):
    """Means within .2 standard deviations, spreads within 15 %, beside the error of so many chains."""
    for name, (mean, deviation) in zip(("mu", "tau"), group(y, noise)[:2], strict=True):
        found, error = np.asarray(result[name], float), 3 / np.sqrt(len(result[name]))
        assert abs(found.mean() - mean) < (0.2 + error) * deviation, name
        assert abs(found.std() / deviation - 1) < (0.15 + error), name


class TestDensity:
    Y = np.array([0.3, -0.8, 1.9])

    def density(self):
        return cp.compile(study, POSTERIOR, PRIOR, means(self.Y))

    def test_the_site_is_noised_and_latents_get_the_score_of_its_noised_prior(self):
        density = self.density()
        assert {name: site.kind for name, site in density.sites.items()} == {
            "eta": "noised", "mu": "static", "tau": "static"
        }  # fmt: skip
        x, mu, u = jnp.array([0.4, -1.0, 0.7]), jnp.array(0.3), jnp.array(-0.2)
        for level in (0, 12, 29):
            alpha, sigma = (float(a[level]) for a in (LEVELS.alpha, LEVELS.sigma))

            def log_p(mu, u, x, alpha=alpha, sigma=sigma):
                variance = alpha**2 * jnp.exp(2 * u) + sigma**2
                prior = dist.Normal(0, 1).log_prob(mu) + dist.HalfNormal(1).log_prob(jnp.exp(u)) + u
                return prior + dist.Normal(alpha * mu, jnp.sqrt(variance)).log_prob(x).sum()

            def log_q(x, alpha=alpha, sigma=sigma):
                q = dist.Normal(alpha * means(self.Y), np.sqrt(alpha**2 * WIDTH**2 + sigma**2)).log_prob(x)
                return jnp.sum(q - dist.Normal(0, np.sqrt(alpha**2 * BROAD**2 + sigma**2)).log_prob(x))

            position = {"eta": x, "mu": mu, "tau": u}
            score = density.score(position, level)
            expected = jax.grad(log_p, (0, 1, 2))(mu, u, x)
            np.testing.assert_allclose(score["mu"], expected[0], rtol=2e-4, atol=1e-4)
            np.testing.assert_allclose(score["tau"], expected[1], rtol=2e-4, atol=1e-4)
            np.testing.assert_allclose(score["eta"], expected[2] + jax.grad(log_q)(x), rtol=2e-4, atol=1e-3)
            known = density.evaluator.log_known
            other = {"eta": x, "mu": mu + 0.5, "tau": u - 0.4}
            difference = known(other, level) - known(position, level)
            np.testing.assert_allclose(difference, log_p(mu + 0.5, u - 0.4, x) - log_p(mu, u, x), rtol=1e-3, atol=1e-3)

    def test_a_network_has_the_conditions_of_one_member(self):
        """One that does not broadcast over those of all."""

        def score(x, log_snr, m):
            assert jnp.shape(m) == (2,)
            alpha2 = jax.nn.sigmoid(log_snr)
            return -(x - jnp.sqrt(alpha2) * m.mean()) / (alpha2 * WIDTH**2 + jax.nn.sigmoid(-log_snr))

        pairs = means(self.Y)[:, None] + jnp.array([-0.5, 0.5])
        strict = cp.Diffusion(
            score, LEVELS, event_shape=(), parameterization="score", time="log_snr", conditions=("m",)
        )
        position = {"eta": jnp.array([0.4, -1.0, 0.7]), "mu": jnp.array(0.3), "tau": jnp.array(-0.2)}
        found = cp.compile(study, strict, PRIOR, pairs).score(position, 12)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, self.density().score(position, 12))

    def test_the_networks_of_a_plate_are_one_batch_whose_cost_is_linear(self):
        """A thousand members: what scatters each score over all of the site would be a million numbers."""
        density = cp.compile(study, POSTERIOR, PRIOR, means(np.zeros(1000)))
        position = {"eta": jnp.ones(1000), "mu": jnp.zeros(()), "tau": jnp.zeros(())}
        jaxpr = jax.make_jaxpr(lambda p: density.evaluator(p, 3).score)(position)
        sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
        assert max(sizes) < 50_000

    def test_the_compiled_transition_is_no_longer_for_a_thousand_members(self):
        """Members are rows of arrays: the program that is compiled has as many lines for 8 as for 1,000."""

        def lines(number):
            density = cp.compile(study, POSTERIOR, PRIOR, means(np.zeros(number)))
            layout, noise = Layout.of_density(density), density.schedule.at(3)
            transitions = Transitions.resolved(Interweaving(lambda schedule: schedule.sigma**2), 1, density)

            def step(key, v):
                particle = transitions.start(jax.random.key_data(key), v, layout.evaluate(density, v, 3, parts=False))
                return transitions.step(density, False, (transitions.untuned(1), noise), key, particle)[0].points

            text = jax.jit(step).lower(jax.random.key(0), jnp.zeros(number + 2)).as_text()
            return len(text.splitlines()), len(text)

        (few, small), (many, large) = lines(8), lines(1000)
        assert many == few
        assert large < 1.3 * small

    def test_several_pieces_multiply_and_a_name_does_for_the_site(self):
        @cp.program
        def twice(ms):
            mu = cp.sample("mu", dist.Normal(0.0, 1.0))
            with numpyro.plate("subjects", 3):
                eta = cp.sample("eta", dist.Normal(mu, 1.0))
                cp.factor("x", POSTERIOR.given(m=ms) / PRIOR, at="eta")
                cp.factor("y", POSTERIOR.given(m=-ms) / PRIOR, at=eta)

        @cp.program
        def once(ms):
            mu = cp.sample("mu", dist.Normal(0.0, 1.0))
            with numpyro.plate("subjects", 3):
                eta = cp.sample("eta", dist.Normal(mu, 1.0))
                cp.factor("x", POSTERIOR.given(m=ms) * POSTERIOR.given(m=-ms) / PRIOR**2, at=eta)

        position = {"eta": jnp.array([0.4, -1.0, 0.7]), "mu": jnp.array(0.3)}
        ms = means(self.Y)
        first, second = (cp.compile(program, ms).score(position, 7) for program in (twice, once))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), first, second)

    def test_conditions_without_the_plates_axis_are_those_of_all_members(self):
        shared = cp.compile(study_of_one, POSTERIOR, PRIOR, jnp.asarray(0.4))
        each = cp.compile(study, POSTERIOR, PRIOR, jnp.full(3, 0.4))
        position = {"eta": jnp.array([0.4, -1.0, 0.7]), "mu": jnp.array(0.3), "tau": jnp.array(0.1)}
        np.testing.assert_allclose(shared.score(position, 5)["eta"], each.score(position, 5)["eta"], rtol=1e-5)

    def test_evidence_may_look_at_a_site_with_a_factor_of_its_own(self):
        @cp.program
        def own():
            eta = cp.sample("eta", cp.Analytic(dist.Normal(0.0, 1.0), LEVELS))
            cp.factor("x", POSTERIOR.given(m=0.5) / PRIOR, at=eta)

        score = cp.compile(own).score({"eta": jnp.array(0.2)}, 0)["eta"]
        plain = cp.compile(
            cp.program(
                lambda: cp.sample("eta", cp.Analytic(dist.Normal(0.0, 1.0), LEVELS) * POSTERIOR.given(m=0.5) / PRIOR)
            )
        )
        np.testing.assert_allclose(score, plain.score({"eta": jnp.array(0.2)}, 0)["eta"], rtol=1e-5)


@cp.program
def study_of_one(posterior, prior, m):
    mu = cp.sample("mu", dist.Normal(0.0, 1.0))
    tau = cp.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("subjects", 3):
        eta = cp.sample("eta", dist.Normal(mu, tau))
        cp.factor("x", posterior.given(m=m) / prior, at=eta)


SESSIONS, SUBJECTS = 3, 4


class TestPlates:
    """Of evidence in plates the score is the sum over the members that count, each with its own condition."""

    LEVEL = 9
    Y = np.random.default_rng(2).normal(size=(SESSIONS, SUBJECTS))
    KEEP = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0]], bool)

    def score(self, body, name="eta"):
        """∇ log of π at the site less that of its prior N(0, 1), which every level has as it is."""
        density = cp.compile(cp.program(body))
        x = jnp.asarray(np.random.default_rng(4).normal(size=density.sites[name].shape), jnp.float32)
        return x, density.score({name: x}, self.LEVEL)[name] + x

    def of_members(self, x, m):
        """∇ log of q/p₀ at level `LEVEL`."""
        alpha, sigma = (float(a[self.LEVEL]) for a in (LEVELS.alpha, LEVELS.sigma))
        clear, broad = (alpha**2 * width**2 + sigma**2 for width in (WIDTH, BROAD))
        return -(x - alpha * np.asarray(m)) / clear + x / broad

    @pytest.mark.parametrize("block", [None, 2])
    def test_a_plate_that_the_site_does_not_stand_in_multiplies_and_a_mask_leaves_out(self, block):
        """Subjects with unequal numbers of trials."""

        def trials():
            with numpyro.plate("subjects", SUBJECTS):
                eta = cp.sample("eta", dist.Normal(0.0, 1.0))
                with numpyro.plate("trials", SESSIONS), numpyro.handlers.mask(mask=self.KEEP):
                    cp.factor("x", POSTERIOR.given(m=means(self.Y)) / PRIOR, at=eta, block=block)

        x, found = self.score(trials)
        expected = np.sum(self.KEEP * self.of_members(x, means(self.Y)), 0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    def test_one_site_under_a_plate_of_observations_is_the_product_over_them(self):
        ms = means(self.Y[0])

        def plate():
            eta = cp.sample("eta", dist.Normal(0.0, 1.0))
            with numpyro.plate("trials", SUBJECTS):
                cp.factor("x", POSTERIOR.given(m=ms) / PRIOR, at=eta)

        def product():
            eta = cp.sample("eta", dist.Normal(0.0, 1.0))
            cp.factor("x", cp.product(POSTERIOR / PRIOR, over={"m": ms}), at=eta)

        np.testing.assert_allclose(self.score(plate)[1], self.score(product)[1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "cut",
        [np.s_[:, :], np.s_[0], np.s_[:1], np.s_[:, :1], np.s_[0, 0]],
        ids=["each", "a subject's", "a subject's, with an axis", "a session's", "everyone's"],
    )
    def test_conditions_of_nested_plates(self, cut):
        ms = means(self.Y)[cut]

        def nested():
            with numpyro.plate("subjects", SUBJECTS), numpyro.plate("sessions", SESSIONS):
                eta = cp.sample("eta", dist.Normal(0.0, 1.0))
                cp.factor("x", POSTERIOR.given(m=ms) / PRIOR, at=eta)

        x, found = self.score(nested)
        np.testing.assert_allclose(found, self.of_members(x, ms), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("keep", [[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    def test_members_without_evidence_have_their_prior(self, keep):
        ms, keep = means(self.Y[0]), np.array(keep, bool)

        def masked():
            with numpyro.plate("subjects", SUBJECTS):
                eta = cp.sample("eta", dist.Normal(0.0, 1.0))
                with numpyro.handlers.mask(mask=keep):
                    cp.factor("x", POSTERIOR.given(m=ms) / PRIOR, at=eta)

        x, found = self.score(masked)
        np.testing.assert_allclose(found, keep * self.of_members(x, ms), rtol=1e-4, atol=1e-4)

    def test_a_scale_is_a_power(self):
        ms = means(self.Y[0])

        def scaled():
            with numpyro.plate("subjects", SUBJECTS):
                eta = cp.sample("eta", dist.Normal(0.0, 1.0))
                with numpyro.handlers.scale(scale=2.5):
                    cp.factor("x", POSTERIOR.given(m=ms) / PRIOR, at=eta)

        x, found = self.score(scaled)
        np.testing.assert_allclose(found, 2.5 * self.of_members(x, ms), rtol=1e-4, atol=1e-4)

    def test_a_block_bounds_what_is_evaluated_at_once(self):
        wide = cp.Diffusion(lambda x, t, m: jnp.tanh(jnp.ones(500) * x).sum() + m, LEVELS, event_shape=(),
                            parameterization="score", time="log_snr", conditions=("m",))  # fmt: skip

        def largest(block):
            def body():
                with numpyro.plate("subjects", 100):
                    eta = cp.sample("eta", dist.Normal(0.0, 1.0))
                    cp.factor("x", wide.given(m=jnp.zeros(100)), at=eta, block=block)

            density = cp.compile(cp.program(body))
            text = str(jax.make_jaxpr(lambda p: density.evaluator(p, 3).score)({"eta": jnp.ones(100)}))
            return max(int(rows) for rows in re.findall(r"f32\[(\d+),500\]", text))

        assert largest(None) == 100
        assert largest(8) <= 8

    @pytest.mark.parametrize(
        ("plates", "condition", "mask", "told"),
        [
            ((4, 3), (3,), None, r"shape \(3,\), in the plates 'plate 1' of 3, 'plate 0' of 4"),
            ((3, 4), (4, 2), None, r"its first axis is not where that plate's is[\s\S]*broadcast_to\(…, \(4, 3\)"),
            ((3, 3), (3, 1), None, r"several of them fit"),
            ((3,), (3,), (2, 3), r"stands in a mask with an axis of 2, where its site 'eta' has no plate"),
        ],
    )
    def test_axes_that_are_no_plates_are_refused(self, plates, condition, mask, told):
        def body():
            with contextlib.ExitStack() as stack:
                for i, size in enumerate(plates):
                    stack.enter_context(numpyro.plate(f"plate {i}", size))
                eta = cp.sample("eta", dist.Normal(0.0, 1.0))
                if mask is not None:
                    stack.enter_context(numpyro.handlers.mask(mask=np.ones(mask, bool)))
                cp.factor("x", POSTERIOR.given(m=jnp.zeros(condition)) / PRIOR, at=eta)

        with pytest.raises(ShapeError, match=told) as error:
            cp.compile(cp.program(body))
        assert "test_evidence.py:" in str(error.value)

    def test_plates_masks_and_scales_that_say_nothing_of_the_site_are_refused(self):
        def of(handler):
            def body():
                with numpyro.plate("subjects", 3):
                    eta = cp.sample("eta", dist.Normal(0.0, 1.0))
                with handler(eta):
                    cp.factor("x", POSTERIOR.given(m=0.5) / PRIOR, at=eta)

            return cp.compile(cp.program(body))

        with pytest.raises(ShapeError, match="in plate 'trials', where its site 'eta' has plate 'subjects', of size 3"):
            of(lambda eta: numpyro.plate("trials", 3))
        with pytest.raises(ProgramError, match=r"scaled by an array[\s\S]*one number"):
            of(lambda eta: numpyro.handlers.scale(scale=jnp.ones(3)))
        with pytest.raises(DoublyIntractableError, match="'x' at site 'eta' depends on"):
            of(lambda eta: numpyro.handlers.mask(mask=eta > 0))
        with pytest.raises(InvalidValueError, match="block must be at least 1"):
            cp.compile(cp.program(lambda: cp.factor("x", PRIOR, at="eta", block=0)))
        with pytest.raises(InvalidValueError, match="'w' is a log-weight, and block= "):
            cp.compile(cp.program(lambda: cp.factor("w", 0.0, block=2)))


class Interwoven:
    """`Interweaving` from exact draws of π_k, where evidence is exp(−x²/2) or a sum of such modes: its integral over x
    is known, so latents are drawn by rejection and members given them."""

    LEVEL = 10
    CHAINS = 4000
    LINE = bounded(CHAINS)
    WIDTHS = None
    ONE, TWO = np.array([[1.0, 0.0, 1.0]]), np.array([[0.6, -1.5, 0.4], [0.4, 1.5, 0.5]])
    """Weight, mean and standard deviation of modes."""

    site = "eta"

    def density(self, modes):
        weight, mean, sd = modes.T

        def score(x, t):
            return jax.grad(lambda x: jax.nn.logsumexp(jnp.log(weight / sd) - 0.5 * ((x - mean) / sd) ** 2))(x)

        flat = cp.Diffusion(score, LEVELS, event_shape=(), parameterization="score", time="log_snr")

        @cp.program
        def two():
            mu = cp.sample("mu", dist.Normal(0.5, 1.0))
            tau = cp.sample("tau", dist.LogNormal(0.0, 0.5))
            with numpyro.plate("subjects", 2):
                cp.sample(self.site, dist.Normal(mu, tau))
                cp.factor("x", flat, at=self.site)

        return cp.compile(two)

    def exact(self, density, number, modes):
        rng, noise = np.random.default_rng(3), density.schedule.at(self.LEVEL)
        alpha, sigma = float(noise.alpha), float(noise.sigma)
        mu, u = rng.normal(0.5, 1.0, 40 * number), rng.normal(0.0, 0.5, 40 * number)
        centre, variance = (a[:, None] for a in (alpha * mu, alpha**2 * np.exp(2 * u) + sigma**2))
        weight, mean, sd = modes.T
        each = weight * (variance + sd**2) ** -0.5 * np.exp(-0.5 * (centre - mean) ** 2 / (variance + sd**2))
        kept = np.flatnonzero(rng.random(len(mu)) < (each.sum(1) / (weight / sd).sum()) ** 2)[:number]
        assert len(kept) == number
        mu, u, centre, variance, each = mu[kept], u[kept], centre[kept], variance[kept], each[kept]
        which = (rng.random((number, 2, 1)) > np.cumsum(each / each.sum(1)[:, None], 1)[:, None, :-1]).sum(2)
        mean, sd = mean[which], sd[which]
        total = variance + sd**2
        x = (centre * sd**2 + mean * variance) / total + np.sqrt(variance * sd**2 / total) * rng.normal(
            size=(number, 2)
        )
        return np.concatenate([x / alpha, mu[:, None], u[:, None]], axis=1).astype(np.float32)

    def moved(self, modes=ONE, steps=12, line=LINE):
        density = self.density(modes)
        layout, noise = Layout.of_density(density), density.schedule.at(self.LEVEL)
        step = lambda schedule: 0.6 * min(modes[:, 2]) ** 2 + 0.0 * schedule.sigma
        kernel = Interweaving(step, log_ratio=line, widths=self.WIDTHS)
        transitions = Transitions.resolved(kernel, 1, density)
        start = jnp.asarray(self.exact(density, self.CHAINS, modes))

        def chain(v, key):
            found = layout.evaluate(density, v, self.LEVEL, parts=False)
            particle = transitions.start(jax.random.key_data(key), v, found)
            setting = transitions.untuned(self.CHAINS), noise

            def step(i, particle):
                return transitions.step(density, False, setting, jax.random.fold_in(key, i), particle)[0]

            return jax.lax.fori_loop(0, steps, step, particle).points

        keys = jax.random.split(jax.random.key(5), self.CHAINS)
        return np.asarray(start, float), np.asarray(jax.jit(jax.vmap(chain))(start, keys), float)

    @staticmethod
    def values(v):
        x, mu, u = v[:, :2].sum(1), v[:, 2], v[:, 3]
        return {"x": x, "mu": mu, "u": u, "x²": x**2, "mu²": mu**2, "u²": u**2, "x·mu": x * mu, "x²·u": x**2 * u}

    def expected(self, modes=ONE):
        return {n: a.mean() for n, a in self.values(self.exact(self.density(modes), 100_000, modes)).items()}


class TestKernel(Interwoven):
    def test_leaves_the_law_as_it_is_and_moves(self):
        """Blocks have sites by name: this one comes after those of latents, and before them in `TestPosterior`."""
        self.site = "zeta"
        start, after = self.moved()
        assert_agrees(z_scores(self.values(after), self.expected()))
        assert np.abs(np.corrcoef(start[:, 2], after[:, 2])[0, 1]) < 0.3
        assert np.abs(np.corrcoef(start[:, 3], after[:, 3])[0, 1]) < 0.3

    def test_without_the_change_of_coordinates_it_would_not(self, monkeypatch):
        monkeypatch.setattr(hierarchy, "_log_wider", lambda before, after: jnp.zeros(()))
        assert_disagrees(z_scores(self.values(self.moved()[1]), self.expected()))


class Joint(Interwoven):
    """Where joint moves alone move latents."""

    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch):
        monkeypatch.setattr(tuning, "LATENTS", tuning.LATENTS._replace(turns=0, joint=4, ratios=(0.5, 3.0)))


class TestWidths(Joint):
    """Joint moves about as far as the population is wide."""

    WIDTHS = jnp.array([1.0, 0.5])

    def test_leaves_the_law_as_it_is(self):
        assert_agrees(z_scores(self.values(self.moved()[1]), self.expected()))


class TestCorrelatedMembers(Joint):
    """Members of two numbers, whose correlation is a latent: it moves with ξ held, too."""

    def density(self, modes):
        flat = cp.Diffusion(lambda x, t: -x, LEVELS, event_shape=(2,), parameterization="score", time="log_snr")

        @cp.program
        def pairs():
            rho, tau = cp.sample("rho", dist.Uniform(-1.0, 1.0)), cp.sample("tau", dist.LogNormal(0.0, 0.5))
            with numpyro.plate("subjects", 2):
                covariance = tau**2 * jnp.array([[1.0, rho], [rho, 1.0]])
                cp.sample("eta", dist.MultivariateNormal(jnp.zeros(2), covariance))
                cp.factor("x", flat, at="eta")

        return cp.compile(pairs)

    def exact(self, density, number, modes):
        rng, noise = np.random.default_rng(3), density.schedule.at(self.LEVEL)
        alpha, sigma = float(noise.alpha), float(noise.sigma)
        rho, u = rng.uniform(-1, 1, 40 * number), rng.normal(0.0, 0.5, 40 * number)
        variances = alpha**2 * np.exp(2 * u)[:, None] * np.stack([1 + rho, 1 - rho], 1) + sigma**2  # of sum, difference
        kept = np.flatnonzero(rng.random(len(rho)) < 1 / (1 + variances).prod(1))[:number]
        assert len(kept) == number
        parts = np.sqrt(variances / (1 + variances))[kept, None] * rng.normal(size=(number, 2, 2))
        x = np.stack([parts.sum(2), parts[..., 0] - parts[..., 1]], 2) / np.sqrt(2)
        z = np.log((1 + rho) / (1 - rho))[kept, None]
        return np.concatenate([x.reshape(number, 4) / alpha, z, u[kept, None]], axis=1).astype(np.float32)

    @staticmethod
    def values(v):
        product, square, z, u = (v[:, :4:2] * v[:, 1:4:2]).sum(1), (v[:, :4] ** 2).sum(1), v[:, 4], v[:, 5]
        return {"x·x'": product, "x²": square, "z": z, "z²": z**2, "u": u, "u²": u**2, "x·x'·z": product * z}

    def test_leaves_the_law_as_it_is_and_moves(self):
        start, after = self.moved(steps=24)
        assert_agrees(z_scores(self.values(after), self.expected()))
        assert np.abs(np.corrcoef(start[:, 4], after[:, 4])[0, 1]) < 0.3

    def test_without_the_change_of_coordinates_it_would_not(self, monkeypatch):
        monkeypatch.setattr(hierarchy, "_log_wider", lambda before, after: jnp.zeros(()))
        assert_disagrees(z_scores(self.values(self.moved(steps=24)[1]), self.expected()))


class TestBetweenModes(Interwoven):
    def test_leaves_the_shares_of_modes_as_they_are(self):
        start, after = self.moved(self.TWO, 60)
        assert_agrees(z_scores(self.values(after), self.expected(self.TWO)))
        crossed = np.mean(start[:, :2] * after[:, :2] < 0)
        assert crossed > 0.05

    def test_integrals_that_nothing_bounds_would_not(self):
        moved = self.moved(self.TWO, 60, LineIntegral(3, "simpson"))[1]
        assert_disagrees(z_scores(self.values(moved), self.expected(self.TWO)))


def test_where_a_factor_is_the_prior_steps_are_as_long_as_was_asked():
    """What bounds them is the width of a prior given latents: x, of width 10, has none."""
    wide = gaussian(10.0, names=())

    @cp.program
    def measured():
        scale = cp.sample("scale", dist.LogNormal(5.0, 0.1))
        cp.observe("y", dist.Normal(cp.sample("x", wide), scale), 0.0)

    density = cp.compile(measured)
    layout, noise = Layout.of_density(density), density.schedule.at(0)
    transitions = Transitions.resolved(Interweaving(lambda schedule: 40.0 + 0.0 * schedule.sigma), 1, density)

    def chain(v, key):
        particle = transitions.start(jax.random.key_data(key), v, layout.evaluate(density, v, 0, parts=False))
        setting = transitions.untuned(100), noise
        return transitions.step(density, False, setting, key, particle)[0].points

    start = jnp.stack([10.0 * jax.random.normal(jax.random.key(0), (100,)), jnp.full((100,), 5.0)], axis=1)
    after = jax.jit(jax.vmap(chain))(start, jax.random.split(jax.random.key(1), 100))
    assert np.std(after[:, 0] - start[:, 0]) > 4


def drift(points, weighed):
    density = cp.compile(study, POSTERIOR, PRIOR, means(np.zeros(2)))
    return cp.WarmUp().drift([np.asarray(p, np.float32) for p in points], density, weighed)


def test_a_warm_up_goes_on_until_latents_have_forgotten_where_it_began():
    """Points of two members and two latents, of a population that has the same moments all the time."""
    start, before, after = np.random.default_rng(0).normal(size=(3, 2000, 4))
    assert drift((start, before, after), False) == 0
    assert drift((start, after, after), False) == 0  # what the last block alone left is no matter
    stuck = after.copy()
    stuck[:, 3] = 0.6 * start[:, 3] + 0.8 * after[:, 3]
    assert drift((start, before, stuck), False) == pytest.approx(0.6, abs=0.05)
    assert drift((start, before, stuck), True) == 0  # weighed chains began with the right law
    assert drift((start, before, after + 1), True) > 0.5


@pytest.mark.parametrize(("chains", "draws"), [(1_000, 1), (10_000, 4), (12, 20)])
def test_moves_err_less_than_what_is_left_to_chance(chains, draws):
    """The tolerance of a default run's moves, and of the rounds that close it, is 1/√n nats at n samples."""
    density = cp.compile(study, POSTERIOR, PRIOR, means(np.zeros(2)))
    kernel = choose(density, chains, draws)[0].kernel
    (closing,) = cp.WarmUp().adapt(np.random.default_rng(0).normal(size=(chains, 4)), density).kernel.kernels
    assert kernel.log_ratio.tolerance == pytest.approx((chains * draws) ** -0.5)
    assert closing.log_ratio.tolerance == pytest.approx(min(0.1, chains**-0.5))


def test_a_warm_up_counts_what_its_kernel_evaluates():
    density = cp.compile(study, POSTERIOR, PRIOR, means(np.zeros(2)))
    made = tuning.WARM_UP.settling + tuning.WARM_UP.transitions
    kernel = Transitions.resolved(Interweaving(), 1, density)
    assert cp.WarmUp().evaluations(kernel) == made * 9  # 4 nodes twice, and where that led


class TestPosterior:
    @pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 8])
    def test_group_by_the_default_call(self, number):
        y = np.random.default_rng(number).normal(0.7, 0.7, number)
        density = cp.compile(study, POSTERIOR, PRIOR, means(y))
        result = cp.infer(density, jax.random.key(number), num_chains=400, progress=False)
        assert result.status.ok
        assert "Interweaving" in result.about.sampler
        assert_is_the_group(result, y)
        assert abs(result.log_evidence - group(y)[2]) < 4 * result.log_evidence_error < 1
        rng = np.random.default_rng(0)
        prior = {"mu": rng.normal(size=400), "tau": abs(rng.normal(size=400))}
        with pytest.raises(AssertionError):  # a group at its prior is found out
            assert_is_the_group(prior, y)

    @pytest.mark.slow
    def test_precise_data_and_a_wide_group(self):
        """Long moves of a scale meet scores so steep that Simpson's rule is off by many nats."""
        y = np.random.default_rng(5).normal(0.7, 1.0, 8)
        width = (BROAD**-2 + 0.1**-2) ** -0.5
        density = cp.compile(study, gaussian(width), PRIOR, jnp.asarray(width**2 / 0.1**2 * y, jnp.float32))
        result = cp.infer(density, jax.random.key(5), num_chains=500, progress=False)
        assert result.status.ok
        assert_is_the_group(result, y, noise=0.1)

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [200, 1000])
    def test_many_members(self, number):
        y = np.random.default_rng(number).normal(0.7, 0.7, number)
        density = cp.compile(study, POSTERIOR, PRIOR, means(y))
        result = cp.infer(density, jax.random.key(number), num_chains=200, progress=False)
        assert result.status.ok
        assert_is_the_group(result, y)


class TestRefusals:
    def test_a_product_of_which_some_factors_depend_on_a_latent(self):
        @cp.program
        def ambiguous(conditional):
            mu = cp.sample("mu", dist.Normal(0.0, 1.0))
            prior = cp.Analytic(dist.Normal(mu, 1.0), LEVELS)
            cp.sample("eta", prior * POSTERIOR.given(m=0.5) / PRIOR, conditional=conditional)

        with pytest.raises(ProgramError, match=r"'eta' some factors.*'mu'[\s\S]*cp.factor[\s\S]*conditional=True"):
            cp.compile(ambiguous, False)
        assert cp.compile(ambiguous, True).sites["mu"].kind == "held"

    def test_evidence_that_depends_on_a_latent(self):
        @cp.program
        def intractable():
            mu = cp.sample("mu", dist.Normal(0.0, 1.0))
            eta = cp.sample("eta", dist.Normal(mu, 1.0))
            cp.factor("x", POSTERIOR.given(m=mu) / PRIOR, at=eta)

        refused(lambda: cp.compile(intractable), DoublyIntractableError, r"'x' at site 'eta' depends on.*'mu'")

    def test_a_prior_without_a_noised_density_says_what_has_one(self):
        @cp.program
        def circular():
            eta = cp.sample("eta", dist.VonMises(0.0, 1.0))
            cp.factor("x", POSTERIOR.given(m=0.5) / PRIOR, at=eta)

        refused(lambda: cp.compile(circular), ProgramError, r"'eta'.*VonMises[\s\S]*MultivariateNormal")

    def test_shapes_places_and_policies(self):
        half = POSTERIOR.given(m=0.5)

        def of(at=None, factor=half, anneal=None):
            def body():
                eta = cp.sample("eta", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
                cp.factor("x", factor, anneal, at=eta if at is None else at)

            return cp.compile(cp.program(body))

        refused(of, ShapeError, "events of shape")
        refused(lambda: of(at="theta"), ProgramError, "looks at no site")
        refused(lambda: of(factor=1.0), WrongTypeError, "needs a factor")
        with pytest.raises(InvalidValueError, match="leave anneal= out"):
            of(factor=gaussian(1.0, (2,)).given(m=0.5), anneal="denoised")
        refused(lambda: cp.compile(cp.program(lambda: cp.factor("x", PRIOR))), WrongTypeError, "at= does not say")
