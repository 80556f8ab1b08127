"""The passes normalise, align, share and check, one at a time on the IR."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.compiler.align import align
from composeprob.compiler.build import build
from composeprob.compiler.check import capabilities, check
from composeprob.compiler.normalise import normalise
from composeprob.compiler.share import share
from composeprob.errors import AlignmentError, WrongTypeError
from composeprob.factors.nodes import Product
from composeprob.ir.leaves import Leaf, leaves
from refusals import refused
from sampling_cases import learned, measured, single
from targets import network_outputs

SCHEDULE = cp.Schedule.log_snr(12, min=-6.0, max=8.0)
F, G, H = (
    cp.Analytic(dist.Normal(jnp.full(2, m), 0.7), SCHEDULE, label=n)
    for m, n in ((0, "f"), (1, "g"), (-1, "h"))
)


def returning(form):
    """A network of this parameterization that has learned N(0.5, 0.3·I) where α² + σ² =
    1."""

    def network(x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        return network_outputs(x, alpha, sigma, 0.5, 0.3)[form]

    return network


EXACT = cp.Analytic(dist.Normal(jnp.full(2, 0.5), np.sqrt(0.3)), SCHEDULE)


def built(factor):
    return build(single, (factor,), {})[0]


def root(factor):
    return normalise(built(factor)).sites[0].root


def show(node):
    if isinstance(node, Leaf):
        return node.factor.label
    numbers = node.powers if isinstance(node, Product) else np.exp(node.log_weights)
    inner = " ".join(
        f"{show(c)}^{n:g}" for c, n in zip(node.children, numbers, strict=True)
    )
    return f"({inner})" if isinstance(node, Product) else f"[{inner}]"


# normalise
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "normal"),
    [
        (F, "f"),
        (F**1, "f"),
        (F * G * H, "(f^1 g^1 h^1)"),
        (F * (G * H) ** 2, "(f^1 g^2 h^2)"),
        (((F**2) ** 3) ** 0.5, "(f^3)"),
        (F * G / F, "g"),
        (F * G * F**0.5, "(f^1.5 g^1)"),
        (F * G**0, "f"),
        (cp.power(F, 0.1) * cp.power(F, 0.9), "f"),
        (cp.mixture([F * F, G], log_weights=[0, 0]), "[(f^2)^1 g^1]"),
        (cp.mixture([F, G]) ** 2 * F, "([f^0.5 g^0.5]^2 f^1)"),
        (cp.mixture([F, G], [1, 0]), "[f^1]"),
        (cp.window(F, (2,), (0,)) * F, "(f^2)"),
        (
            cp.window(F, (3,), (0,))
            * cp.window(F, (3,), (1,))
            * cp.window(F, (3,), (0,)),
            "(f^2 f^1)",
        ),  # other leaves
    ],
)
def test_normal_forms(factor, normal):
    assert show(root(factor)) == normal


# align
# ----------------------------------------------------------------------


@pytest.mark.parametrize("target", ["VE", "VP", "other"])
def test_a_model_with_continuous_time_is_exact_on_any_levels(target):
    schedule = {
        "VE": cp.Schedule.edm(9, sigma_min=0.05, sigma_max=20.0),
        "VP": cp.Schedule.cosine(9),
        "other": cp.Schedule.from_arrays(
            np.linspace(0.9, 0.2, 9), np.linspace(0.1, 3.0, 9)
        ),
    }[target]
    trained = cp.Schedule.log_snr(2, min=-20.0, max=20.0)
    models = (learned(returning(form), form, trained) for form in ("energy", "epsilon"))
    x = {"x": jnp.array([0.4, -1.0])}
    exact, energy, score = (
        cp.compile(single, f, schedule=schedule) for f in (EXACT, *models)
    )
    for level in range(9):
        value, wanted = exact.value_and_score(x, level)
        np.testing.assert_allclose(score.score(x, level)["x"], wanted["x"], rtol=3e-5)
        np.testing.assert_allclose(energy.score(x, level)["x"], wanted["x"], rtol=3e-5)
        np.testing.assert_allclose(
            energy.log_density(x, level), value, rtol=1e-4, atol=1e-4
        )  # with d·log(α/α')


def discrete(schedule):
    return cp.Diffusion(
        lambda x, t: x * (t + 1), schedule, event_shape=(2,), label="net"
    )


def test_a_discrete_model_finds_its_level_in_another_family():
    own = cp.Schedule.cosine(10)
    scaled = cp.Schedule.from_arrays(np.ones(4), (own.sigma / own.alpha)[[0, 2, 5, 9]])
    graph = align(normalise(built(discrete(own))), scaled)
    (leaf,) = leaves(graph.sites[0].root)
    np.testing.assert_array_equal(leaf.own_noise.index, [0, 2, 5, 9])
    score = cp.compile(single, discrete(own), schedule=scaled).score(
        {"x": jnp.ones(2)}, 2
    )["x"]
    np.testing.assert_allclose(
        score, -(own.alpha[5] ** 2) * 6 / own.sigma[5] * jnp.ones(2), rtol=1e-5
    )


def test_a_discrete_model_names_its_nearest_level():

    def compiled():
        return cp.compile(single, discrete(cp.Schedule.cosine(10)), schedule=SCHEDULE)

    facts = "'x'.*10 levels.*log-SNR 8.*level 0.*level 0"
    error = refused(compiled, AlignmentError, facts)
    assert "sampling_cases.py:" in str(error)


@pytest.mark.parametrize("scale", [1, 2])
def test_outside_the_trained_range_the_fix_can_be_followed(scale):
    trained = cp.Schedule.log_snr(12, min=-4.0037, max=5.996)
    f = cp.Diffusion(
        returning("epsilon"), trained, event_shape=(2,), time="log_snr", label="net"
    )
    canvas = cp.Analytic(dist.Normal(jnp.zeros(4), 1.0), SCHEDULE)
    factor = f if scale == 1 else cp.window(f, (4,), (0,), scale=2) * canvas
    raised = refused(
        lambda: cp.compile(single, factor, schedule=SCHEDULE),
        AlignmentError,
        "-4 to 6.*level 0",
    )
    suggestion = raised.fix.split("schedule=")[1].rsplit(")", 1)[0]
    cp.compile(single, factor, schedule=eval(suggestion))


def test_levels_are_chosen_by_what_is_bound_to_its_own():
    own = cp.Schedule.log_snr(10)
    assert cp.compile(single, F * discrete(own)).num_levels == 10
    assert cp.compile(single, F * G).num_levels == 12
    assert cp.compile(single, F, schedule=own).num_levels == 10
    refused(
        lambda: cp.compile(single, F, schedule=7),
        WrongTypeError,
    )


def test_equal_levels_need_no_alignment():
    same = cp.Schedule.from_arrays(
        np.float32(SCHEDULE.alpha), np.float32(SCHEDULE.sigma)
    )
    (leaf,) = leaves(align(normalise(built(discrete(SCHEDULE))), same).sites[0].root)
    assert leaf.own_noise is None


# share
# ----------------------------------------------------------------------


def shared(factor):
    return share(align(normalise(built(factor))))


def conditional(default=0.0):
    def network(x, t, c):
        return x * t + c

    return cp.Diffusion(
        network, SCHEDULE, event_shape=(2,), conditions={"c": default}, label="net"
    )


def test_one_group_a_network_one_member_a_condition():
    f = conditional()
    graph = shared(cp.product(f, f.given(c=1.0), f.given(c=2.0), f.given(c=0.0), F))
    # c = 0 is the default.
    assert [len(group.members) for group in graph.groups] == [3, 1]
    name, note = graph.notes[-1]
    assert name == "share"
    assert re.search("4 .* 2 .*3 × net", note)


def test_members_with_conditions_of_other_shapes_or_other_noise_make_another_batch():
    f = conditional()
    conditioned = f.given(c=jnp.ones(2)) * f.given(c=jnp.zeros(2)) * f
    noised = (
        cp.window(F, (4,), (0,))
        * cp.window(F, (4,), (2,))
        * cp.window(F, (4,), (0,), scale=2)
    )
    for factor in (conditioned, noised):
        assert [len(group.members) for group in shared(factor).groups] == [2, 1]


def test_a_leaf_in_a_product_and_in_a_mixture_is_one_member():
    graph = shared(F * cp.mixture([F, G]))
    assert [len(group.members) for group in graph.groups] == [1, 1]
    assert len(leaves(graph.sites[0].root)) == 3


# check
# ----------------------------------------------------------------------

ENERGY = cp.Energy(lambda x, k: -jnp.sum(x**2), SCHEDULE, event_shape=(2,))
LEARNED, SCORED = (
    learned(returning(form), form, SCHEDULE) for form in ("energy", "epsilon")
)
ALL = {
    "score",
    "energy",
    "conservative",
    "normalised",
    "exact_marginals",
    "mode_depth",
    "feynman_kac",
}


@pytest.mark.parametrize(
    ("factor", "missing"),
    [
        (F, set()),
        (cp.mixture([F, G]), set()),
        (F * G, {"normalised", "exact_marginals"}),
        (F**0.5, {"normalised", "exact_marginals"}),
        (LEARNED, {"normalised", "mode_depth"}),
        (LEARNED * F, {"normalised", "exact_marginals", "mode_depth"}),
        (SCORED, {"normalised", "mode_depth", "energy", "conservative"}),
        (
            SCORED * F,
            {"normalised", "exact_marginals", "mode_depth", "energy", "conservative"},
        ),
        (ENERGY, {"normalised", "exact_marginals", "feynman_kac"}),
        (ENERGY * F, {"normalised", "exact_marginals"}),
        (
            cp.mixture([LEARNED, F], log_weights=[0, 0]),
            {"normalised", "exact_marginals", "mode_depth", "feynman_kac"},
        ),
        (cp.mixture([F * G, F], log_weights=[0, 0]), {"normalised", "exact_marginals"}),
    ],
)
def test_capabilities(factor, missing):
    assert capabilities(check(shared(factor))) == ALL - missing


def test_capabilities_of_a_program_with_an_observation():
    density = cp.compile(measured, F, lambda x: dist.Normal(x[0], 1.0), 0.5)
    assert density.capabilities == ALL - {"normalised", "exact_marginals"}
