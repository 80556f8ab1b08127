"""Boolean formulas over attributes: against enumeration, and exact at every level where
attributes are independent."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.factors.formula import Formula, Parsed
from refusals import refused, rows
from sampling_cases import single

SCHEDULE = cp.Schedule.log_snr(12)
WIDTH = 0.5
NAMES = ("right", "top", "near")
SIGNS = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
TRUE = SIGNS > 0
SHARES = np.array([0.3, 0.6, 0.8])
WEIGHTS = np.prod(np.where(TRUE, SHARES, 1 - SHARES), axis=1)


def corners(chosen=slice(None)):
    """Gaussians at some corners of a cube, whose coordinates are independent."""
    weights = WEIGHTS[chosen] / WEIGHTS[chosen].sum()
    components = dist.Normal(jnp.asarray(SIGNS[chosen]), WIDTH).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(jnp.asarray(weights)), components)
    return cp.Analytic(mixture, SCHEDULE)


def head(i):
    """The exact classifier of one coordinate's sign, under the noise of the level."""

    def logits(x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        variance = (alpha * WIDTH) ** 2 + 1 - alpha**2
        log_odds = np.log(SHARES[i] / (1 - SHARES[i]))
        return jnp.stack([jnp.zeros(()), 2 * alpha * x[i] / variance + log_odds])

    return cp.Classifier(logits, SCHEDULE, time="log_snr")


HEADS = {name: head(i) for i, name in enumerate(NAMES)}
X = jnp.array([[0.3, -0.8, 1.2], [-1.1, 0.2, -0.4]])


@pytest.mark.parametrize(
    "formula",
    [
        "right",
        "~right",
        "right & top",
        "right | ~top",
        "near & (top | ~right)",
        "~(right & top) | near",
        "(right & ~top) | (~right & top)",
    ],
)
def test_the_condition_is_the_exact_posterior_at_every_level(formula):
    truths = dict(zip(NAMES, TRUE.T, strict=True))
    satisfying = eval(formula, {}, truths)
    prior = corners()
    conditioned = cp.compile(single, cp.condition(prior, HEADS, formula))
    expected = cp.compile(single, corners(satisfying))
    log_share = np.log(WEIGHTS[satisfying].sum())

    @jax.jit
    def both(x, level):
        found = conditioned.evaluate({"x": x}, level)
        exact = expected.evaluate({"x": x}, level)
        return found.log_density, found.score["x"], exact.log_density, exact.score["x"]

    for level in (0, 5, 11):
        for x in X:
            value, score, exact, exact_score = both(x, level)
            np.testing.assert_allclose(value, exact + log_share, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(score, exact_score, rtol=1e-3, atol=1e-3)


MATRIX = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 2.0]])
POINT = jnp.array([0.5, -1.0])


def many(**arguments):
    return cp.Classifier(
        lambda x, t: MATRIX @ x, SCHEDULE, event_shape=(2,), **arguments
    )


def one(i):
    return cp.Classifier(
        lambda x, t: jnp.stack([x[i], -x[i]]), SCHEDULE, event_shape=(2,)
    )


@eqx.filter_jit
def log_probability(f):
    log_value, _ = f.evaluate(POINT, SCHEDULE.at(3), {})
    return log_value


def probability(heads, formula):
    return np.exp(float(log_probability(Formula(heads, formula, (2,)))))


def test_labels_of_one_classifier_exclude_each_other():
    shares = np.asarray(jax.nn.softmax(MATRIX @ POINT))
    classifier = many()
    heads = {f"c{i}": classifier.given(label=i) for i in range(3)}
    heads["other"] = one(0)
    other = float(jax.nn.sigmoid(-2 * POINT[0]))
    np.testing.assert_allclose(
        probability(heads, "c0 | c2"), shares[0] + shares[2], rtol=1e-5
    )
    np.testing.assert_allclose(probability(heads, "~c1"), 1 - shares[1], rtol=1e-5)
    np.testing.assert_allclose(
        probability(heads, "c0 & other | c1 & ~other"),
        shares[0] * other + shares[1] * (1 - other),
        rtol=1e-5,
    )
    # Heads of which the formula says nothing are not evaluated.
    assert len(Formula(heads, "c0 | c2", (2,)).heads) == 1


def test_every_formula_of_two_attributes_by_enumeration():
    heads = {"a": one(0), "b": one(1)}
    p = {name: float(jax.nn.sigmoid(-2 * POINT[i])) for i, name in enumerate("ab")}
    terms = ["a & b", "a & ~b", "~a & b", "~a & ~b"]
    values = [
        p["a"] * p["b"],
        p["a"] * (1 - p["b"]),
        (1 - p["a"]) * p["b"],
        (1 - p["a"]) * (1 - p["b"]),
    ]
    for chosen in range(1, 16):
        included = [i for i in range(4) if chosen >> i & 1]
        formula = " | ".join(terms[i] for i in included)
        expected = sum(values[i] for i in included)
        np.testing.assert_allclose(probability(heads, formula), expected, rtol=1e-5)


def test_networks_of_heads_are_rounded_where_a_program_is():
    """Products of 16 terms and more are."""
    wide = jnp.linspace(-1.0, 1.0, 32).reshape(2, 16) / 3
    head = cp.Classifier(lambda x, t: wide @ x, SCHEDULE)
    prior = cp.Analytic(dist.Normal(jnp.zeros(16), 1.0), SCHEDULE)
    f = cp.condition(prior, {"a": head}, "a")
    x = {"x": jnp.linspace(0.0, 2.0, 16)}
    exact = cp.compile(single, f).log_density(x, 3)
    rounded = cp.compile(single, f, precision="bfloat16").log_density(x, 3)
    assert 0 < abs(float(rounded - exact)) < 0.1


def product_head(i):
    return cp.Classifier(lambda x, t: MATRIX[:2] @ x * (1 - 2 * i), SCHEDULE)


TWO = {"a": product_head(0), "b": product_head(1)}
PRIOR = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0), SCHEDULE)
OTHER = cp.Schedule.cosine(7)
LATER = cp.Classifier(lambda x, t: MATRIX[:2] @ x, OTHER)
MANY = many()
SINGLE = cp.Classifier(lambda x, t: x[:1], SCHEDULE)
SEVENTEEN = {f"a{i}": cp.Classifier(lambda x, t, i=i: x, SCHEDULE) for i in range(17)}


def condition(formula, heads=TWO):
    return lambda: cp.condition(PRIOR, heads, formula)


REFUSED = {
    InvalidValueError: {
        "an unknown name": condition("a & (c | ~b)"),
        "a near miss": lambda: cp.condition(corners(), HEADS, "right & tpo"),
        "and": condition("a and b"),
        "not": condition("not a"),
        "xor": condition("a ^ b"),
        "a comparison": condition("a == b"),
        "a number": condition("a & 1"),
        "a call": condition("a & f(b)"),
        "an open parenthesis": condition("a & (b | a"),
        "nothing": condition("  "),
        "a letter of two bytes": condition("é & a"),
        "several lines": condition("a &\n  c"),
        "a contradiction": condition("a & ~a"),
        "two classes of one": lambda: cp.condition(
            PRIOR,
            {"a": MANY.given(label=0), "b": MANY.given(label=1)},
            "a & b",
        ),
        "too many": condition(" | ".join(SEVENTEEN), SEVENTEEN),
        "three classes": condition("a", {"a": many()}),
        "one logit": condition("a", {"a": SINGLE}),
        "other levels": condition("a & b", {"a": TWO["a"], "b": LATER}),
        "a name that is no name": condition("a", {"is red": TWO["a"]}),
        "a keyword": condition("a", {"is": TWO["a"]}),
    },
    WrongTypeError: {
        "a factor as head": condition("a", {"a": PRIOR}),
        "a label for several heads": condition(1),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSED))
def test_formulas_are_refused_with_the_place(kind, call):
    refused(call, kind)


def test_the_place_is_the_name():
    error = refused(condition("a & (b | tall)"), InvalidValueError)
    _, line, carets, *_ = str(error).split("\n")
    assert line[carets.index("^") : carets.rindex("^") + 1] == "tall"


def test_sums_of_the_most_assignments_are_taken():
    names = list(SEVENTEEN)[:16]
    heads = {name: SEVENTEEN[name] for name in names}
    log_value = log_probability(Formula(heads, " & ".join(names), (2,)))
    expected = 16 * jax.nn.log_sigmoid(POINT[1] - POINT[0])
    np.testing.assert_allclose(log_value, expected, rtol=1e-4)


def test_a_formula_of_sixteen_attributes_by_enumeration():
    """& binds closer than |, and ~ closer than both."""
    names = list(SEVENTEEN)[:16]
    heads = {name: SEVENTEEN[name] for name in names}
    groups = [f"~(a{i} | a{i + 1}) & a{i + 2} | ~a{i + 3}" for i in (0, 4, 8, 12)]
    formula = f"({groups[0]}) & ~({groups[1]}) | {groups[2]} & ({groups[3]})"
    assignments = np.indices((2,) * 16).reshape(16, -1).astype(bool)
    p = float(jax.nn.sigmoid(POINT[1] - POINT[0]))
    shares = np.prod(np.where(assignments, p, 1 - p), axis=0)
    a = [~(assignments[i] | assignments[i + 1]) for i in (0, 4, 8, 12)]
    b = [assignments[i] for i in (2, 6, 10, 14)]
    c = [~assignments[i] for i in (3, 7, 11, 15)]
    first = np.logical_or(np.logical_and(a[0], b[0]), c[0])
    second = np.logical_not(np.logical_or(np.logical_and(a[1], b[1]), c[1]))
    third = np.logical_and(a[2], b[2])
    fourth = np.logical_or(np.logical_and(a[3], b[3]), c[3])
    # c[2] stands before the last &, which binds it to the fourth group.
    true = np.logical_or(np.logical_and(first, second), third)
    true = np.logical_or(true, np.logical_and(c[2], fourth))
    found = probability(heads, formula)
    np.testing.assert_allclose(found, shares[true].sum(), rtol=1e-3)


def test_formulas_of_many_terms_are_read():
    truths = {"a": np.array([True, False]), "b": np.array([True, True])}
    for text, expected in (
        (" & ".join(["a", "b"] * 1000), truths["a"]),
        (" | ".join(["a & b"] * 1000), truths["a"]),
        ("~" * 1001 + "a", ~truths["a"]),
    ):
        found = Parsed.from_text(text, "ab").truth(truths)
        np.testing.assert_array_equal(found, expected)


def test_the_place_of_a_text_that_ends_too_early_is_its_end():
    error = refused(condition("a & ~b |"), InvalidValueError)
    _, line, carets, *_ = str(error).split("\n")
    assert carets.index("^") == len(line.rstrip())


def test_names_stand_in_the_order_of_the_text():
    assert Parsed.from_text("b | ~(c & a) & b", "abc").names() == ["b", "c", "a"]
