"""Print-outs of a program: its text, its Graphviz source, its boxes in a notebook."""

import textwrap

import graphviz
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.ir import graph as drawing
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
    expected = f"""\
        AnnealedDensity of program 'scene' (test_print.py:{first})
          {formula}
          sites
            x: noised (2,), a product, at test_print.py:{first + 2}
            s: static (), HalfNormal prior, at test_print.py:{first + 3}
            y: observed Normal, annealed 'denoised', at test_print.py:{first + 4}
            z: observed Normal, its power rising to 1, at test_print.py:{first + 5}
          levels  Schedule(20 levels, log-SNR 8 … -6, σ 0.0183 … 0.999)
          passes
            normalise: 4 leaves, 1 merged or dropped
            align: every factor at its own levels
            share: 4 evaluations in 3 batches (2 × prior as one)
          offers  conservative, energy, feynman_kac, score"""
    assert str(compiled()) == textwrap.dedent(expected)
    assert repr(compiled()) == str(compiled())


def test_windows_and_mixtures_show_what_they_see():
    text = str(cp.compile(windows, ring, WHOLE))
    assert (
        "f(canvas[0:4]↓2)·[1·f(canvas[0:2]) + 1·f(canvas[2:4])]·whole(canvas)^0.5"
        in text
    )
    assert "align: f(x) evaluated at matching log-SNR" in text


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
        "<b>y</b> observed Normal of s, x",
        "denoised",
        "<b>s</b> ∼ HalfNormal",
    )
    assert all(text in boxes for text in shown), boxes
    monkeypatch.setattr(
        graphviz.Digraph, "pipe", lambda self, **arguments: "<svg></svg>"
    )
    assert drawing.html(compiled().graph) == "<svg></svg>"


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
    assert "near: soft evidence, annealed 'tempered', at test_print.py:" in text
    assert "small: soft evidence, its power rising to 1, at test_print.py:" in text
    assert "near tempered, since it is soft evidence" in text
    boxes = boxes_of(density, monkeypatch)
    assert "<b>small</b> soft evidence of m" in boxes
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
    ("weights", "said"), [([2.0, 1.0], "sum to 3"), ([0.4, 0.6], ""), (None, "")]
)
def test_weights_that_are_made_shares_are_named(weights, said):
    text = str(cp.compile(single, cp.mixture([ring, bar], weights) * ring))
    notes = [line for line in text.splitlines() if "weights of a mixture" in line]
    assert len(notes) == bool(said)
    assert all(said in note and " x " in note for note in notes)


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
    assert "91 evaluations in 2 batches (90 × f as one)" in str(density)
    assert "bar(x)^0.1·(Π_{i=1}^{3} f(x | y=y_i)^0.3)\n" in str(
        cp.compile(tall, observed, jnp.ones((3, 2)), 0.3)
    )
    assert "π_k(x) ∝ [Σ_{i=1}^{2} 1·f(x | c=c_i)]\n" in str(
        cp.compile(either, cat, [0.0, 0.0])
    )
    assert "π_k(x) ∝ [Σ_{i=1}^{2} w_i·f(x | c=c_i)]\n" in str(
        cp.compile(either, cat, [0.0, 1.0])
    )
