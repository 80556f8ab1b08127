"""How far it is from a call to what it does: frames of the engine on the way to an accept test and to a weight."""

from __future__ import annotations

import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import composeprob as cp
from composeprob.kernels import langevin
from composeprob.samplers import weights
from sampling_cases import squared

stacks: dict[str, list[tuple[str, str]]] = {}


class Traced(Exception):
    """All is noted: what would be compiled and run is not asked for."""


def noted(name: str) -> None:
    """Keeps the library's frames of where it is first called from inside of the loop over levels."""
    frames = [(frame.filename.split("/composeprob/")[-1], frame.name) for frame in traceback.extract_stack()[:-2]]
    frames = [frame for frame in frames if frame[0].startswith(("runtime/", "samplers/", "kernels/"))]
    if ("samplers/descent.py", "phase") in frames:
        stacks.setdefault(name, frames)
    if len(stacks) == 3:
        raise Traced


class Bowl(eqx.Module):
    def __call__(self, x, t):
        noted("score")
        return 0.5 * jnp.sum(x**2)


def test_few_frames_lie_between_a_call_and_its_accept_test_and_between_a_score_and_its_weight(monkeypatch):
    def watched(module, name, label):
        function = getattr(module, name)

        def call(*args, **kwargs):
            noted(label)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    watched(langevin, "metropolis", "accept")
    watched(weights, "incremental_log_weight", "weight")
    f = cp.Diffusion(Bowl(), cp.Schedule.log_snr(12), event_shape=(2,), parameterization="energy")
    density = cp.compile(squared, f)
    with pytest.raises(Traced):
        cp.infer(density, jax.random.key(0), num_chains=256, progress=False)

    begin = stacks["accept"].index(("runtime/infer.py", "infer")) + 1
    accept = [*stacks["accept"][begin:], ("kernels/metropolis.py", "metropolis")]
    assert len(accept) <= 11, accept
    ways = [stacks[name][stacks[name].index(("samplers/descent.py", "phase")) :] for name in ("score", "weight")]
    way = [*ways[0][1:], *ways[1], ("samplers/weights.py", "incremental_log_weight")]
    assert len(way) <= 14, way
    assert len({file for file, _ in way}) <= 7, sorted({file for file, _ in way})
