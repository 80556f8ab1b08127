"""How far samples are from a target: distances, mode weights. Imports nothing else of this library but its errors."""

from composeprob.density.curl import curl
from composeprob.metrics.covariance import covariance_error
from composeprob.metrics.distances import mmd, wasserstein
from composeprob.metrics.mode_weights import mode_weights, total_variation

__all__ = ["covariance_error", "curl", "mmd", "mode_weights", "total_variation", "wasserstein"]
