"""The public call: `infer`, what refines its arguments, and what they are checked for
before anything is compiled."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.arguments import check_count, check_key, with_call_errors
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import (
    AlignmentError,
    CapabilityError,
    InvalidValueError,
    WrongTypeError,
)
from composeprob.kernels.kernel import Kernel
from composeprob.results.result import Result
from composeprob.runtime.stages import FewAncestors, State, carry_out
from composeprob.runtime.writer import Checkpoint, Draws
from composeprob.samplers.choose import (
    can_wait,
    choose,
    independent,
    patient,
    without_data,
)
from composeprob.samplers.run import Pace
from composeprob.samplers.sampler import Sampler
from composeprob.samplers.spread import Spread, every_device
from composeprob.schedule import Schedule

Params = ParamSpec("Params")


def _checked(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Refuses calls whose arguments do not fit, with an example of one that does."""
    call = with_call_errors(function)

    @functools.wraps(function)
    def checked(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        density = args[0] if args else kwargs.get("density")
        if not isinstance(density, AnnealedDensity):
            raise WrongTypeError(
                f"infer takes a compiled density; got {type(density).__name__}.",
                fix="call cp.compile(program, …) first, with what the program takes, and pass what that returns.",
            )
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
    levels: str | ArrayLike | None = None,
    draws: int | Draws | None = None,
    thin: int = 1,
    checkpoint_dir: str | Path | Checkpoint | None = None,
    progress: bool = True,
) -> Result:
    """Sample a compiled program.

    The levels are visited from the noisiest to level 0 inside one compiled loop:
    neither the number of levels nor other numbers in the density or the sampler compile
    again. Ctrl-C returns what is done so far.

    Args:
        density: from `compile`.
        key: a typed random key, ``jax.random.key(0)``. Samples depend on it, on
            ``num_chains`` and on ``chunk`` only; without ``chunk`` those of other
            numbers of devices may differ by rounding.
        num_chains: N, chains that travel together.
        sampler: how they travel; left out, chosen by what the density offers and by N:
            ``result.reason``. Where modes, or the evidence, rest on too little then,
            and log-densities can be compared between modes, chains on closer levels
            take its place, for some 4,800 evaluations of each more.
        mesh: spread the chains over all devices of this mesh, of one axis or two, which
            may be at most N. Left out, over all of `jax.devices`. Where N is no
            multiple of their number, the last of them evaluates a few chains twice.
            With a second axis, as in ``Mesh(np.reshape(jax.devices(), (2, 4)),
            ('chains', 'model'))``, arrays of the density (a network's weights) of more
            than 1 MiB are not on every device whole, but in parts along that axis,
            wherever a length of theirs divides: for networks that leave no room else.
            Each evaluation takes one all-gather of each such array that it uses, which
            is forgotten again after it. The samples are those of whole networks.
        chunk: chains that a device evaluates at once. The same samples, bit for bit,
            then come out on two devices or more of a kind, and with most factors on
            one. Left out, each device evaluates all that it has.
        levels: where the chains stop on their way down. ``"adaptive"``: wherever the
            weights' variance and the error of the last step say (`SMC` only), on a grid
            between the density's levels where its factors know any log-SNR, else on
            those levels; the same key gives the same ones, and what a `Result` reports
            by level it reports of them. An array of log-SNR: these, in any order, which
            every factor must know. Left out, all levels of the density.
        draws: after the last level go on at level 0 with the sampler's kernel, and keep
            so many draws of every chain; a `Draws` says where they are kept, too.
        thin: transitions between two draws.
        checkpoint_dir: a folder for checkpoints, from which the same call continues; a
            `Checkpoint` says whether it must, or must not.
        progress: whether to show a progress bar.

    Returns:
        The samples with their diagnostics; look at ``result.status`` first.

    Raises:
        InvalidValueError, WrongTypeError: a bad argument; a folder that cannot be
            written to.
        CapabilityError: the sampler needs what a factor does not offer, cannot choose
            its levels, has no kernel to take draws with, or has one (`BlackJAX`) that
            devices with networks in parts cannot run in step; a call inside of
            `jax.jit`, `jax.vmap` or `jax.grad`.
        AlignmentError: a factor does not know one of the ``levels``.
        LoadError: the checkpoint belongs to another run, or is damaged.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def single(f):
        ...     return cp.sample("x", f)
        >>> f = cp.Analytic(dist.Normal(1.0, 0.5), cp.Schedule.log_snr(20))
        >>> result = cp.infer(cp.compile(single, f), jax.random.key(0), num_chains=1000, sampler=cp.Ancestral())
        >>> result["x"].shape, round(float(result["x"].mean()), 1)
        ((1000,), 1.0)
        >>> print(result.status)
        OK
    """
    num_chains = check_count(num_chains, "num_chains")
    check_key(key)
    _check_outermost(density, key)
    if sampler is not None and not isinstance(sampler, Sampler):
        raise not_a_sampler(sampler)
    if checkpoint_dir is not None and not isinstance(checkpoint_dir, Checkpoint):
        checkpoint_dir = Checkpoint(checkpoint_dir)
    chosen, pace = on_levels(density, levels, num_chains)
    spread = Spread.checked(
        every_device(num_chains, chunk) if mesh is None else mesh, chunk, num_chains
    )
    if isinstance(draws, Draws) and thin != 1:
        raise InvalidValueError(
            f"thin={thin} was given beside {draws}.",
            fix=f"say it once: cp.Draws({draws.number}, thin={thin}).",
        )
    draws = draws if isinstance(draws, Draws) else Draws(draws, thin)
    chosen_here, each, began = sampler is None, draws.number or 1, time.monotonic()
    sampler, reason = (
        choose(chosen, num_chains, each)
        if sampler is None
        else (sampler, "chosen by the user")
    )

    def state(
        number: int,
        on: AnnealedDensity,
        pace: Pace | None,
        chosen: tuple[Sampler, str],
        spent: int = 0,
    ) -> State:
        """The run of this number: its checkpoints are in a folder of its own inside of
        the call's, and its random numbers are others, as what they did to the run whose
        place it takes is why it is made."""
        folder = ("", "instead", "closer")[number]
        kept = checkpoint_dir and Checkpoint(
            Path(checkpoint_dir.folder) / folder, checkpoint_dir.resume
        )
        call = key, num_chains, spread, pace, draws, kept, progress
        return State(on, *call, *chosen, series=2 * number, spent=spent, began=began)

    run, result = state(0, chosen, pace, (sampler, reason)), None
    run.gives_up = chosen_here
    waits = chosen_here and levels is None and can_wait(density)
    try:
        result = carry_out(run)
    except FewAncestors as few:
        why = f"SMC's {num_chains} chains had come to descend from {few}"
        spent = run.sampler.evaluations(int(run.visits.made))
        if not (waits and without_data(density)):
            other = independent(chosen, why, num_chains, each)
            run = state(1, density if pace else chosen, None, other, spent)
            run.given_up = True
            result = carry_out(run)
    if result is not None:
        if not (
            run.weak
            and waits
            and (result.log_evidence is None or density.top.normalised)
        ):
            return result
        why, spent = (
            f"{run.reason}; but {run.weak}, so that another run took its place",
            result.evaluations,
        )
    closer = density
    with contextlib.suppress(CapabilityError):  # of a copy with other arrays
        closer = _between(
            density, np.linspace(0, density.num_levels - 1, tuning.PATIENT.levels)
        )
    run = state(2, closer, None, patient(closer, why, num_chains), spent=spent)
    try:
        patiently = carry_out(run)
    except KeyboardInterrupt:
        if result is None:
            raise
        return result
    return (
        result
        if result and run.interrupted == "descend" and draws.store is None
        else patiently
    )


def _check_outermost(density: AnnealedDensity, key: Array) -> None:
    """Refuses a call inside of a transformation of JAX: a run compiles its levels,
    looks at numbers and is timed."""
    constant = jax.device_put(
        np.float32(0.0)
    )  # traced inside of `jax.jit`; outside nothing is compiled for it
    if any(
        isinstance(leaf, jax.core.Tracer)
        for leaf in jax.tree.leaves((density, key, constant))
    ):
        raise CapabilityError(
            "infer was called inside of jax.jit, jax.vmap, jax.grad or another transformation of JAX, where it cannot "
            "look at what it has computed so far.",
            fix="call it outside: it compiles what it runs. In place of a vmap over keys use more num_chains, or a "
            "Python loop, which compiles once.",
        )


def not_a_sampler(given: object) -> WrongTypeError:
    """The error for what was passed as ``sampler``."""
    samplers, kind = (
        "cp.SMC(), cp.AnnealedMCMC(cp.MALA(), steps_per_level=10) or cp.Ancestral()",
        type(given),
    )
    found = repr(given) if isinstance(given, str) else kind.__name__
    if isinstance(given, type):
        found, kind = f"the class {given.__name__}", given
    if issubclass(kind, Sampler):
        fix = (
            f"make a sampler of it by calling it, with its settings if any: {samplers}"
        )
    elif issubclass(kind, Kernel):
        fix = "a kernel needs a driver around it: cp.AnnealedMCMC(kernel, steps_per_level=10) or cp.SMC(kernel)"
    else:
        fix = f"pass {samplers}, or leave it out, and one is chosen"
    return WrongTypeError(f"sampler must be a sampler; got {found}.", fix=f"{fix}.")


def on_levels(
    density: AnnealedDensity, levels: str | ArrayLike | None, num_chains: int
) -> tuple[AnnealedDensity, Pace | None]:
    """The density on the levels that N chains may visit, and how they choose among
    them; None where they visit all.

    Raises:
        InvalidValueError: no such levels.
        AlignmentError: a factor does not know one of them.
    """
    if levels is None:
        return density, None
    if isinstance(levels, str):
        if levels != "adaptive":
            raise InvalidValueError(
                f"Unknown levels {levels!r}.",
                fix="pass 'adaptive', an array of log-SNR, or leave levels out.",
            )
        steps = -(-tuning.FINE_LEVELS // max(density.num_levels - 1, 1))
        return _between(
            density, np.arange((density.num_levels - 1) * steps + 1) / steps
        ), Pace.default(num_chains)
    fix = "for example levels=np.linspace(10, -8, 60)."
    try:
        log_snr = np.asarray(levels, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(
            f"levels must be numbers, log-SNR; got {levels!r}.", fix=fix
        ) from error
    finite = np.isfinite(log_snr).all()
    if log_snr.ndim != 1 or not log_snr.size or not finite:
        text = f"levels must be one axis of finite log-SNR; got an array of shape {log_snr.shape}"
        raise InvalidValueError(
            text + ("." if finite else " with numbers that are not finite."), fix=fix
        )
    return density.on(
        Schedule.from_arrays(*density.schedule.noise_at(np.sort(log_snr)[::-1]))
    ), None


def _between(density: AnnealedDensity, places: np.ndarray) -> AnnealedDensity:
    """The density on levels at these places among its own, or its own where its factors
    know no others."""
    known = np.asarray(density.schedule.log_snr, np.float64)
    with contextlib.suppress(AlignmentError):
        wanted = np.interp(places, np.arange(len(known)), known)
        return density.on(Schedule.from_arrays(*density.schedule.noise_at(wanted)))
    return density
