"""A run is made of stretches of one compiled loop: they are one executable only if no array changes its type."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.runtime.compiled import advance
from composeprob.samplers.run import Pace, begin, placed
from composeprob.samplers.spread import Spread
from sampling_cases import both, normal, single

SCHEDULE = cp.Schedule.log_snr(6)
SCORES = cp.Diffusion(lambda x, t: x, SCHEDULE, event_shape=(2,))
ENERGY = normal([0.0, 0.0])


@cp.program
def measured(f, anneal):
    x = cp.sample("x", f)
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    cp.observe("y", dist.Normal(x[0], scale), jnp.array(0.3), anneal=anneal)


@cp.program
def seen(f):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x[0], 0.5), jnp.array(0.3), anneal="exact")


DENSITIES = {
    "scores": lambda: cp.compile(single, SCORES),
    "product of scores": lambda: cp.compile(both, SCORES, ENERGY),
    "energies": lambda: cp.compile(both, ENERGY, ENERGY),
    "mixture": lambda: cp.compile(single, cp.mixture([ENERGY, normal([1.0, 1.0])])),
    "tempered, with a latent": lambda: cp.compile(measured, ENERGY, "tempered"),
    "denoised scores": lambda: cp.compile(measured, SCORES, "denoised"),
    "exact": lambda: cp.compile(seen, ENERGY),
}
SAMPLERS = {
    "default": lambda d: cp.SMC() if "energy" in d.capabilities else cp.SMC(cp.UHMC(0.1)),
    "AnnealedMCMC": lambda d: cp.AnnealedMCMC(cp.ULA(0.1), 1),
    "ReplicaExchange": lambda d: cp.ReplicaExchange(cp.MALA(0.1)),
    "Ancestral": lambda d: cp.Ancestral(),
}
CASES = [(d, "default", False) for d in DENSITIES]
CASES += [(d, "AnnealedMCMC", False) for d in ("scores", "energies", "tempered, with a latent")]
CASES += [("energies", "ReplicaExchange", False), ("scores", "Ancestral", False)]
CASES += [(d, "default", True) for d in ("scores", "energies", "exact")]


def types(run):
    """Of every array in it, weakness included."""
    return jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), eqx.filter(run, lambda a: hasattr(a, "weak_type")))


@pytest.mark.parametrize(("name", "by", "adaptive"), CASES)
def test_a_stretch_leaves_all_types_as_they_are(name, by, adaptive):
    """Nothing is compiled for it, only traced."""
    density = DENSITIES[name]()
    sampler = SAMPLERS[by](density).prepare(density)
    first = sampler.first_level(density)
    visits = sampler.visits(density, Pace.default(8) if adaptive else None)
    run = placed(begin(jax.random.key(0), 8, visits), Spread.checked(None, None, 8))

    def stretches(sampler, run, density):
        begun = sampler.start(run, density, first)
        return begun, advance(sampler, begun, density, jnp.int32(2))

    begun, later = eqx.filter_eval_shape(stretches, sampler, run, density)
    assert types(begun) == types(later)
