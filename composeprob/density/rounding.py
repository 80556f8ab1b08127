"""Densities whose networks are evaluated less accurately than they could be, and the
same densities without that."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity


class Approximate(eqx.Module):
    """A part of a density that stands for a more accurate one."""

    @property
    @abc.abstractmethod
    def exact(self) -> Any:
        """The part that it stands for."""


def unrounded(density: AnnealedDensity) -> AnnealedDensity | None:
    """Return the density with every `Approximate` part replaced by what it stands for;
    None where it has none."""
    found = jax.tree.leaves(density, is_leaf=_is_approximate)
    if not any(map(_is_approximate, found)):
        return None

    def exact(node: Any) -> Any:
        return node.exact if _is_approximate(node) else node

    whole: AnnealedDensity = jax.tree.map(exact, density, is_leaf=_is_approximate)
    return whole


def _is_approximate(node: object) -> bool:
    return isinstance(node, Approximate)
