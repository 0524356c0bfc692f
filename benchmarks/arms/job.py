"""What an arm is given, and what it hands back; the same for all arms."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.material import Material
from benchmarks.search_spaces import SearchSpace

if TYPE_CHECKING:
    from tuner.trial import Precision

Line = dict[str, Any]
"""A finished trial: seconds since the start, number, state, value (of a complete one), epochs, screen, recipe."""


@dataclass(frozen=True, kw_only=True)
class ArmJob:
    """One run of one arm."""

    material: Material
    space: SearchSpace
    seed: int
    epochs: int
    n_trials: int
    """Complete and pruned ones; what a screen adds is not counted."""
    minutes: float
    """After them the run is ended; what it had finished counts."""
    device: str
    """``auto``, ``cpu`` or ``cuda:0``."""
    precision: "Precision" = "auto"
    """Of forward passes; auto is bfloat16 on CUDA alone."""
    folder: Path
    """Empty; caches, databases and logs of this run go there."""
    num_workers: int = 0
    """Loader processes of the plain script, as its probe chose."""
    n_threads: int = 1
    """Threads of the plain script, as its probe chose."""


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """What a run of an arm showed."""

    lines: list[Line]
    """In the order in which trials finished."""
    seconds: float
    """Of the whole run, the start of the interpreter included."""
    timed_out: bool
    error: str
    """What the processes said last, if one failed."""
    floor: dict[str, float]
    """Seconds until a first trial can train, by step, where the arm shows them."""
