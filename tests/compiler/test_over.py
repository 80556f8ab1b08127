"""Products and mixtures over data: what they mean, what they cost, how they print."""

import functools

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
"""Of the data's noise: y is N(x, diag VARIANCE), and x is N(0, I)."""


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
    one, other = (
        cp.compile(single, tall(f, data(n), block=block)),
        cp.compile(single, written_out(f, data(n))),
    )
    assert one.capabilities == other.capabilities
    for level in (0, 11, 23):
        agree(one.evaluate(X, level), other.evaluate(X, level))


def test_the_posterior_of_ninety_observations():
    """Without its last noise the composed score is that of the exact posterior."""
    f, ys = posterior()[0], data(90)
    density = cp.compile(
        single, tall(f, ys), schedule=cp.Schedule.log_snr(40, min=-9.0, max=18.0)
    )
    score = density.score(X, 0)["x"]
    exact = ys.sum(0) / VARIANCE - (1 + 90 / VARIANCE) * X["x"]
    np.testing.assert_allclose(score, exact, rtol=1e-3)


@pytest.mark.parametrize(("fewest", "block"), [(2, None), slow(4, 2), (5, 4)])
@pytest.mark.parametrize("form", ["score", "energy"])
def test_its_code_does_not_depend_on_the_number_of_data(form, fewest, block):
    """Nor does the number of calls of the network: one when it is traced, and few when
    the density is made."""
    sizes, traces = [], []
    for n in (fewest, 90):
        f, counter = posterior(form)
        density = cp.compile(single, tall(f, data(n), block=block))
        made = counter.traced
        sizes.append(
            len(
                list(
                    equations(
                        jax.make_jaxpr(lambda x, d=density: d.score_and_rate(x, 3))(X)
                    )
                )
            )
        )
        traces.append((made, counter.traced - made))
    assert sizes[0] == sizes[1]
    assert traces[0] == traces[1]
    assert traces[0][1] == 1


@cp.program
def beside_data(ys, z, over=True):
    """Data of a factor as an argument, beside an observation, which makes the compiler
    run the program again and, at the Tweedie mean, take derivatives of what is
    evaluated in blocks."""
    f = BLOCKS[0]
    x = cp.sample("x", tall(f, ys, block=2) if over else written_out(f, ys))
    cp.observe("z", dist.Normal(x[0], 0.5), z, anneal="denoised")


BLOCKS = posterior()


@pytest.mark.parametrize("of_program", [False, True])
def test_new_data_do_not_compile_again(of_program):
    f, counter = BLOCKS

    def made(seed, over=True):
        if of_program:
            return cp.compile(
                beside_data,
                jnp.asarray(data(5, seed)) if over else data(5, seed),
                jnp.array(0.1),
                over,
            )
        return cp.compile(
            single, tall(f, data(5, seed)) if over else written_out(f, data(5, seed))
        )

    score = eqx.filter_jit(lambda density, x: density.score(x, 3)["x"])
    densities = [made(seed) for seed in (0, 1)]
    found = [score(densities[0], X)]
    before = counter.traced
    found.append(score(densities[1], X))
    assert counter.traced == before
    assert not np.allclose(*found)
    agree(found[1], made(1, over=False).score(X, 3)["x"])


def test_one_observation_is_the_factor_itself():
    f, ys = posterior()[0], data(1)
    for factor, block in ((f, None), (f / prior(), 4)):
        made, wanted = (
            cp.product(factor, over={"y": ys}, block=block),
            factor.given(y=ys[0]),
        )
        assert repr(made) == repr(wanted)
        assert eqx.tree_equal(made, wanted)
    one = posterior("energy")[0]
    alone = cp.mixture(one, log_weights=[0.3], over={"y": ys})
    assert eqx.tree_equal(alone, cp.mixture([one.given(y=ys[0])], log_weights=[0.3]))


def roots(f):
    return cp.compile(single, f).graph.sites[0].root


def test_powers_of_the_top_add_up():
    f, ys = posterior()[0], data(6)
    np.testing.assert_allclose(
        cp.compile(single, tall(f, ys)).top.power["x"], 1.0, rtol=1e-12
    )
    alone = cp.product(f / prior(), over={"y": ys})
    refused(
        lambda: cp.compile(single, alone),
        ImproperError,
        "total power of its factors is 0",
    )


def test_powers_go_inside_and_equal_products_merge():
    f, ys = posterior()[0], data(4)
    over = cp.product(f, over={"y": ys})
    root = roots(over**0.7)
    assert root.plate.count == 4
    assert root.powers == (0.7,) * 4
    assert roots(prior() * over**2 / over).children[1].powers == (1.0,) * 4
    assert roots(prior() * over / over).factor.label == "prior"
    other = cp.product(f, over={"y": data(4, seed=1)})
    assert len(roots(prior() * over * other).children) == 3


def test_shares_of_a_mixture_over_data():
    f, cs = Moved(SCHEDULE), [-1.0, 0.2, 0.7, 1.5]
    shares = [2.0, 0.0, 5.0, 3.0]
    made = cp.mixture(f, shares, over={"c": cs})
    wanted = cp.mixture([f.given(c=c) for c in cs], shares)
    assert made.normalised
    assert made.plate.count == 3  # what has no share is left out
    one, other = cp.compile(single, made), cp.compile(single, wanted)
    assert one.capabilities == other.capabilities
    agree(one.evaluate(X, 9), other.evaluate(X, 9))
    assert "weights of a mixture at x sum to 10" in str(one)
    alone = cp.mixture(f, [0.0, 0.0, 1.0, 0.0], over={"c": cs})
    assert eqx.tree_equal(alone, f.given(c=np.float64(0.7)))


def of_two():
    network = lambda x, t, a, b: 0.5 * jnp.sum((x - a * b) ** 2)
    return learned(
        network, "energy", SCHEDULE, conditions={"a": 1.0, "b": 1.0}, label="f"
    )


def mixtures_in_a_product():
    f, logs = of_two(), [0.0, 0.5]
    made = cp.product(
        cp.mixture(f, log_weights=logs, over={"b": B[:2]}, block=1), over={"a": A}
    )
    assert "Π_{i=1}^{3} [Σ_{j=1}^{2} w_j·f(x | a=a_i, b=b_j)]" in str(
        cp.compile(single, made)
    )
    return made, cp.product(
        *[cp.mixture([f.given(a=u, b=v) for v in B[:2]], log_weights=logs) for u in A]
    )


def labelled():
    network = lambda x, t: jnp.stack([x[0], x[1], x[0] * x[1]])
    classifier = cp.Classifier(network, SCHEDULE, event_shape=(2,), time="log_snr")
    made = prior() * cp.product(classifier, over={"label": [0, 2, 2]})
    return made, prior() * classifier.given(label=0) * classifier.given(label=2) ** 2


A, B = np.array([0.2, 1.0, -0.5]), data(3)
OVER = {  # what is made over data, and the same written out
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
        cp.product(of_two(), over={"a": A}).given(b=B[0]), cp.product(*[of_two().given(a=u, b=B[0]) for u in A])
    ),
    "labels of a classifier": labelled,
}  # fmt: skip


@pytest.mark.parametrize("name", OVER)
def test_data_are_every_value_written_out(name):
    agree(*(cp.compile(single, each).evaluate(X, 5) for each in OVER[name]()))


def test_one_network_is_one_batch():
    """Also where sites have data of their own, and one datum stands beside them."""
    (f, counter), groups = posterior(), [data(3, seed) for seed in (0, 1)]
    each = [tall(f, ys) * f.given(y=data(1)[0]) for ys in groups]
    made = cp.compile(
        cp.program(
            lambda *each: [cp.sample(f"x{g}", one) for g, one in enumerate(each)]
        ),
        *each,
    )
    assert "8 × posterior as one" in str(made)
    counter.traced = 0
    found = made.score({"x0": X["x"], "x1": -X["x"]}, 5)
    assert counter.traced == 1
    for name, one, x in (("x0", each[0], X["x"]), ("x1", each[1], -X["x"])):
        np.testing.assert_allclose(
            found[name], cp.compile(single, one).score({"x": x}, 5)["x"], rtol=1e-9
        )


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
        cp.sample(
            "x",
            cp.product(g, over={"y": data(3)})
            if over
            else cp.product(*[g.given(y=y) for y in data(3)]),
        )

    found, wanted = (
        cp.compile(model, over).score({**X, "a": jnp.array(0.4)}, 5)["x"]
        for over in (True, False)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
