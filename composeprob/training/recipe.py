"""What to train: a network, a sampler of data, noise levels, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.errors import InvalidValueError
from composeprob.factors.classifier import Classifier
from composeprob.factors.diffusion import Diffusion, Encoder
from composeprob.factors.networks import Network, as_network
from composeprob.factors.parameterizations import ENERGIES
from composeprob.schedule import Noise, Schedule

if TYPE_CHECKING:
    import optax

Data = Callable[[Array, int], Array | tuple[Array, Mapping[str, Array]]]
"""``data(key, n)`` gives n events (n, *event_shape), or a pair (events, {condition: values (n, …)})."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A `Recipe` holds everything that determines a trained factor, but the random key.

    Args:
        network: ``network(key)`` gives the untrained network, in any form that `Diffusion` takes.
        data: ``data(key, n)`` gives n events, shape (n, \\*event_shape); or a pair of them and a mapping of conditions,
            each with n values. It is traced by ``jax.jit``: a set of images is indexed with random integers.
        event_shape: shape of one event.
        schedule: the levels that the trained factor offers.
        log_snr: range (min, max) of log-SNR to train on, at the schedule's own relation of α and σ, which must be
            variance preserving or exploding; None trains on the schedule's levels alone.
        focus: a range of log-SNR within ``log_snr`` where half of the events are drawn, besides the half that is spread
            over all of it: where the distribution takes shape is where there is most to learn.
        parameterization, time: as in `Diffusion`; or parameterization ``"classifier"`` for a noise-conditioned
            `Classifier`, whose network returns logits and whose data come with the condition ``label``, a class's index
            for each event. Its loss is the cross-entropy −log p(label | x, λ).
        conditions: ``{name: value that means "no condition"}``, or names alone.
        condition_dropout: probability that an event's conditions are all replaced by those values, as classifier-free
            guidance needs.
        encoders: as in `Diffusion`; data give what they return.
        held_out: data of the same form that are not trained on; `train_model` then measures the loss on both.
        start: ``start(network)`` gives the weights to start from, for the untrained network as an Equinox module: a
            network trained before, or parts of it. By default the untrained network itself.
        iterations, batch_size: number of optimiser steps, and of events in each.
        chunk: events evaluated at once; a batch's gradient is the average over its chunks. Bounds memory, and on
            CPUs keeps activations in cache. By default the whole batch.
        learning_rate: Adam's step size at the start.
        decay: ``"constant"``, or ``"cosine"`` down to 0 at the last iteration.
        ema: decay m of the averaged weights, θ̄ ← m·θ̄ + (1−m)·θ after each step; the factor gets θ̄.
        weight: ``weight(log_snr)`` multiplies an event's loss; by default 1, which is DDPM's simple loss.
        antithetic: draw noises in pairs ±ε on the same event. At high log-SNR most of the gradient's variance is
            linear in ε, and cancels.
        cross_level: weight of the cross-level loss beside denoising, for energies; 0 leaves it out. It teaches log f
            the relative depth of separated modes, and the normaliser of each level up to one constant; the factor
            then offers ``mode_depth``. The network needs a free constant at each level.
        cross_level_gap: the two levels that are compared are at most this far from each other in log-SNR.
        cross_condition: weight of the cross-condition loss beside denoising, for energies; 0 leaves it out. It teaches
            how vague conditions depend on an event (captions), which the denoising loss hardly depends on, and how high
            log f(x|c) and log f(x|c′) are above one another: a mixture of conditions of one model then has the shares
            that its ``log_weights`` give.
        cross_condition_others: how many other events of the chunk lend an event their conditions to compare with.
        vary: ``vary(key, conditions)`` gives for each of n conditions ``{name: (n, …)}`` one that is easily taken for
            it, to be compared as well. It must draw c′ from c as often as c from c′, weighed by how often data have
            them: to replace a word by another at random, for example, where data have both equally often.
        denoising: whether there is a denoising loss at all; without it a cross loss teaches what there is to learn.

    Raises:
        InvalidValueError: a number out of range, an unknown ``decay``, a cross-level loss without an energy.

    References:
        Cross-level loss: binary classification between levels, whose optimum is the log-ratio of their densities
        (Gutmann & Hyvärinen 2012, *Noise-contrastive estimation*; Rhodes et al. 2020, *Telescoping density-ratio
        estimation*).
    """

    network: Callable[[Array], object]
    data: Data
    event_shape: tuple[int, ...]
    schedule: Schedule
    log_snr: tuple[float, float] | None = None
    focus: tuple[float, float] | None = None
    parameterization: str = "epsilon"
    time: str = "log_snr"
    conditions: tuple[str, ...] | Mapping[str, object] = field(default_factory=dict)
    condition_dropout: float = 0.0
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    held_out: Data | None = None
    start: Callable[[Network], Network] | None = None
    iterations: int = 15_000
    batch_size: int = 1000
    chunk: int | None = None
    learning_rate: float = 1e-3
    decay: str = "constant"
    ema: float = 0.999
    weight: Callable[[Array], Array] | None = None
    antithetic: bool = False
    cross_level: float = 0.0
    cross_level_gap: float = 4.0
    cross_condition: float = 0.0
    cross_condition_others: int = 1
    vary: Callable[[Array, dict[str, Array]], dict[str, Array]] | None = None
    denoising: bool = True

    def __post_init__(self) -> None:
        _check(self.iterations >= 1, f"iterations is {self.iterations}", "train for at least one step.")
        _check(self.batch_size >= 1, f"batch_size is {self.batch_size}", "use at least one event a step.")
        part = self.batch_size if self.chunk is None else self.chunk
        splits = part >= 1 and self.batch_size % part == 0
        _check(splits, f"chunk {part} does not divide batch_size {self.batch_size}", "use a divisor of it.")
        _check(not (self.antithetic and part % 2), f"a batch of {part} is odd, but antithetic noises come in pairs",
               "use an even batch_size and chunk.")  # fmt: skip
        _check(self.learning_rate > 0, f"learning_rate is {self.learning_rate}", "use a positive number, such as 1e-3.")
        _check(self.decay in ("constant", "cosine"), f"decay is {self.decay!r}", "use 'constant' or 'cosine'.")
        _check(0 <= self.ema < 1, f"ema is {self.ema}", "use a number in [0, 1); 0 keeps the last weights.")
        _check(0 <= self.condition_dropout < 1, f"condition_dropout is {self.condition_dropout}", "use a probability.")
        named = isinstance(self.conditions, Mapping) and self.conditions
        _check(not self.condition_dropout or bool(named), "condition_dropout has no value to put in place",
               "give conditions as {name: value that means no condition}.")  # fmt: skip
        if self.cross_level:
            self._check_cross_level(part)
        crossed = self.cross_level or self.cross_condition
        _check(self.vary is None or bool(self.cross_condition), "vary is given without cross_condition",
               "give that loss a weight.")  # fmt: skip
        _check(self.denoising or bool(crossed), "no loss is left", "keep denoising, or use a cross loss.")
        if self.cross_condition:
            self._check_cross_condition(part)
        _check(self.parameterization != "classifier" or not self.conditions, "a classifier has conditions",
               "leave conditions out: its one condition is the label.")  # fmt: skip
        if self.log_snr is not None:
            low, high = self.log_snr
            _check(low < high, f"log_snr is {self.log_snr}", "give (min, max) with min < max.")
            _check(self.time != "level", "log_snr is a range, but time='level' knows only the schedule's levels",
                   "leave log_snr out, or use time='log_snr'.")  # fmt: skip
            self.noise_at(jnp.asarray(low))
            first, last = self.focus or self.log_snr
            _check(low <= first < last <= high, f"focus is {self.focus}", f"give a range within {self.log_snr}.")
        else:
            _check(self.focus is None, "focus is given without log_snr", "give the range log_snr as well.")

    def factor(self, network: object, label: str = "") -> Diffusion | Classifier:
        """Makes the factor of this recipe with a given network."""
        if self.parameterization == "classifier":
            return Classifier(network, self.schedule, event_shape=self.event_shape, time=self.time, label=label)
        return Diffusion(
            network,
            self.schedule,
            event_shape=self.event_shape,
            parameterization=self.parameterization,
            time=self.time,
            conditions=self.conditions,
            log_snr_range=None if self.time == "level" else self.log_snr,
            mode_depth=self.cross_level > 0,
            label=label,
            encoders=self.encoders,
        )

    def untrained(self, key: Array) -> Network:
        """Makes the network before training, as an Equinox module."""
        return as_network(self.network(key))

    def optimiser(self) -> optax.GradientTransformation:
        """Makes the optimiser: Adam with the recipe's learning rate."""
        import optax

        if self.decay == "cosine":
            return optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.iterations))
        return optax.adam(self.learning_rate)

    def log_snr_range(self) -> tuple[float, float]:
        """Returns the least and greatest log-SNR that training visits."""
        if self.log_snr is not None:
            return self.log_snr
        levels = self.schedule.levels.log_snr
        return float(levels[-1]), float(levels[0])

    def noise(self, key: Array, n: int) -> Noise:
        """Draws the noise of n events, stratified: one in each n-th of the log-SNR range, or levels drawn uniformly."""
        if self.log_snr is None:
            index = jax.random.randint(key, (n,), 0, self.schedule.num_levels)
            return jax.tree.map(lambda a: a[index], self.schedule.levels)
        low, high = self.log_snr
        uniform = (jnp.arange(n) + jax.random.uniform(key, (n,))) / n
        if self.focus is None:
            return self.noise_at(low + (high - low) * uniform)
        first, last = self.focus
        anywhere, focused = low + (high - low) * 2 * uniform, first + (last - first) * (2 * uniform - 1)
        return self.noise_at(jnp.where(uniform < 0.5, anywhere, focused))

    def noise_pairs(self, key: Array, n: int) -> tuple[Noise, Noise]:
        """Draws the noise of n events, n even, and for each the other noise that the cross-level loss compares.

        Events i and i + n/2 exchange theirs, so that either of a pair of levels has as many events as the other,
        whatever the distribution of the pairs: a classifier of the two owes nothing to their prior odds.
        """
        first_key, gap_key = jax.random.split(key)
        first = self.noise(first_key, n // 2)
        gap = self.cross_level_gap * jax.random.uniform(gap_key, (n // 2,), minval=-1.0)
        low, high = self.log_snr_range()
        reflected = jnp.abs(first.log_snr + gap - low) + low  # back into the range at either end
        second = self._nearest(high - jnp.abs(high - reflected))
        both = (first, second), (second, first)
        noise, other = (jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *pair) for pair in both)
        return noise, other

    def _nearest(self, log_snr: Array) -> Noise:
        """The noise of log-SNR values (n,), or of the levels nearest to them where only levels are trained on."""
        if self.log_snr is not None:
            return self.noise_at(log_snr)
        levels = self.schedule.levels
        index = jnp.argmin(jnp.abs(levels.log_snr[:, None] - log_snr), axis=0)
        return jax.tree.map(lambda a: a[index], levels)

    def noise_at(self, log_snr: Array) -> Noise:
        """Returns the noise of a log-SNR, at the schedule's relation of α and σ (traceable).

        Raises:
            InvalidValueError: a schedule that is neither variance preserving nor exploding.
        """
        at_zero, at_one = (float(self.schedule.alpha_at(np.asarray([p]))[0]) for p in (0.0, 1.0))  # α shows which kind
        index = jnp.zeros(jnp.shape(log_snr), int)
        if np.allclose([at_zero**2, at_one**2], [0.5, 1 / (1 + np.exp(-1.0))], rtol=1e-5):
            return Noise(index, jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr)))
        if at_zero == at_one:
            alpha = jnp.full(jnp.shape(log_snr), at_zero)
            return Noise(index, alpha, alpha * jnp.exp(-0.5 * log_snr))
        raise InvalidValueError(
            "A range of log-SNR needs a schedule that is variance preserving or exploding; this one is neither.",
            fix="leave log_snr out: training then visits the schedule's own levels.",
        )

    def _check_cross_condition(self, part: int) -> None:
        _check(self.cross_condition > 0, f"cross_condition is {self.cross_condition}",
               "use a weight ≥ 0; 0 leaves the loss out.")  # fmt: skip
        self._check_energy("cross_condition")
        _check(bool(self.conditions), "cross_condition is given without conditions", "name the data's conditions.")
        others = self.cross_condition_others
        _check(1 <= others < part, f"a batch of {part} has no {others} other conditions to compare",
               "use a larger chunk, or a smaller cross_condition_others ≥ 1.")  # fmt: skip

    def _check_cross_level(self, part: int) -> None:
        _check(self.cross_level > 0, f"cross_level is {self.cross_level}", "use a weight ≥ 0; 0 leaves the loss out.")
        self._check_energy("cross_level")
        low, high = self.log_snr_range()
        _check(0 < self.cross_level_gap <= high - low, f"cross_level_gap is {self.cross_level_gap}",
               f"use a positive number, at most the range of log-SNR, {high - low:.3g}.")  # fmt: skip
        step = 4 if self.antithetic else 2
        _check(part % step == 0, f"a batch of {part} does not split into pairs of levels",
               f"use a batch_size and chunk that are multiples of {step}.")  # fmt: skip

    def _check_energy(self, loss: str) -> None:
        _check(self.parameterization in ENERGIES,
               f"{loss} compares energies, and parameterization={self.parameterization!r} has none",
               f"use one of {', '.join(ENERGIES)}, or leave {loss} out.")  # fmt: skip


def _check(holds: bool, found: str, fix: str) -> None:
    if not holds:
        raise InvalidValueError(f"In a training recipe, {found}.", fix=fix)
