"""The result of `infer`: what it estimates, shows, compares and writes of the run that
it records."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

import numpy as np

from composeprob.arguments import NotPickled, check_path
from composeprob.errors import CapabilityError, unknown_name
from composeprob.results import saving
from composeprob.results.comparison import compare
from composeprob.results.geometry import as_images, is_image
from composeprob.results.record import About, Record
from composeprob.results.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Result(NotPickled, Record):
    """A `Result` holds N weighted samples of a program, and the diagnostics of the run
    that made them, level by level.

    Arrays over levels have K entries, entry k belonging to level k; a level that was
    not visited, or a quantity that the sampler does not have, is NaN. What takes a
    compilation of its own (``about.curl``, and what ``status`` says of factors that do
    not agree) is computed when it is first asked for, and kept. Under a `Gibbs` kernel
    of B blocks acceptance, step size and quadrature error have shape (K, B), with a
    column for each of ``about.blocks``.

    Args:
        samples: constrained values of every site and deterministic, ``{name: (N, …)}``:
            chains lead, draws follow where there are any.
        log_weights: log of each chain's weight, up to a constant, shape (N,). All equal
            except after `SMC`, and of independent chains whose shares the weights of
            their paths mend, or some of which lie apart where by these there is
            nothing, and weigh 0.
        log_evidence: estimate of log Z of the program, for samplers that give one.
            Where a factor's constant is unknown (a learned energy) it is relative to
            that constant.
        log_evidence_error: its standard error: that of the weights, from the genealogy
            of the chains; that of the levels' distance, which is what leaving out every
            other level changes beyond noise (unless ``check_levels=False``), and what
            averaging potentials does; and what data of unit size leave at the noisiest
            level, where a run takes noise for all there is. NaN where the status
            withholds it.
        evaluations: evaluations of the composed density per chain, warm-up and runs
            that were given up included. One evaluation is one value-and-score of every
            factor.
        levels: an `xarray.Dataset` of what is known level by level: ``acceptance``, the
            mean acceptance probability; ``step_size``, averaged over the level;
            ``ess``, effective sample size relative to N, before resampling;
            ``ancestors``, how many of the first chains have descendants, after
            resampling; ``non_finite``, number of proposals, over all chains, whose
            density, score or position was not finite; ``quadrature_error``, mean error,
            as estimated, of the log-ratios of the accepted moves where a `LineIntegral`
            gives them: compare with 1, and 0 for kernels that need no quadrature;
            ``swaps``, mean probability of swaps with the next noisier level under
            `ReplicaExchange`. Its coordinates are ``level``, ``log_snr``, and
            ``block``.
        reason: why this sampler was chosen.
        about: the facts of the run: sampler, seconds, draws, devices, random key,
            versions.
        status: what went wrong, at which levels, and what to try.
        density: the compiled density; None after `load`.
    """

    _kept_by: ClassVar[str] = (
        "keep it by result.save(path), and read that by cp.Result.load(path)."
    )

    if not TYPE_CHECKING:  # a type checker that saw this would believe in every name

        def __getattr__(self, name: str) -> NoReturn:
            known = self.__dict__
            instead = {
                fact.name: f"write result.about.{fact.name}." for fact in fields(About)
            }
            instead |= {
                each: f"write result.levels[{each!r}]."
                for each in known.get("levels", {})
            }
            instead |= {
                site: f"write result[{site!r}]." for site in known.get("samples", ())
            }
            raise unknown_name("Result", name, dir(self), instead)

    def summary(self) -> Summary:
        """Makes a table of weighted means, standard deviations and quantiles, and of
        how the run went; print it."""
        return Summary.of_result(self)

    def plot(self, kind: str = "overview") -> Figure:
        """Draws the result.

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
        from composeprob.results.plotting import plot_result

        return plot_result(self, kind)

    def images(self, site: str | None = None) -> np.ndarray:
        """Makes images of a site's equally weighted samples (`unweighted`): as its
        models decode them, or of events that are images themselves, of shape (height,
        width) or (height, width, 1 or 3).

        Values of the latter in [0, 1] or [−1, 1] keep their meaning; others are
        stretched.

        Args:
            site: whose; left out, the only one that has images, or that models decode.

        Returns:
            (N, height, width, channels), values from 0 to 1.

        Raises:
            CapabilityError: events are no images, and no model of the program says how
                these are made, or two say it differently; or it is not clear which site
                is meant.
            UnknownSiteError: no such site.
        """
        if site is not None:
            self[site]  # refuses what is no site
        lead = 1 if self.about.draws is None else 2
        events = {
            name: tuple(np.shape(values)[lead:])
            for name, values in self.samples.items()
        }
        ways = {} if self.density is None else self.density.described.pictures
        shown = {
            name for name, event in events.items() if name in ways or is_image(event)
        }
        some = set(ways) if len(ways) == 1 else shown
        name = site if site is not None or len(some) != 1 else next(iter(some))
        if name is None or name not in shown:
            has = ", ".join(map(repr, sorted(shown)))
            raise CapabilityError(
                f"Nothing says how to make images of {name!r}, of shape {events[name]}."
                if name
                else "Which site is meant is not clear: not exactly one has images.",
                fix=f"name one of {has}: result.images(site)."
                if has
                else "images have the shape (height, width), (height, width, 1) or (height, width, 3). Latents become "
                "some by their model: those of cp.from_diffusers do where a site has one autoencoder, as a model has "
                "that is loaded once; else, and after Result.load, call model.decode(result[site]).",
            )
        values = self.unweighted()[name]
        return ways[name](values) if name in ways else as_images(values)

    def report(self, path: str | os.PathLike) -> Path:
        """Writes one HTML file that says what was sampled, how well, and what to do
        next.

        It holds the program, estimates with intervals, samples, diagnostics by level,
        findings with what to try, the cost, the random key and versions, and needs no
        network. Returns its path, such as ``"run.html"``.
        """
        from composeprob.results.html_report import html

        path = check_path(path, "The path of a report", "run.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html(self), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        from composeprob.results.html_report import display

        return display(self)

    compare = compare
    to_arviz = saving.to_arviz
    numbers = saving.numbers
    save = saving.save

    @classmethod
    def load(cls, path: str | os.PathLike) -> Result:
        """Reads what `save` wrote, or opens the folder that was `infer`'s ``store``,
        whose samples stay on disk until they are indexed; ``density`` is None.

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
            f"Result({sites}; {self.about.sampler}; {self.evaluations} evaluations per chain; "
            f"status {self.status.code.name}; {self.about.seconds:.1f} s)"
        )
