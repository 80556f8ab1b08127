"""Other units for some of the sites: a linear change of coordinates around any kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.errors import ShapeError, WrongTypeError
from composeprob.kernels.base import Info, Kernel, KernelState, unknown_site
from composeprob.kernels.step_size import as_numbers, check_range, match_precision
from composeprob.kernels.wrapper import Wrapper

S = TypeVar("S", bound=KernelState)
Units = Mapping[str, Array]


class Scaled(Wrapper[KernelState]):
    r"""Any kernel, with a length of its own for some sites: it moves $u_i = x_i / s_i$ in place of $x_i$.

    In the coordinates u the score is $s_i\,\nabla_{x_i}\log\pi$, and a step h moves $x_i$ by $s_i$ times what it
    would. π stays as invariant as the kernel leaves it, and nothing is evaluated more often. A good $s_i$ is the
    standard deviation that the site has in the posterior, in the coordinates of a position: unconstrained ones, where a
    positive site is its logarithm. Sites that are not named keep the scale 1.

    An `Adaptive` step adapts the c that all sites share, h_k = c·σ_k^p, on top of their scales. Where sites should
    adapt apart from one another, use `Gibbs`.

    Args:
        kernel: moves the position.
        scales: ``{site: s}``, each a number > 0 or an array that broadcasts to the site's shape; a length for every
            kernel, for those too (MALA, ULA) whose h is a squared length.

    Raises:
        WrongTypeError: no kernel, or a scale that is no number.
        InvalidValueError: a scale that is not positive and finite; from `infer`, before anything is compiled, a site
            that is not there.
        ShapeError: a scale that does not broadcast to its site.

    Example:
        >>> import composeprob as cp
        >>> cp.Scaled(cp.HMC(0.5), {"mu": 0.01})
        Scaled(HMC(step_size=0.5, num_leapfrog=3, damping=0.5), {'mu': 0.01})

    References:
        Neal (2011), MCMC using Hamiltonian dynamics, section 4.1, on linear transformations and mass matrices.
    """

    scales: dict[str, Array]

    def __init__(self, kernel: Kernel, scales: Mapping[str, Any]):
        if not isinstance(kernel, Kernel):
            raise WrongTypeError(f"Scaled takes a kernel; got {kernel!r}", fix='write cp.Scaled(cp.HMC(), {"mu": 0.1})')
        if not isinstance(scales, Mapping):
            raise WrongTypeError(f"Scaled takes a dict of scales; got {scales!r}", fix='write {"mu": 0.1}')
        self.kernel = kernel
        self.scales = {name: as_numbers(s, f"the scale of {name!r}", "a number > 0") for name, s in scales.items()}
        for name, scale in self.scales.items():
            check_range(scale, f"the scale of {name!r}", 0.0, jnp.inf, fix="positive, finite numbers")

    def __repr__(self) -> str:
        shown = ", ".join(f"{name!r}: {_shown(scale)}" for name, scale in self.scales.items())
        return f"Scaled({self.kernel!r}, {{{shown}}})"

    def check_sites(self, names: Iterable[str]) -> None:
        known = list(names)
        for name in self.scales:
            if name not in known:
                raise unknown_site(f"Scaled has a scale for the site {name!r}", name, known)
        self.kernel.check_sites(known)

    def init(self, key: Array, position: Position, target: Target) -> KernelState:
        self.check_sites(position)
        for name, scale in self.scales.items():
            for shape in map(jnp.shape, jax.tree.leaves(position[name])):
                if _broadcast(scale.shape, shape) != shape:
                    raise ShapeError(
                        f"the scale of {name!r} has shape {scale.shape}, but the site has shape {shape}",
                        fix="give one number, or an array that broadcasts to the site's shape",
                    )
        units = self._units(position)
        state = self.kernel.init(key, to_units(position, units), target_in_units(target, units))
        return in_units(state, {name: 1 / unit for name, unit in units.items()})

    def relevel(self, state: KernelState, target: Target) -> KernelState:
        units = self._units(state.position)
        state = dataclasses.replace(state, position=to_units(state.position, units))
        state = self.kernel.relevel(state, target_in_units(target, units))
        return in_units(state, {name: 1 / unit for name, unit in units.items()})

    def step(self, key: Array, state: KernelState, target: Target, step_size: Array) -> tuple[KernelState, Info]:
        units = self._units(state.position)
        moved = target_in_units(target, units)
        state, info = self.kernel.step(key, in_units(state, units), moved, step_size)
        return in_units(state, {name: 1 / unit for name, unit in units.items()}), info

    def _units(self, position: Position) -> dict[str, Array]:
        return {name: match_precision(scale, position[name]) for name, scale in self.scales.items()}


def to_units(position: Position, units: Units) -> Position:
    """x → x/unit at the sites that have one."""
    return {n: jax.tree.map(lambda leaf, n=n: leaf / units[n], x) if n in units else x for n, x in position.items()}


def in_units(state: S, units: Units) -> S:
    """The same chain with some sites measured in units: x → x/unit, ∇ → unit·∇."""
    if not units:
        return state
    evaluation = _evaluation_in_units(state.evaluation, units)
    return dataclasses.replace(state, position=to_units(state.position, units), evaluation=evaluation)


def target_in_units(target: Target, units: Units) -> Target:
    """The density as a function of a position in units; its constant is left as it is."""
    if not units:
        return target

    def scaled(position: Position) -> Evaluation:
        own = {n: jax.tree.map(lambda u, n=n: u * units[n], x) if n in units else x for n, x in position.items()}
        return _evaluation_in_units(target(own), units)

    return scaled


def _evaluation_in_units(evaluation: Evaluation, units: Units) -> Evaluation:
    score = {
        n: jax.tree.map(lambda leaf, n=n: leaf * units[n], s) if n in units else s for n, s in evaluation.score.items()
    }
    return dataclasses.replace(evaluation, score=score)


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return tuple(jnp.broadcast_shapes(one, other))
    except ValueError:
        return None


def _shown(scale: Any) -> str:
    if isinstance(scale, jax.core.Tracer) or scale.ndim:
        return f"array{scale.shape}"
    return f"{float(scale):.6g}"
