"""The progress bar of everything that takes long: a few refreshes a second, silent
where nobody is looking."""

from __future__ import annotations

import time
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, SupportsFloat

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from composeprob import tuning

if TYPE_CHECKING:
    from IPython.display import DisplayHandle


class Progress:
    """A bar in a terminal or a notebook, nothing in a pipe, a log file, or where it is
    not ``enabled``.

    Facts are formatted only when the bar is redrawn, at most every quarter of a second,
    so they may be device arrays: `update` itself costs about a microsecond.
    """

    def __init__(self, total: int = 0, enabled: bool = True, description: str = ""):
        self.total, self.description = total, description
        self._console = Console(stderr=True)
        shown = (
            "notebook"
            if self._console.is_jupyter
            else "terminal"
            if self._console.is_terminal
            else "off"
        )
        self._kind = shown if enabled else "off"
        self._bar: RichProgress | None = None
        self._handle: DisplayHandle | None = None
        self._started = self._drawn = 0.0
        self._last: tuple[int, Mapping[str, SupportsFloat | str]] | None = None

    @property
    def pause(self) -> float:
        """Seconds that may pass between two updates."""
        return (
            tuning.REPORTS.unseen_seconds
            if self._kind == "off"
            else tuning.REPORTS.shown_seconds
        )

    def __enter__(self) -> Progress:
        self._started, self._drawn, self._last = time.monotonic(), 0.0, None
        if self._kind == "terminal":
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
            )
            facts = (
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            # No thread of its own: the bar moves when the run does.
            self._bar = RichProgress(
                *columns, *facts, console=self._console, auto_refresh=False
            )
            self._bar.start()
            self._bar.add_task(self.description, total=self.total, facts="")
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
        """Shows how far a run is, or what it is doing next; a new title ends the bar
        before it."""
        if title != self.description:
            self.close()
            self.total, self.description = total, title
            self.__enter__()
        if doing:
            self.doing(doing)
        else:
            self.update(done, **facts)

    def update(self, done: int, **facts: SupportsFloat | str) -> None:
        """Say that ``done`` of the ``total`` are finished, with numbers worth
        watching."""
        self._last = (done, facts)
        if (
            self._kind != "off"
            and time.monotonic() - self._drawn >= tuning.REPORTS.shown_seconds
        ):
            self._draw()

    def doing(self, what: str) -> None:
        """Say at once what comes before the first update, such as what is compiled."""
        self._last = (0 if self._last is None else self._last[0], {what: ""})
        self._draw()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._draw()  # the last update may have been throttled
        if self._bar is not None:
            self._bar.stop()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self) -> None:
        if self._kind == "off" or self._last is None:
            return
        (done, facts), self._drawn = self._last, time.monotonic()
        if self._bar is not None:
            self._bar.update(
                TaskID(0), completed=done, facts=_text(facts), refresh=True
            )
        elif self._handle is not None:
            self._handle.update(self._page(done, _text(facts)), raw=True)

    def _page(self, done: int, facts: str) -> dict[str, str]:
        """What a notebook shows: a bar of the browser's, or where there is none a line
        of text."""
        words = " · ".join(
            filter(
                None,
                [
                    f"{done}/{self.total}",
                    facts,
                    f"{time.monotonic() - self._started:.1f} s",
                ],
            )
        )
        bar = f"<progress value='{done}' max='{self.total}' style='width:20em;vertical-align:middle'></progress>"
        page = f"<div>{escape(self.description)} {bar} <small>{escape(words)}</small></div>"
        return {"text/plain": f"{self.description}  {words}", "text/html": page}


def _text(facts: Mapping[str, SupportsFloat | str]) -> str:
    """``acceptance 0.57 · ESS 0.8`` for the facts of one update."""
    words = []
    for name, value in facts.items():
        shown = value if isinstance(value, str) else f"{float(value):.3g}"
        words.append(f"{name.replace('_', ' ')} {shown}".rstrip())
    return " · ".join(words)
