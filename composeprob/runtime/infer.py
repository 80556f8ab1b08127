"""`infer`: drive a sampler over the levels, with one compilation, a progress bar, and nothing lost on interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

from composeprob.arguments import check_key
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.results.result import Result
from composeprob.runtime.arguments import by_name, not_a_sampler, not_compiled
from composeprob.runtime.compiled import make_room
from composeprob.runtime.job import Asked, FewAncestors, Job
from composeprob.runtime.levels import chosen
from composeprob.samplers.base import Sampler
from composeprob.samplers.choose import choose, independent
from composeprob.samplers.spread import Spread, every_device
from composeprob.settings import usual

INSTEAD = "instead"
"""In a folder of checkpoints: those of the sampler that takes the place of one that was given up."""


@by_name("cp.infer(density, key, num_chains=100)")
def infer(
    density: AnnealedDensity,
    key: Array,
    *,
    num_chains: int,
    sampler: Sampler | None = None,
    mesh: Mesh | None = None,
    chunk: int | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
    resume: bool | None = None,
    draws: int | None = None,
    thin: int = 1,
    store: str | Path | None = None,
    shard_above: int | None = None,
    levels: str | ArrayLike | None = None,
    keep_path: int | None = None,
) -> Result:
    """Sample a compiled program.

    The levels are visited from the noisiest to level 0 inside one compiled loop: neither the number of levels nor other
    numbers in the density or the sampler compile again. Ctrl-C returns what is done so far.

    Args:
        density: from `compile`.
        key: a typed random key, ``jax.random.key(0)``. Samples depend on it, on ``num_chains`` and on ``chunk`` only;
            without ``chunk`` those of other numbers of devices may differ by rounding.
        num_chains: N, chains that travel together.
        sampler: how they travel; left out, chosen by what the density offers and by N, and said in ``result.reason``.
        mesh: spread the chains over all devices of this mesh, of one axis or two, which may be at most N. Left out,
            over all of `jax.devices`. Where N is no multiple of their number, the last of them evaluates a few chains
            twice.
        chunk: chains that a device evaluates at once. The same samples, bit for bit, then come out on two devices or
            more of a kind, and with most factors on one. Left out, each device evaluates all that it has.
        progress: whether to show a progress bar.
        checkpoint_dir: a folder for checkpoints, written between levels beside the run, at most every 10 seconds, and
            at its end. A call that finds one there of the same program, sampler, key and number of chains goes on from
            it, and gives the samples, bit for bit, that an uninterrupted run gives on the same machine. A write that
            fails stops nothing; the status says so.
        resume: True refuses to start where there is no checkpoint, False starts again whatever there is; left out, the
            run goes on where there is one.
        draws: after the last level go on at level 0 with the sampler's kernel, and keep so many draws of every chain:
            samples then have shape ``(N, draws, …)``. `Adaptive` step sizes settle in 50 transitions before the first
            draw, and stay. All draws weigh the same: `SMC` resamples at level 0, and the kernel keeps equal weights. A
            run that is finished goes on from its checkpoint where more are asked for.
        thin: transitions between two draws.
        store: a folder for the samples, written block by block in zarr format (version 3) as the run goes on, so that
            memory does not grow with ``draws``; an earlier result there is replaced. ``result.samples`` are then read
            from it where they are indexed, and `Result.load` opens it. Of several processes each writes its own chains.
        shard_above: bytes. Arrays of the density (a network's weights) that are larger are not on every device whole,
            but in parts, one on each device along the second axis of a ``mesh`` such as ``jax.make_mesh((2, 4),
            ('chains', 'model'))``, wherever a length of theirs divides. For networks that leave no room else: each
            evaluation takes one all-gather of each such array that it uses, which is forgotten again after it. The
            samples are those of networks that are whole. Left out, every device has everything.
        levels: where the chains stop on their way down. ``"adaptive"``: wherever the weights' variance and the error of
            the last step say (`SMC` only), on a grid between the density's levels where its factors know any
            log-SNR, else on those levels; the same key gives the same ones, and what a `Result` tells by level it
            tells of them. An array of log-SNR: these, in any order, which every factor must know. Left out, all levels
            of the density.
        keep_path: keep where the chains are after every so many levels, in memory: ``result.descent``, of which
            ``result.plot(kind="descent")`` and ``result.animate("run.gif")`` make pictures. Of a run that goes on from
            a checkpoint these are the levels since then. The samples are the same with it and without.

    Returns:
        The samples with their diagnostics; look at ``result.status`` first.

    Raises:
        InvalidValueError, WrongTypeError: a bad argument; a ``checkpoint_dir`` or ``store`` that cannot be written to.
        CapabilityError: the sampler needs what a factor does not offer, cannot choose its levels, has no kernel to take
            draws with, or has one (`BlackJAX`) that devices with networks in parts cannot run in step.
        AlignmentError: a factor does not know one of the ``levels``.
        LoadError: the checkpoint belongs to another run, or is damaged.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def alone(f):
        ...     return cp.sample("x", f)
        >>> f = cp.Analytic(dist.Normal(1.0, 0.5), cp.Schedule.log_snr(20))
        >>> result = cp.infer(cp.compile(alone, f), jax.random.key(0), num_chains=1000, sampler=cp.Ancestral())
        >>> result["x"].shape, round(float(result["x"].mean()), 1)
        ((1000,), 1.0)
        >>> print(result.status)
        OK
    """
    _check_arguments(density, key, num_chains, sampler)
    _check_resume(checkpoint_dir, resume)
    num_chains = int(num_chains)
    original, (density, pace) = density, chosen(density, levels, num_chains)
    spread = Spread.of(every_device(num_chains, chunk) if mesh is None else mesh, chunk, num_chains)
    asked = Asked(
        density, key, num_chains, spread, mesh, progress, resume, draws, thin, store, shard_above, pace, keep_path
    )
    if sampler is not None:
        return _carried_out(asked, sampler, "chosen by the user", checkpoint_dir)
    sampler, reason = choose(density, num_chains)
    try:
        return _carried_out(asked, sampler, reason, checkpoint_dir, give_up=True)
    except FewAncestors as few:
        why = f"SMC's {num_chains} chains had come to descend from {few} at level {few.level}"
        folder = None if checkpoint_dir is None else Path(checkpoint_dir) / INSTEAD
        instead = asked._replace(density=original if pace else density, pace=None)
        return _carried_out(instead, *independent(density, why, num_chains), folder)


def _carried_out(
    asked: Asked, sampler: Sampler, reason: str, folder: str | Path | None, give_up: bool = False
) -> Result:
    """Prepare, levels, global moves, stay, draws, result.

    Raises:
        FewAncestors: if it is to be given up where too few of the first chains have descendants.
    """
    make_room()
    # LAPACK's matrices are small here: its threads would wait for one another longer than they work.
    with threadpool_limits(1, user_api="blas"), usual():
        job = Job(asked, sampler, folder)
        job.levels(give_up)
        job.global_moves()
        job.stay()
        job.draw()
        return job.result(reason)


def _check_resume(checkpoint_dir: object, resume: object) -> None:
    if checkpoint_dir is not None and not isinstance(checkpoint_dir, (str, Path)):
        raise WrongTypeError(
            f"checkpoint_dir must be a folder's path; got {checkpoint_dir!r}.", fix="pass a str or a pathlib.Path."
        )
    if checkpoint_dir is None and resume is not None:
        raise InvalidValueError(
            f"resume={resume} was given, but no folder of checkpoints.",
            fix="pass checkpoint_dir=, or leave resume out.",
        )


def _check_arguments(density: object, key: object, num_chains: object, sampler: object) -> None:
    if not isinstance(density, AnnealedDensity):
        raise not_compiled(density)
    if not isinstance(num_chains, (int, np.integer)) or isinstance(num_chains, bool):
        raise WrongTypeError(
            f"num_chains must be a whole number; got {num_chains!r}.", fix="pass an int, such as 1000."
        )
    if num_chains < 1:
        raise InvalidValueError(f"num_chains must be at least 1; got {num_chains}.", fix="ask for one chain or more.")
    check_key(key)
    if sampler is not None and not isinstance(sampler, Sampler):
        raise not_a_sampler(sampler)
