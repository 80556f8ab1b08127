"""BlackJAX's algorithms as kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key, PyTree

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
    """A chain together with BlackJAX's state of it."""

    # Its position, log-density and score are overwritten with ours before each step.
    inner: PyTree[Array]


class BlackJAX(Kernel[BlackJAXState]):
    """A transition of a BlackJAX algorithm, such as ``blackjax.nuts``, ``blackjax.hmc``
    or ``blackjax.ghmc``.

    The algorithm is built inside the transition on the current level's log-density,
    whose derivative is the density's score: a value-and-gradient costs one evaluation.
    Algorithms that fit are those of `blackjax.mcmc` that take a log-density and keep
    one position (not elliptical slice sampling, `orbital_hmc`, or the Laplace family).

    Costs: the algorithm's evaluations, and one more per transition, since BlackJAX
    hands back a position, a log-density and its gradient, while samplers also use the
    rest of an `Evaluation`. NUTS under `vmap` runs until the last chain's tree is
    complete, so every chain pays for the longest. `MALA` and `HMC` of this library do
    without the extra evaluation.

    Args:
        algorithm: a top-level algorithm of BlackJAX.
        step_size: passed as its parameter `step_size`: a number, one per level, a rule,
            or `Adaptive` (the default where the algorithm has that parameter; it must
            not be given where it has not). h is a squared length for ``blackjax.mala``
            (which makes h_k = c·σ_k²) and a length elsewhere (h_k = c·σ_k). `Adaptive`
            aims for the acceptance 0.8 unless it says another.
        evaluations: evaluations per transition of the algorithm, for counts of a run's
            cost; None takes `num_integration_steps` where given, 2^min(4,
            max_num_doublings) − 1 for NUTS (a guess: its trees are random), and 1
            elsewhere.
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
        if self.metric is not EUCLIDEAN:
            _check_takes_metric(algorithm, parameters)
        self.algorithm = algorithm
        if step_size is None:
            takes_step = "step_size" in _signature(algorithm)
            step_size = Adaptive() if takes_step else 1.0  # the number is never used
        self.step_size = as_step_size(step_size)
        # Arrays and floats are leaves, so that other ones reuse compiled code; all else
        # is part of the program.
        numeric = {k: v for k, v in parameters.items() if _is_numeric(v)}
        options = [(k, v) for k, v in parameters.items() if k not in numeric]
        self.arrays = jax.tree.map(jnp.asarray, numeric)
        self.options = tuple(sorted(options))
        if evaluations is None:
            evaluations = _guess_evaluations(algorithm, parameters)
        self.evaluations = evaluations
        check_count(self.evaluations, "BlackJAX(evaluations=)")

    def __repr__(self) -> str:
        shown = [_name(self.algorithm)]
        shown += [f"{name}={value!r}" for name, value in self.options]
        shown += [f"{name}=…" for name in self.arrays]
        return f"BlackJAX({', '.join(shown)})"

    @property
    def scale_exponent(self) -> int:
        return 2 if _name(self.algorithm) == "mala" else 1

    @property
    def evaluations_per_step(self) -> int:
        return self.evaluations + 1

    def init(
        self, key: Key[Array, ""], position: Position, target: Target
    ) -> BlackJAXState:
        evaluation = target(position)
        # BlackJAX evaluates its log-density at this same position: it may have the
        # value at hand.
        algorithm = self._build(lambda _: evaluation, jnp.ones(()), position, EUCLIDEAN)
        state = BlackJAXState(position, evaluation, algorithm.init(position, key))
        return BlackJAXState(position, evaluation, _refreshed(state))

    def step(
        self,
        key: Key[Array, ""],
        state: BlackJAXState,
        target: Target,
        step_size: Float[Array, ""],
    ) -> tuple[BlackJAXState, Info]:
        algorithm = self._build(target, step_size, state.position, self.metric)
        # A change of level, or another block of a `Gibbs`, leaves BlackJAX's cached
        # values behind.
        before = _refreshed(state)
        inner, report = algorithm.step(key, before)
        acceptance = getattr(report, "acceptance_rate", None)
        if acceptance is None and isinstance(self.step_size, Adaptive):
            raise CapabilityError(
                f"{_name(self.algorithm)} reports no acceptance, so its step size "
                "cannot be Adaptive",
                fix="give a number, one step per level, or a rule of the schedule",
            )
        # Some algorithms promote a float32 chain on the way.
        inner = jax.tree.map(lambda new, old: new.astype(old.dtype), inner, before)
        # The algorithm has accepted or rejected; here only what is not finite is.
        old = KernelState(state.position, state.evaluation)
        new = KernelState(inner.position, target(inner.position))
        chosen, info = unadjusted(new, old)
        moved = BlackJAXState(
            chosen.position,
            chosen.evaluation,
            pytree.where(info.accepted, inner, before),
        )
        if acceptance is None:
            return moved, info
        finite = jnp.isfinite(acceptance)
        probability = jnp.where(finite, jnp.clip(acceptance, 0.0, 1.0), 0.0)
        divergent = getattr(report, "is_divergent", False)
        # With a Metropolis test inside, these algorithms keep detailed balance.
        here = log_density_of(state.evaluation)
        log_reversal = here - log_density_of(chosen.evaluation)
        return moved, Info(
            acceptance=probability.astype(info.acceptance.dtype),
            accepted=info.accepted & getattr(report, "is_accepted", True),
            non_finite=info.non_finite | jnp.isnan(acceptance) | divergent,
            log_reversal=log_reversal,
        )

    def _build(
        self,
        target: Target,
        step_size: Array,
        position: Position,
        metric: Metric | Estimated,
    ) -> SamplingAlgorithm:
        """Return the algorithm for one level's target."""
        takes = _signature(self.algorithm)

        def match(leaf: Array) -> Array:
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return match_precision(leaf, position)
            return leaf

        parameters = dict(self.options) | jax.tree.map(match, self.arrays)
        if "step_size" in takes:
            parameters["step_size"] = match_precision(step_size, position)
        if "inverse_mass_matrix" in takes and "inverse_mass_matrix" not in parameters:
            matrix = in_force(metric).inverse_mass_matrix(position)
            parameters["inverse_mass_matrix"] = matrix
        return self.algorithm(_differentiable(target), **parameters)


def _differentiable(target: Target) -> Callable[[Position], Array]:
    """Return log π as a function of the position with the evaluation's score as its
    derivative: value and gradient cost one evaluation."""

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
    """Return BlackJAX's state with our position, log-density and score in it: right
    after a change of level, at no cost."""
    ours = {
        "position": state.position,
        "logdensity": state.evaluation.log_density,
        "logdensity_grad": state.evaluation.score,
    }
    fields = getattr(state.inner, "_fields", ())
    if "position" not in fields or "logdensity" not in fields:
        raise CapabilityError(
            f"the state {type(state.inner).__name__} of this BlackJAX algorithm has "
            f"fields {fields}, not one position and its log-density",
            fix="use an algorithm such as blackjax.nuts, blackjax.hmc, blackjax.mala, "
            "blackjax.barker or blackjax.ghmc",
        )
    known = {name: value for name, value in ours.items() if name in fields}
    return state.inner._replace(**known)


def _signature(
    algorithm: Callable[..., SamplingAlgorithm],
) -> dict[str, inspect.Parameter]:
    """Return the algorithm's parameters by name, without the log-density, which comes
    first."""
    function = getattr(algorithm, "differentiable", algorithm)
    parameters = inspect.signature(function).parameters
    return dict(list(parameters.items())[1:])


def _name(algorithm: Callable[..., SamplingAlgorithm]) -> str:
    """Return the algorithm's name in BlackJAX, that of the module which defines it,
    such as ``nuts``."""
    function = getattr(algorithm, "differentiable", algorithm)
    return getattr(function, "func", function).__module__.rsplit(".", 1)[-1]


def _check_takes_metric(
    algorithm: Callable[..., SamplingAlgorithm], given: dict[str, object]
) -> None:
    """Refuse a metric where the algorithm has no place for it, or a matrix is given
    too."""
    if "inverse_mass_matrix" not in _signature(algorithm):
        problem = "takes no inverse_mass_matrix"
    elif "inverse_mass_matrix" in given:
        problem = "was given an inverse_mass_matrix too"
    else:
        return
    raise ConditionError(
        f"BlackJAX(metric=) was given, but {_name(algorithm)} {problem}",
        fix="leave metric out",
    )


def _check_parameters(
    algorithm: Callable[..., SamplingAlgorithm],
    step_size: object,
    given: dict[str, object],
) -> None:
    """Refuse parameters that the algorithm does not have, and missing ones."""
    known = _signature(algorithm)
    name = _name(algorithm)
    takes = f"its parameters are {', '.join(known)}"
    if step_size is not None and "step_size" not in known:
        raise ConditionError(f"{name} of BlackJAX takes no step_size", fix=takes)
    # Algorithms with **kwargs take names that their signature does not have.
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [k for k in given if k not in known]
    if unknown and not open_ended:
        raise ConditionError(
            f"{name} of BlackJAX has no parameter {unknown[0]!r}", fix=takes
        )
    supplied = {"step_size", "inverse_mass_matrix", *given}
    required = [k for k, p in known.items() if _is_required(p)]
    missing = [k for k in required if k not in supplied]
    if missing:
        raise ConditionError(
            f"{name} of BlackJAX needs {', '.join(missing)}",
            fix=f"BlackJAX(blackjax.{name}, ..., {missing[0]}=...)",
        )


def _is_required(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter must be given."""
    variable = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind not in variable


def _guess_evaluations(
    algorithm: Callable[..., SamplingAlgorithm], parameters: dict[str, Any]
) -> int:
    """Return the evaluations of one transition; an estimate for NUTS, whose trees have
    random sizes."""
    if _name(algorithm) == "nuts":
        longest = 2 ** parameters.get("max_num_doublings", 10) - 1
        return min(tuning.NUTS_EVALUATIONS, longest)
    steps = parameters.get("num_integration_steps", 1)
    return steps if isinstance(steps, int) else 1


def _is_numeric(value: object) -> bool:
    """Return whether a parameter is made of arrays and floats, which may be traced;
    others are part of the program."""
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(
        isinstance(leaf, float | np.ndarray | Array) for leaf in leaves
    )
