"""The progress bar of long tasks: a few refreshes a second, silent where nobody is
looking."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import cache
from html import escape
from typing import TYPE_CHECKING, SupportsFloat

from composeprob import tuning
from composeprob.errors import MissingPackageError
from composeprob.extras import needed

if TYPE_CHECKING:
    from IPython.display import DisplayHandle
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress:
    """A bar in a terminal or a notebook; nothing in a pipe, a log file, or where it is
    not ``enabled``.

    Facts are formatted only when the bar is redrawn, at most every quarter of a second,
    so they may be device arrays: `update` itself costs about a microsecond.
    """

    def __init__(self, total: int = 0, enabled: bool = True, description: str = ""):
        self.total = total
        self.description = description
        self._console = _console() if enabled else None
        self._kind = "off"
        if self._console is not None and self._console.is_jupyter:
            self._kind = "notebook"
        elif self._console is not None and self._console.is_terminal:
            self._kind = "terminal"
        self._bar: RichProgress | None = None
        self._task: TaskID
        self._handle: DisplayHandle | None = None
        self._started = self._drawn = 0.0
        self._last: tuple[int, Mapping[str, SupportsFloat | str]] | None = None

    @property
    def pause(self) -> float:
        """Seconds that may pass between two updates."""
        if self._kind == "off":
            return tuning.REPORTS.unseen_seconds
        return tuning.REPORTS.shown_seconds

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        self._drawn = 0.0
        self._last = None
        if self._kind == "terminal":
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                auto_refresh=False,  # no thread of its own: it moves when the run does
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.description, total=self.total, facts=""
            )
            self._bar.refresh()
        elif self._kind == "notebook":
            from IPython.display import display

            self._handle = display(self._page(0, ""), raw=True, display_id=True)
        return self

    def show(
        self,
        title: str,
        total: int,
        done: int = 0,
        doing: str = "",
        **facts: SupportsFloat | str,
    ) -> None:
        """Show how much of a run is done, or the work that begins; a new title ends the
        bar before it."""
        if title != self.description:
            self.close()
            self.total = total
            self.description = title
            self.__enter__()
        if doing:
            self.doing(doing)
        else:
            self.update(done, **facts)

    def update(self, done: int, **facts: SupportsFloat | str) -> None:
        """Say that ``done`` of the ``total`` are finished, with numbers worth
        watching."""
        self._last = (done, facts)
        if self._kind == "off":
            return
        if time.monotonic() - self._drawn >= tuning.REPORTS.shown_seconds:
            self._draw()

    def doing(self, work: str) -> None:
        """Show at once the ``work`` that comes before the first update, such as
        compiling."""
        done = 0 if self._last is None else self._last[0]
        self._last = (done, {work: ""})
        self._draw()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._draw()  # the last update may have been throttled
        if self._bar is not None:
            self._bar.stop()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self) -> None:
        if self._kind == "off" or self._last is None:
            return
        done, facts = self._last
        text = _text(facts)
        self._drawn = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=text, refresh=True)
        elif self._handle is not None:
            self._handle.update(self._page(done, text), raw=True)

    def _page(self, done: int, facts: str) -> dict[str, str]:
        """The display in a notebook: a bar of the browser's, or a line of text for one
        without HTML."""
        seconds = f"{time.monotonic() - self._started:.1f} s"
        words = " · ".join(filter(None, [f"{done}/{self.total}", facts, seconds]))
        bar = (
            f"<progress value='{done}' max='{self.total}' "
            "style='width:20em;vertical-align:middle'></progress>"
        )
        page = (
            f"<div>{escape(self.description)} {bar} "
            f"<small>{escape(words)}</small></div>"
        )
        return {"text/plain": f"{self.description}  {words}", "text/html": page}


def _console() -> Console | None:
    """Return the terminal or notebook of standard error; None without rich."""
    try:
        with needed("cli", "The progress bar"):
            from rich.console import Console
    except MissingPackageError as error:
        # A run goes on without its bar.
        _say_once(str(error))
        return None
    return Console(stderr=True)


@cache
def _say_once(text: str) -> None:
    """Print a line on a terminal, once a process."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _text(facts: Mapping[str, SupportsFloat | str]) -> str:
    """``acceptance 0.57 · ESS 0.8`` for the facts of one update."""
    words = []
    for name, value in facts.items():
        shown = value if isinstance(value, str) else f"{float(value):.3g}"
        words.append(f"{name.replace('_', ' ')} {shown}".rstrip())
    return " · ".join(words)
