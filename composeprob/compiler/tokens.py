"""Compilation of programs of categorical sites: their expressions are lowered by the
same rules as all others, over factors that are evaluated by their rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Bool, Float, Int

from composeprob import tuning
from composeprob.compiler.check import capabilities, check_networks, node_capabilities
from composeprob.compiler.expressions import Expression, NodeValue, lower_expression
from composeprob.compiler.normalise import normalise
from composeprob.compiler.plausible_tokens import check_token_networks
from composeprob.compiler.share import share
from composeprob.compiler.trace import Traced
from composeprob.density.annealed import SiteInfo, TopLaw
from composeprob.density.categorical import (
    CategoricalDensity,
    Logs,
    NoisedAnswer,
    Reveals,
    Rises,
    TokenDensity,
    UniformDensity,
    check_range,
    reveal_steps,
    visible_after,
)
from composeprob.density.described import Described
from composeprob.density.evaluation import Position
from composeprob.errors import CapabilityError, ProgramError
from composeprob.factors.categorical import (
    Query,
    TokenFactor,
    num_values_of,
)
from composeprob.factors.networks import closed
from composeprob.factors.uniform_diffusion import UniformDiffusion
from composeprob.factors.uniform_noise import Noised, NoisedEvent, UniformNoise
from composeprob.ir.leaves import Graph, Group, Leaf, Member, Observation, leaves
from composeprob.ir.render import describe
from composeprob.ir.verify import verify
from composeprob.language.interpret import Statement, unwrap
from composeprob.schedule import Noise, Schedule, check_schedule


class TokenBatch(eqx.Module):
    """One factor with all of its uses, a row for each.

    Attributes:
        factor: the factor, without conditions.
        conditions: those of every row.
        cells: the positions that each row sees.
        places: the place of every position among a row's cells; −1 for those that it
            does not see.
        block: how many rows are evaluated at once; None for all.
    """

    factor: TokenFactor
    conditions: dict[str, Array]
    cells: Int[Array, "rows size"]
    places: Int[Array, "rows length"]
    block: int | None = eqx.field(static=True)

    @classmethod
    def of_group(
        cls,
        group: Group,
        offsets: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> TokenBatch:
        """Return the batch of a shared network's group."""
        cells = []
        conditions = []
        for member, given in zip(group.members, group.conditions, strict=True):
            cells.append(_cells(member, shapes[member.site]) + offsets[member.site])
            lead = len(member.plates)
            rows = jax.tree.map(
                lambda value, rows=member.rows, lead=lead: value.reshape(
                    rows, *value.shape[lead:]
                ),
                given,
            )
            conditions.append(rows)
        all_cells = np.concatenate(cells)
        length = sum(math.prod(shape) for shape in shapes.values())
        places = np.full((len(all_cells), length), -1)
        np.put_along_axis(
            places, all_cells, np.arange(all_cells.shape[1])[None], axis=1
        )
        blocks = [p.block for m in group.members for p in m.plates if p.block]
        factor: Any = group.factor
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)
        return cls(
            factor,
            joined,
            jnp.asarray(all_cells, jnp.int32),
            jnp.asarray(places, jnp.int32),
            min(blocks, default=None),
        )

    def extend(
        self, query: Query, paths: bool, num_values: int
    ) -> tuple[Float[Array, " rows"] | None, Float[Array, "rows block values"]]:
        """Return log f of what is visible, and its rises, of every row."""
        missing = num_values - self.factor.num_values
        factor: Any = self.factor

        def of_row(row: tuple[Array, Array, dict[str, Array]]) -> Any:
            cells, places, conditions = row
            in_event = jnp.where(query.positions >= 0, places[query.positions], -1)
            local = Query(
                query.tokens[cells],
                query.rank[cells],
                query.time,
                in_event,
                query.block,
            )
            extension = factor.extend(local, conditions, paths)
            rises = jnp.pad(extension.rises, ((0, 0), (0, missing)))
            return extension.base, rises

        values: tuple[Any, Any] = self.of_rows(of_row)
        return values

    def noised(
        self, tokens: Int[Array, " length"], noise: UniformNoise, num_values: int
    ) -> Noised:
        """Return the values about noised tokens, of every row, at all positions."""
        missing = num_values - self.factor.num_values

        def of_row(row: tuple[Array, Array, dict[str, Array]]) -> Noised:
            cells, places, conditions = row

            def everywhere(rises: Array) -> Array:
                padded = jnp.pad(rises, ((0, 0), (0, missing)))
                # What a row does not see changes nothing of it.
                return jnp.where(places[:, None] >= 0, padded[places], 0.0)

            known = self.factor.noised(NoisedEvent(tokens[cells], noise), conditions)
            return known._replace(
                rises=everywhere(known.rises), onward=everywhere(known.onward)
            )

        values: Noised = self.of_rows(of_row)
        return values

    def of_rows(
        self, of_row: Callable[[tuple[Array, Array, dict[str, Array]]], Any]
    ) -> Any:
        """A function of every row, of `block` of them at once."""
        rows = (self.cells, self.places, self.conditions)
        if self.block is None:
            return jax.vmap(of_row)(rows)
        return jax.lax.map(of_row, rows, batch_size=self.block)


def _cells(member: Member, shape: tuple[int, ...]) -> Int[np.ndarray, "rows size"]:
    """The entries of the site that each row of a member sees."""
    if member.region is None:
        entries = np.arange(math.prod(shape))
    else:
        entries = member.region.entries(shape)
    # An axis of length 1 for each plate that does not run over sets of cells.
    lead = []
    for plate in member.plates:
        count = plate.count if plate.cells else 1
        lead.append(count)
    size = entries.shape[-1]
    in_plates = entries.reshape(*lead, size)
    return np.broadcast_to(in_plates, (*member.counts, size)).reshape(member.rows, size)


class TokenProgram(eqx.Module):
    """Evaluates a program of categorical sites, as `TokenEvaluator` says.

    Attributes:
        batches: the shared evaluations.
        expressions: of each site.
        free: 0 where a position may have a value, −∞ where not.
        allowed: the same under the observations.
        given: True at observed positions.
        observations: the observed values.
        traced: the program, for its deterministics.
        slots: of each batch's members, the plates' counts.
        shapes: of the sites.
        levels: of uniform noise; None of reveals.
    """

    batches: tuple[TokenBatch, ...]
    expressions: tuple[Expression, ...]
    free: Float[Array, "length values"]
    allowed: Float[Array, "length values"]
    given: Bool[Array, " length"]
    observations: dict[str, Array]
    traced: Traced
    slots: tuple[tuple[tuple[int, ...], ...], ...] = eqx.field(static=True)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    levels: Schedule | None = None

    @property
    def summed(self) -> tuple[str, ...]:
        return ()

    @property
    def sizes(self) -> Int[Array, " length"]:
        return jnp.sum(jnp.isfinite(self.free), axis=1)

    @property
    def path_evaluations(self) -> int:
        factors: list[Any] = [batch.factor for batch in self.batches]
        return max(factor.path_evaluations for factor in factors)

    def blank(self) -> Logs:
        return tuple(jnp.zeros(len(batch.cells)) for batch in self.batches)

    @property
    def looks_ahead(self) -> bool:
        factors: list[Any] = [batch.factor for batch in self.batches]
        return any(factor.looks_ahead for factor in factors)

    def extend(
        self,
        tokens: Array,
        rank: Array,
        time: Array,
        positions: Array,
        paths: bool,
        block: int | None = None,
    ) -> tuple[tuple[Float[Array, " rows"] | None, ...], Rises]:
        query = Query(tokens, rank, time, positions, block)
        bases = []
        rises = []
        for batch in self.batches:
            base, rise = batch.extend(query, paths, self.allowed.shape[1])
            bases.append(base)
            rises.append(rise)
        return tuple(bases), tuple(rises)

    def noised(self, tokens: Array, level: Array, below: Array) -> NoisedAnswer:
        assert self.levels is not None
        noise = UniformNoise.between(self.levels, level, below)
        answers = []
        for batch in self.batches:
            answers.append(batch.noised(tokens, noise, self.allowed.shape[1]))
        return NoisedAnswer(
            tuple(answer.rises for answer in answers),
            tuple(answer.onward for answer in answers),
            tuple(answer.base for answer in answers),
            tuple(answer.at_top for answer in answers),
        )

    def log_density(self, logs: Logs) -> Float[Array, ""]:
        outputs = {}
        zero = jnp.zeros(())
        for b, (batch, members) in enumerate(zip(logs, self.slots, strict=True)):
            begin = 0
            for m, counts in enumerate(members):
                end = begin + math.prod(counts)
                values = batch[begin:end].reshape(counts)
                # Rules for scores and rates see zeros, which nothing reads.
                unused = jnp.zeros(counts)
                outputs[b, m] = NodeValue(values, unused, None, unused)
                begin = end
        noise = Noise(zero, zero + 1, zero + 1)
        total = zero
        for expression in self.expressions:
            value = expression(outputs, noise)
            assert value.log_density is not None
            total = total + value.log_density
        return total

    def row_of(self, position: Position) -> Int[Array, " length"]:
        rows = [jnp.ravel(position[name]) for name, _ in self.shapes]
        return jnp.concatenate(rows).astype(jnp.int32)

    def position_of(self, tokens: Int[Array, " length"]) -> Position:
        position = {}
        begin = 0
        for name, shape in self.shapes:
            end = begin + math.prod(shape)
            position[name] = tokens[begin:end].reshape(shape)
            begin = end
        return position

    def read(self, position: Position) -> dict[str, Array]:
        """Return the sites' tokens with the program's deterministics."""
        values = dict(position)

        def provide(kind: str, name: str, law: object) -> Array:
            value: Array = position[name]
            return value

        statements = self.traced.run(provide)
        for name, statement in statements.items():
            if statement.kind == "deterministic":
                values[name] = statement.value
        return values

    def observed(self, values: object = None, key: object = None) -> dict[str, Array]:
        """Return the observed tokens, which a posterior predictive repeats."""
        return self.observations

    @property
    def drawable(self) -> bool:
        """False: checks by importance samples are for densities of numbers."""
        return False

    def without_observations(self) -> TokenProgram:
        """Return the program in which no token is given."""
        nowhere = jnp.zeros_like(self.given)
        return replace(self, allowed=self.free, given=nowhere, observations={})


def has_tokens(graph: Graph) -> bool:
    """Return whether a program has categorical sites; refuse one that has others beside
    them."""
    categorical = [site for site in graph.sites if site.num_values]
    if not categorical:
        return False
    first = categorical[0]
    for site in graph.sites:
        if not all(num_values_of(leaf.factor) for leaf in leaves(site.root)):
            raise CapabilityError(
                f"Site {first.name!r} has tokens and site {site.name!r} numbers: the "
                "levels of the one are reveals, those of the other noise.",
                where=site.where,
                fix="sample them by two programs, or give the other as data.",
            )
    for static in graph.statics:
        raise CapabilityError(
            f"Site {first.name!r} has tokens, and {static.name!r} is a latent number: "
            "its moves would need gradients of every reveal.",
            where=static.where,
            fix=f"give {static.name!r} as data.",
        )
    return True


def without_tokens_given(density: TokenDensity) -> TokenDensity:
    """Return the density of a program without its observations."""
    program: Any = density.evaluator
    graph = density.graph
    assert isinstance(program, TokenProgram)
    assert isinstance(graph, Graph)
    graph = replace(graph, observations=()).noted("prior", "without observations")
    without: Any = program.without_observations()
    return replace(
        density,
        evaluator=without,
        described=_described(graph, density.capabilities),
    )


def lower_tokens(
    graph: Graph, traced: Traced, schedule: Schedule | None, networks: bool
) -> TokenDensity:
    """Lower a program of categorical sites to its density.

    Args:
        graph: as `build` made it.
        traced: the program's trace.
        schedule: levels of uniform noise, of the call of `compile`.
        networks: whether networks are examined.
    """
    for stated in graph.rewards:
        raise ProgramError(
            f"The reward {stated.name!r} looks at {stated.site!r}, a site of tokens, "
            "which have no noise to be moved by.",
            where=stated.where,
            fix="write the criterion in JAX, as cp.Energy(fn, length=…, num_values=…).",
        )
    _check_values(graph)
    noise = noise_levels(graph, schedule)
    graph = verify(normalise(graph), "normalise")
    shapes = {site.name: site.shape for site in graph.sites}
    lengths = [math.prod(shape) for shape in shapes.values()]
    length = sum(lengths)
    steps = reveal_steps(length, length)
    levels = noise or Reveals.over(visible_after(steps), length)
    graph = verify(share(replace(graph, schedule=levels)), "share")
    if networks:
        check_networks(graph)
    groups = [replace(g, factor=closed(g.factor, g.first)) for g in graph.groups]
    graph = replace(graph, groups=tuple(groups))
    if networks:
        check_token_networks(graph, noise)
    starts = np.cumsum([0, *lengths[:-1]])
    offsets = dict(zip(shapes, map(int, starts), strict=True))
    clues, observations = _clues(graph, traced, offsets, shapes)
    graph = replace(graph, observations=tuple(observations))

    offered = capabilities(graph) - {"feynman_kac"}
    if not graph.observations and _is_one_model(graph):
        offered |= {"normalised"}
    expressions = [lower_expression(site.root, site.shape) for site in graph.sites]
    batches = [TokenBatch.of_group(group, offsets, shapes) for group in graph.groups]
    free, _ = _allowed(graph, {})
    allowed, given = _allowed(graph, clues)
    program = TokenProgram(
        tuple(batches),
        tuple(expressions),
        free,
        allowed,
        given,
        {o.name: jnp.asarray(clues[o.name][1]) for o in graph.observations},
        traced,
        tuple(tuple(m.counts for m in group.members) for group in graph.groups),
        tuple(shapes.items()),
        noise,
    )
    infos = {site.name: SiteInfo("categorical", site.shape) for site in graph.sites}
    evaluator: Any = program  # it has the methods that samplers of tokens call
    if noise is None:
        described = _described(graph, offered)
        return CategoricalDensity(
            levels, evaluator, _no_top(), infos, offered, described, steps
        )
    offered = (offered - {"categorical"}) | {"uniform_noise"}
    described = _described(graph, offered)
    return UniformDensity(
        levels, evaluator, _no_top(), infos, offered, described, known_range(graph)
    )


def noise_levels(graph: Graph, schedule: Schedule | None) -> Schedule | None:
    """The levels of uniform noise of a program, None where its levels are reveals;
    refuse factors that cannot be evaluated there.

    These are the levels of ``schedule``; without one, those of the first
    `UniformDiffusion`.
    """
    every = [(leaf, site) for site in graph.sites for leaf in leaves(site.root)]
    networks = uniform_networks(graph)
    if schedule is not None:
        check_schedule(schedule)
    elif networks:
        schedule = networks[0].factor.schedule
    else:
        return None
    for leaf, site in every:
        factor: Any = leaf.factor
        if factor.knows_noise:
            continue
        fix = "leave schedule= out; cp.infer(…, levels=8) makes eight reveals."
        if networks:
            fix = "use factors of one kind, or sample them by two programs."
        raise CapabilityError(
            f"The levels are uniform noise, and {leaf.name} is a masked model: it "
            "knows the tokens that are visible, and no replaced ones.",
            where=site.where,
            fix=fix,
        )
    check_range(schedule, known_range(graph), graph.where)
    left = float(np.asarray(schedule.kept)[-1])
    if networks and left > tuning.LEAPS.kept_at_top:
        raise CapabilityError(
            f"The noisiest level keeps {left:.2g} of the tokens, so that "
            f"{networks[0].name} there is not uniform, as chains begin.",
            where=graph.where,
            fix="use a schedule that ends in noise, such as cp.Schedule.log_snr(40).",
        )
    return schedule


def uniform_networks(graph: Graph) -> list[Leaf]:
    """Return the leaves of a graph that are networks under uniform noise."""
    networks = []
    for site in graph.sites:
        for leaf in leaves(site.root):
            if isinstance(leaf.factor, UniformDiffusion):
                networks.append(leaf)
    return networks


def known_range(graph: Graph) -> tuple[float, float]:
    """The least and greatest log-SNR at which every factor can be evaluated."""
    low = -math.inf
    high = math.inf
    for network in uniform_networks(graph):
        least, most = network.factor.log_snr_range
        low = max(low, least)
        high = min(high, most)
    return low, high


def _is_one_model(graph: Graph) -> bool:
    """Return whether every site's expression is normalised."""
    return all("normalised" in node_capabilities(site.root) for site in graph.sites)


def _described(graph: Graph, offered: frozenset[str]) -> Described:
    """The program's IR and its text."""
    offers = tuple(
        (leaf.name, site.where, node_capabilities(leaf))
        for site in graph.sites
        for leaf in leaves(site.root)
    )
    return Described(graph, describe(graph, sorted(offered)), graph.where, offers)


def _no_top() -> TopLaw:
    """The distribution of hidden tokens: there is one state, of weight 1."""
    zero = jnp.zeros(())
    return TopLaw({}, zero, zero, zero, exact=True, normalised=True)


def _check_values(graph: Graph) -> None:
    """Refuse factors of one site with different numbers of values, averages of tokens,
    and conditions that are latents."""
    for site in graph.sites:
        wanted = site.num_values
        for leaf in leaves(site.root):
            factor: Any = leaf.factor
            if leaf.averaged > 1:
                raise CapabilityError(
                    f"The window of {leaf.name} averages entries of {site.name!r}, and "
                    "tokens have no average.",
                    where=site.where,
                    fix="use a window with scale=1, or one of cells.",
                )
            if leaf.latent is not None:
                raise CapabilityError(
                    f"A condition of {leaf.name} is a latent.",
                    where=site.where,
                    fix="give it as data.",
                )
            if factor.num_values != wanted:
                raise ProgramError(
                    f"At site {site.name!r} {leaf.name} has {factor.num_values} values "
                    f"and another factor {wanted}.",
                    where=site.where,
                    fix="use factors of one alphabet.",
                )


def _allowed(
    graph: Graph, clues: dict[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[Float[Array, "length values"], Bool[Array, " length"]]:
    """Log of the values that each position may have, and the observed positions."""
    most = max(site.num_values for site in graph.sites)
    rows = []
    for site in graph.sites:
        values = np.arange(most) < site.num_values
        rows.append(np.tile(values, (math.prod(site.shape), 1)))
    possible = np.concatenate(rows)
    given = np.zeros(len(possible), bool)
    for positions, values in clues.values():
        for position, value in zip(positions.ravel(), values.ravel(), strict=True):
            possible[position] &= np.arange(most) == value
            given[position] = True
    impossible = ~possible.any(axis=1)
    if impossible.any():
        raise ProgramError(
            f"Position {int(np.argmax(impossible))} was observed with a value that it "
            "cannot have, or with two.",
            where=graph.where,
            fix="check the observed tokens.",
        )
    logs = np.where(possible, 0.0, -np.inf)
    return jnp.asarray(logs, jnp.result_type(float)), jnp.asarray(given)


def _clues(
    graph: Graph,
    traced: Traced,
    offsets: dict[str, int],
    shapes: dict[str, tuple[int, ...]],
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[Observation]]:
    """The positions that each observation gives, and their values; refuse any other
    observation.

    The program is run with every token equal to its position: an observation of tokens
    by `dist.Delta` then shows which ones it takes.
    """
    rng = np.random.default_rng(0)
    length = sum(math.prod(shape) for shape in shapes.values())
    runs = [np.arange(length), *(rng.permutation(length) for _ in range(2))]
    statements = [_statements(traced, tokens, offsets, shapes) for tokens in runs]
    clues = {}
    observations = []
    for observation in graph.observations:
        name = observation.name
        laws = [unwrap(run[name].distribution) for run in statements]
        shown = [np.asarray(getattr(law, "v", np.nan)) for law in laws]
        positions = shown[0].astype(int) if isinstance(laws[0], dist.Delta) else None
        if positions is None or not _takes(positions, runs, shown):
            raise CapabilityError(
                f"Observation {name!r} is not of single tokens, and what it says of "
                "tokens that are still hidden is unknown.",
                where=observation.where,
                fix=f"for observed tokens write cp.observe({name!r}, "
                f"dist.Delta({graph.sites[0].name}[positions]), values); for another "
                "likelihood a factor, cp.Energy(fn, length=…, num_values=…).",
            )
        value = np.broadcast_to(np.asarray(statements[0][name].value), positions.shape)
        clues[name] = (positions, value)
        observations.append(replace(observation, anneal=None))
    return clues, observations


def _takes(
    positions: np.ndarray, runs: list[np.ndarray], shown: list[np.ndarray]
) -> bool:
    """Return whether a value is that of the tokens at these positions, in every run."""
    length = len(runs[0])
    if positions.min(initial=0) < 0 or positions.max(initial=0) >= length:
        return False
    pairs = zip(runs, shown, strict=True)
    return all(np.array_equal(tokens[positions], value) for tokens, value in pairs)


def _statements(
    traced: Traced,
    tokens: np.ndarray,
    offsets: dict[str, int],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, Statement]:
    """The program's statements where its sites have these tokens."""

    def provide(kind: str, name: str, law: object) -> Array:
        start = offsets[name]
        size = math.prod(shapes[name])
        return jnp.asarray(
            tokens[start : start + size].reshape(shapes[name]), jnp.int32
        )

    return traced.run(provide)
