"""Durations and budgets as users write them, and as they are told back."""

import math
import re

import pytest

from tuner.spec.durations import Budget, format_seconds, parse_budget, parse_duration


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2h", 7200),
        ("90m", 5400),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("45min", 2700),
        ("20s", 20),
        ("1.5h", 5400),
        ("1h2m3s", 3723),
        (90, 90),
        (0.5, 0.5),
    ],
)
def test_parse_duration_reads_units(value: object, seconds: float) -> None:
    """Hours, minutes and seconds add up; a bare number is seconds."""
    assert parse_duration(value) == seconds


@pytest.mark.parametrize(
    "value",
    ["", "soon", "2", "2h30", "-2h", "0h", "30m2h", 0, -1, True, None, [1], float("inf"), float("nan"), 10**400],
)
def test_parse_duration_refuses_the_rest(value: object) -> None:
    """Everything else gets the three examples."""
    with pytest.raises(ValueError, match=re.escape('must be a duration such as "2h", "90m" or "1h30m"')):
        parse_duration(value)


@pytest.mark.parametrize(("seconds", "text"), [(8, "8 s"), (200, "3 min"), (9000, "2.5 h")])
def test_format_seconds_speaks_as_a_person(seconds: float, text: str) -> None:
    """One unit, no more digits than matter."""
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2 gpu-hours", Budget(seconds=7200, is_of_devices=True)),
        ("1 gpu-hour", Budget(seconds=3600, is_of_devices=True)),
        (" 1.5gpu-minutes ", Budget(seconds=90, is_of_devices=True)),
        ("1h30m", Budget(seconds=5400, is_of_devices=False)),
    ],
)
def test_parse_budget_reads_device_time_and_wall_time(text: str, budget: Budget) -> None:
    """Device time is shared by the devices, wall time is not."""
    assert parse_budget(text) == budget
    assert budget.wall_seconds(4) == (budget.seconds / 4 if budget.is_of_devices else budget.seconds)


@pytest.mark.parametrize("text", ["", "2", "0 gpu-hours", "-1 gpu-hours", "2 gpu", "gpu-hours", "2 gpu-hours 3m", "0h"])
def test_parse_budget_refuses_the_rest(text: str) -> None:
    """The line says both forms."""
    with pytest.raises(ValueError, match=re.escape('must be device time such as "2 gpu-hours"')):
        parse_budget(text)
    assert math.isfinite(parse_budget("9 gpu-hours").seconds)
