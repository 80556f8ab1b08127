"""Levels that a network was trained on, and its parameterization, from a
scheduler_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from composeprob.core import Schedule
from composeprob.errors import InvalidValueError, LoadError
from composeprob.json_data import JSONObject
from composeprob.pretrained.config import Kind, Options, number, positive, unsupported
from composeprob.schedule import cosine_betas


class Family(Enum):
    """Classes of schedulers that have levels of one kind."""

    # Samplers of levels that betas give: only the betas matter here.
    BETAS = (
        "DDIMInverseScheduler",
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "IPNDMScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    )
    FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
    EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
    VE = ("ScoreSdeVeScheduler",)
    # Folders that tools/convert_guided_diffusion.py wrote: guided-diffusion's options.
    GUIDED = ("GuidedDiffusionScheduler",)


_PARAMETERIZATIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
"""Parameterizations of `Diffusion` by diffusers' names."""
_SIGMAS: dict[Family, tuple[float, float]] = {
    Family.VE: (0.01, 1348.0),
    Family.EDM: (0.002, 80.0),
}
"""Default σ_min and σ_max of the originals."""


class Preconditioning(NamedTuple):
    """Standard deviation of the data, and the sign of the network's output."""

    scale: float
    sign: float


@dataclass(frozen=True)
class Trained:
    """Task that a network was trained for; level k of its schedule is the timestep k.

    Attributes:
        schedule: the levels of its training.
        parameterization: as of `Diffusion`.
        time: as of `Diffusion`, for networks that take the noise instead of the level.
        preconditioning: of the network's input and output (Karras et al. 2022).
    """

    schedule: Schedule
    parameterization: str
    time: str | None = None
    preconditioning: Preconditioning | None = None


def trained(config: JSONObject, where: str) -> Trained:
    """Read a scheduler's configuration."""
    family = _family(config.get("_class_name"), where)
    o = _options(config, where, family)
    try:
        if family is Family.GUIDED:
            parameterization = "x0" if o.predict_xstart else "epsilon"
            return _of_betas(_guided(o), parameterization, where)
        flow = o.use_flow_sigmas or o.prediction_type == "flow_prediction"
        if family is Family.FLOW or flow:
            return _flow(o)
        if family in (Family.VE, Family.EDM):
            return _exploding(o, preconditioned=family is Family.EDM)
        parameterization = _PARAMETERIZATIONS[o.prediction_type]
        if o.predict_epsilon is False:  # an option of diffusers' first releases
            parameterization = "x0"
        return _of_betas(
            _betas(o),
            parameterization,
            where,
            single=True,
            zero_snr=o.rescale_betas_zero_snr,
        )
    except InvalidValueError as error:
        raise LoadError(
            f"{where} gives no levels of noise: {str(error).splitlines()[0]}",
            fix="correct its numbers so that the last level has the most noise; or "
            "fetch the file again.",
        ) from error


def _family(class_name: object, where: str) -> Family:
    for family in Family:
        if class_name in family.value:
            return family
    supported = tuple(name for family in Family for name in family.value)
    unsupported(where, "_class_name", class_name, supported)


def _options(config: JSONObject, where: str, family: Family) -> Options:
    """Options of a scheduler's file, of all families together."""
    levels = Kind(
        "a whole number from 2 to 100,000",
        lambda v: type(v) is int and 2 <= v <= 100_000,
    )
    steps = (2000 if family is Family.VE else 1000, levels)
    sigma_min, sigma_max = _SIGMAS.get(family, (None, None))
    return Options(
        config,
        where,
        num_train_timesteps=steps,
        diffusion_steps=steps,
        use_flow_sigmas=(False, True, None),
        prediction_type=("epsilon", *_PARAMETERIZATIONS, "flow_prediction"),
        predict_epsilon=(True, False, None),
        shift=(None, positive),
        flow_shift=(1.0, positive, None),
        use_dynamic_shifting=(False, True, None),
        sigma_min=(sigma_min, positive),
        sigma_max=(sigma_max, positive),
        sigma_data=(0.5, positive),
        rho=(7.0, positive),
        sigma_schedule=("karras", "exponential", None),
        rescale_betas_zero_snr=(False, True, None),
        beta_start=(1e-4, positive),
        beta_end=(0.02, positive),
        beta_schedule=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        trained_betas=(None, number.listed),
        noise_schedule=("linear", "cosine"),
        predict_xstart=(False, True),
    )


def _of_betas(
    betas: Float[np.ndarray, " levels"],
    parameterization: str,
    where: str,
    *,
    single: bool = False,
    zero_snr: bool = False,
) -> Trained:
    """Levels ᾱ_k = Π (1 − β_i), rounded to single precision where the original's
    training rounds them."""
    if not np.all((betas > 0) & (betas < 1)):
        raise LoadError(
            f"{where} gives β from {betas.min():g} to {betas.max():g}; "
            "a level adds noise only with 0 < β < 1.",
            fix="correct beta_start, beta_end, trained_betas or the number of steps.",
        )
    signal = np.cumprod(1 - betas, dtype=np.float64)
    if zero_snr:
        # √ᾱ shifted and scaled such that the last is 0 (Lin et al. 2024), step by step
        # in the original's single precision: where the first β is 10⁻⁴ the rounding of
        # ᾱ moves the first σ by 6·10⁻⁴ of it.
        root = np.sqrt(signal.astype(np.float32))
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        ratios = np.concatenate([root[:1] ** 2, root[1:] ** 2 / root[:-1] ** 2])
        signal = np.cumprod(1 - (1 - ratios), dtype=np.float64)
    if single:
        # At the first levels the seventh digit of ᾱ shows in σ² = 1 − ᾱ.
        signal = signal.astype(np.float32).astype(np.float64)
        # A schedule needs some signal at its last level: α = 1e-5.
        signal = np.maximum(signal, 1e-10)
    schedule = Schedule.from_arrays(np.sqrt(signal), np.sqrt(1 - signal))
    return Trained(schedule, parameterization)


def _betas(o: Options) -> Float[np.ndarray, " levels"]:
    """β of every level, in single precision as in the originals."""
    levels = o.num_train_timesteps
    if o.trained_betas is not None:
        if len(o.trained_betas) != levels:
            raise LoadError(
                f"{o.where} has {len(o.trained_betas)} trained_betas for "
                f"num_train_timesteps={levels}.",
                fix="the two must agree: one β for each timestep.",
            )
        return np.asarray(o.trained_betas, np.float32)
    low, high = o.beta_start, o.beta_end
    if o.beta_schedule == "linear":
        return np.linspace(low, high, levels, dtype=np.float32)
    if o.beta_schedule == "scaled_linear":
        return np.linspace(low**0.5, high**0.5, levels, dtype=np.float32) ** 2
    if o.beta_schedule == "sigmoid":
        logistic = 1 / (1 + np.exp(-np.linspace(-6, 6, levels)))
        return (logistic * (high - low) + low).astype(np.float32)
    return cosine_betas(levels).astype(np.float32)


def _guided(o: Options) -> Float[np.ndarray, " levels"]:
    """β of guided-diffusion's linear or cosine levels for any number of steps, in
    double precision as in the original."""
    steps = o.diffusion_steps
    if o.noise_schedule == "cosine":
        return cosine_betas(steps)
    if steps <= 20:  # the last β would be 1 or more
        supported = ("a whole number from 21 with noise_schedule='linear'",)
        unsupported(o.where, "diffusion_steps", steps, supported)
    return np.linspace(0.1 / steps, 20 / steps, steps)


def _flow(o: Options) -> Trained:
    """Straight levels at t = (k + 1)/K, shifted; the last one, all noise, gets the
    least signal."""
    levels = o.num_train_timesteps
    shift = float((o.flow_shift if o.shift is None else o.shift) or 1.0)
    if o.use_dynamic_shifting:  # by the image's size, which diffusers does in sampling
        shift = 1.0
    t = np.arange(1, levels + 1) / levels
    sigma = shift * t / (1 + (shift - 1) * t)
    # The network takes σ/(σ + α), which is 1 in single precision where α is 1e-7.
    alpha = np.maximum((1 - t) / (1 + (shift - 1) * t), 1e-7)
    return Trained(Schedule.from_arrays(alpha, sigma), "flow", "sigma")


def _exploding(o: Options, preconditioned: bool) -> Trained:
    """α = 1, and σ from σ_min to σ_max evenly spaced in its logarithm, or as in Karras
    et al. (2022), whose preconditioned networks give x_0."""
    levels = o.num_train_timesteps
    if preconditioned and o.sigma_schedule != "exponential":
        schedule = Schedule.edm(levels, o.sigma_min, o.sigma_max, o.rho)
    else:
        sigma = np.geomspace(o.sigma_min, o.sigma_max, levels)
        schedule = Schedule.from_arrays(np.ones(levels), sigma)
    if not preconditioned:
        return Trained(schedule, "score", "sigma")
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    if o.prediction_type not in signs:
        unsupported(o.where, "prediction_type", o.prediction_type, tuple(signs))
    preconditioning = Preconditioning(float(o.sigma_data), signs[o.prediction_type])
    return Trained(schedule, "x0", "sigma", preconditioning)
