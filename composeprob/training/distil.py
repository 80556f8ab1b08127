"""A conditional normalising flow as a diffusion factor: trained on the flow's own
draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.factors.diffusion import Diffusion
from composeprob.training.loop import TrainingRun, train
from composeprob.training.quality import reverse_samples
from composeprob.training.recipe import Recipe


class Flow(Protocol):
    """A `Flow` is a conditional density q(u | x) that can be drawn from, as flowjax's
    distributions are."""

    def sample(self, key: Array, *, condition: Array) -> Array:
        """One draw of u given one x."""

    def log_prob(self, u: Array, *, condition: Array) -> Array:
        """log q(u | x), a scalar."""


@dataclass(frozen=True)
class Distilled:
    """A `Distilled` holds a factor trained on the draws of a flow, and what it lost.

    Each of the three is taken at conditions that were not trained on, with draws of
    both at level 0.

    Attributes:
        run: the training.
        log_density_gap: mean log q(u | x) of the flow's draws less that of the factor's
            by reverse diffusion, in nats, shape (conditions,). 0 where nothing was
            lost, and about the divergence from the flow where the factor is too wide;
            negative where it is too narrow.
        mean_off: by how many of the flow's standard deviations the factor's mean is
            off, (conditions, entries).
        spread: the factor's standard deviation over the flow's, (conditions, entries).
        draws: of each, which leave `mean_off` uncertain by √(2/draws) and `spread` by
            √(1/draws).
    """

    run: TrainingRun
    log_density_gap: np.ndarray
    mean_off: np.ndarray
    spread: np.ndarray
    draws: int

    @property
    def factor(self) -> Diffusion:
        """The factor q(u | x), with the condition ``x``."""
        return cast(
            Diffusion, self.run.factor
        )  # which is what a recipe with a network makes

    def __str__(self) -> str:
        number, off = len(self.log_density_gap), math.sqrt(np.mean(self.mean_off**2))
        error = self.log_density_gap.std() / math.sqrt(number)
        return (
            f"{self.run.factor.label}: over {number} conditions held out log q of its draws is "
            f"{self.log_density_gap.mean():.3g} ± {error:.2g} nats below that of the flow's; means are off by "
            f"{off:.2g} sd (chance alone: {math.sqrt(2 / self.draws):.2g}), spreads {self.spread.min():.2g} to "
            f"{self.spread.max():.2g} times the flow's."
        )


def distil(
    flow: Flow,
    xs: ArrayLike,
    key: Array,
    *,
    held_out: int = 16,
    draws: int = 500,
    progress: bool = True,
    label: str = "distilled",
    **settings: Any,
) -> Distilled:
    r"""Trains a diffusion factor on draws of a conditional normalising flow.

    A flow has the density q(u | x) in closed form, and that of $\alpha u +
    \sigma\epsilon$ at no level above: so it can be multiplied with other factors at
    level 0 only. What is trained here on $u \sim q(\cdot \mid x)$, drawn anew for each
    step, is a factor at all levels.

    Args:
        flow: the trained flow, with flowjax's ``sample(key, condition=x)`` and
            ``log_prob(u, condition=x)`` of one event, which ``jax.jit`` can trace.
        xs: conditions, (N, …), as many different ones as there are: those of the
            simulations that the flow was trained on. Each step of training takes some
            of them at random.
        key: a typed random key.
        held_out: how many conditions, the last of ``xs``, are not trained on: there the
            two are compared.
        draws: of each, for each of these.
        progress: show a progress bar.
        label: the factor's name.
        settings: what `Recipe` takes beside data and conditions, ``network`` and
            ``schedule`` at least. The network is called as ``network(u, t, x=x)``.

    Returns:
        A `Distilled`: the factor, and what it lost. ``print`` it.

    Raises:
        WrongTypeError: what is no such flow.
        InvalidValueError: fewer conditions than are held out, draws that are not
            finite, or what `Recipe` refuses.

    Example:
        With a flow of flowjax, and ``net(key)`` that makes a network ``network(u,
            log_snr, x=x)``::

            distilled = cp.training.distil(flow, xs, key, network=net,
            schedule=schedule, log_snr=(-9.0, 9.0)) print(distilled) posterior =
            distilled.factor                                    # posterior.given(x=x) /
            prior, and so on
    """
    missing = [
        name
        for name in ("sample", "log_prob")
        if not callable(getattr(flow, name, None))
    ]
    if missing:
        raise WrongTypeError(
            f"distil needs a flow with sample and log_prob; {type(flow).__name__} has no {' and no '.join(missing)}.",
            fix="wrap it: a class with sample(key, *, condition) and log_prob(u, *, condition), each of one event.",
        )
    conditions = jnp.asarray(xs)
    if not (conditions.ndim and 1 <= held_out < len(conditions)) or draws < 2:
        raise InvalidValueError(
            f"distil got conditions of shape {conditions.shape}, of which {held_out} are held out, and draws={draws}.",
            fix="give more conditions along the first axis than are held out, at least 1, and at least 2 draws.",
        )
    known, unseen = conditions[:-held_out], conditions[-held_out:]

    def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        which, rest = jax.random.split(key)
        x = known[jax.random.randint(which, (n,), 0, len(known))]
        return _sampled(flow, rest, x), {"x": x}

    train_key, flow_key, own_key = jax.random.split(key, 3)
    if not jnp.all(jnp.isfinite(_sampled(flow, flow_key, unseen))):
        fix = "look at flow.sample(key, condition=x) for these x."
        raise InvalidValueError(
            "Draws of the flow are not all finite numbers.", fix=fix
        )
    recipe = Recipe(data=data, conditions=("x",), **settings)
    run = train(recipe, train_key, progress=progress, label=label)
    factor, rows = cast(Diffusion, run.factor), []
    noise = factor.schedule.at(0)
    for i, x in enumerate(unseen):
        exact_key, noise_key = jax.random.split(jax.random.fold_in(flow_key, i))
        clean = _sampled(flow, exact_key, jnp.broadcast_to(x, (draws, *x.shape)))
        exact = clean + noise.sigma / noise.alpha * jax.random.normal(
            noise_key, clean.shape
        )
        own = (
            reverse_samples(factor.given(x=x), jax.random.fold_in(own_key, i), draws)
            / noise.alpha
        )
        log_q = jax.vmap(lambda u, x=x: flow.log_prob(u, condition=x))
        gap = jnp.mean(log_q(exact)) - jnp.mean(log_q(own))
        flat, ours = (np.asarray(a).reshape(draws, -1) for a in (exact, own))
        sd = flat.std(0)
        rows.append((float(gap), (ours.mean(0) - flat.mean(0)) / sd, ours.std(0) / sd))
    gaps, off, spread = (np.array(column) for column in zip(*rows, strict=True))
    return Distilled(run, gaps, off, spread, draws)


def _sampled(flow: Flow, key: Array, x: Array) -> Array:
    """A draw for each of n conditions, (n, …)."""
    return jax.vmap(lambda key, x: flow.sample(key, condition=x))(
        jax.random.split(key, len(x)), x
    )
