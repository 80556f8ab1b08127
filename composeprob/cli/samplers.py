"""The sampler that the options of `composeprob run` describe."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from composeprob.errors import InvalidValueError

if TYPE_CHECKING:
    from composeprob.kernels.base import Kernel
    from composeprob.kernels.line_integral import LogRatio
    from composeprob.samplers.sampler import Sampler


RULES = {"ula": "0.1·σ²", "uhmc": "0.2·σ"}
"""Default step sizes of the kernels that have no acceptance to adapt to."""


class KernelName(StrEnum):
    """Kernels that `run` offers."""

    hmc = "hmc"
    mala = "mala"
    uhmc = "uhmc"
    ula = "ula"


class LogRatioName(StrEnum):
    """How mala and hmc get the ratio that they test."""

    exact = "exact"
    line_integral = "line-integral"


class SamplerName(StrEnum):
    """Samplers that `run` offers."""

    auto = "auto"
    smc = "smc"
    annealed = "annealed"
    ancestral = "ancestral"


def make_sampler(
    sampler: SamplerName,
    kernel: KernelName | None,
    steps_per_level: int | None,
    step_size: str | None,
    num_leapfrog: int,
    damping: float,
    log_ratio: LogRatioName | None = None,
    num_points: int | None = None,
) -> Sampler | None:
    """Makes the sampler that the options describe; None leaves the choice to `infer`."""
    from composeprob import api

    options = {
        "--kernel": kernel,
        "--steps-per-level": steps_per_level,
        "--step-size": step_size,
        "--log-ratio": log_ratio,
        "--num-points": num_points,
    }
    tuned = [option for option, value in options.items() if value is not None]
    if sampler is SamplerName.ancestral:
        if tuned:
            raise InvalidValueError(
                f"--sampler ancestral runs no kernel, but {tuned[0]} was given.",
                fix=f"leave {tuned[0]} out, or choose --sampler smc or annealed.",
            )
        return api.Ancestral()
    if sampler is SamplerName.auto:
        if not tuned:
            return None
        if kernel is None:
            raise InvalidValueError(
                f"{tuned[0]} was given without the kernel that it is for.", fix="add --kernel mala, for example."
            )
    ratio = _log_ratio(kernel or KernelName.mala, log_ratio, num_points)
    moves = _kernel(kernel or KernelName.mala, step_size, num_leapfrog, damping, ratio)
    if sampler is SamplerName.smc:
        return api.SMC(moves, steps_per_level=1 if steps_per_level is None else steps_per_level)
    return api.AnnealedMCMC(moves, steps_per_level=3 if steps_per_level is None else steps_per_level)


def _log_ratio(kernel: KernelName, log_ratio: LogRatioName | None, num_points: int | None) -> LogRatio:
    """``"exact"``, or the line integral with Simpson's rule where it fits on that many points."""
    from composeprob import api

    adjusted = ("mala", "hmc")  # kernels with a Metropolis test
    if kernel.value not in adjusted and (log_ratio is not None or num_points is not None):
        option = "--num-points" if log_ratio is None else "--log-ratio"
        raise InvalidValueError(
            f"--kernel {kernel.value} has no accept test, but {option} was given.",
            fix=f"leave {option} out, or choose --kernel {' or '.join(adjusted)}.",
        )
    if log_ratio is LogRatioName.line_integral:
        points = 3 if num_points is None else num_points
        return api.LineIntegral(points, rule="simpson" if points % 2 and points > 1 else "trapezoid")
    if num_points is not None:
        raise InvalidValueError(
            "--num-points was given, but the exact log-ratio takes no points.", fix="add --log-ratio line-integral."
        )
    return "exact"


def _kernel(name: KernelName, step_size: str | None, num_leapfrog: int, damping: float, log_ratio: LogRatio) -> Kernel:
    from composeprob import api

    step: Any
    if step_size is None:
        rules = {"ula": lambda s: 0.1 * s.sigma**2, "uhmc": lambda s: 0.2 * s.sigma}
        step = rules.get(name.value) or api.Adaptive()
    elif step_size == "adaptive":
        step = api.Adaptive()
    else:
        try:
            step = float(step_size)
        except ValueError:
            raise InvalidValueError(
                f"--step-size is {step_size!r}.", fix="pass a number such as 0.01, or the word adaptive."
            ) from None
    match name:
        case KernelName.ula:
            return api.ULA(step)
        case KernelName.mala:
            return api.MALA(step, log_ratio=log_ratio)
        case KernelName.uhmc:
            return api.UHMC(step, num_leapfrog=num_leapfrog, damping=damping)
        case KernelName.hmc:
            return api.HMC(step, num_leapfrog=num_leapfrog, damping=damping, log_ratio=log_ratio)
