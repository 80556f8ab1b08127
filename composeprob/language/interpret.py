"""Run a program with given values for its latents, and record every statement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.extend.core import get_opaque_trace_state
from numpyro.distributions import Distribution
from numpyro.primitives import Messenger

from composeprob.errors import ProgramError, WrongTypeError, caller
from composeprob.factors.analytic import Analytic
from composeprob.factors.distribution import FactorDistribution
from composeprob.factors.factor import Factor
from composeprob.language.checks import check_latent, check_observed, explained
from composeprob.language.policies import Policy, as_policy
from composeprob.language.statements import LEVEL, Message
from composeprob.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Statement:
    """One statement as it was executed.

    Attributes:
        kind: ``"noised"``, ``"static"``, ``"observed"``, ``"evidence"`` (a factor at a
            site) or ``"deterministic"``.
        name: its name, with the prefixes of enclosing scopes.
        distribution: the NumPyro distribution, plates and masks applied; None for a
            deterministic.
        value: the value it had in this run.
        anneal: the annealing policy of an observation; None where the program names
            none.
        where: ``"file.py:line"``.
        scale: what its log-probability is multiplied by (``handlers.scale``, subsampled
            plates).
        dims: the plate that each axis of the value runs over, None where it is no
            plate's; of evidence, each axis of its distribution's batch.
        substituted: whether ``handlers.substitute`` gave the value of an observation,
            so that it is no data.
        site: of evidence, the name of the site that it looks at.
        block: of evidence, how many of its plates' members are evaluated at once; None
            for all.
        conditional: whether the user says that a noised site's factor is a normalised
            conditional.
    """

    kind: str
    name: str
    distribution: Distribution
    value: Array
    anneal: Policy | None
    where: str
    scale: Array | float | None
    dims: tuple[str | None, ...]
    substituted: bool = False
    site: str = ""
    block: int | None = None
    conditional: bool = False

    @property
    def factor(self) -> Factor:
        """The factor of a noised site."""
        return unwrap(self.distribution).factor

    def log_prob(self) -> Array:
        """Σ log p(value), a scalar."""
        total = jnp.sum(self.distribution.log_prob(self.value))
        return total if self.scale is None else self.scale * total


PRIOR_LEVELS = Schedule.from_arrays([1.0], [1.0])
"""Stands for the levels of a prior that evidence looks at until the compiler gives it
those of the evidence."""
Provide = Callable[[str, str, Distribution], Array]
"""(kind, name, distribution) → the value of a latent site."""
Redraw = Callable[[str, Distribution, Array], Array]
"""(name, distribution, value) → what the program sees in place of an observed value."""


class _Interpreter(Messenger):
    def __init__(
        self,
        provide: Provide,
        level: Array | int,
        redraw: Redraw | None,
        noised: frozenset[str],
    ):
        self.provide, self.level, self.redraw, self.noised = (
            provide,
            level,
            redraw,
            noised,
        )
        self.statements: dict[str, Statement] = {}
        self.trace = get_opaque_trace_state()
        super().__init__()

    def process_message(self, msg: Message) -> None:
        if msg["type"] == LEVEL:
            msg["value"] = self.level
        if msg["type"] == "param":
            raise ProgramError(
                f"numpyro.param({msg['name']!r}) is an optimised parameter; a program has only random choices.",
                fix="pass the value as an argument, or give it a prior with cp.sample.",
            )
        if msg["type"] == "prng_key":
            raise ProgramError(
                "numpyro.prng_key() asks for a random key, and a program has none: it is a density.",
                fix="make the random number a site: cp.sample(name, distribution).",
            )
        inside = (
            msg["type"] in ("sample", "deterministic")
            and get_opaque_trace_state() != self.trace
        )
        if inside or msg["type"] == "control_flow":
            found = "NumPyro's scan and cond hide their sites"
            if inside:
                found = f"{msg['name']!r} stands inside of jax.vmap, jit, lax.scan, lax.cond or the like, which hide it"
            raise ProgramError(
                f"{found} from the program.",
                fix="write a Python loop over sites with names of their own, or a numpyro.plate; in the place of a "
                "branch choose a distribution's parameters by jnp.where.",
            )
        if (
            msg["type"] == "plate"
            and msg["value"] is None
            and msg["args"][0] != msg["args"][1]
        ):
            size, part = msg["args"]
            raise ProgramError(
                f"Plate {msg['name']!r} takes {part} of {size} at random, and chains need the same data always.",
                where=caller(),
                fix="leave subsample_size out; or pass some of the data to a plate of their own size, in "
                f"numpyro.handlers.scale(scale={size} / {part}).",
            )
        if msg["type"] not in ("sample", "deterministic"):
            return
        name = msg["name"]
        if shape := msg.get("kwargs", {}).get("sample_shape"):
            raise ProgramError(
                f"Site {name!r} has sample_shape={shape}, which sites of programs do not take.",
                where=caller(),
                fix="give its distribution that shape, dist.Normal(0, 1).expand([3]).to_event(1), or use a plate.",
            )
        if name in self.statements:
            raise ProgramError(
                f"Two sites are called {name!r}: here and at {self.statements[name].where}.",
                fix="rename one, or wrap a repeated call in numpyro.handlers.scope(prefix=…).",
            )
        msg["composeprob.where"] = caller() or "unknown place"
        msg["composeprob.kind"] = (
            "deterministic" if msg["type"] == "deterministic" else self._kind(msg)
        )
        msg["composeprob.dims"] = msg["fn"].event_dim if msg["type"] == "sample" else 0
        if name in self.noised and msg["composeprob.kind"] == "static":
            msg["composeprob.kind"], msg["fn"] = "noised", _noised_prior(name, msg)
        if msg["composeprob.kind"] in ("noised", "static"):
            msg["value"] = self.provide(msg["composeprob.kind"], name, msg["fn"])
        if (
            msg["composeprob.kind"] == "observed"
            and msg["is_observed"]
            and self.redraw is not None
        ):
            msg["value"] = self.redraw(name, msg["fn"], msg["value"])

    def _kind(self, msg: Message) -> str:
        """The kind of a sample statement; what NumPyro's handlers made of it has been
        done by now."""
        kind, name = (
            "noised" if isinstance(unwrap(msg["fn"]), FactorDistribution) else "static",
            msg["name"],
        )
        if "at" in (msg.get("infer") or {}):
            return "evidence"
        changed = msg.get("scale") is not None or masked(msg["fn"])
        if kind == "noised" and (changed or msg["value"] is not None):
            what = "is masked or scaled" if changed else "is given a value"
            raise ProgramError(
                f"The factor at site {name!r} {what} by a handler, which factors cannot be.",
                fix="write f ** w for a scaled factor, leave a masked one out, and let data act through cp.observe.",
            )
        if (
            msg["value"] is not None
        ):  # data, or what handlers.substitute has put in a latent's place
            if not masked(msg["fn"]):
                check_observed(
                    name,
                    msg["fn"],
                    unwrap(msg["fn"]),
                    msg["value"],
                    msg.get("cond_indep_stack"),
                )
            return "observed"
        if kind == "static":
            check_latent(name, msg["fn"], unwrap(msg["fn"]))
        return kind

    def postprocess_message(self, msg: Message) -> None:
        if msg["type"] not in ("sample", "deterministic"):
            return
        kind, infer = msg["composeprob.kind"], msg.get("infer") or {}
        self.statements[msg["name"]] = Statement(
            kind=kind,
            name=msg["name"],
            distribution=None if kind == "deterministic" else msg["fn"],
            value=msg["value"],
            anneal=as_policy(msg["name"], infer.get("anneal")),
            where=msg["composeprob.where"],
            scale=msg.get("scale"),
            dims=_dims(msg),
            substituted=kind == "observed" and not msg["is_observed"],
            site=self._site(msg["name"], infer["at"]) if kind == "evidence" else "",
            block=infer.get("block"),
            conditional=infer.get("conditional", False),
        )

    def _site(self, name: str, at: object) -> str:
        """The site that evidence looks at, by the value that `sample` returned or by
        its name."""
        sites = [s for s in self.statements.values() if s.kind in ("noised", "static")]
        found = [
            s.name
            for s in sites
            if (s.name == at if isinstance(at, str) else s.value is at)
        ]
        if not found:
            raise ProgramError(
                f"Evidence {name!r} looks at no site: at= is neither the value of one above it nor its name.",
                fix="pass what cp.sample returned, as it is, or the name: "
                f"{', '.join(repr(s.name) for s in sites) or 'there is no site yet'}.",
            )
        return found[0]


def run(
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    provide: Provide,
    level: Array | int = 0,
    redraw: Redraw | None = None,
    noised: frozenset[str] = frozenset(),
) -> dict[str, Statement]:
    """Execute the program and return its statements by name, in order. ``provide``
    gives each latent site its value, ``level`` is the index that functions of the level
    receive, ``redraw`` puts other values in the place of observed ones, and ``noised``
    are the sites of NumPyro priors that evidence looks at: see `looked_at`."""
    interpreter = _Interpreter(provide, level, redraw, noised)
    with (
        interpreter
    ):  # a Messenger leaves NumPyro's stack when the block ends, also by an exception
        try:
            function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            latents = {
                s.name: s.value
                for s in interpreter.statements.values()
                if s.kind in ("noised", "static")
            }
            if (better := explained(error, latents)) is None:
                raise
            raise better from error
    return interpreter.statements


def looked_at(statements: Mapping[str, Statement]) -> frozenset[str]:
    """The sites of NumPyro priors that factors look at, as which a program is run once
    more: they are noised."""
    return frozenset(
        s.site
        for s in statements.values()
        if s.kind == "evidence" and s.site in statements
    )


def _noised_prior(name: str, msg: Message) -> FactorDistribution:
    """The prior of a site that evidence looks at, as a factor over all of the site,
    plates and all."""
    if msg.get("scale") is not None or masked(msg["fn"]):
        raise ProgramError(
            f"The prior of {name!r} is masked or scaled by a handler, and evidence looks at that site.",
            fix="leave the handler out there.",
        )
    try:
        return FactorDistribution(Analytic(msg["fn"], PRIOR_LEVELS, label=name))
    except WrongTypeError as error:
        raise ProgramError(
            f"Evidence looks at site {name!r}: {error.found}", fix=error.fix
        ) from error


def _dims(msg: Message) -> tuple[str | None, ...]:
    """The plate of each axis of a statement's value, of evidence of its distribution's
    batch."""
    evidence = msg["composeprob.kind"] == "evidence"  # which has no value
    shape = msg["fn"].batch_shape if evidence else jnp.shape(msg["value"])
    event_dim = 0 if evidence else msg["composeprob.dims"]
    names: list[str | None] = [None] * len(shape)
    for frame in msg.get("cond_indep_stack") or ():
        axis = len(shape) - event_dim + frame.dim
        if (
            axis >= 0 and shape[axis] == frame.size
        ):  # a deterministic in a plate need not run over it
            names[axis] = frame.name
    return tuple(names)


def layers(distribution: Distribution) -> Iterator[Distribution]:
    """A distribution and those inside of it, as plates' expansions and masks wrap one
    another."""
    yield distribution
    while isinstance(
        distribution,
        (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent),
    ):
        distribution = distribution.base_dist
        yield distribution


def unwrap(distribution: Distribution) -> Distribution:
    """The distribution inside plates' expansions and masks."""
    *_, inner = layers(distribution)
    return inner


def masked(distribution: Distribution) -> bool:
    """Whether a mask lies on it, inside or outside of plates' expansions."""
    return any(
        isinstance(layer, dist.MaskedDistribution) for layer in layers(distribution)
    )


def soft(distribution: Distribution) -> bool:
    """Whether an observed statement is soft evidence (`factor`) and no data."""
    return isinstance(unwrap(distribution), dist.Unit)
