"""What the fuzz calls a finding is one: time and memory are measured, not believed."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz_checks
from benchmarks.fuzz_checks import Tally, check_chunk, forget_peak


def check(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[int], object], *, n_inputs: int, seconds: float, megabytes: float
) -> Tally:
    """Check inputs of a kind that does something else with each."""
    numbers = iter(range(n_inputs))

    def judge(_: Any, __: Path) -> str:
        run(next(numbers))
        return "read"

    monkeypatch.setitem(fuzz_checks.CHECKS, "made up", judge)
    monkeypatch.setitem(fuzz_checks._SECONDS, "made up", seconds)
    monkeypatch.setitem(fuzz_checks._MEGABYTES, "made up", megabytes)
    return check_chunk("made up", [str(number) for number in range(n_inputs)])


def test_input_that_swallows_its_time_limit_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """TimeoutError is an OSError, and decoders take those for a broken file."""

    def spin(_: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                time.process_time()

    tally = check(monkeypatch, spin, n_inputs=1, seconds=0.02, megabytes=1000)
    assert [finding.partition(" took")[0] for finding in tally.findings] == ["made up 0:"]
    assert tally.outcomes == {"read": 1}


def test_input_over_its_time_is_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit ends it."""

    def spin(_: int) -> None:
        while True:
            time.process_time()

    tally = check(monkeypatch, spin, n_inputs=1, seconds=0.02, megabytes=1000)
    assert len(tally.findings) == 1
    assert "TimeoutError" in tally.findings[0]


def test_slow_input_within_its_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no finding, and no secret."""
    monkeypatch.setattr(fuzz_checks, "_SLOW_SECONDS", -1)
    tally = check(monkeypatch, bool, n_inputs=2, seconds=60, megabytes=1000)
    assert tally.findings == []
    assert [slow.partition(": ")[0] for slow in tally.slow] == ["made up 0", "made up 1"]


@pytest.mark.skipif(not forget_peak(), reason="the kernel does not forget a peak here")
def test_every_input_is_measured_by_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one does not hide a smaller one after it, nor does what has been freed before."""
    freed = [bytes(1 << 16) for _ in range(6000)]
    kept = freed[-1]  # above the others, so that the C library keeps their 400 MB
    del freed
    sizes = (150, 0, 100)
    tally = check(monkeypatch, lambda number: b"x" * (sizes[number] << 20), n_inputs=3, seconds=60, megabytes=50)
    assert [finding.partition(" took")[0] for finding in tally.findings] == ["made up 0:", "made up 2:"]
    assert tally.sees_every_peak
    assert kept
