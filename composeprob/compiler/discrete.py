"""Discrete latents that are summed out of a density, and their draws given the rest.

Where the entries of a discrete latent z are independent given all other latents θ,

    p(θ, y) = p(θ) ∏_i Σ_v p(z_i = v | θ)·p(y_i | z_i = v, θ),

the sum costs one evaluation of the statements that depend on z for each value, whatever
the number of entries. Chains move θ under this density, and z is drawn from
p(z | θ, y), which is known exactly: a Gibbs sampler whose moves of θ do not wait for z
(van Dyk and Park 2008, *Partially collapsed Gibbs samplers*).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key
from numpyro.distributions import Distribution

from composeprob import tuning
from composeprob.compiler.latents import Dependencies
from composeprob.language.finite import Values, is_discrete, values_of
from composeprob.language.interpret import Statement, soft

Statements = Mapping[str, Statement]
Run = Callable[[Callable[[str, str, Distribution], Array]], dict[str, Statement]]
"""The program as a function of what provides the values of its latents."""


@dataclass(frozen=True)
class Summed:
    """Discrete latents that are summed out together, as a statement depends on all of
    them.

    Attributes:
        sites: their names.
        values: the values of an entry of each.
        plates: the plate along each of their axes.
        shape: their shape, the same for all of them.
        statements: the sites and all statements that depend on them.
        latents: those of them that are priors of latents.
    """

    sites: tuple[str, ...]
    values: tuple[Values, ...]
    plates: tuple[str | None, ...]
    shape: tuple[int, ...]
    statements: tuple[str, ...]
    latents: frozenset[str]

    @property
    def num_values(self) -> int:
        """Number of joint values of one entry of all sites."""
        return math.prod(values.number for values in self.values)

    def codes(self, joint: Int[Array, "*shape"]) -> dict[str, Int[Array, "*shape"]]:
        """Return the index of each site's value from that of the joint value."""
        counts = tuple(values.number for values in self.values)
        indices = jnp.unravel_index(joint, counts)
        return dict(zip(self.sites, indices, strict=True))

    def terms(
        self, statements: Statements, power: Callable[[str], Array | float | None]
    ) -> Float[Array, "*shape"]:
        """Return Σ power·log p over this group's statements, for each entry; statements
        whose power is None are left out."""
        total = jnp.zeros(self.shape, jnp.result_type(float))
        for name in self.statements:
            exponent = power(name)
            if exponent is not None:
                total = total + exponent * self._by_entry(statements[name])
        return total

    def _by_entry(self, statement: Statement) -> Float[Array, "*shape"]:
        """Return log p of a statement, summed over the axes that the sites lack."""
        log_p = statement.distribution.log_prob(statement.value)
        if statement.scale is not None:
            log_p = statement.scale * log_p
        if not self.plates:
            return jnp.sum(log_p)
        plates = statement.dims[: log_p.ndim]
        others = [i for i, plate in enumerate(plates) if plate not in self.plates]
        kept = [plate for plate in plates if plate in self.plates]
        order = [kept.index(plate) for plate in self.plates]
        return jnp.transpose(jnp.sum(log_p, axis=tuple(others)), order)


@dataclass(frozen=True)
class Candidates:
    """The discrete latents of a program, and the facts that decide whether they can be
    summed out.

    Attributes:
        statements: every statement, as it was run with numbers.
        dependencies: the latents that each statement depends on directly.
        unsuited: statements whose log p is not a sum over entries of plates, or is not
            only theirs: noised sites, observations of these, and coordinates that move
            with a latent.
    """

    statements: Statements
    dependencies: Dependencies
    unsuited: frozenset[str]

    @property
    def discrete(self) -> list[str]:
        """Names of the discrete latents."""
        names = []
        for statement in self.statements.values():
            if statement.kind == "static" and is_discrete(statement.distribution):
                names.append(statement.name)
        return names

    def groups(self) -> tuple[Summed, ...]:
        """Return the groups of latents that can be summed out, as far as plates tell
        that entries are independent."""
        candidates = [name for name in self.discrete if self._suited(name)]
        while True:
            groups = self._connected(candidates)
            refused = [name for group in groups for name in self._refused(group)]
            if not refused:
                return tuple(self._summed(group) for group in groups)
            # Without these the others may fall apart into smaller groups.
            candidates = [name for name in candidates if name not in refused]

    def _dependents(self, name: str) -> list[str]:
        """Return the site and the statements that depend on it, in the program's
        order."""
        found = []
        for other, statement in self.statements.items():
            depends = name in self.dependencies.get(other, ())
            if statement.kind != "deterministic" and (depends or other == name):
                found.append(other)
        return found

    def _plates(self, name: str) -> tuple[str | None, ...]:
        return self.statements[name].dims

    def _suited(self, name: str) -> bool:
        """Return whether each entry of a site has a place in the plates, and in those
        of all statements that depend on it."""
        site = self.statements[name]
        plates = set(self._plates(name))
        if site.distribution.event_dim or None in plates:
            return False
        for other in self._dependents(name):
            statement = self.statements[other]
            if other in self.unsuited:
                return False
            # Soft evidence has no value whose axes would tell its plates.
            if plates and (
                soft(statement.distribution) or not plates <= _axes(statement)
            ):
                return False
        return True

    def _connected(self, names: list[str]) -> list[list[str]]:
        """Return groups of sites such that no statement depends on two groups."""
        groups: list[list[str]] = []
        for name in names:
            mine = set(self._dependents(name))
            joined = [name]
            others: list[list[str]] = []
            for group in groups:
                if any(mine & set(self._dependents(other)) for other in group):
                    joined = [*group, *joined]
                else:
                    others.append(group)
            groups = [*others, joined]
        return groups

    def _refused(self, group: list[str]) -> list[str]:
        """Return the sites of a group that cannot be summed together with the others:
        those of the fewest plates where these differ, and all where the sum is too
        large."""
        if len({self._plates(name) for name in group}) > 1:
            fewest = min(len(self._plates(name)) for name in group)
            few = [name for name in group if len(self._plates(name)) == fewest]
            # Plates may differ and be equally many.
            return few
        summed = self._summed(group)
        terms = 0
        for name in summed.statements:
            terms += int(np.size(self.statements[name].value))
        too_large = summed.num_values * terms > tuning.DISCRETE.most_terms
        return group if too_large else []

    def _summed(self, group: list[str]) -> Summed:
        values = []
        for name in group:
            found = values_of(self.statements[name].distribution)
            assert found is not None
            values.append(found)
        reached = [self._dependents(name) for name in group]
        names = dict.fromkeys(itertools.chain(*reached))
        latents = [name for name in names if self.statements[name].kind == "static"]
        return Summed(
            tuple(group),
            tuple(values),
            self._plates(group[0]),
            tuple(np.shape(self.statements[group[0]].value)),
            tuple(names),
            frozenset(latents),
        )


def _axes(statement: Statement) -> set[str | None]:
    """Return the plates of a statement's batch axes."""
    event_dim = statement.distribution.event_dim
    return set(statement.dims[: len(statement.dims) - event_dim])


def are_independent(group: Summed, run: Run) -> bool:
    """Return whether the entries of a group are independent given the rest, as its
    plates say.

    The log p of an entry must be the same whether the other entries have its value or
    another one. That is compared at random values of all latents, as a program may do
    anything with a value within a plate.
    """
    rng = np.random.default_rng(0)
    for trial in range(tuning.DISCRETE.trials):
        first, second = rng.integers(0, group.num_values, 2)
        mixed = np.where(rng.random(group.shape) < 0.5, first, second)
        alike = {}
        for joint in (first, second):
            alike[joint] = _terms_at(group, run, np.full(group.shape, joint), trial)
        expected = np.where(mixed == first, alike[first], alike[second])
        found = _terms_at(group, run, mixed, trial)
        if not np.allclose(found, expected, 1e-3, 1e-4, equal_nan=True):
            return False
    return True


def _terms_at(
    group: Summed, run: Run, joint: np.ndarray, seed: int
) -> Float[np.ndarray, "*shape"]:
    """Return the terms of a group at joint values, and draws of all other latents."""
    rng = np.random.default_rng(seed)
    key = jax.random.key(seed)
    count = itertools.count()
    codes = group.codes(jnp.asarray(joint))
    lows = {
        name: values.low for name, values in zip(group.sites, group.values, strict=True)
    }

    def provide(kind: str, name: str, distribution: Distribution) -> Array:
        if name in codes:
            return lows[name] + codes[name]
        if kind == "noised":
            return jnp.asarray(rng.standard_normal(distribution.shape()))
        return distribution.sample(jax.random.fold_in(key, next(count)))

    return np.asarray(group.terms(run(provide), lambda name: 1.0))


def key_of(position: Mapping[str, Array]) -> Key[Array, ""]:
    """Return a random key that is a hash of a position's bits.

    A position determines its draw of the latents that are summed out, so that results,
    stores and resumed runs agree on it.
    """
    words = []
    for value in position.values():
        bits = jax.lax.bitcast_convert_type(jnp.asarray(value, float), jnp.uint32)
        words.append(bits.ravel())
    base = jax.random.key(0, impl="threefry2x32")

    def mixed(i: Array, word: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(base, i), word)

    of_position = jnp.concatenate(words)
    keys = jax.vmap(mixed)(jnp.arange(of_position.size), of_position)
    total = jnp.sum(jax.random.key_data(keys), axis=0, dtype=jnp.uint32)
    return jax.random.wrap_key_data(total, impl="threefry2x32")


def unsuited_statements(
    statements: Iterable[Statement],
    standardised: Iterable[str],
    looking: Iterable[str],
) -> frozenset[str]:
    """Return the statements whose log p cannot be summed entry by entry: noised sites,
    evidence at them, observations that look at them (``looking``), and latents whose
    coordinate moves with other latents."""
    found = {*standardised, *looking}
    for statement in statements:
        bounded = statement.kind == "static" and _has_bounds(statement.distribution)
        if bounded or statement.kind in ("noised", "evidence"):
            found.add(statement.name)
    return frozenset(found)


def _has_bounds(distribution: Distribution) -> bool:
    """Return whether the support of continuous values has numbers, such as the bounds
    of an interval, which may be latents."""
    return not is_discrete(distribution) and bool(jax.tree.leaves(distribution.support))
