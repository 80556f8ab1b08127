"""Recipes of training: network, sampler of data, noise levels, losses and optimiser."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from composeprob.arguments import check_count
from composeprob.core import (
    ENERGIES,
    Classifier,
    Diffusion,
    Encoder,
    Network,
    Schedule,
    as_network,
)
from composeprob.errors import ConditionError, InvalidValueError, NetworkError
from composeprob.extras import needed
from composeprob.schedule import Noise
from composeprob.user_code import called

if TYPE_CHECKING:
    import optax

Data = Callable[[Array, int], Array | tuple[Array, Mapping[str, Array]]]
"""``data(key, n)`` gives n events (n, *event_shape), or a pair (events, {condition:
values (n, …)})."""

EXAMPLES = 22
"""Number of events by which the form of data is checked: few events have a size of 22
themselves, so that events along another axis than the first are found."""


def example_data(data: Callable[[Array, int], object], fix: str) -> PyTree:
    """Return what ``data(key, EXAMPLES)`` gives, without numbers; refuse data that
    cannot be called so."""

    def draw() -> object:
        return jax.eval_shape(lambda key: data(key, EXAMPLES), jax.random.key(0))

    return called("The data of a training recipe", "data(key, n)", draw, fix)


def check_conditions(
    made: PyTree, names: Collection[str], has_fixed_names: bool = False
) -> None:
    """Refuse data whose conditions are not those of their recipe.

    Args:
        made: what data return.
        names: of the recipe's conditions.
        has_fixed_names: the user cannot choose the names: those of a classifier.
    """
    conditions: object = {}
    if isinstance(made, tuple):
        conditions = made[-1]
    if not isinstance(conditions, Mapping):
        return  # which is refused where data are drawn
    for name in names:
        if name not in conditions:
            fix = f"return pairs from data: (events, {{{name!r}: values}})"
            if not has_fixed_names:
                fix += f"; or leave {name!r} out of conditions="
            raise ConditionError(
                f"The recipe has the condition {name!r}, and its data do not return "
                "it: the factor would take a condition that it was not trained with.",
                fix=f"{fix}.",
            )
    for name in conditions:
        if name not in names:
            fix = f"leave {name!r} out of what data return"
            if not has_fixed_names:
                declared = (*names, name)
                fix = f"name it, conditions={declared!r}; or {fix}"
            raise ConditionError(
                f"The data of a training recipe return {name!r}, which is not a "
                "condition of the recipe.",
                fix=f"{fix}.",
            )


def _require(holds: bool, found: str, fix: str) -> None:
    """Refuse a recipe unless a condition holds."""
    if not holds:
        raise InvalidValueError(f"In a training recipe, {found}.", fix=fix)


@dataclass(frozen=True)
class LogSNR:
    """`LogSNR` is a range of log-SNR to train on.

    Args:
        low, high: the ends of the range.
        focus: a range within the first. Half of the events are drawn there, the others
            uniformly over the whole range. Choose the range in which the distribution
            takes shape, as most is to be learned there.

    Raises:
        InvalidValueError: an empty range, or a focus outside of it.
    """

    low: float
    high: float
    focus: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _require(
            self.low < self.high,
            f"log_snr is {(self.low, self.high)}",
            "give (min, max) with min < max.",
        )
        first, last = self.focus or (self.low, self.high)
        _require(
            self.low <= first < last <= self.high,
            f"focus is {self.focus}",
            f"give a range within {(self.low, self.high)}.",
        )


@dataclass(frozen=True)
class Batches:
    """`Batches` sets the number of events of a training step.

    Args:
        size: events of each optimiser step.
        chunk: events evaluated at once; a batch's gradient is the average over its
            chunks. Smaller chunks bound memory, and on CPUs keep activations in cache.
            By default the whole batch.
        antithetic: draw noises in pairs ±ε on the same event. At high log-SNR most of
            the gradient's variance is linear in ε, and cancels.

    Raises:
        InvalidValueError: numbers below 1, a chunk that does not divide the batch, or
            antithetic pairs in a batch or chunk of odd size.
    """

    size: int = 1000
    chunk: int | None = None
    antithetic: bool = False

    def __post_init__(self) -> None:
        check_count(self.size, "In a training recipe, the size of a batch")
        _require(
            self.part >= 1 and self.size % self.part == 0,
            f"chunk {self.part} does not divide a batch of {self.size}",
            "use a divisor of it.",
        )
        _require(
            not (self.antithetic and self.part % 2),
            f"a batch of {self.part} is odd, but antithetic noises come in pairs",
            "use an even size and chunk.",
        )

    @property
    def part(self) -> int:
        """Events evaluated at once."""
        return self.size if self.chunk is None else self.chunk


@dataclass(frozen=True)
class Conditions:
    """`Conditions` of events, with their dropout for classifier-free guidance.

    Args:
        values: ``{name: value that means "no condition"}``, or names alone.
        dropout: probability that an event's conditions are all replaced by those
            values.
        encoders: as in `Diffusion`; the conditions of the data are encoded already.

    Raises:
        InvalidValueError: a dropout outside of [0, 1), or dropout without values to put
            in place.
    """

    values: tuple[str, ...] | Mapping[str, object] = ()
    dropout: float = 0.0
    encoders: Mapping[str, Encoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.values, str):
            object.__setattr__(self, "values", (self.values,))
        _require(
            0 <= self.dropout < 1,
            f"the conditions' dropout is {self.dropout}",
            "use a probability.",
        )
        has_values = isinstance(self.values, Mapping) and bool(self.values)
        _require(
            not self.dropout or has_values,
            "dropout has no value to put in place",
            "give conditions as {name: value that means no condition}.",
        )


@dataclass(frozen=True)
class Denoising:
    """`Denoising` is the loss E‖ε + σ·∇log f(α·x₀ + σ·ε)‖²/d.

    For a classifier it is the cross-entropy.

    Args:
        weight: ``weight(log_snr)`` multiplies an event's loss; by default 1, which is
            DDPM's simple loss.
    """

    weight: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class CrossLevel:
    """`CrossLevel` is the loss of classifying an event's level, for energies.

    It teaches log f the relative depth of separated modes, and the normaliser of each
    level up to one constant; the factor then offers ``mode_depth``. The network needs a
    free constant at each level.

    Args:
        weight: factor of this loss in the sum of losses.
        gap: greatest distance of the two levels that are compared, in log-SNR.

    References:
        Binary classification between levels, whose optimum is the log-ratio of their
        densities (Gutmann & Hyvärinen 2012, *Noise-contrastive estimation*; Rhodes et
        al. 2020, *Telescoping density-ratio estimation*).
    """

    weight: float = 1.0
    gap: float = 4.0

    def __post_init__(self) -> None:
        _require(
            self.weight > 0,
            f"CrossLevel's weight is {self.weight}",
            "use a positive number, or leave it out.",
        )


@dataclass(frozen=True)
class CrossCondition:
    """`CrossCondition` is the loss of classifying an event's condition, for energies.

    It teaches the dependence of vague conditions (captions) on an event, to which the
    denoising loss is almost blind, and the difference of log f(x|c) and log f(x|c′): a
    mixture of conditions of one model then has the shares that its ``log_weights``
    give.

    Args:
        weight: factor of this loss in the sum of losses.
        others: number of other events of the chunk whose conditions an event's own is
            compared with.
        vary: ``vary(key, conditions)`` draws, for each of n conditions ``{name: (n,
            …)}``, a similar one to compare with as well. It must be symmetric under the
            data: p(c)·p(c′ | c) = p(c′)·p(c | c′). Replacing a word by another at
            random is, for example, where both are equally frequent in the data.

    References:
        van den Oord et al. 2018, *Contrastive predictive coding*.
    """

    weight: float = 1.0
    others: int = 1
    vary: Callable[[Array, dict[str, Array]], dict[str, Array]] | None = None

    def __post_init__(self) -> None:
        _require(
            self.weight > 0,
            f"CrossCondition's weight is {self.weight}",
            "use a positive number, or leave it out.",
        )


Loss = Denoising | CrossLevel | CrossCondition
Kind = TypeVar("Kind", Denoising, CrossLevel, CrossCondition)


@dataclass(frozen=True, kw_only=True)
class Optimised:
    """`Optimised` has the settings that all recipes share: network and optimiser.

    Args:
        network: ``network(key)`` makes the untrained network.
        iterations: number of optimiser steps.
        batches: `Batches`, or the number of events of each step.
        learning_rate: Adam's step size; or a function of the number of steps that
            returns one of Optax's schedules, such as
            ``functools.partial(optax.cosine_decay_schedule, 1e-3)``.
        ema: decay m of the averaged weights, θ̄ ← m·θ̄ + (1−m)·θ after each step; the
            factor gets θ̄.
    """

    network: Callable[[Array], object]
    iterations: int = 15_000
    batches: Batches | int = Batches()
    learning_rate: float | Callable[[int], optax.Schedule] = 1e-3
    ema: float = 0.999

    def __post_init__(self) -> None:
        # The dataclass is frozen, for users; its fields are normalised once, here.
        if not isinstance(self.batches, Batches):
            object.__setattr__(self, "batches", Batches(self.batches))
        self._check_optimiser()

    def _check_optimiser(self) -> None:
        check_count(self.iterations, "In a training recipe, iterations")
        rate = self.learning_rate
        _require(
            callable(rate) or (np.ndim(rate) == 0 and rate > 0),
            f"learning_rate is {rate}",
            "use a positive number, such as 1e-3.",
        )
        _require(
            not callable(rate) or callable(rate(self.iterations)),
            "learning_rate is not a function from the number of iterations to a "
            "schedule",
            "write functools.partial(optax.cosine_decay_schedule, 1e-3).",
        )
        _require(
            0 <= self.ema < 1,
            f"ema is {self.ema}",
            "use a number in [0, 1); 0 keeps the last weights.",
        )

    @property
    def batch(self) -> Batches:
        """The batches, made of a number where the recipe has one."""
        assert isinstance(self.batches, Batches)
        return self.batches

    def rate(self, step: int) -> float:
        """Return the learning rate at a step."""
        rate = self.learning_rate
        if callable(rate):
            return float(rate(self.iterations)(step))
        return float(rate)

    def untrained(self, key: Array) -> Network:
        """Make the network before training, as an Equinox module."""
        fix = (
            "give a function of a random key that makes the untrained network: "
            "network=lambda key: MLP(…, key=key)."
        )
        subject = "The network of a training recipe"
        made = called(subject, "network(key)", lambda: self.network(key), fix)
        return as_network(made)

    def optimiser(self) -> optax.GradientTransformation:
        """Make the optimiser: Adam with the recipe's learning rate."""
        with needed("train", "Training"):
            import optax

        rate = self.learning_rate
        if callable(rate):
            return optax.adam(rate(self.iterations))
        return optax.adam(rate)


@dataclass(frozen=True, kw_only=True)
class Recipe(Optimised):
    """A `Recipe` determines a trained factor, up to the random key.

    Args:
        network: ``network(key)`` makes the untrained network, in any form that
            `Diffusion` takes.
        data: ``data(key, n)`` draws n events, shape (n, \\*event_shape); or a pair of
            events and a mapping of conditions, each with n values. It is traced by
            ``jax.jit``: index a set of images with random integers.
        schedule: the levels that the trained factor offers.
        log_snr: `LogSNR`, or a pair (min, max): the range to train on, at the
            schedule's relation of α and σ, which must be variance preserving or
            exploding; None trains on the schedule's levels alone.
        parameterization, time: as in `Diffusion`; or parameterization ``"classifier"``
            for a noise-conditioned `Classifier`, whose network returns logits and whose
            data come with the condition ``label``, a class's index for each event. Its
            loss is the cross-entropy −log p(label | x, λ).
        conditions: `Conditions`, or ``{name: value that means "no condition"}``, or
            names alone.
        losses: one or more of `Denoising`, `CrossLevel` and `CrossCondition`, each at
            most once.
        iterations: number of optimiser steps.
        batches: `Batches`, or the number of events of each step.
        learning_rate: Adam's step size; or a function of the number of steps that
            returns one of Optax's schedules, such as
            ``functools.partial(optax.cosine_decay_schedule, 1e-3)``.
        ema: decay m of the averaged weights, θ̄ ← m·θ̄ + (1−m)·θ after each step; the
            factor gets θ̄.

    Raises:
        InvalidValueError: a number out of range, or losses that such a factor cannot
            have.
    """

    data: Data
    schedule: Schedule
    log_snr: LogSNR | tuple[float, float] | None = None
    parameterization: str = "epsilon"
    time: str = "log_snr"
    conditions: Conditions | tuple[str, ...] | Mapping[str, object] = Conditions()
    losses: tuple[Loss, ...] = (Denoising(),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.conditions, Conditions):
            object.__setattr__(self, "conditions", Conditions(self.conditions))
        if isinstance(self.log_snr, tuple):
            object.__setattr__(self, "log_snr", LogSNR(*self.log_snr))
        self._check_losses()
        self._check_cross_level()
        self._check_cross_condition()
        if self.log_snr is not None:
            _require(
                self.time not in ("level", "real_level"),
                f"log_snr is a range, but time={self.time!r} is defined at the "
                "schedule's levels only",
                "leave log_snr out, or use time='log_snr'.",
            )
            # Refuses a schedule whose α and σ are not a function of log-SNR. The shapes
            # alone compile nothing.
            jax.eval_shape(self.noise_at, np.float32(self.log_snr_range()[0]))
            self._check_range()

    def _check_range(self) -> None:
        """Refuse levels that training does not visit, which the factor would offer."""
        low, high = self.log_snr_range()
        log_snr = self.schedule.log_snr
        lowest = float(log_snr[-1])
        highest = float(log_snr[0])
        # A schedule's ends are rounded to single precision.
        _require(
            low <= lowest + 1e-3 and highest - 1e-3 <= high,
            f"the schedule's log-SNR is {lowest:.5g} to {highest:.5g}, of which "
            f"log_snr={low:.5g} to {high:.5g} does not hold all",
            f"widen it, log_snr=({min(low, lowest):.5g}, {max(high, highest):.5g}), or "
            "use a schedule that ends within it.",
        )

    def _check_losses(self) -> None:
        _require(
            isinstance(self.losses, tuple),
            f"losses is no tuple: {self.losses}",
            "write losses=(cp.training.Denoising(),), with a comma.",
        )
        kinds = [type(loss) for loss in self.losses]
        are_losses = all(isinstance(loss, Loss) for loss in self.losses)
        _require(
            are_losses and len(set(kinds)) == len(kinds) > 0,
            f"losses is {self.losses}",
            "give cp.training.Denoising(), CrossLevel() or CrossCondition(), each at "
            "most once.",
        )
        _require(
            self.parameterization != "classifier" or not self.condition.values,
            "a classifier has conditions",
            "leave conditions out: its one condition is the label.",
        )
        for kind in kinds:
            name = kind.__name__
            _require(
                kind is Denoising or self.parameterization in ENERGIES,
                f"{name} compares energies, and "
                f"parameterization={self.parameterization!r} has none",
                f"use one of {', '.join(ENERGIES)}, or leave {name} out.",
            )

    def _check_cross_level(self) -> None:
        loss = self.loss(CrossLevel)
        if loss is None:
            return
        low, high = self.log_snr_range()
        _require(
            0 < loss.gap <= high - low,
            f"CrossLevel's gap is {loss.gap}",
            f"use a positive number, at most the range of log-SNR, {high - low:.3g}.",
        )
        # Events pair up in levels, and antithetic events share their level.
        multiple = 4 if self.batch.antithetic else 2
        _require(
            self.batch.part % multiple == 0,
            f"a batch of {self.batch.part} does not split into pairs of levels",
            f"use a size and chunk of Batches that are multiples of {multiple}.",
        )

    def _check_cross_condition(self) -> None:
        loss = self.loss(CrossCondition)
        if loss is None:
            return
        _require(
            bool(self.condition.values),
            "CrossCondition is given without conditions",
            "name the data's conditions.",
        )
        _require(
            1 <= loss.others < self.batch.part,
            f"a batch of {self.batch.part} has no {loss.others} other conditions to "
            "compare",
            "use a larger chunk, or a smaller number of others ≥ 1.",
        )

    @property
    def condition(self) -> Conditions:
        """The conditions, made of names or values where the recipe has those."""
        assert isinstance(self.conditions, Conditions)
        return self.conditions

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event of the data.

        Raises:
            NetworkError: data that are not a function of a key and a number, or return
                another number of events.
            ConditionError: data with other conditions than the recipe's.
        """
        fix = (
            "write a function: data=lambda key, n: "
            "images[jax.random.randint(key, (n,), 0, len(images))]."
        )

        made = example_data(self.data, fix)
        # Events come first, also of a pair with conditions.
        shapes = [tuple(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(made)]
        if not shapes or any(shape[:1] != (EXAMPLES,) for shape in shapes):
            found = ", ".join(map(str, shapes)) or "nothing"
            if shapes and shapes[0][-1:] == (EXAMPLES,):
                fix = "return one event a row: the number of events is the first axis."
            raise NetworkError(
                f"The data of a training recipe returned {found} as data(key, "
                f"{EXAMPLES}).",
                fix=fix,
            )
        if self.parameterization == "classifier":
            check_conditions(made, ("label",), has_fixed_names=True)
        else:
            check_conditions(made, tuple(self.condition.values))
        return shapes[0][1:]

    def loss(self, kind: type[Kind]) -> Kind | None:
        """Return the loss of a kind; None where the recipe has none."""
        return next((loss for loss in self.losses if isinstance(loss, kind)), None)

    def factor(self, network: object, label: str = "") -> Diffusion | Classifier:
        """Make the factor of this recipe with a given network."""
        if self.parameterization == "classifier":
            return Classifier(
                network,
                self.schedule,
                event_shape=self.event_shape,
                time=self.time,
                label=label,
            )
        # Outside of the range that training visits the network has learned nothing.
        trained_range = None
        if self.time != "level" and self.log_snr is not None:
            trained_range = self.log_snr_range()
        return Diffusion(
            network,
            self.schedule,
            event_shape=self.event_shape,
            parameterization=self.parameterization,
            time=self.time,
            conditions=self.condition.values,
            encoders=self.condition.encoders,
            log_snr_range=trained_range,
            mode_depth=self.loss(CrossLevel) is not None,
            label=label,
        )

    def log_snr_range(self) -> tuple[float, float]:
        """Return the least and greatest log-SNR that training visits."""
        if isinstance(self.log_snr, LogSNR):
            return self.log_snr.low, self.log_snr.high
        levels = self.schedule.log_snr
        return float(levels[-1]), float(levels[0])

    def noise(self, key: Array, n: int) -> Noise:
        """Draw the noise of n events, stratified in log-SNR.

        Event i has its log-SNR in the i-th of n equal parts of the range; without a
        range levels are drawn uniformly.
        """
        if not isinstance(self.log_snr, LogSNR):
            index = jax.random.randint(key, (n,), 0, self.schedule.num_levels)
            return jax.tree.map(lambda a: a[index], self.schedule.levels)
        low, high = self.log_snr_range()
        # One number in each n-th of [0, 1): strata reduce the gradient's variance.
        uniform = (jnp.arange(n) + jax.random.uniform(key, (n,))) / n
        if self.log_snr.focus is None:
            return self.noise_at(low + (high - low) * uniform)
        # The lower half of the uniform numbers, stretched to [0, 1), covers the whole
        # range, the upper half the focus.
        first, last = self.log_snr.focus
        anywhere = low + (high - low) * 2 * uniform
        focused = first + (last - first) * (2 * uniform - 1)
        return self.noise_at(jnp.where(uniform < 0.5, anywhere, focused))

    def noise_pairs(self, key: Array, n: int, gap: float) -> tuple[Noise, Noise]:
        """Draw, for each of n events (n even), its noise and the noise to compare with.

        Events i and i + n/2 exchange theirs, so that either of a pair of levels has as
        many events as the other, whatever the distribution of the pairs: the optimal
        classifier of the two then has no term of prior odds.
        """
        first_key, gap_key = jax.random.split(key)
        first = self.noise(first_key, n // 2)
        offset = gap * jax.random.uniform(gap_key, (n // 2,), minval=-1.0)
        low, high = self.log_snr_range()
        # A log-SNR outside of the range is reflected at the end that it passed.
        above_low = jnp.abs(first.log_snr + offset - low) + low
        log_snr = high - jnp.abs(high - above_low)
        if self.log_snr is None:
            levels = self.schedule.levels
            nearest = jnp.argmin(jnp.abs(levels.log_snr[:, None] - log_snr), axis=0)
            second = jax.tree.map(lambda a: a[nearest], levels)
        else:
            second = self.noise_at(log_snr)
        return _joined(first, second), _joined(second, first)

    def noise_at(self, log_snr: Float[Array, " *n"]) -> Noise:
        """Return the noise of a log-SNR, at the schedule's relation of α and σ.

        JAX can trace it.

        Raises:
            InvalidValueError: a schedule that is neither variance preserving nor
                exploding.
        """
        # α at two log-SNR shows the kind: √sigmoid(log-SNR) where variance is
        # preserved, constant where it explodes.
        alphas, _ = self.schedule.noise_at(np.array([0.0, 1.0]))
        at_zero, at_one = alphas.tolist()
        preserving = [0.5, 1 / (1 + np.exp(-1.0))]
        index = jnp.zeros(jnp.shape(log_snr), int)
        if np.allclose([at_zero**2, at_one**2], preserving, rtol=1e-5):
            alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
            return Noise(index, alpha, jnp.sqrt(jax.nn.sigmoid(-log_snr)))
        if at_zero == at_one:
            alpha = jnp.full(jnp.shape(log_snr), at_zero)
            return Noise(index, alpha, alpha * jnp.exp(-0.5 * log_snr))
        raise InvalidValueError(
            "A range of log-SNR needs a schedule that is variance preserving or "
            "exploding; this one is neither.",
            fix="leave log_snr out: training then visits the schedule's own levels.",
        )


def _joined(first: Noise, second: Noise) -> Noise:
    """Return two noises of n/2 events as one of n."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
