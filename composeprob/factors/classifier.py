"""A noise-conditioned classifier as a factor."""

from __future__ import annotations

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from composeprob.arguments import as_condition, check_choice, check_finite
from composeprob.errors import (
    ConditionError,
    InvalidValueError,
    NetworkError,
    ShapeError,
)
from composeprob.factors.categorical import CategoricalClassifier, token_arguments
from composeprob.factors.diffusion import TIMES
from composeprob.factors.factor import (
    Factor,
    LeafFactor,
    OrOfTokens,
    Traits,
    check_leaf,
)
from composeprob.factors.networks import Network, as_network, check_deterministic
from composeprob.schedule import Noise, Schedule
from composeprob.user_code import called


class Classifier(LeafFactor, metaclass=OrOfTokens):
    """log f(x, k) = log p(label | x, k) = log softmax(network(x, t_k))[label].

    Of tokens, ``cp.Classifier(network, length=L, num_values=V)``, ``network(tokens,
    visible)`` returns the logits of the classes given what is visible.

    It is a function of x bounded by 1, not a density of x: multiply it onto a diffusion
    with `cp.condition`.

    Args:
        network: ``network(x, t)`` returns the logits, shape (classes,), of one noised
            event.
        schedule: the levels that it was trained on.
        event_shape: shape of one event; left out, that of the factor that
            `cp.condition` guides.
        time: the meaning of ``t``: ``"level"``, ``"log_snr"`` or ``"sigma"``, as for
            `Diffusion`.
        label: the name to show.
        length, num_values: in the place of a schedule and a shape, for L tokens with
            values 0 … V − 1.

    References:
        Dhariwal & Nichol 2021, section 4.
    """

    network: Network
    time: str = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)

    def __init__(
        self,
        network: object,
        schedule: Schedule,
        *,
        event_shape: tuple[int, ...] | None = None,
        time: str = "level",
        label: str = "",
    ):
        check_choice("time", time, TIMES)
        self.label = label or type(network).__name__
        self.network = check_finite(
            as_network(network), f"The network of factor '{self.label}'"
        )
        self.schedule = schedule
        self.time = time
        self.fixed = {}
        if event_shape is None:
            check_leaf(schedule, ())
            self.event_shape = None  # type: ignore[assignment]
            self.num_classes = 0  # counted by `over`, when the shape is known
        else:
            self.event_shape = check_leaf(schedule, event_shape)
            self.num_classes = self._count_classes()

    @classmethod
    def of_tokens(cls, *args: object, **kwargs: object) -> Factor | None:
        """Return the classifier of tokens for calls with a length and a number of
        values."""
        arguments = token_arguments("Classifier", "network", args, kwargs)
        return None if arguments is None else CategoricalClassifier(**arguments)

    def over(self, event_shape: tuple[int, ...]) -> Classifier:
        """Return the classifier for events of this shape; refuse a shape that it was
        not declared for."""
        if self.event_shape is None:
            # A new one, as its classes can be counted only now.
            return Classifier(
                self.network,
                self.schedule,
                event_shape=event_shape,
                time=self.time,
                label=self.label,
            )
        if self.event_shape != event_shape:
            raise ShapeError(
                f"Classifier '{self.label}' is for events {self.event_shape}, not "
                f"{event_shape}.",
                fix="multiply it with a factor over its events, or put a cp.window "
                "around it.",
            )
        return self

    def _count_classes(self) -> int:
        x = jax.ShapeDtypeStruct(self.event_shape, jnp.result_type(float))
        time_dtype = jnp.int32 if self.time == "level" else x.dtype
        t = jax.ShapeDtypeStruct((), time_dtype)
        traced, logits, _ = called(
            f"The classifier '{self.label}'",
            f"network(x, t) with x of shape {self.event_shape}",
            lambda: eqx.filter_make_jaxpr(self.network)(x, t),
            "it must accept one event (no batch axis) and a scalar t.",
        )
        check_deterministic(traced.jaxpr, self.label)
        if len(logits.shape) != 1:
            raise NetworkError(
                f"The classifier '{self.label}' returned shape {logits.shape}; logits "
                "have shape (classes,).",
                fix="return one logit per class for one event.",
            )
        return logits.shape[0]

    @property
    def traits(self) -> Traits:
        return Traits(
            Traits.ENERGY | {"mode_depth"},
            TIMES[self.time].levels,
            ("label",),
            top_power=0.0,
        )

    def given(self, **conditions: object) -> LeafFactor:
        if self.event_shape is None:
            raise ShapeError(
                f"Classifier '{self.label}' has no event shape.",
                fix="use cp.condition(f, classifier, label), or pass event_shape= to "
                "cp.Classifier.",
            )
        if not self._is_class(as_condition("label", conditions.get("label", 0))):
            raise InvalidValueError(
                f"Label {conditions['label']!r} does not exist: classifier "
                f"'{self.label}' has classes 0 to {self.num_classes - 1}.",
                fix="pass the class's index.",
            )
        return super().given(**conditions)

    def _is_class(self, label: Array) -> bool:
        """Return whether a label is the index of a class; of a traced one only the type
        is tested."""
        if label.ndim != 0 or not jnp.issubdtype(label.dtype, jnp.integer):
            return False
        return isinstance(label, jax.core.Tracer) or 0 <= int(label) < self.num_classes

    def check_network(self) -> None:
        if "label" not in self.fixed:
            raise ConditionError(
                f"Classifier '{self.label}' has no label, so log p(label | x) is not "
                "defined.",
                fix="use cp.condition(f, classifier, label), or "
                "classifier.given(label=…).",
            )

    def evaluate(
        self, x: Float[Array, "*event"], noise: Noise, conditions: Mapping[str, Array]
    ) -> tuple[Float[Array, ""] | None, Float[Array, "*event"]]:
        def log_probability(point: Array) -> Array:
            return jax.nn.log_softmax(self.logits(point, noise))[conditions["label"]]

        return jax.value_and_grad(log_probability)(x)

    def logits(
        self, x: Float[Array, "*event"], noise: Noise
    ) -> Float[Array, " classes"]:
        """Return the network's output for one event at this noise."""
        return self.network(x, TIMES[self.time].at(noise))
