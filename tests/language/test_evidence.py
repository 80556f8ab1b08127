"""Evidence at a site: a factor that multiplies the density where a site keeps a prior
of its own."""

import contextlib
import functools
import re
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.errors import (
    DoublyIntractableError,
    InvalidValueError,
    ProgramError,
    ShapeError,
    WrongTypeError,
)
from composeprob.kernels.line_integral import LineIntegral, bounded
from composeprob.samplers import hierarchy
from composeprob.samplers.choose import choose
from composeprob.samplers.finishers import Trail
from composeprob.samplers.hierarchy import Interweaving
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Transitions
from refusals import refused, rows
from sampling_cases import learned, single, slow
from zscores import assert_agrees, assert_disagrees, z_scores

LEVELS = cp.Schedule.log_snr(30)
BROAD, NOISE = 3.0, 0.5
"""Standard deviations of the prior that estimators were trained under, and of a
subject's data."""
WIDTH = float((BROAD**-2 + NOISE**-2) ** -0.5)


def gaussian(width, shape=(), names=("m",)):
    """A network that gives the score of the noised N(m, width²) alone."""

    def score(x, log_snr, m=0.0):
        alpha2 = jax.nn.sigmoid(log_snr)
        variance = alpha2 * width**2 + jax.nn.sigmoid(-log_snr)
        return -(x - jnp.sqrt(alpha2) * m) / variance

    return learned(score, "score", LEVELS, shape, conditions=names)


POSTERIOR = gaussian(WIDTH)
PRIOR = gaussian(BROAD, names=())


def means(y):
    """The estimator's condition for data y: the mean of its posterior."""
    return jnp.asarray(WIDTH**2 / NOISE**2 * np.asarray(y), jnp.float32)


@cp.program
def study(posterior, prior, ms, number=None):
    mu = cp.sample("mu", dist.Normal(0.0, 1.0))
    tau = cp.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("subjects", number or len(ms)):
        eta = cp.sample("eta", dist.Normal(mu, tau))
        cp.factor("x", posterior.given(m=ms) / prior, at=eta)


def studied(ms, number=None, posterior=POSTERIOR):
    return cp.compile(study, posterior, PRIOR, ms, number)


HALF = POSTERIOR.given(m=0.5) / PRIOR
STANDARD = dist.Normal(0.0, 1.0)


def evidence_at(
    plates=(),
    handlers=(),
    evidence=HALF,
    prior=STANDARD,
    anneal=None,
    at=None,
    closed=False,
    block=None,
):
    """One site in plates of (name, size), with evidence about it under handlers, which
    are functions of its value: in these plates, or after they are closed."""
    with contextlib.ExitStack() as stack:
        for name, size in plates:
            stack.enter_context(numpyro.plate(name, size))
        eta = cp.sample("eta", prior)
        if closed:
            stack.close()
        for handler in handlers:
            stack.enter_context(handler(eta))
        site = eta if at is None else at
        cp.factor("x", evidence, anneal, at=site, block=block)


def member(*args, **options):
    return cp.compile(cp.program(lambda: evidence_at(*args, **options)))


def stepped(density, level, kernel, chains, steps=1):
    """A chain's point after transitions of a kernel at a level, as a function of its
    point before and of a key."""
    layout = Layout.of_density(density)
    transitions = Transitions.resolved(kernel, 1, density)
    setting = (transitions.untuned(chains), density.schedule.at(level))

    def chain(v, key):
        evaluation = layout.evaluate(density, v, level, terms=False)
        particle = transitions.start(jax.random.key_data(key), v, evaluation)

        def step(i, particle):
            key_of_step = jax.random.fold_in(key, i)
            moved = transitions.step(density, False, setting, key_of_step, particle)
            return moved[0]

        return jax.lax.fori_loop(0, steps, step, particle).position

    return chain


def group(y, noise=NOISE):
    """Mean and standard deviation of mu and tau given data, and the log-evidence, by
    quadrature."""
    axes = np.linspace(-4, 4, 801), np.linspace(1e-3, 4, 1600)
    mu, tau = np.meshgrid(*axes, indexing="ij")
    variance = tau**2 + noise**2
    log_p = -0.5 * (mu**2 + tau**2) - 0.5 * len(y) * np.log(variance)
    log_p -= 0.5 * sum((value - mu) ** 2 for value in y) / variance
    weights = np.exp(log_p - log_p.max())
    cell = 0.01 * (4 - 1e-3) / 1599 / np.pi  # p(mu)·p(tau) = exp(−…)/π
    broad = BROAD**2 + noise**2
    log_z = log_p.max() + np.log(weights.sum() * cell)
    log_z += np.sum(0.5 * y**2 / broad + 0.5 * np.log(broad))
    weights /= weights.sum()

    def moments(values):
        mean = np.sum(weights * values)
        return mean, np.sqrt(np.sum(weights * values**2) - mean**2)

    return moments(mu), moments(tau), log_z


def assert_is_the_group(result, y, noise=NOISE):
    """Means within .2 standard deviations, spreads within 15 %, beside the error of so
    many chains."""
    for name, (mean, deviation) in zip(("mu", "tau"), group(y, noise)[:2], strict=True):
        samples = np.asarray(result[name], float)
        error = 3 / np.sqrt(len(samples))
        assert abs(samples.mean() - mean) < (0.2 + error) * deviation, name
        assert abs(samples.std() / deviation - 1) < (0.15 + error), name


POSITION = {
    "eta": jnp.array([0.4, -1.0, 0.7]),
    "mu": jnp.array(0.3),
    "tau": jnp.array(-0.2),
}


class TestDensity:
    Y = np.array([0.3, -0.8, 1.9])

    def test_the_site_is_noised_and_latents_get_the_score_of_its_noised_prior(self):
        density = studied(means(self.Y))
        kinds = {name: site.kind for name, site in density.sites.items()}
        assert kinds == {"eta": "noised", "mu": "static", "tau": "static"}
        x, mu, u = POSITION.values()
        for level in (0, 12, 29):
            alpha, sigma = (float(a[level]) for a in (LEVELS.alpha, LEVELS.sigma))

            def log_p(mu, u, x, alpha=alpha, sigma=sigma):
                spread = jnp.sqrt(alpha**2 * jnp.exp(2 * u) + sigma**2)
                of_tau = dist.HalfNormal(1).log_prob(jnp.exp(u)) + u
                prior = dist.Normal(0, 1).log_prob(mu) + of_tau
                return prior + dist.Normal(alpha * mu, spread).log_prob(x).sum()

            def log_q(x, alpha=alpha, sigma=sigma):
                """log of the posteriors over the prior that they were trained under."""
                narrow = np.sqrt(alpha**2 * WIDTH**2 + sigma**2)
                broad = np.sqrt(alpha**2 * BROAD**2 + sigma**2)
                q = dist.Normal(alpha * means(self.Y), narrow).log_prob(x)
                return jnp.sum(q - dist.Normal(0, broad).log_prob(x))

            score = density.score(POSITION, level)
            expected = jax.grad(log_p, (0, 1, 2))(mu, u, x)
            np.testing.assert_allclose(score["mu"], expected[0], rtol=2e-4, atol=1e-4)
            np.testing.assert_allclose(score["tau"], expected[1], rtol=2e-4, atol=1e-4)
            of_eta = expected[2] + jax.grad(log_q)(x)
            np.testing.assert_allclose(score["eta"], of_eta, rtol=2e-4, atol=1e-3)
            closed_form = density.evaluator.log_closed_form
            other = {"eta": x, "mu": mu + 0.5, "tau": u - 0.4}
            difference = closed_form(other, level) - closed_form(POSITION, level)
            exact = log_p(mu + 0.5, u - 0.4, x) - log_p(mu, u, x)
            np.testing.assert_allclose(difference, exact, rtol=1e-3, atol=1e-3)

    def test_a_network_has_the_conditions_of_one_member(self):
        """A network that does not broadcast over the conditions of all."""

        def score(x, log_snr, m):
            assert jnp.shape(m) == (2,)
            alpha2 = jax.nn.sigmoid(log_snr)
            variance = alpha2 * WIDTH**2 + jax.nn.sigmoid(-log_snr)
            return -(x - jnp.sqrt(alpha2) * m.mean()) / variance

        pairs = means(self.Y)[:, None] + jnp.array([-0.5, 0.5])
        strict = learned(score, "score", LEVELS, (), conditions=("m",))
        of_pairs = studied(pairs, posterior=strict).score(POSITION, 12)
        expected = studied(means(self.Y)).score(POSITION, 12)
        close = partial(np.testing.assert_allclose, rtol=1e-5)
        jax.tree.map(close, of_pairs, expected)

    def test_many_members_cost_what_is_linear_and_compile_as_few(self):
        """Scores that were each spread over all of the site would be 90,000 numbers.
        Members are rows of arrays: a transition has as many lines for 8 as for 300."""
        density = studied(means(np.zeros(300)))
        position = {"eta": jnp.ones(300), "mu": jnp.zeros(()), "tau": jnp.zeros(())}
        jaxpr = jax.make_jaxpr(lambda p: density.evaluator(p, 3).score)(position)
        assert max(var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars) < 20_000

        def size(density, number):
            """Lines and characters of a compiled transition."""
            kernel = Interweaving(lambda schedule: schedule.sigma**2)
            chain = jax.jit(stepped(density, 3, kernel, 1))
            text = chain.lower(jnp.zeros(number + 2), jax.random.key(0)).as_text()
            return len(text.splitlines()), len(text)

        lines, characters = size(studied(means(np.zeros(8))), 8)
        lines_of_many, characters_of_many = size(density, 300)
        assert lines_of_many == lines
        assert characters_of_many < 1.3 * characters

    def test_several_pieces_multiply_and_a_name_does_for_the_site(self):
        @cp.program
        def pieces(ms, together):
            mu = cp.sample("mu", dist.Normal(0.0, 1.0))
            p = POSTERIOR.given(m=ms)
            q = POSTERIOR.given(m=-ms)
            with numpyro.plate("subjects", 3):
                eta = cp.sample("eta", dist.Normal(mu, 1.0))
                if together:
                    cp.factor("x", p * q / PRIOR**2, at="eta")
                else:
                    cp.factor("x", p / PRIOR, at="eta")
                    cp.factor("y", q / PRIOR, at=eta)

        position = {name: POSITION[name] for name in ("eta", "mu")}
        separate = cp.compile(pieces, means(self.Y), False).score(position, 7)
        together = cp.compile(pieces, means(self.Y), True).score(position, 7)
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, separate, together)

    def test_evidence_may_look_at_a_site_with_a_factor_of_its_own(self):
        factor = cp.Analytic(STANDARD, LEVELS)
        x = jnp.array(0.2)
        score = member(prior=factor).score({"eta": x}, 0)["eta"]
        product = cp.compile(single, factor * HALF).score({"x": x}, 0)["x"]
        np.testing.assert_allclose(score, product, rtol=1e-5)


def masked(keep):
    return lambda eta: numpyro.handlers.mask(mask=np.array(keep, bool))


def scaled(scale):
    return lambda eta: numpyro.handlers.scale(scale=scale)


def plate(name, size):
    return lambda eta: numpyro.plate(name, size)


class TestPlates:
    """The score of evidence in plates is the sum over the members that count, each with
    its own condition."""

    LEVEL = 9
    M = means(np.random.default_rng(2).normal(size=(3, 4)))
    KEEP = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0]])
    SUBJECTS = (("subjects", 4),)
    NESTED = (*SUBJECTS, ("sessions", 3))
    TRIALS = (SUBJECTS, [plate("trials", 3), masked(KEEP)], M, KEEP)
    # Plates of the site, handlers of its evidence, conditions, the multiplicity of each
    # score, and the size of blocks.
    CASES: ClassVar = {
        "a condition each": (NESTED, [], M, 1.0),
        "a subject's": (NESTED, [], M[0], 1.0),
        "a subject's, with an axis": (NESTED, [], M[:1], 1.0),
        "a session's": (NESTED, [], M[:, :1], 1.0),
        "everyone's": (NESTED, [], M[0, 0], 1.0),
        "a plate without the site, and unequal numbers of trials": TRIALS,
        "the same in blocks": (*TRIALS, 2),
        "one site under a plate of observations": ((), [plate("trials", 4)], M[0], 1.0),
        "the product over data": ((), [], M[0], 1.0),
        "members without evidence": (
            SUBJECTS,
            [masked([1, 0, 1, 1])],
            M[0],
            np.array([1, 0, 1, 1]),
        ),
        "one member with evidence": (
            SUBJECTS,
            [masked([0, 1, 0, 0])],
            M[0],
            np.array([0, 1, 0, 0]),
        ),
        "no evidence at all": (SUBJECTS, [masked([0, 0, 0, 0])], M[0], 0.0),
        "a scale is a power": (SUBJECTS, [scaled(2.5)], M[0], 2.5),
    }

    def test_scores(self):
        """∇ log of π at the site less that of its prior N(0, 1), which every level has
        as it is, is Σ ∇ log of q/p₀."""

        @cp.program
        def every_case():
            for name, (plates, handlers, m, _, *blocks) in self.CASES.items():
                q = POSTERIOR.given(m=m) / PRIOR
                if "over data" in name:
                    q = cp.product(POSTERIOR / PRIOR, over={"m": m})
                block = blocks[0] if blocks else None
                with numpyro.handlers.scope(prefix=name):
                    evidence_at(plates, handlers, q, block=block)

        density = cp.compile(every_case)
        rng = np.random.default_rng(4)
        x = {
            site: jnp.asarray(rng.normal(size=s.shape), jnp.float32)
            for site, s in density.sites.items()
        }
        score = density.score(x, self.LEVEL)
        alpha, sigma = (float(a[self.LEVEL]) for a in (LEVELS.alpha, LEVELS.sigma))
        narrow, broad = (alpha**2 * width**2 + sigma**2 for width in (WIDTH, BROAD))
        for name, (_, _, m, counts, *_) in self.CASES.items():
            site = f"{name}/eta"
            at = x[site]
            of_members = counts * (at / broad - (at - alpha * np.asarray(m)) / narrow)
            plates = tuple(range(of_members.ndim - at.ndim))
            expected = of_members.sum(plates) - at
            np.testing.assert_allclose(
                score[site], expected, rtol=1e-4, atol=1e-4, err_msg=name
            )

    def test_a_block_bounds_what_is_evaluated_at_once(self):
        def network(x, t, m):
            return jnp.tanh(jnp.ones(500) * x).sum() + m

        wide = learned(network, "score", LEVELS, (), conditions=("m",))
        x = {"eta": jnp.ones(100)}

        def largest(block):
            evidence = wide.given(m=jnp.zeros(100))
            density = member([("subjects", 100)], evidence=evidence, block=block)
            jaxpr = jax.make_jaxpr(lambda p: density.evaluator(p, 3).score)(x)
            rows = re.findall(r"f32\[(\d+),500\]", str(jaxpr))
            return max(int(number) for number in rows)

        assert largest(None) == 100
        assert largest(8) <= 8


LEVEL, CHAINS = 10, 4000
ALPHA, SIGMA = float(LEVELS.alpha[LEVEL]), float(LEVELS.sigma[LEVEL])


class Interwoven:
    """`Interweaving` from exact draws of π_k, where evidence is exp(−x²/2) or a sum of
    such modes: its integral over x is known, so latents are drawn by rejection and
    members given them."""

    MODES = np.array([[1.0, 0.0, 1.0]])
    """Weight, mean and standard deviation of each."""

    site = "eta"

    def density(self):
        weight, mean, sd = self.MODES.T

        def log_evidence(x):
            return jax.nn.logsumexp(jnp.log(weight / sd) - 0.5 * ((x - mean) / sd) ** 2)

        flat = learned(lambda x, t: jax.grad(log_evidence)(x), "score", LEVELS, ())

        @cp.program
        def two():
            mu = cp.sample("mu", dist.Normal(0.5, 1.0))
            tau = cp.sample("tau", dist.LogNormal(0.0, 0.5))
            with numpyro.plate("subjects", 2):
                cp.sample(self.site, dist.Normal(mu, tau))
                cp.factor("x", flat, at=self.site)

        return cp.compile(two)

    @classmethod
    def exact(cls, number):
        rng = np.random.default_rng(3)
        mu, u = rng.normal(0.5, 1.0, 40 * number), rng.normal(0.0, 0.5, 40 * number)
        centre = (ALPHA * mu)[:, None]
        variance = (ALPHA**2 * np.exp(2 * u) + SIGMA**2)[:, None]
        weight, mean, sd = cls.MODES.T
        total = variance + sd**2
        of_modes = weight * total**-0.5 * np.exp(-0.5 * (centre - mean) ** 2 / total)
        # Latents by rejection: two members accept with the evidence's integral each.
        acceptance = (of_modes.sum(1) / (weight / sd).sum()) ** 2
        kept = np.flatnonzero(rng.random(len(mu)) < acceptance)[:number]
        assert len(kept) == number
        mu, u = mu[kept], u[kept]
        centre, variance = centre[kept], variance[kept]
        # Each member's mode, then its value in that.
        shares = of_modes[kept] / of_modes[kept].sum(1)[:, None]
        below = np.cumsum(shares, 1)[:, None, :-1]
        mode = (rng.random((number, 2, 1)) > below).sum(2)
        mean, sd = mean[mode], sd[mode]
        total = variance + sd**2
        x = (centre * sd**2 + mean * variance) / total
        x += np.sqrt(variance * sd**2 / total) * rng.normal(size=(number, 2))
        columns = [x / ALPHA, mu[:, None], u[:, None]]
        return np.concatenate(columns, axis=1).astype(np.float32)

    def moved(self, steps=12, line=None, widths=None):
        def step_size(schedule):
            return 0.6 * min(self.MODES[:, 2]) ** 2 + 0.0 * schedule.sigma

        log_ratio = line or bounded(CHAINS)
        kernel = Interweaving(step_size, log_ratio=log_ratio, widths=widths)
        start = jnp.asarray(self.exact(CHAINS))
        chain = stepped(self.density(), LEVEL, kernel, CHAINS, steps)
        keys = jax.random.split(jax.random.key(5), CHAINS)
        after = jax.jit(jax.vmap(chain))(start, keys)
        return np.asarray(start, float), np.asarray(after, float)

    @staticmethod
    def values(v):
        x = v[:, :2].sum(1)
        mu, u = v[:, 2], v[:, 3]
        return {
            "x": x,
            "mu": mu,
            "u": u,
            "x²": x**2,
            "mu²": mu**2,
            "u²": u**2,
            "x·mu": x * mu,
            "x²·u": x**2 * u,
        }

    @classmethod
    @functools.cache
    def expected(cls):
        exact = cls.values(cls.exact(100_000))
        return {name: values.mean() for name, values in exact.items()}


class TestKernel(Interwoven):
    def test_leaves_the_law_as_it_is_and_moves(self):
        """Blocks have sites by name: this one comes after those of latents, and before
        them in `TestPosterior`."""
        self.site = "zeta"
        start, after = self.moved()
        assert_agrees(z_scores(self.values(after), self.expected()))
        assert np.abs(np.corrcoef(start[:, 2], after[:, 2])[0, 1]) < 0.3
        assert np.abs(np.corrcoef(start[:, 3], after[:, 3])[0, 1]) < 0.3

    def test_without_the_change_of_coordinates_it_would_not(self, monkeypatch):
        monkeypatch.setattr(
            hierarchy, "_log_volume_change", lambda before, after: jnp.zeros(())
        )
        assert_disagrees(z_scores(self.values(self.moved()[1]), self.expected()))


class TestAlone(Interwoven):
    """Latents moved by one kind of move alone; by joint moves about as far as the
    population is wide."""

    @pytest.mark.parametrize(
        ("turns", "singles", "joint", "widths"),
        [
            (6, 0, 0, None),
            # Joint moves alone are those of `TestCorrelatedMembers` too.
            slow(0, 0, 4, (1.0, 0.5)),
            slow(0, 6, 0, None),
            slow(3, 3, 0, None),
        ],
    )
    def test_leaves_the_law_as_it_is(self, monkeypatch, turns, singles, joint, widths):
        moves = tuning.LATENTS._replace(
            turns=turns, singles=singles, joint=joint, ratios=(0.5, 3.0)
        )
        monkeypatch.setattr(tuning, "LATENTS", moves)
        if widths is not None:
            widths = jnp.array(widths)
        _, after = self.moved(widths=widths)
        assert_agrees(z_scores(self.values(after), self.expected()))


class TestCorrelatedMembers(Interwoven):
    """Members of two numbers, whose correlation is a latent: it moves with ξ held, too,
    here by joint moves alone."""

    @pytest.fixture(autouse=True)
    def _jointly(self, monkeypatch):
        monkeypatch.setattr(
            tuning,
            "LATENTS",
            tuning.LATENTS._replace(turns=0, singles=0, joint=4, ratios=(0.5, 3.0)),
        )

    def density(self):
        flat = learned(lambda x, t: -x, "score", LEVELS)

        @cp.program
        def pairs():
            rho = cp.sample("rho", dist.Uniform(-1.0, 1.0))
            tau = cp.sample("tau", dist.LogNormal(0.0, 0.5))
            with numpyro.plate("subjects", 2):
                covariance = tau**2 * jnp.array([[1.0, rho], [rho, 1.0]])
                cp.sample("eta", dist.MultivariateNormal(jnp.zeros(2), covariance))
                cp.factor("x", flat, at="eta")

        return cp.compile(pairs)

    @classmethod
    def exact(cls, number):
        rng = np.random.default_rng(3)
        rho = rng.uniform(-1, 1, 40 * number)
        u = rng.normal(0.0, 0.5, 40 * number)
        # Of sum and difference, which are independent.
        clean = np.exp(2 * u)[:, None] * np.stack([1 + rho, 1 - rho], 1)
        variances = ALPHA**2 * clean + SIGMA**2
        acceptance = 1 / (1 + variances).prod(1)
        kept = np.flatnonzero(rng.random(len(rho)) < acceptance)[:number]
        assert len(kept) == number
        spreads = np.sqrt(variances / (1 + variances))[kept, None]
        rotated = spreads * rng.normal(size=(number, 2, 2))
        differences = rotated[..., 0] - rotated[..., 1]
        x = np.stack([rotated.sum(2), differences], 2) / np.sqrt(2)
        z = np.log((1 + rho) / (1 - rho))[kept, None]
        columns = [x.reshape(number, 4) / ALPHA, z, u[kept, None]]
        return np.concatenate(columns, axis=1).astype(np.float32)

    @staticmethod
    def values(v):
        product = (v[:, :4:2] * v[:, 1:4:2]).sum(1)
        square = (v[:, :4] ** 2).sum(1)
        z, u = v[:, 4], v[:, 5]
        return {
            "x·x'": product,
            "x²": square,
            "z": z,
            "z²": z**2,
            "u": u,
            "u²": u**2,
            "x·x'·z": product * z,
        }

    def test_leaves_the_law_as_it_is_and_moves(self):
        start, after = self.moved(steps=24)
        assert_agrees(z_scores(self.values(after), self.expected()))
        assert np.abs(np.corrcoef(start[:, 4], after[:, 4])[0, 1]) < 0.3

    @pytest.mark.slow
    def test_without_the_change_of_coordinates_it_would_not(self, monkeypatch):
        monkeypatch.setattr(
            hierarchy, "_log_volume_change", lambda before, after: jnp.zeros(())
        )
        _, after = self.moved(steps=24)
        assert_disagrees(z_scores(self.values(after), self.expected()))


class TestNested(Interwoven):
    """Latents in three layers: a scale places a mean, both place those of two subjects,
    log-normal ones, and these with another scale their one session each."""

    def density(self):
        flat = learned(lambda x, t: -x, "score", LEVELS, ())

        @cp.program
        def layers():
            tau = cp.sample("tau", dist.LogNormal(0.0, 0.5))
            omega = cp.sample("omega", dist.LogNormal(-0.5, 0.5))
            mean = cp.sample("mean", dist.Normal(0.0, tau))
            with numpyro.plate("subjects", 2):
                size = cp.sample("size", dist.LogNormal(mean, tau))
                cp.sample("eta", dist.Normal(jnp.log(size), omega))
                cp.factor("x", flat, at="eta")

        return cp.compile(layers)

    @classmethod
    def exact(cls, number):
        """Given the scales (mean, log size, x) = A·ξ with ξ normal, of precision I +
        AₓᵀAₓ given the evidence."""
        rng = np.random.default_rng(3)
        omega, tau = rng.normal([[-0.5], [0.0]], 0.5, (2, 40 * number))
        rows = np.array(
            [
                [1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 0, 1, 0, 0],
                [ALPHA, ALPHA, 0, 0, 0],
                [ALPHA, 0, ALPHA, 0, 0],
            ]
        )
        variance = ALPHA**2 * np.exp(2 * omega) + SIGMA**2
        # det(I + AₓᵀAₓ) = det(I + AₓAₓᵀ), of two rows.
        shared = ALPHA**2 * np.exp(2 * tau)
        own = 1 + 2 * shared + variance
        acceptance = (own**2 - shared**2) ** -0.5
        kept = np.flatnonzero(rng.random(len(tau)) < acceptance)[:number]
        assert len(kept) == number
        spread = np.sqrt(variance[kept])
        of_sessions = spread[:, None, None] * np.diag([0, 0, 0, 1, 1])
        a = np.exp(tau[kept])[:, None, None] * rows + of_sessions
        precision = np.eye(5) + a[:, 3:].swapaxes(1, 2) @ a[:, 3:]
        upper = np.linalg.cholesky(precision).swapaxes(1, 2)
        xi = np.linalg.solve(upper, rng.normal(size=(number, 5, 1)))
        mean, *size, x, other = (a @ xi)[..., 0].T
        columns = (x / ALPHA, other / ALPHA, mean, omega[kept], *size, tau[kept])
        return np.stack(columns, axis=1).astype(np.float32)

    @staticmethod
    def values(v):
        x = v[:, :2]
        size = v[:, 4:6]
        mean, omega, tau = v[:, 2], v[:, 3], v[:, 6]
        return {
            "mean²": mean**2,
            "omega": omega,
            "omega²": omega**2,
            "tau": tau,
            "tau²": tau**2,
            "x²": (x**2).sum(1),
            "size²": (size**2).sum(1),
            "size·mean": size.sum(1) * mean,
            "x·size": (x * size).sum(1),
            "size²·tau": (size**2).sum(1) * tau,
            "x²·omega": (x**2).sum(1) * omega,
        }

    @pytest.mark.parametrize(("singles", "joint"), [(4, 2), slow(8, 0), slow(0, 4)])
    def test_leaves_the_law_as_it_is_and_moves(self, monkeypatch, singles, joint):
        monkeypatch.setattr(
            tuning,
            "LATENTS",
            tuning.LATENTS._replace(turns=0, singles=singles, joint=joint),
        )
        start, after = self.moved()
        assert_agrees(z_scores(self.values(after), self.expected()))
        assert np.abs(np.corrcoef(start[:, 6], after[:, 6])[0, 1]) < 0.5

    def test_without_the_change_of_coordinates_it_would_not(self, monkeypatch):
        monkeypatch.setattr(
            tuning, "LATENTS", tuning.LATENTS._replace(turns=0, joint=0)
        )
        monkeypatch.setattr(
            hierarchy, "_log_volume_change", lambda before, after: jnp.zeros(())
        )
        assert_disagrees(z_scores(self.values(self.moved()[1]), self.expected()))


class TestBetweenModes(Interwoven):
    MODES = np.array([[0.6, -1.5, 0.4], [0.4, 1.5, 0.5]])

    def test_leaves_the_shares_of_modes_as_they_are(self):
        start, after = self.moved(60)
        assert_agrees(z_scores(self.values(after), self.expected()))
        crossed = np.mean(start[:, :2] * after[:, :2] < 0)
        assert crossed > 0.05

    def test_integrals_that_nothing_bounds_would_not(self):
        _, after = self.moved(60, LineIntegral(3, "simpson"))
        assert_disagrees(z_scores(self.values(after), self.expected()))


def test_where_a_factor_is_the_prior_steps_are_as_long_as_was_asked():
    """The width of a prior given latents bounds them: x, of width 10, has no such
    prior."""
    wide = gaussian(10.0, names=())

    @cp.program
    def measured():
        scale = cp.sample("scale", dist.LogNormal(5.0, 0.1))
        cp.observe("y", dist.Normal(cp.sample("x", wide), scale), 0.0)

    density = cp.compile(measured)
    kernel = Interweaving(lambda schedule: 40.0 + 0.0 * schedule.sigma)
    x = 10.0 * jax.random.normal(jax.random.key(0), (100,))
    start = jnp.stack([x, jnp.full((100,), 5.0)], axis=1)
    chains = jax.jit(jax.vmap(stepped(density, 0, kernel, 100)))
    after = chains(start, jax.random.split(jax.random.key(1), 100))
    assert np.std(after[:, 0] - start[:, 0]) > 4


@functools.cache
def pair():
    return studied(means(np.zeros(2)))


def drift(points, weighed):
    start, before, after = [np.asarray(block, np.float32) for block in points]
    trail = Trail(start, np.arange(len(start)))
    trail.add(before)
    trail.add(after)
    return cp.WarmUp().drift(trail, pair(), weighed)


def test_a_warm_up_goes_on_until_latents_have_forgotten_where_it_began():
    """Points of two members and two latents, of a population that has the same moments
    all the time."""
    start, before, after = np.random.default_rng(0).normal(size=(3, 2000, 4))
    assert drift((start, before, after), False) == 0
    # The correlation of the last two blocks does not count.
    assert drift((start, after, after), False) == 0
    stuck = after.copy()
    stuck[:, 3] = 0.6 * start[:, 3] + 0.8 * after[:, 3]
    assert drift((start, before, stuck), False) == pytest.approx(0.6, abs=0.05)
    # Weighted chains began with the right law.
    assert drift((start, before, stuck), True) == 0
    assert drift((start, before, after + 1), True) > 0.5


@pytest.mark.parametrize(("chains", "draws"), [(1_000, 1), (10_000, 4), (12, 20)])
def test_moves_err_less_than_what_is_left_to_chance(chains, draws):
    """The tolerance of a default run's moves, and of the rounds that close it, is 1/√n
    nats at n samples."""
    kernel = choose(pair(), chains, draws)[0].kernel
    points = np.random.default_rng(0).normal(size=(chains, 4))
    (last,) = cp.WarmUp().adapt(points, pair()).kernel.kernels
    assert kernel.log_ratio.tolerance == pytest.approx((chains * draws) ** -0.5)
    assert last.log_ratio.tolerance == pytest.approx(min(0.1, chains**-0.5))


def test_a_warm_up_counts_what_its_kernel_evaluates():
    steps = tuning.WARM_UP.settling + tuning.WARM_UP.transitions
    kernel = Transitions.resolved(Interweaving(), 1, pair())
    # 4 nodes twice, and the point that they lead to.
    assert cp.WarmUp().evaluations(kernel) == steps * 9


@pytest.mark.parametrize(
    ("seed", "number", "chains", "deviation", "noise"),
    [
        pytest.param(1, 1, 400, 0.7, NOISE, marks=pytest.mark.slow),
        (8, 8, 400, 0.7, NOISE),
        pytest.param(5, 8, 500, 1.0, 0.1, marks=pytest.mark.slow),
        pytest.param(200, 200, 200, 0.7, NOISE, marks=pytest.mark.slow),
        pytest.param(1000, 1000, 200, 0.7, NOISE, marks=pytest.mark.slow),
    ],
    ids=["one member", "eight", "precise data and a wide group", "200", "1,000"],
)
def test_group_by_the_default_call(seed, number, chains, deviation, noise):
    """Under precise data long moves of a scale cross scores so steep that Simpson's
    rule is off by many nats."""
    y = np.random.default_rng(seed).normal(0.7, deviation, number)
    width = (BROAD**-2 + noise**-2) ** -0.5
    ms = jnp.asarray(width**2 / noise**2 * y, jnp.float32)
    density = studied(ms, posterior=gaussian(width))
    result = cp.infer(density, jax.random.key(0), num_chains=chains, progress=False)
    assert result.status.ok
    assert "Interweaving" in result.about.sampler
    assert_is_the_group(result, y, noise)
    if chains == 400:
        *_, log_z = group(y)
        error = result.log_evidence_error
        assert abs(result.log_evidence - log_z) < 4 * error < 1
        # The negative control: a group at its prior.
        rng = np.random.default_rng(0)
        prior = {"mu": rng.normal(size=400), "tau": abs(rng.normal(size=400))}
        with pytest.raises(AssertionError):
            assert_is_the_group(prior, y)


@cp.program
def sessions(posterior, prior, ms):
    mu = cp.sample("mu", dist.Normal(0.0, 1.0))
    tau = cp.sample("tau", dist.HalfNormal(1.0))
    omega = cp.sample("omega", dist.HalfNormal(1.0))
    with numpyro.plate("subjects", len(ms), dim=-2):
        a = cp.sample("a", dist.Normal(mu, tau))
        with numpyro.plate("sessions", ms.shape[1], dim=-1):
            eta = cp.sample("eta", dist.Normal(a, omega))
            cp.factor("x", posterior.given(m=ms) / prior, at=eta)


@cp.program
def items(posterior, prior, ms):
    mu = cp.sample("mu", dist.Normal(0.0, 1.0))
    tau = cp.sample("tau", dist.HalfNormal(1.0))
    omega = cp.sample("omega", dist.HalfNormal(1.0))
    of_students = numpyro.plate("students", len(ms), dim=-2)
    of_items = numpyro.plate("items", ms.shape[1], dim=-1)
    with of_students:
        a = cp.sample("a", dist.Normal(mu, tau))
    with of_items:
        b = cp.sample("b", dist.Normal(0.0, omega))
    with of_students, of_items:
        eta = cp.sample("eta", dist.Normal(a + b, 0.3))
        cp.factor("x", posterior.given(m=ms) / prior, at=eta)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "shape", "residual"), [(sessions, (8, 3), 0.0), (items, (8, 5), 0.3)]
)
def test_effects_of_two_kinds_by_the_default_call(program, shape, residual):
    """Data are normal given both scales, and sums over a grid of these the
    reference."""
    rows, columns = shape
    rng = np.random.default_rng(5)
    of_rows = np.kron(np.eye(rows), np.ones((columns, 1)))
    if program is sessions:
        others = np.eye(rows * columns)
    else:
        others = np.kron(np.ones((rows, 1)), np.eye(columns))
    y = 0.4 + 0.8 * of_rows @ rng.normal(size=rows)
    y += 0.5 * others @ rng.normal(size=others.shape[1])
    y += np.hypot(residual, NOISE) * rng.normal(size=y.size)
    density = cp.compile(program, POSTERIOR, PRIOR, means(y.reshape(shape)))
    result = cp.infer(density, jax.random.key(0), num_chains=400, progress=False)
    assert result.status.ok
    scales = np.linspace(0.01, 3.0, 60)
    tau, omega = (a.ravel() for a in np.meshgrid(scales, scales, indexing="ij"))
    # Every entry has 1 from mu, whose variance that is.
    covariance = (
        tau[:, None, None] ** 2 * (of_rows @ of_rows.T)
        + omega[:, None, None] ** 2 * (others @ others.T)
        + ((residual**2 + NOISE**2) * np.eye(y.size) + 1.0)
    )
    log_p = -0.5 * (tau**2 + omega**2 + np.linalg.slogdet(covariance)[1])
    right = np.stack([y, np.ones_like(y)], 1)
    solved = np.linalg.solve(covariance, np.broadcast_to(right, (len(tau), y.size, 2)))
    log_p -= 0.5 * solved[:, :, 0] @ y
    weights = np.exp(log_p - log_p.max())
    weights /= weights.sum()
    # mu given the scales.
    mean_of_mu = solved[:, :, 0].sum(1)
    variance_of_mu = 1 - solved[:, :, 1].sum(1)
    given_scales = {
        "mu": (mean_of_mu, variance_of_mu),
        "tau": (tau, 0.0),
        "omega": (omega, 0.0),
    }
    for name, (mean, variance) in given_scales.items():
        exact = weights @ mean
        deviation = np.sqrt(weights @ (mean**2 + variance) - exact**2)
        assert abs(np.mean(result[name]) - exact) < 0.3 * deviation, name
        assert abs(np.std(result[name]) / deviation - 1) < 0.2, name


@cp.program
def ambiguous(conditional):
    mu = cp.sample("mu", dist.Normal(0.0, 1.0))
    prior = cp.Analytic(dist.Normal(mu, 1.0), LEVELS)
    cp.sample("eta", prior * POSTERIOR.given(m=0.5) / PRIOR, conditional=conditional)


@cp.program
def intractable():
    mu = cp.sample("mu", dist.Normal(0.0, 1.0))
    eta = cp.sample("eta", dist.Normal(mu, 1.0))
    cp.factor("x", POSTERIOR.given(m=mu) / PRIOR, at=eta)


def in_plates(sizes, condition, handlers=()):
    plates = [(f"plate {i}", size) for i, size in enumerate(sizes)]
    evidence = POSTERIOR.given(m=jnp.zeros(condition)) / PRIOR
    return lambda: member(plates, handlers, evidence)


def beside(handler):
    return lambda: member([("subjects", 3)], [handler], closed=True)


VECTOR = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
REFUSED = {
    ShapeError: {
        "the inner plate's axis": in_plates((4, 3), (3,)),
        "another axis": in_plates((3, 4), (4, 2)),
        "two plates of one size": in_plates((3, 3), (3, 1)),
        "a mask without a plate": in_plates((3,), (3,), [masked(np.ones((2, 3)))]),
        "another plate": beside(plate("trials", 3)),
        "events of another shape": lambda: member(prior=VECTOR),
        "events of all members": lambda: member(
            [("subjects", 2)], evidence=gaussian(1.0, (2,))
        ),
    },
    ProgramError: {
        "a scale for each": beside(scaled(jnp.ones(3))),
        "some factors": lambda: cp.compile(ambiguous, False),
        "a prior without a noised density": lambda: member(
            prior=dist.VonMises(0.0, 1.0)
        ),
        "no such site": lambda: member(at="theta"),
    },
    DoublyIntractableError: {
        "a mask of the site": beside(lambda eta: numpyro.handlers.mask(mask=eta > 0)),
        "a condition that is a latent": lambda: cp.compile(intractable),
    },
    InvalidValueError: {
        "a block of none": lambda: cp.factor("x", PRIOR, at="eta", block=0),
        "a block of a log-weight": lambda: cp.factor("w", 0.0, block=2),
        "a policy": lambda: member(anneal="denoised"),
    },
    WrongTypeError: {
        "a number": lambda: member(evidence=1.0),
        "nowhere": lambda: cp.compile(cp.program(lambda: cp.factor("x", PRIOR))),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSED))
def test_refusals(kind, call):
    refused(call, kind)


def test_a_latent_of_some_factors_is_held_where_that_is_asked_for():
    assert cp.compile(ambiguous, True).sites["mu"].kind == "held"
