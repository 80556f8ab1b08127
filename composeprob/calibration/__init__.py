"""Calibration: log-normalisers of factors.

`calibrate` finds them: by quadrature in one or two dimensions, by sequential Monte Carlo elsewhere;
`calibrate_model` does so for a model of the zoo and stores what it found. May import everything but `api` and `cli`.
"""

from composeprob.calibration.driver import calibrate
from composeprob.calibration.storage import load_calibration, save_calibration
from composeprob.calibration.zoo import calibrate_model

__all__ = ["calibrate", "calibrate_model", "load_calibration", "save_calibration"]
