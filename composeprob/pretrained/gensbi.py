"""GenSBI's pipelines, which hold a Flax NNX model, a path of noise and a method (arXiv 2605.27499)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from composeprob.pretrained.network import Call, Foreign, Mean, Reading, by_equation, by_velocity, unreadable


def read(pipeline: Foreign) -> Reading:
    """What `from_estimator` needs of a ``ConditionalPipeline`` or ``JointPipeline``; the averaged weights are taken.

    Raises:
        InvalidValueError: another pipeline, or a source that is not N(0, 1).
    """
    model = getattr(pipeline, "ema_model_wrapped", None)
    method, path = getattr(pipeline, "method", None), getattr(pipeline, "path", None)
    if not hasattr(pipeline, "cond_ids"):
        raise unreadable(pipeline, "is no pipeline with conditions")
    if model is None or method is None or path is None:
        raise unreadable(pipeline, "has not been trained: it has no averaged model yet")
    kind, sigmas = _kind(pipeline, method, path)
    graphdef, state = nnx.split(model)
    channels, cond_channels = int(pipeline.ch_obs), int(pipeline.ch_cond)
    size = int(np.prod(pipeline.dim_obs))
    arrays = nnx.to_pure_dict(state), jnp.asarray(pipeline.obs_ids), jnp.asarray(pipeline.cond_ids)
    shape = (size,) if channels == 1 else (size, channels)

    def denoise(arrays: PyTree[Array], y: Array, s: Array, x: Array) -> Array:
        state, obs_ids, cond_ids = arrays
        network = nnx.merge(graphdef, state)

        def call(u: Array, t: Array) -> Array:
            out = network(t=t, obs=u[None], obs_ids=obs_ids, cond=x[None], cond_ids=cond_ids)
            return jnp.asarray(out, u.dtype)[0]

        return kind(call, y.reshape(size, channels), s).reshape(shape)

    def adapt(x: ArrayLike) -> Array:
        x = jnp.asarray(x, jnp.result_type(float))
        return x[..., None] if x.ndim < 3 and cond_channels == 1 else x

    return Reading(denoise, arrays, shape, sigmas, adapt)


def _kind(pipeline: Foreign, method: Foreign, path: Foreign) -> tuple[Mean, tuple[float, float]]:
    """The mean of u given u + s·ε by the network's output, and the range of s."""
    scheduler = path.scheduler
    name = type(method).__name__
    if name == "FlowMatchingMethod":
        source = method.prior.base_dist
        if not (np.all(np.asarray(source.mean) == 0) and np.all(np.asarray(source.variance) == 1)):
            raise unreadable(pipeline, "has a source that is not N(0, 1)")
        # The velocity u − ε of u_t = t·u + (1 − t)·ε.
        return lambda call, y, s: by_velocity(call, y, s, (0.0, 1.0), (1.0, -1.0)), (0.004, 100.0)
    if name == "ScoreMatchingMethod":
        if scheduler.name == "SM-VE":
            return by_equation(True, scheduler.sigma_min, scheduler.sigma_max, (scheduler.e_s, scheduler.T))
        low, ends = scheduler.beta_min, (max(scheduler.e_s, 1e-3), scheduler.T)
        return by_equation(False, low, low + scheduler.beta_d, ends)
    if name == "DiffusionEDMMethod":
        low, high = np.asarray(scheduler.sigma(scheduler.time_schedule(jnp.array([1.0, 0.0]))), float)
        return _edm(scheduler), (float(low), float(high))
    raise unreadable(pipeline, f"is trained by {name}")


def _edm(scheduler: Foreign) -> Mean:
    """The network is preconditioned (Karras et al. 2022): D(y; s) = c_skip·y + c_out·F(c_in·y; c_noise)."""

    def mean(call: Call, y: Array, s: Array) -> Array:
        inner = call(scheduler.c_in(s) * y, scheduler.c_noise(s))
        return scheduler.c_skip(s) * y + scheduler.c_out(s) * inner

    return mean
