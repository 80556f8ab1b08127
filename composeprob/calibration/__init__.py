"""Calibration of factors by their log-normalisers, and of whole programs by ranks.

`calibrate` finds log-normalisers by quadrature in one or two dimensions, by sequential
Monte Carlo elsewhere; `calibrated` ranks true values among posterior draws. May import
everything but `api` and `cli`.
"""

from composeprob.calibration.driver import calibrate, load_calibration, save_calibration
from composeprob.calibration.simulated import Calibration, calibrated

__all__ = [
    "Calibration",
    "calibrate",
    "calibrated",
    "load_calibration",
    "save_calibration",
]
