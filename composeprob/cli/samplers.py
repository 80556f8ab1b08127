"""From the options of `composeprob run` to a sampler."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from composeprob.errors import InvalidValueError

RULES = {"ula": "0.1·σ²", "uhmc": "0.2·σ"}
"""Default step sizes of the kernels that have no acceptance to adapt to."""


class KernelName(StrEnum):
    """Kernels that `run` offers."""

    hmc = "hmc"
    mala = "mala"
    uhmc = "uhmc"
    ula = "ula"


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
) -> Any:
    """The sampler that the options describe; None leaves the choice to `infer`."""
    from composeprob import api

    tuned = [
        option
        for option, value in (("--kernel", kernel), ("--steps-per-level", steps_per_level), ("--step-size", step_size))
        if value is not None
    ]
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
                f"{tuned[0]} was given, but no kernel that it is meant for.", fix="add --kernel mala, for example."
            )
    moves = _kernel(kernel or KernelName.mala, step_size, num_leapfrog, damping)
    if sampler is SamplerName.smc:
        return api.SMC(moves, steps_per_level=1 if steps_per_level is None else steps_per_level)
    return api.AnnealedMCMC(moves, steps_per_level=3 if steps_per_level is None else steps_per_level)


def _kernel(name: KernelName, step_size: str | None, num_leapfrog: int, damping: float) -> Any:
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
            return api.MALA(step)
        case KernelName.uhmc:
            return api.UHMC(step, num_leapfrog=num_leapfrog, damping=damping)
        case KernelName.hmc:
            return api.HMC(step, num_leapfrog=num_leapfrog, damping=damping)
