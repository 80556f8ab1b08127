"""Leaves of expressions at their places, and the program that holds them. Immutable;
passes return new ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import PyTreeDef
from jaxtyping import Float, Int

from composeprob.density.reward import SiteReward
from composeprob.factors.calibrated import (
    KNOTS,
    LOG_NORMALISER,
    CalibratedExpression,
    interpolate,
)
from composeprob.factors.categorical import num_values_of
from composeprob.factors.factor import Factor, LeafFactor, Traits
from composeprob.factors.nodes import Plate, walk
from composeprob.factors.window import Cells, Region
from composeprob.language.policies import Policy
from composeprob.rendering import renderer
from composeprob.schedule import Noise, Schedule


class Leaf(Factor):
    """A leaf factor at its place in a site.

    Attributes:
        factor: the leaf factor, with its conditions; those of a plate have its n values
            along a leading axis.
        event_shape: the site's.
        region: the part of the site that it sees; None for all of it.
        label: the factor's name in print-outs.
        conditions: its conditions, as print-outs show them: ``label=3``, or the latents
            that it depends on.
        own_noise: the noise of its own schedule at each of the program's levels, fields
            of shape (K,); None where the program's own levels apply. Set by `align`.
        slot: (group, member) of the batched evaluation that computes it. Set by
            `share`.
        latent: where the factor's parameters depend on static latents: the site, and
            the index of this leaf in the site's factor, by which the program is
            evaluated again under other values.
        plates: the plates whose conditions it has, the outermost first: it stands for
            as many factors as their counts multiply to, and is evaluated as one
            batch.
    """

    factor: LeafFactor
    event_shape: tuple[int, ...] = eqx.field(static=True)
    region: Region | Cells | None = eqx.field(static=True, default=None)
    label: str = eqx.field(static=True, default="")
    conditions: tuple[str, ...] = eqx.field(static=True, default=())
    own_noise: Noise | None = None
    slot: tuple[int, int] | None = eqx.field(static=True, default=None)
    latent: tuple[str, int] | None = eqx.field(static=True, default=None)
    plates: tuple[Plate, ...] = eqx.field(static=True, default=())

    @property
    def name(self) -> str:
        """Its print-out: ``digits(x | label=3)``."""
        return self.printed_at("x")

    def printed_at(self, place: str) -> str:
        """The leaf's print-out, with ``place`` instead of x."""
        if not self.conditions:
            return f"{self.label}({place})"
        return f"{self.label}({place} | {', '.join(self.conditions)})"

    @property
    def first(self) -> LeafFactor:
        """The factor under the first values of its plates."""
        # A condition has a leading axis for each of the plates that name it.
        axes = Counter(name for plate in self.plates for name in plate.names)
        return self.factor.holding(first(self.factor.fixed, axes))

    @property
    def averaged(self) -> int:
        """Number of the site's entries that one entry of the event averages."""
        return 1 if self.region is None else self.region.averaged

    @property
    def entries(self) -> Int[np.ndarray, " n"]:
        """The entries of the flattened site that it sees."""
        if self.region is None:
            return np.arange(math.prod(self.event_shape))
        return self.region.entries(self.event_shape)

    def given(self, **conditions: object) -> Leaf:
        return replace(self, factor=self.factor.given(**conditions))


class Normaliser(LeafFactor):
    """The constant c = 1/Z_k of a calibrated expression, a leaf that depends on the
    level alone.

    log c = −log Z(λ) + (G − d)·log α, with log Z in the coordinates x/α. Along dx = f·x
    dt + g dW a function c of the time alone has the rate r = −(f·d + ∂_t log c)/g², and
    dλ = −g²/σ² dt, so here r = −∂_λ log Z/σ² − (f/g²)·G. Thus it counts as a density of
    ``dimension`` = d − G entries that grows by `growth` = −∂_λ log Z.

    Attributes:
        knots: log-SNRs λ.
        log_normaliser: log Z at these.
        excess: G − d.
    """

    knots: Float[Array, " knots"]
    log_normaliser: Float[Array, " knots"]
    excess: float = eqx.field(static=True)

    def __init__(self, expression: CalibratedExpression):
        self.schedule = expression.schedule
        self.event_shape = expression.event_shape
        self.excess = expression.excess
        self.knots = expression.fixed[KNOTS]
        self.log_normaliser = expression.fixed[LOG_NORMALISER]
        self.fixed = {}
        self.label = "Z⁻¹"

    @property
    def traits(self) -> Traits:
        return Traits(
            Traits.EXACT, "any", top_power=0.0, dimension=-self.excess, constant=True
        )

    @property
    def top_constant(self) -> float:
        """The constant in log c = top_constant − ½·dimension·log(2πσ²) at the noisiest
        levels."""
        # log 2πσ² at the noisiest knot, where α = 1.
        width = np.log(2 * np.pi) - float(self.knots[0])
        return float(-self.log_normaliser[0] - 0.5 * self.excess * width)

    def growth(self, noise: Noise) -> Float[Array, ""]:
        """∂ log c/∂λ, where α is 1."""
        return jax.grad(self._log_constant)(noise.log_snr)

    def evaluate(
        self, x: Array, noise: Noise, conditions: Mapping[str, Array]
    ) -> tuple[Array | None, Array]:
        # From x/α to x.
        of_scale = self.excess * jnp.log(noise.alpha)
        return self._log_constant(noise.log_snr) + of_scale, jnp.zeros_like(x)

    def _log_constant(self, log_snr: Float[Array, ""]) -> Float[Array, ""]:
        """−log Z(λ)."""
        knots = jnp.asarray(self.knots, log_snr.dtype)
        log_normaliser = jnp.asarray(self.log_normaliser, log_snr.dtype)
        return -interpolate(knots, log_normaliser, log_snr)


@dataclass(frozen=True, eq=False)
class Site:
    """A noised site.

    Attributes:
        name: its name.
        root: its expression.
        shape: its value's.
        where: its place in the program.
        ancestral: True if its factor depends on latents that are held because its
            normaliser is unknown.
        plates: the number of leading axes that run over members of plates, which are
            independent given the latents.
    """

    name: str
    root: Factor
    shape: tuple[int, ...]
    where: str
    ancestral: bool = False
    plates: int = 0

    @property
    def num_values(self) -> int:
        """The number of values of a categorical site's tokens; 0 for others."""
        return max(num_values_of(leaf.factor) for leaf in leaves(self.root))


@dataclass(frozen=True, eq=False)
class Observation:
    """An observation.

    Attributes:
        name: its name.
        anneal: the policy that anneals it; None until `anneal` has settled it.
        depends_on: the latents in its distribution.
        looks_at: the noised sites that these follow, or are.
        distribution: its distribution's name.
        where: its place in the program.
    """

    name: str
    anneal: Policy | None
    depends_on: frozenset[str]
    looks_at: frozenset[str]
    distribution: str
    where: str

    @property
    def soft(self) -> bool:
        """True for soft evidence, a log-weight in the place of data: `cp.factor` and
        `numpyro.factor`."""
        return self.distribution == "Unit"

    @property
    def kind(self) -> str:
        """Its kind in print-outs."""
        return "soft evidence" if self.soft else f"observed {self.distribution}"


@dataclass(frozen=True, eq=False)
class Static:
    """A NumPyro latent.

    Attributes:
        name: its name.
        shape: its value's.
        coordinate: the shape of its unconstrained coordinate.
        distribution: its prior's name.
        where: its place in the program.
        standardised: True if the coordinate is standardised by the prior's location and
            scale, as these follow a noised site.
        num_values: the number of values of an entry that is discrete; 0 for others.
        summed: True if it is summed out of the density, and no part of a position.
    """

    name: str
    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    distribution: str
    where: str
    standardised: bool = False
    num_values: int = 0
    summed: bool = False


class Member(NamedTuple):
    """One use of a shared network: the site and region it reads, and its plates."""

    site: str
    region: Region | Cells | None
    plates: tuple[Plate, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of values of each plate."""
        return tuple(plate.count for plate in self.plates)

    @property
    def rows(self) -> int:
        """Number of evaluations that the member stands for."""
        return math.prod(self.counts)


class Group(eqx.Module):
    """One network with every use of it, evaluated as one batch.

    Attributes:
        factor: the leaf factor, without the conditions given to it.
        own_noise: its own noise at each level of the program, fields (K,); None for the
            program's own.
        conditions: those of each member, with an axis for each of its plates in front.
        members: its uses.
        latent: as for `Leaf`: the factor is then what it was when the program was
            compiled.
    """

    factor: LeafFactor
    own_noise: Noise | None
    conditions: tuple[dict[str, Array], ...]
    members: tuple[Member, ...] = eqx.field(static=True)
    latent: tuple[str, int] | None = eqx.field(static=True, default=None)

    @property
    def rows(self) -> int:
        """The number of evaluations in the batch."""
        return sum(member.rows for member in self.members)

    @property
    def first(self) -> dict[str, Array]:
        """The conditions of one evaluation."""
        conditions = self.conditions[0]
        axes = dict.fromkeys(conditions, len(self.members[0].plates))
        return first(conditions, axes)


@dataclass(frozen=True, eq=False)
class Graph:
    """A whole program.

    Attributes:
        name: the program's name.
        sites: the noised sites.
        statics: the NumPyro latents.
        observations: the observed sites.
        schedule: the levels in use; set by `align`.
        groups: the batched evaluations; set by `share`.
        notes: a note of what each pass did, ``(pass, sentence)``.
        where: the place of the program's definition.
        dims: the plates along the axes of each statement's value, None where an axis is
            no plate's.
        held: static sites that keep their prior draws, as the ancestral sites need it.
        given: those of them whose values an earlier result gives, as data depend on
            them.
        doubts: what `check` flags as strange, though not wrong for certain; a run's
            status repeats it.
        rewards: criteria without a gradient, which no pass and no evaluation sees.
    """

    name: str
    sites: tuple[Site, ...]
    statics: tuple[Static, ...]
    observations: tuple[Observation, ...]
    schedule: Schedule | None
    groups: tuple[Group, ...]
    notes: tuple[tuple[str, str], ...]
    where: str
    dims: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    held: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()
    doubts: tuple[str, ...] = ()
    rewards: tuple[SiteReward, ...] = ()

    @property
    def levels(self) -> Schedule:
        """The levels, once they are chosen."""
        assert self.schedule is not None
        return self.schedule

    @property
    def formula(self) -> str:
        """The density at level k, such as ``π_k(x) ∝ ring(x)·bar(x)``."""
        # Here, as `render` imports this module.
        from composeprob.ir.render import headline

        return headline(self)

    def dot(self) -> str:
        """Graphviz source of the program."""
        return renderer().graph_source(self)

    def _repr_html_(self) -> str:
        return renderer().graph_html(self)

    def map_roots(self, rewrite: Callable[[Factor, Site], Factor]) -> Graph:
        """Rewrite the expression of every noised site."""
        sites = [replace(site, root=rewrite(site.root, site)) for site in self.sites]
        return replace(self, sites=tuple(sites))

    def noted(self, pass_name: str, sentence: str) -> Graph:
        """The same graph, with a note of what a pass did."""
        return replace(self, notes=(*self.notes, (pass_name, sentence)))


def leaves(node: Factor) -> list[Leaf]:
    """The leaves below a node, left to right."""
    return [inner for inner in walk(node) if isinstance(inner, Leaf)]


def dimension_of(factor: LeafFactor) -> float:
    """Number of entries over which a leaf factor is a density."""
    stated = factor.traits.dimension
    if stated is not None:
        return stated
    return float(math.prod(factor.event_shape))


def same_network(a: LeafFactor, b: LeafFactor) -> bool:
    """Return whether two leaves are one factor up to the conditions given to them: same
    structure, the same arrays."""
    return a is b or _identity(a) == _identity(b)


# Arrays are compared by identity, without reading them from a device: a network loaded
# twice counts as two.
def _identity(factor: LeafFactor) -> tuple[PyTreeDef, tuple[int, ...]]:
    arrays, treedef = jax.tree.flatten(factor.holding({}))
    return treedef, tuple(id(array) for array in arrays)


def same_leaf(a: Leaf, b: Leaf) -> bool:
    """Return whether two leaves are the same function of the same site."""
    # The latent counts, as conditions that are latents may be equal by chance.
    same_place = (a.region, a.latent, a.plates) == (b.region, b.latent, b.plates)
    return same_place and same_factor(a.factor, b.factor)


def same_factor(a: LeafFactor, b: LeafFactor) -> bool:
    """Return whether two leaf factors are the same function: one network under the same
    conditions."""
    if not same_network(a, b):
        return False
    return same_conditions(a.call_conditions(), b.call_conditions())


def same_conditions(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    """Return whether conditions have the same names and values."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def first(conditions: Mapping[str, Array], axes: Mapping[str, int]) -> dict[str, Array]:
    """The conditions at the first value of each plate; ``axes`` counts the leading
    axes of each condition that run over plates."""
    firsts = dict(conditions)
    for name, value in conditions.items():
        if axes[name]:
            firsts[name] = value[(0,) * axes[name]]
    return firsts


def spread(
    conditions: Mapping[str, Array], plates: tuple[Plate, ...]
) -> dict[str, Array]:
    """The conditions with an axis for every plate in front, also those that do not run
    over it."""
    if not plates:
        return dict(conditions)
    return {name: _broadcast(name, value, plates) for name, value in conditions.items()}


def _broadcast(name: str, value: Array, plates: tuple[Plate, ...]) -> Array:
    """One condition with an axis for every plate in front."""
    counts = []
    leading = []  # of size 1 for a plate that does not run over the condition
    for plate in plates:
        counts.append(plate.count)
        if name in plate.names:
            leading.append(plate.count)
        else:
            leading.append(1)
    axes = sum(name in plate.names for plate in plates)
    event = jnp.shape(value)[axes:]
    in_plates = jnp.reshape(value, (*leading, *event))
    return jnp.broadcast_to(in_plates, (*counts, *event))
