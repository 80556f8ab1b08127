"""What to train: a network, a sampler of data, noise levels, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.errors import InvalidValueError, NetworkError
from composeprob.factors.classifier import Classifier
from composeprob.factors.concrete import called
from composeprob.factors.diffusion import ENERGIES, Diffusion, Encoder
from composeprob.factors.networks import Network, as_network
from composeprob.schedule import Noise, Schedule

if TYPE_CHECKING:
    import optax

Data = Callable[[Array, int], Array | tuple[Array, Mapping[str, Array]]]
"""``data(key, n)`` gives n events (n, *event_shape), or a pair (events, {condition:
values (n, …)})."""


def _check(holds: bool, found: str, fix: str) -> None:
    if not holds:
        raise InvalidValueError(f"In a training recipe, {found}.", fix=fix)


@dataclass(frozen=True)
class LogSNR:
    """`LogSNR` is a range of log-SNR to train on.

    Args:
        low, high: its ends.
        focus: a range within, where half of the events are drawn, besides the half that
            is spread over all of it: where the distribution takes shape is where there
            is most to learn.

    Raises:
        InvalidValueError: an empty range, or a focus outside of it.
    """

    low: float
    high: float
    focus: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check(
            self.low < self.high,
            f"log_snr is {(self.low, self.high)}",
            "give (min, max) with min < max.",
        )
        first, last = self.focus or (self.low, self.high)
        inside = self.low <= first < last <= self.high
        _check(
            inside,
            f"focus is {self.focus}",
            f"give a range within {(self.low, self.high)}.",
        )


@dataclass(frozen=True)
class Batches:
    """`Batches` says how many events a step of training takes.

    Args:
        size: events of each optimiser step.
        chunk: events evaluated at once; a batch's gradient is the average over its
            chunks. Bounds memory, and on CPUs keeps activations in cache. By default
            the whole batch.
        antithetic: draw noises in pairs ±ε on the same event. At high log-SNR most of
            the gradient's variance is linear in ε, and cancels.

    Raises:
        InvalidValueError: numbers below 1, a chunk that does not divide the batch,
            pairs in odd ones.
    """

    size: int = 1000
    chunk: int | None = None
    antithetic: bool = False

    def __post_init__(self) -> None:
        _check(
            self.size >= 1,
            f"the batch has {self.size} events",
            "use at least one event a step.",
        )
        splits = self.part >= 1 and self.size % self.part == 0
        _check(
            splits,
            f"chunk {self.part} does not divide a batch of {self.size}",
            "use a divisor of it.",
        )
        _check(not (self.antithetic and self.part % 2), f"a batch of {self.part} is odd, but antithetic noises come in "
               "pairs", "use an even size and chunk.")  # fmt: skip

    @property
    def part(self) -> int:
        """Events evaluated at once."""
        return self.size if self.chunk is None else self.chunk


@dataclass(frozen=True)
class Conditions:
    """`Conditions` of events, which classifier-free guidance drops now and then.

    Args:
        values: ``{name: value that means "no condition"}``, or names alone.
        dropout: probability that an event's conditions are all replaced by those
            values.
        encoders: as in `Diffusion`; data give what they return.

    Raises:
        InvalidValueError: no probability, or dropout without values to put in place.
    """

    values: tuple[str, ...] | Mapping[str, object] = ()
    dropout: float = 0.0
    encoders: Mapping[str, Encoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(
            0 <= self.dropout < 1,
            f"the conditions' dropout is {self.dropout}",
            "use a probability.",
        )
        named = isinstance(self.values, Mapping) and self.values
        _check(not self.dropout or bool(named), "dropout has no value to put in place",
               "give conditions as {name: value that means no condition}.")  # fmt: skip


@dataclass(frozen=True)
class Denoising:
    """`Denoising` is the loss E‖ε + σ·∇log f(α·x₀ + σ·ε)‖²/d, or of a classifier its
    cross-entropy.

    Args:
        weight: ``weight(log_snr)`` multiplies an event's loss; by default 1, which is
            DDPM's simple loss.
    """

    weight: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class CrossLevel:
    """`CrossLevel` is the loss that asks which of two levels an event came from, for
    energies.

    It teaches log f the relative depth of separated modes, and the normaliser of each
    level up to one constant; the factor then offers ``mode_depth``. The network needs a
    free constant at each level.

    Args:
        weight: of this loss beside the others.
        gap: the two levels that are compared are at most this far from each other in
            log-SNR.

    References:
        Binary classification between levels, whose optimum is the log-ratio of their
        densities (Gutmann & Hyvärinen 2012, *Noise-contrastive estimation*; Rhodes et
        al. 2020, *Telescoping density-ratio estimation*).
    """

    weight: float = 1.0
    gap: float = 4.0

    def __post_init__(self) -> None:
        _check(
            self.weight > 0,
            f"CrossLevel's weight is {self.weight}",
            "use a positive number, or leave it out.",
        )


@dataclass(frozen=True)
class CrossCondition:
    """`CrossCondition` is the loss that asks which condition an event came with, for
    energies.

    It teaches how vague conditions depend on an event (captions), which the denoising
    loss hardly depends on, and how high log f(x|c) and log f(x|c′) are above one
    another: a mixture of conditions of one model then has the shares that its
    ``log_weights`` give.

    Args:
        weight: of this loss beside the others.
        others: how many other events of the chunk lend an event their conditions to
            compare with.
        vary: ``vary(key, conditions)`` gives for each of n conditions ``{name: (n,
            …)}`` one that is easily taken for it, to be compared as well. It must draw
            c′ from c as often as c from c′, weighed by how often data have them: to
            replace a word by another at random, for example, where data have both
            equally often.

    References:
        van den Oord et al. 2018, *Contrastive predictive coding*.
    """

    weight: float = 1.0
    others: int = 1
    vary: Callable[[Array, dict[str, Array]], dict[str, Array]] | None = None

    def __post_init__(self) -> None:
        _check(
            self.weight > 0,
            f"CrossCondition's weight is {self.weight}",
            "use a positive number, or leave it out.",
        )


Loss = Denoising | CrossLevel | CrossCondition
Kind = TypeVar("Kind", Denoising, CrossLevel, CrossCondition)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A `Recipe` holds everything that determines a trained factor, but the random key.

    Args:
        network: ``network(key)`` gives the network to start from, in any form that
            `Diffusion` takes.
        data: ``data(key, n)`` gives n events, shape (n, \\*event_shape); or a pair of
            them and a mapping of conditions, each with n values. It is traced by
            ``jax.jit``: a set of images is indexed with random integers.
        schedule: the levels that the trained factor offers.
        log_snr: `LogSNR`, or a pair (min, max): the range to train on, at the
            schedule's own relation of α and σ, which must be variance preserving or
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
        learning_rate: Adam's step size; or a function of the number of steps that gives
            one of Optax's schedules, such as
            ``functools.partial(optax.cosine_decay_schedule, 1e-3)``.
        ema: decay m of the averaged weights, θ̄ ← m·θ̄ + (1−m)·θ after each step; the
            factor gets θ̄.

    Raises:
        InvalidValueError: a number out of range, or losses that such a factor cannot
            have.
    """

    network: Callable[[Array], object]
    data: Data
    schedule: Schedule
    log_snr: LogSNR | tuple[float, float] | None = None
    parameterization: str = "epsilon"
    time: str = "log_snr"
    conditions: Conditions | tuple[str, ...] | Mapping[str, object] = Conditions()
    losses: tuple[Loss, ...] = (Denoising(),)
    iterations: int = 15_000
    batches: Batches | int = Batches()
    learning_rate: float | Callable[[int], optax.Schedule] = 1e-3
    ema: float = 0.999

    def __post_init__(self) -> None:
        for name, made in (("conditions", Conditions), ("batches", Batches)):
            if not isinstance(getattr(self, name), made):
                object.__setattr__(self, name, made(getattr(self, name)))
        if isinstance(self.log_snr, tuple):
            object.__setattr__(self, "log_snr", LogSNR(*self.log_snr))
        _check(
            self.iterations >= 1,
            f"iterations is {self.iterations}",
            "train for at least one step.",
        )
        rate = self.learning_rate
        _check(
            callable(rate) or rate > 0,
            f"learning_rate is {rate}",
            "use a positive number, such as 1e-3.",
        )
        _check(not callable(rate) or callable(rate(self.iterations)),
               "learning_rate is no function of the number of iterations that makes a schedule",
               "write functools.partial(optax.cosine_decay_schedule, 1e-3).")  # fmt: skip
        _check(
            0 <= self.ema < 1,
            f"ema is {self.ema}",
            "use a number in [0, 1); 0 keeps the last weights.",
        )
        kinds = [type(loss) for loss in self.losses]
        known = all(isinstance(loss, Loss) for loss in self.losses)
        _check(known and len(set(kinds)) == len(kinds) > 0, f"losses is {self.losses}",
               "give cp.training.Denoising(), CrossLevel() or CrossCondition(), each at most once.")  # fmt: skip
        _check(self.parameterization != "classifier" or not self.condition.values, "a classifier has conditions",
               "leave conditions out: its one condition is the label.")  # fmt: skip
        for crossed in kinds:
            _check(crossed is Denoising or self.parameterization in ENERGIES,
                   f"{crossed.__name__} compares energies, and parameterization={self.parameterization!r} has none",
                   f"use one of {', '.join(ENERGIES)}, or leave {crossed.__name__} out.")  # fmt: skip
        self._check_crossed()
        if self.log_snr is not None:
            _check(self.time != "level", "log_snr is a range, but time='level' knows only the schedule's levels",
                   "leave log_snr out, or use time='log_snr'.")  # fmt: skip
            self.noise_at(jnp.asarray(self.log_snr_range()[0]))

    def _check_crossed(self) -> None:
        part, level, condition = (
            self.batch.part,
            self.loss(CrossLevel),
            self.loss(CrossCondition),
        )
        if level is not None:
            low, high = self.log_snr_range()
            _check(0 < level.gap <= high - low, f"CrossLevel's gap is {level.gap}",
                   f"use a positive number, at most the range of log-SNR, {high - low:.3g}.")  # fmt: skip
            step = 4 if self.batch.antithetic else 2
            _check(part % step == 0, f"a batch of {part} does not split into pairs of levels",
                   f"use a size and chunk of Batches that are multiples of {step}.")  # fmt: skip
        if condition is not None:
            named = bool(self.condition.values)
            _check(
                named,
                "CrossCondition is given without conditions",
                "name the data's conditions.",
            )
            _check(1 <= condition.others < part, f"a batch of {part} has no {condition.others} other conditions to "
                   "compare", "use a larger chunk, or a smaller number of others ≥ 1.")  # fmt: skip

    @property
    def batch(self) -> Batches:
        """The batches, also where a number was given."""
        assert isinstance(self.batches, Batches)
        return self.batches

    @property
    def condition(self) -> Conditions:
        """The conditions, also where names or values were given."""
        assert isinstance(self.conditions, Conditions)
        return self.conditions

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event, as the data have it.

        Raises:
            NetworkError: data that are no function of a key and a number, or give
                another number of events.
        """
        fix = "write a function: data=lambda key, n: images[jax.random.randint(key, (n,), 0, len(images))]."
        drawn = lambda: jax.eval_shape(lambda key: self.data(key, 2), jax.random.key(0))  # noqa: E731
        made = called("The data of a training recipe", "data(key, n)", drawn, fix)
        shapes = [tuple(getattr(part, "shape", ())) for part in jax.tree.leaves(made)]
        if not shapes or any(shape[:1] != (2,) for shape in shapes):
            found = ", ".join(map(str, shapes)) or "nothing"
            raise NetworkError(
                f"The data of a training recipe returned {found} as data(key, 2).",
                fix=fix,
            )
        return shapes[0][1:]

    def loss(self, kind: type[Kind]) -> Kind | None:
        """The loss of a kind; None where the recipe has none."""
        return next((loss for loss in self.losses if isinstance(loss, kind)), None)

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        made = self.learning_rate
        return float(made(self.iterations)(step) if callable(made) else made)

    def factor(self, network: object, label: str = "") -> Diffusion | Classifier:
        """Makes the factor of this recipe with a given network."""
        if self.parameterization == "classifier":
            return Classifier(
                network,
                self.schedule,
                event_shape=self.event_shape,
                time=self.time,
                label=label,
            )
        known = (
            None
            if self.time == "level" or self.log_snr is None
            else self.log_snr_range()
        )
        return Diffusion(
            network, self.schedule, event_shape=self.event_shape, parameterization=self.parameterization,
            time=self.time, conditions=self.condition.values, encoders=self.condition.encoders, log_snr_range=known,
            mode_depth=self.loss(CrossLevel) is not None, label=label,
        )  # fmt: skip

    def untrained(self, key: Array) -> Network:
        """Makes the network before training, as an Equinox module."""
        fix = "give a function of a random key that makes the untrained network: network=lambda key: MLP(…, key=key)."
        made = called(
            "The network of a training recipe",
            "network(key)",
            lambda: self.network(key),
            fix,
        )
        return as_network(made)

    def optimiser(self) -> optax.GradientTransformation:
        """Makes the optimiser: Adam with the recipe's learning rate."""
        import optax

        made = self.learning_rate
        return optax.adam(made(self.iterations) if callable(made) else made)

    def log_snr_range(self) -> tuple[float, float]:
        """Returns the least and greatest log-SNR that training visits."""
        if isinstance(self.log_snr, LogSNR):
            return self.log_snr.low, self.log_snr.high
        levels = self.schedule.levels.log_snr
        return float(levels[-1]), float(levels[0])

    def noise(self, key: Array, n: int) -> Noise:
        """Draws the noise of n events, stratified: one in each n-th of the log-SNR
        range, or levels drawn uniformly."""
        if not isinstance(self.log_snr, LogSNR):
            index = jax.random.randint(key, (n,), 0, self.schedule.num_levels)
            return jax.tree.map(lambda a: a[index], self.schedule.levels)
        low, high = self.log_snr_range()
        uniform = (jnp.arange(n) + jax.random.uniform(key, (n,))) / n
        if self.log_snr.focus is None:
            return self.noise_at(low + (high - low) * uniform)
        first, last = self.log_snr.focus
        anywhere, focused = (
            low + (high - low) * 2 * uniform,
            first + (last - first) * (2 * uniform - 1),
        )
        return self.noise_at(jnp.where(uniform < 0.5, anywhere, focused))

    def noise_pairs(self, key: Array, n: int, gap: float) -> tuple[Noise, Noise]:
        """Draws the noise of n events, n even, and for each the other noise that the
        cross-level loss compares.

        Events i and i + n/2 exchange theirs, so that either of a pair of levels has as
        many events as the other, whatever the distribution of the pairs: a classifier
        of the two owes nothing to their prior odds.
        """
        first_key, gap_key = jax.random.split(key)
        first = self.noise(first_key, n // 2)
        away = gap * jax.random.uniform(gap_key, (n // 2,), minval=-1.0)
        low, high = self.log_snr_range()
        reflected = (
            jnp.abs(first.log_snr + away - low) + low
        )  # back into the range at either end
        log_snr = high - jnp.abs(high - reflected)
        if self.log_snr is None:  # the nearest levels
            levels = self.schedule.levels
            index = jnp.argmin(jnp.abs(levels.log_snr[:, None] - log_snr), axis=0)
            second = jax.tree.map(lambda a: a[index], levels)
        else:
            second = self.noise_at(log_snr)
        both = (first, second), (second, first)
        noise, other = (
            jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *pair) for pair in both
        )
        return noise, other

    def noise_at(self, log_snr: Array) -> Noise:
        """Returns the noise of a log-SNR, at the schedule's relation of α and σ
        (traceable).

        Raises:
            InvalidValueError: a schedule that is neither variance preserving nor
                exploding.
        """
        at_zero, at_one = self.schedule.noise_at(np.array([0.0, 1.0]))[
            0
        ].tolist()  # α shows which kind
        index = jnp.zeros(jnp.shape(log_snr), int)
        if np.allclose(
            [at_zero**2, at_one**2], [0.5, 1 / (1 + np.exp(-1.0))], rtol=1e-5
        ):
            return Noise(
                index,
                jnp.sqrt(jax.nn.sigmoid(log_snr)),
                jnp.sqrt(jax.nn.sigmoid(-log_snr)),
            )
        if at_zero == at_one:
            alpha = jnp.full(jnp.shape(log_snr), at_zero)
            return Noise(index, alpha, alpha * jnp.exp(-0.5 * log_snr))
        raise InvalidValueError(
            "A range of log-SNR needs a schedule that is variance preserving or exploding; this one is neither.",
            fix="leave log_snr out: training then visits the schedule's own levels.",
        )
