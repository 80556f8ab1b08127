"""Print-outs of a program: its text, its Graphviz source, its boxes in a notebook."""

import re

import graphviz
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.plotting import graph as drawing
from messages import check_wording, visible
from sampling_cases import learned, single

SCHEDULE = cp.Schedule.log_snr(20, min=-6.0, max=8.0)


ring = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0), SCHEDULE)
bar = cp.Analytic(dist.Normal(jnp.ones(2), 0.5), SCHEDULE)
cat = learned(
    lambda x, t, c: 0.5 * jnp.sum((x - 0.1 * c) ** 2),
    "energy",
    SCHEDULE,
    conditions={"c": 0.0},
)
WHOLE = cp.Analytic(dist.Normal(jnp.zeros(4), 1.0), SCHEDULE)


@cp.program
def scene(prior, y):
    x = cp.sample("x", ring**1.5 * bar / ring * cp.guide(prior, 3.0, c=1.0))
    s = cp.sample("s", dist.HalfNormal(1.0))
    cp.observe("y", dist.Normal(x[0], s), y, anneal="denoised")
    cp.observe("z", dist.Normal(0.0, s), 0.1)


@cp.program
def windows(f, whole):
    either = cp.mixture(
        [cp.window(f, (4,), (0,)), cp.window(f, (4,), (2,))], log_weights=[0.0, 0.0]
    )
    cp.sample("canvas", cp.window(f, (4,), (0,), scale=2) * either * whole**0.5)


@cp.program
def listed(factors):
    cp.sample("position", factors[0])


def labelled(label):
    return cp.compile(
        listed, [cp.Analytic(dist.Normal(jnp.zeros(2), 1.0), SCHEDULE, label=label)]
    )


def boxes_of(density, patch):
    """The boxes that a notebook shows where Graphviz is missing."""

    def missing(self, **arguments):
        raise graphviz.ExecutableNotFound(["dot"])

    patch.setattr(graphviz.Digraph, "pipe", missing)
    return density.graph._repr_html_()


def compiled():
    return cp.compile(scene, cat, jnp.array(0.3))


def test_a_program_reads_like_its_mathematics():
    first = scene.function.__code__.co_firstlineno
    formula = (
        "π_k(x, s) ∝ p(s) · ring(x)^0.5·bar(x)·prior(x | c=1)³·prior(x)⁻² · "
        "L_k(y | s, x) · L_k(z | s)"
    )
    text = str(compiled())
    check_wording(text)
    assert formula in text
    # By site: what is said of it, and the line of its statement
    for site, fact, number in (
        ("x", r"\(2,\)", 2),
        ("s", r"\(\).*HalfNormal", 3),
        ("y", "Normal.*'denoised'", 4),
        ("z", "Normal.* 1,", 5),
    ):
        assert re.search(rf"{site}: .*{fact}.* test_print\.py:{first + number}\n", text)
    assert str(SCHEDULE) in text
    assert re.search("normalise: 4 .* 1 ", text)
    assert re.search("share: 4 .* 3 .*2 × prior", text)
    assert text.endswith("conservative, energy, feynman_kac, score")
    assert repr(compiled()) == text


def test_windows_and_mixtures_show_what_they_see():
    text = str(cp.compile(windows, ring, WHOLE))
    assert (
        "f(canvas[0:4]↓2)·[1·f(canvas[0:2]) + 1·f(canvas[2:4])]·whole(canvas)^0.5"
        in text
    )
    assert "align: f(x) " in text
    check_wording(text)


def test_graphviz_source():
    source = compiled().graph.dot()
    assert source.startswith("digraph scene {")
    for label in (
        '"ring(x)',
        '"bar(x)',
        "prior(x | c=1)",
        "HalfNormal",
        "denoised",
        '"^0.5"',
        '"^-2"',
        '"^3"',
    ):
        assert label in source, label
    assert source.count('"site x" -> "site y"') == 1
    assert '"site x" -> "site z"' not in source
    assert '"site s" -> "site z"' in source
    assert source == compiled().graph.dot()


def test_notebooks_show_a_picture_or_boxes(monkeypatch):
    boxes = boxes_of(compiled(), monkeypatch)
    assert boxes.startswith("<div>")
    shown = (
        "ring(x)",
        "<sup>0.5</sup>",
        "<b>y</b>",
        "denoised",
        "<b>s</b> ∼ HalfNormal",
    )
    assert all(text in boxes for text in shown), boxes
    check_wording(visible(boxes))
    monkeypatch.setattr(
        graphviz.Digraph, "pipe", lambda self, **arguments: "<svg></svg>"
    )
    assert drawing.graph_html(compiled().graph) == "<svg></svg>"


def test_soft_evidence_is_called_so(monkeypatch):
    """Not an observation of NumPyro's Unit, which is how it is written down."""

    @cp.program
    def preferred(f):
        x = cp.sample("x", f)
        m = cp.sample("m", dist.Normal(0.0, 1.0))
        cp.factor("near", -jnp.sum((x - m) ** 2))
        cp.factor("small", -(m**2))

    density = cp.compile(preferred, ring)
    text = str(density)
    assert "∝ p(m) · f(x) · exp(near_k(m, x)) · exp(small_k(m))" in text
    assert re.search("near: .*'tempered'.* test_print.py:", text)
    assert re.search("small: .* 1,.* test_print.py:", text)
    assert "near tempered" in text
    check_wording(text)
    boxes = boxes_of(density, monkeypatch)
    assert re.search("<b>small</b>.* m", boxes)
    check_wording(visible(boxes))
    for shown in (text, boxes, density.graph.dot()):
        assert "soft evidence" in shown
        assert "Unit" not in shown


def test_labels_are_escaped_in_html_and_stay_as_they_are_with_parentheses(monkeypatch):
    boxes = boxes_of(labelled("<script>"), monkeypatch)
    assert "<script>" not in boxes
    assert "&lt;script&gt;(position)" in boxes
    assert all(
        f"∝ {label}(position)" in str(labelled(label))
        for label in ("net(x0)", "my (xyz) net")
    )


@pytest.mark.parametrize(
    ("weights", "total"), [([2.0, 1.0], " 3"), ([0.4, 0.6], ""), (None, "")]
)
def test_weights_that_are_made_shares_are_named(weights, total):
    text = str(cp.compile(single, cp.mixture([ring, bar], weights) * ring))
    notes = [line for line in text.splitlines() if "weights" in line]
    assert len(notes) == bool(total)
    assert all(total in note and " x " in note for note in notes)
    check_wording("\n".join(notes))


observed = learned(
    lambda x, t, y: x - 0.0 * y,
    "epsilon",
    SCHEDULE,
    conditions=("y",),
    label="observed",
)


@cp.program
def tall(f, ys, power):
    cp.sample("x", bar * cp.product(f / bar, over={"y": ys}) ** power)


@cp.program
def either(f, weights):
    cp.sample(
        "x", cp.mixture(f, log_weights=weights, over={"c": jnp.arange(len(weights))})
    )


def test_products_and_mixtures_over_data_are_one_line_and_a_plate_of_the_graph():
    density = cp.compile(tall, observed, jnp.ones((90, 2)), 1.0)
    source = density.graph.dot()
    assert source.count("f(x | y=y_i)") == 1
    assert 'subgraph "cluster' in source
    assert 'label="90 × y"' in source
    assert "90 × y" in drawing._boxes(density.graph)
    assert "log w = 0 … 1" in cp.compile(either, cat, [0.0, 1.0]).graph.dot()
    assert "π_k(x) ∝ bar(x)⁻⁸⁹·(Π_{i=1}^{90} f(x | y=y_i))\n" in str(density)
    assert re.search("share: 91 .* 2 .*90 × f", str(density))
    assert "bar(x)^0.1·(Π_{i=1}^{3} f(x | y=y_i)^0.3)\n" in str(
        cp.compile(tall, observed, jnp.ones((3, 2)), 0.3)
    )
    assert "π_k(x) ∝ [Σ_{i=1}^{2} 1·f(x | c=c_i)]\n" in str(
        cp.compile(either, cat, [0.0, 0.0])
    )
    assert "π_k(x) ∝ [Σ_{i=1}^{2} w_i·f(x | c=c_i)]\n" in str(
        cp.compile(either, cat, [0.0, 1.0])
    )
