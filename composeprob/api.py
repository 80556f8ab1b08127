"""The public names: those of the core, and of the outer ring."""

from composeprob import core, metrics, training
from composeprob.arguments import add_errors_of_calls
from composeprob.calibration import calibrate, calibrated
from composeprob.core import *  # noqa: F403
from composeprob.model_zoo import load, zoo
from composeprob.pretrained.estimators import from_estimator
from composeprob.pretrained.load import from_diffusers

__all__ = [
    "calibrate",
    "calibrated",
    "from_diffusers",
    "from_estimator",
    "load",
    "metrics",
    "training",
    "zoo",
]
__all__ += core.__all__

add_errors_of_calls(globals(), __all__)
