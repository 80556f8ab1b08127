"""What a result shows of itself: its summary, its pictures, a report, and what a notebook displays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from composeprob.results.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from composeprob.results.result import Result


class Shown:
    """`Shown` is what a result is to look at."""

    @property
    def _result(self) -> Result:
        """Itself, with all that a `Result` has."""
        from composeprob.results.result import Result

        assert isinstance(self, Result)
        return self

    def summary(self) -> Summary:
        """Makes a table of weighted means, standard deviations and quantiles, and of how the run went; print it."""
        return Summary.of_result(self._result)

    def plot(self, kind: str = "overview") -> Figure:
        """Draws the result.

        Args:
            kind: ``"overview"``, a panel for each site and one with acceptance and step size by level: a site of two
                numbers is shown with its marginals over the density of level 0 (where the density has a
                log-density), images as a grid, anything else as histograms; ``"samples"``, the sites alone;
                ``"pairs"``, every number against every other; ``"levels"``, a panel for each diagnostic.

        Raises:
            InvalidValueError: no such kind, or nothing of this kind to draw.
        """
        from composeprob.results.figures import plot_result

        return plot_result(self._result, kind)

    def images(self, site: str | None = None) -> np.ndarray:
        """Makes images of a site's equally weighted samples (`unweighted`), as its models decode them.

        Args:
            site: whose; left out, the only one that has images.

        Returns:
            (N, height, width, channels), values from 0 to 1.

        Raises:
            InvalidValueError: the result was loaded from a file, which holds no models.
            CapabilityError: no model of the program says how images are made, or two say it differently.
            UnknownSiteError: no such site.
        """
        from composeprob.results.images import images

        return images(self._result, site)

    def report(self, path: str | os.PathLike) -> Path:
        """Writes one HTML file that says what was sampled, how well, and what to do next.

        It holds the program, estimates with intervals, samples, diagnostics by level, findings with what to try, the
        cost, the random key and versions, and needs no network. Returns its path, such as ``"run.html"``.
        """
        from composeprob.results.html_report import write

        return write(self._result, path)

    def _repr_html_(self) -> str:
        from composeprob.results.notebook import html

        return html(self._result)
