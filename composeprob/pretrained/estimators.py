"""Posteriors that other packages have trained, as factors: objects of GenSBI, BayesFlow
and sbijax, and files of sbi.

Each package's reader says of an estimator what it knows as the mean of noised
parameters; the formulas by which all of them are read stand before the readers.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from zipfile import BadZipFile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from composeprob.errors import InvalidValueError, LoadError, ShapeError, WrongTypeError
from composeprob.factors.diffusion import Diffusion
from composeprob.json_data import JSONObject
from composeprob.pretrained.layers import ACTIVATIONS, normalised, waves
from composeprob.schedule import Schedule


class Units:
    """θ = location + scale·u, both of the event's shape. Part of what is compiled,
    equal by its numbers."""

    def __init__(self, location: ArrayLike, scale: ArrayLike, shape: tuple[int, ...]):
        self.location, self.scale = (
            np.array(np.broadcast_to(a, shape), float) for a in (location, scale)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Units) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash((self.location.tobytes(), self.scale.tobytes()))


class Denoiser(eqx.Module):
    """The network of an `Estimator`: the mean of u given x = α·u + σ·ε, α² + σ² = 1, at
    s = σ/α."""

    denoise: Callable[..., Array] = eqx.field(static=True)
    arrays: PyTree[Array]

    def __call__(self, z: Array, s: Array, /, x: Array) -> Array:
        return self.denoise(self.arrays, z * jnp.sqrt(1 + s**2), s, x)


class Estimator(Diffusion):
    r"""An `Estimator` is a posterior q(u | x) that another package has trained; made by
    `from_estimator`.

    Its events are u = (θ − location)/scale, the units that its network was trained in.
    Noise of one size for all entries of u is of another size for each of θ, so programs
    are written in u, and `parameters` makes θ of samples: under a prior N(m, c²) of θ
    that of u is N((m − location)/scale, (c/scale)²).

    Attributes:
        units: ``units.location`` and ``units.scale``, of the event's shape; 0 and 1
            where nothing is standardised.
        adapter: what makes conditions of data.
    """

    units: Units = eqx.field(static=True)
    adapter: Callable[..., Array] = eqx.field(static=True)
    declared: ClassVar[bool] = True

    def __init__(self, reading: Reading, schedule: Schedule | None, label: str):
        low, high = (float(np.log(s)) * -2 for s in reversed(reading.sigmas))
        if schedule is None:
            schedule = Schedule.log_snr(60, min=max(low, -9.0), max=min(high, 11.0))
        shape = reading.event_shape
        self.units, self.adapter = (
            Units(reading.location, reading.scale, shape),
            reading.adapt,
        )
        super().__init__(
            Denoiser(reading.denoise, reading.arrays), schedule, event_shape=shape, parameterization="x0",
            time="sigma", conditions=("x",), log_snr_range=(low, high), label=label,
        )  # fmt: skip

    def adapt(self, x: ArrayLike | None = None, /, **data: ArrayLike) -> Array:
        """Makes conditions of data, by the rules of the package that trained the
        network.

        Args:
            x: (n, …), n observations; for packages with data of several names these as
                keywords.
            data: the same by name.

        Returns:
            (n, …), for `given` in a plate, or over which ``cp.product(…, over={"x":
                …})`` runs; ``[0]`` is one.
        """
        return self.adapter(**data) if x is None else self.adapter(x, **data)

    def parameters(self, u: ArrayLike) -> np.ndarray:
        """Makes θ = location + scale·u of samples u, whose last axes are those of the
        event."""
        if np.shape(u)[np.ndim(u) - len(self.event_shape) :] != self.event_shape:
            raise ShapeError(
                f"Events of '{self.label}' have shape {self.event_shape}; got an array {np.shape(u)}.",
                fix="pass samples of this factor's site, such as result['theta'].",
            )
        return self.units.location + self.units.scale * np.asarray(u)


def from_estimator(
    estimator: object, schedule: Schedule | None = None, *, label: str = "posterior"
) -> Estimator:
    """Makes a factor of a posterior estimator that another package has trained: q(u |
    x), with the condition ``x``.

    Read are GenSBI's conditional pipelines (flow matching, score matching, EDM),
    BayesFlow's ``BasicEstimator`` with a diffusion or flow-matching network, on Keras's
    JAX backend, sbijax's ``fmpe``, ``npse`` and ``aio``, and sbi's NPSE and FMPE, from
    a file that ``tools/export_sbi.py`` writes beside torch. Nothing is trained. A score
    only: such a factor has no log-density.

    Args:
        estimator: the trained estimator; of sbijax the pair (estimator, params); of sbi
            the path of its file.
        schedule: the levels; left out, 60 of equal distance in log-SNR over the range
            of the network's training, at most from −9 to 11.
        label: the name to show.

    Raises:
        WrongTypeError: an object of no package that is read.
        LoadError: another version of its package than was tried, or no file that the
            script wrote.
        InvalidValueError: an estimator of another kind than a diffusion or
            flow-matching network, or of which something (a source distribution, a
            transformation of θ) has no noised law of this form.

    Example:
        Data of many subjects under one network, ``posterior`` being
            ``cp.from_estimator(estimator)``::

            xs = posterior.adapt(data)                                     # (n, …)
            cp.sample("u", prior * cp.product(posterior / prior, over={"x": xs}))

    References:
        Amerio 2026, *GenSBI*, arXiv 2605.27499. Radev et al. 2023, *BayesFlow*, JOSS
        8(89). Dirmeier et al. 2024, *Simulation-based inference with the Python package
        sbijax*, arXiv 2409.19435.
    """
    # The versions whose estimators were read, and compared with the packages' own
    # samples.
    tried = {"gensbi": "0.5", "bayesflow": "2.1", "sbi": "0.27", "sbijax": "0.4"}
    # A plain tuple, and not sbijax's own kinds of it.
    parts = estimator if type(estimator) is tuple and estimator else (estimator,)
    packages = {base.__module__.partition(".")[0] for base in type(parts[0]).__mro__}
    package = next((name for name in tried if name in packages), None)
    if isinstance(estimator, str | Path):
        described, arrays = sbi_file(Path(estimator))
        package, version = "sbi", str(described.get("version"))
        read: Callable[[], Reading] = partial(sbi, Path(estimator), described, arrays)
    elif package == "sbi":
        raise WrongTypeError(
            f"{type(estimator).__name__} of sbi is a network of torch, which is not read here.",
            fix="write it to a file by tools/export_sbi.py, beside torch, and pass the file's path.",
        )
    elif package is None:
        raise WrongTypeError(
            f"from_estimator reads estimators of {', '.join(tried)}; got {type(parts[0]).__module__}."
            f"{type(parts[0]).__name__}.",
            fix="wrap another package's network yourself: cp.Diffusion(lambda theta, s, x: …, schedule, event_shape=…, "
            'parameterization="score", time="sigma", conditions=("x",)).',
        )
    else:
        readers: dict[str, Callable[..., Reading]] = {
            "gensbi": gensbi,
            "bayesflow": bayesflow,
            "sbijax": sbijax,
        }
        version, read = (
            importlib.metadata.version(package),
            partial(readers[package], *parts),
        )
    if ".".join(version.split(".")[:2]) != tried[package]:
        raise LoadError(
            f"This is {package} {version}; its estimators were read and compared for {tried[package]}.",
            fix=f"pip install '{package}=={tried[package]}.*', or wrap the network yourself by cp.Diffusion.",
        )
    return Estimator(read(), schedule, label)


# ── what a reader gives, and the formulas ─────────────────────────────────────────────
Foreign = Any
"""An object of another package, known by its attributes only."""


class Reading(NamedTuple):
    """What an `Estimator` needs of another package's: E[u | u + s·ε = y] as
    ``denoise(arrays, y, s, x)``.

    y is one in the units that the network was trained in, θ = location + scale·u; s > 0
    one noise, and x one condition as ``adapt`` makes it.
    """

    denoise: Callable[[PyTree[Array], Array, Array, Array], Array]
    arrays: PyTree[Array]  # the weights, and whatever else is no code
    event_shape: tuple[int, ...]
    sigmas: tuple[
        float, float
    ]  # the least and greatest s that the network was trained on
    adapt: Callable[
        ..., Array
    ]  # the network's conditions of the user's data, (n, …), by the package's own rules
    location: ArrayLike = 0.0
    scale: ArrayLike = 1.0


Call = Callable[[Array, Array], Array]
"""The network's output at (its own input, its own time)."""
Mean = Callable[[Call, Array, Array], Array]
"""The mean of u given y = u + s·ε, by the network's output, y and s."""
Pair = tuple[float, float]
"""Two numbers: what stands for a₀ + a₁·t, or the two ends of a range."""
Weights = dict[str, Array]


def by_velocity(velocity: Call, y: Array, s: Array, signal: Pair, noise: Pair) -> Array:
    """E[u | u + s·ε = y] by the velocity v of a·u + b·ε along the straight path a = a₀
    + a₁·t, b = b₀ + b₁·t.

    At s = b/a, v is learned of a₁·u + b₁·ε, whose mean is linear in that of u, as ε =
    (y − u)/s.
    """
    (a0, a1), (b0, b1) = signal, noise
    t = (a0 * s - b0) / (b1 - a1 * s)
    return (b1 * y - s * velocity((a0 + a1 * t) * y, t)) / (b1 - a1 * s)


def by_score(score: Call, y: Array, s: Array, m: Array, t: Array) -> Array:
    """E[u | u + s·ε = y] by the score of m·u + m·s·ε at time t, by Tweedie's
    formula."""
    return y + m * s**2 * score(m * y, t)


def by_equation(
    exploding: bool, low: float, high: float, ends: Pair
) -> tuple[Mean, Pair]:
    """By the score under a VE or VP equation, as `spreads` has them, and the range of s
    for times between the ends."""

    def mean(score: Call, y: Array, s: Array) -> Array:
        if exploding:
            return by_score(
                score, y, s, jnp.ones_like(s), jnp.log(s / low) / jnp.log(high / low)
            )
        total = jnp.log1p(s**2)
        t = 2 * total / (low + jnp.sqrt(low**2 + 2 * (high - low) * total))
        return by_score(score, y, s, jnp.exp(-0.5 * total), t)

    return mean, spreads(exploding, low, high, ends)


def spreads(exploding: bool, low: float, high: float, times: Pair) -> Pair:
    """The noise s relative to the signal at two times, where noise explodes or variance
    is preserved.

    s = low·(high/low)ᵗ for VE; for VP 1 + s² = e^total, total = ∫₀ᵗ β = low·t + (high −
    low)·t²/2 (Song et al. 2021).
    """
    t = np.asarray(times, float)
    s = (
        low * (high / low) ** t
        if exploding
        else np.sqrt(np.expm1(low * t + 0.5 * (high - low) * t**2))
    )
    return float(s[0]), float(s[1])


def unreadable(estimator: object, what: str) -> InvalidValueError:
    """The error for an estimator of a known package that has no noised law of this
    form."""
    return InvalidValueError(
        f"{type(estimator).__name__} {what}.",
        fix="train a diffusion or flow-matching network whose noise is Gaussian; of θ with a bounded or skewed prior "
        "transform it before training, and write the program in the same coordinates.",
    )


def gensbi(pipeline: Foreign) -> Reading:
    """A ``ConditionalPipeline`` or ``JointPipeline``: a Flax NNX model, of which the
    averaged weights are taken, a path of noise and a method (arXiv 2605.27499)."""
    from flax import nnx  # which takes a second to import

    model = getattr(pipeline, "ema_model_wrapped", None)
    method, path = getattr(pipeline, "method", None), getattr(pipeline, "path", None)
    if not hasattr(pipeline, "cond_ids"):
        raise unreadable(pipeline, "is no pipeline with conditions")
    if model is None or method is None or path is None:
        raise unreadable(pipeline, "has not been trained: it has no averaged model yet")
    mean, sigmas = _method(pipeline, method, path.scheduler)
    graphdef, state = nnx.split(model)
    channels, cond_channels = int(pipeline.ch_obs), int(pipeline.ch_cond)
    size = int(np.prod(pipeline.dim_obs))
    arrays = (
        nnx.to_pure_dict(state),
        jnp.asarray(pipeline.obs_ids),
        jnp.asarray(pipeline.cond_ids),
    )
    shape = (size,) if channels == 1 else (size, channels)

    def denoise(arrays: PyTree[Array], y: Array, s: Array, x: Array) -> Array:
        state, obs_ids, cond_ids = arrays
        network = nnx.merge(graphdef, state)

        def call(u: Array, t: Array) -> Array:
            out = network(
                t=t, obs=u[None], obs_ids=obs_ids, cond=x[None], cond_ids=cond_ids
            )
            return jnp.asarray(out, u.dtype)[0]

        return mean(call, y.reshape(size, channels), s).reshape(shape)

    def adapt(x: ArrayLike) -> Array:
        x = jnp.asarray(x, jnp.result_type(float))
        return x[..., None] if x.ndim < 3 and cond_channels == 1 else x

    return Reading(denoise, arrays, shape, sigmas, adapt)


def _method(
    pipeline: Foreign, method: Foreign, scheduler: Foreign
) -> tuple[Mean, Pair]:
    """The mean by the network's output under GenSBI's method of training, and the range
    of s."""
    name = type(method).__name__
    if name == "FlowMatchingMethod":
        source = method.prior.base_dist
        if not (
            np.all(np.asarray(source.mean) == 0)
            and np.all(np.asarray(source.variance) == 1)
        ):
            raise unreadable(pipeline, "has a source that is not N(0, 1)")
        # The velocity u − ε of u_t = t·u + (1 − t)·ε.
        return partial(by_velocity, signal=(0.0, 1.0), noise=(1.0, -1.0)), (
            0.004,
            100.0,
        )
    if name == "ScoreMatchingMethod":
        if scheduler.name == "SM-VE":
            return by_equation(
                True,
                scheduler.sigma_min,
                scheduler.sigma_max,
                (scheduler.e_s, scheduler.T),
            )
        low, ends = scheduler.beta_min, (max(scheduler.e_s, 1e-3), scheduler.T)
        return by_equation(False, low, low + scheduler.beta_d, ends)
    if name != "DiffusionEDMMethod":
        raise unreadable(pipeline, f"is trained by {name}")

    def preconditioned(call: Call, y: Array, s: Array) -> Array:
        """c_skip·y + c_out·F(c_in·y; c_noise) (Karras et al. 2022)."""
        inner = call(scheduler.c_in(s) * y, scheduler.c_noise(s))
        return scheduler.c_skip(s) * y + scheduler.c_out(s) * inner

    low, high = np.asarray(
        scheduler.sigma(scheduler.time_schedule(jnp.array([1.0, 0.0]))), float
    )
    return preconditioned, (float(low), float(high))


def bayesflow(estimator: Foreign) -> Reading:
    """A ``BasicEstimator`` with a ``DiffusionModel`` or ``FlowMatching``, on Keras's
    JAX backend.

    Conditions go through the estimator's own adapter, standardisation and summary
    network (`Estimator.adapt`). Its adapter may rename and join parameters; what
    transforms them otherwise changes their noise, and is refused.
    """
    keras = sys.modules["keras"]  # BayesFlow has imported it
    if keras.backend.backend() != "jax":
        fix = 'set os.environ["KERAS_BACKEND"] = "jax" before BayesFlow is imported; saved networks load there.'
        raise InvalidValueError(
            f"BayesFlow runs on Keras's backend {keras.backend.backend()!r}.", fix=fix
        )
    network: Foreign = getattr(estimator, "inference_network", None)
    kind = type(network).__name__
    if kind not in ("DiffusionModel", "FlowMatching") or not network.built:
        raise unreadable(
            estimator, f"has no trained diffusion or flow-matching network, but {kind}"
        )
    variables = list(network.variables)
    shape = (int(network.base_distribution.dim),)
    schedule = getattr(network, "noise_schedule", None)

    def denoise(arrays: PyTree[Array], y: Array, s: Array, x: Array) -> Array:
        def call(u: Array, t: Array) -> Array:
            if schedule is None:
                return network.velocity(u[None], t.reshape(1, 1), conditions=x[None])[0]
            return network.score(u[None], log_snr_t=t, conditions=x[None])[0]

        with keras.StatelessScope(
            state_mapping=list(zip(variables, arrays, strict=True))
        ):
            if schedule is None:  # the velocity ε − u of (1 − t)·u + t·ε
                return by_velocity(call, y, s, (1.0, -1.0), (0.0, 1.0))
            log_snr = jnp.reshape(-2 * jnp.log(s), (1, 1))
            alpha, _ = schedule.get_alpha_sigma(log_snr)
            return by_score(call, y, s, alpha[0, 0], log_snr)

    def adapt(x: ArrayLike | None = None, **data: ArrayLike) -> Array:
        given = data if x is None else {"inference_conditions": x}
        conditions, _, _ = estimator._prepare_conditions(
            {name: np.asarray(value) for name, value in given.items()}
        )
        return jnp.asarray(conditions)

    ends = 0.004, 100.0
    if schedule is not None:  # the least and greatest σ/α
        ends = (
            float(np.exp(-0.5 * float(schedule.log_snr_max))),
            float(np.exp(-0.5 * float(schedule.log_snr_min))),
        )
    arrays = [jnp.asarray(v.value) for v in variables]
    return Reading(
        denoise, arrays, shape, ends, adapt, *_standardised(estimator, shape)
    )


def _standardised(
    estimator: Foreign, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """θ = location + scale·u, by what BayesFlow makes of u = 0 and u = 1."""
    ends = np.stack([np.zeros(shape), np.ones(shape)]).astype(np.float32)
    made = estimator.standardizer.maybe_standardize(
        ends, key="inference_variables", stage="inference", forward=False
    )
    made = np.asarray(made, np.float64)
    back = estimator.adapter(
        {"inference_variables": made.astype(np.float32)}, inverse=True, strict=False
    )
    numbers = np.concatenate([np.reshape(each, (2, -1)) for each in back.values()], 1)
    if numbers.shape != made.shape or not np.allclose(
        np.sort(numbers), np.sort(made), rtol=1e-4, atol=1e-5
    ):
        raise unreadable(
            estimator,
            "has an adapter that transforms the parameters, beyond renaming and joining them",
        )
    return made[0], made[1] - made[0]


def sbijax(estimator: Foreign, params: PyTree[Array] = None) -> Reading:
    """The functions of ``fmpe``, ``npse`` or ``aio`` around a Haiku network, and its
    parameters beside. θ is flat, in the order of sbijax's own draws, and nothing is
    standardised."""
    if params is None:
        fix = "pass both, cp.from_estimator((estimator, params)), params being what sbijax.train returned."
        raise InvalidValueError(
            "An estimator of sbijax comes without its parameters.", fix=fix
        )
    # An `ObjectiveFns` holds closures only: their names say what made them, and the
    # network is what they close over.
    sample: Foreign = getattr(estimator, "sample_fn", None)
    maker = getattr(sample, "__qualname__", type(estimator).__name__).partition(".")[0]
    if maker not in ("fmpe", "summarized_estimator"):  # npse and aio call fmpe
        raise unreadable(
            estimator,
            f"is none of sbijax's fmpe, npse and aio, but {maker}, which learns no score",
        )
    held = inspect.getclosurevars(sample).nonlocals
    if maker == "summarized_estimator":
        inner = sbijax(held["estimator"], params)
        summarise = held["summary_net"].summarize_fn
        return inner._replace(
            adapt=lambda x: _rows(summarise(held["summary_params"], _rows(x)))
        )
    network = held["network"]
    # sbijax's networks run the method of the name that they are given: its plain
    # attributes are the path of noise.
    about = network.apply(params, None, method="__getstate__")
    if "_score_net" not in about or not {"_sigma_min", "_sde"} & set(about):
        raise unreadable(
            estimator, "has a network that is neither a CNF nor a ScoreModel"
        )
    if "_sde" in about:
        times = about["_time_eps"], about["_time_max"]
        mean, sigmas = by_equation(
            about["_sde"] == "ve", about["_beta_min"], about["_beta_max"], times
        )
    else:
        # The velocity of t·θ + (1 − (1 − σ_min)·t)·ε.
        least = about["_sigma_min"]
        mean = partial(by_velocity, signal=(0.0, 1.0), noise=(1.0, least - 1))
        sigmas = max(0.004, least), 100.0

    def denoise(params: PyTree[Array], y: Array, s: Array, x: Array) -> Array:
        def call(u: Array, t: Array) -> Array:
            given = {
                "inputs": u[None],
                "time": t[None],
                "context": x[None],
                "is_training": False,
            }
            # Dropout asks for a key, and is off.
            return network.apply(
                params, jax.random.key(0), method="_score_net", **given
            )[0]

        return mean(call, y, s)

    return Reading(
        denoise,
        jax.tree.map(jnp.asarray, params),
        (int(about["_n_dimension"]),),
        sigmas,
        _rows,
    )


def _rows(x: ArrayLike) -> Array:
    x = jnp.asarray(x, jnp.result_type(float))
    if x.ndim != 2:
        raise ShapeError(
            f"sbijax's observations are rows, (n, size); got an array {x.shape}.",
            fix="reshape them.",
        )
    return x


def sbi_file(path: Path) -> tuple[JSONObject, Weights]:
    """What a file that ``tools/export_sbi.py`` wrote beside torch says of an estimator,
    and its arrays. Nothing in it is run."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
        described = json.loads(str(arrays.pop("described")))
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        fix = "write it by tools/export_sbi.py, beside torch and sbi."
        raise LoadError(
            f"{path} is no estimator that was exported: {error}.", fix=fix
        ) from error
    wrong = sorted(
        name for name, a in arrays.items() if not np.issubdtype(a.dtype, np.floating)
    )
    if not isinstance(described, dict) or wrong:
        raise LoadError(
            f"{path} has no numbers for {', '.join(wrong) or 'its description'}.",
            fix="export it again.",
        )
    return described, {
        name: jnp.asarray(a, jnp.result_type(float)) for name, a in arrays.items()
    }


def sbi(path: Path, described: JSONObject, arrays: Weights) -> Reading:
    """A ``ConditionalScoreEstimator`` or ``FlowMatchingEstimator``, of sbi's NPSE and
    FMPE. sbi's noise is in the units of θ; only with ``compose_standardization`` in
    standardised ones."""
    try:
        mean, sigmas = _sbi_kind(described)
        shape = jnp.shape(arrays["net.output_layer.bias"])
        network = partial(
            _mlp, _activation(described["activation"]), bool(described["skip"])
        )
        prior = [
            jnp.broadcast_to(jnp.reshape(arrays[name], -1), shape)
            for name in ("mean_0", "std_0")
        ]
        units = [np.asarray(arrays[name]).reshape(shape) for name in ("shift", "scale")]
        weights = {
            name: array for name, array in arrays.items() if name.startswith("net.")
        }
        layers = [
            (kind, f"embedding.{i}.") for i, kind in enumerate(described["embedding"])
        ]
        # A file that lacks an array is found here, and not inside of a compiled run.
        width = jnp.shape(arrays["net.condition_layer.weight"])[1]
        wanted = (
            (width,)
            if described["condition_shape"] is None
            else tuple(described["condition_shape"])
        )
        jax.eval_shape(
            lambda: network(weights, jnp.zeros(shape), jnp.zeros(width), jnp.ones(()))
        )
    except InvalidValueError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(
            f"{path} lacks {error} for a {described.get('kind')}.",
            fix="export it again.",
        ) from error

    def denoise(arrays: PyTree[Array], y: Array, s: Array, x: Array) -> Array:
        weights, location, scale = arrays
        return mean(lambda u, t: network(weights, u, x, t), location, scale, y, s)

    def adapt(x: ArrayLike) -> Array:
        data = jnp.asarray(x, jnp.result_type(float))
        if data.shape[1:] != wanted:
            unembedded = (
                ": it was exported without its embedding net."
                if described["condition_shape"] is None
                else "."
            )
            fix = f"pass n of them, (n, …){unembedded}"
            raise ShapeError(
                f"Conditions of {path.name} have shape {wanted}; got an array {data.shape}.",
                fix=fix,
            )
        return jax.vmap(lambda row: _embedded(arrays, layers, row))(data)

    return Reading(denoise, (weights, *prior), shape, sigmas, adapt, *units)


def _activation(name: str) -> Callable[[Array], Array]:
    if name.lower() not in ACTIVATIONS:
        fix = f"train with one of {', '.join(ACTIVATIONS)}."
        raise InvalidValueError(f"An activation of the network is {name}.", fix=fix)
    return ACTIVATIONS[name.lower()]


def _layer(w: Weights, name: str, x: Array) -> Array:
    """A linear layer, whose weight is a matrix, or a layer norm."""
    weight = w[f"{name}weight"]
    return (weight @ x if weight.ndim == 2 else weight * normalised(x, 1e-5)) + w[
        f"{name}bias"
    ]  # torch's ε


def _embedded(w: Weights, layers: list[tuple[str, str]], x: Array) -> Array:
    """One observation through the embedding, whose layers the script has listed."""
    for kind, name in layers:
        if kind == "Standardize":
            x = (x - w[f"{name}_mean"]) / w[f"{name}_std"]
        elif kind == "Flatten":
            x = x.reshape(-1)
        elif kind in ("Linear", "LayerNorm"):
            x = _layer(w, name, x)
        else:
            x = _activation(kind)(x)
    return x


def _mlp(
    activation: Callable[[Array], Array],
    skip: bool,
    w: Weights,
    u: Array,
    x: Array,
    t: Array,
) -> Array:
    """``VectorFieldMLP`` of its input u, a condition x and its time t."""
    both = jnp.concatenate(
        [_layer(w, "net.input_layer.", u), _layer(w, "net.condition_layer.", x)]
    )
    h = activation(_layer(w, "net.input_merge_layer.", activation(both)))
    if "net.time_emb.W" in w:
        embedded = waves(t * w["net.time_emb.W"] * 2 * jnp.pi, cosine_first=False)
    else:
        turns = t * w["net.time_emb.div_term"]
        embedded = jnp.stack([jnp.sin(turns), jnp.cos(turns)], 1).reshape(-1)
    time = _layer(w, "net.time_linear_layer.", embedded)
    for i in range(sum(name.startswith("net.layers.") for name in w) // 2):
        h = activation(_layer(w, f"net.layers.{i}.", h)) + time + (h if skip else 0.0)
        h = (
            _layer(w, f"net.layers_norm.{i}.", h)
            if f"net.layers_norm.{i}.weight" in w
            else h
        )
    return _layer(w, "net.output_layer.", h)


def _sbi_kind(
    about: JSONObject,
) -> tuple[Callable[[Call, Array, Array, Array, Array], Array], Pair]:
    """E[θ | θ + s·ε = y] of the network as a function of (its input, its time), the
    mean and standard deviation of the training's θ, y and s; and the least and greatest
    s of the training."""
    kind = about["kind"]
    if kind == "FlowMatchingEstimator":
        extra = about["noise_scale"]
        return partial(_by_flow, extra, bool(about["gaussian_baseline"])), (
            max(0.004, extra),
            100.0,
        )
    signals: dict[str, Callable[[Array], Array]] = {
        "VEScoreEstimator": jnp.ones_like,
        "VPScoreEstimator": lambda s: 1 / jnp.sqrt(1 + s**2),
        "SubVPScoreEstimator": lambda s: 2 / (s + jnp.sqrt(s**2 + 4)),
    }
    if kind not in signals:
        raise InvalidValueError(
            f"The file holds a {kind}.", fix="train NPSE (VE, VP or sub-VP) or FMPE."
        )
    exploding = kind == "VEScoreEstimator"
    least, most = (
        about[f"{'sigma' if exploding else 'beta'}_{end}"] for end in ("min", "max")
    )
    low, high = spreads(exploding, least, most, (about["t_min"], about["t_max"]))
    if kind == "SubVPScoreEstimator":  # its signal m is that of VP, and σ = 1 − m²
        low, high = (s**2 / (1 + s**2) ** 0.5 for s in (low, high))
    return partial(_by_score, signals[kind]), (low, high)


def _by_flow(
    extra: float,
    baseline: bool,
    network: Call,
    loc: Array,
    sd: Array,
    y: Array,
    s: Array,
) -> Array:
    """Of θ_t = (1 − t)·θ + (t + extra)·ε the velocity is E[ε − θ | θ_t]."""

    def velocity(moved: Array, t: Array) -> Array:
        clear, away = ((1 - t) * sd) ** 2 + t**2 + 1e-6, moved - (1 - t) * loc
        of_gaussian = (t - (1 - t) * sd**2) / clear * away if baseline else 0.0
        return (
            of_gaussian - loc + jnp.sqrt(1 + sd**2) * network(away / jnp.sqrt(clear), t)
        )

    return by_velocity(velocity, y, s, (1.0, -1.0), (extra, 1.0))


def _by_score(
    signal: Callable[[Array], Array],
    network: Call,
    loc: Array,
    sd: Array,
    y: Array,
    s: Array,
) -> Array:
    """Of θ_t = m·θ + σ·ε the score is that of a Gaussian less m/σ times the network,
    which is given σ for a time."""
    m = signal(s)

    def score(moved: Array, sigma: Array) -> Array:
        away, clear = moved - m * loc, (m * sd) ** 2 + sigma**2
        return -m / sigma * network(away / jnp.sqrt(clear), sigma) - away / clear

    return by_score(score, y, s, m, m * s)
