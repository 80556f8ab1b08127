"""Evidence at a site: which plates are about it, which members of them count, and which
axes of its conditions are theirs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from composeprob.errors import ProgramError, ShapeError
from composeprob.factors.algebra import power
from composeprob.factors.factor import Factor, LeafFactor
from composeprob.factors.nodes import rewrite_leaves
from composeprob.ir.leaves import first
from composeprob.language.interpret import Statement, layers


def scaled(evidence: Statement) -> Factor:
    """The factor of a piece of evidence, to the power that ``numpyro.handlers.scale``
    gives it."""
    if evidence.scale is None:
        return evidence.factor
    if isinstance(evidence.scale, jax.core.Tracer) or np.ndim(evidence.scale):
        raise ProgramError(
            f"The factor {evidence.name!r} is scaled by an array, and a factor has one power.",
            where=evidence.where,
            fix="scale by one number; what members count differently for is a condition of the factor.",
        )
    return power(evidence.factor, float(evidence.scale))


def mask(evidence: Statement) -> np.ndarray:
    """Which members of its plates count, of a shape that broadcasts to theirs."""
    keep = np.ones((), bool)
    for layer in layers(evidence.distribution):
        mask = getattr(layer, "_mask", True)
        if isinstance(mask, jax.core.Tracer):
            raise ProgramError(
                f"The mask of {evidence.name!r} is not known before compilation.",
                where=evidence.where,
                fix="make it of data, with NumPy: what it leaves out is not evaluated.",
            )
        keep = keep & np.asarray(mask, bool)
    return keep


def plates(evidence: Statement, site: Statement) -> dict[str, int]:
    """The plates about a piece of evidence and its site, outermost axis first, with
    their sizes."""
    shape, event = tuple(jnp.shape(site.value)), evidence.factor.event_shape
    inner = shape[: len(shape) - len(event)]
    # A plate that both stand in runs over members: an event of all of them is none of a
    # member's.
    shared = {
        dim
        for dim in site.dims[len(inner) :]
        if dim is not None and dim in evidence.dims
    }
    if shape[len(inner) :] != event or not all(site.dims[: len(inner)]) or shared:
        raise ShapeError(
            f"The factor {evidence.name!r} has events of shape {event}, but one value of site {site.name!r} has the "
            f"shape {shape[sum(dim is not None for dim in site.dims) :]}.",
            where=evidence.where,
            fix="use a factor over events of that shape, or cp.window for one that sees a part of them; one of all "
            "members together stands outside of their plate.",
        )
    outer = evidence.distribution.batch_shape
    depth = max(len(inner), len(outer))
    of_site = [(None, 1)] * (depth - len(inner)) + list(
        zip(site.dims, inner, strict=False)
    )
    of_factor = [(None, 1)] * (depth - len(outer)) + list(
        zip(evidence.dims, outer, strict=True)
    )
    about = {}
    for (name, size), (other, found) in zip(of_site, of_factor, strict=True):
        if (
            (name or other) is None
            or (name and other and name != other)
            or (other is None and found > size)
        ):
            stands = f"plate {other!r}" if other else f"a mask with an axis of {found}"
            raise ShapeError(
                f"The factor {evidence.name!r} stands in {stands}, where its site {site.name!r} has "
                f"{f'plate {name!r}, of size {size}' if name else 'no plate'}.",
                where=evidence.where,
                fix="write it within its site's plates, and others inside of these; a mask has the axes of the plates.",
            )
        about[name or other or ""] = size if name else found
    return about


def plate_axes(
    evidence: Statement, leaf: LeafFactor, about: dict[str, int]
) -> dict[str, int]:
    """Of each condition of a leaf, how many of its leading axes are those of the
    plates, as of `plates`."""
    return {
        name: _leading(evidence, name, jnp.shape(value), about)
        for name, value in leaf.fixed.items()
    }


def _leading(
    evidence: Statement, name: str, shape: tuple[int, ...], plates: dict[str, int]
) -> int:
    """How many leading axes of a condition are those of the innermost plates, 0 where
    it is the same for all members.

    Axes are matched from the right, as NumPyro's batches are: of plates (sessions,
    subjects) a condition has one value for each pair with the axes (sessions, subjects,
    …), for each subject with (subjects, …) or (1, subjects, …), for each session with
    (sessions, 1, …)."""
    batch = tuple(plates.values())
    if shape[: len(batch)] == batch:
        return len(batch)

    def fits(lead: int) -> bool:
        pairs = list(zip(shape[:lead], batch[len(batch) - lead :], strict=True))
        return all(n in (1, size) for n, size in pairs) and (
            any(n > 1 for n, _ in pairs) or shape[:lead] == batch
        )

    found = [lead for lead in range(1, min(len(batch), len(shape)) + 1) if fits(lead)]
    misplaced = not found and bool(shape) and shape[0] > 1 and shape[0] in batch
    if len(found) > 1 or misplaced:
        each = ", ".join(f"{plate!r} of {size}" for plate, size in plates.items())
        raise ShapeError(
            f"Condition {name!r} of {evidence.name!r} has the shape {shape}, in the plates {each}: "
            + (
                "its first axis is not where that plate's is."
                if misplaced
                else "several of them fit."
            ),
            where=evidence.where,
            fix="give it the axes of all plates, in this order, of size 1 where it does not depend on one: "
            f"jnp.broadcast_to(…, {batch} + shape of one value) is never ambiguous.",
        )
    return found[0] if found else 0


def of_one_member(evidence: Statement, site: Statement) -> Factor:
    """The factor with the conditions of the first member of its plates: those that one
    evaluation has."""
    about = plates(evidence, site)
    return rewrite_leaves(
        evidence.factor,
        lambda leaf: leaf.holding(first(leaf.fixed, plate_axes(evidence, leaf, about))),
    )
