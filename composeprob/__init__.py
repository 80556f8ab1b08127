"""composeprob: new distributions from diffusion models, without retraining.

A program states which densities multiply, mix and condition; `compile` turns it into one time-annealed unnormalised
log-density; `infer` moves chains along it.
"""

from composeprob.api import *  # noqa: F403
from composeprob.api import __all__ as __all__

__version__ = "0.1.0"
