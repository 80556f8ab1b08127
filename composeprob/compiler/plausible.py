"""Whether a network is what its factor declares: at the noisiest level its score must
be that of noise, −x/σ². One evaluation at a few draws of N(0, σ²) shows it. The zoo's
networks have an error of 0.0015 to 0.023 of that score; one that is plugged in wrongly
by 1 (its output is small there: an x₀ or a velocity taken for the noise) or 2 (its
sign)."""

from __future__ import annotations

import contextlib
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
from composeprob.compiler.once import once
from composeprob.errors import InvalidValueError, NetworkError
from composeprob.factors.diffusion import ENERGIES, SCORES, Diffusion, with_number
from composeprob.factors.precision import Rounded
from composeprob.ir.leaves import Graph, Site
from composeprob.schedule import Noise


def check_plausible(graph: Graph) -> Graph:
    """Refuse a noisiest level with more signal than noise, and networks that are
    plugged in wrongly where it is known how: where another time or schedule, another
    parameterization, or the other sign, would fit. The graph returned has doubts about
    others whose score at the noisiest level is not that of noise.

    Networks whose weights are not known yet, and those that latents choose, are not
    examined.
    """
    schedule = graph.levels
    alpha, sigma = float(schedule.alpha[-1]), float(schedule.sigma[-1])
    if graph.sites and alpha > sigma:
        raise InvalidValueError(
            f"The noisiest level has more signal than noise: log-SNR {2 * math.log(alpha / sigma):.3g}, α {alpha:.3g} "
            f"and σ {sigma:.3g}. Sampling starts there from noise alone.",
            where=graph.sites[0].where,
            fix="end the schedule at a log-SNR of −6 or less. Of a list of betas, α is sqrt(alphas_cumprod) with "
            "alphas_cumprod = cumprod(1 − betas), and σ is sqrt(1 − alphas_cumprod).",
        )
    levels = noise_on_host(
        np.arange(schedule.num_levels),
        np.asarray(schedule.alpha),
        np.asarray(schedule.sigma),
    )
    doubts = []
    for group in graph.groups:
        factor = group.factor.uncalibrated
        if not isinstance(factor, Diffusion) or group.latent is not None:
            continue
        noises = levels if group.own_noise is None else group.own_noise
        site = next(site for site in graph.sites if site.name == group.members[0].site)
        doubts.append(_check_network(factor, group.first, noises, site))
    return replace(graph, doubts=tuple(doubt for doubt in doubts if doubt))


def _check_network(
    factor: Diffusion, given: dict[str, Array], noises: Noise, site: Site
) -> str | None:
    """What is doubted of a network; None where it fits, or cannot be evaluated yet."""
    conditions = {name: given[name] for name in factor.names if name in given}
    arrays = [
        a for a in jax.tree.leaves((factor.network, conditions)) if hasattr(a, "shape")
    ]
    if any(isinstance(a, (jax.core.Tracer, jax.ShapeDtypeStruct)) for a in arrays):
        return None
    declared, top = (
        factor.parameterization,
        Outputs.at_level(factor, conditions, noises, -1),
    )
    mistaken = not top.fits(declared)
    what = f"differs by {top.error(declared):.0%} from that of noise, −x/σ²"
    if declared == "flow" and top.fits("epsilon", -1.0):
        mistaken = True
        what = "is that of noise, −x/σ², only by the levels: the network returns the noise with the opposite sign"
    if declared in ("x0", "v") and top.is_noise:
        # An x₀ or a velocity is small there; that of wide data may be as large as the
        # noise, but not at two levels.
        log_snr = 2 * np.log(noises.alpha / noises.sigma)
        second = min(
            int(np.abs(log_snr - log_snr[-1] - 2.0).argmin()), len(log_snr) - 2
        )
        mistaken = (
            second >= 0
            and Outputs.at_level(factor, conditions, noises, second).is_noise
        )
        what = "has nothing of the data in it: the network returns the noise"
    if (
        not mistaken
        and is_clean(declared)
        and top.change > max(tuning.OUTPUT_ERROR, 3 * top.tolerance)
    ):
        what = f"is that of noise, but the output changes from draw to draw by {top.change:.2g}, as at less noise"
        if not (times := other_times(factor, conditions, noises)):
            return None
    elif mistaken:
        # An x₀ or a v that hardly changes is one: with another t it is x, which other
        # parameterizations fit.
        steady = top.is_steady and not is_clean(declared)
        times = [] if steady else other_times(factor, conditions, noises)
    else:
        return None
    found = (
        f"The network of factor '{factor.label}' does not do what parameterization={declared!r} declares: at the "
        f"noisiest level (log-SNR {float(top.noise.log_snr):.3g}) its score {what}."
    )
    fitting = times or top.alternatives(declared)
    if not fitting or factor.traits.declared:
        return (
            f"{found} Check its parameterization and time, that its schedule is the one of the training, and that "
            "trained weights were loaded. At a log-SNR above −4 the data may show through the noise there: then end "
            "the schedule lower."
        )
    fix = f"the network looks like {', or '.join(fitting)}."
    raise NetworkError(found, where=site.where, fix=fix)


@dataclass(frozen=True)
class Outputs:
    """A network's outputs at draws x of N(0, σ²) at one level, and the number
    ``beside`` them; arrays of NumPy, where functions are for those of JAX, so that
    nothing is compiled."""

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
        """One evaluation of a factor's network, at a level of its own noise; by default
        with the factor's t."""
        dtype = np.dtype(jnp.result_type(float))
        real = np.issubdtype(np.asarray(noises.index).dtype, np.floating)
        index = np.dtype(jnp.result_type(float if real else int)).type(
            noises.index[level]
        )
        noise = noise_on_host(
            index, dtype.type(noises.alpha[level]), dtype.type(noises.sigma[level])
        )
        # About 256 entries in all, of 4 to 64 events.
        count = min(max(256 // max(math.prod(factor.event_shape), 1), 4), 64)
        draws = np.random.default_rng(0).standard_normal((count, *factor.event_shape))
        x = (noise.sigma * draws).astype(dtype)
        time = (
            factor.time_at(noise)
            if t is None
            else np.dtype(jnp.result_type(type(t))).type(t)
        )
        values, beside = with_number(_evaluate(factor, x, time, conditions))
        return cls(np.asarray(values), np.asarray(beside), x, noise)

    @property
    def is_noise(self) -> bool:
        """Whether the network returns the noise, or its negative."""
        return self.fits("epsilon") or self.fits("epsilon", -1.0)

    @property
    def change(self) -> float:
        """Standard deviation from draw to draw."""
        return float(np.sqrt(np.mean(np.var(self.values, axis=0))))

    @property
    def is_steady(self) -> bool:
        """Whether the outputs hardly change from draw to draw, as x₀ and v do there,
        and are not 0 either."""
        return bool(np.any(self.values)) and self.change <= self.tolerance

    @property
    def tolerance(self) -> float:
        """The largest `change` of an x₀ or a v of data of about unit size."""
        return max(tuning.OUTPUT_SPREAD, 3 * float(self.noise.alpha / self.noise.sigma))

    def alternatives(self, declared: str) -> list[str]:
        """What the network looks like if it is not what was declared."""
        # Whatever is small beside x/σ² fits these forms, also a network that was never
        # trained: but that is not steady.
        clean = tuple(filter(is_clean, SCORES))
        small = np.mean(self.values**2) < 0.1
        unsaid: tuple[str, ...] = (
            () if self.is_steady else (*clean, "energy_residual") if small else clean
        )
        if not self.is_noise:
            unsaid += (
                "flow",
            )  # α·u is small beside x whatever u is: there any output fits
        forms = [
            n for n in SCORES if n != declared and n not in unsaid and self.fits(n)
        ]
        # For a score energies are not tried: they fit many fields, such as x turned
        # about the origin.
        if (declared in ENERGIES or self.is_steady) and not (self.is_noise and forms):
            forms += [
                n
                for n in ENERGIES
                if n != declared and n not in unsaid and self.fits(n)
            ]
        shown = (
            "epsilon" if declared == "flow" else declared
        )  # the score of v is −x/σ² there, whatever its sign
        fitting = [f"parameterization={name!r}" for name in forms]
        if not is_clean(declared) and self.fits(shown, -1.0):
            fitting.append("this parameterization with the opposite sign")
        return fitting

    def fits(self, parameterization: str, sign: float = 1.0) -> bool:
        """Whether the outputs, times a sign, are what a right network would give up to
        `OUTPUT_ERROR`."""
        return self.error(parameterization, sign) <= tuning.OUTPUT_ERROR

    def error(self, parameterization: str, sign: float = 1.0) -> float:
        """How far the outputs, times a sign, are from those of a right network,
        relative to its size: as scores, or of energies by the differences of log f
        between events, as their gradients would show more and cost more.

        Infinite where they have another shape, or are not finite.
        """
        values, x, sigma = sign * self.values, self.x, self.noise.sigma
        if (
            values.size != len(x)
            if parameterization == "energy"
            else values.shape != x.shape
        ):
            return math.inf
        if parameterization in SCORES:
            found, wanted = (
                np.asarray(SCORES[parameterization](values, x, self.noise)),
                np.asarray(-x / sigma**2),
            )
        else:
            energy = (
                values
                if parameterization == "energy"
                else ENERGIES[parameterization](values, x)
            )
            found = self.beside - np.sum(energy.reshape(len(x), -1), 1) / sigma
            wanted = -0.5 * np.sum((x / sigma).reshape(len(x), -1) ** 2, 1)
            found, wanted = found - found.mean(), wanted - wanted.mean()
        error = float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))
        return error if math.isfinite(error) else math.inf


def is_clean(parameterization: str) -> bool:
    """Whether a network's output is small beside the noise at the noisiest level."""
    return parameterization in ("x0", "v")


def other_times(
    factor: Diffusion, conditions: dict[str, Array], noises: Noise
) -> list[str]:
    """Which other numbers for t, at the noisiest level, make a network what its factor
    declares: the time of another convention, or the last level of another schedule.
    Those that fit best; none where none fits."""
    declared, last = factor.parameterization, len(noises.alpha) - 1
    lengths = dict.fromkeys(
        (last + 1, 100, 200, 500, 1000, 2000, 4000)
    )  # the usual ones
    log_snr, noise = (
        2 * np.log(noises.alpha / noises.sigma),
        noises.sigma / noises.alpha,
    )
    conventions: list[dict[float, str]] = [
        {
            n - 1: f"time='level' with the schedule of its training, of {n} levels"
            for n in lengths
        },
        {float(log_snr[-1]): "time='log_snr'"},
        {float(noise[-1]): "time='sigma'"},
    ]
    found = list[tuple[float, str]]()
    for times in conventions:
        fitting = dict[str, float]()
        for t, meant in times.items():
            with contextlib.suppress(
                Exception
            ):  # of an embedding that takes no such number
                outputs = Outputs.at_level(factor, conditions, noises, -1, t)
                if outputs.fits(declared) and (
                    not is_clean(declared) or outputs.is_steady
                ):
                    fitting[meant] = round(
                        outputs.change
                        if is_clean(declared)
                        else outputs.error(declared),
                        3,
                    )
        if fitting:
            meant = min(fitting, key=fitting.__getitem__)
            found.append((fitting[meant], meant))
    return [meant for error, meant in found if error <= min(found)[0] + 0.01]


@once
def _evaluate(
    factor: Diffusion, x: Array, t: Array, conditions: dict[str, Array]
) -> PyTree[Array]:
    # Rounded products are not what is examined, and no processor but an accelerator may
    # have them.
    network = (
        factor.network.network
        if isinstance(factor.network, Rounded)
        else factor.network
    )
    return jax.vmap(lambda event: network(event, t, **conditions))(x)
