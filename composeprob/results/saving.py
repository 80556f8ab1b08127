"""A result in other forms: files to write and read, the folder where a run has stored
its draws, and ArviZ's groups."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob.arguments import check_path
from composeprob.errors import InvalidValueError, LoadError, WrongTypeError, a_kind
from composeprob.json_data import JSON, JSONObject
from composeprob.results.estimates import Families, quiet_arviz
from composeprob.results.record import (
    ARRAYS,
    DIAGNOSTICS,
    FACTS,
    About,
    Record,
    by_level,
)
from composeprob.results.status import Code, Status
from composeprob.results.store import Store, read_arrays, write_arrays
from composeprob.results.summary import COLUMNS, Summary

if TYPE_CHECKING:
    import xarray

Loaded = TypeVar("Loaded", bound=Record)
Value = TypeVar("Value")
Dims = dict[str, Sequence[str | None]]
Labels = Sequence[object] | np.ndarray  # along one axis
FORMAT = {"format": "composeprob.results.result", "version": "5"}


def save(self: Record, path: str | os.PathLike) -> Path:
    """Writes everything except ``density`` to one safetensors file; returns its path,
    which ends in ``.safetensors`` (added where missing).

    Raises:
        WrongTypeError, InvalidValueError: no path, or one that cannot be written to.
    """
    path = _with_suffix(path)
    arrays, facts = self.parts()
    arrays = {
        f"samples/{name}": np.asarray(value) for name, value in self.samples.items()
    } | arrays
    try:
        write_arrays(path, arrays, FORMAT | {"facts": json.dumps(facts)})
    except OSError as error:
        fix = "choose a folder that you may write to, on a disk with room."
        raise InvalidValueError(
            f"{path} cannot be written: {error}", fix=fix
        ) from error
    return path


def load(cls: type[Loaded], path: str | os.PathLike) -> Loaded:
    """See `Result.load`."""
    if check_path(path, "The path of a result", "run.safetensors").is_dir():
        return _opened(cls, Store(Path(path)))
    path = _with_suffix(path)
    if not path.is_file():
        raise LoadError(
            f"There is no saved result at {path}.",
            fix="check the path; result.save returns it.",
        )
    arrays, metadata = read_arrays(
        path, str(path), "save the result again; the file is damaged."
    )
    if not FORMAT.items() <= metadata.items():
        found = (
            f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
        )
        raise LoadError(
            f"{path} is not a saved result of this version of composeprob ({found}; expected {FORMAT['format']!r}, "
            f"version {FORMAT['version']!r}).",
            fix="pass a file written by result.save; weights of a model are read by cp.load.",
        )
    return _assembled(cls, path, arrays, _facts(path, metadata.get("facts", "")))


def _opened(kind: type[Loaded], store: Store) -> Loaded:
    about = store.attributes()
    if "facts" not in about:
        raise LoadError(
            f"The run whose draws are in {store.path} has not ended.",
            fix="wait for it, or run it again; with checkpoint_dir= it goes on where it was.",
        )
    facts = _facts(store.path, json.dumps(about["facts"]))
    store.open(facts["sites"])
    samples: dict[str, Any] = {
        f"samples/{name}": store.stored(name, facts["draws"]) for name in facts["sites"]
    }
    return _assembled(kind, store.path, samples | store.rest(ARRAYS), facts)


def _facts(path: Path, text: str) -> JSONObject:
    """What a file says beside its arrays: every fact, of the type that `Result` gives
    it, and no other."""
    with _damaged(path):
        facts = json.loads(text)
        _require(isinstance(facts, dict), "its facts are no dict")
        kinds = get_type_hints(About) | {
            "log_evidence": float | None,
            "log_evidence_error": float | None,
        }
        kinds |= {
            "evaluations": int,
            "reason": str,
            "sites": tuple[str, ...],
            "status": tuple[tuple[str, ...], ...],
        }
        for name in sorted(kinds.keys() | facts.keys()):
            _require(name in facts, f"it lacks {name!r}")
            _require(name in kinds, f"{name!r} is no fact of a result")
            _require(_is_a(facts[name], kinds[name]), f"{name!r} is {facts[name]!r}")
    return facts


def _is_a(value: JSON, kind: Any) -> bool:
    """Whether a value as JSON reads it is of a type; its lists are tuples."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_a(value, each) for each in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_a(each, arguments[1]) for each in value.values()
        )
    if origin is tuple:
        return isinstance(value, list) and all(
            _is_a(each, arguments[0]) for each in value
        )
    return isinstance(
        value, (int, float) if kind is float else kind
    ) and not isinstance(value, bool)


def _assembled(
    kind: type[Loaded], path: Path, arrays: Mapping[str, np.ndarray], facts: JSONObject
) -> Loaded:
    with _damaged(path):
        samples = {name: arrays[f"samples/{name}"] for name in facts.pop("sites")}
        _check_arrays(samples, {name: arrays[name] for name in ARRAYS}, facts["draws"])
        status = Status(
            tuple((Code(code), message) for code, message in facts.pop("status"))
        )
        known = {name: facts.pop(name) for name in FACTS}
        facts["dims"] = {name: tuple(dims) for name, dims in facts["dims"].items()}
        about = About(**(facts | {"blocks": tuple(facts["blocks"])}))
        log_weights = arrays["log_weights"]
        families = Families.from_log_weights(log_weights, arrays["families"])
        diagnostics = {name: arrays[name] for name in DIAGNOSTICS}
        levels = by_level(
            arrays["log_snr"], about.blocks, **diagnostics
        )  # refuses what does not fit together
    return kind(
        samples,
        log_weights,
        levels=levels,
        about=about,
        status=status,
        _families=families,
        **known,
    )


def _check_arrays(
    samples: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    draws: int | None,
) -> None:
    """Refuses arrays that are not those of a result."""
    for name, array in arrays.items():
        _require(
            array.dtype.kind in "fiu", f"{name!r} holds numbers of type {array.dtype}"
        )
        axes = (
            (1, 2) if name in ("acceptance", "step_size", "quadrature_error") else (1,)
        )
        _require(
            array.ndim in axes and array.size > 0, f"{name!r} has shape {array.shape}"
        )
    weights, first = arrays["log_weights"], arrays["families"]
    lead = weights.shape if draws is None else (*weights.shape, draws)
    _require(
        not np.isnan(weights).any() and np.isfinite(weights.max()),
        "its weights are NaN or infinite",
    )
    known = first.shape == weights.shape and np.all((first >= 0) & (first < len(first)))
    _require(known, "its families are not those of its chains")
    for name, array in samples.items():
        _require(
            array.shape[: len(lead)] == lead,
            f"site {name!r} has shape {array.shape}, of {lead} samples",
        )
        _require(
            array.dtype.kind in "fiub",
            f"site {name!r} holds numbers of type {array.dtype}",
        )


def _require(holds: object, found: str) -> None:
    if not holds:
        raise ValueError(found)


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Says of which file it is that something is missing, or is not what a result
    has."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(
            f"{path} is no whole result: {f'it lacks {error}' if isinstance(error, KeyError) else error}.",
            fix="save the result again, or run it again; what was written by hand must fit together.",
        ) from error


def _with_suffix(path: str | os.PathLike) -> Path:
    path = check_path(path, "The path of a result", "run.safetensors")
    return (
        path
        if path.suffix == ".safetensors"
        else path.with_name(path.name + ".safetensors")
    )


def numbers(self: Record) -> JSONObject:
    """Returns every number of the run but the samples, ready for `json.dump`: what is
    not finite becomes None."""

    def plain(values: ArrayLike | None) -> JSON:
        values = np.asarray(values, float)
        return np.where(np.isfinite(values), values, np.asarray(None)).tolist()

    rows = Summary.of_result(self).rows
    arrays, facts = self.parts()
    facts["log_evidence_error"] = (
        None if self.log_evidence is None else plain(self.log_evidence_error)
    )
    return {
        **{name: fact for name, fact in facts.items() if name not in ("sites", "dims")},
        "num_chains": len(self.log_weights),
        "effective_chains": plain(self.effective_chains),
        "pareto_k": plain(self._families.pareto_k),
        "status": self.status.code.value,
        "message": self.status.message,
        "summary": {
            label: dict(zip(COLUMNS, map(plain, row), strict=True))
            for label, row in rows.items()
        },
        "levels": {name: plain(arrays[name]) for name in ("log_snr", *DIAGNOSTICS)},
    }


def to_arviz(
    self: Record,
    *,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Labels] | None = None,
    predictive: Array | None = None,
) -> Any:
    """Converts to ArviZ's groups of arrays: (chain=1, draw=N, …), or with draws
    (chain=N, draw=draws, …).

    That is an `arviz.InferenceData`, and with ArviZ 1.0 and later an `xarray.DataTree`.

    Without draws the chains of an annealed sampler are one draw each, independent or
    exchangeable, and not N long chains: ArviZ therefore sees one chain of N draws, and
    its R-hat between chains does not apply. ArviZ knows no weights, so ``posterior``
    holds the equally weighted samples of `unweighted`, and so do the groups that
    follow; ``sample_stats`` keeps the log-weights that the run ended with, and
    ``constant_data`` what is known per level. While the density is at hand (not after
    `load`), ``observed_data`` and the pointwise ``log_likelihood``, of which
    `arviz.loo` and `arviz.compare` are made, are there too.

    Args:
        dims: names of a site's axes, N left out, ``{site: (name or None, …)}``; axes
            that run over a plate have the plate's name.
        coords: labels along the axes, ``{axis name: labels}``.
        predictive: a random key adds ``posterior_predictive``, from `predictive`.

    Raises:
        InvalidValueError, CapabilityError: ``predictive`` for a result that cannot
            predict.

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
        pointwise = {
            name: np.asarray(value)
            for name, value in density.log_likelihood(samples).items()
        }
    shapes = {
        **{name: v.shape[1:] for name, v in samples.items()},
        **{name: v.shape for name, v in data.items()},
    }
    # Plates name axes, but for those that a variable is called as, which xarray does
    # not allow.
    plates = {
        name: axes
        for name, axes in self.about.dims.items()
        if name in shapes and any(axes)
    }
    named: Dims = {
        name: [None if axis in shapes else axis for axis in axes]
        for name, axes in plates.items()
    }
    named, coords = named | _as_dict(dims, "dims"), _as_dict(coords, "coords")
    _check_dims(named, shapes, coords)
    facts = {name: getattr(self, name) for name in FACTS} | asdict(self.about)
    attributes = {
        name: str(fact) if isinstance(fact, dict) else fact
        for name, fact in facts.items()
        if fact is not None
    }
    attributes |= {"status": str(self.status), "inference_library": "composeprob"}
    drawn = {
        "posterior": samples,
        "sample_stats": {
            "log_weight": np.repeat(self.log_weights, self.about.draws or 1)
        },
        "posterior_predictive": {}
        if predictive is None
        else self.predictive(predictive),
        "log_likelihood": pointwise,
    }
    lead = ["chain", "draw"]
    groups = {
        name: _labelled(_chains(self, each), lead, named, coords)
        for name, each in drawn.items()
    }
    groups["observed_data"] = _labelled(data, [], named, coords)
    levels = self.levels.reset_coords("log_snr")
    groups["constant_data"] = levels.assign_coords(
        {axis: coords[axis] for axis in levels.dims if axis in coords}
    )
    now = datetime.now(UTC).isoformat()
    groups = {
        name: group.assign_attrs(created_at=now)
        for name, group in groups.items()
        if group
    }
    arviz, since_1 = quiet_arviz()
    if since_1:
        return xarray.DataTree.from_dict(
            {"/": xarray.Dataset(attrs=attributes), **groups}
        )
    return arviz.InferenceData(attrs=attributes, **groups)


def _labelled(
    values: Mapping[str, np.ndarray],
    lead: list[str],
    named: Dims,
    coords: Mapping[str, Labels],
) -> xarray.Dataset:
    """Arrays with names and labels along their axes, as ArviZ gives them to those that
    have none; a log-likelihood lacks the axes over which a distribution is one event,
    the last ones."""
    import xarray

    arrays = {}
    for name, value in values.items():
        axes = named.get(name, [None] * value.ndim)[: value.ndim - len(lead)]
        arrays[name] = (
            [*lead, *(axis or f"{name}_dim_{i}" for i, axis in enumerate(axes))],
            value,
        )
    found = xarray.Dataset(arrays)
    labels: dict[str, Labels] = {
        str(axis): np.arange(size) for axis, size in found.sizes.items()
    }
    return found.assign_coords(
        labels | {axis: coords[axis] for axis in labels if axis in coords}
    )


def _as_dict(given: Mapping[str, Value] | None, what: str) -> dict[str, Value]:
    """A mapping as a dict, or a `WrongTypeError`."""
    if given is not None and not isinstance(given, Mapping):
        raise WrongTypeError(
            f"{what} must be a dict; got {a_kind(given)}.",
            fix=f"such as {what}={{'x': …}}.",
        )
    return dict(given or {})


def _chains(result: Record, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(chain, draw, …) of values (M, …) as `Result.unweighted` orders them."""
    number, draws = len(result.log_weights), result.about.draws
    lead = (1, number) if draws is None else (number, draws)
    return {
        name: value.reshape(*lead, *value.shape[1:]) for name, value in values.items()
    }


def _check_dims(
    dims: Dims, shapes: dict[str, tuple[int, ...]], coords: Mapping[str, Labels]
) -> None:
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
            expected = (
                len(coords[axis]) if axis in coords else sizes.setdefault(axis, size)
            )
            if size != expected:
                raise InvalidValueError(
                    f"Axis {axis!r} has {expected} entries, but along it site {name!r} has {size}.",
                    fix="give one coordinate an entry, and axes of different length different names.",
                )
