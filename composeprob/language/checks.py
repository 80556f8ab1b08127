"""Checks of a program's statements: latents with a proper distribution and a support to
move in, data that fit."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence

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
from composeprob.factors.values import check_bounds, check_finite


def check_latent(name: str, distribution: Distribution, base: Distribution) -> None:
    """Refuse a latent that no kernel can move: a prior that is no probability, discrete
    values, a constant, or a support that NumPyro has no bijection for. ``base`` is its
    distribution without plates."""
    kind = type(base).__name__
    check_bounds(base, f"Site {name!r}")
    if isinstance(base, dist.ImproperUniform):
        raise ImproperError(
            f"Site {name!r} has the prior {kind}, which cannot be normalised: chains have no distribution to start "
            "from, and the posterior may be none.",
            fix="give it a proper prior, however wide, such as dist.Normal(0.0, 10.0) or dist.HalfNormal(10.0).",
        )
    if isinstance(base, dist.Delta):
        raise ProgramError(
            f"Site {name!r} is a Delta: it has one value, and chains would have to move it.",
            fix=f"write numpyro.deterministic({name!r}, value) instead.",
        )
    support = distribution.support
    try:
        discrete = support is not None and support.is_discrete
        if not discrete:
            biject_to(support)
    except NotImplementedError as error:
        raise ProgramError(
            f"Site {name!r} has the support {support} of {kind}, which NumPyro has no bijection for.",
            fix="write it as a function (numpyro.deterministic) of a site with an unbounded, positive or bounded one.",
        ) from error
    if discrete:
        raise ProgramError(
            f"Site {name!r} is discrete ({kind}), and kernels move continuous values only.",
            fix="sum over its values, by dist.MixtureSameFamily or cp.mixture, or observe it.",
        )


def check_draw(name: str, value: Array) -> None:
    """Refuse a latent whose prior draws no finite number, such as Uniform(0, ∞)."""
    if not isinstance(value, jax.core.Tracer) and not np.all(
        np.isfinite(np.asarray(value))
    ):
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
    """Refuse data that do not fit their distribution: no real numbers, NaN, a value
    that the distribution never has, or a shape that does not fit it or a plate of
    NumPyro's ``stack``. ``base`` is the distribution without plates."""
    try:
        numbers = value if isinstance(value, jax.core.Tracer) else np.asarray(value)
        real = numbers.dtype == bool or any(
            jnp.issubdtype(numbers.dtype, kind) for kind in (jnp.integer, jnp.floating)
        )
    except (TypeError, ValueError):
        real = False
    if not real:
        kind = (
            f"numbers of type {numbers.dtype}"
            if hasattr(value, "dtype")
            else type(value).__name__
        )
        raise WrongTypeError(
            f"The value of {name!r} must be real numbers; got {kind}.",
            fix="pass what was measured as real numbers.",
        )
    check_finite(value, f"The observed value of {name!r}")
    if isinstance(base, dist.Unit):  # soft evidence, which has no data
        return
    found, expected = tuple(jnp.shape(value)), tuple(distribution.shape())
    for frame in stack or ():
        axis = len(found) - len(distribution.event_shape) + frame.dim
        size = found[axis] if 0 <= axis < len(found) else None
        if size != frame.size:
            has = (
                "has no axis for it" if size is None else f"has {size} entries along it"
            )
            raise ShapeError(
                f"Plate {frame.name!r} has size {frame.size}, but the value of {name!r}, of shape {found}, {has}.",
                fix=f"make it numpyro.plate({frame.name!r}, {size or 'len(data)'}), or pass data of shape {expected}.",
            )
    try:
        jnp.broadcast_shapes(found, expected)
    except ValueError as error:
        raise mismatch(name, found, expected) from error
    # A support that depends on parameters may depend on latents, and these may move to
    # where the value is allowed.
    support: Constraint = getattr(type(base), "support", None)
    fixed = isinstance(support, Constraint) and not isinstance(
        support, type(dist.constraints.dependent)
    )
    if fixed and not isinstance(value, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            inside = np.asarray(support(jnp.asarray(value)))
        if not inside.all():
            bad = (
                np.asarray(value)[~inside].ravel()[0]
                if inside.shape == found
                else value
            )
            raise InvalidValueError(
                f"The observed value of {name!r} holds {bad}, which {type(base).__name__} never is.",
                fix=f"check the data, or use a distribution whose support is not {support}.",
            )


def mismatch(
    name: str, found: tuple[int, ...], expected: tuple[int, ...]
) -> ShapeError:
    """The error for data of another shape than their distribution's."""
    return ShapeError(
        f"Observation {name!r} has shape {found}, but its distribution has shape {expected}.",
        fix="reshape the data, or the distribution's parameters, so that they match.",
    )


def explained(
    error: Exception, latents: Mapping[str, Array]
) -> ComposeProbError | None:
    """The message for an error of NumPyro's: ``numpyro.sample`` was given a factor, a
    plate met a distribution of another size, or a parameter was refused, such as a
    scale that is negative; None for any other. ``latents`` are the values that the
    program's latents had until then."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        values, called = frame.f_locals, frame.f_code
        this, message, parameter = (
            values.get("self"),
            values.get("msg"),
            values.get("param"),
        )
        if called is numpyro.sample.__code__ and is_factor(values.get("fn")):
            name, observed = values["name"], values.get("obs") is not None
            return WrongTypeError(
                f"numpyro.sample({name!r}, …) takes a NumPyro distribution; got a factor, "
                f"{type(values['fn']).__name__}.",
                where=caller(frame),
                fix="give the data to cp.observe with a distribution: a factor is a prior, not a likelihood."
                if observed
                else f"write cp.sample({name!r}, factor), which takes factors and distributions.",
            )
        if (
            called.co_name == "process_message"
            and isinstance(this, numpyro.plate)
            and message
        ):
            return ShapeError(
                f"Plate {this.name!r} has size {this.subsample_size}, but the distribution of {message['name']!r} "
                f"in it has the batch shape {tuple(message['fn'].batch_shape)}.",
                where=caller(frame),
                fix="make the plate as large as the distribution's parameters, or leave these without that axis.",
            )
        if (
            called.co_name == "validate_args"
            and isinstance(this, Distribution)
            and parameter is not None
        ):
            value, kind = np.asarray(values["value"]), type(this).__name__
            shown = (
                f"the {parameter} {value.item():.3g}"
                if value.size == 1
                else f"a {parameter} of shape {value.shape}"
            )
            if value.ndim == 1 and value.size > 1:
                shown += f" and numbers from {value.min():.3g} on"
            site = next(
                (
                    f", the site {n!r}"
                    for n, x in latents.items()
                    if np.array_equal(x, value)
                ),
                "",
            )
            constraint = str(this.arg_constraints[parameter]).partition("(")[0].lower()
            return InvalidValueError(
                f"{kind} has {shown}{site}, which must be {constraint}.",
                where=caller(frame),
                fix=f"check what is passed as {parameter}, and the order of the arguments. Where it depends on a "
                "latent s, it must be right for all its values: of a scale write jnp.exp(s) or jax.nn.softplus(s), or "
                "give s a positive prior such as dist.HalfNormal(1.0).",
            )
    return None
