"""Calibration: log-normalisers of factors, and of whole programs against data that they draw themselves.

`calibrate` finds them: by quadrature in one or two dimensions, by sequential Monte Carlo elsewhere;
`calibrate_model` does so for a model of the zoo and stores what it found; `calibrated` ranks true values among
posterior draws. May import everything but `api` and `cli`.
"""

from composeprob.calibration.driver import calibrate
from composeprob.calibration.simulated import Calibration, calibrated
from composeprob.calibration.storage import load_calibration, save_calibration
from composeprob.calibration.zoo import calibrate_model

__all__ = ["Calibration", "calibrate", "calibrate_model", "calibrated", "load_calibration", "save_calibration"]
