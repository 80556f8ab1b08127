"""Boolean formulas over the attributes that classifiers know, as a factor."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import keyword
import math
import operator
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from composeprob import tuning
from composeprob.errors import InvalidValueError, WrongTypeError, a_kind
from composeprob.factors.classifier import Classifier
from composeprob.factors.factor import LeafFactor, Traits, check_conditions
from composeprob.schedule import Noise

GRAMMAR = "A formula has names, & (and), | (or), ~ (not) and parentheses."

INSTEAD: dict[type[ast.AST], str] = {
    ast.And: "write & for `and`, with parentheses around what it joins.",
    ast.Or: "write | for `or`, with parentheses around what it joins.",
    ast.Not: "write ~ for `not`.",
    ast.BitXor: "write (a & ~b) | (~a & b) for one of the two.",
    ast.Sub: "write a & ~b for `a - b`.",
    ast.Add: "write a | b for `a + b`.",
    ast.Mult: "write a & b for `a * b`.",
}
"""Fixes for operators that are not of the grammar."""


class Axis(NamedTuple):
    """One independent variable of a formula: the class that a classifier gives.

    Attributes:
        head: the classifier, without a label.
        truths: for each name that it decides, whether that is true of each class.
    """

    head: Classifier
    truths: dict[str, Bool[np.ndarray, " classes"]]


class Formula(LeafFactor):
    """log f(x, k) = log P(φ | x, k) of a Boolean formula φ over attributes.

    The attributes are independent given x_k, so that P(φ | x) is the sum, over the
    assignments a that satisfy φ, of Π_i p(a_i | x). `cp.condition` makes one.

    Attributes:
        heads: the classifiers of the independent variables, without labels.
        satisfied: whether φ is true, for each combination of the variables' classes.
    """

    heads: tuple[Classifier, ...]
    satisfied: Bool[Array, "*classes"]

    def __init__(
        self,
        heads: Mapping[str, Classifier],
        text: str,
        event_shape: tuple[int, ...],
    ):
        parsed = Parsed.from_text(text, heads)
        axes: list[Axis] = []
        for name in parsed.names():
            _add(axes, name, heads[name].over(event_shape))
        satisfied = _table(parsed, axes)
        self.schedule = axes[0].head.schedule
        self.event_shape = event_shape
        self.fixed = {}
        self.label = f"P({parsed.text})"
        self.heads = tuple(axis.head for axis in axes)
        self.satisfied = jnp.asarray(satisfied)

    @property
    def traits(self) -> Traits:
        of_heads = [head.traits for head in self.heads]
        levels = of_heads[0].levels
        for traits in of_heads:
            # A head that has only the levels of its schedule binds all of them.
            if traits.levels == "own":
                levels = "own"
        return Traits(Traits.ENERGY | {"mode_depth"}, levels, top_power=0.0)

    def given(self, **conditions: object) -> LeafFactor:
        check_conditions(self, conditions)
        return self

    def evaluate(
        self, x: Float[Array, "*event"], noise: Noise, conditions: Mapping[str, Array]
    ) -> tuple[Float[Array, ""] | None, Float[Array, "*event"]]:
        def log_probability(point: Array) -> Array:
            # The table of log-probabilities of all combinations of classes.
            table = jnp.zeros(())
            for head in self.heads:
                of_head = jax.nn.log_softmax(head.logits(point, noise))
                table = table[..., None] + of_head
            return jax.nn.logsumexp(table, where=self.satisfied)

        return jax.value_and_grad(log_probability)(x)


def _table(parsed: Parsed, axes: list[Axis]) -> Bool[np.ndarray, "*classes"]:
    """Return whether a formula is true, for each combination of its axes' classes;
    refuse too many of them, and a formula that is true of none."""
    shape = tuple(axis.head.num_classes for axis in axes)
    count = math.prod(shape)
    if count > tuning.MOST_ASSIGNMENTS:
        raise InvalidValueError(
            f"The formula {parsed.text!r} has {count:,} assignments of its "
            f"attributes, and the sum over them at most {tuning.MOST_ASSIGNMENTS:,}.",
            fix="where a & b share no attribute, condition on one after the other: "
            "cp.condition(cp.condition(f, heads, 'a'), heads, 'b').",
        )
    truths = {}
    for number, axis in enumerate(axes):
        along = [1] * len(axes)
        along[number] = -1
        for name, truth in axis.truths.items():
            truths[name] = truth.reshape(along)
    satisfied = np.broadcast_to(parsed.truth(truths), shape)
    if not satisfied.any():
        raise InvalidValueError(
            f"No assignment satisfies the formula {parsed.text!r}: its probability is "
            "0 at every x.",
            fix="look for an attribute beside its own negation, or for two classes of "
            "one classifier joined by &.",
        )
    return satisfied


def _add(axes: list[Axis], name: str, head: Classifier) -> None:
    """Add an attribute to the axes: to that of the same network, if there is one, else
    on an axis of its own; refuse a head on other levels than the first's."""
    if "label" not in head.fixed and head.num_classes != 2:
        raise _not_binary(name, head)
    label = int(head.fixed.get("label", 1))
    truth = np.arange(head.num_classes) == label
    bare = head.holding({})
    for axis in axes:
        if _same_network(axis.head, bare):
            # Classes of one classifier exclude each other: they are one variable.
            axis.truths[name] = truth
            return
    if axes and not _same_levels(axes[0].head, head):
        raise InvalidValueError(
            f"The heads {next(iter(axes[0].truths))!r} and {name!r} were trained on "
            "different schedules.",
            fix="train the heads of one formula on one schedule, or condition on one "
            "after the other: cp.condition(cp.condition(f, a, 'a'), b, 'b').",
        )
    axes.append(Axis(bare, {name: truth}))


def _same_network(a: Classifier, b: Classifier) -> bool:
    """Return whether two heads are one classifier, of which only the label differs."""
    arrays, structure = jax.tree.flatten((a.network, a.schedule))
    others, other_structure = jax.tree.flatten((b.network, b.schedule))
    if (structure, a.time) != (other_structure, b.time):
        return False
    return all(map(operator.is_, arrays, others))


def _same_levels(a: Classifier, b: Classifier) -> bool:
    """Return whether two heads were trained on the same levels."""
    mine = np.stack([a.schedule.alpha, a.schedule.sigma])
    other = np.stack([b.schedule.alpha, b.schedule.sigma])
    return mine.shape == other.shape and bool(np.allclose(mine, other, rtol=1e-5))


def _not_binary(name: str, head: Classifier) -> InvalidValueError:
    """Return the error for a head of other than two classes, without a label."""
    fix = (
        "say which class it means: give the classifier its event_shape, and write "
        f"{{{name!r}: classifier.given(label=…)}}."
    )
    if head.num_classes == 1:
        fix = "return the logits of both: jnp.stack([jnp.zeros_like(z), z])."
    return InvalidValueError(
        f"The head {name!r} has {head.num_classes} classes, so it is neither true nor "
        "false.",
        fix=fix,
    )


def check_heads(heads: Mapping[str, object]) -> None:
    """Refuse heads that are not binary classifiers under names of a formula."""
    for name, head in heads.items():
        is_name = isinstance(name, str) and name.isidentifier()
        if not is_name or keyword.iskeyword(name):
            raise InvalidValueError(
                f"The head {name!r} has a name that a formula cannot spell.",
                fix="name it by letters, digits and _, as a variable.",
            )
        if not isinstance(head, Classifier):
            raise WrongTypeError(
                f"The head {name!r} must be a cp.Classifier; got {a_kind(head)}.",
                fix="wrap its network: cp.Classifier(network, schedule).",
            )


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A formula's text, in one line, and its syntax tree."""

    text: str
    tree: ast.expr
    known: tuple[str, ...]  # names of heads

    @classmethod
    def from_text(cls, text: str, known: Iterable[str]) -> Parsed:
        """Parse a formula; refuse syntax that is not Python's, or not of its
        grammar."""
        line = re.sub(r"\s", " ", text).strip()
        try:
            tree = ast.parse(line, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            start = getattr(error, "offset", 1)
            if not start:  # Python shows nothing where the text ends too early
                start = len(line) + 1
            end = getattr(error, "end_offset", None) or start + 1
            problem = getattr(error, "msg", "it is nested too deeply")
            raise _refused(
                line, start - 1, end - 1, f"cannot be read: {problem}", GRAMMAR
            ) from error
        parsed = cls(line, tree, tuple(known))
        parsed.names()
        return parsed

    def names(self) -> list[str]:
        """Return the names in the formula, each once, in the order of the text."""
        found: dict[str, None] = {}
        waiting = [self.tree]
        while waiting:
            node = waiting.pop()
            match node:
                case ast.Name(id=name):
                    self._check_name(node, name)
                    found[name] = None
                case ast.BinOp(op=ast.BitAnd() | ast.BitOr(), left=left, right=right):
                    waiting += [right, left]
                case ast.UnaryOp(op=ast.Invert(), operand=operand):
                    waiting.append(operand)
                case _:
                    raise self._refused(node)
        return list(found)

    def truth(self, truths: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the truth under every assignment, from that of the names."""
        # On a stack of its own: a sum of a thousand terms is nested as deeply.
        values: list[np.ndarray] = []
        waiting: list[tuple[ast.AST, bool]] = [(self.tree, False)]
        while waiting:
            node, operands_known = waiting.pop()
            if isinstance(node, ast.Name):
                values.append(truths[node.id])
            elif operands_known:
                values.append(_combined(node, values))
            else:
                waiting.append((node, True))
                for operand in ast.iter_child_nodes(node):
                    if isinstance(operand, ast.expr):
                        waiting.append((operand, False))
        return values.pop()

    def _check_name(self, node: ast.expr, name: str) -> None:
        if name in self.known:
            return
        close = difflib.get_close_matches(name, self.known, 1)
        fix = f"it has: {', '.join(self.known)}."
        if close:
            fix = f"did you mean {close[0]!r}? The heads are: {', '.join(self.known)}."
        raise _refused(
            self.text, *self._place(node), f"names {name!r}, which is no head", fix
        )

    def _refused(self, node: ast.expr) -> InvalidValueError:
        """Return the error for a node that is not of the grammar."""
        operation = getattr(node, "op", node)
        fix = INSTEAD.get(type(operation), GRAMMAR)
        text = ast.unparse(node)
        problem = f"has {text!r}, which is not of a formula's grammar"
        return _refused(self.text, *self._place(node), problem, fix)

    def _place(self, node: ast.expr) -> tuple[int, int]:
        """Return the columns where a node begins and ends."""
        # Python counts them in bytes.
        encoded = self.text.encode()
        begin = len(encoded[: node.col_offset].decode())
        end = len(encoded[: node.end_col_offset].decode())
        return begin, end


def _combined(node: ast.AST, values: list[np.ndarray]) -> np.ndarray:
    """Return the truth of an operation, whose operands are the last values."""
    last = values.pop()
    if isinstance(node, ast.UnaryOp):
        return ~last
    other = values.pop()
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return last & other
    return last | other


def _refused(
    text: str, begin: int, end: int, problem: str, fix: str
) -> InvalidValueError:
    """Return the error that shows a place in a formula."""
    carets = "^" * max(end - begin, 1)
    return InvalidValueError(
        f"The formula {problem}:\n    {text}\n    {' ' * begin}{carets}\n ", fix=fix
    )
