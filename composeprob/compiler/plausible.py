"""Check that a network is what its factor declares: at the noisiest level its score
must be that of noise, −x/σ².

One evaluation at a few draws of N(0, σ²) shows it. The zoo's networks have an error of
0.0015 to 0.023 of that score. A network that is plugged in wrongly has an error of 1,
where its output is small there (an x₀ or a velocity taken for the noise), or of 2,
where its sign is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.compiler.align import noise_on_host
from composeprob.density.once import once
from composeprob.errors import InvalidValueError, NetworkError
from composeprob.factors.diffusion import (
    ENERGIES,
    SCORES,
    TIME_FIRST,
    Diffusion,
    time_first,
    with_number,
)
from composeprob.factors.precision import Rounded
from composeprob.ir.leaves import Graph, Site
from composeprob.schedule import Noise


def check_plausible(graph: Graph) -> Graph:
    """Refuse a noisiest level with more signal than noise, and networks that another
    time, schedule, parameterization or sign would fit.

    The graph returned flags other networks whose score at the noisiest level is not
    that of noise.

    Networks whose weights are not known yet, and those that latents choose, are not
    examined.
    """
    schedule = graph.levels
    alpha = float(schedule.alpha[-1])
    sigma = float(schedule.sigma[-1])
    if graph.sites and alpha > sigma:
        log_snr = 2 * math.log(alpha / sigma)
        raise InvalidValueError(
            f"The noisiest level has more signal than noise: log-SNR {log_snr:.3g}, "
            f"α {alpha:.3g} and σ {sigma:.3g}. Sampling starts there from noise alone.",
            where=graph.sites[0].where,
            fix="end the schedule at a log-SNR of −6 or less. Of a list of betas, α is "
            "sqrt(alphas_cumprod) with alphas_cumprod = cumprod(1 − betas), and σ is "
            "sqrt(1 − alphas_cumprod).",
        )
    levels = noise_on_host(
        np.arange(schedule.num_levels),
        np.asarray(schedule.alpha),
        np.asarray(schedule.sigma),
    )
    sites = {site.name: site for site in graph.sites}
    doubts = []
    for group in graph.groups:
        factor = group.factor.uncalibrated
        if not isinstance(factor, Diffusion) or group.latent is not None:
            continue
        noises = levels if group.own_noise is None else group.own_noise
        site = sites[group.members[0].site]
        doubt = _check_network(factor, group.first, noises, site)
        if doubt:
            doubts.append(doubt)
    return replace(graph, doubts=tuple(doubts))


def _check_network(
    factor: Diffusion, given: dict[str, Array], noises: Noise, site: Site
) -> str | None:
    """The sentence that flags a network; None if it fits its declaration, or cannot be
    evaluated yet."""
    conditions = {name: given[name] for name in factor.names if name in given}
    for leaf in jax.tree.leaves((factor.network, conditions)):
        if isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            return None
    declared = factor.parameterization
    top = Outputs.at_level(factor, conditions, noises, -1)
    difference = _difference(factor, conditions, noises, top)
    times: list[str] = []
    if difference is not None:
        # An x₀ or a v that hardly changes is one: with another t it is x, which other
        # parameterizations fit, but not a score, whose −x/σ² hardly changes either.
        if is_clean(declared) or declared == "score" or not top.is_steady:
            times = other_times(factor, conditions, noises)
    elif is_clean(declared) and top.change > max(
        tuning.OUTPUT_ERROR, 3 * top.tolerance
    ):
        difference = (
            "is that of noise, but the output changes from draw to draw by "
            f"{top.change:.2g}, as at less noise"
        )
        times = other_times(factor, conditions, noises)
        if not times:
            return None
    else:
        return None
    sentence = (
        f"The network of factor '{factor.label}' does not do what "
        f"parameterization={declared!r} declares: at the noisiest level (log-SNR "
        f"{float(top.noise.log_snr):.3g}) its score {difference}."
    )
    if not times and _fits_with_time_first(factor, conditions, noises):
        raise NetworkError(
            f"{sentence} With its arguments in the order (t, x) it is that of noise.",
            where=site.where,
            fix=TIME_FIRST,
        )
    fitting = times or top.alternatives(declared)
    if not fitting or factor.traits.declared:
        return (
            f"{sentence} Check its parameterization and time, that its schedule is the "
            "one of the training, and that trained weights were loaded. At a log-SNR "
            "above −4 the data may show through the noise there: then end the schedule "
            "lower."
        )
    fix = f"the network looks like {', or '.join(fitting)}."
    raise NetworkError(sentence, where=site.where, fix=fix)


def _difference(
    factor: Diffusion, conditions: dict[str, Array], noises: Noise, top: Outputs
) -> str | None:
    """The difference between a network's score at the noisiest level and that of noise,
    in words; None where there is none."""
    declared = factor.parameterization
    if declared == "flow" and top.fits("epsilon", -1.0):
        # With α·u small beside x any output gives the score of noise.
        return (
            "is that of noise, −x/σ², only because of the levels: the network returns "
            "the noise with the opposite sign"
        )
    if is_clean(declared) and top.is_noise:
        # An x₀ or a velocity is small there; that of wide data may be as large as the
        # noise, but not at two levels.
        log_snr = 2 * np.log(noises.alpha / noises.sigma)
        nearest = int(np.abs(log_snr - log_snr[-1] - 2.0).argmin())
        second = min(nearest, len(log_snr) - 2)
        if second < 0:
            return None
        if Outputs.at_level(factor, conditions, noises, second).is_noise:
            return "has nothing of the data in it: the network returns the noise"
        return None
    if not top.fits(declared):
        return f"differs by {top.error(declared):.0%} from that of noise, −x/σ²"
    return None


@dataclass(frozen=True)
class Outputs:
    """A network's outputs at draws of N(0, σ²) at one level. Arrays are NumPy's, though
    functions of JAX take them, so that nothing is compiled.

    Attributes:
        values: the outputs, an event for each draw.
        beside: the numbers that a network returns beside them; see `with_number`.
        x: the draws.
        noise: the level's noise.
    """

    values: Any
    beside: Any
    x: Any
    noise: Noise

    @classmethod
    def at_level(
        cls,
        factor: Diffusion,
        conditions: dict[str, Array],
        noises: Noise,
        level: int,
        t: float | None = None,
    ) -> Outputs:
        """Evaluate a factor's network once, at one of the factor's own levels; ``t``
        replaces the time of that level."""
        dtype = np.dtype(jnp.result_type(float))
        real = np.issubdtype(np.asarray(noises.index).dtype, np.floating)
        index_type = float if real else int
        noise = noise_on_host(
            np.dtype(jnp.result_type(index_type)).type(noises.index[level]),
            dtype.type(noises.alpha[level]),
            dtype.type(noises.sigma[level]),
        )
        # About 256 entries in all, of 4 to 64 events.
        count = min(max(256 // max(math.prod(factor.event_shape), 1), 4), 64)
        draws = np.random.default_rng(0).standard_normal((count, *factor.event_shape))
        x = (noise.sigma * draws).astype(dtype)
        if t is None:
            time = factor.time_at(noise)
        else:
            time = np.dtype(jnp.result_type(type(t))).type(t)
        values, beside = with_number(_evaluate(factor, x, time, conditions))
        return cls(np.asarray(values), np.asarray(beside), x, noise)

    @property
    def is_noise(self) -> bool:
        """True if the network returns the noise, or its negative."""
        return self.fits("epsilon") or self.fits("epsilon", -1.0)

    @property
    def change(self) -> float:
        """Standard deviation from draw to draw."""
        return float(np.sqrt(np.mean(np.var(self.values, axis=0))))

    @property
    def is_steady(self) -> bool:
        """True if the outputs are not 0, and hardly change from draw to draw, as x₀ and
        v do at the noisiest level."""
        return bool(np.any(self.values)) and self.change <= self.tolerance

    @property
    def tolerance(self) -> float:
        """The largest `change` of an x₀ or v network, for data of about unit size."""
        return max(tuning.OUTPUT_SPREAD, 3 * float(self.noise.alpha / self.noise.sigma))

    def alternatives(self, declared: str) -> list[str]:
        """The parameterizations that the outputs fit, if they are not what was
        declared."""
        candidates = self._candidates(declared)
        forms = [name for name in candidates if name in SCORES and self.fits(name)]
        # For a score energies are not tried: they fit many fields, such as x turned
        # about the origin.
        energies_fit = declared in ENERGIES or self.is_steady
        if energies_fit and not (self.is_noise and forms):
            forms += [
                name for name in candidates if name in ENERGIES and self.fits(name)
            ]
        fitting = [f"parameterization={name!r}" for name in forms]
        # The score of a flow is −x/σ² there, whatever its sign.
        shown = "epsilon" if declared == "flow" else declared
        if not is_clean(declared) and self.fits(shown, -1.0):
            fitting.append("this parameterization with the opposite sign")
        return fitting

    def _candidates(self, declared: str) -> list[str]:
        """The parameterizations for which a fit is evidence: scores, then energies."""
        excluded = {declared}
        # Any output that is small beside x/σ² fits these forms, also that of a network
        # that was never trained; but that is not steady.
        if not self.is_steady:
            excluded.update(filter(is_clean, SCORES))
            if np.mean(self.values**2) < 0.1:
                excluded.add("energy_residual")
        # α·u is small beside x whatever u is: a flow fits any output there.
        if not self.is_noise:
            excluded.add("flow")
        return [name for name in (*SCORES, *ENERGIES) if name not in excluded]

    def fits(self, parameterization: str, sign: float = 1.0) -> bool:
        """Return whether the outputs, times a sign, are those of a right network up to
        `OUTPUT_ERROR`."""
        return self.error(parameterization, sign) <= tuning.OUTPUT_ERROR

    def error(self, parameterization: str, sign: float = 1.0) -> float:
        """The relative distance of the outputs, times a sign, from those of a right
        network.

        Scores are compared as they are. Energies are compared by differences of log f
        between events; their gradients would show more, but cost more.

        Infinite where they have another shape, or are not finite.
        """
        values = sign * self.values
        x = self.x
        sigma = self.noise.sigma
        fitting_shape = values.shape == x.shape
        if parameterization == "energy":
            fitting_shape = values.size == len(x)
        if not fitting_shape:
            return math.inf
        if parameterization in SCORES:
            actual = np.asarray(SCORES[parameterization](values, x, self.noise))
            wanted = np.asarray(-x / sigma**2)
        else:
            energy = values
            if parameterization != "energy":
                energy = ENERGIES[parameterization](values, x)
            log_f = self.beside - np.sum(energy.reshape(len(x), -1), 1) / sigma
            log_normal = -0.5 * np.sum((x / sigma).reshape(len(x), -1) ** 2, 1)
            # An energy is known up to a constant.
            actual = log_f - log_f.mean()
            wanted = log_normal - log_normal.mean()
        error = float(np.sqrt(np.mean((actual - wanted) ** 2) / np.mean(wanted**2)))
        return error if math.isfinite(error) else math.inf


def is_clean(parameterization: str) -> bool:
    """Return whether a network's output is small beside the noise at the noisiest
    level."""
    return parameterization in ("x0", "v")


def other_times(
    factor: Diffusion, conditions: dict[str, Array], noises: Noise
) -> list[str]:
    """The values of t, at the noisiest level, under which a network does what its
    factor declares.

    They are times of another convention, or the last level of another schedule. Those
    that fit best are returned; none if none fits.
    """
    last = len(noises.alpha) - 1
    log_snr = 2 * np.log(noises.alpha / noises.sigma)
    noise = noises.sigma / noises.alpha
    # The usual numbers of levels, and the factor's own.
    lengths = dict.fromkeys((last + 1, 100, 200, 500, 1000, 2000, 4000))
    # Whole numbers stay whole: a network may index a table by its level.
    by_level: dict[float, str] = {
        n - 1: f"time='level' with the schedule of its training, of {n} levels"
        for n in lengths
    }
    conventions = [
        by_level,
        {float(log_snr[-1]): "time='log_snr'"},
        {float(noise[-1]): "time='sigma'"},
    ]
    # A log-SNR of 1, or a σ/α, is a time of its own. At level 1, of little noise, an ε
    # may look like an x₀.
    by_index = factor.time in ("level", "real_level")
    if by_index and not is_clean(factor.parameterization):
        share = f"time='real_level' with lambda x, t: network(x, t / {last})"
        conventions.append({1.0: f"one of a time from 0 to 1, which is {share}"})
    best_fits: list[tuple[float, str]] = []
    for times in conventions:
        errors: dict[str, float] = {}
        for t, meaning in times.items():
            error = _error_at_time(factor, conditions, noises, t)
            if error is not None:
                errors[meaning] = round(error, 3)
        if errors:
            meaning = min(errors, key=errors.__getitem__)
            best_fits.append((errors[meaning], meaning))
    return [
        meaning for error, meaning in best_fits if error <= min(best_fits)[0] + 0.01
    ]


def _fits_with_time_first(
    factor: Diffusion, conditions: dict[str, Array], noises: Noise
) -> bool:
    """Return whether the network does what its factor declares when it is called as
    network(t, x). Any small output fits an x₀ or a v, so that nothing is known there.
    """
    if is_clean(factor.parameterization):
        return False
    try:
        outputs = Outputs.at_level(time_first(factor), conditions, noises, -1)
    except Exception:  # the user's function may not take them in this order
        return False
    return outputs.fits(factor.parameterization)


def _error_at_time(
    factor: Diffusion, conditions: dict[str, Array], noises: Noise, t: float
) -> float | None:
    """The misfit of a network's outputs at the noisiest level with another t; None
    where they do not fit the declaration, or t cannot be evaluated."""
    declared = factor.parameterization
    try:
        outputs = Outputs.at_level(factor, conditions, noises, -1, t)
        if not outputs.fits(declared):
            return None
        # Any small output fits an x₀ or a v; a trained one is steady besides.
        if not is_clean(declared):
            return outputs.error(declared)
        return outputs.change if outputs.is_steady else None
    except Exception:  # an embedding may not take such a number
        return None


@once
def _evaluate(
    factor: Diffusion, x: Array, t: Array, conditions: dict[str, Array]
) -> PyTree[Array]:
    """The outputs of a factor's network, an event for each row of x."""
    # Rounding is not examined, and only accelerators may have rounded products.
    network = factor.network
    if isinstance(network, Rounded):
        network = network.network
    return jax.vmap(lambda event: network(event, t, **conditions))(x)
