"""Passes over expressions: a property of expressions, and for each kind of node the
rule that computes it."""

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
    """A property of expressions, computed from the leaves up: ``rule(node, values of
    its children, *context)``.

    Calling a pass folds an expression. Passes that go from the top down look their
    rules up with `rule_for`, and state where they are made which arguments their rules
    take.

    Args:
        name: the name of the pass.
        default: the rule of kinds of nodes that have none of their own; without it they
            are refused.

    Attributes:
        rules: the rules by kind of node. A kind without one has that of the class that
            it is derived from.
    """

    def __init__(self, name: str, default: Callable[..., Value] | None = None):
        self.name = name
        self.default = default
        self.rules: dict[type, Callable[..., Value]] = {}
        PASSES[name] = self

    def rule(self, *kinds: type) -> Callable[[Rule], Rule]:
        """Decorate the rule of these kinds of nodes."""

        def register(rule: Rule) -> Rule:
            self.rules.update(dict.fromkeys(kinds, rule))  # type: ignore[arg-type]
            return rule

        return register

    def rule_for(self, node: Factor) -> Callable[..., Value]:
        """Return the rule of a node's kind; refuse a kind without a rule."""
        for kind in type(node).__mro__:
            if kind in self.rules:
                return self.rules[kind]
        if self.default is None:
            name = type(node).__name__
            raise VerificationError(
                f"The pass '{self.name}' has no rule for a {name}.",
                fix=f"decorate one with @PASSES['{self.name}'].rule({name}), of "
                "composeprob.factors.passes.",
            )
        return self.default

    def __call__(self, node: Factor, *context: object) -> Value:
        # Looked up first, so that a node without a rule is refused before its children.
        rule = self.rule_for(node)
        values = [self(child, *context) for child in node.children]
        return rule(node, values, *context)
