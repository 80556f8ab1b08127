"""Factors of categorical sites: masked networks, closed forms, and a user's potentials
of partly visible tokens.

A categorical event is L tokens, of which some are visible. A factor is a function of
what is visible, log f(x_S), and it is evaluated by its rises: how much log f grows
where one more position becomes visible with each of its V values. A model's rise is the
log-probability of the value given what is visible, so that its log f is that of the
path on which the tokens were revealed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from composeprob.arguments import as_condition, check_choice, check_count, check_finite
from composeprob.errors import (
    ConditionError,
    InvalidValueError,
    NetworkError,
    ShapeError,
    WrongTypeError,
)
from composeprob.factors.factor import Factor, LeafFactor, Traits, is_factor
from composeprob.factors.networks import Network, as_network
from composeprob.factors.nodes import walk
from composeprob.factors.uniform_noise import (
    Noised,
    NoisedEvent,
    of_clean,
    tempered,
)
from composeprob.schedule import Noise, Schedule
from composeprob.text import spoken_shape
from composeprob.user_code import called

NO_LEVELS = Schedule.from_arrays([1.0], [1.0])
"""Stands for the levels of factors that have none: a categorical site's are its
reveals."""

LEAST = -1e30
"""Stands for the logarithm of 0 where it is differentiated."""

MASKS = ("rank", "boolean")
"""Second arguments of networks: the places of positions in an order, or which of them
are visible."""


class Query(eqx.Module):
    """Tokens of one event, and the positions about which a factor is asked.

    Attributes:
        tokens: the values; those of hidden positions mean nothing.
        rank: the place of each position in the order in which they become visible.
            Positions of equal rank become visible together.
        time: positions of lower rank are visible.
        positions: those that become visible next; −1 for none.
        block: the number of these that must be answered for. Others are hidden ones
            that a factor answers for if it can from the same evaluation; None if all
            must be.
    """

    tokens: Int[Array, " length"]
    rank: Int[Array, " length"]
    time: Int[Array, ""]
    positions: Int[Array, " block"]
    block: int | None = eqx.field(static=True, default=None)

    @property
    def visible(self) -> Bool[Array, " length"]:
        """True at visible positions."""
        return self.rank < self.time


class Extension(NamedTuple):
    """The values of a factor about a query.

    Attributes:
        rises: how much log f grows if one of the positions becomes visible with each of
            its values; 0 for position −1.
        base: log f of what is visible; None where it is not known from one evaluation.
    """

    rises: Float[Array, "block values"]
    base: Float[Array, ""] | None


class TokenFactor(LeafFactor):
    """A leaf factor over L tokens with V values each.

    Attributes:
        num_values: V.
    """

    num_values: eqx.AbstractVar[int]

    @property
    def length(self) -> int:
        """L."""
        return int(np.prod(self.event_shape, dtype=int))

    @property
    def knows_noise(self) -> bool:
        """True if it has `noised`, for programs whose levels are uniform noise."""
        return type(self).noised is not TokenFactor.noised

    def noised(self, event: NoisedEvent, conditions: Mapping[str, Array]) -> Noised:
        """Return the values about tokens under uniform noise, from one evaluation.

        Args:
            event: the tokens, and the level.
            conditions: as returned by `call_conditions`, possibly with other values.
        """
        raise NotImplementedError

    def _about(self) -> tuple[str, ...]:
        return f"{self.num_values} values", spoken_shape(self.event_shape)


class CategoricalFactor(TokenFactor):
    """A factor of partly visible tokens."""

    OFFERS: ClassVar[frozenset[str]] = frozenset({"energy", "categorical"})

    def abstract_event(self) -> Any:
        """Return a query without numbers, to trace an evaluation with."""

        def blank() -> Query:
            tokens = jnp.zeros((self.length,), jnp.int32)
            return Query(tokens, tokens, jnp.int32(0), jnp.zeros((1,), jnp.int32))

        return jax.eval_shape(blank)

    looks_ahead: ClassVar[bool] = False
    """True if one evaluation has the rises at all hidden positions."""

    @property
    def path_evaluations(self) -> int:
        """Evaluations that log f of what is visible takes, beside the rises."""
        return 1

    @abstractmethod
    def extend(
        self, query: Query, conditions: Mapping[str, Array], paths: bool
    ) -> Extension:
        """Return the rises at the query's positions, from one evaluation.

        Args:
            query: the tokens, and which of them are visible.
            conditions: as returned by `call_conditions`, possibly with other values.
            paths: whether `Extension.base` is needed, for a factor that depends on the
                order too.
        """

    def evaluate(  # type: ignore[override]
        self, x: Query, noise: Noise, conditions: Mapping[str, Array]
    ) -> Extension:
        # `closed` records the user's functions by such a call.
        return self.extend(x, conditions, paths=False)


def num_values_of(factor: Factor) -> int:
    """The number of values of an expression's tokens; 0 for other expressions."""
    values = [0]
    for node in walk(factor):
        if isinstance(node, TokenFactor):
            values.append(node.num_values)
    return max(values)


class MaskedDiffusion(CategoricalFactor):
    r"""A masked (absorbing, any-order) diffusion model of L tokens,

    $$q(x, \sigma) = \prod_s q(x_{\sigma_s} \mid x_{\sigma_{<s}}),$$

    given by a network of the conditionals. Multiplied, divided and mixed with other
    factors it is sampled along an order σ that is drawn anew for each chain.

    Args:
        network: ``network(tokens, rank, **conditions)`` returns the logits of every
            position, shape (length, num_values). ``tokens`` and ``rank`` are integers
            of shape (length,): position i may see the tokens of positions of lower rank
            and no others. With ``mask="boolean"`` it is called as ``network(tokens,
            visible, **conditions)`` with truth values, and the logits of hidden
            positions are read. Tokens of positions that must not be seen are arbitrary.
        length: L.
        num_values: V; tokens are 0 … V − 1.
        conditions: names of the arguments that `given` fixes.
        mask: ``"rank"`` or ``"boolean"``.
        one_joint: declares that all conditionals are those of one joint distribution,
            so that log q does not depend on the order. Trained networks are not: Gibbs
            moves of them would sample another distribution.
        label: the name to show.

    Raises:
        NetworkError: the network cannot be called so, or returns another shape.

    Example:
        >>> import composeprob as cp, jax.numpy as jnp
        >>> def agreeing(tokens, visible):
        ...     counts = jnp.sum(visible[:, None] * jnp.eye(2)[tokens], axis=0)
        ...     return jnp.broadcast_to(counts, (4, 2))
        >>> f = cp.MaskedDiffusion(agreeing, length=4, num_values=2, mask="boolean")
        >>> f
        agreeing (2 values, 4)

    References:
        Hoogeboom et al. 2022, *Autoregressive diffusion models*; Shi et al. 2024,
        *Simplified and generalized masked diffusion for discrete data*.
    """

    network: Network
    num_values: int = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    mask: str = eqx.field(static=True)
    one_joint: bool = eqx.field(static=True)

    looks_ahead: ClassVar[bool] = True

    def __init__(
        self,
        network: object,
        *,
        length: int,
        num_values: int,
        conditions: tuple[str, ...] = (),
        mask: str = "rank",
        one_joint: bool = False,
        label: str = "",
    ):
        check_choice("mask", mask, MASKS)
        self.label = label or name_of(network)
        self.network = network_of_tokens(network, self.label)
        self.schedule = NO_LEVELS
        self.event_shape = shape_of(length)
        self.num_values = check_count(num_values, "num_values", least=2)
        self.names = tuple(conditions)
        self.mask = mask
        self.one_joint = bool(one_joint)
        self.fixed = {}

    @property
    def traits(self) -> Traits:
        offers = self.OFFERS | {"normalised"}
        if self.one_joint:
            offers |= {"one_joint"}
        return Traits(offers, "any", self.names)

    def check_network(self) -> None:
        tokens = jax.ShapeDtypeStruct((self.length,), jnp.int32)
        second = tokens
        if self.mask == "boolean":
            second = jax.ShapeDtypeStruct((self.length,), bool)
        check_outputs(self, self.mask, second, "logits")

    @property
    def path_evaluations(self) -> int:
        if self.mask == "rank" or self.one_joint:
            return 1
        return 1 + self.length

    def logits(
        self, query: Query, conditions: Mapping[str, Array]
    ) -> Float[Array, "length values"]:
        """Return log-probabilities of the values of every position, normalised."""
        second = query.visible if self.mask == "boolean" else query.rank
        # What a network must not see is the same for all values of it.
        tokens = query.tokens
        if self.mask == "boolean":
            tokens = jnp.where(query.visible, tokens, 0)
        logits = self.network(tokens, second, **conditions)
        return jax.nn.log_softmax(jnp.asarray(logits), axis=-1)

    def extend(
        self, query: Query, conditions: Mapping[str, Array], paths: bool
    ) -> Extension:
        log_probs = self.logits(query, conditions)
        asked = query.positions[:, None] >= 0
        rises = jnp.where(asked, log_probs[query.positions], 0.0)
        if self.mask == "rank":
            # Each position saw those of lower rank: the whole path in one evaluation.
            return Extension(rises, _path_sum(log_probs, query))
        if self.one_joint or not paths:
            return Extension(rises, None)

        def of_position(i: Array) -> Array:
            """Log-probability of a token given those that were visible before it."""
            before = eqx.tree_at(lambda q: q.time, query, query.rank[i])
            return self.logits(before, conditions)[i, query.tokens[i]]

        logs = jax.vmap(of_position)(jnp.arange(self.length))
        return Extension(rises, jnp.sum(jnp.where(query.visible, logs, 0.0)))


class JointFactor(CategoricalFactor):
    """A categorical factor whose log f is a function of what is visible alone,
    whichever order it became visible in."""

    @abstractmethod
    def log_potential(
        self,
        tokens: Int[Array, " length"],
        visible: Bool[Array, " length"],
        conditions: Mapping[str, Array],
    ) -> Float[Array, ""]:
        """log f of the visible tokens."""

    @property
    def traits(self) -> Traits:
        return Traits(self.OFFERS | {"one_joint"}, "any")

    def extend(
        self, query: Query, conditions: Mapping[str, Array], paths: bool
    ) -> Extension:
        visible = query.visible
        base = self.log_potential(query.tokens, visible, conditions)

        def rise(position: Array, value: Array) -> Array:
            tokens = query.tokens.at[position].set(value)
            more = self.log_potential(
                tokens, visible.at[position].set(True), conditions
            )
            # From an impossible event nothing possible follows.
            return jnp.where(jnp.isneginf(base), -jnp.inf, more - base)

        values = jnp.arange(self.num_values, dtype=query.tokens.dtype)
        over_values = jax.vmap(rise, (None, 0))
        needed = query.positions[: query.block]
        rises = jax.vmap(over_values, (0, None))(needed, values)
        others = len(query.positions) - len(needed)
        rises = jnp.pad(rises, ((0, others), (0, 0)))
        return Extension(jnp.where(query.positions[:, None] >= 0, rises, 0.0), base)

    def noised(self, event: NoisedEvent, conditions: Mapping[str, Array]) -> Noised:
        # What is said of clean tokens has no noised form: its exponent grows.
        everything = jnp.ones(self.length, bool)

        def of_tokens(tokens: Array) -> Array:
            return self.log_potential(tokens, everything, conditions)

        def neighbour(position: Array, value: Array) -> Array:
            return of_tokens(event.tokens.at[position].set(value))

        values = jnp.arange(self.num_values, dtype=event.tokens.dtype)
        over_values = jax.vmap(neighbour, (None, 0))
        positions = jnp.arange(self.length)
        neighbours = jax.vmap(over_values, (0, None))(positions, values)
        return tempered(of_tokens(event.tokens), neighbours, event.noise)


class ClosedCategorical(JointFactor):
    """A distribution of L tokens whose marginals over any positions have a closed form:
    independent tokens, a Markov chain, a table. `Analytic` makes it.

    Attributes:
        kind: ``"independent"``, ``"chain"`` or ``"table"``.
        logs: log-probabilities: (length, values); the chain's first token, (values,),
            and its transitions, (values, values); the table, an axis a position.
    """

    logs: tuple[Array, ...]
    num_values: int = eqx.field(static=True)
    kind: str = eqx.field(static=True)

    def __init__(
        self,
        kind: str,
        logs: tuple[Array, ...],
        event_shape: tuple[int, ...],
        label: str,
    ):
        self.kind = kind
        self.logs = logs
        self.num_values = logs[0].shape[-1]
        self.event_shape = event_shape
        self.schedule = NO_LEVELS
        self.fixed = {}
        self.label = label

    @classmethod
    def independent(
        cls, distribution: dist.Distribution, label: str
    ) -> ClosedCategorical:
        """Independent tokens, one for each entry of a NumPyro distribution."""
        kind = type(_base(distribution)).__name__
        label = label or kind.removesuffix("Probs").removesuffix("Logits")
        shape = tuple(distribution.batch_shape + distribution.event_shape)
        logits = jax.nn.log_softmax(_logits(distribution), axis=-1)
        whole = jnp.broadcast_to(logits, (*shape, logits.shape[-1]))
        return cls("independent", (whole.reshape(-1, logits.shape[-1]),), shape, label)

    @classmethod
    def chain(
        cls, initial: ArrayLike, transition: ArrayLike, length: int, label: str
    ) -> ClosedCategorical:
        """A Markov chain of ``length`` tokens."""
        first = _log_probabilities(initial, "The chain's initial probabilities")
        steps = _log_probabilities(transition, "The chain's transitions")
        if first.ndim != 1 or steps.shape != first.shape * 2:
            raise ShapeError(
                "A Markov chain needs initial probabilities (values,) and transitions "
                f"(values, values); got {first.shape} and {steps.shape}.",
                fix="transition[i, j] is the probability of value j after i.",
            )
        return cls("chain", (first, steps), shape_of(length), label or "chain")

    @classmethod
    def table(cls, probs: ArrayLike, label: str) -> ClosedCategorical:
        """A table of the probabilities of all values of a few tokens."""
        shape = np.shape(probs)
        if not shape or len(set(shape)) > 1:
            raise ShapeError(
                f"A table of tokens has one axis a position, all of V entries; got "
                f"shape {shape}.",
                fix="a table of three tokens of four values has the shape (4, 4, 4).",
            )
        flat = jnp.reshape(jnp.asarray(probs), -1)
        logs = _log_probabilities(flat, "The table's probabilities").reshape(shape)
        return cls("table", (logs,), (logs.ndim,), label or "table")

    @property
    def traits(self) -> Traits:
        return Traits(self.OFFERS | {"one_joint", "normalised"}, "any")

    def log_potential(
        self, tokens: Array, visible: Array, conditions: Mapping[str, Array]
    ) -> Float[Array, ""]:
        is_token = jnp.arange(self.num_values) == tokens[:, None]
        # A hidden token says nothing of itself.
        counted = jnp.where(visible[:, None], is_token, True)
        return self.log_sum(counted.astype(self.logs[0].dtype))

    def noised(self, event: NoisedEvent, conditions: Mapping[str, Array]) -> Noised:
        kept = event.noise.kept
        is_token = jnp.arange(self.num_values) == event.tokens[:, None]
        counted = jnp.where(is_token, kept, 0.0) + (1 - kept) / self.num_values
        # The sum is linear in what each position says of its clean token, so that a
        # derivative is the probability of that token given all other noised ones.
        base, slopes = jax.value_and_grad(self.log_sum)(counted)
        clean = slopes / jnp.sum(slopes, axis=1, keepdims=True)
        return of_clean(clean, event, base)

    def log_sum(self, counted: Float[Array, "length values"]) -> Float[Array, ""]:
        """log Σ_u p(u)·Π_i counted_i(u_i) over all clean tokens u."""
        if self.kind == "independent":
            logs = self.logs[0] + jnp.log(counted)
            return jnp.sum(jax.nn.logsumexp(logs, axis=1))
        if self.kind == "chain":
            return self._log_sum_of_chain(counted)
        logs = self.logs[0]
        largest = jnp.max(logs)
        table = jnp.exp(logs - largest)
        # Axis after axis: the visible token's entry, or the sum over hidden ones.
        for position in reversed(range(table.ndim)):
            table = table @ counted[position]
        return jnp.log(table) + largest

    def _log_sum_of_chain(self, counted: Array) -> Array:
        """The forward algorithm."""
        # Finite: a value that nothing leads to has no derivative.
        first, steps = (jnp.maximum(logs, LEAST) for logs in self.logs)
        allowed = jnp.log(counted)

        def onwards(message: Array, allowed: Array) -> tuple[Array, None]:
            following = jax.nn.logsumexp(message[:, None] + steps, axis=0)
            return following + allowed, None

        message, _ = jax.lax.scan(onwards, first + allowed[0], allowed[1:])
        total = jax.nn.logsumexp(message)
        return jnp.where(total > 0.5 * LEAST, total, -jnp.inf)


class CategoricalEnergy(JointFactor):
    """A user-defined log-potential of partly visible tokens. `Energy` makes it.

    Attributes:
        fn: ``fn(tokens, visible)``, a scalar.
    """

    fn: Callable[..., ArrayLike]
    num_values: int = eqx.field(static=True)

    def __init__(self, fn: object, length: int, num_values: int, label: str):
        if not callable(fn) or is_factor(fn):
            raise WrongTypeError(
                f"fn must be callable as fn(tokens, visible); got {type(fn).__name__}.",
                fix="pass a function that returns a log-potential, a scalar.",
            )
        self.label = label or name_of(fn)
        self.fn = check_finite(as_network(fn), f"The function of factor '{self.label}'")
        self.schedule = NO_LEVELS
        self.event_shape = shape_of(length)
        self.num_values = check_count(num_values, "num_values", least=2)
        self.fixed = {}
        tokens = jax.ShapeDtypeStruct((self.length,), jnp.int32)
        visible = jax.ShapeDtypeStruct((self.length,), bool)
        returned = called(
            f"The energy '{self.label}'",
            f"fn(tokens, visible), both of shape {self.event_shape}",
            lambda: eqx.filter_eval_shape(self.fn, tokens, visible),
            "it must accept one event: whole numbers, and truth values.",
        )
        if jnp.shape(returned) != ():
            raise NetworkError(
                f"The energy '{self.label}' returned shape {jnp.shape(returned)} "
                "instead of a scalar.",
                fix="sum over the positions.",
            )
        # A truth value would count as 1, and say that one event is e times as probable.
        dtype = jnp.result_type(returned)
        real = jnp.issubdtype(dtype, jnp.floating)
        if not real and not jnp.issubdtype(dtype, jnp.integer):
            raise NetworkError(
                f"The energy '{self.label}' returned {dtype} numbers.",
                fix="return a real number, log f of the tokens: "
                "jnp.where(inside, 0.0, -jnp.inf) of a condition.",
            )

    def log_potential(
        self, tokens: Array, visible: Array, conditions: Mapping[str, Array]
    ) -> Float[Array, ""]:
        value = jnp.asarray(self.fn(tokens, visible), jnp.result_type(float))
        return value.reshape(())


class CategoricalClassifier(JointFactor):
    """log p(label | visible tokens) = log softmax(network(tokens, visible))[label].
    `Classifier` makes it.

    Attributes:
        network: returns the logits of the classes.
        num_classes: their number.
    """

    network: Network
    num_values: int = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)

    def __init__(self, network: object, length: int, num_values: int, label: str):
        self.label = label or name_of(network)
        self.network = network_of_tokens(network, self.label)
        self.schedule = NO_LEVELS
        self.event_shape = shape_of(length)
        self.num_values = check_count(num_values, "num_values", least=2)
        self.fixed = {}
        tokens = jax.ShapeDtypeStruct((self.length,), jnp.int32)
        visible = jax.ShapeDtypeStruct((self.length,), bool)
        logits = called(
            f"The classifier '{self.label}'",
            f"network(tokens, visible), both of shape {self.event_shape}",
            lambda: eqx.filter_eval_shape(self.network, tokens, visible),
            "it must accept one event (no batch axis) and what is visible of it.",
        )
        if len(jnp.shape(logits)) != 1:
            raise NetworkError(
                f"The classifier '{self.label}' returned shape {jnp.shape(logits)}; "
                "logits have shape (classes,).",
                fix="return one logit per class for one event.",
            )
        self.num_classes = int(jnp.shape(logits)[0])

    def over(self, event_shape: tuple[int, ...]) -> CategoricalClassifier:
        """Return the classifier; refuse events of another shape."""
        if self.event_shape != event_shape:
            raise ShapeError(
                f"Classifier '{self.label}' is for events {self.event_shape}, not "
                f"{event_shape}.",
                fix="multiply it with a factor over its events, or put a cp.window "
                "around it.",
            )
        return self

    @property
    def traits(self) -> Traits:
        return Traits(self.OFFERS | {"one_joint"}, "any", ("label",))

    def given(self, **conditions: object) -> LeafFactor:
        label = as_condition("label", conditions.get("label", 0))
        whole = label.ndim == 0 and jnp.issubdtype(label.dtype, jnp.integer)
        if not whole or not 0 <= int(label) < self.num_classes:
            raise InvalidValueError(
                f"Label {conditions['label']!r} does not exist: classifier "
                f"'{self.label}' has classes 0 to {self.num_classes - 1}.",
                fix="pass the class's index.",
            )
        return super().given(**conditions)

    def check_network(self) -> None:
        if "label" not in self.fixed:
            raise ConditionError(
                f"Classifier '{self.label}' has no label, so log p(label | x) is not "
                "defined.",
                fix="use cp.condition(f, classifier, label), or "
                "classifier.given(label=…).",
            )

    def log_potential(
        self, tokens: Array, visible: Array, conditions: Mapping[str, Array]
    ) -> Float[Array, ""]:
        logits = self.network(jnp.where(visible, tokens, 0), visible)
        return jax.nn.log_softmax(logits)[conditions["label"]]


def token_arguments(
    name: str, first: str, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, Any] | None:
    """Return the arguments of a factor of tokens, if a call of a class has any; refuse
    calls that have others beside them.

    Args:
        name: of the class.
        first: the name of its first argument.
        args, kwargs: of the call.
    """
    if not {"length", "num_values"} & kwargs.keys():
        return None
    given = dict(kwargs)
    if args:
        given[first] = args[0]
    known = {first, "length", "num_values", "label"}
    if len(args) > 1 or not given.keys() <= known or len(given) < 3:
        raise WrongTypeError(
            f"{name} of tokens takes {first}, length=, num_values= and label=, and "
            "no schedule: its levels are the positions that become visible.",
            fix=f"write cp.{name}({first}, length=8, num_values=4).",
        )
    return {"label": "", **given}


def is_discrete(distribution: object) -> bool:
    """Return whether a NumPyro distribution is one of independent categorical
    entries."""
    categorical = (dist.CategoricalProbs, dist.CategoricalLogits)
    binary = (dist.BernoulliProbs, dist.BernoulliLogits)
    return isinstance(_base(distribution), (*categorical, *binary))


def _base(distribution: Any) -> Any:
    """The distribution without what expands it or makes events of it."""
    while isinstance(distribution, (dist.Independent, dist.ExpandedDistribution)):
        distribution = distribution.base_dist
    return distribution


def _logits(distribution: Any) -> Float[Array, "*batch values"]:
    """The logits of independent categorical entries; of those of Bernoulli's, for 0 and
    1."""
    base = _base(distribution)
    if isinstance(base, (dist.CategoricalProbs, dist.CategoricalLogits)):
        return base.logits
    return jnp.stack([jnp.zeros_like(base.logits), base.logits], axis=-1)


def _log_probabilities(probs: ArrayLike, what: str) -> Float[Array, "*rows values"]:
    """Logarithms of probabilities along the last axis, normalised."""
    try:
        array = jnp.asarray(probs, jnp.result_type(float))
    except (TypeError, ValueError) as error:
        raise WrongTypeError(
            f"{what} must be an array; got {type(probs).__name__}.",
            fix="pass probabilities along the last axis.",
        ) from error
    if not bool(jnp.all(array >= 0)) or not bool(jnp.all(jnp.sum(array, -1) > 0)):
        raise InvalidValueError(
            f"{what} are negative, NaN or all 0.",
            fix="pass probabilities along the last axis.",
        )
    return jnp.log(array / jnp.sum(array, -1, keepdims=True))


def _chosen(
    logs: Float[Array, "length values"], tokens: Int[Array, " length"]
) -> Float[Array, " length"]:
    """The entry of each position's token."""
    return jnp.take_along_axis(logs, tokens[:, None], axis=1)[:, 0]


def _path_sum(logs: Float[Array, "length values"], query: Query) -> Float[Array, ""]:
    """The sum over visible positions of the entries of their tokens."""
    return jnp.sum(jnp.where(query.visible, _chosen(logs, query.tokens), 0.0))


def check_outputs(
    factor: Any, name: str, second: object, outputs: str, number: str = ""
) -> None:
    """Refuse a network of tokens that cannot be called with one event, or returns
    another shape than (length, num_values).

    Args:
        factor: has the network, and the ``names`` of its conditions.
        name: of the network's second argument.
        second: that argument, without numbers.
        outputs: what the network returns.
        number: what it takes beside one event and its conditions.
    """
    tokens = jax.ShapeDtypeStruct((factor.length,), jnp.int32)
    missing = [n for n in factor.names if n not in factor.fixed]
    # A network may have a default for a condition; one without it says so itself.
    fix = f"it must accept one event (no batch axis){number} and the conditions."
    if missing:
        fix = f"give its conditions: f.given({missing[0]}=…)."
    returned = called(
        f"The network of '{factor.label}'",
        f"network(tokens, {name}) with tokens of shape {factor.event_shape}",
        lambda: eqx.filter_eval_shape(
            factor.network, tokens, second, **factor.call_conditions()
        ),
        fix,
    )
    wanted = (factor.length, factor.num_values)
    if jnp.shape(returned) != wanted:
        raise NetworkError(
            f"The network of '{factor.label}' returned shape {jnp.shape(returned)}; "
            f"{outputs} have shape {wanted}.",
            fix="return one number for each position and value.",
        )


def network_of_tokens(network: object, label: str) -> Network:
    """The network of a factor; refuse weights that are not finite."""
    return check_finite(as_network(network), f"The network of factor '{label}'")


def name_of(function: object) -> str:
    """The name of a function, or of the class of a network."""
    return getattr(function, "__name__", type(function).__name__).strip("<>")


def shape_of(length: object) -> tuple[int, ...]:
    """The shape of an event of so many tokens."""
    return (check_count(length, "length"),)
