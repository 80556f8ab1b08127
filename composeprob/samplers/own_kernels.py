"""Kernels of a user's own class: one transition is traced, and what their methods
return is compared with the contract of `Kernel`, before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation
from composeprob.errors import WrongTypeError
from composeprob.kernels.kernel import Info, Kernel, KernelState
from composeprob.user_code import called, is_own

if TYPE_CHECKING:
    from composeprob.samplers.moves import Transitions


def check_own_kernels(moves: Transitions, density: AnnealedDensity) -> None:
    """Refuse kernels of a user's own class whose methods do not return what `Kernel`
    says; kernels that override `step` are not looked at."""
    if not any(is_own(kernel) for kernel in moves.kernel.kernels):
        return
    noise = density.schedule.at(0)
    tuned = moves.tuned((moves.untuned(1), noise))
    evaluation = moves.layout.unevaluated(density, terms=False)
    v = jnp.zeros((moves.layout.size,))
    for b, kernel in enumerate(tuned.kernels):
        if is_own(kernel) and kernel.resumable:
            part = tuned.part(b, v)
            _OneTransition(kernel, part, tuned.block_evaluation(b, evaluation)).trace()


@dataclasses.dataclass(frozen=True)
class _OneTransition:
    """A transition of one block, of which only shapes are computed.

    Attributes:
        kernel: of a user's class.
        position: of the block.
        evaluation: of the density there.
    """

    kernel: Kernel
    position: PyTree[Array]
    evaluation: Evaluation

    def trace(self) -> None:
        """Go through the transition; refuse the first method that breaks the
        contract."""
        state = self._returned(
            "init(key, position, target)",
            lambda: self.kernel.init(
                jax.random.key(0), self.position, lambda _: self.evaluation
            ),
            "return a KernelState, or an object of a class derived from it.",
        )
        self._check_state(state, "init(key, position, target)")
        trajectory, _ = self._begun(state)
        if self.kernel.evaluations_per_step > 1:
            trajectory = self._advanced(trajectory)
        self._finish(trajectory, state)

    @property
    def _who(self) -> str:
        return f"The kernel {type(self.kernel).__name__}"

    def _returned(self, how: str, call: Callable[[], Any], fix: str) -> Any:
        """Return the shapes of what a method returns."""
        return called(
            self._who, how, lambda: jax.eval_shape(call), fix, error=WrongTypeError
        )

    def _refuse(self, returned: object, how: str, fix: str) -> WrongTypeError:
        return WrongTypeError(
            f"{self._who} returns {_shown(returned)} from {how}.", fix=fix
        )

    def _normals(self) -> Array:
        """A transition's random numbers."""
        fix = "return a whole number from noise_size(position), 1 or more."
        size = called(
            self._who,
            "noise_size(position)",
            lambda: self.kernel.noise_size(self.position),
            fix,
            error=WrongTypeError,
        )
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise self._refuse(size, "noise_size(position)", fix)
        return jnp.zeros((size,))

    def _begun(self, state: KernelState) -> tuple[Any, Any]:
        normals = self._normals()
        how = f"begin(noise, state, step_size) with noise of shape {normals.shape}"
        fix = (
            "return (trajectory, position), the position like that of the state; "
            "noise_size(position) says how many numbers of noise there are."
        )
        begun = self._returned(
            how, lambda: self.kernel.begin(normals, _numbers(state), jnp.ones(())), fix
        )
        return self._pair(begun, how, fix)

    def _advanced(self, trajectory: Any) -> Any:
        how = "advance(i, trajectory, evaluation)"
        fix = (
            "return (trajectory, position): a trajectory of the same shapes and types "
            "as the one that begin returned, and the point of the next evaluation."
        )
        advanced = self._returned(
            how,
            lambda: self.kernel.advance(
                jnp.zeros((), jnp.int32), _numbers(trajectory), self.evaluation
            ),
            fix,
        )
        then, _ = self._pair(advanced, how, fix)
        if _forms(then) != _forms(trajectory):
            raise self._refuse(then, how, fix)
        return then

    def _finish(self, trajectory: Any, start: KernelState) -> None:
        how = "finish(trajectory, evaluation)"
        fix = (
            "return (state, info), the state like the one that the transition began "
            "with, and an Info: `metropolis` and `unadjusted` return both."
        )
        finished = self._returned(
            how,
            lambda: self.kernel.finish(_numbers(trajectory), self.evaluation),
            fix,
        )
        is_pair = isinstance(finished, tuple) and len(finished) == 2
        if not is_pair or not isinstance(finished[1], Info):
            raise self._refuse(finished, how, fix)
        state, info = finished
        self._check_state(state, how)
        scalars = [leaf.shape for leaf in jax.tree.leaves(info)]
        if any(scalars) or _shapes(state) != _shapes(start):
            raise self._refuse(finished, how, fix)

    def _pair(self, returned: Any, how: str, fix: str) -> tuple[Any, Any]:
        """A trajectory and a position; anything else is refused."""
        is_pair = isinstance(returned, tuple) and len(returned) == 2
        if not is_pair or _shapes(returned[1]) != _shapes(self.position):
            raise self._refuse(returned, how, fix)
        trajectory, position = returned
        return trajectory, position

    def _check_state(self, state: object, how: str) -> None:
        if not isinstance(state, KernelState):
            raise self._refuse(
                state, how, "return a KernelState(position, evaluation)."
            )


def _numbers(shapes: PyTree) -> PyTree[Array]:
    """Arrays of these shapes."""
    return jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), shapes)


def _shapes(tree: PyTree) -> tuple[object, list[object]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [getattr(leaf, "shape", None) for leaf in leaves]


def _forms(tree: PyTree) -> tuple[object, list[object]]:
    structure, shapes = _shapes(tree)
    return structure, [*shapes, *(leaf.dtype for leaf in jax.tree.leaves(tree))]


def _shown(returned: object) -> str:
    """Describe what a method returned in a few words."""
    if isinstance(returned, tuple):
        return f"({', '.join(map(_shown, returned))})"
    shape = getattr(returned, "shape", None)
    if shape is not None:
        return f"an array of shape {shape}"
    if returned is None or isinstance(returned, (int, float, str)):
        return repr(returned)
    if isinstance(returned, dict):
        entries = [f"{name}: {_shown(value)}" for name, value in returned.items()]
        return "{" + ", ".join(entries) + "}"
    return f"a {type(returned).__name__}"
