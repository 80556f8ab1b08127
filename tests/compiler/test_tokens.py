"""Programs of categorical sites: what they mean in words, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import (
    AlignmentError,
    CapabilityError,
    InvalidValueError,
    NetworkError,
    ProgramError,
    ShapeError,
)
from messages import check_wording
from refusals import refused, rows

KEY = jax.random.key(0)
TABLE = np.random.default_rng(0).gamma(1.0, size=(3, 3, 3))
LOGS = np.log(TABLE / TABLE.sum())


def table():
    return cp.Analytic.table(TABLE)


def uniform():
    return cp.Analytic(dist.Categorical(jnp.ones(3) / 3).expand([3]).to_event(1))


def plain(tokens, visible):
    return jnp.zeros((3, 3))


def network():
    return cp.MaskedDiffusion(plain, length=3, num_values=3, mask="boolean")


LEVELS = cp.Schedule.log_snr(9)


def ratios(output="ratios", levels=LEVELS):
    return cp.UniformDiffusion(
        lambda tokens, kept: jnp.zeros((3, 3)),
        levels,
        length=3,
        num_values=3,
        output=output,
        label="ratios",
    )


@cp.program
def site(f):
    return cp.sample("s", f)


@cp.program
def clued(f, value):
    s = cp.sample("s", f)
    cp.observe("clue", dist.Delta(s[1]), value)
    numpyro.deterministic("twos", jnp.sum(s == 2))


@cp.program
def mixed(f):
    cp.sample("s", f)
    cp.sample("x", cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(9)))


@cp.program
def with_latent(f):
    cp.sample("s", f)
    cp.sample("z", dist.Normal(0.0, 1.0))


@cp.program
def counted(f):
    s = cp.sample("s", f)
    cp.observe("y", dist.Normal(1.0 * jnp.sum(s), 1.0), 2.0)


@cp.program
def with_evidence(f, g):
    s = cp.sample("s", f)
    cp.factor("more", g, at=s)


def test_a_program_is_printed_as_mathematics():
    either = cp.mixture([table(), network()], weights=[0.3, 0.7])
    density = cp.compile(clued, table() * either / uniform() ** 0.5, 2)
    check_wording(str(density))
    assert density.capabilities == {"categorical", "energy"}
    assert "digraph" in density.graph.dot()


def test_a_program_under_uniform_noise_is_printed_as_mathematics():
    either = cp.mixture([table(), ratios()], weights=[0.3, 0.7])
    density = cp.compile(clued, table() * either / uniform() ** 0.5, 2)
    check_wording(str(density))
    assert density.capabilities == {"energy", "uniform_noise"}
    assert density.num_levels == 9
    assert density.on(cp.Schedule.log_snr(5, min=-8.0, max=8.0)).num_levels == 5


def test_log_density_of_tokens():
    density = cp.compile(site, table() ** 2.0 * uniform())
    value = density.log_density({"s": jnp.array([0, 2, 1])})
    exact = 2 * LOGS[0, 2, 1] + 3 * np.log(1 / 3)
    assert float(value) == pytest.approx(exact, abs=1e-5)
    evidence = cp.compile(with_evidence, table(), table() * uniform())
    assert float(evidence.log_density({"s": jnp.array([0, 2, 1])})) == pytest.approx(
        exact, abs=1e-5
    )


def test_deterministics_are_read():
    density = cp.compile(clued, table(), 2)
    result = cp.infer(density, KEY, num_chains=8, progress=False)
    np.testing.assert_array_equal(result["twos"], (result["s"] == 2).sum(1))
    assert result["s"].dtype == np.int32
    assert set(result.predictive(KEY)) == {"clue"}


def of_network(function, mask="rank"):
    """Compile a site with a masked network."""
    factor = cp.MaskedDiffusion(function, length=3, num_values=3, mask=mask)
    return lambda: cp.compile(site, factor)


def own_tokens(tokens, rank):
    """Logits of each position that know its own token."""
    return 3 * jax.nn.one_hot(tokens, 3)


def token_before(tokens, rank):
    """Logits that count the tokens of lower rank."""
    seen = rank[None, :] < rank[:, None]
    return seen @ jax.nn.one_hot(tokens, 3)


def probabilities(tokens, second):
    return jax.nn.softmax(jnp.ones((3, 3)) * jnp.arange(3.0))


def noised(function, output):
    """Compile a site with a network of noised tokens."""
    factor = cp.UniformDiffusion(
        function, LEVELS, length=3, num_values=3, output=output
    )
    return lambda: cp.compile(site, factor)


def test_a_network_that_sees_tokens_of_lower_rank_alone_is_compiled():
    of_network(token_before)()
    of_network(own_tokens, mask="boolean")()  # it is shown no hidden token


REFUSED = {
    NetworkError: {
        "its own token": of_network(own_tokens),
        "probabilities": of_network(probabilities, mask="boolean"),
        "probabilities of clean tokens": noised(probabilities, "x0"),
        "ratios": noised(lambda tokens, kept: jnp.full((3, 3), 1.05), "ratios"),
    },
    CapabilityError: {
        "NUTS": lambda: cp.compile(site, table()).to_numpyro(),
        "numbers": lambda: cp.compile(mixed, table()),
        "latent": lambda: cp.compile(with_latent, table()),
        "likelihood": lambda: cp.compile(counted, table()),
        "schedule": lambda: cp.compile(site, network(), schedule=LEVELS),
        "both kinds": lambda: cp.compile(site, network() * ratios()),
        "signal at the top": lambda: cp.compile(
            site, ratios(levels=cp.Schedule.log_snr(9, min=-2.0))
        ),
        "ratios alone": lambda: cp.compile(site, ratios()).log_density(
            {"s": jnp.zeros(3, int)}
        ),
        "reveals of noised tokens": lambda: cp.infer(
            cp.compile(site, ratios()), KEY, num_chains=8, sampler=cp.Reveal()
        ),
        "leaps of hidden tokens": lambda: cp.infer(
            cp.compile(site, table()), KEY, num_chains=8, sampler=cp.TauLeaping()
        ),
        "scale": lambda: cp.compile(
            site, cp.window(table(), (6,), offset=(0,), scale=2)
        ),
        "order": lambda: cp.compile(site, network()).log_density(
            {"s": jnp.zeros(3, int)}
        ),
        "level": lambda: cp.compile(site, table()).log_density(
            {"s": jnp.zeros(3, int)}, 1
        ),
        "score": lambda: cp.compile(site, table()).score({"s": jnp.zeros(3, int)}, 0),
        "sampler": lambda: cp.infer(
            cp.compile(site, table()), KEY, num_chains=8, sampler=cp.SMC()
        ),
        "reveal": lambda: cp.infer(
            cp.compile(
                site, cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(9))
            ),
            KEY,
            num_chains=8,
            sampler=cp.Reveal(),
        ),
        "blocks": lambda: cp.infer(
            cp.compile(site, network()),
            KEY,
            num_chains=8,
            sampler=cp.Reveal(),
            levels=2,
        ),
    },
    ProgramError: {
        "alphabets": lambda: cp.compile(
            site,
            table() * cp.Analytic.chain(jnp.ones(2), jnp.ones((2, 2)), length=3),
        ),
        "clue": lambda: cp.compile(clued, table(), 5),
    },
    AlignmentError: {
        "levels of a network": lambda: cp.compile(
            site, ratios(), schedule=cp.Schedule.log_snr(9, min=-12.0)
        ),
    },
    InvalidValueError: {
        "a negative probability": lambda: cp.Analytic.table([[0.5, -0.1], [0.3, 0.3]]),
        "adaptive levels of noise": lambda: cp.infer(
            cp.compile(site, ratios()), KEY, num_chains=8, levels="adaptive"
        ),
        "levels": lambda: cp.infer(
            cp.compile(site, table()), KEY, num_chains=8, levels=9
        ),
        "adaptive": lambda: cp.infer(
            cp.compile(site, table()), KEY, num_chains=8, levels="adaptive"
        ),
    },
    ShapeError: {
        "shape": lambda: cp.compile(site, table()).log_density(
            {"s": jnp.zeros(4, int)}
        ),
        "type": lambda: cp.compile(site, table()).log_density({"s": jnp.zeros(3)}),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSED))
def test_refusals(kind, call):
    refused(call, kind)
