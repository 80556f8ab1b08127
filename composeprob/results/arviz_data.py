"""A result as ArviZ's groups of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jax import Array

from composeprob.errors import InvalidValueError, WrongTypeError, a_kind
from composeprob.results.estimates import quiet_arviz
from composeprob.results.record import FACTS, Record

if TYPE_CHECKING:
    import xarray

Dims = dict[str, Sequence[str | None]]
Labels = Sequence[object] | np.ndarray  # along one axis
Value = TypeVar("Value")


def to_arviz(
    self: Record,
    *,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Labels] | None = None,
    predictive: Array | None = None,
) -> Any:
    """Converts to ArviZ's groups of arrays: (chain=1, draw=N, …), or with draws (chain=N, draw=draws, …).

    That is an `arviz.InferenceData`, and with ArviZ 1.0 and later an `xarray.DataTree`.

    Without draws the chains of an annealed sampler are one draw each, independent or exchangeable, and not N long
    chains: ArviZ therefore sees one chain of N draws, and its R-hat between chains does not apply. ArviZ knows no
    weights, so ``posterior`` holds the equally weighted samples of `unweighted`, and so do the groups that follow;
    ``sample_stats`` keeps the log-weights that the run ended with, and ``constant_data`` what is known per level.
    While the density is at hand (not after `load`), ``observed_data`` and the pointwise ``log_likelihood``, of
    which `arviz.loo` and `arviz.compare` are made, are there too.

    Args:
        dims: names of a site's axes, N left out, ``{site: (name or None, …)}``; axes that run over a plate have
            the plate's name.
        coords: labels along the axes, ``{axis name: labels}``.
        predictive: a random key adds ``posterior_predictive``, from `predictive`.

    Raises:
        InvalidValueError, CapabilityError: ``predictive`` for a result that cannot predict.

    Example:
        >>> import composeprob as cp, jax, numpyro, numpyro.distributions as dist
        >>> @cp.program
        ... def schools(y):
        ...     with numpyro.plate("school", 2):
        ...         theta = cp.sample("theta", dist.Normal(0.0, 1.0))
        ...         cp.observe("y", dist.Normal(theta, 1.0), y)
        >>> density = cp.compile(schools, jax.numpy.array([1.0, -1.0]))
        >>> sampler = cp.AnnealedMCMC(cp.MALA(0.5), 5)
        >>> result = cp.infer(density, jax.random.key(0), num_chains=8, sampler=sampler, progress=False)
        >>> data = result.to_arviz(coords={"school": ["A", "B"]})
        >>> data.posterior["theta"].dims, data.log_likelihood["y"].sel(school="B").shape
        (('chain', 'draw', 'school'), (1, 8))
    """
    import xarray

    samples, density = self.unweighted(), self.density
    data: dict[str, np.ndarray] = {}
    pointwise: dict[str, np.ndarray] = {}
    if density is not None and density.observed():
        data = {name: np.asarray(value) for name, value in density.observed().items()}
        pointwise = {name: np.asarray(value) for name, value in density.log_likelihood(samples).items()}
    shapes = {**{name: v.shape[1:] for name, v in samples.items()}, **{name: v.shape for name, v in data.items()}}
    # Plates name axes, but for those that a variable is called as, which xarray does not allow.
    plates = {name: axes for name, axes in self.about.dims.items() if name in shapes and any(axes)}
    named: Dims = {name: [None if axis in shapes else axis for axis in axes] for name, axes in plates.items()}
    named, coords = named | _as_dict(dims, "dims"), _as_dict(coords, "coords")
    _check(named, shapes, coords)
    facts = {name: getattr(self, name) for name in FACTS} | asdict(self.about)
    attributes = {
        name: str(fact) if isinstance(fact, dict) else fact for name, fact in facts.items() if fact is not None
    }
    attributes |= {"status": str(self.status), "inference_library": "composeprob"}
    drawn = {
        "posterior": samples,
        "sample_stats": {"log_weight": np.repeat(self.log_weights, self.about.draws or 1)},
        "posterior_predictive": {} if predictive is None else self.predictive(predictive),
        "log_likelihood": pointwise,
    }
    lead = ["chain", "draw"]
    groups = {name: _labelled(_chains(self, each), lead, named, coords) for name, each in drawn.items()}
    groups["observed_data"] = _labelled(data, [], named, coords)
    levels = self.levels.reset_coords("log_snr")
    groups["constant_data"] = levels.assign_coords({axis: coords[axis] for axis in levels.dims if axis in coords})
    groups = {name: group for name, group in groups.items() if group}
    arviz, since_1 = quiet_arviz()
    if since_1:
        return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attributes), **groups})
    return arviz.InferenceData(attrs=attributes, **groups)


def _labelled(
    values: Mapping[str, np.ndarray], lead: list[str], named: Dims, coords: Mapping[str, Labels]
) -> xarray.Dataset:
    """Arrays with names and labels along their axes, as ArviZ gives them to those that have none; a log-likelihood
    lacks the axes over which a distribution is one event, the last ones."""
    import xarray

    arrays = {}
    for name, value in values.items():
        axes = named.get(name, [None] * value.ndim)[: value.ndim - len(lead)]
        arrays[name] = [*lead, *(axis or f"{name}_dim_{i}" for i, axis in enumerate(axes))], value
    found = xarray.Dataset(arrays)
    labels: dict[str, Labels] = {str(axis): np.arange(size) for axis, size in found.sizes.items()}
    return found.assign_coords(labels | {axis: coords[axis] for axis in labels if axis in coords})


def _as_dict(given: Mapping[str, Value] | None, what: str) -> dict[str, Value]:
    """A mapping as a dict, or a `WrongTypeError`."""
    if given is not None and not isinstance(given, Mapping):
        raise WrongTypeError(f"{what} must be a dict; got {a_kind(given)}.", fix=f"such as {what}={{'x': …}}.")
    return dict(given or {})


def _chains(result: Record, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(chain, draw, …) of values (M, …) as `Result.unweighted` orders them."""
    number, draws = len(result.log_weights), result.about.draws
    lead = (1, number) if draws is None else (number, draws)
    return {name: value.reshape(*lead, *value.shape[1:]) for name, value in values.items()}


def _check(dims: Dims, shapes: dict[str, tuple[int, ...]], coords: Mapping[str, Labels]) -> None:
    for name, axes in dims.items():
        if name not in shapes:
            raise InvalidValueError(
                f"dims names the site {name!r}, which this result does not have.",
                fix=f"its sites are: {', '.join(map(repr, shapes))}.",
            )
        if isinstance(axes, str) or len(axes) != len(shapes[name]):
            raise InvalidValueError(
                f"Site {name!r} has {len(shapes[name])} axes beside the draws', but dims names {axes!r}.",
                fix="one name (or None) for each, as a tuple.",
            )
    sizes: dict[str, int] = {}
    for name, axes in dims.items():
        for axis, size in zip(axes, shapes[name], strict=True):
            if axis is None:
                continue
            expected = len(coords[axis]) if axis in coords else sizes.setdefault(axis, size)
            if size != expected:
                raise InvalidValueError(
                    f"Axis {axis!r} has {expected} entries, but along it site {name!r} has {size}.",
                    fix="give one coordinate an entry, and axes of different length different names.",
                )
