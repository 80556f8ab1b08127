"""Networks are in the compiled loop once, no array of it changes its type, few frames
lead to them, and they are evaluated as often as the result says."""

import traceback

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.kernels import langevin
from composeprob.samplers import weights
from composeprob.samplers.run import Pace, begin, placed
from composeprob.samplers.spread import Spread
from sampling_cases import (
    Calls,
    Counted,
    equations,
    learned,
    single,
    slow,
    squared,
    unit_energy,
)

SCHEDULE = cp.Schedule.log_snr(12)


@cp.program
def with_latents(f, anneal):
    x = cp.sample("x", f)
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    cp.observe("y", dist.Normal(x[0] + m, 1.0), 0.3, anneal=anneal)


ENERGIES = {
    "SMC": cp.SMC(check_levels=False),
    "SMC, order 1": cp.SMC(step=cp.ReverseStep(order=1), check_levels=False),
    "SMC, density": cp.SMC(cp.MALA(0.01), weights="density"),
    "MALA": cp.AnnealedMCMC(cp.MALA(0.01), 2),
    "MALA, reverse": cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 2, reverse_step=True),
    "HMC": cp.AnnealedMCMC(cp.HMC(0.01, num_leapfrog=3), 2, reverse_step=True),
    "Ancestral": cp.Ancestral(),
    "line integral": cp.AnnealedMCMC(
        cp.MALA(0.01, log_ratio=cp.LineIntegral(3)), 2, reverse_step=True
    ),
    "HMC, warm-up": cp.AnnealedMCMC(cp.HMC(cp.Adaptive(warmup=2), num_leapfrog=3), 1),
    "SMC, 2 steps": cp.SMC(cp.MALA(cp.Adaptive()), 2, check_levels=False),
    "replicas": cp.ReplicaExchange(
        cp.HMC(0.01, num_leapfrog=2), num_levels=3, sweeps=8
    ),
    "replicas, feynman_kac": cp.ReplicaExchange(
        cp.MALA(), num_levels=3, swap="feynman_kac", sweeps=8
    ),
}
SCORES = {
    "Ancestral, scores": cp.Ancestral(),
    "ULA, scores": cp.AnnealedMCMC(cp.ULA(0.01), 2, reverse_step=True),
    "UHMC, scores": cp.AnnealedMCMC(cp.UHMC(0.01, num_leapfrog=3), 2),
    "SMC, scores": cp.SMC(check_levels=False),
    "SMC, scores, order 1": cp.SMC(step=cp.ReverseStep(order=1), check_levels=False),
}
BLOCKS = {
    "SMC, latents": cp.SMC(check_levels=False),
    "SMC, tempered": cp.SMC(check_levels=False),
    "SMC, denoised": cp.SMC(check_levels=False),
    "Gibbs": cp.AnnealedMCMC(
        cp.Gibbs({"x": cp.MALA(0.01), "m": cp.HMC(0.1, num_leapfrog=2)}),
        2,
        reverse_step=True,
    ),
}


OPAQUE = {
    "BlackJAX": cp.AnnealedMCMC(cp.BlackJAX(blackjax.mala, 0.01), 2, reverse_step=True)
}


def counted(name):
    """A sampler, a density, and the counter of its network's calls."""
    calls = Calls()

    def network(x, t):
        calls()
        return x * t / jnp.sqrt(1 + t**2) if name in SCORES else unit_energy(x, t)

    form = "epsilon" if name in SCORES else "energy"
    factor = learned(network, form, SCHEDULE, time="sigma", label="counted")
    if name == "SMC, density":
        factor = cp.Energy(Counted(calls), SCHEDULE, event_shape=(2,))
    sampler = {**ENERGIES, **SCORES, **BLOCKS, **OPAQUE}[name]
    policy = (
        name.removeprefix("SMC, ")
        if name in ("SMC, tempered", "SMC, denoised")
        else None
    )
    return (
        sampler,
        cp.compile(with_latents, factor, policy)
        if name in BLOCKS
        else cp.compile(single, factor),
        calls,
    )


def places(jaxpr):
    """Of every call of the counter in a traced function: in how many loops it is."""
    return [
        loops
        for equation, loops in equations(jaxpr)
        if equation.primitive.name == "debug_callback"
    ]


PLACES = ("SMC", "SMC, density", "MALA, reverse", "Ancestral", "line integral", "HMC, warm-up", "replicas, feynman_kac",
          "SMC, scores", "SMC, latents", "Gibbs", "BlackJAX", slow("SMC, order 1", None), slow("HMC", None),
          slow("replicas", None))  # fmt: skip
"""Samplers whose loops differ by more than a number, or the kernel's own loop; parts of
the others are slow."""


def types(run):
    """Of every array in it, weakness included."""
    return jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), run)


def traced(name, pace=None):
    """In how many loops each place is where a network is evaluated: at the start, on
    the way down, and for a draw, of samplers that move. Every array is of one type
    before and after, so that a stretch is compiled once."""
    sampler, density, _ = counted(name)
    sampler = sampler.prepare(density)
    first = sampler.first_level(density)
    blank = placed(
        begin(jax.random.key(0), 4, sampler.visits(density, pace)),
        Spread.checked(None, None, 4),
    )
    ways = [lambda run: sampler.advance(run, density, jnp.int32(2))]
    if sampler.moves is not None:
        ways.append(lambda run: sampler.draw(run, density, jnp.int32(0), jnp.int32(1)))
    start, run = jax.make_jaxpr(
        lambda run: sampler.start(run, density, first), return_shape=True
    )(blank)
    found = [places(start.jaxpr)]
    for way in ways:
        jaxpr, after = jax.make_jaxpr(way, return_shape=True)(run)
        found.append(places(jaxpr.jaxpr))
        assert types(after) == types(run)
    return found


@pytest.mark.parametrize(
    ("name", "pace"),
    [
        *((row, None) if isinstance(row, str) else row for row in PLACES),
        *((name, Pace.default(8)) for name in ("SMC", "SMC, scores")),
    ],
)
def test_a_loop_has_the_network_once(name, pace):
    """Whatever steps to a level, corrects the step and moves there: what compiling
    takes grows with every copy. A kernel that calls the density itself has places of
    its own, which shows that places are counted."""
    start, *ways = traced(name, pace)
    assert start == []
    if name in OPAQUE:
        assert len(ways[0]) == 1 + len(ways[1]) > 1
    else:
        assert all(len(way) == 1 and way[0] >= 1 for way in ways)


@pytest.mark.parametrize("name", [slow("SMC, tempered"), "SMC, denoised"])
def test_likelihoods_change_no_types(name):
    traced(name)


@pytest.mark.parametrize("name", ["MALA", "SMC", "SMC, scores"])
def test_starting_chains_evaluates_nothing(name):
    """So the networks are compiled once, in the loop over levels, which fills in what
    kernels cache."""
    sampler, density, calls = counted(name)
    sampler = sampler.prepare(density)
    blank = begin(jax.random.key(0), 2, sampler.visits(density, None))
    calls.reset()
    run = jax.jit(
        lambda run: sampler.start(run, density, sampler.first_level(density))
    )(blank)
    assert calls.run == 0
    assert np.isfinite(run.chains.position).all()
    assert np.isnan(run.chains.evaluation.score).all()
    assert (run.chains.evaluation.terms is None) == (
        name == "MALA"
    )  # only those who weigh read it


STATED = {
    "Ancestral, scores": (0, 1), "ULA, scores": (3, 1), "UHMC, scores": (7, 0), "MALA": (3, 0), "MALA, reverse": (3, 1),
    "HMC": (7, 1), "HMC, warm-up": (10, 0), "SMC, 2 steps": (3, 1), "SMC, scores": (1, 1),
    "SMC, scores, order 1": (1, 0), "SMC, density": (2, 0),
}  # fmt: skip
"""Evaluations at a level, and of its own that a step from level to level has."""
QUICK = ("SMC", "replicas", "Gibbs", "BlackJAX", "HMC, warm-up", "SMC, density")
"""Rows that count in ways of their own: a line integral's cost is held in
kernels/test_transitions.py."""
SLOW = [
    slow(name)
    for name in (*STATED, "line integral", "replicas, feynman_kac", "SMC, latents")
    if name not in QUICK
]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_evaluations_are_what_the_result_says(name):
    sampler, density, calls = counted(name)
    calls.reset()
    result = cp.infer(
        density, jax.random.key(0), num_chains=4, sampler=sampler, progress=False
    )
    replicas = sampler.num_levels if isinstance(sampler, cp.ReplicaExchange) else 1
    assert (
        replicas * calls.run == result.evaluations > 0
    )  # a call serves all chains at once, and all of their replicas
    assert result.about.blocks == (("x", "m") if name in BLOCKS else ())
    if name in STATED:
        (at, between), levels = STATED[name], sampler.first_level(density) + 1
        assert result.evaluations == at * levels + between * (levels - 1)


# ── frames ────────────────────────────────────────────────────────────────────────────

stacks: dict[str, list[tuple[str, str]]] = {}


class Traced(Exception):
    """All is noted: what would be compiled and run is not asked for."""


def noted(name: str) -> None:
    """Keeps the library's frames of where it is first called from inside of the loop
    over levels."""
    frames = [
        (frame.filename.split("/composeprob/")[-1], frame.name)
        for frame in traceback.extract_stack()[:-2]
    ]
    frames = [
        frame
        for frame in frames
        if frame[0].startswith(("runtime/", "samplers/", "kernels/"))
    ]
    if ("samplers/descent.py", "phase") in frames:
        stacks.setdefault(name, frames)
    if len(stacks) == 3:
        raise Traced


class Bowl(eqx.Module):
    def __call__(self, x, t):
        noted("score")
        return 0.5 * jnp.sum(x**2)


def test_few_frames_lie_between_a_call_and_its_accept_test_and_between_a_score_and_its_weight(
    monkeypatch,
):
    def watched(module, name, label):
        function = getattr(module, name)

        def call(*args, **kwargs):
            noted(label)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    watched(langevin, "metropolis", "accept")
    watched(weights, "incremental_log_weight", "weight")
    density = cp.compile(squared, learned(Bowl(), "energy", SCHEDULE, time="level"))
    with pytest.raises(Traced):
        cp.infer(density, jax.random.key(0), num_chains=256, progress=False)

    begin = stacks["accept"].index(("runtime/infer.py", "infer")) + 1
    accept = [*stacks["accept"][begin:], ("kernels/metropolis.py", "metropolis")]
    assert len(accept) <= 11, accept
    ways = [
        stacks[name][stacks[name].index(("samplers/descent.py", "phase")) :]
        for name in ("score", "weight")
    ]
    way = [*ways[0][1:], *ways[1], ("samplers/weights.py", "incremental_log_weight")]
    assert len(way) <= 14, way
    assert len({file for file, _ in way}) <= 7, sorted({file for file, _ in way})
