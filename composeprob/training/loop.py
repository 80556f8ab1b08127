"""`train` makes a factor with averaged weights from a recipe, by one compiled loop over
as many steps as asked.

Its losses are the denoising loss ‖ε + σ·∇log f(α·x₀ + σ·ε)‖², the same for every
parameterization; those that compare levels or conditions; and the cross-entropy of
classifiers.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob import tuning
from composeprob.arguments import check_key
from composeprob.checkpoint import CheckpointFolder
from composeprob.factors.classifier import Classifier
from composeprob.factors.diffusion import Diffusion
from composeprob.factors.networks import Network
from composeprob.json_data import JSONObject
from composeprob.runtime.progress import Progress
from composeprob.schedule import Noise
from composeprob.training.recipe import (
    CrossCondition,
    CrossLevel,
    Denoising,
    LogSNR,
    Recipe,
)


@dataclass(frozen=True)
class TrainingRun:
    """A `TrainingRun` holds the trained factor, and its loss step by step.

    Attributes:
        factor: the factor with the averaged (EMA) weights.
        loss: mean loss of every step done, shape (steps,).
        log_snr_edges: edges of bins of log-SNR, shape (bins + 1,).
        loss_by_log_snr: mean loss in each bin over the last tenth of the steps, or over
            as many as there are, shape (bins,); NaN in a bin that no event fell into.
        seconds: time spent, over every session of a resumed run.
        finished: False where Ctrl-C came first; a run with a checkpoint directory can
            then be resumed.
        written: the files of a model of the zoo that `train_model` wrote; empty from
            `train`.
        held_out: of `estimator`, the loss on pairs held out, before training and each
            256 steps; empty from `train`.
    """

    factor: Diffusion | Classifier
    loss: np.ndarray
    log_snr_edges: np.ndarray
    loss_by_log_snr: np.ndarray
    seconds: float
    finished: bool
    written: tuple[Path, ...] = ()
    held_out: np.ndarray = field(default_factory=lambda: np.zeros(0))


class Batch(NamedTuple):
    """Events with their noise, every leaf with a leading batch axis; None where no loss
    compares with it."""

    events: Array  # clean events x₀, (n, *event_shape)
    epsilon: Array  # standard normal
    noise: Noise
    other: (
        Noise | None
    )  # of another level, which the cross-level loss compares with the event's own
    conditions: dict[str, Array]  # {name: (n, …)}
    foreign: dict[str, Array] | None = (
        None  # of m other events, {name: (n, m, …)}, for the cross-condition loss
    )
    variant: dict[str, Array] | None = (
        None  # one more condition to compare with, {name: (n, 1, …)}
    )

    @property
    def noised(self) -> Array:
        """Of one event, α·x₀ + σ·ε."""
        return self.noise.alpha * self.events + self.noise.sigma * self.epsilon


class Losses(NamedTuple):
    """The losses of every event, each of shape (n,); zero where a recipe has no such
    loss."""

    denoising: Array
    cross_level: Array
    cross_condition: Array


def draw_batch(recipe: Recipe, key: Array, size: int) -> Batch:
    """Draws ``size`` events of a recipe: data, conditions (some dropped), log-SNR and
    noise."""
    data_key, noise_key, normal_key, drop_key = jax.random.split(key, 4)
    level, condition = recipe.loss(CrossLevel), recipe.loss(CrossCondition)
    n = size // 2 if recipe.batch.antithetic else size
    drawn: Any = recipe.data(data_key, n)
    events, conditions = drawn if isinstance(drawn, tuple) else (drawn, {})
    noise, other = (
        (recipe.noise(noise_key, n), None)
        if level is None
        else recipe.noise_pairs(noise_key, n, level.gap)
    )
    epsilon = jax.random.normal(normal_key, events.shape, events.dtype)
    if recipe.condition.dropout:
        absent: Any = recipe.condition.values
        drop = jax.random.bernoulli(drop_key, recipe.condition.dropout, (n,))
        replace = jax.vmap(jnp.where, in_axes=(0, None, 0))
        conditions = {
            name: replace(drop, jnp.asarray(absent[name]), value)
            for name, value in conditions.items()
        }
    if recipe.batch.antithetic:
        twice = (events, noise, other, dict(conditions))
        events, noise, other, conditions = jax.tree.map(
            lambda a: jnp.concatenate([a, a]), twice
        )
        epsilon = jnp.concatenate([epsilon, -epsilon])
    foreign = variant = None
    if (
        condition is not None
        # events are independent, so the next ones' conditions are as good as any others'
    ):
        others = range(1, condition.others + 1)
        foreign = jax.tree.map(
            lambda a: jnp.stack([jnp.roll(a, k, axis=0) for k in others], axis=1),
            conditions,
        )
        if condition.vary is not None:
            drawn = condition.vary(jax.random.fold_in(drop_key, 1), dict(conditions))
            variant = jax.tree.map(lambda a: a[:, None], drawn)
    return Batch(events, epsilon, noise, other, dict(conditions), foreign, variant)


def losses(
    factor: Diffusion | Classifier, batch: Batch, denoising: bool = True
) -> Losses:
    """Computes every event's losses; a classifier has its cross-entropy in the place of
    the first, and no other.

    Without ``denoising`` no score is asked for, and the first loss is zero. It is the
    mean over the event's elements, for a score-only form the error of ε̂; for the
    energy forms it matches ∇ₓE to ε, as both have −σ·∇log f in the place of ε̂. A model
    that predicts no noise at all has loss 1.

    The cross-level loss is −log sigmoid(log f(x, λ) − log f(x, λ′)), x being of level
    λ. Batches hold as many events of λ as of λ′, so that it is least where log f(x, λ)
    − log f(x, λ′) = log p_λ(x) − log p_λ′(x), constants included. A score fixes log f
    on each connected region only; this ties each to the same region at a noisier level,
    and so on to where all regions are one.

    The cross-condition loss is −log(f(x|c, λ)/Σ_j f(x|c_j, λ)), c_j being c and the
    conditions of m other events. It is least where log f(x|c) − log f(x|c′) = log
    p_λ(x|c) − log p_λ(x|c′), constants included; with dropout "no condition" is one of
    them. Its ``vary`` adds the same loss against a condition that is close to c; as
    close conditions lead to one another equally often, it is least at the same
    log-densities.
    """
    zero = jnp.zeros(())

    def event_losses(event: Batch) -> Losses:
        x = event.noised
        at = lambda given: factor.evaluate(x, event.noise, given)  # noqa: E731
        rivals = [
            conditions
            for conditions in (event.foreign, event.variant)
            if conditions is not None
        ]
        if denoising or not rivals:
            log_density, score = at(event.conditions)
            if isinstance(factor, Classifier):
                assert log_density is not None
                return Losses(-log_density, zero, zero)
            error = (
                jnp.mean((event.epsilon + event.noise.sigma * score) ** 2)
                if denoising
                else zero
            )
            others = _log_densities(at, rivals)
        else:
            true = jax.tree.map(lambda a: a[None], event.conditions)
            (log_density,), *others = _log_densities(at, [true, *rivals])
            error = zero
        level = zero
        if event.other is not None:
            level = _contrast(
                log_density, factor.evaluate(x, event.other, event.conditions)[0]
            )
        condition = sum((_contrast(log_density, values) for values in others), zero)
        return Losses(error, level, condition)

    return jax.vmap(event_losses)(batch)


def _log_densities(
    at: Callable[..., tuple[Any, Array]], groups: Sequence[dict[str, Array]]
) -> list[Array]:
    """log f given each of a group's conditions, one array a group. All are asked for in
    one batch, so that what depends on x alone is computed once."""
    if not groups:
        return []
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *groups)
    ends = np.cumsum([len(jax.tree.leaves(group)[0]) for group in groups])
    return jnp.split(jax.vmap(lambda given: at(given)[0])(joined), ends[:-1])


def _contrast(true: Array | None, others: Array | None) -> Array:
    """−log(e^own/(e^own + Σ e^others)) of log-densities; a recipe with such a loss has
    an energy."""
    assert true is not None
    assert others is not None
    return jax.nn.logsumexp(jnp.append(others, true)) - true


class State(NamedTuple):
    """What the next step needs, and what all steps so far report: losses of steps yet
    to come are 0.

    Attributes:
        step: the number of steps done.
        parameters, average, optimiser: the weights, their moving average, and Optax's
            state.
        loss: mean loss of each step, (iterations,).
        bin_sum, bin_count: sums and counts of losses by bin of log-SNR, a row for each
            `TRAINING_STEPS` steps.
        seconds: time spent.
    """

    step: Array
    parameters: PyTree[Array]
    average: PyTree[Array]
    optimiser: PyTree[Array]
    loss: Array
    bin_sum: Array
    bin_count: Array
    seconds: Array | np.ndarray


Advance = Callable[[State, np.int32], State]
"""(state, n) → the state n steps later."""


def bin_edges(recipe: Recipe) -> np.ndarray:
    """Returns the edges of the bins of log-SNR, shape (bins + 1,)."""
    return np.linspace(*recipe.log_snr_range(), tuning.TRAINING_BINS + 1)


def initial(recipe: Recipe, network: Network) -> State:
    """Makes the state before the first step; the average starts at the initial
    weights."""
    parameters = eqx.filter(network, eqx.is_inexact_array)
    copy = jax.tree.map(jnp.copy, parameters)
    steps, shape = (
        recipe.iterations,
        (-(-recipe.iterations // tuning.TRAINING_STEPS), tuning.TRAINING_BINS),
    )
    history = jnp.zeros(steps), jnp.zeros(shape), jnp.zeros(shape, jnp.int32)
    return State(
        jnp.zeros((), jnp.int32),
        parameters,
        copy,
        recipe.optimiser().init(parameters),
        *history,
        np.zeros(()),
    )


def make_advance(recipe: Recipe, network: Network, key: Array) -> Advance:
    """Compiles ``advance(state, n)``, of n steps; n is traced, so one compilation
    serves all.

    The randomness of step i comes from ``fold_in(key, i)`` alone: how steps are divided
    among calls, or resumed, changes nothing.
    """
    factor = recipe.factor(network)
    static = eqx.filter(network, eqx.is_inexact_array, inverse=True)
    optimiser = recipe.optimiser()
    edges, bins = jnp.asarray(bin_edges(recipe)), tuning.TRAINING_BINS
    denoising, level, condition = (
        recipe.loss(Denoising),
        recipe.loss(CrossLevel),
        recipe.loss(CrossCondition),
    )

    def mean_loss(parameters: PyTree[Array], batch: Batch) -> tuple[Array, Array]:
        trained = eqx.tree_at(
            lambda f: f.network, factor, eqx.combine(parameters, static)
        )
        each = losses(trained, batch, denoising is not None)
        total = jnp.zeros(())
        if denoising is not None:
            weight = (
                1.0
                if denoising.weight is None
                else jax.vmap(denoising.weight)(batch.noise.log_snr)
            )
            total = weight * each.denoising
        pairs = (level, each.cross_level), (condition, each.cross_condition)
        crossed = sum(
            (loss.weight * values for loss, values in pairs if loss), jnp.zeros(())
        )
        return jnp.mean(
            total + crossed
        ), crossed if denoising is None else each.denoising

    def gradient(
        parameters: PyTree[Array], step_key: Array
    ) -> tuple[PyTree[Array], Array, Array]:
        """The mean gradient over the batch's chunks, and every event's loss and
        log-SNR."""
        size = recipe.batch.part
        parts = recipe.batch.size // size

        def accumulate(
            total: PyTree[Array], part: Array
        ) -> tuple[PyTree[Array], tuple[Array, Array]]:
            batch = draw_batch(recipe, jax.random.fold_in(step_key, part), size)
            grad, each = jax.grad(mean_loss, has_aux=True)(parameters, batch)
            return jax.tree.map(lambda t, g: t + g / parts, total, grad), (
                each,
                batch.noise.log_snr,
            )

        zero = jax.tree.map(jnp.zeros_like, parameters)
        grad, (each, log_snr) = jax.lax.scan(accumulate, zero, jnp.arange(parts))
        return grad, each.ravel(), log_snr.ravel()

    def step(_: Array, state: State) -> State:
        grad, each, log_snr = gradient(
            state.parameters, jax.random.fold_in(key, state.step)
        )
        updates, optimiser_state = optimiser.update(
            grad, state.optimiser, state.parameters
        )
        parameters = eqx.apply_updates(state.parameters, updates)
        average = jax.tree.map(
            lambda a, p: recipe.ema * a + (1 - recipe.ema) * p,
            state.average,
            parameters,
        )
        bin_of_each = jnp.clip(
            jnp.searchsorted(edges, log_snr, side="right") - 1, 0, bins - 1
        )
        place = state.step // tuning.TRAINING_STEPS, bin_of_each
        history = (
            state.loss.at[state.step].set(jnp.mean(each)),
            state.bin_sum.at[place].add(each),
        )
        counts = state.bin_count.at[place].add(1)
        return State(
            state.step + 1,
            parameters,
            average,
            optimiser_state,
            *history,
            counts,
            state.seconds,
        )

    return jax.jit(lambda state, steps: jax.lax.fori_loop(0, steps, step, state))


def train(
    recipe: Recipe,
    key: Array,
    *,
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    seconds_between_checkpoints: float = 60.0,
    label: str = "",
    start: Callable[[Network], Network] | None = None,
) -> TrainingRun:
    """Trains a diffusion factor, or a classifier of noised events.

    Minimises with Adam the mean over events, levels and ε ~ N(0, I) of ‖ε + σ·∇log
    f(α·x₀ + σ·ε)‖², or for a classifier of −log p(label | α·x₀ + σ·ε), and averages the
    weights. All steps share one compilation. The result depends on the recipe and the
    key alone: a run that was interrupted and resumed gives the same weights, bit for
    bit, as one that was not.

    Args:
        recipe: what to train.
        key: a typed random key, for the initial weights and everything drawn in
            training.
        checkpoint_dir: where to keep checkpoints (the last two); none are written by
            default.
        resume: go on from the last checkpoint there, if any; otherwise start again.
        progress: show a progress bar with the loss.
        seconds_between_checkpoints: how often to write one; the last state is always
            written.
        label: the factor's name.
        start: ``start(network)`` gives the weights to start from, for the untrained
            network as an Equinox module: a network trained before, or parts of it. By
            default the untrained network itself.

    Returns:
        A `TrainingRun`. Ctrl-C ends training after the current second's steps, writes a
            checkpoint and returns.

    Raises:
        LoadError: the checkpoint belongs to another recipe or key.
        NetworkError: data or a network of another form; a network's output that does
            not fit the parameterization.
    """
    check_key(key)
    _ = recipe.event_shape  # refuses data of another form before anything is compiled
    network_key, run_key = jax.random.split(key)
    network = eqx.filter_jit(recipe.untrained)(
        network_key
    )  # one compilation instead of one for every layer
    network = network if start is None else start(network)
    advance = make_advance(recipe, network, run_key)
    first = initial(recipe, network)
    checkpoints = None
    if checkpoint_dir is not None:
        checkpoints = CheckpointFolder(
            checkpoint_dir, _fingerprint(recipe, network, key)
        )
        if not resume:
            checkpoints.clear()
        first = checkpoints.restore(first) or first

    now, saved = first, time.monotonic()
    for now in stretches(recipe, first, advance, progress):
        if (
            checkpoints is not None
            and time.monotonic() - saved > seconds_between_checkpoints
        ):
            checkpoints.save(int(now.step), now)
            saved = time.monotonic()
    if checkpoints is not None:
        checkpoints.save(int(now.step), now)
        checkpoints.close()
    return finish(recipe, network, now, label)


def stretches(
    recipe: Recipe,
    now: State,
    advance: Advance,
    progress: bool,
    steps: int | None = None,
) -> Iterator[State]:
    """Trains to the end, or to Ctrl-C, and yields what there is after each call of
    ``advance``: of so many steps, or else of about a second, so that the bar moves and
    Ctrl-C is heard."""
    before, began, pace = float(now.seconds), time.monotonic(), steps or 1
    with (
        _interruptible() as interrupted,
        Progress(recipe.iterations, progress, "training") as bar,
    ):
        while (done := int(now.step)) < recipe.iterations and not interrupted.is_set():
            count = min(pace, recipe.iterations - done, tuning.TRAINING_STEPS)
            tick = time.monotonic()
            now = jax.block_until_ready(advance(now, np.int32(count)))
            if steps is None:
                compiled = (
                    done == 0 and pace == 1
                )  # in the first call, which was mostly that
                pace = 2 if compiled else max(1, int(count / (time.monotonic() - tick)))
            now = now._replace(seconds=np.asarray(before + time.monotonic() - began))
            done += count
            bar.update(
                done, loss=np.asarray(now.loss)[max(0, done - 100) : done].mean()
            )
            yield now


def finish(recipe: Recipe, network: Network, now: State, label: str) -> TrainingRun:
    """Makes the factor of the averaged weights, and what is told of the run."""
    done = int(now.step)
    factor = recipe.factor(eqx.combine(now.average, network), label)
    since = int(0.9 * done) // tuning.TRAINING_STEPS
    total, count = (
        np.asarray(table)[since:].sum(0) for table in (now.bin_sum, now.bin_count)
    )
    by_bin = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    seconds, finished = float(now.seconds), done >= recipe.iterations
    return TrainingRun(
        factor,
        np.asarray(now.loss)[:done],
        bin_edges(recipe),
        by_bin,
        seconds,
        finished,
    )


def _fingerprint(recipe: Recipe, network: Network, key: Array) -> JSONObject:
    """What a checkpoint must have been made of to be continued; of data what some draws
    come to, to three digits."""
    made_of: JSONObject = {
        name: getattr(recipe, name)
        for name in ("parameterization", "time", "iterations", "ema")
    }
    made_of["log_snr"] = [float(end) for end in recipe.log_snr_range()]
    focus = recipe.log_snr.focus if isinstance(recipe.log_snr, LogSNR) else None
    made_of["focus"] = None if focus is None else [float(end) for end in focus]
    made_of["batches"] = [
        recipe.batch.size,
        recipe.batch.chunk,
        recipe.batch.antithetic,
    ]
    made_of["learning_rate"] = [
        recipe.rate(step) for step in (0, recipe.iterations // 2, recipe.iterations)
    ]
    made_of["dropout"] = recipe.condition.dropout
    made_of["schedule"] = [
        float(f"{x:.4g}") for x in np.asarray(recipe.schedule.log_snr)[[0, -1]]
    ]
    made_of["network"] = [
        list(x.shape)
        for x in jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    ]
    drawn = jax.tree.leaves(
        jax.jit(lambda key: recipe.data(key, 64))(jax.random.key(0))
    )
    made_of["data"] = [
        float(f"{stat(x):.3g}")
        for x in map(np.asarray, drawn)
        for stat in (np.mean, np.std)
    ]
    numbers = lambda loss: [
        value for value in vars(loss).values() if isinstance(value, int | float)
    ]  # noqa: E731
    made_of["losses"] = {type(loss).__name__: numbers(loss) for loss in recipe.losses}
    made_of["key"] = np.asarray(jax.random.key_data(key)).tolist()
    return made_of


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets instead of raising, so that no step is lost; a second
    Ctrl-C raises."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach the main thread only
        return

    def heard(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, heard)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
