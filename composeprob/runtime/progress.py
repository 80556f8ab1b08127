"""The progress bar of everything that takes long: a few refreshes a second, silent where nobody is looking."""

from __future__ import annotations

import time
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, NamedTuple, SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from IPython.display import DisplayHandle


from composeprob import tuning


class Report(NamedTuple):
    """What a stage of a run reports.

    Attributes:
        title: what is being done; a bar's name.
        total, done: number of levels, draws or iterations, and how many are finished.
        doing: what comes next, such as what is compiled; empty after a piece of work.
        facts: numbers worth watching.
    """

    title: str
    total: int
    done: int = 0
    doing: str = ""
    facts: Mapping[str, SupportsFloat | str] = {}


class Progress:
    """A bar in a terminal or a notebook, nothing in a pipe or a log file.

    Facts are formatted only when the bar is redrawn, at most every quarter of a second, so they may be device arrays:
    `update` itself costs about a microsecond. Called with the reports of a run it begins a bar for each title.

    Args:
        total: number of levels, draws or iterations.
        enabled: False draws nothing anywhere.
        description: what is being done.

    Example:
        >>> from composeprob.runtime.progress import Progress
        >>> with Progress(2, enabled=False, description="sampling") as bar:
        ...     bar.update(1, acceptance=0.57)
    """

    def __init__(self, total: int = 0, enabled: bool = True, description: str = ""):
        self.total, self.description = total, description
        self._console = Console(stderr=True)
        self._kind = "off"
        if enabled and self._console.is_jupyter:
            self._kind = "notebook"
        elif enabled and self._console.is_terminal:
            self._kind = "terminal"
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._handle: DisplayHandle | None = None
        self._started = self._drawn = 0.0
        self._last: tuple[int, Mapping[str, SupportsFloat | str]] | None = None

    @property
    def pause(self) -> float:
        """Seconds that may pass between two updates."""
        return tuning.REPORTS.unseen_seconds if self._kind == "off" else tuning.REPORTS.shown_seconds

    def __enter__(self) -> Progress:
        self._started, self._drawn, self._last = time.monotonic(), 0.0, None
        if self._kind == "terminal":
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                auto_refresh=False,  # no thread of its own: the bar moves when the run does
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, facts="")
            self._bar.refresh()
        elif self._kind == "notebook":
            from IPython.display import display

            self._handle = display(self._page(0, {}), raw=True, display_id=True)
        return self

    def __call__(self, state: object, report: Report) -> None:
        """Shows a report; a new title ends the bar before it."""
        if report.title != self.description:
            self.close()
            self.total, self.description = report.total, report.title
            self.__enter__()
        if report.doing:
            self.doing(report.doing)
        else:
            self.update(report.done, **report.facts)

    def update(self, done: int, **facts: SupportsFloat | str) -> None:
        """Say that ``done`` of the ``total`` are finished, with numbers worth watching."""
        if self._kind == "off":
            return
        self._last = (done, facts)
        if time.monotonic() - self._drawn >= tuning.REPORTS.shown_seconds:
            self._draw()

    def doing(self, what: str) -> None:
        """Say at once what comes before the first update, such as what is compiled."""
        if self._kind != "off":
            self._last = (0 if self._last is None else self._last[0], {what: ""})
            self._draw()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._kind != "off" and self._last is not None:
            self._draw()  # the last update may have been throttled
        if self._bar is not None:
            self._bar.stop()

    def _draw(self) -> None:
        assert self._last is not None
        done, facts = self._last
        self._drawn = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=_text(facts), refresh=True)
        elif self._handle is not None:
            self._handle.update(self._page(done, facts), raw=True)

    def _page(self, done: int, facts: Mapping[str, SupportsFloat | str]) -> dict[str, str]:
        """What a notebook shows: a bar of the browser's, or where there is none a line of text."""
        parts = [f"{done}/{self.total}", _text(facts), f"{time.monotonic() - self._started:.1f} s"]
        words = escape(" · ".join(part for part in parts if part))
        bar = f"<progress value='{done}' max='{self.total}' style='width:20em;vertical-align:middle'></progress>"
        page = f"<div>{escape(self.description)} {bar} <small>{words}</small></div>"
        return {"text/plain": self._line(done, facts), "text/html": page}

    def _line(self, done: int, facts: Mapping[str, SupportsFloat | str]) -> str:
        filled = round(20 * done / max(self.total, 1))
        seconds = time.monotonic() - self._started
        parts = [self.description, "━" * filled + "─" * (20 - filled), f"{done}/{self.total}", _text(facts)]
        return "  ".join([*(part for part in parts if part), f"{seconds:.1f} s"])


def _text(facts: Mapping[str, SupportsFloat | str]) -> str:
    """``acceptance 0.57 · ESS 0.8`` for the facts of one update."""
    words = []
    for name, value in facts.items():
        try:
            value = f"{float(value):.3g}"
        except (TypeError, ValueError):
            value = str(value)
        words.append(f"{name.replace('_', ' ')} {value}".rstrip())
    return " · ".join(words)
