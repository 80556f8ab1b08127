"""The levels that a network was trained on, and what its output means, from a scheduler_config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np

from composeprob.errors import LoadError
from composeprob.json_data import JSONObject
from composeprob.pretrained.config import unsupported
from composeprob.schedule import Schedule


class Family(Enum):
    """Classes of schedulers that have levels of one kind."""

    BETAS = (
        "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
        "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler", "HeunDiscreteScheduler", "IPNDMScheduler", "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler",
        "UniPCMultistepScheduler",
    )  # fmt: skip
    """Ways to sample from levels that betas give: of them only the betas matter here."""
    FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
    EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
    VE = ("ScoreSdeVeScheduler",)
    GUIDED = ("GuidedDiffusionScheduler",)
    """Of a folder that `convert` wrote: guided-diffusion's own options."""


@dataclass(frozen=True)
class Trained:
    """What a network was trained for.

    Attributes:
        schedule: its levels; level k is the timestep k.
        parameterization: as of `Diffusion`.
        sigma_data: standard deviation of the data where the network is preconditioned for it (Karras et al. 2022).
        time: what a network takes instead of the level; None for the level.
    """

    schedule: Schedule
    parameterization: str
    sigma_data: float | None = None
    time: str | None = None


def trained(config: JSONObject, where: str) -> Trained:
    """Reads a scheduler's configuration.

    Raises:
        LoadError: a scheduler, kind of betas or of prediction that is not known.
    """
    kind = config.get("_class_name")
    family = next((family for family in Family if kind in family.value), None)
    if family is None:
        unsupported(where, "_class_name", kind, tuple(name for family in Family for name in family.value))
    if family is Family.GUIDED:
        return _guided(config, where)
    levels = config.get("num_train_timesteps", 2000 if family is Family.VE else 1000)
    if not isinstance(levels, int) or levels < 2:
        unsupported(where, "num_train_timesteps", levels, ("a whole number from 2",))
    if family is Family.FLOW or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return _flow(config, levels)
    if family is Family.EDM:
        return _edm(config, levels, where)
    if family is Family.VE:
        sigma = np.geomspace(config.get("sigma_min", 0.01), config.get("sigma_max", 1348.0), levels)
        return Trained(Schedule.from_arrays(np.ones(levels), sigma), "score", time="sigma")
    prediction = config.get("prediction_type", "epsilon")
    if config.get("predict_epsilon") is False:  # of the first releases
        prediction = "sample"
    forms = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
    if prediction not in forms:
        unsupported(where, "prediction_type", prediction, (*forms, "flow_prediction"))
    betas = _betas(config, levels, where)
    if not np.all((betas > 0) & (betas < 1)):
        raise LoadError(
            f"{where} gives β from {betas.min():g} to {betas.max():g}; a level adds noise only with 0 < β < 1.",
            fix="correct beta_start, beta_end or trained_betas.",
        )
    signal = np.cumprod(1 - betas, dtype=np.float64)
    if config.get("rescale_betas_zero_snr"):
        signal = _without_signal_at_the_end(signal.astype(np.float32))
    # Rounded as the network's own training rounds it: of σ² = 1 − α² at the first levels the seventh digit counts.
    # A last level without any signal gets α = 1e-5: it must have some.
    signal = np.maximum(signal.astype(np.float32).astype(np.float64), 1e-10)
    schedule = Schedule.from_arrays(np.sqrt(signal), np.sqrt(1 - signal))
    return Trained(schedule, forms[prediction])


def _without_signal_at_the_end(signal: np.ndarray) -> np.ndarray:
    """ᾱ shifted and scaled in its root such that the last is 0, step by step in the original's single precision: where
    the first β is 10⁻⁴ the rounding of ᾱ moves the first σ by 6·10⁻⁴ of it."""
    root = np.sqrt(signal)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    ratios = np.concatenate([root[:1] ** 2, root[1:] ** 2 / root[:-1] ** 2])
    return np.cumprod(1 - (1 - ratios), dtype=np.float64)


def _betas(config: JSONObject, levels: int, where: str) -> np.ndarray:
    """β of every level, in single precision as the originals have it."""
    given = config.get("trained_betas")
    if given is not None:
        if len(given) != levels:
            raise LoadError(
                f"{where} has {len(given)} trained_betas for num_train_timesteps={levels}.",
                fix="the two must agree: one β for each timestep.",
            )
        return np.asarray(given, np.float32)
    low, high = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return np.linspace(low, high, levels, dtype=np.float32)
    if kind == "scaled_linear":
        return np.linspace(low**0.5, high**0.5, levels, dtype=np.float32) ** 2
    if kind == "sigmoid":
        return (1 / (1 + np.exp(-np.linspace(-6, 6, levels))) * (high - low) + low).astype(np.float32)
    if kind == "squaredcos_cap_v2":
        return _cosine(levels).astype(np.float32)
    return unsupported(where, "beta_schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"))


def _guided(config: JSONObject, where: str) -> Trained:
    """The linear and the cosine levels for any number of steps, in double precision as guided-diffusion has them."""
    steps, kind = config.get("diffusion_steps", 1000), config.get("noise_schedule", "linear")
    if not isinstance(steps, int) or steps < 2:
        unsupported(where, "diffusion_steps", steps, ("a whole number from 2",))
    if kind == "linear":
        betas = np.linspace(0.1 / steps, 20 / steps, steps)
    elif kind == "cosine":
        betas = _cosine(steps)
    else:
        unsupported(where, "noise_schedule", kind, ("linear", "cosine"))
    if betas[-1] >= 1:
        unsupported(where, "diffusion_steps", steps, ("a whole number from 21 with noise_schedule='linear'",))
    signal = np.cumprod(1 - betas)
    form = "x0" if config.get("predict_xstart") else "epsilon"
    return Trained(Schedule.from_arrays(np.sqrt(signal), np.sqrt(1 - signal)), form)


def _cosine(levels: int) -> np.ndarray:
    """β of Nichol and Dhariwal's levels (2021), at most 0.999."""
    bar = [math.cos((t / levels + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(levels + 1)]
    return np.asarray([min(1 - bar[t + 1] / bar[t], 0.999) for t in range(levels)])


def _flow(config: JSONObject, levels: int) -> Trained:
    """t = (k + 1)/K shifted, the last of them, all noise, with the least signal."""
    given = config["shift"] if "shift" in config else config.get("flow_shift", 1.0)
    shift = 1.0 if config.get("use_dynamic_shifting") else float(given)
    t = np.arange(1, levels + 1) / levels
    sigma = shift * t / (1 + (shift - 1) * t)
    # The network takes σ/(σ + α), which is 1 in single precision where α is 1e-7.
    alpha = np.maximum((1 - t) / (1 + (shift - 1) * t), 1e-7)
    return Trained(Schedule.from_arrays(alpha, sigma), "flow", time="sigma")


def _edm(config: JSONObject, levels: int, where: str) -> Trained:
    """Karras's levels from σ_min to σ_max; the preconditioned network gives x_0."""
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        unsupported(where, "prediction_type", prediction, ("epsilon", "v_prediction"))
    rho, low, high = config.get("rho", 7.0), config.get("sigma_min", 0.002), config.get("sigma_max", 80.0)
    if config.get("sigma_schedule", "karras") == "exponential":
        schedule = Schedule.from_arrays(np.ones(levels), np.geomspace(low, high, levels))
    else:
        schedule = Schedule.edm(levels, low, high, rho)
    form = "edm" if prediction == "epsilon" else "edm_v"
    return Trained(schedule, form, sigma_data=float(config.get("sigma_data", 0.5)), time="sigma")
