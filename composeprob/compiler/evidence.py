"""Evidence at a site: its plates, the members that count, and the axes of its
conditions that run over the plates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from composeprob.errors import ProgramError, ShapeError
from composeprob.factors.algebra import power
from composeprob.factors.factor import Factor, LeafFactor
from composeprob.factors.nodes import rewrite_leaves
from composeprob.ir.leaves import first
from composeprob.language.interpret import Statement, layers


class Axis(NamedTuple):
    """An axis of a batch: its plate, None where there is none, and its size."""

    plate: str | None
    size: int


NO_AXIS = Axis(None, 1)


def scaled(evidence: Statement) -> Factor:
    """The factor of a piece of evidence, to the power that ``numpyro.handlers.scale``
    gives it."""
    if evidence.scale is None:
        return evidence.factor
    if isinstance(evidence.scale, jax.core.Tracer) or np.ndim(evidence.scale):
        raise ProgramError(
            f"The factor {evidence.name!r} is scaled by an array, and a factor has one "
            "power.",
            where=evidence.where,
            fix="scale by one number; where members count differently, make that "
            "number a condition of the factor.",
        )
    return power(evidence.factor, float(evidence.scale))


def mask(evidence: Statement) -> Bool[np.ndarray, "*plates"]:
    """Mask of a piece of evidence: True for the members of its plates that count, in a
    shape that broadcasts to the plates'."""
    # Each mask wraps the distribution in one more layer; a member counts where all do.
    keep = np.ones((), bool)
    for layer in layers(evidence.distribution):
        mask = getattr(layer, "_mask", True)
        if isinstance(mask, jax.core.Tracer):
            raise ProgramError(
                f"The mask of {evidence.name!r} is not known before compilation.",
                where=evidence.where,
                fix="make it of data, with NumPy: members that it leaves out are not "
                "evaluated.",
            )
        keep = keep & np.asarray(mask, bool)
    return keep


def plates(evidence: Statement, site: Statement) -> dict[str, int]:
    """The plates about a piece of evidence and its site, outermost axis first, with
    their sizes."""
    shape = tuple(jnp.shape(site.value))
    event = evidence.factor.event_shape
    inner = shape[: len(shape) - len(event)]
    # A plate that both stand in runs over members, so its axis is not part of one
    # member's event.
    shared = [dim for dim in site.dims[len(inner) :] if dim and dim in evidence.dims]
    if shape[len(inner) :] != event or not all(site.dims[: len(inner)]) or shared:
        value = shape[sum(dim is not None for dim in site.dims) :]
        raise ShapeError(
            f"The factor {evidence.name!r} has events of shape {event}, but one value "
            f"of site {site.name!r} has the shape {value}.",
            where=evidence.where,
            fix="use a factor over events of that shape, or cp.window for one that "
            "sees a part of them; a factor over all members together stands outside of "
            "their plate.",
        )
    outer = evidence.distribution.batch_shape
    depth = max(len(inner), len(outer))
    of_site = _axes(site.dims, inner, depth)
    of_factor = _axes(evidence.dims, outer, depth)
    sizes = {}
    for axis, other in zip(of_site, of_factor, strict=True):
        name = axis.plate or other.plate
        clash = bool(axis.plate and other.plate and axis.plate != other.plate)
        # An axis without a plate is a mask's, which may be 1 for all members.
        too_long = other.plate is None and other.size > axis.size
        if name is None or clash or too_long:
            raise _misplaced(evidence, site, axis, other)
        sizes[name] = axis.size if axis.plate else other.size
    return sizes


def _axes(dims: Sequence[str | None], shape: tuple[int, ...], depth: int) -> list[Axis]:
    """The axes of a batch, filled up on the left, as batches broadcast from the
    right."""
    axes = [Axis(*pair) for pair in zip(dims, shape, strict=False)]
    return [NO_AXIS] * (depth - len(shape)) + axes


def _misplaced(
    evidence: Statement, site: Statement, axis: Axis, other: Axis
) -> ShapeError:
    """The error for evidence whose ``other`` axis does not fit the site's ``axis``."""
    stands = f"a mask with an axis of {other.size}"
    if other.plate:
        stands = f"plate {other.plate!r}"
    has = "no plate"
    if axis.plate:
        has = f"plate {axis.plate!r}, of size {axis.size}"
    return ShapeError(
        f"The factor {evidence.name!r} stands in {stands}, where its site "
        f"{site.name!r} has {has}.",
        where=evidence.where,
        fix="write it within its site's plates, with further plates inside of these; a "
        "mask has the axes of the plates.",
    )


def plate_axes(
    evidence: Statement, leaf: LeafFactor, about: dict[str, int]
) -> dict[str, int]:
    """Number of leading axes of each condition that run over the plates ``about`` a
    leaf, as `plates` returns them."""
    axes = {}
    for name, value in leaf.fixed.items():
        axes[name] = _leading(evidence, name, jnp.shape(value), about)
    return axes


def _leading(
    evidence: Statement, name: str, shape: tuple[int, ...], about: dict[str, int]
) -> int:
    """Number of leading axes of a condition that run over the innermost plates; 0 for a
    condition that all members share.

    Axes are matched from the right, as NumPyro's batches are: of plates (sessions,
    subjects) a condition has one value for each pair with the axes (sessions, subjects,
    …), for each subject with (subjects, …) or (1, subjects, …), for each session with
    (sessions, 1, …)."""
    batch = tuple(about.values())
    if shape[: len(batch)] == batch:
        return len(batch)
    numbers = range(1, min(len(batch), len(shape)) + 1)
    fitting = [number for number in numbers if _fits(shape[:number], batch)]
    # The first axis looks like one of a plate, though not of the innermost.
    misplaced = not fitting and bool(shape) and shape[0] > 1 and shape[0] in batch
    if len(fitting) > 1 or misplaced:
        each = ", ".join(f"{plate!r} of {size}" for plate, size in about.items())
        why = "several of them fit."
        if misplaced:
            why = "its first axis is not where that plate's is."
        raise ShapeError(
            f"Condition {name!r} of {evidence.name!r} has the shape {shape}, in the "
            f"plates {each}: {why}",
            where=evidence.where,
            fix="give it the axes of all plates, in this order, of size 1 where it "
            f"does not depend on one: jnp.broadcast_to(…, {batch} + shape of one "
            "value) is never ambiguous.",
        )
    return fitting[0] if fitting else 0


def _fits(leading: tuple[int, ...], batch: tuple[int, ...]) -> bool:
    """Return whether leading axes of a condition broadcast to the innermost plates, and
    run over one of them."""
    innermost = batch[len(batch) - len(leading) :]
    pairs = list(zip(leading, innermost, strict=True))
    if not all(n in (1, size) for n, size in pairs):
        return False
    return any(n > 1 for n, _ in pairs) or leading == batch


def of_one_member(evidence: Statement, site: Statement) -> Factor:
    """The factor with the conditions of the first member of its plates, as one
    evaluation receives them."""
    about = plates(evidence, site)

    def of_first(leaf: LeafFactor) -> LeafFactor:
        return leaf.holding(first(leaf.fixed, plate_axes(evidence, leaf, about)))

    return rewrite_leaves(evidence.factor, of_first)
