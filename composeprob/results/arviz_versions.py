"""ArviZ as composeprob uses it: quiet when imported, and the same before its 1.0 and since (Python 3.12 and later)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from composeprob.json_data import JSONObject

with warnings.catch_warnings():
    # Once a day ArviZ tells who imports it that 1.0 differs: whoever asked for a summary cannot act on that.
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
    import arviz

Groups = dict[str, dict[str, np.ndarray]]
Dims = Mapping[str, Sequence[str | None]]


def _before_1() -> bool:
    return int(arviz.__version__.partition(".")[0]) < 1


def grouped(
    groups: Groups, dims: Dims, coords: Mapping[str, Sequence[object] | np.ndarray], attributes: JSONObject
) -> Any:
    """Returns arrays by group and name as ArviZ keeps them: `arviz.InferenceData`, since 1.0 an `xarray.DataTree`.

    Pointwise values of ``log_likelihood`` lack the axes over which a distribution is one event, the last ones of dims.
    """
    named = {name: list(axes) for name, axes in dims.items()}
    with warnings.catch_warnings():
        # neither is a mistake of axes here
        warnings.filterwarnings("ignore", "(More chains|Found chain dimension to be longer)", UserWarning)
        if not _before_1():
            return arviz.from_dict(groups, dims=named, coords=coords, attrs={"/": attributes})
        pointwise = groups.get("log_likelihood", {})
        others: dict[str, Any] = {name: group for name, group in groups.items() if name != "log_likelihood"}
        whole = arviz.from_dict(**others, dims=named, coords=coords, attrs=attributes)
        if pointwise:
            batch = {name: named.get(name, [])[: value.ndim - 2] for name, value in pointwise.items()}
            whole.extend(arviz.from_dict(log_likelihood=pointwise, dims=batch, coords=coords))
        return whole


def pareto_k(log_weights: np.ndarray) -> float:
    """Returns the shape of the generalised Pareto distribution fitted to the largest weights; not finite where these
    are all the same."""
    if _before_1():
        return float(arviz.psislw(log_weights)[1])
    from arviz_stats.base import array_stats

    try:
        return float(array_stats.psislw(-log_weights)[1])  # it takes log-likelihoods, whose weights are 1/likelihood
    except ValueError:  # "All tail values are the same"
        return math.nan
