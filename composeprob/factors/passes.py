"""Passes over expressions: a question, and for each kind of node the rule that answers
it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from composeprob.errors import VerificationError
from composeprob.factors.factor import Factor

Value = TypeVar("Value")
Rule = TypeVar("Rule", bound=Callable[..., object])
PASSES: dict[str, Pass] = {}
"""Every pass by its name."""


class Pass(Generic[Value]):
    """What an expression is worth, from the leaves up: ``rule(node, values of its
    children, *context)``.

    Calling a pass folds an expression. Passes that go from the top down look their
    rules up with `rule_for`, and state where they are made which arguments their rules
    take.

    Args:
        name: how the pass is called.
        default: the rule of kinds of nodes that have none of their own; without it they
            are refused.

    Attributes:
        rules: the rules by kind of node. A kind without one has that of the class that
            it is derived from.
    """

    def __init__(self, name: str, default: Callable[..., Value] | None = None):
        self.name, self.default = name, default
        self.rules: dict[type, Callable[..., Value]] = {}
        PASSES[name] = self

    def rule(self, *kinds: type) -> Callable[[Rule], Rule]:
        """Decorates the rule of these kinds of nodes."""

        def register(rule: Rule) -> Rule:
            self.rules.update(dict.fromkeys(kinds, rule))  # type: ignore[arg-type]
            return rule

        return register

    def rule_for(self, node: Factor) -> Callable[..., Value]:
        """The rule of a node; refuses one that has none."""
        kinds = type(node).__mro__
        found = next(
            (self.rules[kind] for kind in kinds if kind in self.rules), self.default
        )
        if found is None:
            raise VerificationError(
                f"The pass '{self.name}' has no rule for a {type(node).__name__}.",
                fix=f"decorate one with @PASSES['{self.name}'].rule({type(node).__name__}), of composeprob.factors."
                "passes.",
            )
        return found

    def __call__(self, node: Factor, *context: object) -> Value:
        return self.rule_for(node)(
            node, [self(child, *context) for child in node.children], *context
        )
