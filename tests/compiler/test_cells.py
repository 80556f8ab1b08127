"""Windows over any cells of a canvas, and over many sets of them: meaning, rates,
cost."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from compiler.networks import agree, gaussian
from composeprob.compiler.top import top_of, unrolled
from composeprob.errors import ImproperError
from refusals import refused
from sampling_cases import measured, single

pytestmark = pytest.mark.usefixtures("double_precision")

SCHEDULE = cp.Schedule.log_snr(24, min=-9.0, max=9.0)
CANVAS = (4, 3)
GRID = np.arange(12).reshape(CANVAS)
DIAGONALS = [[0, 4, 8], [3, 7, 11], [2, 4, 6], [9, 7, 5]]
SETS = np.array([*GRID, *DIAGONALS, [10, 0, 5]])
"""Rows, diagonals and scattered cells, the last set unordered; cells 9 to 11 and others
lie in several sets."""


def ordered(form="score"):
    """A score, or an energy, that tells the entries of its event apart, and its
    counter."""
    return gaussian(
        form,
        (1.0, -0.5, 0.3),
        (0.2, 0.5, 0.9),
        SCHEDULE,
        conditions={"c": 1.0},
        label="f",
    )


def canvas_prior(shape=CANVAS):
    return cp.Analytic(dist.Normal(jnp.zeros(shape), 1.3), SCHEDULE, label="prior")


X = {"x": jax.random.normal(jax.random.key(0), CANVAS)}


def alike(f, g):
    """The density of a factor, which is that of another."""
    density, expected = cp.compile(single, f), cp.compile(single, g)
    assert density.capabilities == expected.capabilities
    agree(density.evaluate(X, 11), expected.evaluate(X, 11))
    return density


def several(f, sets=SETS):
    return cp.product(*[cp.window(f, CANVAS, index=cells) for cells in sets])


def test_many_sets_are_the_product_of_windows():
    """Also under the leaf's conditions, a power, and beside another use of the network,
    all of which is one batch."""
    f, counter = ordered()
    over = cp.window(f, CANVAS, over=SETS)
    other = cp.window(f.given(c=0.4), CANVAS, index=[1, 4, 7])
    by_sets = over.given(c=-0.3) ** 0.7 * other
    by_windows = several(f).given(c=-0.3) ** 0.7 * other
    density = alike(canvas_prior() * by_sets, canvas_prior() * by_windows)
    assert "Π_{i=1}^{9} f(x[cells_i] | c=-0.3)" in str(density)
    assert "f(x[1, 4, 7] | c=0.4)" in str(density)
    assert "10 × f" in str(density)
    two_sets = cp.window(f, CANVAS, over=SETS[:2]).given(c=-0.3) ** 0.7
    few = cp.compile(single, canvas_prior() * two_sets * other)
    sizes = []
    for each in (few, density):
        before = counter.traced
        jaxpr = jax.make_jaxpr(lambda x, each=each: each.score_and_rate(x, 3))(X)
        assert counter.traced == before + 1
        sizes.append(len(jaxpr.jaxpr.eqns))
    # The code does not depend on the number of sets.
    assert sizes[0] == sizes[1]


def test_a_window_of_cells_written_out():
    """f(x[cells]) by hand, and its rate, (f/g²)·(d' − d) for entries that it does not
    see."""
    f, _ = ordered("energy")
    cells = np.array([7, 2, 10])
    prior = canvas_prior()
    density = cp.compile(single, prior * cp.window(f, CANVAS, index=cells))
    of_f = cp.compile(single, f)
    of_prior = cp.compile(single, prior)
    inner = cp.compile(single, f * canvas_prior((3,)))
    event = {"x": X["x"].ravel()[cells]}
    for level in (0, 11):
        evaluation = density.evaluate(X, level)
        window = of_f.evaluate(event, level)
        rest = of_prior.evaluate(X, level)
        log_density = window.log_density + rest.log_density
        np.testing.assert_allclose(evaluation.log_density, log_density, rtol=1e-9)
        whole = jnp.zeros(12).at[cells].set(window.score["x"]).reshape(CANVAS)
        score = whole + rest.score["x"]
        np.testing.assert_allclose(evaluation.score["x"], score, rtol=1e-9)
        # The other cells are the prior's alone, so the rate is that of the product over
        # these cells.
        rate = inner.evaluate(event, level).terms.rate
        np.testing.assert_allclose(evaluation.terms.rate, rate, rtol=1e-8)


def test_boxes_are_a_case_of_cells():
    f = canvas_prior((2, 2))
    offsets = [(i, j) for i in range(3) for j in range(2)]
    sets = [GRID[i : i + 2, j : j + 2] for i, j in offsets]
    density = alike(
        cp.window(f, CANVAS, over=sets),
        cp.product(*[cp.window(f, CANVAS, offset) for offset in offsets]),
    )
    np.testing.assert_allclose(
        density.top.power["x"], [[1, 2, 1], [2, 4, 2], [2, 4, 2], [1, 2, 1]]
    )


def test_windows_inside_windows_plates_and_data():
    f, _ = ordered("energy")
    block = GRID[1:, :]
    values = [0.2, -0.4]
    lines = np.array([[0, 1, 2], [2, 4, 6]])
    nested = cp.window(f, (3, 3), over=lines)
    cut = cp.window(f, (5,), (1,))
    boxes = [[0, 1, 2, 3, 4], [11, 9, 7, 5, 3]]
    two_sets = cp.window(f, CANVAS, over=SETS[:2])
    nestings = [
        cp.window(nested, CANVAS, over=[block, block[::-1]]),  # sets of sets
        cp.window(nested, CANVAS, (1, 0)),  # sets in a box
        cp.window(cut, CANVAS, over=boxes),  # boxes in sets
        # Each set under each value.
        cp.product(two_sets, over={"c": values}, block=3),
        cp.window(
            cp.mixture(f, log_weights=[0.0, 0.3], over={"c": values}),
            CANVAS,
            over=SETS[2:4],
        ),
        cp.window(
            cp.product(f / canvas_prior((3,)), over={"c": values}),
            CANVAS,
            index=SETS[5],
        ),
    ]
    mixed = cp.mixture([f.given(c=c) for c in values], log_weights=[0.0, 0.3])
    written_out = [
        several(f, [b.ravel()[line] for b in (block, block[::-1]) for line in lines]),
        several(f, [block.ravel()[line] for line in lines]),
        several(f, [[1, 2, 3], [9, 7, 5]]),
        cp.product(*[several(f.given(c=c), SETS[:2]) for c in values]),
        several(mixed, SETS[2:4]),
        cp.product(
            *[several(f.given(c=c) / canvas_prior((3,)), SETS[5:6]) for c in values]
        ),
    ]
    powers = [1.0, 0.5, 0.7, 0.3, 1.1, 0.2]

    @cp.program
    def copies(factors):
        raised = [factor**w for factor, w in zip(factors, powers, strict=True)]
        with numpyro.plate("copies", 2):
            cp.sample("x", cp.product(canvas_prior(), *raised))

    x = {"x": jax.random.normal(jax.random.key(2), (2, *CANVAS))}
    evaluation = cp.compile(copies, nestings).evaluate(x, 7)
    expected = cp.compile(copies, written_out).evaluate(x, 7)
    agree(evaluation, expected, atol=0.0)


def test_a_tapestry_of_sets():
    """Every entry counts once: as in a tapestry of one window a set, beside a box."""

    def model(shape):
        def network(x, t):
            rolled = jnp.roll(x.ravel(), 1).reshape(shape)
            return jnp.tanh(x + 0.5 * rolled)

        return cp.Diffusion(
            network,
            SCHEDULE,
            event_shape=shape,
            parameterization="energy_residual",
            time="log_snr",
            label="m",
        )

    f = model((3,))
    box = cp.window(model((3, 2)), CANVAS, (0, 1))
    each = [cp.window(f, CANVAS, index=cells) for cells in SETS]
    by_sets = cp.tapestry(cp.window(f, CANVAS, over=SETS), box)
    density = alike(by_sets, cp.tapestry(*each, box))
    np.testing.assert_allclose(density.top.power["x"], 1.0, rtol=1e-6)


def test_what_is_known_of_every_entry():
    """Powers at the top, coverage, exact observations and the tails of quotients see
    each set by itself."""
    f = canvas_prior((3,))
    three_rows = cp.window(f, CANVAS, over=GRID[:3])
    refused(lambda: cp.compile(single, three_rows), ImproperError, r"\(3, 0\)")
    wide = cp.Analytic(dist.Normal(jnp.zeros(CANVAS), 0.5), SCHEDULE)
    # Cell 11 is divided by twice.
    quotient = cp.window(f, CANVAS, over=SETS) ** 1.2 / wide
    refused(lambda: cp.compile(single, quotient), ImproperError)
    rows = cp.compile(
        measured,
        cp.window(f, CANVAS, over=GRID),
        lambda x: dist.Normal(x[1, 1], 0.3),
        jnp.array(0.7),
    )
    assert "'exact'" in str(rows)
    score = rows.evaluate(X, 0).score["x"]
    x = X["x"][1, 1]
    expected = -x / 1.3**2 + (0.7 - x) / 0.3**2
    np.testing.assert_allclose(score[1, 1], expected, rtol=0.01)
    assert top_of(unrolled(rows.graph.sites[0].root), CANVAS).power.min() == 1.0


def test_one_set_is_a_window_of_its_cells():
    f = canvas_prior((3,))
    assert eqx.tree_equal(
        cp.window(f, CANVAS, over=[SETS[0]]), cp.window(f, CANVAS, index=SETS[0])
    )
    assert cp.window(canvas_prior((12,)), CANVAS, index=GRID.ravel()[::-1]).normalised
    assert not cp.window(f, CANVAS, index=SETS[0]).normalised
