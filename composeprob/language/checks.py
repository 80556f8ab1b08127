"""Checks of a program's statements: latents with a proper distribution and values that
kernels can move, data that fit."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import Distribution
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import biject_to
from numpyro.primitives import CondIndepStackFrame

from composeprob.arguments import check_finite
from composeprob.errors import (
    ComposeProbError,
    ImproperError,
    InvalidValueError,
    ProgramError,
    ShapeError,
    WrongTypeError,
    caller,
)
from composeprob.factors.factor import is_factor
from composeprob.factors.values import check_bounds
from composeprob.language.finite import is_discrete, values_of


def check_latent(name: str, distribution: Distribution, base: Distribution) -> None:
    """Refuse a latent that no kernel can move: an improper prior, a constant, discrete
    values without an end, or a support that NumPyro has no bijection for. ``base`` is
    its distribution without plates."""
    kind = type(base).__name__
    check_bounds(base, f"Site {name!r}")
    if isinstance(base, dist.ImproperUniform):
        raise ImproperError(
            f"Site {name!r} has the prior {kind}, which cannot be normalised: chains "
            "have no distribution to start from, and the posterior may be improper.",
            fix="give it a proper prior, however wide, such as dist.Normal(0.0, 10.0) "
            "or dist.HalfNormal(10.0).",
        )
    if isinstance(base, dist.Delta):
        raise ProgramError(
            f"Site {name!r} is a Delta: it has one value, and chains would have to "
            "move it.",
            fix=f"write numpyro.deterministic({name!r}, value) instead.",
        )
    support = distribution.support
    # A support without a bijection raises here, before a chain needs one.
    try:
        discrete = is_discrete(distribution)
        if not discrete:
            biject_to(support)
    except NotImplementedError as error:
        raise ProgramError(
            f"Site {name!r} has the support {support} of {kind}, which NumPyro has no "
            "bijection for.",
            fix="write it as a function (numpyro.deterministic) of a site with an "
            "unbounded, positive or bounded one.",
        ) from error
    if discrete and values_of(distribution) is None:
        raise ProgramError(
            f"Site {name!r} is discrete ({kind}), and its values are not a known, "
            "finite range of whole numbers, the same for all of its entries.",
            fix="write a dist.Categorical over the values that matter; or sum over "
            "its values, by dist.MixtureSameFamily; or observe it.",
        )


def check_draw(name: str, value: Array) -> None:
    """Refuse a latent whose prior draws NaN or infinity, such as Uniform(0, ∞)."""
    if isinstance(value, jax.core.Tracer):  # without a value
        return
    if not np.all(np.isfinite(np.asarray(value))):
        raise ImproperError(
            f"A draw of the prior of {name!r} is not finite.",
            fix="check its parameters: bounds and scales must be finite.",
        )


def check_observed(
    name: str,
    distribution: Distribution,
    base: Distribution,
    value: Array,
    stack: Sequence[CondIndepStackFrame] | None,
) -> None:
    """Refuse data that do not fit their distribution: values that are not real numbers,
    NaN, a value that the distribution never has, or a shape that does not fit it or a
    plate of NumPyro's ``stack``. ``base`` is the distribution without plates."""
    _check_real(name, value)
    check_finite(value, f"The observed value of {name!r}")
    if isinstance(base, dist.Unit):  # soft evidence, which has no data
        return
    if not np.size(value):
        raise InvalidValueError(
            f"The observed value of {name!r} has no entries: its shape is "
            f"{tuple(jnp.shape(value))}.",
            fix="check where the data were selected; without data leave the statement "
            "out, by a Python if on len(data).",
        )
    _check_plates(name, distribution, value, stack or ())
    shape = tuple(jnp.shape(value))
    expected = tuple(distribution.shape())
    try:
        jnp.broadcast_shapes(shape, expected)
    except ValueError as error:
        raise mismatch(name, shape, expected) from error
    _check_support(name, base, value)


def _check_real(name: str, value: Array) -> None:
    """Refuse a value that is not made of real numbers or booleans."""
    try:
        numbers = value if isinstance(value, jax.core.Tracer) else np.asarray(value)
        if numbers.dtype == bool:
            return
        for kind in (jnp.integer, jnp.floating):
            if jnp.issubdtype(numbers.dtype, kind):
                return
    except (TypeError, ValueError):
        pass  # nothing that has a dtype
    got = type(value).__name__
    if hasattr(value, "dtype"):
        got = f"numbers of type {value.dtype}"
    raise WrongTypeError(
        f"The value of {name!r} must be real numbers; got {got}.",
        fix="pass what was measured as real numbers.",
    )


def _check_plates(
    name: str,
    distribution: Distribution,
    value: Array,
    stack: Sequence[CondIndepStackFrame],
) -> None:
    """Refuse a value whose axis for a plate is missing, or has another size than the
    plate."""
    shape = tuple(jnp.shape(value))
    for frame in stack:
        # NumPyro would broadcast the value, and count each datum several times.
        axis = len(shape) - len(distribution.event_shape) + frame.dim
        size = shape[axis] if 0 <= axis < len(shape) else None
        if size == frame.size:
            continue
        has = "has no axis for it"
        if size is not None:
            has = f"has {size} entries along it"
        expected = tuple(distribution.shape())
        raise ShapeError(
            f"Plate {frame.name!r} has size {frame.size}, but the value of {name!r}, "
            f"of shape {shape}, {has}.",
            fix=f"make it numpyro.plate({frame.name!r}, {size or 'len(data)'}), or "
            f"pass data of shape {expected}.",
        )


def _check_support(name: str, base: Distribution, value: Array) -> None:
    """Refuse a value outside of a support that is the same for all parameters.

    A support that depends on parameters may depend on latents, and these may move to
    where the value is allowed."""
    support: Constraint = getattr(type(base), "support", None)
    if not isinstance(support, Constraint) or isinstance(value, jax.core.Tracer):
        return
    if isinstance(support, type(dist.constraints.dependent)):
        return
    # The program may be traced; its data are constants there, and have values now.
    with jax.ensure_compile_time_eval():
        inside = np.asarray(support(jnp.asarray(value)))
    if inside.all():
        return
    # Of a support over whole events, such as the simplex, no single entry is at fault.
    outside: Any = value
    if inside.shape == tuple(jnp.shape(value)):
        outside = np.asarray(value)[~inside].ravel()[0]
    raise InvalidValueError(
        f"The observed value of {name!r} holds {outside}, which {type(base).__name__} "
        "never is.",
        fix=f"check the data, or use a distribution whose support is not {support}.",
    )


def mismatch(
    name: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> ShapeError:
    """The error for data of another shape than their distribution's."""
    return ShapeError(
        f"Observation {name!r} has shape {shape}, but its distribution has shape "
        f"{expected}.",
        fix="reshape the data, or the distribution's parameters, so that they match.",
    )


def explained(
    error: Exception, latents: Mapping[str, Array]
) -> ComposeProbError | None:
    """Return the error that explains one of NumPyro's, or of Python's formatting; None
    for any other.

    NumPyro raises from deep inside: the frames of its traceback hold the names that a
    user needs. Explained are a factor given to ``numpyro.sample``, a plate about a
    distribution of another size or without members, and a parameter that was refused,
    such as a scale that is negative or text. ``latents`` are the values that the
    program's latents had until then.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    explanation = _by_last_frame(error, frames[-1])
    if explanation is not None:
        return explanation
    for frame in frames:
        variables = frame.f_locals
        this = variables.get("self")
        function = frame.f_code.co_name
        if frame.f_code is numpyro.sample.__code__ and is_factor(variables.get("fn")):
            return _factor_in_sample(frame)
        if isinstance(this, numpyro.plate):
            explanation = _refused_plate(frame)
            if explanation is not None:
                return explanation
        in_check = function == "validate_args" and isinstance(this, Distribution)
        if in_check and variables.get("param") is not None:
            return _refused_parameter(frame, latents)
        in_constructor = function == "__init__"
        if isinstance(this, Distribution):
            # A constructor may keep text, which the first use of it refuses.
            parameters = variables if in_constructor else vars(this)
            explanation = _parameter_without_numbers(frame, parameters)
            if explanation is not None:
                return explanation
    return None


def _by_last_frame(error: Exception, frame: FrameType) -> ComposeProbError | None:
    """Return the error that explains one by its text, or by the frame that raised
    it."""
    if "Tracer.__format__" in str(error):
        return _formatted(frame)
    if any(text in str(error) for text in _NEEDS_NUMBER):
        return _index_or_key(frame)
    # A static method of plates, which has no `self`.
    if "occupied_dims" in frame.f_locals:
        return _plate_of_same_dim(frame)
    return None


def _refused_plate(frame: FrameType) -> ComposeProbError | None:
    """Return the error that explains why a method of a plate failed."""
    variables = frame.f_locals
    function = frame.f_code.co_name
    if function == "process_message" and variables.get("msg"):
        return _plate_of_another_size(frame)
    if function == "__init__" and variables["size"] < 1:
        return _plate_without_members(frame)
    return None


def _plate_of_same_dim(frame: FrameType) -> ComposeProbError:
    """Return the error for a plate inside of one with the same ``dim``."""
    variables = frame.f_locals
    return ProgramError(
        f"Plate {variables['name']!r} has dim={variables['dim']}, and is inside of a "
        "plate with the same dim.",
        where=caller(frame),
        fix="give the plates different dims, dim=-1 and dim=-2, or leave dim out.",
    )


_NEEDS_NUMBER = (
    "Only integer scalar arrays can be converted to a scalar index",
    "unhashable type: 'jaxlib",
)
"""Parts of messages of Python and JAX about arrays that are no index and no key."""


def _index_or_key(frame: FrameType) -> ComposeProbError:
    """The error for a value that Python takes as an index, a size or a key, with the
    frame that does."""
    return ProgramError(
        "The program takes an array as an index, a size, or a key of a dict.",
        where=caller(frame),
        fix="index an array by whole numbers, jnp.stack(items)[i], or choose by "
        "jnp.where; sizes must be known beforehand.",
    )


def _formatted(frame: FrameType) -> ComposeProbError:
    """The error for a format such as ``f"{x:.2f}"`` of a value without a number, with
    the frame that formats it."""
    return ProgramError(
        "The program formats a value as text, which has no number yet: it stands for "
        "the values of all chains.",
        where=caller(frame),
        fix="look at samples after the run, as result['x']; inside of the program "
        "write jax.debug.print('{}', value).",
    )


def _factor_in_sample(frame: FrameType) -> ComposeProbError:
    """The error for ``numpyro.sample`` of a factor, with its frame."""
    variables = frame.f_locals
    name = variables["name"]
    fix = f"write cp.sample({name!r}, factor), which takes factors and distributions."
    if variables.get("obs") is not None:
        fix = (
            "give the data to cp.observe with a distribution: a factor is a prior, not "
            "a likelihood."
        )
    kind = type(variables["fn"]).__name__
    return WrongTypeError(
        f"numpyro.sample({name!r}, …) takes a NumPyro distribution; got a factor, "
        f"{kind}.",
        where=caller(frame),
        fix=fix,
    )


def _plate_of_another_size(frame: FrameType) -> ComposeProbError:
    """The error for a plate about a distribution of another size, with the frame of the
    plate's handler."""
    plate = frame.f_locals["self"]
    message = frame.f_locals["msg"]
    batch = tuple(message["fn"].batch_shape)
    return ShapeError(
        f"Plate {plate.name!r} has size {plate.subsample_size}, but the distribution "
        f"of {message['name']!r} in it has the batch shape {batch}.",
        where=caller(frame),
        fix="make the plate as large as the distribution's parameters, or leave these "
        "without that axis.",
    )


def _plate_without_members(frame: FrameType) -> ComposeProbError:
    """The error for a plate of no size, with the frame of its constructor."""
    name = frame.f_locals["name"]
    return InvalidValueError(
        f"Plate {name!r} has size {frame.f_locals['size']!r}.",
        where=caller(frame),
        fix=f"write numpyro.plate({name!r}, len(ys)), with the data ys of one member "
        "or more.",
    )


def _parameter_without_numbers(
    frame: FrameType, given: Mapping[str, Any]
) -> ComposeProbError | None:
    """The error for a parameter of a distribution that is text, or missing, with a
    frame of the distribution's; None without such a parameter."""
    kind = type(frame.f_locals["self"])
    parameters = inspect.signature(kind).parameters
    for name in kind.arg_constraints:
        # The constructors of base classes have other arguments.
        if name not in given:
            continue
        value = given[name]
        optional = name in parameters and parameters[name].default is None
        if isinstance(value, jax.Array) or (value is None and optional):
            continue
        if np.asarray(value).dtype.kind in "OSU":
            return WrongTypeError(
                f"{kind.__name__} takes numbers; got {name}={value!r}.",
                where=caller(frame),
                fix=f"pass a number or an array of numbers as {name}.",
            )
    return None


def _refused_parameter(
    frame: FrameType, latents: Mapping[str, Array]
) -> ComposeProbError:
    """The error for a parameter that a distribution refused, with the frame of its
    validation."""
    distribution = frame.f_locals["self"]
    parameter = frame.f_locals["param"]
    value = np.asarray(frame.f_locals["value"])
    shown = f"a {parameter} of shape {value.shape}"
    if value.size == 1:
        shown = f"the {parameter} {value.item():.3g}"
    elif value.ndim == 1 and value.size > 1:
        shown += f" and numbers from {value.min():.3g} on"
    # A latent of this value is most likely the one that was passed.
    for name, latent in latents.items():
        if np.array_equal(latent, value):
            shown += f", the site {name!r}"
            break
    text = str(distribution.arg_constraints[parameter])
    constraint = text.partition("(")[0].lower()
    return InvalidValueError(
        f"{type(distribution).__name__} has {shown}, which must be {constraint}.",
        where=caller(frame),
        fix=f"check what is passed as {parameter}, and the order of the arguments. "
        "Where it depends on a latent s, it must be right for all its values: of a "
        "scale write jnp.exp(s) or jax.nn.softplus(s), or give s a positive prior such "
        "as dist.HalfNormal(1.0).",
    )
