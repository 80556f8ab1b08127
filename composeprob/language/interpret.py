"""Run a program with given values for its latents, and record every statement."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Float
from numpyro.distributions import Distribution
from numpyro.primitives import Messenger

from composeprob.density.reward import Reward
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
            site), ``"reward"`` or ``"deterministic"``.
        name: its name, with the prefixes of enclosing scopes.
        distribution: the NumPyro distribution, plates and masks applied; None for a
            deterministic.
        value: the value it had in this run.
        anneal: the annealing policy of an observation; None where the program names
            none.
        where: ``"file.py:line"``.
        scale: the multiplier of its log-probability (``handlers.scale``, subsampled
            plates).
        dims: the plate that each axis of the value runs over, None where it is no
            plate's; for evidence, that of each axis of its distribution's batch.
        substituted: True for an observation whose value ``handlers.substitute`` gave,
            which is not data.
        site: for evidence and rewards, the name of the site that they look at.
        block: for evidence, the number of its plates' members that are evaluated at
            once; None for all.
        conditional: True if the user declares a noised site's factor to be a normalised
            conditional.
        reward: of a reward, what the user gave.
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
    reward: Reward | None = None

    @property
    def factor(self) -> Factor:
        """The factor of a noised site."""
        return unwrap(self.distribution).factor

    def log_prob(self) -> Float[Array, ""]:
        """Σ log p(value)."""
        total = jnp.sum(self.distribution.log_prob(self.value))
        return total if self.scale is None else self.scale * total


PRIOR_LEVELS = Schedule.from_arrays([1.0], [1.0])
"""Stands for the levels of a prior that evidence looks at until the compiler gives it
those of the evidence."""
Provide = Callable[[str, str, Distribution], Array]
"""(kind, name, distribution) → the value of a latent site."""
Redraw = Callable[[str, Distribution, Array], Array]
"""(name, distribution, value) → the value that the program gets for an observed one."""
KIND = "composeprob.kind"
WHERE = "composeprob.where"
EVENT_DIM = "composeprob.event_dim"
"""Entries that are added to NumPyro's messages: a statement's kind and place, and the
event dimensions of its distribution before plates and masks."""


class _Interpreter(Messenger):
    """Gives each latent its value and keeps a record of each statement."""

    def __init__(
        self,
        provide: Provide,
        level: Array | int,
        redraw: Redraw | None,
        noised: frozenset[str],
    ):
        self.provide = provide
        self.level = level
        self.redraw = redraw
        self.noised = noised
        self.statements: dict[str, Statement] = {}
        self.trace = get_opaque_trace_state()
        super().__init__()

    def process_message(self, msg: Message) -> None:
        if msg["type"] == LEVEL:
            msg["value"] = self.level
        _check_supported(msg)
        self._check_visible(msg)
        _check_plate(msg)
        if msg["type"] not in ("sample", "deterministic"):
            return
        self._check_site(msg)
        msg[WHERE] = caller() or "unknown place"
        if msg["type"] == "deterministic":
            msg[KIND] = "deterministic"
            msg[EVENT_DIM] = 0
            return
        msg[KIND] = self._kind(msg)
        # Before the prior becomes a factor over all of the site, plates and all.
        msg[EVENT_DIM] = msg["fn"].event_dim
        self._give_value(msg)

    def _give_value(self, msg: Message) -> None:
        """Put the run's value of a latent or an observation into its message."""
        name = msg["name"]
        if name in self.noised and msg[KIND] == "static":
            msg["fn"] = _noised_prior(name, msg)
            msg[KIND] = "noised"
        if msg[KIND] in ("noised", "static"):
            msg["value"] = self.provide(msg[KIND], name, msg["fn"])
        # A value of handlers.substitute has the kind of an observation, but is not one.
        is_data = msg[KIND] == "observed" and msg["is_observed"]
        if is_data and self.redraw is not None:
            msg["value"] = self.redraw(name, msg["fn"], msg["value"])

    def _check_visible(self, msg: Message) -> None:
        """Refuse a site inside of a transformation of JAX or NumPyro's control flow:
        its value would be a tracer of the transformation."""
        inside = False
        if msg["type"] in ("sample", "deterministic"):
            inside = get_opaque_trace_state() != self.trace
        if not inside and msg["type"] != "control_flow":
            return
        hidden = "NumPyro's scan and cond hide their sites"
        if inside:
            hidden = (
                f"{msg['name']!r} stands inside of jax.vmap, jit, lax.scan, lax.cond "
                "or the like, which hide it"
            )
        raise ProgramError(
            f"{hidden} from the program.",
            fix="write a Python loop over sites with names of their own, or a "
            "numpyro.plate; in the place of a branch choose a distribution's "
            "parameters by jnp.where.",
        )

    def _check_site(self, msg: Message) -> None:
        """Refuse a sample_shape, and a name that another site has."""
        name = msg["name"]
        shape = msg.get("kwargs", {}).get("sample_shape")
        if shape:
            raise ProgramError(
                f"Site {name!r} has sample_shape={shape}, which sites of programs do "
                "not take.",
                where=caller(),
                fix="give its distribution that shape, "
                "dist.Normal(0, 1).expand([3]).to_event(1), or use a plate.",
            )
        if name in self.statements:
            raise ProgramError(
                f"Two sites are called {name!r}: here and at "
                f"{self.statements[name].where}.",
                fix="rename one, or wrap a repeated call in "
                "numpyro.handlers.scope(prefix=…).",
            )

    def _kind(self, msg: Message) -> str:
        """The kind of a sample statement, on which all of NumPyro's handlers have
        acted by now."""
        infer = msg.get("infer") or {}
        if "reward" in infer:
            _check_whole(msg)
            return "reward"
        if "at" in infer:
            return "evidence"
        if isinstance(unwrap(msg["fn"]), FactorDistribution):
            _check_untouched(msg)
            return "noised"
        # Data, or a value that handlers.substitute has put in a latent's place.
        if msg["value"] is not None:
            _check_data(msg)
            return "observed"
        check_latent(msg["name"], msg["fn"], unwrap(msg["fn"]))
        return "static"

    def postprocess_message(self, msg: Message) -> None:
        if msg["type"] not in ("sample", "deterministic"):
            return
        kind = msg[KIND]
        infer = msg.get("infer") or {}
        distribution = None if kind == "deterministic" else msg["fn"]
        site = ""
        if kind in ("evidence", "reward"):
            site = self._site(msg["name"], infer["at"])
        self.statements[msg["name"]] = Statement(
            kind=kind,
            name=msg["name"],
            distribution=distribution,
            value=msg["value"],
            anneal=as_policy(msg["name"], infer.get("anneal")),
            where=msg[WHERE],
            scale=msg.get("scale"),
            dims=_dims(msg),
            substituted=kind == "observed" and not msg["is_observed"],
            site=site,
            block=infer.get("block"),
            conditional=infer.get("conditional", False),
            reward=infer.get("reward"),
        )

    def _site(self, name: str, at: object) -> str:
        """The site that evidence looks at, found by the value that `sample` returned or
        by its name."""
        sites = _latents(self.statements)
        for site in sites:
            # By identity: an equal value may be another site's.
            is_site = site.name == at if isinstance(at, str) else site.value is at
            if is_site:
                return site.name
        names = ", ".join(repr(site.name) for site in sites)
        raise ProgramError(
            f"Evidence {name!r} looks at no site: at= is neither the value of one "
            "above it nor its name.",
            fix="pass what cp.sample returned, as it is, or the name: "
            f"{names or 'there is no site yet'}.",
        )


def _check_supported(msg: Message) -> None:
    """Refuse NumPyro's statements that have no meaning in a density."""
    if msg["type"] == "param":
        raise ProgramError(
            f"numpyro.param({msg['name']!r}) is an optimised parameter; a program has "
            "only random choices.",
            fix="pass the value as an argument, or give it a prior with cp.sample.",
        )
    if msg["type"] == "prng_key":
        raise ProgramError(
            "numpyro.prng_key() asks for a random key, and a program has none: it is a "
            "density.",
            fix="make the random number a site: cp.sample(name, distribution).",
        )


def _check_plate(msg: Message) -> None:
    """Refuse a plate that takes a random part of its data: each run of the program
    would be another density."""
    if msg["type"] != "plate" or msg["value"] is not None:
        return
    size, subsample_size = msg["args"][:2]
    if size == subsample_size:
        return
    raise ProgramError(
        f"Plate {msg['name']!r} takes {subsample_size} of {size} at random, and chains "
        "need the same data always.",
        where=caller(),
        fix="leave subsample_size out; or pass some of the data to a plate of their "
        f"own size, in numpyro.handlers.scale(scale={size} / {subsample_size}).",
    )


def _check_whole(msg: Message) -> None:
    """Refuse a reward in a plate, or one that a handler of NumPyro's has changed."""
    changed = msg.get("scale") is not None or masked(msg["fn"])
    if not changed and not msg.get("cond_indep_stack"):
        return
    what = "is masked or scaled by a handler" if changed else "stands in a plate"
    raise ProgramError(
        f"The reward {msg['name']!r} {what}, and its function sees all of a site.",
        fix="write it outside, with cp.Reward(fn, scale=2.0) for its weight, and let "
        "the function sum over the members.",
    )


def _check_untouched(msg: Message) -> None:
    """Refuse a noised site that a handler of NumPyro's has changed."""
    changed = msg.get("scale") is not None or masked(msg["fn"])
    if not changed and msg["value"] is None:
        return
    what = "is masked or scaled" if changed else "is given a value"
    raise ProgramError(
        f"The factor at site {msg['name']!r} {what} by a handler, which factors cannot "
        "be.",
        fix="write f ** w for a scaled factor, leave a masked one out, and let data "
        "act through cp.observe.",
    )


def _check_data(msg: Message) -> None:
    """Refuse data that do not fit their distribution."""
    # Masked entries may hold anything: their log-probability is 0.
    if masked(msg["fn"]):
        return
    plates = msg.get("cond_indep_stack")
    check_observed(msg["name"], msg["fn"], unwrap(msg["fn"]), msg["value"], plates)


_ONE_AT_A_TIME = threading.RLock()
"""Threads run programs in turn: NumPyro has one stack of handlers for all of them."""


def run(
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    provide: Provide,
    level: Array | int = 0,
    redraw: Redraw | None = None,
    noised: frozenset[str] = frozenset(),
) -> dict[str, Statement]:
    """Execute the program and return its statements by name, in order.

    Args:
        function: the program's function.
        args, kwargs: its arguments.
        provide: the function that gives each latent site its value.
        level: the index that functions of the level receive.
        redraw: the function that replaces observed values.
        noised: the sites of NumPyro priors that evidence looks at: see `looked_at`.
    """
    interpreter = _Interpreter(provide, level, redraw, noised)
    # A Messenger leaves NumPyro's stack when the block ends, also by an exception.
    with _ONE_AT_A_TIME, interpreter:
        try:
            function(*args, **kwargs)
        except (AssertionError, TypeError, ValueError) as error:
            # The kinds of error that NumPyro raises for a wrong argument.
            latents = {s.name: s.value for s in _latents(interpreter.statements)}
            explanation = explained(error, latents)
            if explanation is None:
                raise
            raise explanation from error
    return interpreter.statements


def _latents(statements: Mapping[str, Statement]) -> list[Statement]:
    """The noised and static sites among statements."""
    return [s for s in statements.values() if s.kind in ("noised", "static")]


def looked_at(statements: Mapping[str, Statement]) -> frozenset[str]:
    """The sites of NumPyro priors that factors look at; the program is run again with
    these as noised sites."""
    evidence = [s for s in statements.values() if s.kind == "evidence"]
    return frozenset(s.site for s in evidence if s.site in statements)


def _noised_prior(name: str, msg: Message) -> FactorDistribution:
    """The prior of a site that evidence looks at, as a factor over all of the site,
    plates and all."""
    if msg.get("scale") is not None or masked(msg["fn"]):
        raise ProgramError(
            f"The prior of {name!r} is masked or scaled by a handler, and evidence "
            "looks at that site.",
            fix="leave the handler out there.",
        )
    try:
        return FactorDistribution(Analytic(msg["fn"], PRIOR_LEVELS, label=name))
    except WrongTypeError as error:
        raise ProgramError(
            f"Evidence looks at site {name!r}: {error.found}", fix=error.fix
        ) from error


def _dims(msg: Message) -> tuple[str | None, ...]:
    """The plate of each axis of a statement's value; for evidence, which has no value,
    of each axis of its distribution's batch."""
    if msg[KIND] in ("evidence", "reward"):  # which have no value
        shape = msg["fn"].batch_shape
        event_dim = 0
    else:
        shape = jnp.shape(msg["value"])
        event_dim = msg[EVENT_DIM]
    names: list[str | None] = [None] * len(shape)
    for frame in msg.get("cond_indep_stack") or ():
        axis = len(shape) - event_dim + frame.dim
        # A deterministic in a plate need not run over it.
        if axis >= 0 and shape[axis] == frame.size:
            names[axis] = frame.name
    return tuple(names)


WRAPPERS = (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent)


def layers(distribution: Distribution) -> Iterator[Distribution]:
    """A distribution and those inside of it, as plates' expansions and masks wrap one
    another."""
    yield distribution
    while isinstance(distribution, WRAPPERS):
        distribution = distribution.base_dist
        yield distribution


def unwrap(distribution: Distribution) -> Distribution:
    """The distribution inside plates' expansions and masks."""
    *_, inner = layers(distribution)
    return inner


def masked(distribution: Distribution) -> bool:
    """Return whether a mask lies on a distribution, inside or outside of plates'
    expansions."""
    wrappers = layers(distribution)
    return any(isinstance(layer, dist.MaskedDistribution) for layer in wrappers)


def soft(distribution: Distribution) -> bool:
    """Return whether an observed statement is soft evidence (`factor`) in the place of
    data."""
    return isinstance(unwrap(distribution), dist.Unit)
