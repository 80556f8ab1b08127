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
from composeprob.samplers.hierarchy import Interweaving
from composeprob.samplers.layout import Layout
from composeprob.samplers.moves import Transitions
from refusals import refused, rows
from sampling_cases import learned, single, slow
from zscores import assert_agrees, assert_disagrees, z_scores

LEVELS = cp.Schedule.log_snr(30)
BROAD, NOISE = 3.0, 0.5
"""Of the prior that estimators were trained under, and of what a subject's data say."""
WIDTH = float((BROAD**-2 + NOISE**-2) ** -0.5)


def gaussian(width, shape=(), names=("m",)):
    """The score of the noised N(m, width²), as a network's: nothing but a score."""

    def score(x, log_snr, m=0.0):
        alpha2 = jax.nn.sigmoid(log_snr)
        return -(x - jnp.sqrt(alpha2) * m) / (
            alpha2 * width**2 + jax.nn.sigmoid(-log_snr)
        )

    return learned(score, "score", LEVELS, shape, conditions=names)


POSTERIOR, PRIOR = gaussian(WIDTH), gaussian(BROAD, names=())


def means(y):
    """What the estimator makes of data y: the mean of its posterior."""
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


HALF, STANDARD = POSTERIOR.given(m=0.5) / PRIOR, dist.Normal(0.0, 1.0)


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
    """One site in plates of (name, size), with evidence of it under handlers that are
    made of it: in these plates, or after they are closed."""
    with contextlib.ExitStack() as stack:
        for name, size in plates:
            stack.enter_context(numpyro.plate(name, size))
        eta = cp.sample("eta", prior)
        if closed:
            stack.close()
        for handler in handlers:
            stack.enter_context(handler(eta))
        cp.factor("x", evidence, anneal, at=eta if at is None else at, block=block)


def member(*args, **options):
    return cp.compile(cp.program(lambda: evidence_at(*args, **options)))


def stepped(density, level, kernel, chains, steps=1):
    """A chain's point after transitions of a kernel at a level, as a function of where
    it was and of a key."""
    layout, transitions = (
        Layout.of_density(density),
        Transitions.resolved(kernel, 1, density),
    )
    setting = transitions.untuned(chains), density.schedule.at(level)

    def chain(v, key):
        particle = transitions.start(
            jax.random.key_data(key), v, layout.evaluate(density, v, level, terms=False)
        )

        def step(i, particle):
            return transitions.step(
                density, False, setting, jax.random.fold_in(key, i), particle
            )[0]

        return jax.lax.fori_loop(0, steps, step, particle).position

    return chain


def group(y, noise=NOISE):
    """Mean and standard deviation of mu and tau given data, and the log-evidence, by
    quadrature."""
    mu, tau = np.meshgrid(
        np.linspace(-4, 4, 801), np.linspace(1e-3, 4, 1600), indexing="ij"
    )
    variance = tau**2 + noise**2
    log_p = -0.5 * (mu**2 + tau**2) - 0.5 * len(y) * np.log(variance)
    log_p -= 0.5 * sum((value - mu) ** 2 for value in y) / variance
    weights = np.exp(log_p - log_p.max())
    cell, broad = (
        0.01 * (4 - 1e-3) / 1599 / np.pi,
        BROAD**2 + noise**2,
    )  # p(mu)·p(tau) = exp(−…)/π
    log_z = (
        log_p.max()
        + np.log(weights.sum() * cell)
        + np.sum(0.5 * y**2 / broad + 0.5 * np.log(broad))
    )
    weights /= weights.sum()

    def moments(values):
        mean = np.sum(weights * values)
        return mean, np.sqrt(np.sum(weights * values**2) - mean**2)

    return moments(mu), moments(tau), log_z


def assert_is_the_group(result, y, noise=NOISE):
    """Means within .2 standard deviations, spreads within 15 %, beside the error of so
    many chains."""
    for name, (mean, deviation) in zip(("mu", "tau"), group(y, noise)[:2], strict=True):
        found, error = np.asarray(result[name], float), 3 / np.sqrt(len(result[name]))
        assert abs(found.mean() - mean) < (0.2 + error) * deviation, name
        assert abs(found.std() / deviation - 1) < (0.15 + error), name


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
                variance = alpha**2 * jnp.exp(2 * u) + sigma**2
                prior = (
                    dist.Normal(0, 1).log_prob(mu)
                    + dist.HalfNormal(1).log_prob(jnp.exp(u))
                    + u
                )
                return (
                    prior
                    + dist.Normal(alpha * mu, jnp.sqrt(variance)).log_prob(x).sum()
                )

            def log_q(x, alpha=alpha, sigma=sigma):
                q = dist.Normal(
                    alpha * means(self.Y), np.sqrt(alpha**2 * WIDTH**2 + sigma**2)
                ).log_prob(x)
                return jnp.sum(
                    q
                    - dist.Normal(0, np.sqrt(alpha**2 * BROAD**2 + sigma**2)).log_prob(
                        x
                    )
                )

            score = density.score(POSITION, level)
            expected = jax.grad(log_p, (0, 1, 2))(mu, u, x)
            np.testing.assert_allclose(score["mu"], expected[0], rtol=2e-4, atol=1e-4)
            np.testing.assert_allclose(score["tau"], expected[1], rtol=2e-4, atol=1e-4)
            np.testing.assert_allclose(
                score["eta"], expected[2] + jax.grad(log_q)(x), rtol=2e-4, atol=1e-3
            )
            known = density.evaluator.log_closed_form
            other = {"eta": x, "mu": mu + 0.5, "tau": u - 0.4}
            difference = known(other, level) - known(POSITION, level)
            np.testing.assert_allclose(
                difference,
                log_p(mu + 0.5, u - 0.4, x) - log_p(mu, u, x),
                rtol=1e-3,
                atol=1e-3,
            )

    def test_a_network_has_the_conditions_of_one_member(self):
        """One that does not broadcast over those of all."""

        def score(x, log_snr, m):
            assert jnp.shape(m) == (2,)
            alpha2 = jax.nn.sigmoid(log_snr)
            return -(x - jnp.sqrt(alpha2) * m.mean()) / (
                alpha2 * WIDTH**2 + jax.nn.sigmoid(-log_snr)
            )

        pairs = means(self.Y)[:, None] + jnp.array([-0.5, 0.5])
        strict = learned(score, "score", LEVELS, (), conditions=("m",))
        found, wanted = studied(pairs, posterior=strict), studied(means(self.Y))
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5),
            *(d.score(POSITION, 12) for d in (found, wanted)),
        )

    def test_many_members_cost_what_is_linear_and_compile_as_few(self):
        """What scatters each score over all of the site would be 90,000 numbers.
        Members are rows of arrays: a transition has as many lines for 8 as for 300."""
        density = studied(means(np.zeros(300)))
        position = {"eta": jnp.ones(300), "mu": jnp.zeros(()), "tau": jnp.zeros(())}
        jaxpr = jax.make_jaxpr(lambda p: density.evaluator(p, 3).score)(position)
        assert max(var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars) < 20_000

        def lines(density, number):
            chain = stepped(
                density, 3, Interweaving(lambda schedule: schedule.sigma**2), 1
            )
            text = (
                jax.jit(chain).lower(jnp.zeros(number + 2), jax.random.key(0)).as_text()
            )
            return len(text.splitlines()), len(text)

        (few, small), (many, large) = (
            lines(studied(means(np.zeros(8))), 8),
            lines(density, 300),
        )
        assert many == few
        assert large < 1.3 * small

    def test_several_pieces_multiply_and_a_name_does_for_the_site(self):
        @cp.program
        def pieces(ms, together):
            mu = cp.sample("mu", dist.Normal(0.0, 1.0))
            p, q = POSTERIOR.given(m=ms), POSTERIOR.given(m=-ms)
            with numpyro.plate("subjects", 3):
                eta = cp.sample("eta", dist.Normal(mu, 1.0))
                cp.factor("x", p * q / PRIOR**2 if together else p / PRIOR, at="eta")
                if not together:
                    cp.factor("y", q / PRIOR, at=eta)

        position = {name: POSITION[name] for name in ("eta", "mu")}
        first, second = (
            cp.compile(pieces, means(self.Y), each).score(position, 7)
            for each in (False, True)
        )
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), first, second
        )

    def test_evidence_may_look_at_a_site_with_a_factor_of_its_own(self):
        factor, x = cp.Analytic(STANDARD, LEVELS), jnp.array(0.2)
        found, plain = (
            member(prior=factor).score({"eta": x}, 0),
            cp.compile(single, factor * HALF).score({"x": x}, 0),
        )
        np.testing.assert_allclose(found["eta"], plain["x"], rtol=1e-5)


def masked(keep):
    return lambda eta: numpyro.handlers.mask(mask=np.array(keep, bool))


def scaled(scale):
    return lambda eta: numpyro.handlers.scale(scale=scale)


def plate(name, size):
    return lambda eta: numpyro.plate(name, size)


class TestPlates:
    """Of evidence in plates the score is the sum over the members that count, each with
    its own condition."""

    LEVEL = 9
    M = means(np.random.default_rng(2).normal(size=(3, 4)))
    KEEP = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0]])
    SUBJECTS = (("subjects", 4),)
    NESTED = (*SUBJECTS, ("sessions", 3))
    TRIALS = (SUBJECTS, [plate("trials", 3), masked(KEEP)], M, KEEP)
    # plates of the site, handlers of its evidence, conditions, and how often each score
    # counts
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
            for name, (plates, handlers, m, _, *block) in self.CASES.items():
                over = "over data" in name
                q = (
                    cp.product(POSTERIOR / PRIOR, over={"m": m})
                    if over
                    else POSTERIOR.given(m=m) / PRIOR
                )
                with numpyro.handlers.scope(prefix=name):
                    evidence_at(plates, handlers, q, block=block[0] if block else None)

        density, rng = cp.compile(every_case), np.random.default_rng(4)
        x = {
            site: jnp.asarray(rng.normal(size=s.shape), jnp.float32)
            for site, s in density.sites.items()
        }
        found = density.score(x, self.LEVEL)
        alpha, sigma = (float(a[self.LEVEL]) for a in (LEVELS.alpha, LEVELS.sigma))
        clear, broad = (alpha**2 * width**2 + sigma**2 for width in (WIDTH, BROAD))
        for name, (_, _, m, counts, *_) in self.CASES.items():
            at = x[f"{name}/eta"]
            each = counts * (at / broad - (at - alpha * np.asarray(m)) / clear)
            expected = each.sum(tuple(range(each.ndim - at.ndim))) - at
            np.testing.assert_allclose(
                found[f"{name}/eta"], expected, rtol=1e-4, atol=1e-4, err_msg=name
            )

    def test_a_block_bounds_what_is_evaluated_at_once(self):
        network = lambda x, t, m: jnp.tanh(jnp.ones(500) * x).sum() + m
        wide = learned(network, "score", LEVELS, (), conditions=("m",))

        def largest(block):
            density = member(
                [("subjects", 100)], evidence=wide.given(m=jnp.zeros(100)), block=block
            )
            text = str(
                jax.make_jaxpr(lambda p: density.evaluator(p, 3).score)(
                    {"eta": jnp.ones(100)}
                )
            )
            return max(int(rows) for rows in re.findall(r"f32\[(\d+),500\]", text))

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

        def score(x, t):
            return jax.grad(
                lambda x: jax.nn.logsumexp(
                    jnp.log(weight / sd) - 0.5 * ((x - mean) / sd) ** 2
                )
            )(x)

        flat = learned(score, "score", LEVELS, ())

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
        centre, variance = (
            a[:, None] for a in (ALPHA * mu, ALPHA**2 * np.exp(2 * u) + SIGMA**2)
        )
        weight, mean, sd = cls.MODES.T
        each = (
            weight
            * (variance + sd**2) ** -0.5
            * np.exp(-0.5 * (centre - mean) ** 2 / (variance + sd**2))
        )
        kept = np.flatnonzero(
            rng.random(len(mu)) < (each.sum(1) / (weight / sd).sum()) ** 2
        )[:number]
        assert len(kept) == number
        mu, u, centre, variance, each = (
            mu[kept],
            u[kept],
            centre[kept],
            variance[kept],
            each[kept],
        )
        which = (
            rng.random((number, 2, 1))
            > np.cumsum(each / each.sum(1)[:, None], 1)[:, None, :-1]
        ).sum(2)
        mean, sd = mean[which], sd[which]
        total = variance + sd**2
        x = (centre * sd**2 + mean * variance) / total
        x += np.sqrt(variance * sd**2 / total) * rng.normal(size=(number, 2))
        return np.concatenate([x / ALPHA, mu[:, None], u[:, None]], axis=1).astype(
            np.float32
        )

    def moved(self, steps=12, line=None, widths=None):
        step = lambda schedule: 0.6 * min(self.MODES[:, 2]) ** 2 + 0.0 * schedule.sigma
        kernel = Interweaving(step, log_ratio=line or bounded(CHAINS), widths=widths)
        start = jnp.asarray(self.exact(CHAINS))
        chains = jax.jit(
            jax.vmap(stepped(self.density(), LEVEL, kernel, CHAINS, steps))
        )
        after = chains(start, jax.random.split(jax.random.key(5), CHAINS))
        return np.asarray(start, float), np.asarray(after, float)

    @staticmethod
    def values(v):
        x, mu, u = v[:, :2].sum(1), v[:, 2], v[:, 3]
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
        return {
            name: values.mean()
            for name, values in cls.values(cls.exact(100_000)).items()
        }


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
            hierarchy, "_log_wider", lambda before, after: jnp.zeros(())
        )
        assert_disagrees(z_scores(self.values(self.moved()[1]), self.expected()))


class TestAlone(Interwoven):
    """Where latents are moved in these ways alone; jointly about as far as the
    population is wide."""

    @pytest.mark.parametrize(
        ("turns", "singles", "joint", "widths"),
        [
            (6, 0, 0, None),
            (0, 0, 4, (1.0, 0.5)),
            slow(0, 6, 0, None),
            slow(3, 3, 0, None),
        ],
    )
    def test_leaves_the_law_as_it_is(self, monkeypatch, turns, singles, joint, widths):
        ways = tuning.LATENTS._replace(
            turns=turns, singles=singles, joint=joint, ratios=(0.5, 3.0)
        )
        monkeypatch.setattr(tuning, "LATENTS", ways)
        moved = self.moved(widths=None if widths is None else jnp.array(widths))[1]
        assert_agrees(z_scores(self.values(moved), self.expected()))


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
            rho, tau = (
                cp.sample("rho", dist.Uniform(-1.0, 1.0)),
                cp.sample("tau", dist.LogNormal(0.0, 0.5)),
            )
            with numpyro.plate("subjects", 2):
                covariance = tau**2 * jnp.array([[1.0, rho], [rho, 1.0]])
                cp.sample("eta", dist.MultivariateNormal(jnp.zeros(2), covariance))
                cp.factor("x", flat, at="eta")

        return cp.compile(pairs)

    @classmethod
    def exact(cls, number):
        rng = np.random.default_rng(3)
        rho, u = rng.uniform(-1, 1, 40 * number), rng.normal(0.0, 0.5, 40 * number)
        variances = (
            ALPHA**2 * np.exp(2 * u)[:, None] * np.stack([1 + rho, 1 - rho], 1)
            + SIGMA**2
        )  # of sum, difference
        kept = np.flatnonzero(rng.random(len(rho)) < 1 / (1 + variances).prod(1))[
            :number
        ]
        assert len(kept) == number
        parts = np.sqrt(variances / (1 + variances))[kept, None] * rng.normal(
            size=(number, 2, 2)
        )
        x = np.stack([parts.sum(2), parts[..., 0] - parts[..., 1]], 2) / np.sqrt(2)
        z = np.log((1 + rho) / (1 - rho))[kept, None]
        return np.concatenate(
            [x.reshape(number, 4) / ALPHA, z, u[kept, None]], axis=1
        ).astype(np.float32)

    @staticmethod
    def values(v):
        product, square, z, u = (
            (v[:, :4:2] * v[:, 1:4:2]).sum(1),
            (v[:, :4] ** 2).sum(1),
            v[:, 4],
            v[:, 5],
        )
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
            hierarchy, "_log_wider", lambda before, after: jnp.zeros(())
        )
        assert_disagrees(
            z_scores(self.values(self.moved(steps=24)[1]), self.expected())
        )


class TestNested(Interwoven):
    """Latents in three layers: a scale places a mean, both place those of two subjects,
    log-normal ones, and these with another scale their one session each."""

    def density(self):
        flat = learned(lambda x, t: -x, "score", LEVELS, ())

        @cp.program
        def layers():
            tau, omega = (
                cp.sample("tau", dist.LogNormal(0.0, 0.5)),
                cp.sample("omega", dist.LogNormal(-0.5, 0.5)),
            )
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
        own = np.sqrt(ALPHA**2 * np.exp(2 * omega) + SIGMA**2)
        a = np.exp(tau)[:, None, None] * rows + own[:, None, None] * np.diag(
            [0, 0, 0, 1, 1]
        )
        precision = np.eye(5) + a[:, 3:].swapaxes(1, 2) @ a[:, 3:]
        kept = np.flatnonzero(rng.random(len(tau)) < np.linalg.det(precision) ** -0.5)[
            :number
        ]
        assert len(kept) == number
        upper = np.linalg.cholesky(precision[kept]).swapaxes(1, 2)
        mean, *size, x, other = (
            a[kept] @ np.linalg.solve(upper, rng.normal(size=(number, 5, 1)))
        )[..., 0].T
        columns = x / ALPHA, other / ALPHA, mean, omega[kept], *size, tau[kept]
        return np.stack(columns, axis=1).astype(np.float32)

    @staticmethod
    def values(v):
        x, mean, omega, size, tau = v[:, :2], v[:, 2], v[:, 3], v[:, 4:6], v[:, 6]
        found = {
            "mean²": mean**2,
            "omega": omega,
            "omega²": omega**2,
            "tau": tau,
            "tau²": tau**2,
            "x²": (x**2).sum(1),
        }
        found |= {
            "size²": (size**2).sum(1),
            "size·mean": size.sum(1) * mean,
            "x·size": (x * size).sum(1),
        }
        return found | {
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
            hierarchy, "_log_wider", lambda before, after: jnp.zeros(())
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
        moved = self.moved(60, LineIntegral(3, "simpson"))[1]
        assert_disagrees(z_scores(self.values(moved), self.expected()))


def test_where_a_factor_is_the_prior_steps_are_as_long_as_was_asked():
    """What bounds them is the width of a prior given latents: x, of width 10, has
    none."""
    wide = gaussian(10.0, names=())

    @cp.program
    def measured():
        scale = cp.sample("scale", dist.LogNormal(5.0, 0.1))
        cp.observe("y", dist.Normal(cp.sample("x", wide), scale), 0.0)

    density, kernel = (
        cp.compile(measured),
        Interweaving(lambda schedule: 40.0 + 0.0 * schedule.sigma),
    )
    start = jnp.stack(
        [10.0 * jax.random.normal(jax.random.key(0), (100,)), jnp.full((100,), 5.0)],
        axis=1,
    )
    chains = jax.jit(jax.vmap(stepped(density, 0, kernel, 100)))
    after = chains(start, jax.random.split(jax.random.key(1), 100))
    assert np.std(after[:, 0] - start[:, 0]) > 4


@functools.cache
def pair():
    return studied(means(np.zeros(2)))


def drift(points, weighed):
    return cp.WarmUp().drift(
        [np.asarray(p, np.float32) for p in points], pair(), weighed
    )


def test_a_warm_up_goes_on_until_latents_have_forgotten_where_it_began():
    """Points of two members and two latents, of a population that has the same moments
    all the time."""
    start, before, after = np.random.default_rng(0).normal(size=(3, 2000, 4))
    assert drift((start, before, after), False) == 0
    assert (
        drift((start, after, after), False) == 0
    )  # what the last block alone left is no matter
    stuck = after.copy()
    stuck[:, 3] = 0.6 * start[:, 3] + 0.8 * after[:, 3]
    assert drift((start, before, stuck), False) == pytest.approx(0.6, abs=0.05)
    assert (
        drift((start, before, stuck), True) == 0
    )  # weighed chains began with the right law
    assert drift((start, before, after + 1), True) > 0.5


@pytest.mark.parametrize(("chains", "draws"), [(1_000, 1), (10_000, 4), (12, 20)])
def test_moves_err_less_than_what_is_left_to_chance(chains, draws):
    """The tolerance of a default run's moves, and of the rounds that close it, is 1/√n
    nats at n samples."""
    kernel = choose(pair(), chains, draws)[0].kernel
    (closing,) = (
        cp.WarmUp()
        .adapt(np.random.default_rng(0).normal(size=(chains, 4)), pair())
        .kernel.kernels
    )
    assert kernel.log_ratio.tolerance == pytest.approx((chains * draws) ** -0.5)
    assert closing.log_ratio.tolerance == pytest.approx(min(0.1, chains**-0.5))


def test_a_warm_up_counts_what_its_kernel_evaluates():
    made = tuning.WARM_UP.settling + tuning.WARM_UP.transitions
    kernel = Transitions.resolved(Interweaving(), 1, pair())
    assert (
        cp.WarmUp().evaluations(kernel) == made * 9
    )  # 4 nodes twice, and where that led


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
    """Of precise data long moves of a scale meet scores so steep that Simpson's rule is
    off by many nats."""
    y = np.random.default_rng(seed).normal(0.7, deviation, number)
    width = (BROAD**-2 + noise**-2) ** -0.5
    density = studied(
        jnp.asarray(width**2 / noise**2 * y, jnp.float32), posterior=gaussian(width)
    )
    result = cp.infer(density, jax.random.key(0), num_chains=chains, progress=False)
    assert result.status.ok
    assert "Interweaving" in result.about.sampler
    assert_is_the_group(result, y, noise)
    if chains == 400:
        assert (
            abs(result.log_evidence - group(y)[2]) < 4 * result.log_evidence_error < 1
        )
        rng = np.random.default_rng(0)
        prior = {"mu": rng.normal(size=400), "tau": abs(rng.normal(size=400))}
        with pytest.raises(AssertionError):  # a group at its prior is found out
            assert_is_the_group(prior, y)


@cp.program
def sessions(posterior, prior, ms):
    mu, tau = (
        cp.sample("mu", dist.Normal(0.0, 1.0)),
        cp.sample("tau", dist.HalfNormal(1.0)),
    )
    omega = cp.sample("omega", dist.HalfNormal(1.0))
    with numpyro.plate("subjects", len(ms), dim=-2):
        a = cp.sample("a", dist.Normal(mu, tau))
        with numpyro.plate("sessions", ms.shape[1], dim=-1):
            eta = cp.sample("eta", dist.Normal(a, omega))
            cp.factor("x", posterior.given(m=ms) / prior, at=eta)


@cp.program
def items(posterior, prior, ms):
    mu, tau = (
        cp.sample("mu", dist.Normal(0.0, 1.0)),
        cp.sample("tau", dist.HalfNormal(1.0)),
    )
    omega = cp.sample("omega", dist.HalfNormal(1.0))
    students, each = (
        numpyro.plate("students", len(ms), dim=-2),
        numpyro.plate("items", ms.shape[1], dim=-1),
    )
    with students:
        a = cp.sample("a", dist.Normal(mu, tau))
    with each:
        b = cp.sample("b", dist.Normal(0.0, omega))
    with students, each:
        eta = cp.sample("eta", dist.Normal(a + b, 0.3))
        cp.factor("x", posterior.given(m=ms) / prior, at=eta)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "shape", "own"), [(sessions, (8, 3), 0.0), (items, (8, 5), 0.3)]
)
def test_effects_of_two_kinds_by_the_default_call(program, shape, own):
    """Data are normal given both scales, and sums over a grid of these the
    reference."""
    (rows, columns), rng = shape, np.random.default_rng(5)
    of_row = np.kron(np.eye(rows), np.ones((columns, 1)))
    others = (
        np.eye(rows * columns)
        if program is sessions
        else np.kron(np.ones((rows, 1)), np.eye(columns))
    )
    y = (
        0.4
        + 0.8 * of_row @ rng.normal(size=rows)
        + 0.5 * others @ rng.normal(size=others.shape[1])
    )
    y += np.hypot(own, NOISE) * rng.normal(size=y.size)
    result = cp.infer(
        cp.compile(program, POSTERIOR, PRIOR, means(y.reshape(shape))),
        jax.random.key(0),
        num_chains=400,
        progress=False,
    )
    assert result.status.ok
    scales = np.linspace(0.01, 3.0, 60)
    tau, omega = (a.ravel() for a in np.meshgrid(scales, scales, indexing="ij"))
    parts = (
        of_row @ of_row.T,
        others @ others.T,
        (own**2 + NOISE**2) * np.eye(y.size) + 1.0,
    )  # mu's variance is 1
    covariance = (
        tau[:, None, None] ** 2 * parts[0]
        + omega[:, None, None] ** 2 * parts[1]
        + parts[2]
    )
    log_p = -0.5 * (tau**2 + omega**2 + np.linalg.slogdet(covariance)[1])
    solved = np.linalg.solve(
        covariance,
        np.broadcast_to(np.stack([y, np.ones_like(y)], 1), (len(tau), y.size, 2)),
    )
    log_p -= 0.5 * solved[:, :, 0] @ y
    weights = np.exp(log_p - log_p.max())
    weights /= weights.sum()
    first, spread = (
        solved[:, :, 0].sum(1),
        1 - solved[:, :, 1].sum(1),
    )  # mu given the scales
    found = {"mu": (first, spread), "tau": (tau, 0.0), "omega": (omega, 0.0)}
    for name, (mean, variance) in found.items():
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
    return lambda: member(
        plates, handlers, POSTERIOR.given(m=jnp.zeros(condition)) / PRIOR
    )


def beside(handler):
    return lambda: member([("subjects", 3)], [handler], closed=True)


VECTOR = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
REFUSED = {
    ShapeError: {
        "the inner plate's axis": (in_plates((4, 3), (3,)), r"shape \(3,\), in the plates 'plate 1' of 3, 'plate 0'"),
        "another axis": (in_plates((3, 4), (4, 2)), r"first axis is not where that[\s\S]*broadcast_to\(…, \(4, 3\)"),
        "two plates of one size": (in_plates((3, 3), (3, 1)), r"several of them fit"),
        "a mask without a plate": (
            in_plates((3,), (3,), [masked(np.ones((2, 3)))]), "a mask with an axis of 2, where .* 'eta' has no plate"
        ),
        "another plate": (beside(plate("trials", 3)), "'trials', where its site 'eta' has plate 'subjects', of size 3"),
        "events of another shape": (lambda: member(prior=VECTOR), "events of shape"),
        "events of all members": (
            lambda: member([("subjects", 2)], evidence=gaussian(1.0, (2,))),
            r"events of shape \(2,\), but one value .* the shape \(\)[\s\S]*outside of their plate",
        ),
    },
    ProgramError: {
        "a scale for each": (beside(scaled(jnp.ones(3))), r"scaled by an array[\s\S]*one number"),
        "some factors": (lambda: cp.compile(ambiguous, False), r"'eta' some factors.*'mu'", "factor.*conditional=True"),
        "a prior without a noised density": (
            lambda: member(prior=dist.VonMises(0.0, 1.0)), r"'eta'.*VonMises[\s\S]*MultivariateNormal"
        ),
        "no such site": (lambda: member(at="theta"), "looks at no site"),
    },
    DoublyIntractableError: {
        "a mask of the site": (beside(lambda eta: numpyro.handlers.mask(mask=eta > 0)), "'x' at site 'eta' depends on"),
        "a condition that is a latent": (lambda: cp.compile(intractable), r"'x' at site 'eta' depends on.*'mu'"),
    },
    InvalidValueError: {
        "a block of none": (lambda: cp.factor("x", PRIOR, at="eta", block=0), "block must be at least 1"),
        "a block of a log-weight": (lambda: cp.factor("w", 0.0, block=2), "'w' is a log-weight, and block= "),
        "a policy": (lambda: member(anneal="denoised"), "leave anneal= out"),
    },
    WrongTypeError: {
        "a number": (lambda: member(evidence=1.0), "needs a factor"),
        "nowhere": (lambda: cp.compile(cp.program(lambda: cp.factor("x", PRIOR))), "at= does not say"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "call", "words", "fix"), rows(REFUSED))
def test_refusals(kind, call, words, fix):
    refused(call, kind, words, fix)


def test_a_latent_of_some_factors_is_held_where_that_is_asked_for():
    assert cp.compile(ambiguous, True).sites["mu"].kind == "held"
