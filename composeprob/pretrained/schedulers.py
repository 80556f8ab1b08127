"""The levels that a network was trained on, and what its output means, from a
scheduler_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from composeprob.errors import InvalidValueError, LoadError
from composeprob.json_data import JSONObject
from composeprob.pretrained.config import Kind, Options, number, positive, unsupported
from composeprob.schedule import Schedule, cosine_betas


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
    """Ways to sample from levels that betas give: of them only the betas matter
    here."""
    FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
    EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
    VE = ("ScoreSdeVeScheduler",)
    GUIDED = ("GuidedDiffusionScheduler",)
    """Of a folder that `convert` wrote: guided-diffusion's own options."""


@dataclass(frozen=True)
class Trained:
    """What a network was trained for; level k of its schedule is the timestep k."""

    schedule: Schedule
    parameterization: str  # as of `Diffusion`
    time: str | None = None  # what the network takes instead of the level
    preconditioning: tuple[float, float] | None = (
        None  # `Preconditioned`'s scale and sign
    )


def trained(config: JSONObject, where: str) -> Trained:
    """Reads a scheduler's configuration."""
    kind = config.get("_class_name")
    family = next((family for family in Family if kind in family.value), None)
    if family is None:
        unsupported(
            where,
            "_class_name",
            kind,
            tuple(name for family in Family for name in family.value),
        )
    levels = Kind(
        "a whole number from 2 to 100,000",
        lambda v: type(v) is int and 2 <= v <= 100_000,
    )
    steps = (2000 if family is Family.VE else 1000, levels)
    forms = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
    low, high = {Family.VE: (0.01, 1348.0), Family.EDM: (0.002, 80.0)}.get(
        family, (None, None)
    )
    o = Options(
        config, where, num_train_timesteps=steps, diffusion_steps=steps, use_flow_sigmas=(False, True, None),
        prediction_type=("epsilon", *forms, "flow_prediction"), predict_epsilon=(True, False, None),
        shift=(None, positive), flow_shift=(1.0, positive, None), use_dynamic_shifting=(False, True, None),
        sigma_min=(low, positive), sigma_max=(high, positive), sigma_data=(0.5, positive), rho=(7.0, positive),
        sigma_schedule=("karras", "exponential", None), rescale_betas_zero_snr=(False, True, None),
        beta_start=(1e-4, positive), beta_end=(0.02, positive),
        beta_schedule=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        trained_betas=(None, number.listed), noise_schedule=("linear", "cosine"), predict_xstart=(False, True),
    )  # fmt: skip
    count = o.diffusion_steps if family is Family.GUIDED else o.num_train_timesteps
    try:
        if family is Family.GUIDED:
            return _of_betas(_guided(o), "x0" if o.predict_xstart else "epsilon", where)
        if (
            family is Family.FLOW
            or o.use_flow_sigmas
            or o.prediction_type == "flow_prediction"
        ):
            return _flow(o, count)
        if family in (Family.VE, Family.EDM):
            return _exploding(o, count, preconditioned=family is Family.EDM)
        form = (
            "x0" if o.predict_epsilon is False else forms[o.prediction_type]
        )  # the first is of the first releases
        betas = _betas(o, count)
        return _of_betas(
            betas, form, where, single=True, without_end=o.rescale_betas_zero_snr
        )
    except InvalidValueError as error:
        fix = "correct its numbers, of which the last level must have the most noise; or fetch the file again."
        raise LoadError(
            f"{where} gives no levels of noise: {str(error).splitlines()[0]}", fix=fix
        ) from error


def _of_betas(
    betas: np.ndarray,
    form: str,
    where: str,
    *,
    single: bool = False,
    without_end: bool = False,
) -> Trained:
    """The levels ᾱ_k = Π (1 − β_i), rounded to single precision where the network's own
    training rounds them."""
    if not np.all((betas > 0) & (betas < 1)):
        raise LoadError(
            f"{where} gives β from {betas.min():g} to {betas.max():g}; a level adds noise only with 0 < β < 1.",
            fix="correct beta_start, beta_end, trained_betas or the number of steps.",
        )
    signal = np.cumprod(1 - betas, dtype=np.float64)
    if without_end:
        # ᾱ shifted and scaled in its root such that the last is 0, step by step in the
        # original's single precision: where the first β is 10⁻⁴ the rounding of ᾱ moves
        # the first σ by 6·10⁻⁴ of it.
        root = np.sqrt(signal.astype(np.float32))
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        ratios = np.concatenate([root[:1] ** 2, root[1:] ** 2 / root[:-1] ** 2])
        signal = np.cumprod(1 - (1 - ratios), dtype=np.float64)
    if single:  # of σ² = 1 − α² at the first levels the seventh digit counts
        signal = signal.astype(np.float32).astype(np.float64)
        signal = np.maximum(
            signal, 1e-10
        )  # a last level without any signal gets α = 1e-5: it must have some
    return Trained(Schedule.from_arrays(np.sqrt(signal), np.sqrt(1 - signal)), form)


def _betas(o: Options, levels: int) -> np.ndarray:
    """β of every level, in single precision as the originals have it."""
    if o.trained_betas is not None:
        if len(o.trained_betas) != levels:
            raise LoadError(
                f"{o.where} has {len(o.trained_betas)} trained_betas for num_train_timesteps={levels}.",
                fix="the two must agree: one β for each timestep.",
            )
        return np.asarray(o.trained_betas, np.float32)
    low, high = o.beta_start, o.beta_end
    if o.beta_schedule == "linear":
        return np.linspace(low, high, levels, dtype=np.float32)
    if o.beta_schedule == "scaled_linear":
        return np.linspace(low**0.5, high**0.5, levels, dtype=np.float32) ** 2
    if o.beta_schedule == "sigmoid":
        return (
            1 / (1 + np.exp(-np.linspace(-6, 6, levels))) * (high - low) + low
        ).astype(np.float32)
    return cosine_betas(levels).astype(np.float32)


def _guided(o: Options) -> np.ndarray:
    """The linear and the cosine levels for any number of steps, in double precision as
    guided-diffusion has them."""
    steps = o.diffusion_steps
    if o.noise_schedule == "cosine":
        return cosine_betas(steps)
    if steps <= 20:
        unsupported(
            o.where,
            "diffusion_steps",
            steps,
            ("a whole number from 21 with noise_schedule='linear'",),
        )
    return np.linspace(0.1 / steps, 20 / steps, steps)


def _flow(o: Options, levels: int) -> Trained:
    """t = (k + 1)/K shifted, the last of them, all noise, with the least signal."""
    given = o.flow_shift if o.shift is None else o.shift
    shift = 1.0 if o.use_dynamic_shifting else float(given or 1.0)
    t = np.arange(1, levels + 1) / levels
    sigma = shift * t / (1 + (shift - 1) * t)
    # The network takes σ/(σ + α), which is 1 in single precision where α is 1e-7.
    alpha = np.maximum((1 - t) / (1 + (shift - 1) * t), 1e-7)
    return Trained(Schedule.from_arrays(alpha, sigma), "flow", "sigma")


def _exploding(o: Options, levels: int, preconditioned: bool) -> Trained:
    """α = 1, and σ from σ_min to σ_max evenly spaced in its logarithm, or as Karras has
    it, whose preconditioned network gives x_0."""
    if preconditioned and o.sigma_schedule != "exponential":
        schedule = Schedule.edm(levels, o.sigma_min, o.sigma_max, o.rho)
    else:
        schedule = Schedule.from_arrays(
            np.ones(levels), np.geomspace(o.sigma_min, o.sigma_max, levels)
        )
    if not preconditioned:
        return Trained(schedule, "score", "sigma")
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    if o.prediction_type not in signs:
        unsupported(o.where, "prediction_type", o.prediction_type, tuple(signs))
    return Trained(
        schedule, "x0", "sigma", (float(o.sigma_data), signs[o.prediction_type])
    )
