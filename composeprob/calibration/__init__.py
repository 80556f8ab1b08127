"""Calibration: log-normalisers of factors, and of whole programs against data that they
draw themselves.

`calibrate` finds the former by quadrature in one or two dimensions, by sequential Monte
Carlo elsewhere; `calibrated` ranks true values among posterior draws. May import
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
