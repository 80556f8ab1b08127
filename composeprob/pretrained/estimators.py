"""Posteriors that other packages have trained, as factors: objects of GenSBI, BayesFlow
and sbijax, and files of sbi.

Each package has a reader, which states an estimator as the mean of u given y = u + s·ε.
The formulas that all readers use stand before them.
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
from jaxtyping import Float, PyTree

from composeprob.core import Diffusion, Schedule
from composeprob.errors import InvalidValueError, LoadError, ShapeError, WrongTypeError
from composeprob.json_data import JSONObject
from composeprob.pretrained.layers import ACTIVATIONS, normalised, waves


class Units:
    """θ = location + scale·u, both of the event's shape.

    Compiled code holds it, so it is equal by its numbers.
    """

    def __init__(self, location: ArrayLike, scale: ArrayLike, shape: tuple[int, ...]):
        self.location = np.array(np.broadcast_to(location, shape), float)
        self.scale = np.array(np.broadcast_to(scale, shape), float)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Units) and hash(self) == hash(other)

    def __repr__(self) -> str:
        return f"Units(location={self.location}, scale={self.scale})"

    def __hash__(self) -> int:
        return hash((self.location.tobytes(), self.scale.tobytes()))


class Denoiser(eqx.Module):
    """The network of an `Estimator`: the mean of u given z = α·u + σ·ε, α² + σ² = 1, at
    s = σ/α."""

    denoise: Callable[..., Array] = eqx.field(static=True)
    arrays: PyTree[Array]

    def __call__(self, z: Array, s: Float[Array, ""], /, x: Array) -> Array:
        # z/α = u + s·ε, as 1/α = √(1 + s²).
        return self.denoise(self.arrays, z * jnp.sqrt(1 + s**2), s, x)


class Estimator(Diffusion):
    r"""An `Estimator` is a posterior q(u | x) that another package has trained; made by
    `from_estimator`.

    Its events are u = (θ − location)/scale, the units that its network was trained in.
    Noise of one size for all entries of u has different sizes for those of θ. So
    programs are written in u, and `parameters` makes θ of samples: under a prior
    N(m, c²) of θ, that of u is N((m − location)/scale, (c/scale)²).

    Attributes:
        units: ``units.location`` and ``units.scale``, of the event's shape; 0 and 1
            where nothing is standardised.
        adapter: the function that makes conditions of data.
    """

    units: Units = eqx.field(static=True)
    adapter: Callable[..., Array] = eqx.field(static=True)
    declared: ClassVar[bool] = True

    def __init__(self, reading: Reading, schedule: Schedule | None, label: str):
        least, greatest = reading.sigmas
        # log-SNR = −2·log s: the greatest noise has the least.
        low = float(np.log(greatest)) * -2
        high = float(np.log(least)) * -2
        if schedule is None:
            schedule = Schedule.log_snr(60, min=max(low, -9.0), max=min(high, 11.0))
        shape = reading.event_shape
        self.units = Units(reading.location, reading.scale, shape)
        self.adapter = reading.adapt
        super().__init__(
            Denoiser(reading.denoise, reading.arrays),
            schedule,
            event_shape=shape,
            parameterization="x0",
            time="sigma",
            conditions=("x",),
            log_snr_range=(low, high),
            label=label,
        )

    def adapt(self, x: ArrayLike | None = None, /, **data: ArrayLike) -> Array:
        """Make conditions of data, by the rules of the package that trained the
        network.

        Args:
            x: n observations, (n, …); left out for packages whose data have names.
            data: n observations of each name.

        Returns:
            Conditions (n, …), for `given` in a plate, or for ``cp.product(…, over={"x":
                …})``; ``[0]`` is one.
        """
        if x is None:
            return self.adapter(**data)
        return self.adapter(x, **data)

    def parameters(self, u: ArrayLike) -> Float[np.ndarray, "*batch event"]:
        """Make θ = location + scale·u of samples u, whose last axes are those of the
        event."""
        if np.shape(u)[np.ndim(u) - len(self.event_shape) :] != self.event_shape:
            raise ShapeError(
                f"Events of '{self.label}' have shape {self.event_shape}; "
                f"got an array {np.shape(u)}.",
                fix="pass samples of this factor's site, such as result['theta'].",
            )
        return self.units.location + self.units.scale * np.asarray(u)


_TESTED = {"gensbi": "0.5", "bayesflow": "2.1", "sbi": "0.27", "sbijax": "0.4"}
"""Versions of packages whose estimators were compared with their own samples."""


def from_estimator(
    estimator: object, schedule: Schedule | None = None, *, label: str = "posterior"
) -> Estimator:
    """Make a factor of a posterior estimator that another package has trained: q(u |
    x), with the condition ``x``.

    Supported are GenSBI's conditional pipelines (flow matching, score matching, EDM),
    BayesFlow's ``BasicEstimator`` with a diffusion or flow-matching network, on Keras's
    JAX backend, sbijax's ``fmpe``, ``npse`` and ``aio``, and sbi's NPSE and FMPE, from
    a file that ``tools/export_sbi.py`` writes beside torch. Nothing is trained. Such a
    factor offers only its score, no log-density.

    Args:
        estimator: the trained estimator; of sbijax the pair (estimator, params); of sbi
            the path of its file.
        schedule: the levels; left out, 60 of equal distance in log-SNR over the range
            of the network's training, at most from −9 to 11.
        label: the name to show.

    Raises:
        WrongTypeError: an object of a package that is not supported.
        LoadError: another version of its package than was tested, or a file that the
            script did not write.
        InvalidValueError: an estimator other than a diffusion or flow-matching network,
            or one whose source distribution or transformation of θ has no noised
            distribution of this form.

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
    if isinstance(estimator, str | Path):
        return Estimator(_read_file(Path(estimator)), schedule, label)
    # sbijax's pair is a tuple itself; its estimators are named tuples.
    arguments = estimator if type(estimator) is tuple and estimator else (estimator,)
    package = _package_of(arguments[0])
    _check_version(package, importlib.metadata.version(package))
    readers: dict[str, Callable[..., Reading]] = {
        "gensbi": gensbi,
        "bayesflow": bayesflow,
        "sbijax": sbijax,
    }
    return Estimator(readers[package](*arguments), schedule, label)


def _package_of(estimator: object) -> str:
    """Name of the package that an estimator's class, or a base of it, is from."""
    kind = type(estimator)
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__}
    package = next((name for name in _TESTED if name in packages), None)
    if package == "sbi":
        raise WrongTypeError(
            f"{kind.__name__} of sbi is a PyTorch network, which from_estimator cannot "
            "read.",
            fix="write it to a file by tools/export_sbi.py, beside torch, and pass the "
            "file's path.",
        )
    if package is None:
        raise WrongTypeError(
            f"from_estimator reads estimators of {', '.join(_TESTED)}; "
            f"got {kind.__module__}.{kind.__name__}.",
            fix="wrap another package's network yourself: cp.Diffusion(lambda theta, "
            's, x: …, schedule, event_shape=…, parameterization="score", '
            'time="sigma", conditions=("x",)).',
        )
    return package


def _read_file(path: Path) -> Reading:
    description, arrays = sbi_file(path)
    _check_version("sbi", str(description.get("version")))
    return sbi(path, description, arrays)


def _check_version(package: str, version: str) -> None:
    tested = _TESTED[package]
    if ".".join(version.split(".")[:2]) != tested:
        raise LoadError(
            f"This is {package} {version}; its estimators were read and compared for "
            f"{tested}.",
            fix=f"pip install '{package}=={tested}.*', or wrap the network yourself by "
            "cp.Diffusion.",
        )


# ── the result of a reader, and the formulas ──────────────────────────────────────────
Foreign = Any
"""An object of another package, of which the attributes are used."""


class Reading(NamedTuple):
    """An estimator of another package: E[u | u + s·ε = y] as ``denoise(arrays, y, s,
    x)``.

    u, y and ε are in the units that the network was trained in, θ = location + scale·u;
    s > 0 is one noise, and x one condition as ``adapt`` makes it.

    Attributes:
        denoise: the mean of u.
        arrays: the weights, and other numbers that ``denoise`` needs.
        event_shape: the shape of u.
        sigmas: the least and the greatest s of the network's training.
        adapt: from n observations to n conditions, by the package's own rules.
        location: 0 where nothing is standardised.
        scale: 1 where nothing is standardised.
    """

    denoise: Callable[[PyTree[Array], Array, Array, Array], Array]
    arrays: PyTree[Array]
    event_shape: tuple[int, ...]
    sigmas: tuple[float, float]
    adapt: Callable[..., Array]
    location: ArrayLike = 0.0
    scale: ArrayLike = 1.0


Call = Callable[[Array, Array], Array]
"""The network's output at (its own input, its own time)."""
Mean = Callable[[Call, Array, Array], Array]
"""The mean of u given y = u + s·ε, by the network's output, y and s."""
Pair = tuple[float, float]
"""The coefficients of a₀ + a₁·t, or the two ends of a range."""
Weights = dict[str, Array]

STRAIGHT = (0.004, 100.0)
"""Range of s of flow matching, whose times have all s from 0 to infinity."""


def by_velocity(velocity: Call, y: Array, s: Array, signal: Pair, noise: Pair) -> Array:
    """E[u | u + s·ε = y] by the velocity v of a·u + b·ε along the straight path a = a₀
    + a₁·t, b = b₀ + b₁·t.

    v is the mean of a₁·u + b₁·ε at s = b/a. It is linear in the mean of u, as ε = (y −
    u)/s.
    """
    a0, a1 = signal
    b0, b1 = noise
    t = (a0 * s - b0) / (b1 - a1 * s)
    return (b1 * y - s * velocity((a0 + a1 * t) * y, t)) / (b1 - a1 * s)


def by_score(score: Call, y: Array, s: Array, m: Array, t: Array) -> Array:
    """E[u | u + s·ε = y] by the score of m·u + m·s·ε at time t, by Tweedie's
    formula."""
    return y + m * s**2 * score(m * y, t)


def by_equation(
    exploding: bool, low: float, high: float, ends: Pair
) -> tuple[Mean, Pair]:
    """Mean by the score under a VE or VP equation (see `spreads`), and the range of s
    for times between the ends."""

    def mean(score: Call, y: Array, s: Array) -> Array:
        if exploding:
            t = jnp.log(s / low) / jnp.log(high / low)
            return by_score(score, y, s, jnp.ones_like(s), t)
        total = jnp.log1p(s**2)
        # The positive root of ∫₀ᵗ β = total, without a difference of nearly equal
        # numbers.
        t = 2 * total / (low + jnp.sqrt(low**2 + 2 * (high - low) * total))
        return by_score(score, y, s, jnp.exp(-0.5 * total), t)

    return mean, spreads(exploding, low, high, ends)


def spreads(exploding: bool, low: float, high: float, times: Pair) -> Pair:
    """Noise-to-signal ratios s at two times of a variance-exploding or
    variance-preserving equation.

    s = low·(high/low)ᵗ for VE; for VP 1 + s² = e^total, total = ∫₀ᵗ β = low·t + (high −
    low)·t²/2 (Song et al. 2021).
    """
    t = np.asarray(times, float)
    if exploding:
        s = low * (high / low) ** t
    else:
        s = np.sqrt(np.expm1(low * t + 0.5 * (high - low) * t**2))
    return float(s[0]), float(s[1])


def unreadable(estimator: object, reason: str) -> InvalidValueError:
    """Return the error for an estimator of a supported package that has no noised
    distribution of this form."""
    return InvalidValueError(
        f"{type(estimator).__name__} {reason}.",
        fix="train a diffusion or flow-matching network whose noise is Gaussian; of θ "
        "with a bounded or skewed prior transform it before training, and write the "
        "program in the same coordinates.",
    )


def gensbi(pipeline: Foreign) -> Reading:
    """Read GenSBI's ``ConditionalPipeline`` or ``JointPipeline``: a Flax NNX model with
    averaged weights, a path of noise and a method (arXiv 2605.27499)."""
    from flax import nnx  # takes a second to import

    model = getattr(pipeline, "ema_model_wrapped", None)
    method = getattr(pipeline, "method", None)
    path = getattr(pipeline, "path", None)
    if not hasattr(pipeline, "cond_ids"):
        raise unreadable(pipeline, "is not a pipeline with conditions")
    if model is None or method is None or path is None:
        raise unreadable(pipeline, "has not been trained: it has no averaged model yet")
    mean, sigmas = _method(pipeline, method, path.scheduler)
    graphdef, state = nnx.split(model)
    channels = int(pipeline.ch_obs)
    cond_channels = int(pipeline.ch_cond)
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
        if x.ndim < 3 and cond_channels == 1:
            return x[..., None]
        return x

    return Reading(denoise, arrays, shape, sigmas, adapt)


def _method(
    pipeline: Foreign, method: Foreign, scheduler: Foreign
) -> tuple[Mean, Pair]:
    """Mean by the network's output under GenSBI's method of training, and the range of
    s."""
    name = type(method).__name__
    if name == "FlowMatchingMethod":
        source = method.prior.base_dist
        centred = np.all(np.asarray(source.mean) == 0)
        if not (centred and np.all(np.asarray(source.variance) == 1)):
            raise unreadable(pipeline, "has a source that is not N(0, 1)")
        # The velocity u − ε of u_t = t·u + (1 − t)·ε.
        return partial(by_velocity, signal=(0.0, 1.0), noise=(1.0, -1.0)), STRAIGHT
    if name == "ScoreMatchingMethod" and scheduler.name == "SM-VE":
        ends = (scheduler.e_s, scheduler.T)
        return by_equation(True, scheduler.sigma_min, scheduler.sigma_max, ends)
    if name == "ScoreMatchingMethod":
        low = scheduler.beta_min
        ends = (max(scheduler.e_s, 1e-3), scheduler.T)
        return by_equation(False, low, low + scheduler.beta_d, ends)
    if name != "DiffusionEDMMethod":
        raise unreadable(pipeline, f"is trained by {name}")

    def preconditioned(call: Call, y: Array, s: Array) -> Array:
        """c_skip·y + c_out·F(c_in·y; c_noise) (Karras et al. 2022)."""
        inner = call(scheduler.c_in(s) * y, scheduler.c_noise(s))
        return scheduler.c_skip(s) * y + scheduler.c_out(s) * inner

    ends = scheduler.time_schedule(jnp.array([1.0, 0.0]))
    low, high = np.asarray(scheduler.sigma(ends), float)
    return preconditioned, (float(low), float(high))


def bayesflow(estimator: Foreign) -> Reading:
    """Read BayesFlow's ``BasicEstimator`` with a ``DiffusionModel`` or
    ``FlowMatching``, on Keras's JAX backend.

    Conditions go through the estimator's own adapter, standardisation and summary
    network (`Estimator.adapt`). Its adapter may rename and join parameters; other
    transformations change their noise, and are refused.
    """
    keras = sys.modules["keras"]  # BayesFlow has imported it
    if keras.backend.backend() != "jax":
        raise InvalidValueError(
            f"BayesFlow runs on Keras's backend {keras.backend.backend()!r}.",
            fix='set os.environ["KERAS_BACKEND"] = "jax" before BayesFlow is imported; '
            "saved networks load there.",
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

        state = list(zip(variables, arrays, strict=True))
        with keras.StatelessScope(state_mapping=state):
            if schedule is None:
                # The velocity ε − u of (1 − t)·u + t·ε.
                return by_velocity(call, y, s, (1.0, -1.0), (0.0, 1.0))
            log_snr = jnp.reshape(-2 * jnp.log(s), (1, 1))
            alpha, _ = schedule.get_alpha_sigma(log_snr)
            return by_score(call, y, s, alpha[0, 0], log_snr)

    def adapt(x: ArrayLike | None = None, **data: ArrayLike) -> Array:
        given = data if x is None else {"inference_conditions": x}
        given = {name: np.asarray(value) for name, value in given.items()}
        conditions, _, _ = estimator._prepare_conditions(given)
        return jnp.asarray(conditions)

    sigmas = STRAIGHT
    if schedule is not None:
        # s = σ/α = e^(−λ/2).
        sigmas = (
            float(np.exp(-0.5 * float(schedule.log_snr_max))),
            float(np.exp(-0.5 * float(schedule.log_snr_min))),
        )
    arrays = [jnp.asarray(v.value) for v in variables]
    location, scale = _standardised(estimator, shape)
    return Reading(denoise, arrays, shape, sigmas, adapt, location, scale)


def _standardised(
    estimator: Foreign, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Location and scale of θ = location + scale·u, from BayesFlow's θ of u = 0 and
    u = 1."""
    ends = np.stack([np.zeros(shape), np.ones(shape)]).astype(np.float32)
    theta = estimator.standardizer.maybe_standardize(
        ends, key="inference_variables", stage="inference", forward=False
    )
    theta = np.asarray(theta, np.float64)
    by_name = estimator.adapter(
        {"inference_variables": theta.astype(np.float32)}, inverse=True, strict=False
    )
    # Renamed and joined parameters are the same numbers in another order.
    columns = [np.reshape(values, (2, -1)) for values in by_name.values()]
    numbers = np.concatenate(columns, 1)
    if numbers.shape != theta.shape or not np.allclose(
        np.sort(numbers), np.sort(theta), rtol=1e-4, atol=1e-5
    ):
        raise unreadable(
            estimator,
            "has an adapter that transforms the parameters, beyond renaming and "
            "joining them",
        )
    return theta[0], theta[1] - theta[0]


def sbijax(estimator: Foreign, params: PyTree[Array] = None) -> Reading:
    """Read sbijax's ``fmpe``, ``npse`` or ``aio``, functions around a Haiku network,
    and its parameters.

    θ is flat, in the order of sbijax's own draws, and nothing is standardised.
    """
    if params is None:
        raise InvalidValueError(
            "An estimator of sbijax comes without its parameters.",
            fix="pass both, cp.from_estimator((estimator, params)), params being those "
            "that sbijax.train returned.",
        )
    # An `ObjectiveFns` holds closures only: their qualified names start with the
    # function that made them, and they close over the network.
    sample: Foreign = getattr(estimator, "sample_fn", None)
    maker = getattr(sample, "__qualname__", type(estimator).__name__).partition(".")[0]
    if maker not in ("fmpe", "summarized_estimator"):  # npse and aio call fmpe
        raise unreadable(
            estimator,
            f"is none of sbijax's fmpe, npse and aio, but {maker}, which learns no "
            "score",
        )
    closure = inspect.getclosurevars(sample).nonlocals
    if maker == "summarized_estimator":
        inner = sbijax(closure["estimator"], params)
        summarise = closure["summary_net"].summarize_fn
        of_summaries = closure["summary_params"]
        return inner._replace(adapt=lambda x: _rows(summarise(of_summaries, _rows(x))))
    network = closure["network"]
    # sbijax's networks run the method whose name they get; the attributes of the
    # module state the path of noise.
    state = network.apply(params, None, method="__getstate__")
    if "_score_net" not in state or not {"_sigma_min", "_sde"} & set(state):
        raise unreadable(
            estimator, "has a network that is neither a CNF nor a ScoreModel"
        )
    if "_sde" in state:
        times = state["_time_eps"], state["_time_max"]
        mean, sigmas = by_equation(
            state["_sde"] == "ve", state["_beta_min"], state["_beta_max"], times
        )
    else:
        # The velocity of t·θ + (1 − (1 − σ_min)·t)·ε.
        least = state["_sigma_min"]
        mean = partial(by_velocity, signal=(0.0, 1.0), noise=(1.0, least - 1))
        sigmas = (max(STRAIGHT[0], least), STRAIGHT[1])

    def denoise(params: PyTree[Array], y: Array, s: Array, x: Array) -> Array:
        def call(u: Array, t: Array) -> Array:
            inputs = {
                "inputs": u[None],
                "time": t[None],
                "context": x[None],
                "is_training": False,
            }
            # Dropout needs a key, and is off.
            key = jax.random.key(0)
            return network.apply(params, key, method="_score_net", **inputs)[0]

        return mean(call, y, s)

    arrays = jax.tree.map(jnp.asarray, params)
    return Reading(denoise, arrays, (int(state["_n_dimension"]),), sigmas, _rows)


def _rows(x: ArrayLike) -> Float[Array, "n size"]:
    """Return observations as rows; refuse other shapes."""
    x = jnp.asarray(x, jnp.result_type(float))
    if x.ndim != 2:
        raise ShapeError(
            f"sbijax's observations are rows, (n, size); got an array {x.shape}.",
            fix="reshape them.",
        )
    return x


def sbi_file(path: Path) -> tuple[JSONObject, Weights]:
    """Return the description of an estimator and its arrays, from a file that
    ``tools/export_sbi.py`` wrote beside torch.

    Nothing in it is run.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
        description = json.loads(str(arrays.pop("described")))
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"it has no entry {reason}"
        raise LoadError(
            f"{path} is not an exported estimator: {reason}.",
            fix="write it by tools/export_sbi.py, beside torch and sbi.",
        ) from error
    wrong = sorted(
        name for name, a in arrays.items() if not np.issubdtype(a.dtype, np.floating)
    )
    if not isinstance(description, dict) or wrong:
        raise LoadError(
            f"{path} lacks numbers for {', '.join(wrong) or 'its description'}.",
            fix="export it again.",
        )
    dtype = jnp.result_type(float)
    return description, {name: jnp.asarray(a, dtype) for name, a in arrays.items()}


def sbi(path: Path, description: JSONObject, arrays: Weights) -> Reading:
    """Read a ``ConditionalScoreEstimator`` or ``FlowMatchingEstimator``, of sbi's NPSE
    and FMPE.

    sbi's noise is in the units of θ, and with ``compose_standardization`` in
    standardised units.
    """
    try:
        mean, sigmas = _sbi_mean(description)
        shape = jnp.shape(arrays["net.output_layer.bias"])
        activation = _activation(description["activation"])
        network = partial(_mlp, activation, bool(description["skip"]))
        prior_mean = jnp.broadcast_to(jnp.reshape(arrays["mean_0"], -1), shape)
        prior_sd = jnp.broadcast_to(jnp.reshape(arrays["std_0"], -1), shape)
        location = np.asarray(arrays["shift"]).reshape(shape)
        scale = np.asarray(arrays["scale"]).reshape(shape)
        weights = {
            name: array for name, array in arrays.items() if name.startswith("net.")
        }
        kinds = list(description["embedding"])
        width = jnp.shape(arrays["net.condition_layer.weight"])[1]
        embedded = description["condition_shape"] is not None
        condition_shape: tuple[int, ...] = (width,)
        if embedded:
            condition_shape = tuple(description["condition_shape"])
        # A missing array raises here, and not inside of a compiled run.
        jax.eval_shape(
            lambda: network(weights, jnp.zeros(shape), jnp.zeros(width), jnp.ones(()))
        )
    except InvalidValueError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(
            f"{path} lacks {error} for a {description.get('kind')}.",
            fix="export it again.",
        ) from error

    def denoise(arrays: PyTree[Array], y: Array, s: Array, x: Array) -> Array:
        weights, prior_mean, prior_sd = arrays
        return mean(lambda u, t: network(weights, u, x, t), prior_mean, prior_sd, y, s)

    def adapt(x: ArrayLike) -> Array:
        data = jnp.asarray(x, jnp.result_type(float))
        if data.shape[1:] != condition_shape:
            fix = "pass n of them, (n, …)."
            if not embedded:
                fix = (
                    "pass n of them, (n, …): it was exported without its embedding net."
                )
            raise ShapeError(
                f"Conditions of {path.name} have shape {condition_shape}; "
                f"got an array {data.shape}.",
                fix=fix,
            )
        return jax.vmap(lambda row: _embedded(arrays, kinds, row))(data)

    held = (weights, prior_mean, prior_sd)
    return Reading(denoise, held, shape, sigmas, adapt, location, scale)


def _activation(name: str) -> Callable[[Array], Array]:
    if name.lower() not in ACTIVATIONS:
        fix = f"train with one of {', '.join(ACTIVATIONS)}."
        raise InvalidValueError(f"An activation of the network is {name}.", fix=fix)
    return ACTIVATIONS[name.lower()]


def _layer(w: Weights, name: str, x: Array) -> Array:
    """A linear layer, whose weight is a matrix, or a layer norm."""
    weight = w[f"{name}weight"]
    bias = w[f"{name}bias"]
    if weight.ndim == 2:
        return weight @ x + bias
    return weight * normalised(x, 1e-5) + bias  # torch's ε


def _embedded(w: Weights, kinds: list[str], x: Array) -> Float[Array, " width"]:
    """Embedding of one observation, by layers whose kinds the file lists."""
    for i, kind in enumerate(kinds):
        name = f"embedding.{i}."
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
    u: Float[Array, " dims"],
    x: Float[Array, " width"],
    t: Float[Array, ""],
) -> Float[Array, " dims"]:
    """``VectorFieldMLP`` of its input u, a condition x and its time t."""
    of_input = _layer(w, "net.input_layer.", u)
    of_condition = _layer(w, "net.condition_layer.", x)
    merged = activation(jnp.concatenate([of_input, of_condition]))
    h = activation(_layer(w, "net.input_merge_layer.", merged))
    if "net.time_emb.W" in w:
        sinusoids = waves(t * w["net.time_emb.W"] * 2 * jnp.pi, cosine_first=False)
    else:
        # Sines and cosines alternate.
        turns = t * w["net.time_emb.div_term"]
        sinusoids = jnp.stack([jnp.sin(turns), jnp.cos(turns)], 1).reshape(-1)
    time = _layer(w, "net.time_linear_layer.", sinusoids)
    # Each hidden layer has a weight and a bias.
    depth = sum(name.startswith("net.layers.") for name in w) // 2
    for i in range(depth):
        residual = h if skip else 0.0
        h = activation(_layer(w, f"net.layers.{i}.", h)) + time + residual
        if f"net.layers_norm.{i}.weight" in w:
            h = _layer(w, f"net.layers_norm.{i}.", h)
    return _layer(w, "net.output_layer.", h)


SbiMean = Callable[[Call, Array, Array, Array, Array], Array]
"""E[θ | θ + s·ε = y] by the network, a function of (its input, its time), by the mean
and the standard deviation of the training's θ, y and s."""


def _sbi_mean(description: JSONObject) -> tuple[SbiMean, Pair]:
    """Mean of θ by the kind of an estimator, and the least and the greatest s of its
    training."""
    kind = description["kind"]
    if kind == "FlowMatchingEstimator":
        extra = description["noise_scale"]
        mean = partial(_by_flow, extra, bool(description["gaussian_baseline"]))
        return mean, (max(STRAIGHT[0], extra), STRAIGHT[1])
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
    symbol = "sigma" if exploding else "beta"
    least, greatest = description[f"{symbol}_min"], description[f"{symbol}_max"]
    times = (description["t_min"], description["t_max"])
    low, high = spreads(exploding, least, greatest, times)
    if kind == "SubVPScoreEstimator":
        # Its signal m is that of VP, and σ = 1 − m², so σ/m = s²/√(1 + s²).
        low = low**2 / (1 + low**2) ** 0.5
        high = high**2 / (1 + high**2) ** 0.5
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
    """Mean of θ by the velocity E[ε − θ | θ_t] of θ_t = (1 − t)·θ + (t + extra)·ε.

    The network's input is θ_t, standardised as of a Gaussian θ; with ``baseline`` the
    velocity of that Gaussian is added to its output.
    """

    def velocity(noised: Array, t: Array) -> Array:
        variance = ((1 - t) * sd) ** 2 + t**2 + 1e-6
        centred = noised - (1 - t) * loc
        of_gaussian: Array | float = 0.0
        if baseline:
            of_gaussian = (t - (1 - t) * sd**2) / variance * centred
        learned = network(centred / jnp.sqrt(variance), t)
        return of_gaussian - loc + jnp.sqrt(1 + sd**2) * learned

    return by_velocity(velocity, y, s, (1.0, -1.0), (extra, 1.0))


def _by_score(
    signal: Callable[[Array], Array],
    network: Call,
    loc: Array,
    sd: Array,
    y: Array,
    s: Array,
) -> Array:
    """Mean of θ by the score of θ_t = m·θ + σ·ε.

    This is the score of a Gaussian less m/σ times the network, whose time is σ.
    """
    m = signal(s)

    def score(noised: Array, sigma: Array) -> Array:
        centred = noised - m * loc
        variance = (m * sd) ** 2 + sigma**2
        learned = network(centred / jnp.sqrt(variance), sigma)
        return -m / sigma * learned - centred / variance

    return by_score(score, y, s, m, m * s)
