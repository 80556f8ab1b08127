"""Metrics: distances of samples from a target, and the likelihood of a sampler's
output.

`distances` works on arrays. `likelihood` walks a sampler's path and `sources` compares
runs; they may import `runtime`, `kernels`, `density` and what is below; no factor and
no program.
"""

from typing import TYPE_CHECKING, NoReturn

from composeprob.arguments import add_errors_of_calls
from composeprob.core import curl, fokker_planck
from composeprob.errors import unknown_name
from composeprob.metrics.distances import (
    covariance_error,
    ksd,
    mmd,
    mode_weights,
    nested_rhat,
    total_variation,
    wasserstein,
)
from composeprob.metrics.likelihood import (
    EvidenceBounds,
    LogLikelihood,
    evidence_bounds,
    raise_log_likelihood,
)
from composeprob.metrics.sources import ErrorSources, error_sources

__all__ = [
    "ErrorSources",
    "EvidenceBounds",
    "LogLikelihood",
    "covariance_error",
    "curl",
    "error_sources",
    "evidence_bounds",
    "fokker_planck",
    "ksd",
    "mmd",
    "mode_weights",
    "nested_rhat",
    "raise_log_likelihood",
    "total_variation",
    "wasserstein",
]

add_errors_of_calls(globals(), __all__)


def __dir__() -> list[str]:
    """Public names, without this module's imports and submodules."""
    return sorted(__all__)


if not TYPE_CHECKING:  # a type checker would take it for a promise of every name

    def __getattr__(name: str) -> NoReturn:
        raise unknown_name(__name__, name, __all__)
