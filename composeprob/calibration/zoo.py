"""`calibrate_model`: calibrate a model of the zoo, and store what it found beside the weights."""

from __future__ import annotations

from pathlib import Path

import jax

from composeprob.calibration.driver import calibrate
from composeprob.calibration.storage import save_calibration
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.factors.calibrated import Calibrated

SEED = 0


def calibrate_model(name: str, *, retraining: int = 0, out: str | Path | None = None) -> Calibrated:
    """Calibrate a model of the zoo with an energy, and write ``calibration.safetensors``, which `load` then applies.

    Args:
        name: a folder of the zoo.
        retraining: which of its trainings; R > 0 is written to ``calibration-R.safetensors``.
        out: the folder of its weights, and to write into; by default the model's own.

    Raises:
        LoadError: no such model, or it has not been trained.
        CapabilityError: it has only a score.
        InvalidValueError: it has conditions: calibrate it by hand, for each of them.
    """
    from composeprob import model_zoo as zoo  # the zoo loads what this writes

    factor, weights = zoo.uncalibrated(name, retraining, out)
    if "energy" not in factor.capabilities:
        raise CapabilityError(
            f"Model '{name}' offers only its score, and a score has no constant to calibrate.",
            fix="calibrate models with an energy; `composeprob zoo` lists what they offer.",
        )
    if factor.condition_names:
        raise InvalidValueError(
            f"Model '{name}' has conditions, and one normaliser for each of their values.",
            fix="calibrate what you use: cp.calibrate(cp.load(name).given(…), key).",
        )
    found = calibrate(factor, jax.random.key(SEED))
    assert isinstance(found, Calibrated)
    save_calibration(found, zoo.calibration_file(weights), weights=weights)
    return found
