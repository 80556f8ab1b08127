"""The statements of a program: `sample`, `observe`, `factor`, and the annealing policy
`annealed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpy.typing import ArrayLike
from numpyro.primitives import Messenger, apply_stack

from composeprob.arguments import check_count
from composeprob.density.reward import Reward
from composeprob.errors import (
    InvalidValueError,
    ProgramError,
    ShapeError,
    WrongTypeError,
    a_kind,
)
from composeprob.factors.distribution import FactorDistribution
from composeprob.factors.factor import Factor, is_factor
from composeprob.language.checks import mismatch
from composeprob.language.policies import POLICIES, Policy, as_policy
from composeprob.user_code import NOT_CONCRETE, number_request

LEVEL = "composeprob.level"
Message = dict[str, Any]
"""NumPyro's message of one statement."""
Weight = TypeVar("Weight")


def sample(
    name: str,
    factor_or_distribution: Factor | dist.Distribution,
    *,
    conditional: bool = False,
) -> Array:
    """A random choice of the program.

    Args:
        name: the site's name, unique in the program.
        factor_or_distribution: a factor makes a *noised* site, which lives at the
            level's noise; a NumPyro distribution makes a *static* one, as
            ``numpyro.sample`` does.
        conditional: declares a product of factors, of which some depend on a latent and
            some do not, to be a normalised conditional of that latent. Without it such
            a product is refused, as it may be meant as evidence about the latent, which
            is ``cp.factor(name, f, at=site)``.

    Returns:
        The site's value. The observations below see it at a noise that depends on their
            annealing policy.

    Raises:
        ProgramError: the name is taken, or the statement stands outside a compiled
            program.
        WrongTypeError: neither a factor nor a distribution.

    Example:
        >>> import composeprob as cp, numpyro.distributions as dist
        >>> @cp.program
        ... def scene(f):
        ...     scale = cp.sample("scale", dist.HalfNormal(1.0))
        ...     x = cp.sample("x", f)
        ...     return scale * x
        >>> f = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(20))
        >>> {name: site.kind for name, site in cp.compile(scene, f).sites.items()}
        {'scale': 'static', 'x': 'noised'}
    """
    _check_name("sample", name, factor_or_distribution)
    if not isinstance(factor_or_distribution, (Factor, dist.Distribution)):
        got = a_kind(factor_or_distribution)
        if isinstance(factor_or_distribution, type):
            got = f"the class {factor_or_distribution.__name__}"
        raise WrongTypeError(
            f"Site {name!r} needs a factor or a NumPyro distribution; got {got}.",
            fix=_fix_of_no_factor(factor_or_distribution),
        )
    _check_place("sample", name)
    if is_factor(factor_or_distribution):
        distribution = FactorDistribution(factor_or_distribution)
        infer = {"conditional": bool(conditional)}
        return numpyro.sample(name, distribution, infer=infer)
    return numpyro.sample(name, factor_or_distribution)


def observe(
    name: str,
    distribution: dist.Distribution | Callable[[Array], dist.Distribution],
    value: object,
    anneal: str | Policy | None = None,
) -> Array:
    """A measurement: multiplies the likelihood of ``value`` into the program's density.

    An observation that depends on a noised site is annealed. Level 0 is the same exact
    posterior under each policy:

    * ``"exact"`` (default where it is possible): the density of the value given x_k
      itself, ∫ L(x₀)·p(x₀ | x_k) dx₀, in closed form, so that π_k is the noised
      posterior. It takes a `Normal` or
      `MultivariateNormal` whose mean is A·x + b, with A, b and the spread free of x
      (they may depend on static sites), and a prior made of `cp.Analytic` mixtures of
      Gaussians; several such observations count together. With static sites it comes in
      level by level: below log-SNR −2 it is raised to a power that goes from 0 at the
      noisiest level to 1;
    * ``"moments"`` (default where factors offer only scores): the same for any score,
      from the mean and the covariance of x₀ given x_k that follow from the score and
      its derivative: N(y; A·E[x₀ | x_k] + b, Σ + A·V·Aᵀ), with
      V = (σ_k²/α_k)·∂E[x₀ | x_k]/∂x_k. It takes at most 16 Jacobian–vector products of
      the score an evaluation;
    * ``"tempered"`` (default elsewhere): the program sees x/α_k, and the likelihood is
      raised to a power that is nearly 0 at the noisiest levels and 1 at level 0: about
      s²/(s² + σ_k²/α_k²), where s, 0.14 or less, is the sharpness with which the
      observations determine x, as the compiler measures it;
    * ``"denoised"``: the program sees the Tweedie mean (x + σ_k²·∇log F_k(x))/α_k, and
      the likelihood is raised to the power of ``"tempered"``;
    * ``"noised"``: the program sees x itself; ``distribution`` may be a function of the
      level's index;
    * an object of a class of your own, derived from `Policy`.

    An observation that depends on no noised site is never annealed.

    Args:
        name: the site's name.
        distribution: a NumPyro distribution that depends on the program's sites; under
            ``"noised"`` possibly a function of the level that returns one.
        value: the measured value.
        anneal: the policy; left out, that of the enclosing `annealed` block, else
            ``"exact"``, ``"moments"`` or ``"tempered"``, as the printed density reports
            it, with the reason.

    Raises:
        InvalidValueError: an unknown policy, or NaN in the value.
        ShapeError: a value that does not fit the distribution.

    Example:
        >>> import composeprob as cp, numpyro.distributions as dist
        >>> @cp.program
        ... def measured(f, y):
        ...     x = cp.sample("x", f)
        ...     cp.observe("y", dist.Normal(x, 1.0), y)
        >>> f = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(20))
        >>> density = cp.compile(measured, f, 2.0)
        >>> score = density.score({"x": 1.0}, 0)["x"]  # at the posterior's mean
        >>> round(float(score), 2)
        0.0
    """
    _check_name("observe", name, distribution)
    infer = {"anneal": as_policy(name, anneal)}
    # Distributions and factors are callable too; of classes, no call is meant.
    is_value = isinstance(distribution, (dist.Distribution, Factor, type))
    if callable(distribution) and not is_value:
        distribution = _at_level(name, distribution, anneal)
    if not isinstance(distribution, dist.Distribution):
        fix = (
            "for example dist.Normal(prediction, sigma), with numpyro.distributions as "
            "dist."
        )
        if is_factor(distribution):
            fix = (
                "a factor is a prior, not a likelihood; write "
                "dist.Normal(prediction, sigma) of the value that cp.sample returned."
            )
        raise WrongTypeError(
            f"Observation {name!r} needs a NumPyro distribution; got "
            f"{a_kind(distribution)}.",
            fix=fix,
        )
    # Data that are NaN are refused as NumPyro's are, unless a mask lies on them.
    value = _as_array(name, value)
    # The value may broadcast the distribution, not the other way round: a datum that
    # counts for many would be a mistake.
    try:
        fits = jnp.broadcast_shapes(value.shape, distribution.shape()) == value.shape
    except ValueError:
        fits = False
    if not fits:
        raise mismatch(name, value.shape, distribution.shape())
    _check_place("observe", name)
    return numpyro.sample(name, distribution, obs=value, infer=infer)


def factor(
    name: str,
    log_weight: ArrayLike | Callable[[Array], ArrayLike] | Factor | Reward,
    anneal: str | Policy | None = None,
    *,
    at: ArrayLike | str | None = None,
    block: int | None = None,
) -> None:
    r"""Evidence: multiplies exp(log_weight), or a factor at a site, into the program's
    density.

    With ``at`` the program's density is multiplied by f(site), and nothing is
    normalised again: the site keeps the prior that `sample` gave it, and f is the
    likelihood of data about it. A posterior that was trained under a prior of its own
    is such evidence, once it is divided by that prior: q(η | x)/p₀(η) is the likelihood
    of x, up to a constant, so

    $$p(\varphi, \eta_1 … \eta_J \mid x) \propto p(\varphi)
      \prod_j p(\eta_j \mid \varphi)\, q(\eta_j \mid x_j) / p_0(\eta_j).$$

    The site becomes a noised one, of samples x = α·η + σ·ε at level 0; its NumPyro
    prior, whose parameters may be latents, counts with its noised density at every
    level. In a plate of size n a condition whose leading axis is n belongs to the
    plate's members one by one, and the n evaluations are one batch. Of nested plates
    the axes match from the right, as NumPyro's: (sessions, subjects, …), (subjects, …)
    or (sessions, 1, …). In a plate that its site does not stand in, such as the trials
    of one subject, the n factors multiply. ``numpyro.handlers.mask`` leaves members
    out, which then cost nothing; ``numpyro.handlers.scale`` with a number raises the
    factor to that power.

    Args:
        name: the site's name.
        log_weight: a scalar that depends on the program's sites; under ``"noised"``
            possibly a function of the level's index that returns one. With ``at`` a
            factor over one event of that site, whose conditions are data; or a
            `Reward`, a criterion without a gradient.
        anneal: as for `observe`; a factor needs none.
        at: the site that a factor or a reward looks at: the value that `sample`
            returned, or its name.
        block: the number of members of plates that are evaluated at once, to bound
            memory; left out, all.

    Raises:
        DoublyIntractableError: a factor at a site that depends on a latent.
        ProgramError: ``at`` names no site, or one whose prior has no noised density
            here; or a mask is not known before compilation.
        ShapeError: a log-weight of several numbers outside of plates; events of another
            shape than the site's, plates that are not the site's, or a condition of
            which several axes may be the plates'.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def positive(f):
        ...     x = cp.sample("x", f)
        ...     cp.factor("above", jax.nn.log_sigmoid(10 * x))
        >>> f = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(20))
        >>> density = cp.compile(positive, f)
        >>> right, left = (density.log_density({"x": x}, 0) for x in (1.0, -1.0))
        >>> round(float(right - left), 1)
        10.0
    """
    _check_name("factor", name, log_weight)
    policy = as_policy(name, anneal)
    if isinstance(log_weight, Reward):
        _reward(name, log_weight, at, anneal)
        return
    if is_factor(log_weight) or at is not None:
        evidence = _checked_factor(name, log_weight, at, anneal)
        if block is not None:
            check_count(block, "block")
        _check_place("factor", name)
        # An observed statement without data: plates, masks and scales act on it.
        numpyro.sample(
            name,
            FactorDistribution(evidence),
            obs=jnp.zeros(()),
            infer={"at": at, "block": block},
        )
        return
    if block is not None:
        raise InvalidValueError(
            f"Evidence {name!r} is a log-weight, and block= bounds the copies of a "
            "factor that are evaluated at once.",
            fix="leave block= out.",
        )
    if isinstance(log_weight, dist.Distribution):
        raise WrongTypeError(
            f"Evidence {name!r} is a distribution.",
            fix=f"write cp.observe({name!r}, distribution, value) for data, or pass "
            "its log_prob(value).",
        )
    if callable(log_weight):
        log_weight = _at_level(name, log_weight, anneal)
    _check_place("factor", name)
    # The statement that numpyro.factor makes.
    law = dist.Unit(_as_log_weight(name, log_weight))
    numpyro.sample(name, law, obs=jnp.zeros((0,)), infer={"anneal": policy})


def _reward(name: str, reward: Reward, at: object, anneal: object) -> None:
    """State a reward of a site, for `infer` to add to the density."""
    if at is None:
        raise WrongTypeError(
            f"The reward {name!r} does not say which site it looks at.",
            fix=f"write cp.factor({name!r}, reward, at=x), with x the value that "
            "cp.sample returned.",
        )
    if anneal is not None:
        raise InvalidValueError(
            f"The reward {name!r} got anneal={anneal!r}, and is not annealed with the "
            "noise.",
            fix="leave anneal= out.",
        )
    _check_place("factor", name)
    # An observed statement of log-weight 0: plates and handlers act on it.
    law = dist.Unit(jnp.zeros(()))
    infer = {"at": at, "reward": reward}
    numpyro.sample(name, law, obs=jnp.zeros((0,)), infer=infer)


def _as_log_weight(name: str, log_weight: object) -> Array:
    """A log-weight as an array of floats; refuses one that is true or false, or
    complex."""
    weight = _as_array(name, log_weight)
    is_event = weight.dtype == bool
    if is_event or jnp.iscomplexobj(weight):
        kind = "true or false" if is_event else "complex"
        raise WrongTypeError(
            f"The log-weight of {name!r} is {kind}.",
            fix="for an event write jnp.where(event, 0.0, -jnp.inf).",
        )
    # A plate's members have one each.
    in_plate = any(isinstance(each, numpyro.plate) for each in active_handlers())
    if weight.size != 1 and not in_plate:
        raise ShapeError(
            f"The log-weight of {name!r} has shape {weight.shape}, and a program's "
            "log-weight is one number.",
            fix="write jnp.sum(log_weight), if the entries are log-weights of terms "
            "that multiply.",
        )
    return weight.astype(jnp.result_type(float, weight))


def _checked_factor(name: str, factor: object, at: object, anneal: object) -> Factor:
    """Return the factor at a site. Refuse one without its site, a site without a
    factor, and a policy, which factors do not need."""
    if at is None:
        raise WrongTypeError(
            f"Evidence {name!r} is a factor, and at= does not name the site that it "
            "looks at.",
            fix=f"write cp.factor({name!r}, f, at=x), with x the value that cp.sample "
            "returned.",
        )
    if not is_factor(factor):
        raise WrongTypeError(
            f"Evidence {name!r} with at= needs a factor; got {a_kind(factor)}.",
            fix="leave at= out for a log-weight, or wrap a function of the site in "
            "cp.Energy.",
        )
    if anneal is not None:
        raise InvalidValueError(
            f"Evidence {name!r} is a factor, which has noised densities of its own, "
            f"and got anneal={anneal!r}.",
            fix="leave anneal= out.",
        )
    return factor


class annealed(Messenger):
    """The annealing policy of the observations in a block:
    ``with cp.annealed("denoised"): ...``.

    An observation's own ``anneal=`` wins over the block's, an inner block over an outer
    one.

    Example:
        >>> import composeprob as cp, numpyro.distributions as dist
        >>> @cp.program
        ... def measured(f, y):
        ...     x = cp.sample("x", f)
        ...     with cp.annealed("denoised"):
        ...         cp.observe("y", dist.Normal(x**2, 1.0), y)
        >>> f = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(20))
        >>> density = cp.compile(measured, f, 2.0)
        >>> "y: observed Normal, annealed 'denoised'" in str(density)
        True
    """

    def __init__(self, policy: str | Policy):
        if policy is None:
            raise InvalidValueError(
                "cp.annealed needs a policy.", fix=f"use one of: {', '.join(POLICIES)}."
            )
        self.policy = as_policy("annealed", policy)
        super().__init__()

    def process_message(self, msg: Message) -> None:
        is_observation = msg["type"] == "sample" and msg["is_observed"]
        if msg["type"] != LEVEL and not is_observation:
            return
        # A factor at a site needs no policy, and an inner block has set its own.
        infer = msg["infer"]
        if "at" not in infer and infer.get("anneal") is None:
            msg["infer"] = {**infer, "anneal": self.policy}


def _check_name(statement: str, name: object, second: object) -> None:
    """Refuse a statement whose name is not a string, or empty."""
    if isinstance(name, str) and name:
        return
    got = repr(name) if isinstance(name, str) else a_kind(name)
    fix = f"the name comes first, a string: cp.{statement}('x', …)."
    if isinstance(second, str) and second:
        fix = f"write cp.{statement}({second!r}, …): the name comes first."
    raise WrongTypeError(
        f"The name in cp.{statement} must be a string; got {got}.", fix=fix
    )


def active_handlers() -> list[Messenger]:
    """NumPyro's handlers of effects that see the next statement, the outermost first;
    none outside of a program."""
    # NumPyro says this nowhere in public; its own control flow reads the same list.
    return numpyro.primitives._PYRO_STACK


def _check_place(statement: str, name: str) -> None:
    """Refuse a statement outside of any program and any handler of NumPyro's."""
    # Without a handler numpyro.sample would draw a value, which no density sees.
    if not active_handlers():
        raise ProgramError(
            f"cp.{statement}({name!r}, …) stands outside of a program, where it means "
            "nothing.",
            fix="write it in a function under @cp.program, and pass that to "
            "cp.compile.",
        )


def _fix_of_no_factor(value: object) -> str:
    """The fix that turns a value in the place of a factor into a factor."""
    if isinstance(value, str):
        return f"cp.load({value!r}) is a factor of the zoo, where cp.zoo() lists it."
    if isinstance(value, type):
        return f"call it: {value.__name__}(…), with its parameters."
    if hasattr(value, "shape"):
        return (
            "of samples cp.Analytic(points, schedule) makes a factor; data go to "
            "cp.observe(name, distribution, value)."
        )
    # A training run, which this module cannot import either.
    if is_factor(getattr(value, "factor", None)):
        return "the factor that was trained is run.factor."
    # A program, which this module cannot import.
    if hasattr(value, "check_arguments"):
        return (
            "call the program in the place of this statement: its own sites are then "
            "part of this one."
        )
    return (
        "wrap a network in cp.Diffusion, a log-density in cp.Energy, samples or a "
        "distribution in cp.Analytic."
    )


def _as_array(name: str, value: object) -> Array:
    """The value as a JAX array; refuses one that is not made of numbers, and integers
    that JAX would wrap around."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(value, np.ndarray):
            detail = f" of {value.dtype}"
        else:
            first_line, *_ = str(error).split("\n")
            detail = f": {first_line}".rstrip(".")
        raise WrongTypeError(
            f"The value of {name!r} must be a number or an array; got "
            f"{type(value).__name__}{detail}.",
            fix="pass what was measured (or for cp.factor a log-weight) as numbers.",
        ) from error
    # Without jax_enable_x64 JAX makes int32 of larger integers without a word.
    whole = jnp.issubdtype(array.dtype, jnp.integer) and not isinstance(value, Array)
    if whole and np.any(np.asarray(value) != np.asarray(array)):
        raise InvalidValueError(
            f"The value of {name!r} holds whole numbers that {array.dtype} does not "
            "hold.",
            fix="pass floats, count in larger units, or enable jax_enable_x64.",
        )
    return array


def _at_level(
    name: str, function: Callable[[Array], Weight], anneal: str | Policy | None
) -> Weight:
    """The return value of a function of the level; the policy in force must take such
    functions."""
    message: Message = {
        "type": LEVEL,
        "name": name,
        "fn": lambda: 0,  # NumPyro calls it where no handler gives a value
        "args": (),
        "kwargs": {},
        "value": None,
        "infer": {"anneal": as_policy(name, anneal)},
    }
    # An enclosing block fills in its policy, and the interpreter the level.
    apply_stack(message)
    policy = message["infer"]["anneal"] or Policy()
    try:
        return policy.of_level(name, function, message["value"])
    except NOT_CONCRETE as error:
        request, fix, where = number_request(error)
        raise ProgramError(
            f"The function of the level at {name!r} {request} a value that is known "
            "only in compiled code: the level, or a site.",
            where=where,
            fix=fix,
        ) from error
