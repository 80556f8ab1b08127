"""BayesFlow's estimators on Keras's JAX backend: a network, an adapter, a summary network, and standardisation."""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from composeprob.errors import InvalidValueError
from composeprob.pretrained.network import Foreign, Reading, by_score, by_velocity, unreadable


def read(estimator: Foreign) -> Reading:
    """What `from_estimator` needs of a ``BasicEstimator`` with a ``DiffusionModel`` or ``FlowMatching``.

    Conditions go through the estimator's own adapter, standardisation and summary network (`Estimator.adapt`). Its
    adapter may rename and join parameters; what transforms them otherwise changes their noise, and is refused.
    """
    keras = sys.modules["keras"]  # BayesFlow has imported it
    if keras.backend.backend() != "jax":
        raise InvalidValueError(
            f"BayesFlow runs on Keras's backend {keras.backend.backend()!r}.",
            fix='set os.environ["KERAS_BACKEND"] = "jax" before BayesFlow is imported; saved networks load there.',
        )
    network: Foreign = getattr(estimator, "inference_network", None)
    kind = type(network).__name__
    if kind not in ("DiffusionModel", "FlowMatching") or not network.built:
        raise unreadable(estimator, f"has no trained diffusion or flow-matching network, but {kind}")
    variables = list(network.variables)
    shape = (int(network.base_distribution.dim),)
    location, scale = _standardised(estimator, shape)
    schedule = getattr(network, "noise_schedule", None)

    def denoise(arrays: PyTree[Array], y: Array, s: Array, x: Array) -> Array:
        with keras.StatelessScope(state_mapping=list(zip(variables, arrays, strict=True))):
            if schedule is None:
                # The velocity ε − u of (1 − t)·u + t·ε.
                def velocity(u: Array, t: Array) -> Array:
                    return network.velocity(u[None], t.reshape(1, 1), conditions=x[None])[0]

                return by_velocity(velocity, y, s, (1.0, -1.0), (0.0, 1.0))
            log_snr = jnp.reshape(-2 * jnp.log(s), (1, 1))
            alpha, _ = schedule.get_alpha_sigma(log_snr)

            def score(u: Array, t: Array) -> Array:
                return network.score(u[None], log_snr_t=t, conditions=x[None])[0]

            return by_score(score, y, s, alpha[0, 0], log_snr)

    def adapt(x: ArrayLike | None = None, **data: ArrayLike) -> Array:
        given = (
            {"inference_conditions": np.asarray(x)} if x is not None else {k: np.asarray(v) for k, v in data.items()}
        )
        conditions, _, _ = estimator._prepare_conditions(given)
        return jnp.asarray(conditions)

    ends = 0.004, 100.0
    if schedule is not None:  # the least and greatest σ/α
        ends = float(np.exp(-0.5 * float(schedule.log_snr_max))), float(np.exp(-0.5 * float(schedule.log_snr_min)))
    return Reading(denoise, [jnp.asarray(v.value) for v in variables], shape, ends, adapt, location, scale)


def _standardised(estimator: Foreign, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """θ = location + scale·u, by what the package makes of u = 0 and u = 1."""
    ends = np.stack([np.zeros(shape), np.ones(shape)]).astype(np.float32)
    made = estimator.standardizer.maybe_standardize(ends, key="inference_variables", stage="inference", forward=False)
    made = np.asarray(made, np.float64)
    back = estimator.adapter({"inference_variables": made.astype(np.float32)}, inverse=True, strict=False)
    numbers = np.concatenate([np.reshape(each, (2, -1)) for each in back.values()], 1)
    if numbers.shape != made.shape or not np.allclose(np.sort(numbers), np.sort(made), rtol=1e-4, atol=1e-5):
        raise unreadable(estimator, "has an adapter that transforms the parameters, beyond renaming and joining them")
    return made[0], made[1] - made[0]
