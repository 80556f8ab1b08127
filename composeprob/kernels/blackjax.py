"""Any BlackJAX algorithm as a kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from composeprob import pytree, tuning
from composeprob.arguments import check_count
from composeprob.density.evaluation import Position, Target
from composeprob.errors import CapabilityError, ConditionError, WrongTypeError
from composeprob.kernels.kernel import Info, Kernel, KernelState, log_density_of
from composeprob.kernels.metric import (
    EUCLIDEAN,
    Estimated,
    Metric,
    MetricLike,
    as_metric,
    in_force,
)
from composeprob.kernels.metropolis import unadjusted
from composeprob.kernels.step_size import Adaptive, as_step_size, match_precision

if TYPE_CHECKING:
    from blackjax.base import SamplingAlgorithm


class BlackJAXState(KernelState):
    """A chain together with BlackJAX's own state."""

    inner: PyTree[
        Array
    ]  # its position, log-density and score are overwritten with ours before each step


class BlackJAX(Kernel[BlackJAXState]):
    """A transition of a BlackJAX algorithm, such as ``blackjax.nuts``, ``blackjax.hmc``
    or ``blackjax.ghmc``.

    The algorithm is built inside the transition on the current level's log-density,
    whose derivative is the density's own score: a value-and-gradient costs one
    evaluation. Which algorithms: those of `blackjax.mcmc` that take a log-density and
    keep one position (not elliptical slice sampling, `orbital_hmc`, or the Laplace
    family).

    Costs: what the algorithm itself evaluates, and one more per transition, since
    BlackJAX hands back a position, a log-density and its gradient, while samplers also
    use the rest of an `Evaluation`. NUTS under `vmap` runs until the last chain's tree
    is complete, so every chain pays for the longest. `MALA` and `HMC` of this library
    do without the extra evaluation.

    Args:
        algorithm: a top-level algorithm of BlackJAX.
        step_size: passed as its parameter `step_size`: a number, one per level, a rule,
            or `Adaptive` (the default where the algorithm has that parameter; it must
            not be given where it has not). h is a squared length for ``blackjax.mala``
            (which makes h_k = c·σ_k²) and a length elsewhere (h_k = c·σ_k). `Adaptive`
            aims for the acceptance 0.8 unless it says another.
        evaluations: evaluations per transition of the algorithm, for the books; None
            takes `num_integration_steps` where given, 2^min(4, max_num_doublings) − 1
            for NUTS (a guess: its trees are random), and 1 elsewhere.
        metric: as of `HMC`, for algorithms that have the parameter
            `inverse_mass_matrix`, in place of that.
        **parameters: the algorithm's other parameters. Arrays and floats may change
            without compiling again. `inverse_mass_matrix` is the identity unless given
            here or as a metric.

    Raises:
        ConditionError: for an unknown or a missing parameter.
        InvalidValueError: for a step size that is not positive and finite.
        CapabilityError: while tracing, for `Adaptive` with an algorithm that reports no
            acceptance, or an algorithm whose state has no single position.

    Example:
        >>> import blackjax
        >>> from composeprob.kernels import BlackJAX
        >>> BlackJAX(blackjax.hmc, 0.1, num_integration_steps=5).evaluations_per_step
        6

    References:
        Cabezas et al. (2024), BlackJAX: composable Bayesian inference in JAX.
    """

    algorithm: Callable[..., SamplingAlgorithm] = eqx.field(static=True)
    arrays: dict[str, PyTree[Array]]
    options: tuple[tuple[str, object], ...] = eqx.field(static=True)
    evaluations: int = eqx.field(static=True)
    metric: Metric | Estimated

    optimal_acceptance = 0.8
    requires = frozenset({"energy", "score"})

    def __init__(
        self,
        algorithm: Callable[..., SamplingAlgorithm],
        step_size: object = None,
        *,
        evaluations: int | None = None,
        metric: MetricLike = "none",
        **parameters: Any,
    ):
        if not callable(algorithm):
            raise WrongTypeError(
                f"BlackJAX takes an algorithm of BlackJAX; got {algorithm!r}.",
                fix="import blackjax, and write cp.BlackJAX(blackjax.nuts).",
            )
        _check_parameters(algorithm, step_size, parameters)
        self.metric = as_metric(metric)
        known = "inverse_mass_matrix" in _signature(algorithm)
        if self.metric is not EUCLIDEAN and (
            not known or "inverse_mass_matrix" in parameters
        ):
            found = (
                "was given an inverse_mass_matrix too"
                if known
                else "takes no inverse_mass_matrix"
            )
            raise ConditionError(
                f"BlackJAX(metric=) was given, but {_name(algorithm)} {found}",
                fix="leave metric out",
            )
        takes_step = "step_size" in _signature(algorithm)
        default = Adaptive() if takes_step else 1.0  # the number is never used
        self.algorithm = algorithm
        self.step_size = as_step_size(default if step_size is None else step_size)
        numeric = {k: v for k, v in parameters.items() if _is_numeric(v)}
        self.arrays = jax.tree.map(jnp.asarray, numeric)
        self.options = tuple(
            sorted((k, v) for k, v in parameters.items() if k not in numeric)
        )
        self.evaluations = (
            _guess_evaluations(algorithm, parameters)
            if evaluations is None
            else evaluations
        )
        check_count(self.evaluations, "BlackJAX(evaluations=)")

    def __repr__(self) -> str:
        parameters = "".join(f", {k}={v!r}" for k, v in self.options) + "".join(
            f", {k}=…" for k in self.arrays
        )
        return f"BlackJAX({_name(self.algorithm)}{parameters})"

    @property
    def scale_exponent(self) -> int:
        return 2 if _name(self.algorithm) == "mala" else 1

    @property
    def evaluations_per_step(self) -> int:
        return self.evaluations + 1

    def init(self, key: Array, position: Position, target: Target) -> BlackJAXState:
        evaluation = target(position)
        # BlackJAX evaluates its log-density at this same position: it may have the
        # value at hand.
        algorithm = self._build(lambda _: evaluation, jnp.ones(()), position, EUCLIDEAN)
        state = BlackJAXState(position, evaluation, algorithm.init(position, key))
        return BlackJAXState(position, evaluation, _refreshed(state))

    def step(
        self, key: Array, state: BlackJAXState, target: Target, step_size: Array
    ) -> tuple[BlackJAXState, Info]:
        algorithm = self._build(target, step_size, state.position, self.metric)
        before, before_evaluation = _refreshed(state), state.evaluation
        inner, report = algorithm.step(key, before)
        acceptance = getattr(report, "acceptance_rate", None)
        if acceptance is None and isinstance(self.step_size, Adaptive):
            raise CapabilityError(
                f"{_name(self.algorithm)} reports no acceptance, so its step size cannot be Adaptive",
                fix="give a number, one step per level, or a rule of the schedule",
            )
        inner = jax.tree.map(lambda new, old: new.astype(old.dtype), inner, before)
        chosen, info = unadjusted(
            KernelState(inner.position, target(inner.position)),
            KernelState(state.position, state.evaluation),
        )
        state = BlackJAXState(
            chosen.position,
            chosen.evaluation,
            pytree.where(info.accepted, inner, before),
        )
        if acceptance is None:
            return state, info
        probability = jnp.where(
            jnp.isfinite(acceptance), jnp.clip(acceptance, 0.0, 1.0), 0.0
        )
        accepted = info.accepted & getattr(report, "is_accepted", True)
        non_finite = (
            info.non_finite
            | jnp.isnan(acceptance)
            | getattr(report, "is_divergent", False)
        )
        # With a Metropolis test inside, these algorithms keep detailed balance.
        log_reversal = log_density_of(before_evaluation) - log_density_of(
            chosen.evaluation
        )
        return state, Info(
            probability.astype(info.acceptance.dtype),
            accepted,
            non_finite,
            log_reversal,
        )

    def _build(
        self,
        target: Target,
        step_size: Array,
        position: Position,
        metric: Metric | Estimated,
    ) -> SamplingAlgorithm:
        takes = _signature(self.algorithm)

        def match(leaf: Array) -> Array:
            return (
                match_precision(leaf, position)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
                else leaf
            )

        parameters = dict(self.options) | jax.tree.map(match, self.arrays)
        if "step_size" in takes:
            parameters["step_size"] = match_precision(step_size, position)
        if "inverse_mass_matrix" in takes and "inverse_mass_matrix" not in parameters:
            parameters["inverse_mass_matrix"] = in_force(metric).inverse_mass_matrix(
                position
            )
        return self.algorithm(_differentiable(target), **parameters)


def _differentiable(target: Target) -> Callable[[Position], Array]:
    """position → log π with the evaluation's own score as derivative: value and
    gradient cost one evaluation."""

    @jax.custom_jvp
    def log_density(position: Position) -> Array:
        return log_density_of(target(position))

    @log_density.defjvp
    def derivative(
        primals: tuple[Position], tangents: tuple[Position]
    ) -> tuple[Array, Array]:
        evaluation = target(primals[0])
        value = log_density_of(evaluation)
        return value, pytree.vdot(evaluation.score, tangents[0]).astype(value.dtype)

    return log_density


def _refreshed(state: BlackJAXState) -> PyTree[Array]:
    """BlackJAX's state with our position, log-density and score in it: right after a
    change of level, at no cost."""
    ours = {
        "position": state.position,
        "logdensity": state.evaluation.log_density,
        "logdensity_grad": state.evaluation.score,
    }
    fields = getattr(state.inner, "_fields", ())
    if "position" not in fields or "logdensity" not in fields:
        raise CapabilityError(
            f"the state {type(state.inner).__name__} of this BlackJAX algorithm has fields {fields}, not one position "
            "and its log-density",
            fix="use an algorithm such as blackjax.nuts, blackjax.hmc, blackjax.mala, blackjax.barker or blackjax.ghmc",
        )
    return state.inner._replace(
        **{name: value for name, value in ours.items() if name in fields}
    )


def _signature(
    algorithm: Callable[..., SamplingAlgorithm],
) -> dict[str, inspect.Parameter]:
    """Parameters of the algorithm by name, without the log-density, which comes
    first."""
    parameters = inspect.signature(
        getattr(algorithm, "differentiable", algorithm)
    ).parameters
    return dict(list(parameters.items())[1:])


def _name(algorithm: Callable[..., SamplingAlgorithm]) -> str:
    """The algorithm's name in BlackJAX: that of the module which defines it, such as
    ``nuts``."""
    function = getattr(algorithm, "differentiable", algorithm)
    return getattr(function, "func", function).__module__.rsplit(".", 1)[-1]


def _check_parameters(
    algorithm: Callable[..., SamplingAlgorithm],
    step_size: object,
    given: dict[str, object],
) -> None:
    known, name = _signature(algorithm), _name(algorithm)
    takes = f"its parameters are {', '.join(known)}"
    if step_size is not None and "step_size" not in known:
        raise ConditionError(f"{name} of BlackJAX takes no step_size", fix=takes)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [k for k in given if k not in known]
    if unknown and not open_ended:
        raise ConditionError(
            f"{name} of BlackJAX has no parameter {unknown[0]!r}", fix=takes
        )
    supplied = {"step_size", "inverse_mass_matrix", *given}
    needed = [
        k
        for k, p in known.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    missing = [k for k in needed if k not in supplied]
    if missing:
        raise ConditionError(
            f"{name} of BlackJAX needs {', '.join(missing)}",
            fix=f"BlackJAX(blackjax.{name}, ..., {missing[0]}=...)",
        )


def _guess_evaluations(
    algorithm: Callable[..., SamplingAlgorithm], parameters: dict[str, Any]
) -> int:
    if _name(algorithm) == "nuts":
        return min(
            tuning.NUTS_EVALUATIONS, 2 ** parameters.get("max_num_doublings", 10) - 1
        )
    steps = parameters.get("num_integration_steps", 1)
    return steps if isinstance(steps, int) else 1


def _is_numeric(value: object) -> bool:
    """Whether a parameter is made of arrays and floats, which may be traced; the rest
    is part of the program."""
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(
        isinstance(leaf, float | np.ndarray | Array) for leaf in leaves
    )
