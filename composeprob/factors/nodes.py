"""The nodes of expressions that combine factors, for the user's expressions and for the
compiler's."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from composeprob.factors import show
from composeprob.factors.factor import Factor, LeafFactor
from composeprob.text import clipped

Value = TypeVar("Value")
SETS = "sets of cells"
"""Name, among the conditions of a `Plate`, of a window's sets of cells."""


@dataclasses.dataclass(frozen=True)
class Plate:
    """n values of conditions, such as n observations: a factor in a plate stands for n
    factors.

    Attributes:
        names: the conditions; first `SETS` where the factor sees n sets of cells.
        count: n.
        block: how many of the n are evaluated at once; None for all.
    """

    names: tuple[str, ...]
    count: int
    block: int | None = None

    @property
    def cells(self) -> bool:
        """True if it runs over sets of cells."""
        return self.names[0].startswith(SETS)


class Combination(Factor):
    """Factors with a number for each, such as its power.

    Attributes:
        factors: the f_i; over data one factor, each leaf of which that has the
            conditions holds all n values of them, along a leading axis.
        numbers: floats, one for each f_i, over data one for each of the n.
        plate: the data that it runs over; None where it runs over none.
        calibrated: whether it integrates to 1 at every level, by a mixture's shares or
            a product's normaliser.
    """

    factors: tuple[Factor, ...]
    numbers: tuple[float, ...] = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)
    plate: Plate | None = eqx.field(static=True, default=None)
    calibrated: bool = eqx.field(static=True, default=False)

    sign: ClassVar[str]
    """Sign between the factors where the expression is drawn."""

    @property
    def children(self) -> tuple[Factor, ...]:
        return self.factors

    def with_children(self, children: tuple[Factor, ...]) -> Factor:
        return dataclasses.replace(self, factors=children)

    @property
    def normalised(self) -> bool:
        return self.calibrated

    def each(self, values: Sequence[Value]) -> list[tuple[float, Value]]:
        """Pair each number with its factor's value; in a plate all numbers with the one
        value."""
        if self.plate is None:
            repeats = 1
        else:
            repeats = self.plate.count
        return list(zip(self.numbers, [*values] * repeats, strict=True))

    def given(self, **conditions: object) -> Factor:
        """Give conditions to every leaf that has them; the first leaf refuses a name
        that no leaf has."""
        names = condition_names(self)
        unknown = {
            name: value for name, value in conditions.items() if name not in names
        }
        if unknown:
            leaves(self)[0].given(**unknown)  # raises the error

        def with_its_conditions(factor: Factor) -> Factor:
            names = condition_names(factor)
            return factor.given(
                **{name: value for name, value in conditions.items() if name in names}
            )

        return self.with_children(tuple(map(with_its_conditions, self.factors)))

    def terms(self) -> list[tuple[str, float]]:
        if self.plate is None:
            return self._terms()
        values = {
            name: value for leaf in leaves(self) for name, value in leaf.fixed.items()
        }
        # Sets of cells are not a condition of any leaf.
        names = [name for name in self.plate.names if name in values]
        shapes = ", ".join(f"{name!r}: {jnp.shape(values[name])}" for name in names)

        def without_columns(leaf: LeafFactor) -> LeafFactor:
            return leaf.holding(
                {name: value for name, value in leaf.fixed.items() if name not in names}
            )

        factor = rewrite_leaves(self.factors[0], without_columns)
        arguments = [
            clipped(show.formula(factor.terms()), 80),
            f"over={{{shapes}}}",
        ]
        if self._shown():
            arguments.append(self._shown())
        if self.plate.block is not None:
            arguments.append(f"block={self.plate.block}")
        # As the user wrote it: cp.product(f, over={'y': (90,)}).
        function = f"cp.{type(self).__name__.lower()}"
        return [(f"{function}({', '.join(arguments)})", 1.0)]

    @abstractmethod
    def _terms(self) -> list[tuple[str, float]]:
        """`terms` of a combination that does not run over data."""

    def _shown(self) -> str:
        """Text of the numbers, for nodes that print them apart from the factors."""
        return ""

    @abstractmethod
    def edge(self, number: float) -> str:
        """Label of the edge to a factor with this number, in a drawing."""


class Growth(eqx.Module):
    r"""Exponents that grow as noise falls,

    $$w_k = e + \frac{w - e}{1 + \kappa\,s_k},$$

    with s_k = σ²/α² of level k less that of level 0, where they are w. With e = 1 and κ
    = w this is w(c + s)/(c + w·s) at c = 1: for a Gaussian f of variance c the power
    f_k^{w_k} is the noised power f^w. As in `fixed_control` c = 1 stands for all data.

    Attributes:
        start: e, where there is only noise.
        power: w.
        sharpness: κ.
        clean: σ²/α² of level 0, a scalar.
        growing: indices of the factors with e ≠ w.
        tracked: those among them whose log-densities chains carry.
    """

    start: Float[Array | np.ndarray, " n"]
    power: Float[Array | np.ndarray, " n"]
    sharpness: Float[Array | np.ndarray, " n"]
    clean: Float[Array | np.ndarray, ""]
    growing: tuple[int, ...] = eqx.field(static=True)
    tracked: tuple[int, ...] = eqx.field(static=True, default=())

    def __call__(
        self, variance: Float[Array | np.ndarray, ""]
    ) -> Float[Array | np.ndarray, " n"]:
        """Return w_k at σ²/α² of the level."""
        # The formula above, written so that level 0 has exactly w.
        noisy = self.sharpness * (variance - self.clean)
        return self.power + (self.start - self.power) * (noisy / (1 + noisy))

    def at(self, places: list[int]) -> Growth | None:
        """Return the growth of some of the factors; None where none of their exponents
        grow."""
        growing = tuple(j for j, i in enumerate(places) if i in self.growing)
        if not growing:
            return None
        tracked = tuple(j for j, i in enumerate(places) if i in self.tracked)
        rows = np.array(places)
        return Growth(
            self.start[rows],
            self.power[rows],
            self.sharpness[rows],
            self.clean,
            growing,
            tracked,
        )

    def slope(
        self, variance: Float[Array | np.ndarray, ""]
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Return w_k and dw_k/ds at σ²/α² of the level."""
        variance = jnp.asarray(variance)
        # A tangent of 1 in s gives dw/ds.
        return jax.jvp(self, (variance,), (jnp.ones_like(variance),))


class Product(Combination):
    """Π_i f_i(x)^{w_i}, the numbers its powers; negative ones divide.

    Attributes:
        growth: how the exponents come to be the powers; None where they are the powers
            at every level. Set by `grow`.
    """

    growth: Growth | None = None

    sign: ClassVar[str] = "×"

    @property
    def powers(self) -> tuple[float, ...]:
        """The w_i."""
        return self.numbers

    @property
    def normalised(self) -> bool:
        return self.calibrated or (
            self.numbers == (1.0,) and self.factors[0].normalised
        )

    def split(self) -> list[tuple[Factor, float]]:
        if self.plate:
            return [(self, 1.0)]
        return list(zip(self.factors, self.numbers, strict=True))

    def _terms(self) -> list[tuple[str, float]]:
        return [
            (name, w * inner)
            for w, factor in self.each(self.factors)
            for name, inner in factor.terms()
        ]

    def edge(self, number: float) -> str:
        return "" if number == 1.0 else f"^{number:.3g}"


class Mixture(Combination):
    """Σ_i exp(l_i)·f_i(x), the numbers its log-weights.

    Attributes:
        total: the sum of the shares as they were given.
    """

    total: float = eqx.field(static=True, default=1.0)

    sign: ClassVar[str] = "+"

    @property
    def log_weights(self) -> tuple[float, ...]:
        """The l_i."""
        return self.numbers

    @property
    def sealed(self) -> bool:
        return not self.calibrated

    def _terms(self) -> list[tuple[str, float]]:
        parts = [show.formula(factor.terms()) for factor in self.factors]
        return [(show.mixture(parts, self._shown()), 1.0)]

    def _shown(self) -> str:
        if self.calibrated:
            return show.weights("weights", [math.exp(w) for w in self.numbers])
        return show.weights("log_weights", self.numbers)

    def edge(self, number: float) -> str:
        return f"log w = {number:.3g}"


def joined(terms: Sequence[tuple[Factor, float]]) -> Factor | None:
    """Return the product of these (factor, power) pairs; None for an empty one."""
    if not terms:
        return None
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    factors, powers = zip(*terms, strict=True)
    return Product(factors=factors, numbers=powers, event_shape=factors[0].event_shape)


def part(node: Factor, chosen: Sequence[bool]) -> Factor | None:
    """Return the product of the chosen (factor, power) pairs of `Factor.split`; None
    for an empty one."""
    if all(chosen):
        return node
    places = [i for i, is_chosen in enumerate(chosen) if is_chosen]
    if not places:
        return None
    node = cast(Product, node)  # other nodes are one pair, which is chosen or not
    factors = tuple(node.factors[i] for i in places)
    powers = tuple(node.powers[i] for i in places)
    # Factors that do not grow are a product like the user's.
    growth = None if node.growth is None else node.growth.at(places)
    if growth is None:
        return joined(list(zip(factors, powers, strict=True)))
    return dataclasses.replace(node, factors=factors, numbers=powers, growth=growth)


def at_noise(node: Factor, variance: float) -> Factor:
    """Return the expression with the exponents that it has at a level of this
    σ²/α²."""
    if not node.children:
        return node
    children = tuple(at_noise(child, variance) for child in node.children)
    node = node.with_children(children)
    growth = growth_of(node)
    if growth is None:
        return node
    powers = tuple(growth(np.asarray(variance)).tolist())
    return dataclasses.replace(cast(Product, node), numbers=powers, growth=None)


def growth_of(node: Factor) -> Growth | None:
    """Growth of a node's exponents; None where they do not grow."""
    return getattr(node, "growth", None)


def plate_of(node: Factor) -> Plate | None:
    """Plate of a node: the data, or sets of cells, that it runs over; None where it
    does not run over any."""
    return getattr(node, "plate", None)


def walk(node: Factor) -> Iterator[Factor]:
    """Yield a node and everything below it, left to right."""
    yield node
    for child in node.children:
        yield from walk(child)


def leaves(factor: Factor) -> list[LeafFactor]:
    """Every leaf of an expression, left to right."""
    return [node for node in walk(factor) if isinstance(node, LeafFactor)]


def condition_names(factor: Factor) -> list[str]:
    """Names of the conditions of an expression's leaves, each once."""
    names: dict[str, None] = {}  # a set in the order of insertion
    for leaf in leaves(factor):
        names.update(dict.fromkeys(leaf.traits.conditions))
    return list(names)


def rewrite_leaves(node: Factor, rewrite: Callable[..., Factor]) -> Factor:
    """Return the expression with every leaf replaced by its rewritten form."""
    if not node.children:
        return rewrite(node)
    children = tuple(rewrite_leaves(child, rewrite) for child in node.children)
    return node.with_children(children)
