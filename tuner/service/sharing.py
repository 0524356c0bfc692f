"""How many workers share a device: the fewest that train nearly as many images per second as the best number tried."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_SHARING = 4
"""Workers of one device that are ever tried: two or three are what others found to pay, where any do."""
_LEAST_GAIN = 0.05
_MEMORY_FRACTION = 0.9
"""Share of what is free that further workers may be counted on to take."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What a probe of one device found, and what follows for all of them."""

    device: str
    n_workers: int
    """For each device."""
    speeds: tuple[float, ...]
    """Images per second that one worker, two workers and so on trained together."""
    reason: str
    """Why no more were tried, for a person."""

    def describe(self) -> str:
        """Return the decision in one line."""
        tried = ", ".join(f"{speed:.0f} images/s with {n}" for n, speed in enumerate(self.speeds, start=1))
        measured = f"{self.device} trained {tried}" if tried else "nothing was measured"
        workers = "1 worker" if self.n_workers == 1 else f"{self.n_workers} workers"
        return f'per_device = "auto": {workers} on each device; {measured}; {self.reason}'


def count_fitting(memory: Iterable[tuple[int, int]]) -> int:
    """Return how many workers like one that is alone have room.

    Args:
        memory: Bytes that it holds of each memory, and what is free there besides.
    """
    return 1 + min((int(_MEMORY_FRACTION * free / held) for held, free in memory if held > 0), default=0)


def has_gained(speeds: Sequence[float]) -> bool:
    """Whether the last worker was worth it, so that one more may be; one alone always is.

    Args:
        speeds: Of one worker, two workers and so on, together.
    """
    return len(speeds) < 2 or speeds[-1] >= (1 + _LEAST_GAIN) * speeds[-2]


def choose_n_workers(speeds: Sequence[float]) -> int:
    """Return the smallest number of workers whose speed is within 5 % of the best; 1 if nothing was measured."""
    enough = (1 - _LEAST_GAIN) * max(speeds, default=0.0)
    return next((n for n, speed in enumerate(speeds, start=1) if speed >= enough), 1)
