"""sbijax's FMPE, NPSE and AiO: functions around a Haiku network, beside its parameters."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from composeprob.errors import InvalidValueError, ShapeError
from composeprob.pretrained.network import Foreign, Mean, Reading, by_equation, by_velocity, unreadable


def read(estimator: Foreign, params: PyTree[Array] = None) -> Reading:
    """What `from_estimator` needs of an ``ObjectiveFns`` that ``fmpe``, ``npse`` or ``aio`` made, and its parameters.

    θ is flat, in the order of sbijax's own draws, and nothing is standardised.

    Raises:
        InvalidValueError: no parameters, or an estimator whose network gives no score of noised parameters.
    """
    if params is None:
        raise InvalidValueError(
            "An estimator of sbijax comes without its parameters.",
            fix="pass both, cp.from_estimator((estimator, params)), params being what sbijax.train returned.",
        )
    # An `ObjectiveFns` holds closures only: their names say what made them, and the network is what they close over.
    sample: Foreign = getattr(estimator, "sample_fn", None)
    maker = getattr(sample, "__qualname__", type(estimator).__name__).partition(".")[0]
    if maker not in ("fmpe", "summarized_estimator"):  # npse and aio call fmpe
        raise unreadable(estimator, f"is none of sbijax's fmpe, npse and aio, but {maker}, which learns no score")
    held = inspect.getclosurevars(sample).nonlocals
    if maker == "summarized_estimator":
        inner = read(held["estimator"], params)
        summarise = held["summary_net"].summarize_fn
        return inner._replace(adapt=lambda x: _rows(summarise(held["summary_params"], _rows(x))))
    network = held["network"]
    # sbijax's networks run the method of the name that they are given: its plain attributes are the path of noise.
    about = network.apply(params, None, method="__getstate__")
    if "_score_net" not in about or not {"_sigma_min", "_sde"} & set(about):
        raise unreadable(estimator, "has a network that is neither a CNF nor a ScoreModel")
    mean, sigmas = _kind(about)

    def denoise(params: PyTree[Array], y: Array, s: Array, x: Array) -> Array:
        def call(u: Array, t: Array) -> Array:
            given = {"inputs": u[None], "time": t[None], "context": x[None], "is_training": False}
            # Dropout asks for a key, and is off.
            return network.apply(params, jax.random.key(0), method="_score_net", **given)[0]

        return mean(call, y, s)

    return Reading(denoise, jax.tree.map(jnp.asarray, params), (int(about["_n_dimension"]),), sigmas, _rows)


def _kind(about: Foreign) -> tuple[Mean, tuple[float, float]]:
    """The mean of θ given θ + s·ε by the network's output, and the range of s."""
    if "_sde" in about:
        ends = about["_time_eps"], about["_time_max"]
        return by_equation(about["_sde"] == "ve", about["_beta_min"], about["_beta_max"], ends)
    # The velocity of t·θ + (1 − (1 − σ_min)·t)·ε.
    least = about["_sigma_min"]
    return lambda call, y, s: by_velocity(call, y, s, (0.0, 1.0), (1.0, least - 1)), (max(0.004, least), 100.0)


def _rows(x: ArrayLike) -> Array:
    x = jnp.asarray(x, jnp.result_type(float))
    if x.ndim != 2:
        raise ShapeError(f"sbijax's observations are rows, (n, size); got an array {x.shape}.", fix="reshape them.")
    return x
