"""`calibrate_model` calibrates a model of the zoo, and stores the result beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax

from composeprob.calibration.driver import calibrate
from composeprob.calibration.storage import save_calibration
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.factors.calibrated import Calibrated


def calibrate_model(
    name: str,
    *,
    retraining: int = 0,
    out: str | Path | None = None,
    conditions: Mapping[str, object] | None = None,
    num_chains: int = 1000,
    replace: bool = False,
) -> Calibrated:
    """Calibrates a model of the zoo with an energy, and writes ``calibration.safetensors``, which `load` then applies.

    Args:
        name: a folder of the zoo.
        retraining: which of its trainings; R > 0 is written to ``calibration-R.safetensors``.
        out: the folder of its weights, and to write into; by default the model's own.
        conditions: of a model with conditions: a value of each. Each combination has its own file, which
            ``load(name, **conditions)`` applies.
        num_chains: as of `calibrate`.
        replace: whether to replace a calibration that is there.

    Raises:
        LoadError: no such model, or it has not been trained.
        CapabilityError: it has only a score.
        InvalidValueError: it has conditions, and not all of them are given; or it is calibrated already, and
            ``replace`` is not given.
        ConditionError: it has no such condition.
    """
    from composeprob import model_zoo as zoo  # the zoo loads what this writes

    factor, weights = zoo.uncalibrated(name, retraining, out)
    if "energy" not in factor.capabilities:
        raise CapabilityError(
            f"Model '{name}' offers only its score, and a score has no constant to calibrate.",
            fix="calibrate models with an energy; `composeprob zoo` lists what they offer.",
        )
    conditions = conditions or {}
    if set(factor.condition_names) - set(conditions):
        needed = " ".join(f"--given {each}=…" for each in factor.condition_names)
        raise InvalidValueError(
            f"Model '{name}' has conditions, and one normaliser for each of their values.",
            fix=f"give one: python tools/calibrate.py {name} {needed}",
        )
    file = zoo.calibration_file(weights, conditions)
    if file.exists() and not replace:
        raise InvalidValueError(
            f"{file} is there already.", fix="calibrate again with --replace (replace=True in Python)."
        )
    found = calibrate(factor.given(**conditions), jax.random.key(0), num_chains=num_chains)
    assert isinstance(found, Calibrated)
    save_calibration(found, file, weights=weights)
    return found
