"""Training loop of a recipe: one compiled loop over as many steps as asked for.

`train` returns the factor with averaged weights. Its losses are the denoising loss
‖ε + σ·∇log f(α·x₀ + σ·ε)‖², the same for every parameterization; losses that compare
levels or conditions; and the cross-entropy of classifiers.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, PyTree

from composeprob.arguments import check_key
from composeprob.checkpoint import CheckpointFolder
from composeprob.core import (
    Classifier,
    Diffusion,
    MaskedDiffusion,
    Network,
    Progress,
    no_random_numbers,
)
from composeprob.errors import InvalidValueError, NetworkError, WrongTypeError
from composeprob.json_data import JSON, JSONObject
from composeprob.schedule import Noise
from composeprob.training import tuning
from composeprob.training.masked import (
    MaskedBatch,
    MaskedRecipe,
    cross_entropies,
    draw_masked,
)
from composeprob.training.recipe import (
    CrossCondition,
    CrossLevel,
    Denoising,
    LogSNR,
    Loss,
    Recipe,
)

# Events that are looked at where weights are not finite: they decide the words of an
# error alone.
EXAMPLE_EVENTS = 10_000


@dataclass(frozen=True)
class TrainingRun:
    """A `TrainingRun` holds the trained factor and the loss of each step.

    Attributes:
        factor: the factor with the averaged (EMA) weights.
        loss: mean loss of each finished step, shape (steps,).
        log_snr_edges: edges of bins of log-SNR, shape (bins + 1,); of a `MaskedRecipe`,
            of the share of visible tokens.
        loss_by_log_snr: mean loss in each bin over about the last tenth of the steps,
            shape (bins,); NaN in a bin without events.
        seconds: time spent, over every session of a resumed run.
        finished: False after Ctrl-C; a run with a checkpoint directory can then be
            resumed.
        written: files of a zoo model that `train_model` wrote; empty from `train`.
        held_out: loss on the pairs that `estimator` holds out, before training and
            after every 256 steps; empty from `train`.
    """

    factor: Diffusion | Classifier | MaskedDiffusion
    loss: Float[np.ndarray, " steps"]
    log_snr_edges: Float[np.ndarray, " edges"]
    loss_by_log_snr: Float[np.ndarray, " bins"]
    seconds: float
    finished: bool
    written: tuple[Path, ...] = ()
    held_out: np.ndarray = field(default_factory=lambda: np.zeros(0))


class Batch(NamedTuple):
    """Events with their noise; every leaf has a leading batch axis.

    Attributes:
        events: clean events x₀, (n, *event_shape).
        epsilon: standard normal draws, like ``events``.
        noise: the noise of each event.
        other: another noise for each event, which the cross-level loss compares with
            the event's own; None without this loss.
        conditions: ``{name: (n, …)}``.
        foreign: conditions of m other events, ``{name: (n, m, …)}``, for the
            cross-condition loss; None without this loss.
        variant: one more condition to compare with, ``{name: (n, 1, …)}``, or None.
    """

    events: Float[Array, "n ..."]
    epsilon: Float[Array, "n ..."]
    noise: Noise
    other: Noise | None
    conditions: dict[str, Array]
    foreign: dict[str, Array] | None = None
    variant: dict[str, Array] | None = None

    @property
    def noised(self) -> Float[Array, " ..."]:
        """Noised event α·x₀ + σ·ε, for a batch that holds a single event."""
        return self.noise.alpha * self.events + self.noise.sigma * self.epsilon


class Losses(NamedTuple):
    """Losses of every event, each of shape (n,); zero where a recipe lacks the loss."""

    denoising: Float[Array, " n"]
    cross_level: Float[Array, " n"]
    cross_condition: Float[Array, " n"]


def draw_batch(recipe: Recipe, key: Array, size: int) -> Batch:
    """Draw ``size`` events of a recipe with their conditions, log-SNR and noise.

    Conditions are replaced by "no condition" at the recipe's rate of dropout.
    """
    data_key, noise_key, normal_key, drop_key = jax.random.split(key, 4)
    # Antithetic events share all but the sign of ε: half of them are drawn.
    antithetic = recipe.batch.antithetic
    n = size // 2 if antithetic else size

    events, conditions = _draw_data(recipe, data_key, n)
    cross_level = recipe.loss(CrossLevel)
    other: Noise | None = None
    if cross_level is None:
        noise = recipe.noise(noise_key, n)
    else:
        noise, other = recipe.noise_pairs(noise_key, n, cross_level.gap)
    epsilon = jax.random.normal(normal_key, events.shape, events.dtype)
    if recipe.condition.dropout:
        conditions = _with_dropout(recipe, conditions, drop_key, n)

    if antithetic:
        halves = (events, noise, other, dict(conditions))
        events, noise, other, conditions = jax.tree.map(_twice, halves)
        epsilon = jnp.concatenate([epsilon, -epsilon])

    batch = Batch(events, epsilon, noise, other, dict(conditions))
    cross_condition = recipe.loss(CrossCondition)
    if cross_condition is None:
        return batch
    # drop_key is used up by dropout; a fold gives a stream of its own.
    vary_key = jax.random.fold_in(drop_key, 1)
    return _with_rivals(batch, cross_condition, vary_key)


def _draw_data(
    recipe: Recipe, key: Array, n: int
) -> tuple[Float[Array, "n ..."], dict[str, Array]]:
    """Draw n events and their conditions, which are empty where data have none."""
    with no_random_numbers(
        "The data function of a training recipe",
        InvalidValueError,
        "draw by the key, jax.random.normal(key, (n, 2)); of a set of events take "
        "events[jax.random.randint(key, (n,), 0, len(events))].",
    ):
        events: Any = recipe.data(key, n)
    conditions: Any = {}
    if isinstance(events, tuple):
        events, conditions = events
    if not isinstance(conditions, Mapping):
        raise WrongTypeError(
            "The data of a training recipe returned a pair whose second part is no "
            "mapping of conditions by name.",
            fix="return events alone, or (events, {'label': labels}).",
        )
    events = jnp.asarray(events)
    if not jnp.issubdtype(events.dtype, jnp.floating):
        raise WrongTypeError(
            f"The data of a training recipe are {events.dtype} numbers, which have no "
            "noise.",
            fix="return real numbers of about unit size: images / 127.5 - 1 of bytes.",
        )
    return events, dict(conditions)


def _with_dropout(
    recipe: Recipe, conditions: dict[str, Array], key: Array, n: int
) -> dict[str, Array]:
    """Return conditions in which some events have all of theirs replaced."""
    absent: Any = recipe.condition.values
    # One decision an event, not one a condition: guidance needs the network without
    # any condition.
    drop = jax.random.bernoulli(key, recipe.condition.dropout, (n,))
    replace = jax.vmap(jnp.where, in_axes=(0, None, 0))
    return {
        name: replace(drop, jnp.asarray(absent[name]), value)
        for name, value in conditions.items()
    }


def _twice(values: Array) -> Array:
    return jnp.concatenate([values, values])


def _with_rivals(batch: Batch, loss: CrossCondition, vary_key: Array) -> Batch:
    """Return the batch with the other conditions that each event's own condition is
    compared with."""
    # Events are independent, so the conditions of the next ones serve as well as those
    # of any others.
    shifts = range(1, loss.others + 1)

    def conditions_of_the_next(values: Array) -> Array:
        return jnp.stack([jnp.roll(values, k, axis=0) for k in shifts], axis=1)

    foreign = jax.tree.map(conditions_of_the_next, batch.conditions)
    if loss.vary is None:
        return batch._replace(foreign=foreign)
    varied = loss.vary(vary_key, dict(batch.conditions))
    variant = jax.tree.map(lambda values: values[:, None], varied)
    return batch._replace(foreign=foreign, variant=variant)


def losses(
    factor: Diffusion | Classifier, batch: Batch, denoising: bool = True
) -> Losses:
    """Compute every event's losses.

    A classifier has its cross-entropy in the place of the denoising loss, and no other
    loss. Without ``denoising`` no score is computed, and the first loss is zero.

    The denoising loss is the mean of (ε + σ·∇log f)² over the event's elements: for a
    score-only form the error of ε̂, for the energy forms that of ∇ₓE, as both have
    −σ·∇log f in the place of ε̂. A model that predicts zero noise has loss 1.

    The cross-level loss is −log sigmoid(log f(x, λ) − log f(x, λ′)), x being of level
    λ. Batches hold as many events of λ as of λ′, so that it is least where log f(x, λ)
    − log f(x, λ′) = log p_λ(x) − log p_λ′(x), constants included. A score fixes log f
    on each connected region only; this ties each to the same region at a noisier level,
    and so on up to a level where all regions are one.

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

        def evaluate(conditions: dict[str, Array]) -> tuple[Array | None, Array]:
            return factor.evaluate(x, event.noise, conditions)

        rival_groups = (event.foreign, event.variant)
        rivals = [group for group in rival_groups if group is not None]
        error = zero
        if denoising or not rivals:
            log_density, score = evaluate(event.conditions)
            if isinstance(factor, Classifier):
                assert log_density is not None
                return Losses(-log_density, zero, zero)
            if denoising:
                error = jnp.mean((event.epsilon + event.noise.sigma * score) ** 2)
            rival_densities = _log_densities(evaluate, rivals)
        else:
            # No score is needed, so log f(x|c) joins the one batch of its rivals.
            true = jax.tree.map(lambda value: value[None], event.conditions)
            groups = [true, *rivals]
            (log_density,), *rival_densities = _log_densities(evaluate, groups)

        level = zero
        if event.other is not None:
            elsewhere, _ = factor.evaluate(x, event.other, event.conditions)
            level = _contrast(log_density, elsewhere)
        condition = zero
        for values in rival_densities:
            condition = condition + _contrast(log_density, values)
        return Losses(error, level, condition)

    return jax.vmap(event_losses)(batch)


def _log_densities(
    evaluate: Callable[[dict[str, Array]], tuple[Array | None, Array]],
    groups: Sequence[dict[str, Array]],
) -> list[Float[Array, " conditions"]]:
    """Return log f given each condition of each group, one array a group.

    All are evaluated in one batch, so that terms of x alone are computed once.
    """
    if not groups:
        return []
    # Groups have different lengths: split again at the ends of each.
    joined = jax.tree.map(lambda *groups: jnp.concatenate(groups), *groups)
    ends = np.cumsum([len(jax.tree.leaves(group)[0]) for group in groups])

    def log_density(conditions: dict[str, Array]) -> Array:
        log_f, _ = evaluate(conditions)
        # Recipes with such a loss are refused unless their factor has an energy.
        assert log_f is not None
        return log_f

    return jnp.split(jax.vmap(log_density)(joined), ends[:-1])


def _contrast(true: Array | None, others: Array | None) -> Float[Array, ""]:
    """Return −log(eᵗ/(eᵗ + Σⱼ e^oⱼ)) for the true log-density t and others oⱼ."""
    assert true is not None
    assert others is not None
    return jax.nn.logsumexp(jnp.append(others, true)) - true


class State(NamedTuple):
    """State of training: all that the next step needs, and the record of past ones.

    Attributes:
        step: number of finished steps.
        parameters, average, optimiser: the weights, their moving average, and Optax's
            state.
        loss: mean loss of each step, (iterations,); 0 for steps yet to come.
        bin_sum, bin_count: sums and counts of losses by bin of log-SNR, a row for each
            `TRAINING_STEPS` steps.
        seconds: time spent.
    """

    step: Int[Array, ""]
    parameters: PyTree[Array]
    average: PyTree[Array]
    optimiser: PyTree[Array]
    loss: Float[Array, " iterations"]
    bin_sum: Float[Array, "rows bins"]
    bin_count: Int[Array, "rows bins"]
    seconds: Array | np.ndarray


Advance = Callable[[State, np.int32], State]
"""(state, n) → the state n steps later."""


@dataclass(frozen=True)
class Task:
    """A recipe as the loop sees it.

    Attributes:
        draw: ``draw(key, n)`` gives a batch of n events.
        losses: ``losses(factor, batch)`` gives the objective, and every event's loss as
            it is reported, (n,).
        coordinate: ``coordinate(batch)`` says in which bin each event's loss counts.
        ends: the ends of the bins.
    """

    draw: Callable[[Array, int], PyTree[Array]]
    losses: Callable[[PyTree[Array], PyTree[Array]], tuple[Array, Array]]
    coordinate: Callable[[PyTree[Array]], Array]
    ends: tuple[float, float]


def task_of(recipe: Recipe | MaskedRecipe) -> Task:
    """Return the task of a recipe: the denoising of noised events, or the prediction of
    hidden tokens."""
    if isinstance(recipe, MaskedRecipe):

        def mean_and_each(
            factor: MaskedDiffusion, batch: MaskedBatch
        ) -> tuple[Array, Array]:
            each = cross_entropies(factor, batch)
            return jnp.mean(each), each

        return Task(
            partial(draw_masked, recipe),
            mean_and_each,
            lambda batch: batch.share,
            (0.0, 1.0),
        )
    return Task(
        partial(draw_batch, recipe),
        partial(_objective, recipe),
        lambda batch: batch.noise.log_snr,
        recipe.log_snr_range(),
    )


def bin_edges(recipe: Recipe | MaskedRecipe) -> Float[np.ndarray, " edges"]:
    """Return the edges of the bins of losses, shape (bins + 1,)."""
    return np.linspace(*task_of(recipe).ends, tuning.TRAINING_BINS + 1)


def initial(recipe: Recipe | MaskedRecipe, network: Network) -> State:
    """Return the state before the first step.

    The moving average starts at the initial weights.
    """
    parameters = eqx.filter(network, eqx.is_inexact_array)
    steps = recipe.iterations
    rows = math.ceil(steps / tuning.TRAINING_STEPS)
    shape = (rows, tuning.TRAINING_BINS)
    return State(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        average=jax.tree.map(jnp.copy, parameters),
        optimiser=recipe.optimiser().init(parameters),
        loss=jnp.zeros(steps),
        bin_sum=jnp.zeros(shape),
        bin_count=jnp.zeros(shape, jnp.int32),
        seconds=np.zeros(()),
    )


def make_advance(
    recipe: Recipe | MaskedRecipe, network: Network, key: Array
) -> Advance:
    """Compile ``advance(state, n)``, of n steps; n is traced: one compilation for all.

    The randomness of step i comes from ``fold_in(key, i)`` alone, so the result does
    not depend on how steps are divided among calls and sessions.
    """
    factor: PyTree[Array] = recipe.factor(network)
    task = task_of(recipe)
    # The complement of the trained weights: functions, integers and other constants.
    static = eqx.filter(network, eqx.is_inexact_array, inverse=True)
    optimiser = recipe.optimiser()
    edges = jnp.asarray(bin_edges(recipe))

    def mean_loss(
        parameters: PyTree[Array], batch: PyTree[Array]
    ) -> tuple[Array, Array]:
        """The objective, and every event's loss as it is reported."""
        trained_network = eqx.combine(parameters, static)
        trained = eqx.tree_at(lambda f: f.network, factor, trained_network)
        return task.losses(trained, batch)

    def gradient(
        parameters: PyTree[Array], step_key: Array
    ) -> tuple[PyTree[Array], Array, Array]:
        """The mean gradient over the batch's chunks; losses of events and their
        places."""
        size = recipe.batch.part
        chunks = recipe.batch.size // size

        def accumulate(
            total: PyTree[Array], chunk: Array
        ) -> tuple[PyTree[Array], tuple[Array, Array]]:
            batch = task.draw(jax.random.fold_in(step_key, chunk), size)
            grad, each = jax.grad(mean_loss, has_aux=True)(parameters, batch)
            total = jax.tree.map(lambda t, g: t + g / chunks, total, grad)
            return total, (each, task.coordinate(batch))

        zero = jax.tree.map(jnp.zeros_like, parameters)
        grad, (each, place) = jax.lax.scan(accumulate, zero, jnp.arange(chunks))
        return grad, each.ravel(), place.ravel()

    def step(_: Array, state: State) -> State:
        step_key = jax.random.fold_in(key, state.step)
        # Gradients of the weights; ``each`` holds the loss of every event.
        grad, each, place = gradient(state.parameters, step_key)
        updates, optimiser_state = optimiser.update(
            grad, state.optimiser, state.parameters
        )
        parameters = eqx.apply_updates(state.parameters, updates)
        average = jax.tree.map(
            lambda a, p: recipe.ema * a + (1 - recipe.ema) * p,
            state.average,
            parameters,
        )
        # Loss by bin is kept for each TRAINING_STEPS steps, so that `finish` can report
        # the last tenth of a run that Ctrl-C ended anywhere.
        bins = jnp.searchsorted(edges, place, side="right") - 1
        bins = jnp.clip(bins, 0, tuning.TRAINING_BINS - 1)
        row = state.step // tuning.TRAINING_STEPS
        return State(
            step=state.step + 1,
            parameters=parameters,
            average=average,
            optimiser=optimiser_state,
            loss=state.loss.at[state.step].set(jnp.mean(each)),
            bin_sum=state.bin_sum.at[row, bins].add(each),
            bin_count=state.bin_count.at[row, bins].add(1),
            seconds=state.seconds,
        )

    return jax.jit(lambda state, steps: jax.lax.fori_loop(0, steps, step, state))


def _objective(
    recipe: Recipe, factor: Diffusion | Classifier, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    """Return the weighted mean of a batch's losses, and every event's reported loss.

    The reported loss is the unweighted denoising loss, or the sum of the others where
    a recipe has none.
    """
    denoising = recipe.loss(Denoising)
    cross_level = recipe.loss(CrossLevel)
    cross_condition = recipe.loss(CrossCondition)
    each = losses(factor, batch, denoising is not None)

    total = jnp.zeros(())
    if denoising is not None and denoising.weight is None:
        total = 1.0 * each.denoising
    elif denoising is not None and denoising.weight is not None:
        total = jax.vmap(denoising.weight)(batch.noise.log_snr) * each.denoising
    crossed = jnp.zeros(())
    if cross_level is not None:
        crossed = crossed + cross_level.weight * each.cross_level
    if cross_condition is not None:
        crossed = crossed + cross_condition.weight * each.cross_condition

    reported = crossed if denoising is None else each.denoising
    return jnp.mean(total + crossed), reported


def train(
    recipe: Recipe | MaskedRecipe,
    key: Array,
    *,
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    seconds_between_checkpoints: float = 60.0,
    label: str = "",
    start: Callable[[Network], Network] | None = None,
) -> TrainingRun:
    """Train a diffusion factor, a classifier of noised events, or a masked diffusion.

    Adam minimises the mean over events, levels and ε ~ N(0, I) of ‖ε + σ·∇log
    f(α·x₀ + σ·ε)‖², or for a classifier of −log p(label | α·x₀ + σ·ε), or for a
    `MaskedRecipe` the cross-entropy of hidden tokens; the factor gets a moving average
    of the weights. All steps share one compilation. The result depends
    on the recipe and the key alone: a run that was interrupted and resumed gives the
    same weights, bit for bit, as one that was not.

    Args:
        recipe: what to train.
        key: a typed random key, for the initial weights and all draws of training.
        checkpoint_dir: folder of the last two checkpoints; none are written by default.
        resume: go on from the last checkpoint there, if any; otherwise start again.
        progress: show a progress bar with the loss.
        seconds_between_checkpoints: time between two checkpoints; the last state is
            always written.
        label: the factor's name.
        start: ``start(network)`` gives the weights to start from, for the untrained
            network as an Equinox module: a network trained before, or parts of it. By
            default the untrained network itself.

    Returns:
        A `TrainingRun`. Ctrl-C ends training after the current second's steps, writes a
            checkpoint and returns.

    Raises:
        LoadError: the checkpoint belongs to another recipe or key.
        NetworkError: data or a network of another form, or without weights; a network's
            output that does not fit the parameterization.
        InvalidValueError: weights that are not finite any more; the last checkpoint has
            those from before.
    """
    check_key(key)
    # Data of another form are refused here, before anything is compiled.
    _ = recipe.event_shape
    network_key, run_key = jax.random.split(key)
    # Compiled as a whole: outside of jit every layer would be a compilation.
    network = eqx.filter_jit(recipe.untrained)(network_key)
    if start is not None:
        network = start(network)
    if not jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array)):
        raise NetworkError(
            f"The network of the recipe, {type(network).__name__}, has no weights to "
            "train.",
            fix="let network(key) return an Equinox module, or a Flax module with its "
            "variables.",
        )
    advance = make_advance(recipe, network, run_key)
    first = initial(recipe, network)
    checkpoints = None
    if checkpoint_dir is not None:
        fingerprint = _fingerprint(recipe, network, key)
        checkpoints = CheckpointFolder(
            checkpoint_dir, fingerprint, "cp.training.train(…, resume=False)"
        )
        if not resume:
            checkpoints.clear()
        first = checkpoints.restore(first) or first

    last = first
    saved_at = time.monotonic()
    for last in segments(recipe, first, advance, progress):
        check_weights(recipe, last)
        elapsed = time.monotonic() - saved_at
        if checkpoints is not None and elapsed > seconds_between_checkpoints:
            checkpoints.save(int(last.step), last)
            saved_at = time.monotonic()
    if checkpoints is not None:
        checkpoints.save(int(last.step), last)
        checkpoints.close()
    return finish(recipe, network, last, label)


def segments(
    recipe: Recipe | MaskedRecipe,
    state: State,
    advance: Advance,
    progress: bool,
    steps: int | None = None,
) -> Iterator[State]:
    """Train to the end, or to Ctrl-C, and yield the state after each segment.

    A segment is one call of ``advance``, of ``steps`` steps. By default it takes about
    a second, so that the progress bar moves and Ctrl-C takes effect.
    """
    seconds_before = float(state.seconds)
    began = time.monotonic()
    pace = steps or 1
    done = int(state.step)
    with (
        _interruptible() as interrupted,
        Progress(recipe.iterations, progress, "training") as bar,
    ):
        while done < recipe.iterations and not interrupted.is_set():
            # TRAINING_STEPS bounds the wait for Ctrl-C where a step gets slower.
            count = min(pace, recipe.iterations - done, tuning.TRAINING_STEPS)
            tick = time.monotonic()
            state = jax.block_until_ready(advance(state, np.int32(count)))
            if steps is None:
                # The first call is mostly compilation, so its time says nothing of the
                # pace.
                compiled = done == 0 and pace == 1
                elapsed = time.monotonic() - tick
                pace = 2 if compiled else max(1, int(count / elapsed))
            seconds = seconds_before + time.monotonic() - began
            state = state._replace(seconds=np.asarray(seconds))
            done += count
            recent = np.asarray(state.loss)[max(0, done - 100) : done]
            bar.update(done, loss=recent.mean())
            yield state


def check_weights(recipe: Recipe | MaskedRecipe, state: State) -> None:
    """Stop a training whose weights are not finite any more: they stay so.

    Raises:
        InvalidValueError: such weights; it says whether data are the cause. Checkpoints
            keep the state from before.
    """
    weights = [np.asarray(leaf) for leaf in jax.tree.leaves(state.parameters)]
    if all(np.isfinite(leaf).all() for leaf in weights):
        return
    done = int(state.step)
    finite = np.isfinite(np.asarray(state.loss)[:done])
    step = int(np.argmin(finite)) if not finite.all() else done - 1
    found = f"The weights of the network are not finite from step {step} of training on"
    drawn = jax.jit(lambda key: recipe.data(key, EXAMPLE_EVENTS))(jax.random.key(0))
    wrong = np.zeros(EXAMPLE_EVENTS, bool)
    for leaf in jax.tree.leaves(drawn):
        rows = np.asarray(leaf).reshape(EXAMPLE_EVENTS, -1)
        wrong |= ~np.isfinite(rows).all(axis=1)
    if wrong.any():
        raise InvalidValueError(
            f"{found}: {wrong.sum()} of {EXAMPLE_EVENTS:,} events of the data hold "
            "numbers that are not finite.",
            fix="leave such events out of the data.",
        )
    raise InvalidValueError(
        f"{found}, though the data are.",
        fix=f"train with a smaller learning_rate; there it is {recipe.rate(step):.3g}.",
    )


def finish(
    recipe: Recipe | MaskedRecipe, network: Network, state: State, label: str
) -> TrainingRun:
    """Return the factor of the averaged weights, with the record of the run."""
    done = int(state.step)
    last_tenth = int(0.9 * done) // tuning.TRAINING_STEPS
    total = np.asarray(state.bin_sum)[last_tenth:].sum(0)
    count = np.asarray(state.bin_count)[last_tenth:].sum(0)
    return TrainingRun(
        factor=recipe.factor(eqx.combine(state.average, network), label),
        loss=np.asarray(state.loss)[:done],
        log_snr_edges=bin_edges(recipe),
        loss_by_log_snr=np.where(count > 0, total / np.maximum(count, 1), np.nan),
        seconds=float(state.seconds),
        finished=done >= recipe.iterations,
    )


def _fingerprint(
    recipe: Recipe | MaskedRecipe, network: Network, key: Array
) -> JSONObject:
    """Return the values that a checkpoint must agree in to be resumed.

    Functions cannot be compared: data are represented by the mean and deviation of
    some draws, to three digits, and the learning rate by three of its values.
    """
    # Names and formats of the entries are those of checkpoints on disk: keep them.
    steps = (0, recipe.iterations // 2, recipe.iterations)
    weights = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    shared: JSONObject = {
        "iterations": recipe.iterations,
        "ema": recipe.ema,
        "batches": [recipe.batch.size, recipe.batch.chunk, recipe.batch.antithetic],
        "learning_rate": [recipe.rate(step) for step in steps],
        "network": [list(array.shape) for array in weights],
        "data": _data_statistics(recipe),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    if isinstance(recipe, MaskedRecipe):
        return shared | {"masked": [recipe.length, recipe.num_values]}
    focus = recipe.log_snr.focus if isinstance(recipe.log_snr, LogSNR) else None
    ends = np.asarray(recipe.schedule.log_snr)[[0, -1]]
    return shared | {
        "parameterization": recipe.parameterization,
        "time": recipe.time,
        "log_snr": [float(end) for end in recipe.log_snr_range()],
        "focus": None if focus is None else [float(end) for end in focus],
        "dropout": recipe.condition.dropout,
        "schedule": [float(f"{log_snr:.4g}") for log_snr in ends],
        "losses": {type(loss).__name__: _numbers(loss) for loss in recipe.losses},
    }


def _data_statistics(recipe: Recipe | MaskedRecipe) -> list[JSON]:
    """Return mean and standard deviation of 64 draws of each array of the data."""
    drawn = jax.jit(lambda key: recipe.data(key, 64))(jax.random.key(0))
    statistics: list[JSON] = []
    for leaf in jax.tree.leaves(drawn):
        values = np.asarray(leaf)
        statistics.append(float(f"{np.mean(values):.3g}"))
        statistics.append(float(f"{np.std(values):.3g}"))
    return statistics


def _numbers(loss: Loss) -> list[JSON]:
    """Return the settings of a loss that are numbers."""
    return [value for value in vars(loss).values() if isinstance(value, int | float)]


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Event that Ctrl-C sets instead of raising, so that no step is lost.

    A second Ctrl-C raises.
    """
    event = threading.Event()
    # Only the main thread receives signals, and only it may install a handler.
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
