"""Distillation of conditional normalising flows into diffusion factors.

The factor is trained on draws of the flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import ArrayLike

from composeprob.core import Diffusion
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.training.loop import TrainingRun, train
from composeprob.training.quality import reverse_samples
from composeprob.training.recipe import Recipe


class Flow(Protocol):
    """A `Flow` is a conditional density q(u | x) with draws, as flowjax has them."""

    def sample(self, key: Array, *, condition: Array) -> Array:
        """Draw one u given one x."""

    def log_prob(self, u: Array, *, condition: Array) -> Array:
        """Return log q(u | x), a scalar."""


@dataclass(frozen=True)
class Distilled:
    """A `Distilled` compares a factor with the flow whose draws it learned from.

    The three comparisons are made at conditions that were held out of training, between
    draws of the flow and of the factor at level 0.

    Attributes:
        run: the training.
        log_density_gap: mean log q(u | x) of the flow's draws less that of the factor's
            by reverse diffusion, in nats, shape (conditions,). It is 0 for a perfect
            factor, about the divergence from the flow where the factor is too wide, and
            negative where it is too narrow.
        mean_off: offset of the factor's mean from the flow's, in standard deviations of
            the flow, (conditions, entries).
        spread: the factor's standard deviation over the flow's, (conditions, entries).
        draws: number of draws of each at each condition. They leave `mean_off`
            uncertain by √(2/draws) and `spread` by √(1/draws).
    """

    run: TrainingRun
    log_density_gap: Float[np.ndarray, " conditions"]
    mean_off: Float[np.ndarray, "conditions entries"]
    spread: Float[np.ndarray, "conditions entries"]
    draws: int

    @property
    def factor(self) -> Diffusion:
        """The factor q(u | x), with the condition ``x``."""
        # A recipe of `distil` never makes a classifier, which `train` may also return.
        return cast(Diffusion, self.run.factor)

    def __str__(self) -> str:
        number = len(self.log_density_gap)
        gap_error = self.log_density_gap.std() / math.sqrt(number)
        offset = math.sqrt(np.mean(self.mean_off**2))
        chance = math.sqrt(2 / self.draws)
        return (
            f"{self.run.factor.label}: over {number} conditions held out, mean log q "
            f"of its draws is {self.log_density_gap.mean():.3g} ± {gap_error:.2g} nats "
            f"below that of the flow's; its means differ by {offset:.2g} sd (by chance "
            f"alone: {chance:.2g}), and its spreads are {self.spread.min():.2g} to "
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
    r"""Train a diffusion factor on draws of a conditional normalising flow.

    A flow has the density q(u | x) in closed form at level 0, but not the density of
    $\alpha u + \sigma\epsilon$ at the levels above: it can be multiplied with other
    factors at level 0 only. The factor that is trained here, on $u \sim q(\cdot \mid
    x)$ drawn afresh for each step, is a factor at all levels.

    Args:
        flow: the trained flow, with flowjax's ``sample(key, condition=x)`` and
            ``log_prob(u, condition=x)`` of one event, which ``jax.jit`` can trace.
        xs: conditions, (N, …), all that the flow was trained on. Each step of training
            takes some of them at random.
        key: a typed random key.
        held_out: number of conditions, the last of ``xs``, that are not trained on:
            flow and factor are compared there.
        draws: number of draws of flow and factor at each of these.
        progress: show a progress bar.
        label: the factor's name.
        settings: arguments of `Recipe` other than data and conditions, ``network`` and
            ``schedule`` at least. The network is called as ``network(u, t, x=x)``.

    Returns:
        A `Distilled`: the factor, and its comparison with the flow. ``print`` it.

    Raises:
        WrongTypeError: an object without the methods of such a flow.
        InvalidValueError: fewer conditions than are held out, draws that are not
            finite, or arguments that `Recipe` refuses.

    Example:
        With a flow of flowjax, and ``net(key)`` that makes a network ``network(u,
        log_snr, x=x)``::

            distilled = cp.training.distil(
                flow, xs, key, network=net, schedule=schedule, log_snr=(-9.0, 9.0)
            )
            print(distilled)
            posterior = distilled.factor  # posterior.given(x=x) / prior, and so on
    """
    _check_flow(flow)
    conditions = jnp.asarray(xs)
    splits = conditions.ndim > 0 and 1 <= held_out < len(conditions)
    if not splits or draws < 2:
        raise InvalidValueError(
            f"distil got conditions of shape {conditions.shape}, of which {held_out} "
            f"are held out, and draws={draws}.",
            fix="give more conditions along the first axis than are held out, at least "
            "1, and at least 2 draws.",
        )
    training = conditions[:-held_out]
    unseen = conditions[-held_out:]

    def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        index_key, flow_key = jax.random.split(key)
        x = training[jax.random.randint(index_key, (n,), 0, len(training))]
        return _flow_draws(flow, flow_key, x), {"x": x}

    train_key, flow_key, factor_key = jax.random.split(key, 3)
    # A flow whose draws are NaN would train to NaN without a message.
    if not jnp.all(jnp.isfinite(_flow_draws(flow, flow_key, unseen))):
        raise InvalidValueError(
            "Draws of the flow are not all finite numbers.",
            fix="look at flow.sample(key, condition=x) for these x.",
        )
    recipe = Recipe(data=data, conditions=("x",), **settings)
    run = train(recipe, train_key, progress=progress, label=label)
    factor = cast(Diffusion, run.factor)
    # Conditions that were trained on would hide overfitting.
    rows = []
    for i, x in enumerate(unseen):
        keys = (jax.random.fold_in(flow_key, i), jax.random.fold_in(factor_key, i))
        rows.append(_compare(flow, factor, x, keys, draws))
    gaps, offsets, spreads = zip(*rows, strict=True)
    return Distilled(run, np.array(gaps), np.array(offsets), np.array(spreads), draws)


def _check_flow(flow: object) -> None:
    """Refuse an object without the methods of a flow."""
    methods = ("sample", "log_prob")
    missing = [name for name in methods if not callable(getattr(flow, name, None))]
    if missing:
        raise WrongTypeError(
            f"distil needs a flow with sample and log_prob; {type(flow).__name__} has "
            f"no {' and no '.join(missing)}.",
            fix="wrap it: a class with sample(key, *, condition) and "
            "log_prob(u, *, condition), each of one event.",
        )


class _Comparison(NamedTuple):
    """Flow and factor at one condition; the fields are those of `Distilled`."""

    log_density_gap: float
    mean_off: Float[np.ndarray, " entries"]
    spread: Float[np.ndarray, " entries"]


def _compare(
    flow: Flow, factor: Diffusion, x: Array, keys: tuple[Array, Array], draws: int
) -> _Comparison:
    """Compare draws of flow and factor given x; ``keys`` are of the two."""
    flow_key, factor_key = keys
    noise = factor.schedule.at(0)
    clean_key, noise_key = jax.random.split(flow_key)
    clean = _flow_draws(flow, clean_key, jnp.broadcast_to(x, (draws, *x.shape)))
    # The factor's samples carry the noise of level 0, so the flow's draws get it too.
    normal = jax.random.normal(noise_key, clean.shape)
    exact = clean + noise.sigma / noise.alpha * normal
    sampled = reverse_samples(factor.given(x=x), factor_key, draws) / noise.alpha

    log_q = jax.vmap(lambda u: flow.log_prob(u, condition=x))
    gap = jnp.mean(log_q(exact)) - jnp.mean(log_q(sampled))
    flat_exact = np.asarray(exact).reshape(draws, -1)
    flat_sampled = np.asarray(sampled).reshape(draws, -1)
    deviation = flat_exact.std(0)
    return _Comparison(
        log_density_gap=float(gap),
        mean_off=(flat_sampled.mean(0) - flat_exact.mean(0)) / deviation,
        spread=flat_sampled.std(0) / deviation,
    )


def _flow_draws(
    flow: Flow, key: Array, x: Float[Array, "n ..."]
) -> Float[Array, "n ..."]:
    """Draw u once for each of n conditions."""
    keys = jax.random.split(key, len(x))
    return jax.vmap(lambda key, x: flow.sample(key, condition=x))(keys, x)
