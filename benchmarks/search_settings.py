"""The options of the search benchmark."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import describe_provenance, find_place
from benchmarks.search_spaces import SEARCH_SPACES

if TYPE_CHECKING:
    from tuner.trial import Precision

NAME = "search_speed"
ARM_NAMES = ("A", "B", "D", "D-no-screen", "D-fresh", "D-plain", "D-no-prefix")
PILOT_SEED = 999


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line asks for."""

    out: Path
    seeds: tuple[int, ...]
    spaces: tuple[str, ...]
    arms: tuple[str, ...]
    trials: dict[str, int]
    """By arm; an arm without an entry takes that of its first letter."""
    epochs: int
    minutes: float
    screen: int | None
    """Instead of the space's own."""
    targets: dict[str, float]
    """Instead of the pilot's."""
    pilot: bool
    device: str
    precision: "Precision"
    """Of all arms."""
    dataset: str
    image_size: int
    smoke: bool
    patience: float
    """Seconds to wait for an idle machine before each run."""
    plain: tuple[int, int] | None
    """Loader processes and threads of the plain script, instead of a probe."""

    def n_trials(self, arm: str) -> int:
        """Return how many trials an arm runs."""
        return self.trials.get(arm) or self.trials[arm[0]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case to the command line."""
    options = parser.add_argument_group(NAME)
    options.add_argument("--out", type=Path, help="JSON file to write, and to go on with")
    options.add_argument("--seeds", type=int, default=5, metavar="N")
    options.add_argument("--spaces", type=names_of(SEARCH_SPACES), default=tuple(SEARCH_SPACES))
    options.add_argument("--arms", type=names_of(ARM_NAMES), default=("A", "B", "D"))
    options.add_argument("--trials", type=_read_numbers, default={"A": 40, "B": 40, "D": 40}, help="40, or A=40,D=1000")
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--minutes", type=float, default=30.0, help="the longest that a run may take")
    options.add_argument("--screen", type=int, help="[search] screen of D, where the space has one")
    options.add_argument("--target", type=_read_targets, default={}, metavar="S1=0.9,S4=0.9")
    options.add_argument("--pilot", action="store_true", help="one seed of its own; keeps the targets in --out")
    options.add_argument("--device", default="auto")
    options.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of all arms")
    options.add_argument("--dataset", default="hymenoptera", help="a zip file of --images")
    options.add_argument("--size", type=int, default=128, help="of images, in px")
    options.add_argument("--patience", type=float, default=60.0, help="seconds to wait for an idle machine")
    options.add_argument("--plain", type=_read_pair, metavar="0x1", help="loaders and threads of A and B; else probed")
    options.add_argument("--describe", action="store_true", help="print the table of --out and do nothing")


def names_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return what reads a list of known names from the command line."""

    def read_names(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {unknown[0]!r}")
        return names

    return read_names


def _read_numbers(text: str) -> dict[str, int]:
    if text.isdecimal():
        return dict.fromkeys(("A", "B", "D"), int(text))
    return {name: int(number) for name, _, number in (part.partition("=") for part in text.split(","))}


def _read_pair(text: str) -> tuple[int, int]:
    loaders, _, threads = text.partition("x")
    return int(loaders), int(threads)


def _read_targets(text: str) -> dict[str, float]:
    return {name: float(number) for name, _, number in (part.partition("=") for part in text.split(","))}


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings of a command line; smoke mode sets its own."""
    smoke = arguments.smoke
    return Settings(
        out=arguments.out or find_place(NAME, describe_provenance()),
        seeds=(PILOT_SEED,) if arguments.pilot else tuple(range(1 if smoke else arguments.seeds)),
        spaces=("S2",) if smoke else arguments.spaces,
        arms=("B", "D") if smoke else arguments.arms,
        trials=dict.fromkeys(("A", "B", "D"), 2) if smoke else arguments.trials,
        epochs=1 if smoke else arguments.epochs,
        minutes=2.0 if smoke else arguments.minutes,
        screen=0 if smoke else arguments.screen,
        targets={"S2": 0.1} if smoke else arguments.target,
        pilot=arguments.pilot,
        device=arguments.device,
        precision=arguments.precision,
        dataset=arguments.dataset,
        image_size=arguments.size,
        smoke=smoke,
        patience=0.0 if smoke else arguments.patience,
        plain=(0, 1) if smoke else arguments.plain,
    )


def smoke_settings(out: Path) -> Settings:
    """Return the settings of smoke mode."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    parsed = parser.parse_args(["--out", str(out)], namespace=argparse.Namespace(smoke=True))
    return read_settings(parsed)
