"""Blocks of sites moved in turn, each by a kernel of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.evaluation import Evaluation, Position, Target
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.kernels.base import Info, Kernel, KernelState, unknown_site
from composeprob.kernels.step_size import StepSize

Sites = tuple[str, ...]


class GibbsState(KernelState):
    """A chain with what the blocks' kernels carry.

    Attributes:
        inner: each block's own state, in the order of the blocks. Its position and evaluation are left out: they are
            parts of the chain's.
    """

    inner: tuple[Any, ...]


class Gibbs(Kernel[GibbsState]):
    r"""Blocks of sites in turn, each moved by a kernel of its own given all others.

    One transition is a scan: block b moves $x_b$ under $\pi(x_b \mid x_{-b}) \propto \pi(x_b, x_{-b})$, in the order
    given, each seeing what those before it did. Where every block's kernel leaves its conditional invariant, π stays.
    A scan costs the sum of its blocks' evaluations and no more: what one block evaluated last is what the next starts
    from. Each of them is one evaluation of the whole density.

    Steps are the blocks' own: numbers, rules or `Adaptive`, each with its own acceptance to aim for. An adaptive step
    is h_k = c·σ_k^p for a block with noised sites and h_k = c for one of static sites only, whose width does not
    follow the noise. Of several `warmup` the longest counts for all that have one. ``result.acceptance`` and
    ``result.step_size`` have shape (levels, blocks), and ``result.blocks`` names the columns.

    Args:
        blocks: ``{sites: kernel}``, a site's name or a tuple of names each; together every site of the program once.
        backwards: visit the blocks in the opposite order, as the time reversal of a scan does.

    Raises:
        InvalidValueError: no blocks, a block without sites, or a site in two blocks; from `infer`, before anything is
            compiled, a site that no block moves, or one that the program does not have.
        WrongTypeError: what is no kernel or no name, or a `Gibbs` inside another.

    Example:
        >>> import blackjax, composeprob as cp
        >>> kernel = cp.Gibbs({"x": cp.HMC(0.1, num_leapfrog=3), ("mu", "sigma"): cp.BlackJAX(blackjax.nuts, 0.1)})
        >>> kernel.evaluations_per_step
        19
        >>> cp.Gibbs({"x": cp.MALA(0.1), "mu": cp.MALA(0.2)})
        Gibbs({'x': MALA(step_size=0.1), 'mu': MALA(step_size=0.2)})

    References:
        Geman and Geman (1984); Tierney (1994), Markov chains for exploring posterior distributions, for cycles of
        kernels.
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
                f"Gibbs takes a dict of blocks; got {type(blocks).__name__}", fix='write {"x": cp.HMC(), …}'
            )
        self.step_size = None
        self.sites = tuple(_names(sites) for sites in blocks)
        self.kernels = tuple(blocks.values())
        self.backwards = bool(backwards)
        _check(self.sites, self.kernels)

    def __repr__(self) -> str:
        named = {names if len(names) > 1 else names[0]: kernel for names, kernel in self._pairs()}
        return f"Gibbs({named!r}{', backwards=True' if self.backwards else ''})"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset().union(*(kernel.requires for kernel in self.kernels))

    @property
    def evaluations_per_step(self) -> int:
        return sum(kernel.evaluations_per_step for kernel in self.kernels)

    @property
    def integrates_score(self) -> bool:
        return any(kernel.integrates_score for kernel in self.kernels)

    @property
    def blocks(self) -> tuple[Sites, ...]:
        return self.sites

    @property
    def parts(self) -> tuple[Kernel, ...]:
        return tuple(part for kernel in self.kernels for part in kernel.parts)

    @property
    def reversal(self) -> Gibbs:
        return Gibbs(dict(self._pairs()), backwards=not self.backwards)

    def with_steps(self, steps: Sequence[StepSize]) -> Gibbs:
        stepped = (kernel.with_steps((step,)) for kernel, step in zip(self.kernels, steps, strict=True))
        return Gibbs(dict(zip(self.sites, stepped, strict=True)), backwards=self.backwards)

    def check_sites(self, names: Iterable[str]) -> None:
        known, mine = list(names), [name for block in self.sites for name in block]
        for name in mine:
            if name not in known:
                raise unknown_site(f"Gibbs has a block for the site {name!r}", name, known)
        missing = [name for name in known if name not in mine]
        if missing:
            raise InvalidValueError(
                f"no block of Gibbs moves {', '.join(map(repr, missing))}",
                fix=f"add a block such as {{{missing[0]!r}: cp.HMC()}}, or put {missing[0]!r} into one of the others",
            )
        for block, kernel in self._pairs():
            kernel.check_sites(block)

    def init(self, key: Array, position: Position, target: Target) -> GibbsState:
        self.check_sites(position)
        whole = target(position)
        inner = []
        for b, (sites, kernel) in enumerate(self._pairs()):
            own = kernel.init(jax.random.fold_in(key, b), _restricted(position, sites), _known(whole, sites))
            inner.append(_stripped(own))
        return GibbsState(position, whole, tuple(inner))

    def relevel(self, state: GibbsState, target: Target) -> GibbsState:
        whole = target(state.position)
        inner = tuple(
            _stripped(self._own(b, dataclasses.replace(state, evaluation=whole))) for b in range(len(self.kernels))
        )
        return GibbsState(state.position, whole, inner)

    def step(self, key: Array, state: GibbsState, target: Target, step_size: Array) -> tuple[GibbsState, Info]:
        """One scan; `step_size` has shape (blocks,), and so has every entry of the `Info`."""
        count = len(self.kernels)
        infos: list[Any] = [None] * count
        for b in reversed(range(count)) if self.backwards else range(count):
            conditional = _conditional(target, state.position, self.sites[b])
            own_key = jax.random.fold_in(key, b)
            own, infos[b] = self.kernels[b].step(own_key, self._own(b, state), conditional, step_size[b])
            inner = (*state.inner[:b], _stripped(own), *state.inner[b + 1 :])
            state = GibbsState({**state.position, **own.position}, own.evaluation.parts, inner)
        return state, jax.tree.map(lambda *entries: jnp.stack([jnp.asarray(e) for e in entries]), *infos)

    def _pairs(self) -> tuple[tuple[Sites, Kernel], ...]:
        return tuple(zip(self.sites, self.kernels, strict=True))

    def _own(self, b: int, state: GibbsState) -> Any:
        """Block b's state where the chain is now. What other blocks did is to it another level: whatever its kernel
        caches is refreshed, from an evaluation that is at hand."""
        position = _restricted(state.position, self.sites[b])
        own = dataclasses.replace(state.inner[b], position=position)
        return self.kernels[b].relevel(own, _known(state.evaluation, self.sites[b]))


def _names(sites: Any) -> Sites:
    names = sites if isinstance(sites, tuple) else (sites,)
    if not all(isinstance(name, str) for name in names):
        raise WrongTypeError(
            f"a block of Gibbs is called {sites!r}", fix='name one site, "x", or several, ("mu", "sigma")'
        )
    if not names:
        raise InvalidValueError("a block of Gibbs has no site: ()", fix='name one site, "x", or several, ("a", "b")')
    return names


def _check(sites: tuple[Sites, ...], kernels: tuple[Any, ...]) -> None:
    if not sites:
        raise InvalidValueError("Gibbs has no blocks: {}", fix='give each site a kernel, such as {"x": cp.HMC()}')
    for block, kernel in zip(sites, kernels, strict=True):
        shown = ", ".join(map(repr, block))
        if not isinstance(kernel, Kernel):
            raise WrongTypeError(f"the block of {shown} has no kernel but {kernel!r}", fix="give it one, as cp.HMC()")
        if kernel.blocks:
            raise WrongTypeError(f"the block of {shown} is itself moved by a Gibbs", fix="list all blocks in one Gibbs")
    names = [name for block in sites for name in block]
    for name in names:
        if names.count(name) > 1:
            raise InvalidValueError(
                f"the site {name!r} is in more than one place of Gibbs",
                fix="name each site once; to move it more often, take more steps_per_level",
            )


def _restricted(tree: dict[str, Any], sites: Sites) -> dict[str, Any]:
    return {name: tree[name] for name in sites}


def _seen(whole: Evaluation, sites: Sites) -> Evaluation:
    """What of an evaluation concerns a block; the whole, from which the next block goes on, travels with it."""
    return dataclasses.replace(whole, score=_restricted(whole.score, sites), parts=whole)


def _known(whole: Evaluation, sites: Sites) -> Target:
    """A block's target at the one place that has been evaluated."""
    return lambda _: _seen(whole, sites)


def _conditional(target: Target, position: Position, sites: Sites) -> Target:
    """A block's position → what `target` gives with the other sites where they are."""
    return lambda own: _seen(target({**position, **own}), sites)


def _stripped(state: KernelState) -> KernelState:
    return dataclasses.replace(state, position=None, evaluation=None)  # type: ignore[arg-type]
