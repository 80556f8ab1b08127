"""What a result shows of itself: its summary, its pictures, a film, a report, and what a notebook displays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from composeprob.errors import InvalidValueError
from composeprob.results.descent import Descent
from composeprob.results.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from composeprob.results.result import Result


class Shown:
    """`Shown` is what a result is to look at."""

    path: Descent | None

    @property
    def _result(self) -> Result:
        """Itself, with all that a `Result` has."""
        from composeprob.results.result import Result

        assert isinstance(self, Result)
        return self

    def summary(self) -> Summary:
        """Makes a table of weighted means, standard deviations and quantiles, and of how the run went; print it."""
        return Summary.of(self._result)

    def plot(self, kind: str = "overview") -> Figure:
        """Draws the result.

        Args:
            kind: ``"overview"``, a panel for each site and one with acceptance and step size by level: a site of two
                numbers is shown with its marginals over the density of level 0 (where the density has a
                log-density), images as a grid, anything else as histograms; ``"samples"``, the sites alone;
                ``"pairs"``, every number against every other; ``"levels"``, a panel for each diagnostic;
                ``"descent"``, where the chains were on their way, of a run with ``keep_path``.

        Raises:
            InvalidValueError: no such kind, or nothing of this kind to draw.
        """
        from composeprob.results.figures import plot_result

        return plot_result(self._result, kind)

    @property
    def descent(self) -> Descent:
        """Where the chains were on their way from the noisiest level to level 0.

        Raises:
            InvalidValueError: the run did not keep it.
        """
        if self.path is None:
            raise InvalidValueError("This run did not keep its chains' path.", fix="cp.infer(…, keep_path=1).")
        return self.path

    def animate(self, path: str | os.PathLike, *, site: str | None = None, seconds: float = 6.0) -> Path:
        """Makes a film of the chains on their way from noise to samples, for runs with ``keep_path``.

        Args:
            path: the file, ``"run.gif"`` or, where the program ffmpeg is installed, ``"run.mp4"``.
            site: which one; left out, all of them side by side.
            seconds: how long the way takes; the last picture stays for a moment more.

        Returns:
            The path.

        Raises:
            InvalidValueError: the run did not keep its path, another kind of file, or no ffmpeg for an .mp4.
            UnknownSiteError: no such site.
        """
        from composeprob.results.animation import animate

        return animate(self._result, path, site, seconds)

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
