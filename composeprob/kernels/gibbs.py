"""Gibbs: blocks of sites moved in turn, each by a separate kernel."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Self, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels.kernel import Info, Kernel, KernelState, as_kernel
from composeprob.kernels.line_integral import LineIntegral
from composeprob.kernels.metric import Estimated

Sites = tuple[str, ...]
Tree = TypeVar("Tree")


class GibbsState(KernelState):
    """A chain with the states of its blocks' kernels."""

    # Of each block, without position and evaluation: those are in the chain's.
    inner: tuple[KernelState, ...] = ()


class Gibbs(Kernel[GibbsState]):
    r"""Blocks of sites in turn, each moved by a separate kernel given all others.

    One transition is a scan: block b moves $x_b$ under $\pi(x_b \mid x_{-b}) \propto
    \pi(x_b, x_{-b})$, in the order given, each under the latest values of the others.
    Where every block's kernel leaves its conditional invariant, the scan leaves π
    invariant. A scan costs the sum of its blocks' evaluations and no more: each block
    starts from the last evaluation of the one before it. Each of them is one evaluation
    of the whole density. Sites of no block stay where they are.

    Each block has its step size: a number, a rule or `Adaptive`, with an acceptance to
    aim for. An adaptive step is h_k = c·σ_k^p for a block with noised sites and h_k = c
    for one of static sites only, whose width does not follow the noise. A metric that
    is measured is one for each block. Of several `warmup` the longest counts for all
    that have one. ``result.acceptance`` and ``result.step_size`` have shape (levels,
    blocks); ``result.about.blocks`` names the columns.

    Args:
        blocks: ``{sites: kernel}``, a site's name or a tuple of names each; together
            every site of the program once.
        backwards: visit the blocks in the opposite order, as the time reversal of a
            scan does.

    Raises:
        InvalidValueError: no blocks, a block without sites, or a site in two blocks;
            from `infer`, before anything is compiled, a site that no block moves, or
            one that the program does not have.
        WrongTypeError: a value that is not a kernel, a key that is not a name, or a
            `Gibbs` inside another.

    Example:
        >>> import blackjax, composeprob as cp
        >>> nuts = cp.BlackJAX(blackjax.nuts, 0.1)
        >>> kernel = cp.Gibbs({"x": cp.HMC(0.1, num_leapfrog=3), ("mu", "sigma"): nuts})
        >>> kernel.evaluations_per_step
        19
        >>> cp.Gibbs({"x": cp.MALA(0.1), "mu": cp.MALA(0.2)})
        Gibbs({'x': MALA(step_size=0.1), 'mu': MALA(step_size=0.2)})

    References:
        Geman and Geman (1984); Tierney (1994), Markov chains for exploring posterior
        distributions, for cycles of kernels.
    """

    step_size: None = eqx.field(default=None, init=False)  # type: ignore[assignment]
    sites: tuple[Sites, ...] = eqx.field(static=True)
    kernels: tuple[Kernel, ...]
    backwards: bool = eqx.field(static=True)

    optimal_acceptance = None
    scale_exponent = 0

    def __init__(self, blocks: Mapping[Any, Kernel], backwards: bool = False):
        if not isinstance(blocks, Mapping):
            raise WrongTypeError(
                f"Gibbs takes a dict of blocks; got {type(blocks).__name__}",
                fix='write {"x": cp.HMC(), …}',
            )
        self.step_size = None
        self.sites = tuple(_names(sites) for sites in blocks)
        self.kernels = tuple(as_kernel(kernel) for kernel in blocks.values())
        self.backwards = bool(backwards)
        _check(self.sites, self.kernels)

    def __repr__(self) -> str:
        named: dict[Any, Kernel] = {}
        for names, kernel in zip(self.sites, self.kernels, strict=True):
            named[names if len(names) > 1 else names[0]] = kernel
        backwards = ", backwards=True" if self.backwards else ""
        return f"Gibbs({named!r}{backwards})"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset().union(*(kernel.requires for kernel in self.kernels))

    @property
    def evaluations_per_step(self) -> int:
        return sum(kernel.evaluations_per_step for kernel in self.kernels)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the blocks, for results."""
        return tuple(", ".join(sites) for sites in self.sites)

    @property
    def order(self) -> range:
        """Blocks in the order in which a transition moves them."""
        blocks = range(len(self.kernels))
        return blocks[::-1] if self.backwards else blocks

    @property
    def reversal(self) -> Self:
        """Scan in the opposite order: the reversal of `Info.log_reversal`."""
        return replaced(self, backwards=not self.backwards)

    def init(
        self, key: Key[Array, ""], position: Position, target: Target
    ) -> GibbsState:
        whole = target(position)
        inner = []
        for b, kernel in enumerate(self.kernels):
            here = _constant(self.block_evaluation(b, whole))
            block = kernel.init(self._key(key, b), self.part(b, position), here)
            inner.append(_stripped(block))
        return GibbsState(position, whole, tuple(inner))

    def relevel(self, state: GibbsState, target: Target) -> GibbsState:
        here = dataclasses.replace(state, evaluation=target(state.position))
        blocks = range(len(self.kernels))
        inner = tuple(_stripped(self.block_state(b, here)) for b in blocks)
        return dataclasses.replace(here, inner=inner)

    def step(
        self,
        key: Key[Array, ""],
        state: GibbsState,
        target: Target,
        step_size: Sequence[Array] | Float[Array, " blocks"],
    ) -> tuple[GibbsState, Info]:
        """Make one scan; `step_size` has one entry for each block, and so has every
        entry of the `Info`."""
        # Reports stand in the order of the blocks, in whichever order these move.
        infos: list[Any] = [None] * len(self.kernels)
        for b in self.order:
            conditional = self._conditional(b, target, state.position)
            block = self.block_state(b, state)
            block, infos[b] = self.kernels[b].step(
                self._key(key, b), block, conditional, step_size[b]
            )
            state = self.merged(b, state, block)
        return state, jax.tree.map(_stacked, *infos)

    def part(self, b: int, position: Position) -> Position:
        """Return the sites of block b of a position, or of a gradient."""
        return {name: position[name] for name in self.sites[b]}

    def joined(self, b: int, position: Position, part: Position) -> Position:
        """Return the position with another `part` of block b."""
        return {**position, **part}

    def block_state(self, b: int, state: GibbsState) -> KernelState:
        """Return block b's state where the chain is now.

        For a block, moves of the others are like another level: whatever its kernel
        caches is refreshed, from the chain's evaluation.
        """
        part = self.part(b, state.position)
        block = dataclasses.replace(state.inner[b], position=part)
        here = _constant(self.block_evaluation(b, state.evaluation))
        return self.kernels[b].relevel(block, here)

    def merged(self, b: int, state: GibbsState, block: KernelState) -> GibbsState:
        """Return the chain after block b has moved to the state ``block``, whose
        evaluation is one of `block_evaluation`."""
        inner = list(state.inner)
        inner[b] = _stripped(block)
        evaluation = block.evaluation.terms
        tracked = block.evaluation.tracked
        if tracked is not None:
            # The kernel may have carried log f of these factors to where it went.
            whole = evaluation.tracked.with_values(tracked.values)
            evaluation = dataclasses.replace(evaluation, tracked=whole)
        return dataclasses.replace(
            state,
            position=self.joined(b, state.position, block.position),
            evaluation=evaluation,
            inner=tuple(inner),
        )

    def block_evaluation(self, b: int, whole: Evaluation) -> Evaluation:
        """Return block b's part of an evaluation; the whole, which the next block
        needs, travels as its ``terms``."""
        gradients = (self.part(b, gradient) for gradient in whole.gradients)
        return dataclasses.replace(whole.with_gradients(gradients), terms=whole)

    def _key(self, key: Array, b: int) -> Array:
        """Return block b's key; a single block's is the key itself, so that it moves as
        its kernel alone does."""
        return jax.random.fold_in(key, b) if len(self.kernels) > 1 else key

    def _conditional(self, b: int, target: Target, position: Position) -> Target:
        """Return the target of block b's position, with the other sites where they
        are."""

        def conditional(block: Position) -> Evaluation:
            whole = target(self.joined(b, position, block))
            return self.block_evaluation(b, whole)

        return conditional


def parts_of(kernel: Kernel | None) -> tuple[Kernel, ...]:
    """Return the kernels that have a step size: one for each block of a `Gibbs`, or the
    kernel itself, if there is one."""
    if kernel is None:
        return ()
    if isinstance(kernel, Gibbs):
        return kernel.kernels
    return (kernel,)


def integrates_score(kernel: Kernel | None) -> bool:
    """Return whether an accept test integrates the score, which needs a score that is a
    gradient."""
    return any(
        isinstance(getattr(part, "log_ratio", None), LineIntegral)
        for part in parts_of(kernel)
    )


def measures_metric(kernel: Kernel | None) -> bool:
    """Return whether a metric is measured from the moves of all chains."""
    return any(
        isinstance(getattr(part, "metric", None), Estimated)
        for part in parts_of(kernel)
    )


def replaced(module: Tree, **fields: object) -> Tree:
    """Return a kernel, or another module, with other values of some fields, which are
    neither converted nor checked again."""
    # `dataclasses.replace` would call a kernel's __init__, whose arguments are not its
    # fields.
    copied = copy.copy(module)
    for name, value in fields.items():
        object.__setattr__(copied, name, value)
    return copied


def with_parts(kernel: Kernel, parts: Sequence[Kernel]) -> Kernel:
    """Return the same blocks with other kernels, or the one other kernel."""
    if isinstance(kernel, Gibbs):
        return replaced(kernel, kernels=tuple(parts))
    return parts[0]


def in_blocks(kernel: Kernel, names: Iterable[str]) -> Gibbs:
    """Return any kernel as blocks of the sites that are to be moved.

    It is one block, unless the kernel is a `Gibbs` already, whose blocks must be of
    these ``names`` and leave none out.
    """
    sites = tuple(names)
    if not isinstance(kernel, Gibbs):
        return Gibbs({sites: kernel})
    listed = [name for block in kernel.sites for name in block]
    for name in listed:
        if name in sites:
            continue
        near = get_close_matches(name, sites, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidValueError(
            f"Gibbs has a block for the site {name!r}, which the program does not have",
            fix=f"{hint}Its sites are {', '.join(map(repr, sites))}",
        )
    missing = [name for name in sites if name not in listed]
    if missing:
        first = repr(missing[0])
        raise InvalidValueError(
            f"no block of Gibbs moves {', '.join(map(repr, missing))}",
            fix=f"add a block such as {{{first}: cp.HMC()}}, or put {first} into one "
            "of the others",
        )
    return kernel


def _names(sites: Any) -> Sites:
    """Return a block's sites, named by a string or a tuple, as a tuple."""
    names = sites if isinstance(sites, tuple) else (sites,)
    if not all(isinstance(name, str) for name in names):
        raise WrongTypeError(
            f"a block of Gibbs is called {sites!r}",
            fix='name one site, "x", or several, ("mu", "sigma")',
        )
    if not names:
        raise InvalidValueError(
            "a block of Gibbs has no site: ()",
            fix='name one site, "x", or several, ("a", "b")',
        )
    return names


def _check(sites: tuple[Sites, ...], kernels: tuple[object, ...]) -> None:
    """Refuse values that are not kernels, and sites in more than one block."""
    if not sites:
        raise InvalidValueError(
            "Gibbs has no blocks: {}",
            fix='give each site a kernel, such as {"x": cp.HMC()}',
        )
    for block, kernel in zip(sites, kernels, strict=True):
        shown = ", ".join(map(repr, block))
        if not isinstance(kernel, Kernel):
            raise WrongTypeError(
                f"the block of {shown} has {kernel!r} in place of a kernel",
                fix="give it one, as cp.HMC()",
            )
        if isinstance(kernel, Gibbs):
            raise WrongTypeError(
                f"the block of {shown} is itself moved by a Gibbs",
                fix="list all blocks in one Gibbs",
            )
    names = [name for block in sites for name in block]
    for name in names:
        if names.count(name) > 1:
            raise InvalidValueError(
                f"the site {name!r} is in more than one place of Gibbs",
                fix="name each site once; to move it more often, take more "
                "steps_per_level",
            )


def _constant(evaluation: Evaluation) -> Target:
    """Return the target at the one point that has been evaluated."""
    return lambda _: evaluation


def _stacked(*entries: Array | float) -> Array:
    """Return an entry of the blocks' reports as one array."""
    return jnp.stack([jnp.asarray(entry) for entry in entries])


def _stripped(state: KernelState) -> KernelState:
    """Return a block's state without position and evaluation, which the chain holds."""
    return dataclasses.replace(state, position=None, evaluation=None)  # type: ignore[arg-type]
