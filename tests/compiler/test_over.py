"""Products and mixtures over data: their meaning, cost and print-outs."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from compiler.networks import Moved, agree, gaussian
from composeprob.errors import ImproperError
from refusals import refused
from sampling_cases import equations, learned, single, slow

pytestmark = pytest.mark.usefixtures("double_precision")

SCHEDULE = cp.Schedule.log_snr(24, min=-9.0, max=9.0)
VARIANCE = np.array([0.4, 1.5])
"""The variance of the data's noise: y is N(x, diag VARIANCE), and x is N(0, I)."""


def posterior(form="score"):
    """The exact noised posterior of x under ONE y, as any parameterization, and its
    counter."""
    share = 1 / (1 + VARIANCE)
    options = {
        "conditions": ("y",),
        "log_snr_range": (-20.0, 20.0),
        "label": "posterior",
    }
    return gaussian(form, share, VARIANCE * share, SCHEDULE, **options)


@functools.cache
def prior():
    return cp.Analytic(
        dist.Normal(jnp.zeros(2), 1.0).to_event(1), SCHEDULE, label="prior"
    )


def data(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 2))


def tall(f, ys, **options):
    return prior() * cp.product(f / prior(), over={"y": ys}, **options)


def written_out(f, ys):
    return prior() * cp.product(*[f.given(y=y) / prior() for y in ys])


X = {"x": jnp.array([0.3, -0.7])}


CASES = [("score", 8, 3), ("energy", 2, 1), ("energy", 8, None)]
CASES += [slow("score", 2, None), slow("epsilon", 8, None), slow("energy", 8, 8)]


@pytest.mark.parametrize(("form", "n", "block"), CASES)
def test_it_is_the_product_written_out(form, n, block):
    f, _ = posterior(form)
    density = cp.compile(single, tall(f, data(n), block=block))
    expected = cp.compile(single, written_out(f, data(n)))
    assert density.capabilities == expected.capabilities
    for level in (0, 11, 23):
        agree(density.evaluate(X, level), expected.evaluate(X, level))


def test_the_posterior_of_ninety_observations():
    """Without its last noise the composed score is that of the exact posterior."""
    f, _ = posterior()
    ys = data(90)
    schedule = cp.Schedule.log_snr(40, min=-9.0, max=18.0)
    density = cp.compile(single, tall(f, ys), schedule=schedule)
    score = density.score(X, 0)["x"]
    exact = ys.sum(0) / VARIANCE - (1 + 90 / VARIANCE) * X["x"]
    np.testing.assert_allclose(score, exact, rtol=1e-3)


@pytest.mark.parametrize(("fewest", "block"), [(2, None), slow(4, 2), (5, 4)])
@pytest.mark.parametrize("form", ["score", "energy"])
def test_its_code_does_not_depend_on_the_number_of_data(form, fewest, block):
    """Nor does the number of calls of the network: one when it is traced, and few when
    the density is compiled."""
    sizes = []
    traces_to_compile = []
    for n in (fewest, 90):
        f, counter = posterior(form)
        density = cp.compile(single, tall(f, data(n), block=block))
        before = counter.traced
        jaxpr = jax.make_jaxpr(lambda x, d=density: d.score_and_rate(x, 3))(X)
        assert counter.traced - before == 1
        sizes.append(len(list(equations(jaxpr))))
        traces_to_compile.append(before)
    assert sizes[0] == sizes[1]
    assert traces_to_compile[0] == traces_to_compile[1]


@cp.program
def beside_data(ys, z, over=True):
    """Data of a factor as an argument, beside an observation, which makes the compiler
    run the program again and, at the Tweedie mean, take derivatives through
    evaluations in blocks."""
    f, _ = BLOCKS
    factor = tall(f, ys, block=2) if over else written_out(f, ys)
    x = cp.sample("x", factor)
    cp.observe("z", dist.Normal(x[0], 0.5), z, anneal="denoised")


BLOCKS = posterior()


@pytest.mark.parametrize("of_program", [False, True])
def test_new_data_do_not_compile_again(of_program):
    f, counter = BLOCKS

    def compiled(seed, over=True):
        ys = data(5, seed)
        if of_program:
            argument = jnp.asarray(ys) if over else ys
            return cp.compile(beside_data, argument, jnp.array(0.1), over)
        factor = tall(f, ys) if over else written_out(f, ys)
        return cp.compile(single, factor)

    score = eqx.filter_jit(lambda density, x: density.score(x, 3)["x"])
    first, second = compiled(0), compiled(1)
    of_first = score(first, X)
    before = counter.traced
    of_second = score(second, X)
    assert counter.traced == before
    assert not np.allclose(of_first, of_second)
    agree(of_second, compiled(1, over=False).score(X, 3)["x"])


def test_one_observation_is_the_factor_itself():
    f, _ = posterior()
    ys = data(1)
    for factor, block in ((f, None), (f / prior(), 4)):
        over = cp.product(factor, over={"y": ys}, block=block)
        expected = factor.given(y=ys[0])
        assert repr(over) == repr(expected)
        assert eqx.tree_equal(over, expected)
    energy, _ = posterior("energy")
    over = cp.mixture(energy, log_weights=[0.3], over={"y": ys})
    expected = cp.mixture([energy.given(y=ys[0])], log_weights=[0.3])
    assert eqx.tree_equal(over, expected)


def root_of(f):
    return cp.compile(single, f).graph.sites[0].root


def test_powers_of_the_top_add_up():
    f, _ = posterior()
    ys = data(6)
    top = cp.compile(single, tall(f, ys)).top
    np.testing.assert_allclose(top.power["x"], 1.0, rtol=1e-12)
    alone = cp.product(f / prior(), over={"y": ys})
    refused(
        lambda: cp.compile(single, alone),
        ImproperError,
    )


def test_powers_go_inside_and_equal_products_merge():
    f, _ = posterior()
    over = cp.product(f, over={"y": data(4)})
    root = root_of(over**0.7)
    assert root.plate.count == 4
    assert root.powers == (0.7,) * 4
    assert root_of(prior() * over**2 / over).children[1].powers == (1.0,) * 4
    assert root_of(prior() * over / over).factor.label == "prior"
    other = cp.product(f, over={"y": data(4, seed=1)})
    assert len(root_of(prior() * over * other).children) == 3


def test_shares_of_a_mixture_over_data():
    f = Moved(SCHEDULE)
    cs = [-1.0, 0.2, 0.7, 1.5]
    shares = [2.0, 0.0, 5.0, 3.0]
    over = cp.mixture(f, shares, over={"c": cs})
    assert over.normalised
    assert over.plate.count == 3  # a component without a share is left out
    density = cp.compile(single, over)
    expected = cp.compile(single, cp.mixture([f.given(c=c) for c in cs], shares))
    assert density.capabilities == expected.capabilities
    agree(density.evaluate(X, 9), expected.evaluate(X, 9))
    assert re.search("weights.* x .* 10", str(density))
    alone = cp.mixture(f, [0.0, 0.0, 1.0, 0.0], over={"c": cs})
    assert eqx.tree_equal(alone, f.given(c=np.float64(0.7)))


def of_two():
    def network(x, t, a, b):
        return 0.5 * jnp.sum((x - a * b) ** 2)

    return learned(
        network, "energy", SCHEDULE, conditions={"a": 1.0, "b": 1.0}, label="f"
    )


def mixtures_in_a_product():
    f = of_two()
    logs = [0.0, 0.5]
    mixture = cp.mixture(f, log_weights=logs, over={"b": B[:2]}, block=1)
    over = cp.product(mixture, over={"a": A})
    formula = "Π_{i=1}^{3} [Σ_{j=1}^{2} w_j·f(x | a=a_i, b=b_j)]"
    assert formula in str(cp.compile(single, over))
    mixtures = []
    for u in A:
        components = [f.given(a=u, b=v) for v in B[:2]]
        mixtures.append(cp.mixture(components, log_weights=logs))
    return over, cp.product(*mixtures)


def labelled():
    def network(x, t):
        return jnp.stack([x[0], x[1], x[0] * x[1]])

    classifier = cp.Classifier(network, SCHEDULE, event_shape=(2,), time="log_snr")
    over = prior() * cp.product(classifier, over={"label": [0, 2, 2]})
    return over, prior() * classifier.given(label=0) * classifier.given(label=2) ** 2


A = np.array([0.2, 1.0, -0.5])
B = data(3)
OVER = {  # a factor over data, and the same written out
    "a product of mixtures": mixtures_in_a_product,
    "every pair": lambda: (
        cp.product(cp.product(of_two(), over={"a": A}), over={"b": B}),
        cp.product(*[of_two().given(a=u, b=v) for u in A for v in B]),
    ),
    "two conditions together": lambda: (
        cp.product(of_two(), over={"a": A, "b": B}),
        cp.product(*[of_two().given(a=u, b=v) for u, v in zip(A, B, strict=True)]),
    ),
    "one condition of two": lambda: (
        cp.product(of_two(), over={"a": A}).given(b=B[0]),
        cp.product(*[of_two().given(a=u, b=B[0]) for u in A]),
    ),
    "labels of a classifier": labelled,
}


@pytest.mark.parametrize("name", OVER)
def test_data_are_every_value_written_out(name):
    over, written = OVER[name]()
    evaluation = cp.compile(single, over).evaluate(X, 5)
    agree(evaluation, cp.compile(single, written).evaluate(X, 5))


def test_one_network_is_one_batch():
    """Also where sites have data of their own, and one datum stands beside them."""
    f, counter = posterior()
    factors = [tall(f, data(3, seed)) * f.given(y=data(1)[0]) for seed in (0, 1)]

    @cp.program
    def two_sites(first, second):
        cp.sample("x0", first)
        cp.sample("x1", second)

    density = cp.compile(two_sites, *factors)
    assert "8 × posterior" in str(density)
    counter.traced = 0
    position = {"x0": X["x"], "x1": -X["x"]}
    score = density.score(position, 5)
    assert counter.traced == 1
    for (name, x), factor in zip(position.items(), factors, strict=True):
        alone = cp.compile(single, factor).score({"x": x}, 5)["x"]
        np.testing.assert_allclose(score[name], alone, rtol=1e-9)


def test_a_held_latent_beside_data():
    """The network's other condition is a latent: the data keep their places when the
    program is run again."""
    f = learned(
        lambda x, t, a, y: 0.5 * jnp.sum((x - a - y) ** 2),
        "energy",
        SCHEDULE,
        conditions=("a", "y"),
    )

    @cp.program
    def model(over):
        a = cp.sample("a", dist.Normal(0.0, 1.0))
        g = f.given(a=a)
        if over:
            cp.sample("x", cp.product(g, over={"y": data(3)}))
        else:
            cp.sample("x", cp.product(*[g.given(y=y) for y in data(3)]))

    position = {**X, "a": jnp.array(0.4)}
    score = cp.compile(model, True).score(position, 5)["x"]
    written = cp.compile(model, False).score(position, 5)["x"]
    np.testing.assert_allclose(score, written, rtol=1e-9)
