"""The public call `infer`: its checks before anything is compiled, and the loop over
the attempts of its plan."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.arguments import check_count, check_key, with_call_errors
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.categorical import CategoricalDensity, UniformDensity
from composeprob.errors import (
    CapabilityError,
    InvalidValueError,
    WrongTypeError,
)
from composeprob.kernels.kernel import Kernel
from composeprob.results.checks import CHECKS, Check
from composeprob.results.result import Result
from composeprob.runtime.extend import Course, can_extend
from composeprob.runtime.next_step import check_not_given
from composeprob.runtime.plan import Attempt, Tried, between_levels, plan
from composeprob.runtime.population import Execution
from composeprob.runtime.rewards import check_rewards, with_rewards
from composeprob.runtime.stages import State, carry_out
from composeprob.runtime.writer import Checkpoint, Draws
from composeprob.samplers.run import Pace
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import Spread, every_device
from composeprob.schedule import Schedule
from composeprob.settings import usual

Params = ParamSpec("Params")


def _checked(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Refuse calls whose arguments do not fit, with an example of one that does."""
    call = with_call_errors(function)

    @functools.wraps(function)
    def checked(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        density = args[0] if args else kwargs.get("density")
        if not isinstance(density, AnnealedDensity):
            raise WrongTypeError(
                f"infer takes a compiled density; got {type(density).__name__}.",
                fix="call cp.compile(program, …) first, with the program's "
                "arguments, and pass the density that it returns.",
            )
        with usual():
            return call(*args, **kwargs)

    return checked


@_checked
def infer(
    density: AnnealedDensity,
    key: Array,
    *,
    num_chains: int,
    sampler: Sampler | None = None,
    mesh: Mesh | None = None,
    chunk: int | None = None,
    levels: str | ArrayLike | int | None = None,
    draws: int | Draws | None = None,
    thin: int = 1,
    checkpoint_dir: str | Path | Checkpoint | None = None,
    progress: bool = True,
    checks: Check | Sequence[Check] = (),
) -> Result:
    """Sample a compiled program.

    The levels are visited from the noisiest to level 0 inside one compiled loop:
    neither the number of levels nor other numbers in the density or the sampler compile
    again. Ctrl-C returns the samples so far.

    Args:
        density: from `compile`.
        key: a typed random key, ``jax.random.key(0)``. Samples depend on it, on
            ``num_chains`` and on ``chunk`` only; without ``chunk`` other numbers of
            devices may change them by rounding.
        num_chains: N, chains that travel together.
        sampler: how they travel. Left out, it is chosen by the density's capabilities
            and N; ``result.reason`` says why. Where SMC's chains come to descend from
            too few, it stops, and independent chains take its place. A result whose
            ``trust`` is not enough is replaced by a run on closer levels, for some
            4,800 evaluations of each chain more, if log-densities can be compared
            between modes and ``levels`` is left out.
        mesh: spread the chains over all devices of this mesh, of one axis or two, with
            at most N devices. Left out, over all of `jax.devices`. Where N is not a
            multiple of their number, the last device evaluates a few chains twice.
            With a second axis, as in ``Mesh(np.reshape(jax.devices(), (2, 4)),
            ('chains', 'model'))``, arrays of the density (a network's weights) of more
            than 1 MiB are cut into shards along that axis, if it divides one of their
            lengths: for networks that fit on no device otherwise. Each evaluation takes
            one all-gather of each such array that it uses, which is freed again after
            it. The samples are those of whole networks.
        chunk: chains that a device evaluates at once. The same samples, bit for bit,
            then come out on two devices or more of a kind, and with most factors on
            one. Left out, each device evaluates all that it has.
        levels: where the chains stop on their way down. ``"adaptive"``: chosen by the
            variance of the weights and the error of the last step (`SMC` only), on a
            grid between the density's levels if its factors can be evaluated at any
            log-SNR, else on those levels; the same key gives the same levels, and the
            `Result` reports only these. An array of log-SNR, in any order, at which
            every factor can be evaluated. Of categorical sites the number of reveals:
            each but the last makes several positions visible, drawn independently of
            one another given what was visible before. Left out, all levels of the
            density.
        draws: after the last level, go on at level 0 with the sampler's kernel, and
            keep this many draws of every chain; a `Draws` also says where to keep them.
        thin: transitions between two draws.
        checkpoint_dir: a folder for checkpoints, from which the same call continues; a
            `Checkpoint` says whether it must, or must not.
        progress: whether to show a progress bar.
        checks: checks of your own, each a `Check`, which ask the run beside the
            library's; their findings are in ``result.status``. `Result.extend` does not
            ask them again.

    Returns:
        The samples with their diagnostics; look at ``result.status`` first.

    Raises:
        InvalidValueError, WrongTypeError: a bad argument; a folder that cannot be
            written to.
        CapabilityError: the sampler needs a capability that a factor lacks, cannot
            choose its levels, has no kernel to take draws with, or has one (`BlackJAX`)
            that devices with sharded networks cannot run in step; a call inside of
            `jax.jit`, `jax.vmap` or `jax.grad`.
        AlignmentError: a factor cannot be evaluated at one of the ``levels``.
        LoadError: the checkpoint belongs to another run, or is damaged.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def single(f):
        ...     return cp.sample("x", f)
        >>> f = cp.Analytic(dist.Normal(1.0, 0.5), cp.Schedule.log_snr(400))
        >>> density = cp.compile(single, f)
        >>> key = jax.random.key(0)
        >>> result = cp.infer(density, key, num_chains=1000, sampler=cp.Ancestral())
        >>> result["x"].shape, round(float(result["x"].mean()), 1)
        ((1000,), 1.0)
        >>> print(result.status)
        OK
    """
    num_chains = check_count(num_chains, "num_chains")
    check_key(key)
    _check_outermost(density, key)
    _check_process()
    if sampler is not None and not isinstance(sampler, Sampler):
        raise not_a_sampler(sampler)
    if checkpoint_dir is not None and not isinstance(checkpoint_dir, Checkpoint):
        checkpoint_dir = Checkpoint(checkpoint_dir)
    all_checks = _with_own(checks)
    visited, pace = on_levels(density, levels, num_chains)
    if mesh is None:
        mesh = every_device(num_chains, chunk)
    call = _Call(
        key=key,
        num_chains=num_chains,
        spread=Spread.checked(mesh, chunk, num_chains),
        draws=_with_thinning(draws, thin),
        checkpoint=checkpoint_dir,
        progress=progress,
        checks=all_checks,
        began=time.monotonic(),
    )
    check_rewards(density, call.draws.number)
    check_not_given(density)
    tried: list[Tried] = []
    attempts = plan(
        density,
        num_chains,
        call.draws.number,
        tried,
        visited=visited,
        pace=pace,
        own_levels=levels is None,
        sampler=sampler,
    )
    for attempt in attempts:
        try:
            tried.append(call.carry_out(attempt, tried))
        except KeyboardInterrupt:
            if not tried:
                raise
            break
        if tried[-1].enough:
            break
    result = _standing(tried, replaced=call.draws.store is not None)
    result = with_rewards(result, key, chunk, progress)
    return can_extend(result, Course(Execution(chunk, progress)))


def _standing(tried: Sequence[Tried], replaced: bool) -> Result:
    """The result that stands: the last one.

    Samples above level 0 are worth less than those of the attempt before, which stand
    then, unless its draws on disk were ``replaced``.
    """
    last = tried[-1]
    if len(tried) > 1 and last.interrupted == "descend" and not replaced:
        last = tried[-2]
    return last.result


@dataclass(frozen=True)
class _Call:
    """The arguments that all attempts of one call of `infer` share."""

    key: Array
    num_chains: int
    spread: Spread
    draws: Draws
    checkpoint: Checkpoint | None
    progress: bool
    checks: Sequence[Check]
    began: float  # by the monotonic clock

    def carry_out(self, attempt: Attempt, tried: Sequence[Tried]) -> Tried:
        """Carry out an attempt after those that were ``tried``."""
        spent = 0
        if tried:
            spent = tried[-1].result.evaluations
        checkpoint = self.checkpoint
        if checkpoint is not None:
            folder = Path(checkpoint.folder) / attempt.name
            checkpoint = Checkpoint(folder, checkpoint.resume)
        state = State(
            attempt,
            self.key,
            self.num_chains,
            self.spread,
            self.draws,
            checkpoint,
            self.progress,
            self.checks,
            spent=spent,
            began=self.began,
        )
        return carry_out(state)


def _with_own(checks: Check | Sequence[Check]) -> Sequence[Check]:
    """Return the library's checks and a user's, which are asked before the remark on
    runs without a finding."""
    own: list[Any] = [checks]
    if isinstance(checks, list | tuple):
        own = list(checks)
    for check in own:
        if not isinstance(check, Check):
            raise WrongTypeError(
                f"checks must be objects of cp.Check; got {check!r}.",
                fix="derive a class from cp.Check, and pass an object of it: "
                "checks=[MyCheck()].",
            )
        for attribute in ("code", "withholds", "meaning"):
            if not hasattr(check, attribute):
                raise WrongTypeError(
                    f"The check {type(check).__name__} has no {attribute}.",
                    fix="a check has code, the name of its findings; withholds, "
                    "whether they mislead standard errors; and meaning, its question "
                    "in words.",
                )
    *problems, remark = CHECKS
    return (*problems, *own, remark)


def _with_thinning(draws: int | Draws | None, thin: int) -> Draws:
    """Return the draws to keep; refuse a thinning that is given twice."""
    if not isinstance(draws, Draws):
        return Draws(draws, thin)
    if thin != 1:
        raise InvalidValueError(
            f"thin={thin} was given beside {draws}.",
            fix=f"say it once: cp.Draws({draws.number}, thin={thin}).",
        )
    return draws


def _check_outermost(density: AnnealedDensity, key: Array) -> None:
    """Refuse a call inside of a transformation of JAX: a run compiles its levels, reads
    numbers and is timed."""
    # Traced inside of `jax.jit`, even if no argument is; nothing is compiled for it
    # outside.
    constant = jax.device_put(np.float32(0.0))
    leaves = jax.tree.leaves((density, key, constant))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise CapabilityError(
            "infer was called inside of jax.jit, jax.vmap, jax.grad or another "
            "transformation of JAX, where it cannot read the numbers that it has "
            "computed so far.",
            fix="call it outside: it compiles its own loop. In place of a vmap over "
            "keys use more num_chains, or a Python loop, which compiles once.",
        )


_first_process: list[int] = []  # the process in which this module first ran a program


def _check_process() -> None:
    """Refuse to run in a fork of a process that has run a program: threads of JAX, and
    locks that they held, are not copied, so that the call would never return."""
    if not _first_process:
        _first_process.append(os.getpid())
    if _first_process[0] != os.getpid():
        raise CapabilityError(
            "infer was called in a fork of a process that has used JAX, whose threads "
            "a fork does not have.",
            fix="start processes by multiprocessing.get_context('spawn'), or by "
            "joblib's default, loky.",
        )


def not_a_sampler(given: object) -> WrongTypeError:
    """The error for an argument ``sampler`` that is not a sampler."""
    samplers = (
        "cp.SMC(), cp.AnnealedMCMC(cp.MALA(), steps_per_level=10) or cp.Ancestral()"
    )
    kind = given if isinstance(given, type) else type(given)
    if isinstance(given, type):
        description = f"the class {given.__name__}"
    elif isinstance(given, str):
        description = repr(given)
    else:
        description = kind.__name__
    if issubclass(kind, Sampler):
        fix = (
            f"make a sampler of it by calling it, with its settings if any: {samplers}"
        )
    elif issubclass(kind, Kernel):
        fix = (
            "a kernel needs a driver around it: "
            "cp.AnnealedMCMC(kernel, steps_per_level=10) or cp.SMC(kernel)"
        )
    else:
        fix = f"pass {samplers}, or leave it out, and one is chosen"
    return WrongTypeError(
        f"sampler must be a sampler; got {description}.", fix=f"{fix}."
    )


def on_levels(
    density: AnnealedDensity, levels: str | ArrayLike | None, num_chains: int
) -> tuple[AnnealedDensity, Pace | None]:
    """The density on the levels that N chains may visit, and how they choose among
    them; None where they visit all.

    Raises:
        InvalidValueError: levels that are neither "adaptive" nor finite log-SNR.
        AlignmentError: a factor cannot be evaluated at one of them.
    """
    if levels is None:
        return density, None
    if isinstance(density, CategoricalDensity):
        return density.in_steps(levels), None
    if isinstance(levels, str):
        if isinstance(density, UniformDensity):
            raise InvalidValueError(
                f"Levels of uniform noise are given; got {levels!r}.",
                fix="pass an array of log-SNR, or leave levels out.",
            )
        if levels != "adaptive":
            raise InvalidValueError(
                f"Unknown levels {levels!r}.",
                fix="pass 'adaptive', an array of log-SNR, or leave levels out.",
            )
        gaps = density.num_levels - 1
        steps = -(-tuning.FINE_LEVELS // max(gaps, 1))
        grid = np.arange(gaps * steps + 1) / steps
        return between_levels(density, grid), Pace.default(num_chains)
    log_snr = np.sort(_checked_log_snr(levels))[::-1]
    schedule = Schedule.from_arrays(*density.schedule.noise_at(log_snr))
    return density.on(schedule), None


def _checked_log_snr(levels: ArrayLike) -> Float[np.ndarray, " levels"]:
    """Return ``levels`` as one axis of finite log-SNR; refuse anything else."""
    fix = "for example levels=np.linspace(10, -8, 60)."
    try:
        log_snr = np.asarray(levels, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(
            f"levels must be numbers, log-SNR; got {levels!r}.", fix=fix
        ) from error
    text = (
        "levels must be one axis of finite log-SNR; "
        f"got an array of shape {log_snr.shape}"
    )
    if not np.isfinite(log_snr).all():
        raise InvalidValueError(f"{text} with numbers that are not finite.", fix=fix)
    if log_snr.ndim != 1 or not log_snr.size:
        raise InvalidValueError(f"{text}.", fix=fix)
    # Beyond these α + σ is α, or σ: the levels differ in name only.
    most = -2 * math.log(float(np.finfo(np.float32).eps))
    if np.abs(log_snr).max() > most:
        raise InvalidValueError(
            f"levels reach log-SNR {log_snr[np.abs(log_snr).argmax()]:.3g}, where "
            "single precision cannot tell signal and noise apart.",
            fix=f"stay within ±{math.floor(most)}; {fix}",
        )
    return log_snr
