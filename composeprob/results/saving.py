"""A result in other forms: files to write and read, the folder where a run has stored
its draws, ArviZ's groups, and a table of pandas."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
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
from composeprob.events import entries
from composeprob.extras import needed
from composeprob.files import read_arrays, write_arrays
from composeprob.findings import Code, Finding
from composeprob.json_data import JSON, JSONObject
from composeprob.records import REPORTED
from composeprob.results.checks import withholds
from composeprob.results.estimates import Genealogy, quiet_arviz
from composeprob.results.record import (
    ARRAYS,
    FACTS,
    REPEATED,
    About,
    Record,
    by_level,
)
from composeprob.results.status import Status
from composeprob.results.store import Store
from composeprob.results.summary import COLUMNS, Summary
from composeprob.results.trust import Trust

if TYPE_CHECKING:
    import pandas
    import xarray

Loaded = TypeVar("Loaded", bound=Record)
Value = TypeVar("Value")
Dims = dict[str, Sequence[str | None]]
Labels = Sequence[object] | np.ndarray  # along one axis
FORMAT = {"format": "composeprob.results.result", "version": "5"}
SAMPLES = "samples/"
"""Prefix of the user's names of sites, which keeps them apart from the other arrays."""
WRITTEN = {
    "sites": tuple[str, ...],
    "status": tuple[tuple[str, ...], ...],
    "trust": dict[str, float | bool | str] | None,
}
"""Fields of a result that are written in another form among the facts of a file."""


def save(self: Record, path: str | os.PathLike) -> Path:
    """Write everything except ``density`` to one safetensors file; return its path,
    which ends in ``.safetensors`` (added where missing).

    Raises:
        WrongTypeError, InvalidValueError: not a path, or one that cannot be written to.
    """
    path = _with_suffix(path)
    rest, facts = parts(self)
    arrays = {}
    for name, value in self.samples.items():
        arrays[SAMPLES + name] = np.asarray(value)
    try:
        write_arrays(path, arrays | rest, FORMAT | {"facts": json.dumps(facts)})
    except OSError as error:
        fix = "choose a folder that you may write to, on a disk with room."
        raise InvalidValueError(
            f"{path} cannot be written: {error}", fix=fix
        ) from error
    return path


def parts(self: Record) -> tuple[dict[str, np.ndarray], JSONObject]:
    """Return all but the samples and the density, as they are written to disk: arrays,
    and facts that JSON can hold."""
    levels = self.levels.reset_coords("log_snr")
    arrays = {"log_weights": self.log_weights, "families": self._genealogy.index}
    arrays |= {name: levels[name].to_numpy() for name in ("log_snr", *REPORTED)}
    if self._genealogy.repeated is not None:
        arrays[REPEATED] = self._genealogy.repeated
    facts = _facts_of(self)
    facts["sites"] = list(self.samples)  # safetensors sorts by name
    facts["status"] = []
    for finding in self.status.findings:
        errors = "errors withheld" if finding.withholds else "errors given"
        facts["status"].append((str(finding.code), finding.message, errors))
    facts["trust"] = None
    if self.trust is not None:
        facts["trust"] = self.trust.numbers()
    return arrays, facts


def _facts_of(result: Record) -> JSONObject:
    """The facts of a result and of its run, by name."""
    return {name: getattr(result, name) for name in FACTS} | asdict(result.about)


def load(cls: type[Loaded], path: str | os.PathLike) -> Loaded:
    """Read a result from a file or the folder of a store; see `Result.load`."""
    if check_path(path, "The path of a result", "run.safetensors").is_dir():
        return _opened(cls, Store(Path(path)))
    given = Path(path)
    path = _with_suffix(path)
    if given != path and given.is_file():
        raise LoadError(
            f"{given} is not a saved result, whose name ends in {path.suffix}.",
            fix="pass the path that result.save returned.",
        )
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
            f"{path} is not a saved result of this version of composeprob ({found}; "
            f"expected {FORMAT['format']!r}, version {FORMAT['version']!r}).",
            fix="pass a file written by result.save; weights of a model are read by "
            "cp.load.",
        )
    return _assembled(cls, path, arrays, _facts(path, metadata.get("facts", "")))


def _opened(kind: type[Loaded], store: Store) -> Loaded:
    """Read a result whose samples stay in a store."""
    attributes = store.attributes()
    if "facts" not in attributes:
        raise LoadError(
            f"The run whose draws are in {store.path} has not ended.",
            fix="wait for it, or run it again; with checkpoint_dir= it goes on where "
            "it was.",
        )
    facts = _facts(store.path, json.dumps(attributes["facts"]))
    store.open(facts["sites"])
    samples: dict[str, Any] = {}
    for name in facts["sites"]:
        samples[SAMPLES + name] = store.whole(name, facts["draws"])
    rest = store.rest(_expected(store.written()))
    return _assembled(kind, store.path, samples | rest, facts)


def _expected(written: Collection[str]) -> list[str]:
    """Names of the arrays of a file beside its samples: all but those that it is older
    than, or has no use for, which are not among the arrays ``written``."""
    late = {name for name, quantity in REPORTED.items() if quantity.old_files_lack}
    required = [name for name in REPORTED if name in written or name not in late]
    if REPEATED in written:
        required.append(REPEATED)
    return [*ARRAYS, *required]


def _facts(path: Path, text: str) -> JSONObject:
    """The facts beside a file's arrays: all facts of a `Result`, each of its type, and
    no others."""
    with _damaged(path):
        facts = json.loads(text)
        _require(isinstance(facts, dict), "its facts are not a dict")
        described: dict[str, Mapping[str, Any]] = {}
        for each in fields(About) + fields(Record):
            described[each.name] = each.metadata
        for name, about in described.items():
            if "in_old_files" in about:
                facts.setdefault(name, about["in_old_files"])
        kinds = get_type_hints(About) | FACTS | WRITTEN
        for name in sorted(kinds.keys() | facts.keys()):
            _require(name in facts, f"it lacks {name!r}")
            _require(name in kinds, f"{name!r} is not a fact of a result")
            fact = facts[name]
            _require(_is_a(fact, kinds[name]), f"{name!r} is {fact!r}")
            about = described.get(name, {})
            if "least" in about and fact is not None:
                _require(fact >= about["least"], f"{name!r} is {fact}")
        sites = facts["sites"]
        _require(sites and len(set(sites)) == len(sites), f"its sites are {sites}")
    return _with_tuples(facts)


def _with_tuples(value: Any) -> Any:
    """A value read from JSON, which has lists in the place of tuples."""
    if isinstance(value, dict):
        return {name: _with_tuples(each) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    return value


def _is_a(value: JSON, kind: Any) -> bool:
    """Return whether a value read from JSON is of a type; lists in JSON stand for
    tuples."""
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_a(value, each) for each in arguments)
    if origin is dict:
        if not isinstance(value, dict):
            return False
        return all(_is_a(each, arguments[1]) for each in value.values())
    if origin is tuple:
        if not isinstance(value, list):
            return False
        return all(_is_a(each, arguments[0]) for each in value)
    if isinstance(value, bool):  # which Python takes for an integer
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)


def _assembled(
    kind: type[Loaded], path: Path, arrays: Mapping[str, np.ndarray], facts: JSONObject
) -> Loaded:
    """Make a result of the arrays and facts of a file; refuse an incomplete one."""
    with _damaged(path):
        # The order of sites is that of the facts: safetensors sorts arrays by name.
        of_sites = [SAMPLES + name for name in facts.pop("sites")]
        rest = {name: arrays[name] for name in _expected(arrays)}
        beside = sorted(arrays.keys() - rest.keys() - set(of_sites))
        _require(not beside, f"it has {beside} beside")
        _check({**rest, **{name: arrays[name] for name in of_sites}}, facts)
        findings = [_finding(*entry) for entry in facts.pop("status")]
        trust = facts.pop("trust")
        if trust is not None:
            # Former files say how many of these defects there were.
            if trust.pop("contradicted", 0):
                trust["proportions"] = "unsupported"
            trust = Trust(**trust)
        own = {name: facts.pop(name) for name in FACTS}
        about = About(**facts)
        log_weights = arrays["log_weights"]
        genealogy = Genealogy.from_log_weights(log_weights, arrays["families"])
        genealogy = dataclasses.replace(genealogy, repeated=arrays.get(REPEATED))
        levels = by_level(arrays["log_snr"], about.blocks, arrays)
    return kind(
        {name.removeprefix(SAMPLES): arrays[name] for name in of_sites},
        log_weights,
        levels=levels,
        about=about,
        status=Status(tuple(findings)),
        trust=trust,
        _genealogy=genealogy,
        **own,
    )


def _finding(code: str, message: str, errors: str = "") -> Finding:
    """A finding as a file has it; files of earlier versions do not say whether its
    errors are withheld."""
    if not errors:
        return Finding(Code(code), message, withholds(code))
    known = {each.value: each for each in Code}
    return Finding(known.get(code, code), message, errors == "errors withheld")


def _check(arrays: Mapping[str, np.ndarray], facts: JSONObject) -> None:
    """Refuse arrays of other values than numbers, or whose axes do not fit together."""
    # A file may have been written by hand: types and shapes are not taken on trust.
    sizes = {"draw": facts["draws"], "block": len(facts["blocks"])}
    for name, array in arrays.items():
        kinds = "fiub" if name.startswith(SAMPLES) else "fiu"
        numeric = array.dtype.kind in kinds
        _require(numeric, f"{name!r} holds numbers of type {array.dtype}")
        axes = _axes(name, array.ndim, facts)
        fits = array.ndim == len(axes) and 0 not in array.shape
        _require(fits, f"{name!r} has shape {array.shape}, and its axes are {axes}")
        for axis, size in zip(axes, array.shape, strict=True):
            if axis in ("chain", "draw", "level", "block"):
                expected = sizes.setdefault(axis, size)
                found = f"{name!r} has {size} entries along {axis!r}, not {expected}"
                _require(size == expected, found)
    levels = arrays["log_snr"]
    ordered = np.all(levels[1:] <= levels[:-1]) and not np.isnan(levels).any()
    _require(ordered, "its levels are not in order")
    weights = arrays["log_weights"]
    finite = not np.isnan(weights).any() and np.isfinite(weights.max())
    _require(finite, "its weights are NaN or infinite")
    # Each is the index of one of the first chains.
    ancestors = arrays["families"]
    valid = np.all((ancestors >= 0) & (ancestors < len(ancestors)))
    valid &= ancestors.dtype.kind in "iu"
    _require(valid, "its ancestors are not those of its chains")
    repeated = arrays.get(REPEATED, np.ones(1))
    valid = np.all(repeated >= 0) and np.isclose(repeated.sum(), 1.0)
    _require(bool(valid), "its repetition's weights are not shares of its chains")


def _axes(name: str, ndim: int, facts: JSONObject) -> tuple[str, ...]:
    """Names of the axes that an array must have."""
    if name in REPORTED:
        # A kernel that moves all sites together has no axis of blocks.
        return REPORTED[name].dims[: max(ndim, 1)]
    if not name.startswith(SAMPLES):
        return ("level",) if name == "log_snr" else ("chain",)
    lead = ("chain",) if facts["draws"] is None else ("chain", "draw")
    unknown = (None,) * (ndim - len(lead))
    plates = facts["dims"].get(name.removeprefix(SAMPLES), unknown)
    # Prefixed, as a plate of the user's may have the name of another axis.
    of_sample = [f"axis {plate or i}" for i, plate in enumerate(plates)]
    return (*lead, *of_sample)


def _require(holds: object, defect: str) -> None:
    """Raise the ValueError that `_damaged` completes, unless a condition ``holds``."""
    if not holds:
        raise ValueError(defect)


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Name the file, of which an entry is missing or is not that of a result."""
    try:
        yield
    # JSON that is nested deeply enough exhausts Python's stack.
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        defect = str(error)
        if isinstance(error, KeyError):
            defect = f"it lacks {error}"
        elif isinstance(error, RecursionError):
            defect = "its facts are nested too deeply"
        raise LoadError(
            f"{path} is not a complete result: {defect}.",
            fix="save the result again, or run it again; entries that were written by "
            "hand must fit together.",
        ) from error


def _with_suffix(path: str | os.PathLike) -> Path:
    path = check_path(path, "The path of a result", "run.safetensors")
    if path.suffix == ".safetensors":
        return path
    return path.with_name(path.name + ".safetensors")


def numbers(self: Record) -> JSONObject:
    """Return every number of the run but the samples, ready for `json.dump`: those that
    are not finite become None."""
    arrays, facts = parts(self)
    # Both describe arrays that are not among the numbers.
    del facts["sites"], facts["dims"]
    facts["log_evidence_error"] = None
    if self.log_evidence is not None:
        facts["log_evidence_error"] = _as_json(self.log_evidence_error)
    table = Summary.of_result(self)
    summary = {}
    for label, row in table.rows.items():
        summary[label] = dict(zip(COLUMNS, map(_as_json, row), strict=True))
    for label, shares in table.tokens.items():
        row_of_tokens = shares._asdict()
        del row_of_tokens["interval"]
        row_of_tokens["error"] = _as_json(shares.error)
        summary[label] = row_of_tokens
    return {
        **facts,
        "num_chains": len(self.log_weights),
        "effective_chains": _as_json(self.effective_chains),
        "pareto_k": _as_json(self._genealogy.pareto_k),
        "status": str(self.status.code),
        "message": self.status.message,
        "summary": summary,
        "levels": {name: _as_json(arrays[name]) for name in ("log_snr", *REPORTED)},
    }


def _as_json(values: ArrayLike | None) -> JSON:
    """Numbers as JSON has them, None in the place of those that are not finite."""
    values = np.asarray(values, float)
    return np.where(np.isfinite(values), values, np.asarray(None)).tolist()


def to_arviz(
    self: Record,
    *,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Labels] | None = None,
    predictive: Array | None = None,
) -> Any:
    """Convert to ArviZ's groups of arrays: (chain=1, draw=N, …), or with draws
    (chain=N, draw=draws, …).

    That is an `arviz.InferenceData`, and with ArviZ 1.0 and later an `xarray.DataTree`.

    Without draws the chains of an annealed sampler are one draw each, independent or
    exchangeable, and not N long chains: ArviZ therefore sees one chain of N draws, and
    its R-hat between chains does not apply. ArviZ has no weights, so ``posterior``
    holds the equally weighted samples of `unweighted`, and so do the groups that
    follow; ``sample_stats`` keeps the final log-weights of the run, and
    ``constant_data`` its diagnostics by level. While the density is at hand (not after
    `load`), there are also ``observed_data`` and the pointwise ``log_likelihood``,
    which `arviz.loo` and `arviz.compare` take.

    Args:
        dims: names of a site's axes, N left out, ``{site: (name or None, …)}``; axes
            that run over a plate have the plate's name.
        coords: labels along the axes, ``{axis name: labels}``.
        predictive: a random key adds ``posterior_predictive``, from `predictive`.

    Raises:
        InvalidValueError, CapabilityError: ``predictive`` for a result that cannot
            predict; a site whose name ArviZ or xarray use otherwise.

    Example:
        >>> import composeprob as cp, jax, numpyro, numpyro.distributions as dist
        >>> @cp.program
        ... def schools(y):
        ...     with numpyro.plate("school", 2):
        ...         theta = cp.sample("theta", dist.Normal(0.0, 1.0))
        ...         cp.observe("y", dist.Normal(theta, 1.0), y)
        >>> density = cp.compile(schools, jax.numpy.array([1.0, -1.0]))
        >>> options = {"sampler": cp.AnnealedMCMC(cp.MALA(0.5), 5), "progress": False}
        >>> result = cp.infer(density, jax.random.key(0), num_chains=8, **options)
        >>> data = result.to_arviz(coords={"school": ["A", "B"]})
        >>> data.posterior["theta"].dims, data.log_likelihood["y"].sel(school="B").shape
        (('chain', 'draw', 'school'), (1, 8))
    """
    import xarray

    samples = self.unweighted()
    data, pointwise = _of_data(self, samples)
    _check_names([*samples, *data])
    # Samples have a leading axis, which the data lack.
    shapes = {name: values.shape[1:] for name, values in samples.items()}
    shapes |= {name: values.shape for name, values in data.items()}
    named = _plates(self, shapes) | _as_dict(dims, "dims")
    labels = _as_dict(coords, "coords")
    _check_dims(named, shapes, labels)
    predicted = {} if predictive is None else self.predictive(predictive)
    log_weight = np.repeat(self.log_weights, self.about.draws or 1)
    by_draw = {
        "posterior": samples,
        "sample_stats": {"log_weight": log_weight},
        "posterior_predictive": predicted,
        "log_likelihood": pointwise,
    }
    groups = {}
    for name, values in by_draw.items():
        of_chains = _chains(self, values)
        groups[name] = _labelled(of_chains, ["chain", "draw"], named, labels)
    groups["observed_data"] = _labelled(data, [], named, labels)
    levels = self.levels.reset_coords("log_snr")
    for axis in levels.dims:
        if axis in labels:
            levels = levels.assign_coords({axis: labels[axis]})
    groups["constant_data"] = levels
    # ArviZ's own groups have this attribute; empty groups are left out.
    now = datetime.now(UTC).isoformat()
    for name, dataset in list(groups.items()):
        if dataset:
            groups[name] = dataset.assign_attrs(created_at=now)
        else:
            del groups[name]
    attributes = _attributes(self)
    arviz, since_1 = quiet_arviz()
    if not since_1:
        return arviz.InferenceData(attrs=attributes, **groups)
    root = xarray.Dataset(attrs=attributes)
    return xarray.DataTree.from_dict({"/": root, **groups})


def to_pandas(self: Record) -> pandas.DataFrame:
    """Convert to a table: a row for each of the equally weighted samples of
    `unweighted`, a column for each number of each site, such as ``x[0]``.

    Without draws the rows are numbered by ``draw``. With draws the index has the levels
    ``chain`` and ``draw``. Weights and diagnostics stay behind; `to_arviz` keeps them,
    and the axes of arrays.

    Raises:
        MissingPackageError: pandas is not installed.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> normal = dist.Normal(jax.numpy.zeros(2), 1.0).to_event(1)
        >>> @cp.program
        ... def program(f):
        ...     cp.sample("x", f)
        >>> schedule = cp.Schedule.log_snr(4)
        >>> density = cp.compile(program, cp.Analytic(normal, schedule))
        >>> result = cp.infer(density, jax.random.key(0), num_chains=8, progress=False)
        >>> table = result.to_pandas()
        >>> table.shape, list(table.columns)
        ((8, 2), ['x[0]', 'x[1]'])
    """
    with needed("pandas", "A table of samples"):
        import pandas

    columns: dict[str, np.ndarray] = {}
    for name, values in self.unweighted().items():
        flat = values.reshape(len(values), -1)
        labels = entries(name, values.shape[1:])
        columns.update(zip(labels, flat.T, strict=True))
    draws = self.about.draws
    if draws is None:
        index = pandas.RangeIndex(len(self.log_weights), name="draw")
    else:
        chains_and_draws = [range(len(self.log_weights)), range(draws)]
        index = pandas.MultiIndex.from_product(
            chains_and_draws, names=["chain", "draw"]
        )
    return pandas.DataFrame(columns, index=index)


def _of_data(
    result: Record, samples: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The data, and their pointwise log-likelihood under samples; empty without a
    density."""
    density = result.density
    if density is None or not density.observed():
        return {}, {}
    data = {name: np.asarray(value) for name, value in density.observed().items()}
    log_likelihood = density.log_likelihood(samples)
    return data, {name: np.asarray(value) for name, value in log_likelihood.items()}


def _plates(result: Record, shapes: Mapping[str, tuple[int, ...]]) -> Dims:
    """Names of axes by their plates.

    An axis that has the name of a variable stays without, which xarray asks for.
    """

    def allowed(axis: str | None) -> str | None:
        return None if axis in shapes else axis

    return {
        site: list(map(allowed, axes))
        for site, axes in result.about.dims.items()
        if site in shapes and any(axes)
    }


def _attributes(result: Record) -> dict[str, object]:
    """Facts of a run as attributes of a group; netCDF files hold no dicts and no
    None."""
    attributes = {}
    for name, fact in _facts_of(result).items():
        if fact is not None:
            attributes[name] = str(fact) if isinstance(fact, dict) else fact
    attributes["status"] = str(result.status)
    attributes["inference_library"] = "composeprob"
    return attributes


def _labelled(
    values: Mapping[str, np.ndarray],
    lead: list[str],
    named: Dims,
    coords: Mapping[str, Labels],
) -> xarray.Dataset:
    """Arrays with names and labels along their axes, by ArviZ's rule where they have
    none.

    A log-likelihood lacks the last axes, those over which a distribution is one event.
    """
    import xarray

    arrays = {}
    for name, value in values.items():
        axes = named.get(name, [None] * value.ndim)[: value.ndim - len(lead)]
        names = [axis or f"{name}_dim_{i}" for i, axis in enumerate(axes)]
        arrays[name] = ([*lead, *names], value)
    dataset = xarray.Dataset(arrays)
    labels: dict[str, Labels] = {}
    for axis, size in dataset.sizes.items():
        labels[str(axis)] = coords.get(str(axis), np.arange(size))
    return dataset.assign_coords(labels)


def _as_dict(given: Mapping[str, Value] | None, what: str) -> dict[str, Value]:
    """A mapping as a dict, or a `WrongTypeError`."""
    if given is not None and not isinstance(given, Mapping):
        raise WrongTypeError(
            f"{what} must be a dict; got {a_kind(given)}.",
            fix=f"such as {what}={{'x': …}}.",
        )
    return dict(given or {})


def _chains(result: Record, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values (M, …) in the order of `Result.unweighted` as (chain, draw, …)."""
    number = len(result.log_weights)
    draws = result.about.draws
    lead = (1, number) if draws is None else (number, draws)
    by_chain = {}
    for name, value in values.items():
        by_chain[name] = value.reshape(*lead, *value.shape[1:])
    return by_chain


def _check_names(names: Iterable[str]) -> None:
    """Refuse names of sites that stand for something else in ArviZ's groups."""
    for name in names:
        if name in ("chain", "draw"):
            raise InvalidValueError(
                f"The program has a site {name!r}, and ArviZ calls an axis so.",
                fix="give the site another name in the program.",
            )
        if "/" in name:
            raise InvalidValueError(
                f"The program has a site {name!r}, and xarray reads '/' as the path of "
                "a group.",
                fix="give the site another name in the program: "
                f"{name.replace('/', '_')!r}.",
            )


def _check_dims(
    dims: Dims, shapes: dict[str, tuple[int, ...]], coords: Mapping[str, Labels]
) -> None:
    """Refuse names of axes that do not fit the shapes or the coordinates."""
    for name, axes in dims.items():
        if name not in shapes:
            raise InvalidValueError(
                f"dims names the site {name!r}, which this result does not have.",
                fix=f"its sites are: {', '.join(map(repr, shapes))}.",
            )
        if isinstance(axes, str) or len(axes) != len(shapes[name]):
            raise InvalidValueError(
                f"Site {name!r} has {len(shapes[name])} axes beside the draws', but "
                f"dims names {axes!r}.",
                fix="one name (or None) for each, as a tuple.",
            )
    sizes: dict[str, int] = {}
    for name, axes in dims.items():
        for axis, size in zip(axes, shapes[name], strict=True):
            if axis is None:
                continue
            # Without labels the first site with this axis tells its length.
            if axis in coords:
                expected = len(coords[axis])
            else:
                expected = sizes.setdefault(axis, size)
            if size != expected:
                raise InvalidValueError(
                    f"Axis {axis!r} has {expected} entries, but along it site {name!r} "
                    f"has {size}.",
                    fix="give one coordinate an entry, and axes of different length "
                    "different names.",
                )
