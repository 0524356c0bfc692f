"""What strikes a study, drawn from a seed."""

import random
from dataclasses import dataclass
from typing import Literal

from benchmarks.faults.worker_log import Ticket

Kind = Literal[
    "kill worker",
    "kill fork server",
    "kill coordinator",
    "kill both",
    "stop coordinator",
    "stop worker",
    "SIGTERM",
    "lock",
    "disk full",
]
Damage = Literal["none", "WAL with garbage behind it", "torn WAL", "damaged cache"]
LETHAL: tuple[Kind, ...] = ("kill coordinator", "kill both", "SIGTERM")


@dataclass(frozen=True, kw_only=True)
class Action:
    """Something that the harness does to a run."""

    kind: Kind
    phase: Literal["start", "trials"]
    """Whether the delay counts from the start of the process or from the first trial that ends."""
    delay: float
    """Seconds."""
    seconds: float = 0.0
    """How long a lock, a stop or a full disk lasts."""


@dataclass(frozen=True, kw_only=True)
class RunFaults:
    """What strikes one run, and the files after it."""

    tickets: tuple[Ticket, ...]
    """For its workers, in the order in which they start."""
    actions: tuple[Action, ...]
    """One after the other; the last one ends the run."""
    damage: Damage


def draw_faults(source: random.Random, *, slowness: float = 1.0) -> RunFaults:
    """Draw what strikes one run.

    Args:
        source: Of randomness.
        slowness: How much longer the run takes to start, and its epochs, than without torch.
    """
    tickets = tuple(_draw_ticket(source) for _ in range(source.randint(4, 20)))
    actions = [_draw_passing(source, slowness) for _ in range(source.choice((0, 0, 1, 1, 2)))]
    actions.append(_draw_lethal(source, slowness))
    damages: list[Damage] = ["none", "WAL with garbage behind it", "torn WAL", "damaged cache"]
    damage = source.choices(damages, (70, 9, 9, 12))[0]
    return RunFaults(tickets=tickets, actions=tuple(actions), damage=damage)


def _draw_ticket(source: random.Random) -> Ticket:
    is_early = source.random() < 0.12
    return Ticket(
        at=source.randint(1, 4) if is_early else source.randint(5, 30),
        moment=source.choice(("before", "after")),
        victim=source.choices(("worker", "coordinator", "both", "stall"), (90, 4, 3, 3))[0],
        delay_ms=round(source.choice((0.0, source.uniform(0, 3))), 3),
    )


def _draw_passing(source: random.Random, slowness: float) -> Action:
    kinds: list[Kind] = ["kill worker", "kill fork server", "stop coordinator", "stop worker", "lock", "disk full"]
    kind = source.choices(kinds, (48, 12, 8, 4, 16, 12))[0]
    is_early = source.random() < 0.2
    return Action(
        kind=kind,
        phase="start" if is_early else "trials",
        delay=source.uniform(0, 1.5 if is_early else 0.8) * slowness,
        seconds=source.uniform(0.2, 4.0 if kind == "stop coordinator" else 1.5),
    )


def _draw_lethal(source: random.Random, slowness: float) -> Action:
    is_early = source.random() < 0.15
    return Action(
        kind=source.choices(LETHAL, (60, 32, 8))[0],
        phase="start" if is_early else "trials",
        delay=source.uniform(0, 1.5 if is_early else 6.0) * slowness,
    )
