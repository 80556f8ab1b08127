"""Distances between samples and closed-form targets. Imports nothing else of this library but its errors."""

from composeprob.metrics.mode_weights import mode_weights, total_variation

__all__ = ["mode_weights", "total_variation"]
