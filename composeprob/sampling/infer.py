"""`infer`: drive a sampler over the levels, with one compilation, a progress bar, and nothing lost on interruption."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.curl import curl
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.result import Result
from composeprob.sampling import parts
from composeprob.sampling.arguments import by_name, not_a_sampler
from composeprob.sampling.base import Run, Sampler, begin, placed
from composeprob.sampling.choose import check_capabilities, choose, independent
from composeprob.sampling.compiled import read, sample_shapes, start
from composeprob.sampling.descend import descend, visits
from composeprob.sampling.ended import Ended, summed_up
from composeprob.sampling.resume import Saves, blank_like, fingerprint
from composeprob.sampling.smc import SMC
from composeprob.sampling.spread import Spread, every_device, everywhere, host
from composeprob.sampling.status import fewest_families
from composeprob.sampling.stay import stay
from composeprob.sampling.stream import Kept, NotKept, check_draws, stream

CURL = 2**31 - 2
"""Folded into the run's key for the directions along which curl is measured."""
COARSE = 2**31 - 6
"""Folded into the run's key for the run over every other level."""
INSTEAD = "instead"
"""In a folder of checkpoints: those of the sampler that takes the place of one that was given up."""
DRAWS = "draws.zarr"
"""In a folder of checkpoints: the draws of a run without a store of its own."""
LOOKED_AT = 64
"""Chains at whose positions curl is measured."""


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
        mesh: spread the chains over all devices of this mesh, of one axis or two; N must be a multiple of their number.
            Left out, over as many of `jax.devices` as N can be spread over evenly.
        chunk: chains that a device evaluates at once. The same samples, bit for bit, then come out on two devices or
            more of a kind, and with most factors on one; it must divide N over their number. Left out, each device
            evaluates all that it has.
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

    Returns:
        The samples with their diagnostics; look at ``result.status`` first.

    Raises:
        InvalidValueError, WrongTypeError: a bad argument; a ``checkpoint_dir`` or ``store`` that cannot be written to.
        CapabilityError: the sampler needs what a factor does not offer, has no kernel to take draws with, or has one
            (`BlackJAX`) that devices with networks in parts cannot run in step.
        LoadError: the checkpoint belongs to another run, or is damaged.
    """
    _check_arguments(density, key, num_chains, sampler)
    _check_resume(checkpoint_dir, resume)
    num_chains = int(num_chains)
    spread = Spread.of(every_device(num_chains, chunk) if mesh is None else mesh, chunk, num_chains)
    asked = Asked(density, key, num_chains, spread, mesh, progress, resume, draws, thin, store, shard_above)
    if sampler is not None:
        return _run(asked, sampler, "chosen by the user", checkpoint_dir)
    sampler, reason = choose(density, num_chains)
    try:
        return _run(asked, sampler, reason, checkpoint_dir, give_up=isinstance(sampler, SMC))
    except FewAncestors as few:
        why = f"SMC's {num_chains} chains had come to descend from {few} at level {few.level}"
        folder = None if checkpoint_dir is None else Path(checkpoint_dir) / INSTEAD
        return _run(asked, *independent(density, why), folder)


class Asked(NamedTuple):
    """What `infer` was asked for, checked; see there."""

    density: AnnealedDensity
    key: Array
    num_chains: int
    spread: Spread
    mesh: Mesh | None
    progress: bool
    resume: bool | None
    draws: int | None
    thin: int
    store: str | Path | None
    shard_above: int | None


class FewAncestors(Exception):
    """SMC's chains have become copies of few, at a level where something else can still be done."""

    def __init__(self, distinct: int, effective: float, level: int):
        super().__init__(f"{distinct} first ones, some so much more than others that they are worth {effective:.1f},")
        self.level = level


def _run(
    asked: Asked, sampler: Sampler, reason: str, checkpoint_dir: str | Path | None, give_up: bool = False
) -> Result:
    """One sampler's way down the levels, its stay, its draws, and what is to be said of them.

    Raises:
        FewAncestors: if it is to be given up where too few of the first chains have descendants.
    """
    density, key, num_chains, spread, mesh, progress, resume, draws, thin, store, shard_above = asked
    began = time.monotonic()
    check_capabilities(sampler, density)
    sampler = sampler.prepare(density)
    check_draws(draws, thin, store, sampler, density.described.where)
    parts.check_parts(shard_above, mesh, sampler)
    first = sampler.first_level(density)
    blank = begin(key, num_chains, density.num_levels, Spread(chunk=spread.chunk, rounds=spread.rounds))
    apart = None if draws is None else thin
    saves = None
    if checkpoint_dir is not None:
        saves = _saves(checkpoint_dir, resume, sampler, blank, density, key, first, apart)
    run, completed, done, earlier = blank, 0, 0, 0.0
    if saves is not None and (saved := saves.run()) is not None:
        run, completed, done, earlier = saved
    began -= earlier
    run = placed(run, spread)
    ready = spread.place(sampler, everywhere), parts.placed(parts.in_parts(density, spread, shard_above), spread)
    kept = None
    if draws is not None or store is not None:
        # Draws that a checkpoint goes on from are on disk too.
        folder = Path(checkpoint_dir) / DRAWS if store is None and checkpoint_dir is not None else store
        names = sample_shapes(sampler, run, density, first)
        kept = Kept(names, draws, folder, spread.devices, "" if saves is None else saves.run_id, done)

    def save(run: Run, completed: int, drawn: int = 0) -> None:
        if saves is not None:
            flush = None if kept is None or not drawn else kept.flush
            saves.offer(run, completed, drawn, time.monotonic() - began, flush)

    def judge(run: Run, completed: int) -> None:
        if give_up and (few := _few_ancestors(run, first + 1 - completed)) is not None:
            if saves is not None:
                saves.finish(run, completed, 0, time.monotonic() - began)
            raise few

    if completed:
        judge(run, completed)
    run, completed = descend(ready, run, first, completed, progress, save, judge)
    arrived = completed == first + 1
    turning = _curl(sampler, run, density, key, first + 1 - completed) if completed else {}
    if sampler.stays and arrived and int(run.stayed) == 0:
        run = stay(run, ready[1], progress)
    lost = None
    if draws is not None and arrived:
        assert kept is not None
        keep = lambda run, drawn: save(run, completed, drawn)  # noqa: E731
        run, done, lost = stream(ready[0], run, ready[1], kept, done, thin, progress, keep)
    unsaved = None
    if saves is not None and lost is None:  # else the last checkpoint is the one whose draws are there
        unsaved = saves.finish(run, completed, done, time.monotonic() - began)
    coarse = None
    if arrived and sampler.check_order is not None and sampler.estimates_evidence(density):
        coarse = _coarse(asked, ready, first, progress)
    shown = min(done, draws or 0)  # of a run that went further before
    samples, failed = _samples(run, ready, kept, shown)
    if store is None:
        samples = {name: np.asarray(values) for name, values in samples.items()}
    ended = Ended(run, samples, first, completed, done * thin, coarse, turning)
    result = summed_up(sampler, density, ended, reason, time.monotonic() - began)
    if draws is not None:
        short = arrived and done < draws
        status = result.status.stopped(done, draws) if short else result.status
        result = dataclasses.replace(result, draws=max(shown, 1), thin=thin, status=status)
    if saves is not None and lost is None:
        result = dataclasses.replace(result, status=result.status.saved(unsaved))
    lost = lost or failed
    if kept is not None and store is not None and lost is None:
        lost = kept.finish(*result.parts())
    return result if lost is None else dataclasses.replace(result, status=result.status.not_stored(lost))


def _few_ancestors(run: Run, level: int) -> FewAncestors | None:
    """Whether too few of the first chains have descendants at a level above 0 or there."""
    n, variance = len(run.log_weights), float(run.evidence_variance)
    effective = 1.0 / (variance * (n - 1) / n + 1 / n)
    if effective >= fewest_families(n):
        return None
    return FewAncestors(int(np.asarray(run.records.ancestors)[level]), effective, level)


def _coarse(asked: Asked, ready: tuple[Any, Any], first: int, progress: bool) -> float | None:
    """The log-evidence over every other level; None where it was interrupted."""
    key = jax.random.fold_in(asked.key, COARSE)
    blank = placed(begin(key, asked.num_chains, asked.density.num_levels), asked.spread)
    run, completed = descend(ready, blank, first, 0, progress, stride=2)
    return float(np.asarray(run.log_evidence)) if completed == visits(first, 2) else None


def _samples(run: Run, ready: tuple[Any, Any], kept: Kept | None, done: int) -> tuple[dict[str, Any], str | None]:
    """Every site's samples, and what went wrong with keeping them on disk."""
    if kept is not None and kept.draws is not None and done:
        return kept.samples(done), None
    values = read(run.spread, ready[1], ready[0].positions(run))
    if kept is None:
        return host(values), None
    if kept.draws is not None:  # none was drawn yet: where the chains are
        return {name: value[:, None] for name, value in host(values).items()}, None
    try:
        kept.last(values)
    except NotKept as error:
        return host(values), str(error)
    return kept.samples(1), None


def _saves(
    directory: str | Path,
    resume: bool | None,
    sampler: Sampler,
    run: Run,
    density: AnnealedDensity,
    key: Array,
    first: int,
    thin: int | None,
) -> Saves:
    """Open the checkpoints and read what is there; traces one level more, and compiles nothing."""
    blank = blank_like(eqx.filter_eval_shape(start, sampler, run, density, first))
    return Saves(directory, resume, fingerprint(density, sampler, key, first, thin, blank), blank)


def _curl(sampler: Sampler, run: Run, density: AnnealedDensity, key: Array, level: int) -> dict[str, float]:
    """The curl of what a line integral relied on; NaN where a network cannot be differentiated, which no run is lost
    for."""
    if not sampler.integrates_score:
        return {}
    positions = host(jax.tree.map(lambda leaf: leaf[:LOOKED_AT], sampler.positions(run)))
    try:
        return curl(density, positions, level, jax.random.fold_in(key, CURL))
    except (TypeError, ValueError, NotImplementedError):  # what JAX raises for custom rules and callbacks
        return {name: np.nan for name, _, offered in density.described.offers if "conservative" not in offered}


def _check_resume(checkpoint_dir: Any, resume: Any) -> None:
    if checkpoint_dir is not None and not isinstance(checkpoint_dir, (str, Path)):
        raise WrongTypeError(
            f"checkpoint_dir must be a folder's path; got {checkpoint_dir!r}.", fix="pass a str or a pathlib.Path."
        )
    if checkpoint_dir is None and resume is not None:
        raise InvalidValueError(
            f"resume={resume} was given, but no folder of checkpoints.",
            fix="pass checkpoint_dir=, or leave resume out.",
        )


def _check_arguments(density: Any, key: Any, num_chains: Any, sampler: Any) -> None:
    if not isinstance(density, AnnealedDensity):
        raise WrongTypeError(
            f"infer takes a compiled density; got {type(density).__name__}.", fix="call cp.compile(program, …) first."
        )
    if not isinstance(num_chains, (int, np.integer)) or isinstance(num_chains, bool):
        raise WrongTypeError(
            f"num_chains must be a whole number; got {num_chains!r}.", fix="pass an int, such as 1000."
        )
    if num_chains < 1:
        raise InvalidValueError(f"num_chains must be at least 1; got {num_chains}.", fix="ask for one chain or more.")
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
        raise WrongTypeError(
            f"key must be one typed random key; got {type(key).__name__}.", fix="pass jax.random.key(0), not PRNGKey."
        )
    if sampler is not None and not isinstance(sampler, Sampler):
        raise not_a_sampler(sampler)
