"""The verifier against graphs that were broken by hand: each rule catches its defect,
at the stage that makes it."""

import ast
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.compiler.align import align
from composeprob.compiler.build import build
from composeprob.compiler.normalise import normalise
from composeprob.compiler.share import share
from composeprob.errors import VerificationError
from composeprob.factors.factor import Factor
from composeprob.factors.nodes import Combination, Mixture, Product
from composeprob.factors.passes import PASSES
from composeprob.factors.window import Region
from composeprob.ir.leaves import Leaf
from composeprob.ir.verify import STAGES, verify
from composeprob.schedule import Noise
from refusals import refused

SCHEDULE = cp.Schedule.cosine(6)
F, G = (
    cp.Analytic(dist.Normal(jnp.full(2, m), 1.0), SCHEDULE, label=n)
    for m, n in ((0.0, "f"), (1.0, "g"))
)


@cp.program
def scene(f):
    cp.sample("x", f)
    cp.sample("y", F)


H = cp.Diffusion(
    lambda x, t, c: c * x, SCHEDULE, event_shape=(2,), conditions=("c",), label="h"
)


def graph(stage):
    over = cp.product(H, over={"c": np.ones(3)})
    made, _ = build(
        scene, (F**2 * cp.mixture([F, G]) * cp.window(G, (2,), (0,)) * over,), {}
    )
    for name, step in (("normalise", normalise), ("align", align), ("share", share)):
        if STAGES.index(stage) >= STAGES.index(name):
            made = step(made)
    return made


def with_root(made, change):
    first, *others = made.sites
    return replace(made, sites=(replace(first, root=change(first.root)), *others))


def first_leaf(change):
    return lambda root: root.with_children(
        (change(root.children[0]), *root.children[1:])
    )


def region(*numbers):
    return first_leaf(lambda leaf: replace(leaf, region=Region(*numbers)))


def last(change):
    return lambda root: root.with_children(
        (*root.children[:-1], change(root.children[-1]))
    )


def nested(root):
    return product((product((root,), (2.0,)), root), (1.0, 1.0))


def product(factors, powers):
    return Product(factors=factors, numbers=powers, event_shape=(2,))


def mixture(factors, log_weights):
    return Mixture(factors=factors, numbers=log_weights, event_shape=(2,))


def as_mixture(*log_weights):
    return lambda root: mixture(root.children[:2], log_weights)


WIDE = cp.Analytic(dist.Normal(jnp.zeros(3), 1.0), SCHEDULE)
FIVE = Noise(np.arange(5), np.ones(5), np.ones(5))

F_LEAF = Leaf(factor=F, event_shape=(2,), label="f")

BROKEN = [
    pytest.param("build", lambda r: product((), ()), id="an empty Product"),
    pytest.param("build", lambda r: mixture((), ()), id="an empty Mixture"),
    pytest.param(
        "build",
        lambda r: replace(r, numbers=(1.0,)),
        id="a Product with 1 numbers for its children",
    ),
    pytest.param(
        "build",
        lambda r: replace(r, numbers=(np.nan,) * len(r.powers)),
        id="not finite",
    ),
    pytest.param(
        "build",
        as_mixture(0.0, np.inf),
        id="a Mixture with a number that is not finite",
    ),
    pytest.param("build", as_mixture(0.0), id="a Mixture with 1 numbers"),
    pytest.param(
        "normalise",
        first_leaf(lambda leaf: replace(leaf, factor=WIDE)),
        id="have another shape than x",
    ),
    pytest.param("normalise", region((1,), (2,), (1,)), id="leaves site x"),
    pytest.param("normalise", region((-1,), (2,), (1,)), id="leaves site x 2"),
    pytest.param("normalise", region((0,), (2,), (0,)), id="leaves site x 3"),
    pytest.param(
        "normalise",
        region((0,), (1,), (1,)),
        id="does not hold one event of shape (2,)",
    ),
    pytest.param(
        "normalise",
        region((0,), (2,), (2,)),
        id="does not hold one event of shape (2,) 2",
    ),
    pytest.param(
        "normalise", region((0, 0), (2,), (1,)), id="has other axes than site x"
    ),
    pytest.param(
        "normalise", region((0,), (2, 1), (1,)), id="has other axes than site x 2"
    ),
    pytest.param("normalise", nested, id="a product holds a product"),
    pytest.param(
        "normalise",
        last(lambda over: over.with_children((F_LEAF,))),
        id="a plate that nothing runs over",
    ),
    pytest.param(
        "normalise",
        last(lambda over: over.with_children(over.children * 2)),
        id="a plate over more than one child",
    ),
    pytest.param(
        "normalise",
        last(lambda over: replace(over, numbers=(1.0, 2.0, 1.0))),
        id="with different powers",
    ),
    pytest.param(
        "normalise",
        last(lambda over: replace(over, numbers=(1.0, 1.0))),
        id="a Product with 2 numbers for its children",
    ),
    pytest.param(
        "normalise",
        lambda r: replace(r, numbers=(0.0,) * len(r.powers)),
        id="a product holds a zero power",
    ),
    pytest.param(
        "normalise",
        lambda r: product(r.children[:1], (1.0,)),
        id="a single child to the power 1",
    ),
    pytest.param(
        "align",
        first_leaf(lambda leaf: replace(leaf, own_noise=FIVE)),
        id="not aligned to 6 levels",
    ),
    pytest.param(
        "share", first_leaf(lambda leaf: replace(leaf, slot=None)), id="has no slot"
    ),
    pytest.param(
        "share",
        first_leaf(lambda leaf: replace(leaf, slot=(9, 0))),
        id="slot (9, 0) does not exist",
    ),
    pytest.param(
        "share",
        first_leaf(lambda leaf: replace(leaf, slot=(0, -1))),
        id="slot (0, -1) does not exist",
    ),
    pytest.param(
        "share",
        first_leaf(lambda leaf: replace(leaf, slot=(0, 1))),
        id="reads another place",
    ),
    pytest.param(
        "share",
        lambda r: product(r.children[:1], r.powers[:1]),
        id="are evaluated but not used",
    ),
]


@pytest.mark.parametrize("stage", STAGES)
def test_sound_graphs_pass(stage):
    made = graph(stage)
    assert verify(made, stage) is made


@pytest.mark.parametrize(("stage", "change"), BROKEN)
def test_broken_expressions_are_caught(stage, change):
    broken = with_root(graph(stage), change)
    refused(lambda: verify(broken, stage), VerificationError, f"'{stage}'")


def test_rules_hold_only_from_their_stage_on():
    loose = with_root(graph("build"), nested)
    assert verify(loose, "build") is loose
    unscheduled = graph("normalise")
    assert verify(unscheduled, "normalise") is unscheduled
    refused(
        lambda: verify(unscheduled, "align"),
        VerificationError,
    )


def test_names_are_unique_and_strange_nodes_are_named():
    made = graph("build")
    strange = type("Strange", (), {"children": ()})()
    twice = replace(made, sites=(made.sites[0], made.sites[0]))
    refused(
        lambda: verify(twice, "build"),
        VerificationError,
    )
    broken = with_root(made, lambda root: strange)
    refused(lambda: verify(broken, "build"), VerificationError)


def test_the_compiler_verifies_after_every_pass(monkeypatch):
    from composeprob.compiler import pipeline

    stages = []

    def recorded(graph, stage):
        stages.append(stage)
        return verify(graph, stage)

    monkeypatch.setattr(pipeline, "verify", recorded)
    cp.compile(scene, F)
    assert tuple(stages) == STAGES

    def broken(graph):
        return with_root(normalise(graph), lambda root: product((), ()))

    monkeypatch.setattr(pipeline, "normalise", broken)
    refused(lambda: cp.compile(scene, F), VerificationError)


class Sum(Combination):
    """A kind of node that no pass has a rule for."""

    sign = "Σ"

    def _terms(self):
        return [("sum", 1.0)]

    def edge(self, number):
        return ""


def test_every_pass_refuses_a_node_without_a_rule_and_knows_the_usual_ones():
    node = Sum(factors=(F_LEAF,), numbers=(0.0,), event_shape=(2,))
    for name in ("offers", "top", "lower", "formula"):
        refused(
            lambda: PASSES[name].rule_for(node),
            VerificationError,
            f"'{name}'.*Sum",
        )
    alone = Sum(factors=(F,), numbers=(0.0,), event_shape=(2,))
    refused(lambda: cp.compile(scene, alone), VerificationError)
    nodes = [
        kind(factors=(F_LEAF,), numbers=(1.0,), event_shape=(2,))
        for kind in (Product, Mixture)
    ]
    assert all(
        callable(PASSES[name].rule_for(node))
        for name in PASSES
        for node in nodes
        if name != "weighted"
    )


def classes_checked(module):
    """Second arguments of `isinstance` in a module, outside of refusals."""
    nodes = list(ast.walk(module))
    refusals = set()
    for node in nodes:
        if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):
            refusals.update(ast.walk(node.test))
    checked = []
    for node in nodes:
        is_call = isinstance(node, ast.Call) and node not in refusals
        if is_call and ast.unparse(node.func) == "isinstance":
            checked.append(node.args[1])
    return checked


def test_few_places_check_the_class_of_a_node():
    """Differences between nodes are rules of passes, so that a new kind of node needs
    no edit elsewhere. A check that refuses an argument is no such rule."""
    package = Path(cp.__file__).parent
    checked = []
    for path in package.rglob("*.py"):
        checked += classes_checked(ast.parse(path.read_text(encoding="utf-8")))
    kinds = {"Factor"}
    pending = [Factor]
    while pending:
        pending = [kind for parent in pending for kind in parent.__subclasses__()]
        for kind in pending:
            if kind.__module__.startswith("composeprob."):
                kinds.add(kind.__name__)
    of_nodes = []
    for expression in checked:
        names = {n.id for n in ast.walk(expression) if isinstance(n, ast.Name)}
        if names & kinds:
            of_nodes.append(expression)
    assert 0 < len(of_nodes) <= 20, len(of_nodes)
