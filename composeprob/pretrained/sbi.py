"""sbi's NPSE and FMPE, from the file that ``tools/export_sbi.py`` writes beside torch: arrays, and JSON about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from composeprob.errors import InvalidValueError, LoadError, ShapeError
from composeprob.json_data import JSONObject
from composeprob.pretrained.layers import ACTIVATIONS, normalised, waves
from composeprob.pretrained.readings import Call, Pair, Reading, by_score, by_velocity, spreads

Weights = dict[str, Array]


def opened(path: Path) -> tuple[JSONObject, Weights]:
    """What a file says of an estimator, and its arrays. Nothing in it is run."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
        described = json.loads(str(arrays.pop("described")))
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise LoadError(
            f"{path} is no estimator that was exported: {error}.",
            fix="write it by tools/export_sbi.py, beside torch and sbi.",
        ) from error
    wrong = sorted(name for name, a in arrays.items() if not np.issubdtype(a.dtype, np.floating))
    if not isinstance(described, dict) or wrong:
        raise LoadError(f"{path} has no numbers for {', '.join(wrong) or 'its description'}.", fix="export it again.")
    return described, {name: jnp.asarray(a, jnp.result_type(float)) for name, a in arrays.items()}


def read(path: Path, described: JSONObject, arrays: Weights) -> Reading:
    """What `from_estimator` needs of a ``ConditionalScoreEstimator`` or ``FlowMatchingEstimator``.

    sbi's noise is in the units of θ; only with ``compose_standardization`` in standardised ones.
    """
    try:
        mean, sigmas = _kind(described)
        shape = jnp.shape(arrays["net.output_layer.bias"])
        network = partial(_mlp, _activation(described["activation"]), bool(described["skip"]))
        prior = [jnp.broadcast_to(jnp.reshape(arrays[name], -1), shape) for name in ("mean_0", "std_0")]
        units = [np.asarray(arrays[name]).reshape(shape) for name in ("shift", "scale")]
        weights = {name: array for name, array in arrays.items() if name.startswith("net.")}
        layers = [(kind, f"embedding.{i}.") for i, kind in enumerate(described["embedding"])]
        # A file that lacks an array is found here, and not inside of a compiled run.
        width = jnp.shape(arrays["net.condition_layer.weight"])[1]
        wanted = (width,) if described["condition_shape"] is None else tuple(described["condition_shape"])
        jax.eval_shape(lambda: network(weights, jnp.zeros(shape), jnp.zeros(width), jnp.ones(())))
    except InvalidValueError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{path} lacks {error} for a {described.get('kind')}.", fix="export it again.") from error

    def denoise(arrays: PyTree[Array], y: Array, s: Array, x: Array) -> Array:
        weights, location, scale = arrays
        return mean(lambda u, t: network(weights, u, x, t), location, scale, y, s)

    def adapt(x: ArrayLike) -> Array:
        data = jnp.asarray(x, jnp.result_type(float))
        if data.shape[1:] != wanted:
            unembedded = ": it was exported without its embedding net." if described["condition_shape"] is None else "."
            raise ShapeError(
                f"Conditions of {path.name} have shape {wanted}; got an array {data.shape}.",
                fix=f"pass n of them, (n, …){unembedded}",
            )
        return jax.vmap(lambda row: _embedded(arrays, layers, row))(data)

    return Reading(denoise, (weights, *prior), shape, sigmas, adapt, *units)


def _activation(name: str) -> Callable[[Array], Array]:
    if name.lower() not in ACTIVATIONS:
        raise InvalidValueError(
            f"An activation of the network is {name}.", fix=f"train with one of {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name.lower()]


def _layer(w: Weights, name: str, x: Array) -> Array:
    """A linear layer, whose weight is a matrix, or a layer norm."""
    weight = w[f"{name}weight"]
    return (weight @ x if weight.ndim == 2 else weight * normalised(x, 1e-5)) + w[f"{name}bias"]  # torch's ε


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


def _mlp(activation: Callable[[Array], Array], skip: bool, w: Weights, u: Array, x: Array, t: Array) -> Array:
    """``VectorFieldMLP`` of its input u, a condition x and its time t."""
    both = jnp.concatenate([_layer(w, "net.input_layer.", u), _layer(w, "net.condition_layer.", x)])
    h = activation(_layer(w, "net.input_merge_layer.", activation(both)))
    if "net.time_emb.W" in w:
        embedded = waves(t * w["net.time_emb.W"] * 2 * jnp.pi, cosine_first=False)
    else:
        turns = t * w["net.time_emb.div_term"]
        embedded = jnp.stack([jnp.sin(turns), jnp.cos(turns)], 1).reshape(-1)
    time = _layer(w, "net.time_linear_layer.", embedded)
    for i in range(sum(name.startswith("net.layers.") for name in w) // 2):
        h = activation(_layer(w, f"net.layers.{i}.", h)) + time + (h if skip else 0.0)
        h = _layer(w, f"net.layers_norm.{i}.", h) if f"net.layers_norm.{i}.weight" in w else h
    return _layer(w, "net.output_layer.", h)


def _kind(about: JSONObject) -> tuple[Callable[[Call, Array, Array, Array, Array], Array], Pair]:
    """E[θ | θ + s·ε = y] of the network as a function of (its input, its time), the mean and standard deviation of the
    training's θ, y and s; and the least and greatest s of the training."""
    kind = about["kind"]
    if kind == "FlowMatchingEstimator":
        extra = about["noise_scale"]
        return partial(_by_flow, extra, bool(about["gaussian_baseline"])), (max(0.004, extra), 100.0)
    signals: dict[str, Callable[[Array], Array]] = {
        "VEScoreEstimator": jnp.ones_like,
        "VPScoreEstimator": lambda s: 1 / jnp.sqrt(1 + s**2),
        "SubVPScoreEstimator": lambda s: 2 / (s + jnp.sqrt(s**2 + 4)),
    }
    if kind not in signals:
        raise InvalidValueError(f"The file holds a {kind}.", fix="train NPSE (VE, VP or sub-VP) or FMPE.")
    exploding = kind == "VEScoreEstimator"
    least, most = (about[f"{'sigma' if exploding else 'beta'}_{end}"] for end in ("min", "max"))
    low, high = spreads(exploding, least, most, (about["t_min"], about["t_max"]))
    if kind == "SubVPScoreEstimator":  # its signal m is that of VP, and σ = 1 − m²
        low, high = (s**2 / (1 + s**2) ** 0.5 for s in (low, high))
    return partial(_by_score, signals[kind]), (low, high)


def _by_flow(extra: float, baseline: bool, network: Call, loc: Array, sd: Array, y: Array, s: Array) -> Array:
    """Of θ_t = (1 − t)·θ + (t + extra)·ε the velocity is E[ε − θ | θ_t]."""

    def velocity(moved: Array, t: Array) -> Array:
        clear, away = ((1 - t) * sd) ** 2 + t**2 + 1e-6, moved - (1 - t) * loc
        of_gaussian = (t - (1 - t) * sd**2) / clear * away if baseline else 0.0
        return of_gaussian - loc + jnp.sqrt(1 + sd**2) * network(away / jnp.sqrt(clear), t)

    return by_velocity(velocity, y, s, (1.0, -1.0), (extra, 1.0))


def _by_score(signal: Callable[[Array], Array], network: Call, loc: Array, sd: Array, y: Array, s: Array) -> Array:
    """Of θ_t = m·θ + σ·ε the score is that of a Gaussian less m/σ times the network, which is given σ for a time."""
    m = signal(s)

    def score(moved: Array, sigma: Array) -> Array:
        away, clear = moved - m * loc, (m * sd) ** 2 + sigma**2
        return -m / sigma * network(away / jnp.sqrt(clear), sigma) - away / clear

    return by_score(score, y, s, m, m * s)
