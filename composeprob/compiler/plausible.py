"""Whether a network is what its factor says: at the noisiest level its score must be that of noise, −x/σ².

One evaluation at a few draws of N(0, σ²) tells. The zoo's networks are off by 0.0015 to 0.023 of that score's size; one
that is plugged in wrongly by 1 (its output is small there: an x₀ or a velocity taken for the noise) or 2 (its sign).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.errors import InvalidValueError, NetworkError
from composeprob.factors.base import LeafFactor
from composeprob.factors.diffusion import Diffusion
from composeprob.factors.parameterizations import ENERGIES, SCORES, with_number
from composeprob.ir.nodes import Graph, Site
from composeprob.schedule import Noise, Schedule

TOLERANCE = 0.25
"""Relative error of the score at the noisiest level up to which a network fits: ten times the zoo's greatest, and that
of a right one for data whose signal is half of the noise there."""
CLEAN = ("x0", "v")
"""Parameterizations whose output is small beside the noise at the noisiest level."""
DOUBT = (
    "Check its parameterization and time, that its schedule is the one of the training, and that trained weights were "
    "loaded. At a log-SNR above −4 the data may show through the noise there: then end the schedule lower."
)
NUMBERS = 256
"""Entries of events that are looked at together, in at least `FEWEST` events and at most `MOST`."""
FEWEST, MOST = 4, 64
APART = 2.0
"""How much log-SNR lies between the two levels that are looked at where one does not tell."""


def check_plausible(graph: Graph) -> Graph:
    """Refuse levels that never reach noise, and networks that are plugged in wrongly where it is known how.

    Networks whose weights are not known yet, and those that latents choose, are not looked at.

    Returns:
        The graph, with doubts about networks whose score at the noisiest level is not that of noise, and of which it
        is not known what would fit.

    Raises:
        InvalidValueError: the noisiest level has more signal than noise.
        NetworkError: another parameterization, or the other sign, would fit.
    """
    assert graph.schedule is not None
    if graph.sites:
        _check_top(graph.schedule, graph.sites[0].where)
    doubts = []
    for group in graph.groups:
        factor = _diffusion(group.factor)
        if factor is None or group.latent is not None:
            continue
        own = graph.schedule.levels if group.own_noise is None else group.own_noise
        site = next(site for site in graph.sites if site.name == group.members[0].site)
        doubts.append(_check_network(factor, group.members[0].conditions, own, site))
    return replace(graph, doubts=tuple(doubt for doubt in doubts if doubt))


def _check_top(schedule: Schedule, where: str) -> None:
    log_snr = 2 * math.log(float(schedule.alpha[-1]) / float(schedule.sigma[-1]))
    if log_snr > 0:
        raise InvalidValueError(
            f"The noisiest level has more signal than noise: log-SNR {log_snr:.3g}, α {float(schedule.alpha[-1]):.3g} "
            f"and σ {float(schedule.sigma[-1]):.3g}. Sampling starts there from noise alone.",
            where=where,
            fix="end the schedule at a log-SNR of −6 or less. Of a list of betas, α is sqrt(alphas_cumprod) with "
            "alphas_cumprod = cumprod(1 − betas), and σ is sqrt(1 − alphas_cumprod).",
        )


def _diffusion(factor: LeafFactor) -> Diffusion | None:
    """The diffusion model in a leaf, which may be calibrated or weighted; None where there is none."""
    inner: Any = factor
    while not isinstance(inner, Diffusion) and hasattr(inner, "base"):
        inner = inner.base
    return inner if isinstance(inner, Diffusion) else None


def _check_network(factor: Diffusion, given: dict[str, Any], own: Noise, site: Site) -> str | None:
    """What is doubted of a network; None where it fits, or cannot be evaluated yet."""
    conditions = {name: given[name] for name in factor.names if name in given}
    arrays = [a for a in jax.tree.leaves((factor.network, conditions)) if hasattr(a, "shape")]
    if any(isinstance(a, (jax.core.Tracer, jax.ShapeDtypeStruct)) for a in arrays):
        return None
    declared, top = factor.parameterization, Seen.of(factor, conditions, own, -1)
    mistaken = not top.fits(declared)
    what = f"is off by {top.error(declared):.0%} of that of noise, −x/σ²"
    if declared in CLEAN and top.is_noise:
        # An x₀ or a velocity is small there; that of wide data may be as large as the noise, but not at two levels.
        log_snr = np.asarray(own.log_snr)
        second = int(np.abs(log_snr - log_snr[-1] - APART).argmin())
        mistaken = second < len(log_snr) - 1 and Seen.of(factor, conditions, own, second).is_noise
        what = "has nothing of the data in it: the network returns the noise"
    if not mistaken:
        return None
    found = (
        f"The network of factor '{factor.label}' does not do what parameterization={declared!r} says: at the noisiest "
        f"level (log-SNR {float(top.noise.log_snr):.3g}) its score {what}."
    )
    looks = top.alternatives(declared)
    if not looks:
        return f"{found} {DOUBT}"
    fix = f"the network looks like {', or '.join(looks)}. One that was never trained may look so too."
    raise NetworkError(found, where=site.where, fix=fix)


@dataclass(frozen=True)
class Seen:
    """A network's outputs at draws x of N(0, σ²) at one level, and the number ``beside`` them."""

    outputs: Array
    beside: Any
    x: Array
    noise: Noise

    @classmethod
    def of(cls, factor: Diffusion, conditions: dict[str, Any], own: Noise, level: int) -> Seen:
        """One evaluation of a factor's network, at a level of its own noise."""
        noise = Noise(*(jnp.asarray(a)[level] for a in (own.index, own.alpha, own.sigma)))
        x = _events(factor.event_shape, noise)
        return cls(*with_number(_outputs(factor, x, noise, conditions)), x, noise)

    @property
    def is_noise(self) -> bool:
        """Whether the network returns the noise, or its negative."""
        return self.fits("epsilon") or self.fits("epsilon", -1.0)

    def alternatives(self, declared: str) -> list[str]:
        """What the network looks like if it is not what was declared."""
        forms = [n for n in SCORES if n != declared and self.fits(n) and not (self.is_noise and n in CLEAN)]
        if not (self.is_noise and forms):
            forms += [n for n in ENERGIES if n != declared and self.fits(n)]
        looks = [f"parameterization={name!r}" for name in forms]
        if declared not in CLEAN and self.fits(declared, -1.0):
            looks.append("this parameterization with the opposite sign")
        return looks

    def fits(self, parameterization: str, sign: float = 1.0) -> bool:
        """Whether the outputs, times a sign, are what a right network would give up to `TOLERANCE`."""
        return self.error(parameterization, sign) <= TOLERANCE

    def error(self, parameterization: str, sign: float = 1.0) -> float:
        """How far the outputs are from those of a right network, relative to its size.

        For an energy that is the error of differences between events in log f, which should be those of −½‖x‖²/σ²;
        its gradient would cost more. Infinite where the outputs have another shape, or are not finite.
        """
        outputs, x, sigma = sign * self.outputs, self.x, self.noise.sigma
        wanted: Any
        if outputs.size != len(x) if parameterization == "energy" else outputs.shape != x.shape:
            return math.inf
        if parameterization in SCORES:
            found, wanted = SCORES[parameterization](outputs, x, self.noise), -x / sigma**2
        else:
            form = ENERGIES[parameterization]
            energy = jax.vmap(lambda output, event: jnp.sum(form(output, event)))(outputs, x)
            found, wanted = self.beside - energy / sigma, -0.5 * jnp.sum((x / sigma).reshape(len(x), -1) ** 2, 1)
            found, wanted = found - jnp.mean(found), wanted - jnp.mean(wanted)
        error = float(jnp.sqrt(jnp.mean((found - wanted) ** 2) / jnp.mean(wanted**2)))
        return error if math.isfinite(error) else math.inf


def _events(shape: tuple[int, ...], noise: Noise) -> Array:
    """A few draws of N(0, σ²)."""
    count = min(max(NUMBERS // max(math.prod(shape), 1), FEWEST), MOST)
    draws = np.random.default_rng(0).standard_normal((count, *shape))
    return jnp.asarray(float(noise.sigma) * draws, jnp.result_type(float))


@eqx.filter_jit
def _outputs(factor: Diffusion, x: Array, noise: Noise, conditions: dict[str, Array]) -> Any:
    return jax.vmap(lambda event: factor.output(event, noise, conditions))(x)
