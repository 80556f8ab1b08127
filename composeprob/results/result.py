"""The result of `infer`: estimates, pictures, comparisons and files of the run that it
records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

import numpy as np
from jax import Array

from composeprob.arguments import NotPickled, check_path, check_writable
from composeprob.errors import CapabilityError, WrongTypeError, unknown_name
from composeprob.events import as_images, is_image
from composeprob.records import REPORTED
from composeprob.rendering import renderer
from composeprob.results import saving
from composeprob.results.comparison import compare
from composeprob.results.record import About, Record
from composeprob.results.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from composeprob.density.annealed import AnnealedDensity


class Result(NotPickled, Record):
    """A `Result` holds N weighted samples of a program, and the diagnostics of the run
    that made them, level by level.

    Arrays over levels have K entries, entry k belonging to level k; a level that was
    not visited, or a quantity that the sampler does not have, is NaN. Quantities that
    take a compilation of their own (``about.curl``, and findings of ``status`` on
    factors that do not agree) are computed on first use, and kept. Under a `Gibbs`
    kernel of B blocks acceptance, step size and quadrature error have shape (K, B),
    with a column for each of ``about.blocks``.

    Args:
        samples: constrained values of every site and deterministic, ``{name: (N, …)}``:
            chains lead, draws follow where there are any.
        log_weights: log of each chain's weight, up to a constant, shape (N,). All equal
            where a run ended above level 0, after `extend`, and for independent chains
            whose path weights correct the mode proportions, or give separated chains
            weight 0.
        log_evidence: estimate of log Z of the program, for samplers that give one.
            Where a factor's constant is unknown (a learned energy) it is relative to
            that constant.
        log_evidence_error: its standard error: that of the weights, from the genealogy
            of the chains; the discretisation error, which is the change beyond noise
            from leaving out every other level (unless ``check_levels=False``), with
            that of averaging potentials; and the signal of data of unit size at the
            noisiest level, where a run assumes pure noise. NaN where the status
            withholds it.
        evaluations: evaluations of the composed density per chain, warm-up and
            replaced runs included. One evaluation is one value-and-score of every
            factor. Those that tell errors and status are ``about.checks``.
        levels: an `xarray.Dataset` of diagnostics by level: ``acceptance``, the mean
            acceptance probability; ``step_size``, averaged over the level; ``ess``,
            effective sample size relative to N, before resampling; ``ancestors``,
            number of distinct ancestors, after resampling; ``non_finite``, number of
            proposals, over all chains, whose density, score or position was not finite;
            ``quadrature_error``, mean estimated error of the log-ratios of the accepted
            moves where a `LineIntegral` gives them: compare with 1, and 0 for kernels
            that need no quadrature; ``swaps``, mean probability of swaps with the next
            noisier level under `ReplicaExchange`. Its coordinates are ``level``,
            ``log_snr``, and ``block``.
        reason: why this sampler was chosen, and what was corrected.
        trust: what means, mode proportions and the evidence rest on; print it. None of
            a file without it.
        about: the facts of the run: sampler, seconds, draws, devices, random key,
            versions.
        status: findings of what went wrong, at which levels, and what to try.
        density: the compiled density; None after `load`.
    """

    _kept_by: ClassVar[str] = (
        "keep it by result.save(path), and read that by cp.Result.load(path)."
    )

    # The runtime sets it: that of results which were read from a file.
    _extends: ClassVar[Callable[..., Result]]

    if not TYPE_CHECKING:  # a type checker that saw this would believe in every name

        def __getattr__(self, name: str) -> NoReturn:
            # Not `self.samples`: a copy has no fields before it is filled in.
            sites = self.__dict__.get("samples", ())
            instead = {}
            for fact in fields(About):
                instead[fact.name] = f"write result.about.{fact.name}."
            for diagnostic in REPORTED:
                instead[diagnostic] = f"write result.levels[{diagnostic!r}]."
            for site in sites:
                instead[site] = f"write result[{site!r}]."
            raise unknown_name("Result", name, dir(self), instead)

    def extend(
        self,
        density: AnnealedDensity,
        key: Array,
        *,
        given: dict[str, str] | None = None,
        keep: int | None = None,
        before: AnnealedDensity | None = None,
    ) -> Result:
        r"""Go on with more data: return samples of a density that has some datum,
        member of a plate, or latent of NumPyro's more than this result's.

        The weights of the chains are multiplied by the likelihood of what is new; new
        members and latents are drawn from their priors, or near their data where these
        miss them. Where fewer than half of the chains count, they are resampled and
        moved at level 0, noised sites by `Renoise` and latents by `WarmUp`; a datum
        that leaves fewer by itself comes in by powers. ``log_evidence`` grows by log
        p(new | old), which ``reason`` states too. ``status`` has the findings of the
        run before, and new ones about ancestors, zero densities and drift; other
        checks, your own among them, are not asked again.

        With ``given``, the density is the next step of a Markov chain, and this a
        particle filter. Each chain keeps the values that it gives to latents z of the
        density, in place of their priors, and draws the noised site x by the reverse
        steps of its own factor. The weight of these has the expectation
        $\int f(x \mid z)\,p(y \mid x)\,dx$. Given sites are frozen; where few chains
        count, these are resampled and propose x once more, and a far datum comes in by
        powers, between which x is moved by `Renoise`. The result has the sites of the
        density alone: z of the step before, given all data so far, and x.

        Args:
            density: the same program, compiled with more data at the end; or a step.
            key: a typed random key.
            given: for a step, the site of this result that each latent takes its
                values from, such as ``{"past": "x"}``.
            keep: for a step, the number of steps back whose ancestors errors count
                (fixed lag). Left out, those of the first step, of which a long series
                leaves only one.
            before: the density of this result, compiled once more, for a result that
                was read from a file and has none. A lag begins anew.

        Raises:
            InvalidValueError: a density that differs in another way.
            CapabilityError: a result from a file without its density, latents under
                scores alone, or a step with other new latents or with factors without
                constants.

        Example:
            >>> import composeprob as cp, jax, numpyro.distributions as dist
            >>> @cp.program
            ... def study(f, ys):
            ...     x = cp.sample("x", f)
            ...     cp.observe("y", dist.Normal(x, 1.0).expand(ys.shape), ys)
            >>> f = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(20))
            >>> ys = jax.numpy.array([0.5, 1.0, 0.8])
            >>> key = jax.random.key(0)
            >>> result = cp.infer(cp.compile(study, f, ys[:2]), key, num_chains=1000)
            >>> result = result.extend(cp.compile(study, f, ys), key)
            >>> round(float(result.mean(lambda s: s["x"]).value), 1)
            0.6

            A step, for data that arrive in time:

            >>> @cp.program
            ... def step(y):
            ...     past = cp.sample("past", dist.Normal(0.0, 1.0))
            ...     law = dist.Normal(0.9 * past, 0.5)
            ...     x = cp.sample("x", cp.Analytic(law, cp.Schedule.log_snr(20)))
            ...     cp.observe("y", dist.Normal(x, 1.0), y)
            >>> result = result.extend(cp.compile(step, 0.4), key, given={"past": "x"})
            >>> sorted(result.samples)
            ['past', 'x']

        References:
            Chopin 2002, *A sequential particle filter method for static models*;
            Gordon, Salmond and Smith 1993, *Novel approach to nonlinear/non-Gaussian
            Bayesian state estimation*; Olsson and Douc 2019, *Numerically stable online
            estimation of variance in particle filters*.
        """
        # `infer` sets it on the instance: results know no samplers.
        extend: Callable[..., Result] | None = getattr(self, "_onwards", None)
        if extend is None and self.density is not None:
            raise CapabilityError(
                "This result is a copy, whose samples may be others, and cannot go on.",
                fix="extend the result that cp.infer returned, or start anew.",
            )
        if extend is None:
            return self._extends(self, density, key, given, keep, before)
        return extend(self, density, key, given, keep, before)

    def summary(self) -> Summary:
        """Make a table of weighted means, standard deviations and quantiles, with the
        outcome of the run; print it."""
        return Summary.of_result(self)

    def plot(self, kind: str = "overview") -> Figure:
        """Draw the result.

        Args:
            kind: ``"overview"``, a panel for each site and one with acceptance and step
                size by level: a site of two numbers is shown with its marginals over
                the density of level 0 (where the density has a log-density), images as
                a grid, anything else as histograms; ``"samples"``, the sites alone;
                ``"pairs"``, every number against every other; ``"levels"``, a panel for
                each diagnostic.

        Raises:
            InvalidValueError: no such kind, or nothing of this kind to draw.
        """
        return renderer().plot_result(self, kind)

    def images(self, site: str | None = None) -> np.ndarray:
        """Make images of a site's equally weighted samples (`unweighted`): as its
        models decode them, or of events that are images themselves, of shape (height,
        width) or (height, width, 1 or 3).

        Values of the latter in [0, 1] or [−1, 1] keep their meaning; others are
        stretched.

        Args:
            site: its name; left out, the only one that has images, or that models
                decode.

        Returns:
            (N, height, width, channels), values from 0 to 1.

        Raises:
            CapabilityError: events are not images, and no model of the program, or more
                than one, decodes them; or it is not clear which site is meant.
            UnknownSiteError: no such site.
        """
        if site is not None:
            self[site]  # refuses a name that is not a site's
        lead = 1 if self.about.draws is None else 2
        events = {
            name: tuple(np.shape(values)[lead:])
            for name, values in self.samples.items()
        }
        decoders = {} if self.density is None else self.density.described.pictures
        shown = {
            name
            for name, event in events.items()
            if name in decoders or is_image(event)
        }
        if site is None:
            candidates = set(decoders) if len(decoders) == 1 else shown
            if len(candidates) == 1:
                (site,) = candidates
        if site is None or site not in shown:
            raise _no_images(site, events, shown)
        values = self.unweighted()[site]
        if site in decoders:
            return decoders[site](values)
        return as_images(values)

    def report(self, path: str | os.PathLike) -> Path:
        """Write one HTML file with the samples of a run, their quality, and what to do
        next.

        It holds the program, estimates with intervals, samples, diagnostics by level,
        findings with remedies, the cost, the random key and versions, and needs no
        network. Returns its path, such as ``"run.html"``.
        """
        path = check_path(path, "The path of a report", "run.html")
        check_writable(path.parent, f"No report can be written to '{path}'")
        path.write_text(renderer().report(self), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        return renderer().display(self)

    def __len__(self) -> int:
        raise WrongTypeError(
            "A result has no length: it has several sites, and weights.",
            fix="of N chains write len(result.log_weights); of its sites "
            "len(result.samples).",
        )

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.samples)

    def __contains__(self, site: object) -> bool:
        return site in self.samples

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise WrongTypeError(
            "A result is not one array: it has several sites, and weights.",
            fix=f"write result[{next(iter(self.samples))!r}], or result.unweighted() "
            "for samples of equal weight.",
        )

    compare = compare
    to_arviz = saving.to_arviz
    to_pandas = saving.to_pandas
    numbers = saving.numbers
    parts = saving.parts
    save = saving.save

    @classmethod
    def load(cls, path: str | os.PathLike) -> Result:
        """Read a file that `save` wrote, or open the folder that was `infer`'s
        ``store``, whose samples stay on disk until they are indexed; ``density`` is
        None.

        Raises:
            LoadError: no such file or folder, one written by something else, or by a
                run that has not ended, or one whose arrays and facts do not fit
                together.
        """
        return saving.load(cls, path)

    def __repr__(self) -> str:
        sites = ", ".join(
            f"{name} {value.shape}" for name, value in self.samples.items()
        )
        return (
            f"Result({sites}; {self.about.sampler}; {self.evaluations} evaluations per "
            f"chain; status {self.status.code.upper()}; {self.about.seconds:.1f} s)"
        )


def _no_images(
    site: str | None, events: dict[str, tuple[int, ...]], shown: set[str]
) -> CapabilityError:
    """The error for a site without images, or for a site that is not named."""
    found = "Which site is meant is not clear: not exactly one has images."
    if site is not None:
        found = (
            f"No factor or shape defines images of {site!r}, of shape {events[site]}."
        )
    fix = (
        "images have the shape (height, width), (height, width, 1) or (height, width, "
        "3). Latents become images by their model: those of cp.from_diffusers do if "
        "all of the site's factors share one autoencoder, so load the model once; "
        "else, and after Result.load, call model.decode(result[site])."
    )
    if shown:
        names = ", ".join(map(repr, sorted(shown)))
        fix = f"name one of {names}: result.images(site)."
    return CapabilityError(found, fix=fix)
