"""What the user sees."""

import io
import time

import pytest
from rich.console import Console

from tests.unit.service.test_wire import PARAMS
from tuner.service.progress import (
    ActivityChanged,
    BestFound,
    Counted,
    Display,
    EpochReported,
    Event,
    LiveDisplay,
    Noted,
    PlainDisplay,
    Progressed,
    SilentDisplay,
    TrialFinished,
    TrialsStarted,
)
from tuner.trial import Reason, TrialOutcome, TrialState

EVENTS: list[Event] = [
    ActivityChanged(worker=0, text="preparing the images"),
    ActivityChanged(worker=0, text=""),
    Counted(n_done=0, n_trials=4),
    Progressed(worker=0, text="decoding images", n_done=1, n_total=3),
    TrialsStarted(worker=0, numbers=(0,), params=PARAMS),
    EpochReported(worker=0, epoch=1, n_epochs=3, value=0.25),
    Counted(n_done=1, n_trials=4),
    TrialFinished(worker=0, number=0, outcome=TrialOutcome(state=TrialState.COMPLETE), value=0.75),
    BestFound(number=0, value=0.75),
    TrialFinished(
        worker=1,
        number=1,
        outcome=TrialOutcome(state=TrialState.FAIL, reason=Reason.WORKER_LOST, message="[bold] is no markup"),
        value=None,
    ),
    Noted(text="a [red]note[/red]"),
]


def show_all(display: Display) -> None:
    """Show every kind of event."""
    with display:
        for event in EVENTS:
            display.show(event)


def test_plain_display_prints_a_line_for_each_event_that_matters(capsys: pytest.CaptureFixture[str]) -> None:
    """Logs hold ends of trials, not epochs."""
    show_all(PlainDisplay())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "worker 0: preparing the images"
    assert lines[1].startswith("trial 0: complete 0.7500  [1/4 trials, about ")
    assert lines[2] == "best so far: trial 0, 0.7500"
    assert lines[3].startswith("trial 1: fail (worker lost: [bold] is no markup)  [1/4 trials")
    assert lines[4:] == ["a [red]note[/red]"]


def test_live_display_shows_how_far_a_preparation_is_and_what_a_cohort_shares() -> None:
    """A bar with its counts; then one row for all heads of the cohort."""
    screen = io.StringIO()
    display = LiveDisplay(Console(file=screen, force_terminal=True, width=120))
    with display:
        display.show(Progressed(worker=0, text="decoding images", n_done=120, n_total=300))
        display._live.refresh()
        assert "decoding images" in screen.getvalue()
        assert "120 of 300" in screen.getvalue()
        display.show(TrialsStarted(worker=0, numbers=(4, 7, 9), params=PARAMS))
        display._live.refresh()
        assert "trials 4 to 9, 3 heads as one  test_resnet batch=32 aug=0.5" in screen.getvalue()


def test_plain_display_says_how_far_a_preparation_is_only_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log is not filled with every image."""
    display = PlainDisplay()
    now = time.monotonic()
    for seconds in (1.0, 2.0, 12.0, 13.0):
        monkeypatch.setattr("tuner.service.progress.time.monotonic", lambda seconds=seconds: now + seconds)
        display.show(Progressed(worker=0, text="decoding images", n_done=int(seconds), n_total=300))
    assert capsys.readouterr().out == "decoding images: 12 of 300\n"


def test_silent_display_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """--quiet is quiet."""
    show_all(SilentDisplay())
    assert capsys.readouterr().out == ""


def test_live_display_shows_workers_counts_and_best() -> None:
    """The table has a row for each worker and takes no text for markup."""
    screen = io.StringIO()
    display = LiveDisplay(Console(file=screen, force_terminal=True, width=120))
    with display:
        for event in EVENTS[:6]:
            display.show(event)
        display._live.refresh()
        text = screen.getvalue()
        assert "trial 0  test_resnet lr=0.001 batch=32 unfrozen=2 aug=0.5  epoch 1/3  0.2500" in text
        assert "0/4 trials" in text
        for event in EVENTS[6:]:
            display.show(event)
        display._live.refresh()
    text = screen.getvalue()
    assert "best: trial 0, 0.7500" in text
    assert "a [red]note[/red]" in text
    assert "trial 1: fail (worker lost: [bold] is no markup)" in text


@pytest.mark.parametrize("kind", ["plain", "live"])
def test_displays_let_no_escape_through(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker's last words, a file's name and an error's message must not move the cursor; notes keep their lines."""
    screen = io.StringIO()
    hostile = "a\x1b]0;x\x07b\x9b1A"
    outcome = TrialOutcome(state=TrialState.FAIL, reason=Reason.WORKER_LOST, message=f"{hostile}\nforged")
    with PlainDisplay() if kind == "plain" else LiveDisplay(Console(file=screen, width=120)) as display:
        display.show(Noted(text=f"{hostile}\nnext"))
        display.show(ActivityChanged(worker=0, text=hostile))
        display.show(TrialFinished(worker=0, number=0, outcome=outcome, value=None))
        if isinstance(display, LiveDisplay):
            display._live.refresh()
    lines = [line.rstrip() for line in (capsys.readouterr().out + screen.getvalue()).split("\n")]
    assert all(line.isprintable() for line in lines)
    assert lines[:2] == ["a?]0;x?b?1A", "next"]
    assert any("(worker lost: a?]0;x?b?1A?forged)" in line for line in lines)
