"""Whether a network is what its factor declares: at the noisiest level its score must be that of noise, −x/σ².

One evaluation at a few draws of N(0, σ²) shows it. The zoo's networks have an error of 0.0015 to 0.023 of that score;
one that is plugged in wrongly by 1 (its output is small there: an x₀ or a velocity taken for the noise) or 2 (its
sign).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import Array

from composeprob import tuning
from composeprob.compiler.outputs import Outputs, is_clean, other_times
from composeprob.errors import InvalidValueError, NetworkError
from composeprob.factors.diffusion import Diffusion
from composeprob.ir.nodes import Graph, Site
from composeprob.schedule import Noise, Schedule


def check_plausible(graph: Graph) -> Graph:
    """Refuse levels that never reach noise, and networks that are plugged in wrongly where it is known how.

    Networks whose weights are not known yet, and those that latents choose, are not examined.

    Returns:
        The graph, with doubts about networks whose score at the noisiest level is not that of noise, and of which it
        is not known what would fit.

    Raises:
        InvalidValueError: the noisiest level has more signal than noise.
        NetworkError: another time or schedule, another parameterization, or the other sign, would fit.
    """
    assert graph.schedule is not None
    if graph.sites:
        _check_top(graph.schedule, graph.sites[0].where)
    schedule = graph.schedule
    host: Any = (np.arange(schedule.num_levels), np.asarray(schedule.alpha), np.asarray(schedule.sigma))
    levels = Noise(*host)
    doubts = []
    for group in graph.groups:
        factor = group.factor.core
        if not isinstance(factor, Diffusion) or group.latent is not None:
            continue
        noises = levels if group.own_noise is None else group.own_noise
        site = next(site for site in graph.sites if site.name == group.members[0].site)
        member = group.members[0]
        given = {name: value[(0,) * len(member.plates)] for name, value in member.conditions.items()}
        doubts.append(_check_network(factor, given, noises, site))
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


def _check_network(factor: Diffusion, given: dict[str, Array], noises: Noise, site: Site) -> str | None:
    """What is doubted of a network; None where it fits, or cannot be evaluated yet."""
    conditions = {name: given[name] for name in factor.names if name in given}
    arrays = [a for a in jax.tree.leaves((factor.network, conditions)) if hasattr(a, "shape")]
    if any(isinstance(a, (jax.core.Tracer, jax.ShapeDtypeStruct)) for a in arrays):
        return None
    declared, top = factor.parameterization, Outputs.at_level(factor, conditions, noises, -1)
    mistaken = not top.fits(declared)
    what = f"differs by {top.error(declared):.0%} from that of noise, −x/σ²"
    if declared == "flow" and top.fits("epsilon", -1.0):
        mistaken = True
        what = "is that of noise, −x/σ², only by the levels: the network returns the noise with the opposite sign"
    if declared in ("x0", "v") and top.is_noise:
        # An x₀ or a velocity is small there; that of wide data may be as large as the noise, but not at two levels.
        log_snr = 2 * np.log(noises.alpha / noises.sigma)
        second = min(int(np.abs(log_snr - log_snr[-1] - 2.0).argmin()), len(log_snr) - 2)
        mistaken = second >= 0 and Outputs.at_level(factor, conditions, noises, second).is_noise
        what = "has nothing of the data in it: the network returns the noise"
    if not mistaken and is_clean(declared) and top.change > max(tuning.OUTPUT_ERROR, 3 * top.tolerance):
        what = f"is that of noise, but the output changes from draw to draw by {top.change:.2g}, as at less noise"
        if not (times := other_times(factor, conditions, noises)):
            return None
    elif mistaken:
        # An x₀ or a v that hardly changes is one: with another t it is x, which other parameterizations fit.
        steady = top.is_steady and not is_clean(declared)
        times = [] if steady else other_times(factor, conditions, noises)
    else:
        return None
    found = (
        f"The network of factor '{factor.label}' does not do what parameterization={declared!r} declares: at the "
        f"noisiest level (log-SNR {float(top.noise.log_snr):.3g}) its score {what}."
    )
    fitting = times or top.alternatives(declared)
    if not fitting or factor.declared:
        return (
            f"{found} Check its parameterization and time, that its schedule is the one of the training, and that "
            "trained weights were loaded. At a log-SNR above −4 the data may show through the noise there: then end "
            "the schedule lower."
        )
    fix = f"the network looks like {', or '.join(fitting)}."
    raise NetworkError(found, where=site.where, fix=fix)
