"""What the user sees while a study runs: a live table on a terminal, plain lines elsewhere, or nothing."""

import sys
import time
from dataclasses import dataclass, field
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuner.spec.durations import format_seconds
from tuner.spec.printable import as_printable, as_printable_lines
from tuner.trial import TrialOutcome, TrialParams, TrialState

_PROGRESS_SECONDS = 10.0
"""Between two lines of a log on how far a preparation is."""


@dataclass(frozen=True, kw_only=True)
class Noted:
    """One line for the user."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How many trials count, of how many."""

    n_done: int
    n_trials: int


@dataclass(frozen=True, kw_only=True)
class ActivityChanged:
    """What a worker does besides trials; an empty text: nothing."""

    worker: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Progressed:
    """How far a worker's long preparation is."""

    worker: int
    text: str
    n_done: int
    n_total: int


@dataclass(frozen=True, kw_only=True)
class TrialsStarted:
    """A worker starts a trial, or a cohort."""

    worker: int
    numbers: tuple[int, ...]
    params: TrialParams
    """Of the first."""


@dataclass(frozen=True, kw_only=True)
class EpochReported:
    """Running trials finished an epoch."""

    worker: int
    epoch: int
    n_epochs: int
    value: float
    """The best of them."""


@dataclass(frozen=True, kw_only=True)
class TrialFinished:
    """A trial ended; the value is that of a completed one."""

    worker: int
    number: int
    outcome: TrialOutcome
    value: float | None


@dataclass(frozen=True, kw_only=True)
class BestFound:
    """A trial is the best so far."""

    number: int
    value: float


Event = Noted | Counted | ActivityChanged | Progressed | TrialsStarted | EpochReported | TrialFinished | BestFound


class Display(Protocol):
    """What the coordinator tells the user through."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *details: object) -> None: ...

    def show(self, event: Event) -> None:
        """Tell the user of an event."""


class SilentDisplay:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        return

    def show(self, event: Event) -> None:
        """Say nothing."""


@dataclass(kw_only=True)
class _Progress:
    """Counts of a run, and what follows from them."""

    n_done: int = 0
    n_trials: int = 0
    n_before: int | None = None
    started: float = field(default_factory=time.monotonic)
    best: str = "-"

    def update(self, n_done: int, n_trials: int) -> None:
        if self.n_before is None or n_trials != self.n_trials:  # the run begins, or another part of it
            self.n_before, self.started = n_done, time.monotonic()
        self.n_done, self.n_trials = n_done, n_trials

    def describe(self) -> str:
        """Return ``12/60 trials, 3m left``."""
        text = f"{self.n_done}/{self.n_trials} trials"
        n_new = self.n_done - (self.n_before or 0)
        if n_new > 0 and self.n_done < self.n_trials:
            left = (time.monotonic() - self.started) / n_new * (self.n_trials - self.n_done)
            text += f", about {format_seconds(left)} left"
        return text


def describe_recipe(params: TrialParams) -> str:
    """Return the part of a recipe that fits a line."""
    return (
        f"{params.backbone} lr={params.lr:.2g} batch={params.batch_size} "
        f"unfrozen={params.unfrozen_layers} aug={params.augmentation_strength:.2g}"
    )


def describe_start(numbers: tuple[int, ...], params: TrialParams) -> str:
    """Return what a worker trains: one trial with its recipe, or a cohort with what its trials share."""
    if len(numbers) == 1:
        return f"trial {numbers[0]}  {describe_recipe(params)}"
    return (
        f"trials {numbers[0]} to {numbers[-1]}, {len(numbers)} heads as one  {params.backbone} "
        f"batch={params.batch_size} aug={params.augmentation_strength:.2g}"
    )


def describe_end(outcome: TrialOutcome, value: float | None) -> str:
    """Return how a trial ended in a few words: ``complete 0.9312``, ``pruned (diverged)``."""
    text = outcome.state.value.lower()
    if value is not None:
        text += f" {value:.4f}"
    if outcome.state is not TrialState.COMPLETE and outcome.reason:
        message = f": {as_printable(outcome.message)}" if outcome.message else ""
        text += f" ({outcome.reason.value.replace('_', ' ')}{message})"
    return text


class PlainDisplay:
    """One line per event, for logs and pipes; epochs and starts of trials are left out."""

    def __init__(self) -> None:
        self._progress = _Progress()
        self._progressed = ("", 0.0)
        """What was last said to progress, and when."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        return

    def show(self, event: Event) -> None:
        """Print the event, if it is worth a line."""
        match event:
            case Noted(text=text):
                _print(text)
            case ActivityChanged(worker=worker, text=text) if text:
                _print(f"worker {worker}: {text}")
            case Progressed():
                self._show_progress(event)
            case Counted():
                self._progress.update(event.n_done, event.n_trials)
            case TrialFinished():
                end = describe_end(event.outcome, event.value)
                _print(f"trial {event.number}: {end}  [{self._progress.describe()}]")
            case BestFound():
                _print(f"best so far: trial {event.number}, {event.value:.4f}")

    def _show_progress(self, event: Progressed) -> None:
        """Print how far a preparation is, if it takes long."""
        now = time.monotonic()
        text, since = self._progressed
        if event.text != text:
            self._progressed = event.text, now
        elif now - since > _PROGRESS_SECONDS:
            self._progressed = text, now
            _print(f"{text}: {event.n_done} of {event.n_total}")


def _print(text: str) -> None:
    print(as_printable_lines(text), flush=True)  # noqa: T201 - this is the program's output


class LiveDisplay:
    """A table that is redrawn in place: progress, one line per worker, the best so far."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = _Progress()
        self._rows: dict[int, str | Progressed] = {}
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        """Update the table; print notes and failures above it."""
        match event:
            case Noted(text=text):
                self._console.print(_make_text(text))
            case Counted():
                self._progress.update(event.n_done, event.n_trials)
            case ActivityChanged(worker=worker, text=text):
                self._rows[worker] = text
            case Progressed(worker=worker):
                self._rows[worker] = event
            case TrialsStarted(worker=worker):
                self._rows[worker] = describe_start(event.numbers, event.params)
            case EpochReported(worker=worker):
                recipe = str(self._rows.get(worker, "")).partition("  epoch ")[0]
                self._rows[worker] = f"{recipe}  epoch {event.epoch}/{event.n_epochs}  {event.value:.4f}"
            case TrialFinished():
                if event.outcome.state is TrialState.FAIL:
                    end = describe_end(event.outcome, event.value)
                    self._console.print(_make_text(f"trial {event.number}: {end}"))
            case BestFound():
                self._progress.best = f"trial {event.number}, {event.value:.4f}"

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for worker in sorted(self._rows):
            table.add_row(Text(f"worker {worker}", style="dim"), _render_row(self._rows[worker]))
        bar = ProgressBar(total=max(1, self._progress.n_trials), completed=self._progress.n_done, width=40)
        head = Table.grid(padding=(0, 2))
        head.add_row(bar, Text(self._progress.describe()), Text(f"best: {self._progress.best}", style="bold"))
        return Group(head, table)


def _make_text(text: str) -> Text:
    """Return text as it is, without markup; rich lets control characters through."""
    return Text(as_printable_lines(text))


def _render_row(row: str | Progressed) -> RenderableType:
    """Return what a worker does: a line, with a bar where it is known how much there is to do."""
    if isinstance(row, str):
        return _make_text(row)
    table = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(1, row.n_total), completed=row.n_done, width=30)
    table.add_row(_make_text(row.text), bar, Text(f"{row.n_done} of {row.n_total}"))
    return table


def make_display(*, quiet: bool = False) -> Display:
    """Return the display that fits standard output."""
    if quiet:
        return SilentDisplay()
    return LiveDisplay(Console()) if sys.stdout.isatty() else PlainDisplay()
