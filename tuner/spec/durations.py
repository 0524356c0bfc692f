"""Durations and budgets, from a user's words to seconds and back."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tuner.spec.space import is_number

_DURATION = re.compile(r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m(?:in)?)?(?:(?P<s>\d+(?:\.\d+)?)s)?")
_DEVICE_TIME = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*gpu-(?P<unit>hour|minute)s?")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a study may take, all its runs together."""

    seconds: float
    is_of_devices: bool
    """Seconds of each device added up; else of the wall clock while the study runs."""

    def wall_seconds(self, n_devices: float) -> float:
        """Return how long the budget lasts on some devices."""
        return self.seconds / n_devices if self.is_of_devices else self.seconds


def parse_duration(value: Any) -> float:
    """Return seconds from ``"2h"``, ``"1h30m"``, ``"45min"``, ``"20s"`` or a number of seconds.

    Raises:
        ValueError: If it is none of these, or not longer than 0.
    """
    seconds = 0.0
    if is_number(value):
        seconds = float(value)
    elif isinstance(value, str) and (match := _DURATION.fullmatch(value.strip().replace(" ", ""))):
        hours, minutes, rest = (float(match[part] or 0) for part in "hms")
        seconds = hours * 3600 + minutes * 60 + rest
    if seconds <= 0 or not math.isfinite(seconds):
        raise ValueError('must be a duration such as "2h", "90m" or "1h30m"')
    return seconds


def parse_budget(text: str) -> Budget:
    """Return what ``"2 gpu-hours"``, ``"90 gpu-minutes"`` or a duration such as ``"8h"`` allows.

    Raises:
        ValueError: If it is none of these, or not more than 0.
    """
    if match := _DEVICE_TIME.fullmatch(text.strip()):
        seconds = float(match["number"]) * {"hour": 3600, "minute": 60}[match["unit"]]
        if 0 < seconds < math.inf:
            return Budget(seconds=seconds, is_of_devices=True)
    else:
        with suppress(ValueError):
            return Budget(seconds=parse_duration(text), is_of_devices=False)
    raise ValueError('must be device time such as "2 gpu-hours" or "90 gpu-minutes", or a wall time such as "8h"')


def check_budget(value: str) -> str:
    """Return a budget's text if it is one.

    Raises:
        ValueError: If it is none.
    """
    parse_budget(value)
    return value


def format_seconds(seconds: float) -> str:
    """Return a duration as a person says it: ``8 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
