"""Rewards: criteria that are programs, without a gradient, called on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from composeprob.arguments import check_count
from composeprob.errors import InvalidValueError, WrongTypeError, a_kind

Criterion = Callable[[Any], Any]
"""(n, *event) → (n,): the rewards of a batch, both NumPy arrays."""


@dataclass(frozen=True, eq=False)
class Reward:
    r"""A criterion of a site that is a program: a score of chemistry, a simulator, a
    rule. It multiplies exp(scale·fn(x)) into the density.

    $$\pi(x) \propto p(x)\,e^{\lambda R(x)}$$

    It is called on the host, with a batch of all chains, and needs no gradient: `infer`
    samples the program without it, then raises the exponent from 0 to λ in as few
    stages as keep half of the chains counting, log w += γ'λR(x) − γλR(x). Between them
    chains move by draws from mixtures that are fitted to them (as `GlobalMoves`), or by
    `Renoise`; the accept test asks for the reward of each proposal once.

    Args:
        fn: takes events, a NumPy array (n, \*event) of values of the site, and returns
            their rewards, (n,); −∞ where an event is impossible. Equal events are asked
            once.
        scale: λ.
        calls: the most events that it is asked for, for each chain; left out, 100.

    Raises:
        WrongTypeError: fn cannot be called.
        InvalidValueError: a scale that is not finite, or fewer than 2 calls.

    Example:
        >>> import composeprob as cp, numpy as np
        >>> def inside(points):
        ...     return np.where(np.abs(points - 4.0) < 0.3, 3.0, 0.0)
        >>> cp.Reward(inside, calls=60)
        Reward(inside, scale=1.0, calls=60)
    """

    fn: Criterion
    scale: float = 1.0
    calls: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise WrongTypeError(
                f"A reward is a function of a batch of events; got {a_kind(self.fn)}.",
                fix="pass the function itself: cp.Reward(fn).",
            )
        if not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise InvalidValueError(
                f"The scale of a reward is a finite number; got {self.scale!r}.",
                fix="for example cp.Reward(fn, scale=2.0).",
            )
        if self.calls is not None and check_count(self.calls, "Reward(calls=)") < 2:
            raise InvalidValueError(
                "A chain needs 2 calls at least: where it is, and for one move.",
                fix="leave calls= out, or give it some 60.",
            )

    @property
    def name(self) -> str:
        """The name of its function."""
        return getattr(self.fn, "__name__", type(self.fn).__name__).strip("<>")

    def __repr__(self) -> str:
        calls = "" if self.calls is None else f", calls={self.calls}"
        return f"Reward({self.name}, scale={self.scale}{calls})"


class SiteReward(NamedTuple):
    """A reward of a program: its statement's name and place, and its site."""

    name: str
    site: str
    reward: Reward
    where: str
