"""What busy workers do, and since when: a preparation, or trials that train."""

import math
import time
from dataclasses import dataclass, field

from tuner.service.messages import Prepare
from tuner.trial import TrialParams


@dataclass(frozen=True, kw_only=True)
class Preparing:
    """What a worker makes ready."""

    job: Prepare
    started: float
    """On the monotonic clock."""


@dataclass(kw_only=True)
class Training:
    """What a worker trains. Mutable: its trials end one by one."""

    members: dict[int, TrialParams]
    n_given: int
    charged: float
    """Until when its time is charged to its trials, on the monotonic clock."""
    deadline: float = math.inf
    """On the pool's clock: a trial that waits for a verdict while the database is locked loses no time."""
    spent: dict[int, float] = field(default_factory=dict)
    """Seconds of each trial, those that train together in equal shares."""

    def charge(self) -> None:
        """Charge the time since the last charge to the trials that train."""
        now = time.monotonic()
        for number in self.members:
            self.spent[number] = self.spent.get(number, 0.0) + (now - self.charged) / len(self.members)
        self.charged = now
