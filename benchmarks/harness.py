"""Run the arms of a case interleaved, and keep the numbers with where they come from."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("tuner", "optuna", "sqlalchemy", "torch", "torchvision", "timm", "pillow")
_FOLDER_OPTIONS = ("--images", "--weights", "--out")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question, answered by measuring arms against each other."""

    name: str
    question: str
    unit: str
    baseline: str
    """The arm that the others are compared with."""
    regression: str
    """What would count as a step back."""
    arms: Mapping[str, Callable[[int, bool], float]]
    """Each takes a seed and whether to be small, and returns one number in ``unit``."""
    smoke_arms: tuple[str, ...] = ()
    """Arms that smoke mode runs, the baseline among them; default: all."""
    n_repeats: int = 5
    warms_up: bool = True
    """Whether a first round does not count; not where every arm is a cold process anyway."""
    conclude: Callable[[Mapping[str, list[float]], bool], Mapping[str, Any]] | None = None
    """What else is to be said, from the numbers of all arms, or from one more run; takes whether to be small."""


def measure(case: Case, *, n_repeats: int, smoke: bool) -> dict[str, Any]:
    """Run every arm of a case, in turn.

    Returns:
        Numbers, medians, ratios to the baseline (median of the paired ratios) and provenance, as JSON.
    """
    chosen = case.smoke_arms if smoke and case.smoke_arms else tuple(case.arms)
    numbers: dict[str, list[float]] = {arm: [] for arm in chosen}
    n_warm_up = 1 if case.warms_up and not smoke else 0
    for repeat in range(n_warm_up + n_repeats):
        for arm in chosen:
            number = case.arms[arm](repeat, smoke)
            if repeat >= n_warm_up:
                numbers[arm].append(number)
    return {
        "case": case.name,
        "question": case.question,
        "unit": case.unit,
        "baseline": case.baseline,
        "arms": {arm: _summarise(values, numbers[case.baseline]) for arm, values in numbers.items()},
        "conclusions": dict(case.conclude(numbers, smoke)) if case.conclude else {},
        "provenance": describe_provenance(),
    }


def _summarise(values: list[float], baseline: list[float]) -> dict[str, Any]:
    ratios = [value / base for value, base in zip(values, baseline, strict=True)]
    return {
        "values": values,
        "median": statistics.median(values),
        "spread": [min(values), max(values)],
        "ratio_to_baseline": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
    }


def describe_provenance() -> dict[str, Any]:
    """Return where numbers come from: commit and whether the tree was that, date, command, versions, machine, load."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "dirty": _is_dirty(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks", *_hide_folders(sys.argv[1:])]),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "device": f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores",
        "load_average": os.getloadavg()[0],
    }


def _is_dirty() -> bool | None:
    """Whether files differ from the commit, results aside; None where that cannot be said."""
    changes = subprocess.run(
        ["git", "status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results"],  # noqa: S607
        capture_output=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return None if changes.returncode else bool(changes.stdout)


def _hide_folders(arguments: list[str]) -> list[str]:
    """Return a command line without the names of folders on this machine."""
    shown = []
    for number, argument in enumerate(arguments):
        option, equals, _ = argument.partition("=")
        if number and arguments[number - 1] in _FOLDER_OPTIONS:
            shown.append("…")
        else:
            shown.append(f"{option}=…" if equals and option in _FOLDER_OPTIONS else argument)
    return shown


def find_place(name: str, provenance: Mapping[str, Any]) -> Path:
    """Return ``results/<case>/<date>_<commit>.json``."""
    return RESULTS / name / f"{provenance['date'][:10]}_{provenance['commit']}.json"


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result; whoever stops the program finds it as it was, or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def save(result: Mapping[str, Any]) -> Path:
    """Write a result to its place; return the place."""
    path = find_place(result["case"], result["provenance"])
    write_json(path, result)
    return path


def describe(result: Mapping[str, Any]) -> str:
    """Return a result as the rows of the README's table."""
    lines = [
        f"{result['case']}: {result['question']}",
        "",
        f"| arm | {result['unit']} | against {result['baseline']} |",
        "|---|---|---|",
    ]
    for arm, numbers in result["arms"].items():
        low, high = numbers["spread"]
        ratio_low, ratio_high = numbers["ratio_spread"]
        lines.append(
            f"| {arm} | {numbers['median']:.3g} ({low:.3g} to {high:.3g}) | "
            f"{numbers['ratio_to_baseline']:.2f}x ({ratio_low:.2f} to {ratio_high:.2f}) |"
        )
    told = {name: value for name, value in result["conclusions"].items() if not isinstance(value, list)}
    lines += [f"{name}: {_shorten(value)}" for name, value in told.items()]
    return "\n".join(lines)


def _shorten(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
