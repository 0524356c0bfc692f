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


def measure(case: Case, *, n_repeats: int, smoke: bool) -> dict[str, Any]:
    """Run every arm of a case, in turn, with a first round that does not count.

    Returns:
        Numbers, medians, ratios to the baseline (median of the paired ratios) and provenance, as JSON.
    """
    numbers: dict[str, list[float]] = {arm: [] for arm in case.arms}
    for repeat in range(n_repeats + 1):
        for arm, run in case.arms.items():
            number = run(repeat, smoke)
            if repeat > 0:
                numbers[arm].append(number)
    return {
        "case": case.name,
        "question": case.question,
        "unit": case.unit,
        "baseline": case.baseline,
        "arms": {arm: _summarise(values, numbers[case.baseline]) for arm, values in numbers.items()},
        "provenance": _describe_provenance(),
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


def _describe_provenance() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("tuner", "optuna", "sqlalchemy")},
        "device": f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores",
        "load_average": os.getloadavg()[0],
    }


def save(result: Mapping[str, Any]) -> Path:
    """Write a result to ``results/<case>/<date>_<commit>.json``."""
    provenance = result["provenance"]
    path: Path = RESULTS / result["case"] / f"{provenance['date'][:10]}_{provenance['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def describe(result: Mapping[str, Any]) -> str:
    """Return a result as the rows of the README's table."""
    lines = [f"{result['case']}: {result['question']}", f"| arm | {result['unit']} | against {result['baseline']} |"]
    for arm, numbers in result["arms"].items():
        low, high = numbers["spread"]
        ratio_low, ratio_high = numbers["ratio_spread"]
        lines.append(
            f"| {arm} | {numbers['median']:.3g} ({low:.3g} to {high:.3g}) | "
            f"{numbers['ratio_to_baseline']:.2f}x ({ratio_low:.2f} to {ratio_high:.2f}) |"
        )
    return "\n".join(lines)
