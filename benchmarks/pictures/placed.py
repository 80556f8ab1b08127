"""Part (a): are all objects where they were asked for? p(x)·Πᵢ (p(x | placeᵢ)/p(x))^w
for places of true scenes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import composeprob as cp
from composeprob.models.worlds import detector, shapes
from composeprob.schedule import Noise

from .cells import Cell, share
from .drawn import draw

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

MODEL = "shapes-position"
PLACES_KEY = 5
MOST = 5
SHOWN = 8
CHAINS = {"SMC": 8}
"""Chains of one scene where it is not one; one of them is judged, drawn by its
weight."""
DEFAULT = "default"
"""The choice of `cp.infer` for few chains, run for the most objects only. Its chains
are independent: one of them is judged."""
STEPS = 1
"""Kernel steps at a level, after the reverse step."""
LANGEVIN, LEAPFROG = 0.08, 0.2
"""Steps in units of σ² and of σ, at which MALA and HMC accept 0.6 to 0.9 of the
moves."""


def langevin(schedule: Any) -> Any:
    return LANGEVIN * schedule.sigma**2


def leapfrog(schedule: Any) -> Any:
    return LEAPFROG * schedule.sigma


def samplers(form: str) -> dict[str, Any]:
    """The samplers, for the energy; or for the score alone those to which an energy
    makes a difference: MALA and HMC integrate the score along a move, and SMC makes
    none between its reverse steps."""
    test = {} if form == "energy" else {"log_ratio": cp.LineIntegral(3, rule="simpson")}
    moves = cp.MALA(langevin) if form == "energy" else None

    def annealed(kernel: Any) -> Any:
        return cp.AnnealedMCMC(kernel, STEPS, reverse_step=FIRST_ORDER)

    tested = {
        "MALA": annealed(cp.MALA(langevin, **test)),
        "HMC": annealed(cp.HMC(leapfrog, 3, **test)),
        "SMC": cp.SMC(moves, step=cp.ReverseStep(order=1)),
    }
    untested = {
        "reverse": cp.Ancestral(),
        "ULA": annealed(cp.ULA(langevin)),
        "U-HMC": annealed(cp.UHMC(leapfrog, 3)),
    }
    return untested | tested | {DEFAULT: None} if form == "energy" else tested


@cp.program
def scene(scenes: Any, places: Any, strength: float) -> Any:
    asked = [(scenes.given(position=place) / scenes) ** strength for place in places]
    return cp.sample("x", cp.product(scenes, *asked))


class Score(eqx.Module):
    """A network that returns the score of an energy, and not the energy."""

    energy: Any

    def __call__(self, x: Any, t: Any, position: Any) -> Any:
        noise = Noise(
            jnp.zeros((), int),
            jnp.sqrt(jax.nn.sigmoid(t)),
            jnp.sqrt(jax.nn.sigmoid(-t)),
        )
        return self.energy.evaluate(x, noise, {"position": position})[1]


def score_of(model: Any) -> Any:
    """The same scores without their energy: what differs is how a move is tested, and
    nothing else."""
    return cp.Diffusion(
        Score(model),
        model.schedule,
        event_shape=model.event_shape,
        parameterization="score",
        time="log_snr",
        conditions=model.defaults,
        log_snr_range=model.log_snr_range,
        label=model.label,
    )


FORMS = {"energy": lambda model: model, "score": score_of}


def cells(scenes: int, strength: float) -> Iterator[Cell]:
    """All cells, those with few objects first."""
    for objects in range(1, MOST + 1):
        for form, of in FORMS.items():
            for name in samplers(form):
                if name == DEFAULT and objects < MOST:
                    continue
                settings = {
                    "objects": objects,
                    "form": form,
                    "sampler": name,
                    "w": strength,
                }

                def run(objects=objects, form=form, of=of, name=name) -> Any:
                    chains = CHAINS.get(name, 1)
                    return measure(
                        of(cp.load(MODEL)),
                        objects,
                        samplers(form)[name],
                        chains,
                        scenes,
                        strength,
                    )

                yield Cell("placed", settings, run)


def measure(
    model: Any, objects: int, sampler: Any, chains: int, scenes: int, strength: float
) -> tuple[dict[str, Any], np.ndarray]:
    """One cell: as many scenes, each with places of its own, the same places for every
    sampler."""
    true = jax.jit(lambda key: shapes.draw(key, scenes, fewest=objects, most=objects))(
        jax.random.key(PLACES_KEY)
    )
    places = np.asarray(true.centres)[:, :objects]
    drawn = draw(
        (cp.compile(scene, model, asked, strength) for asked in places), sampler, chains
    )
    found = detector.detect(drawn.images)
    near = detector.placed(found, places)
    measured = {
        "scenes": scenes,
        "all_placed": share(near.all(1)),
        "each_placed": float(near.mean()),
        "found": float(found.count.mean()),
        "acceptance": drawn.acceptance,
        "evaluations": drawn.evaluations,
        "seconds_a_scene": round(drawn.seconds, 2),
    }
    return measured, drawn.images[:SHOWN]
