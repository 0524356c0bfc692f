"""From the runs of the search benchmark to medians, spreads, ratios paired by seed, and the README's rows.

A time to target is censored where the run ended without reaching it: it counts as longer than the run. Medians treat it
so; a ratio with a censored side is a bound.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]
BASELINES = ("A", "B")
_HOUR = 3600.0


def pack_lines(lines: list[dict[str, Any]]) -> list[list[Any]]:
    """Return trials as short rows: seconds, state, value, epochs, screened."""
    return [
        [round(line["seconds"], 3), line["state"], line["value"], line["epochs"], int(line["screen"])] for line in lines
    ]


def measure_run(rows: list[list[Any]], seconds: float, target: float | None) -> dict[str, Any]:
    """Return the numbers of one run.

    Args:
        rows: What ``pack_lines`` made, in the order in which trials finished.
        seconds: Length of the run.
        target: Value to reach; None leaves its time out.

    Returns:
        Rates are of the trials of the search; what a screen added counts for the time to target and the best value.
        ``steady_trials_per_hour`` leaves out what passed before the first trials finished.
    """
    searched = [row for row in rows if not row[4]]
    last = rows[-1][0] if rows else seconds
    n_epochs = sum(row[3] for row in searched)
    first = searched[0][0] if searched else 0.0
    later = [row for row in searched if row[0] > first + 0.5]
    values = [row[2] for row in rows if row[2] is not None]
    hit = next((row[0] for row in rows if target is not None and row[2] is not None and row[2] >= target), None)
    return {
        "n_trials": len(searched),
        "n_screened": len(rows) - len(searched),
        "n_pruned": sum(row[1] == "PRUNED" for row in searched),
        "trials_per_hour": _HOUR * len(searched) / last,
        "epochs_per_hour": _HOUR * n_epochs / last,
        "steady_trials_per_hour": _HOUR * len(later) / (later[-1][0] - first) if later else None,
        "median_epochs": statistics.median(row[3] for row in searched) if searched else None,
        "best": max(values, default=None),
        "seconds_to_target": hit,
        "censored": target is not None and hit is None,
        "seconds": seconds,
    }


def summarise(runs: Sequence[Run], targets: dict[str, float]) -> list[dict[str, Any]]:
    """Return one entry for each space and arm."""
    measured = [run | measure_run(run["trials"], run["seconds"], targets.get(run["space"])) for run in runs]
    keys = sorted({(run["space"], run["arm"]) for run in measured})
    return [_summarise_arm(space, arm, measured) for space, arm in keys]


def _summarise_arm(space: str, arm: str, runs: list[Run]) -> dict[str, Any]:
    own = [run for run in runs if (run["space"], run["arm"]) == (space, arm)]
    entry: dict[str, Any] = {"space": space, "arm": arm, "n_runs": len(own), "n_censored": 0}
    for name in (
        "n_trials",
        "trials_per_hour",
        "steady_trials_per_hour",
        "epochs_per_hour",
        "median_epochs",
        "best",
        "refit_best",
    ):
        entry[name] = _spread([run[name] for run in own if run.get(name) is not None])
    entry["n_censored"] = sum(run["censored"] for run in own)
    entry["n_busy"] = sum(bool(run["busy_cores"]) for run in own)
    times = [math.inf if run["censored"] else run["seconds_to_target"] for run in own]
    entry["seconds_to_target"] = _spread([each for each in times if each is not None])
    entry["n_screened"] = _spread([run["n_screened"] for run in own])
    if arm not in BASELINES:
        entry["ratios"] = {
            name: _compare(own, runs, name) for name in ("trials_per_hour", "steady_trials_per_hour", "epochs_per_hour")
        }
        entry["ratios"]["time_to_target"] = _compare_times(own, runs)
    return entry


def _spread(values: list[float]) -> list[float | None] | None:
    """Return median, lowest and highest; None stands for infinity, which JSON does not know."""
    if not values:
        return None
    spread = [statistics.median(values), min(values), max(values)]
    return [value if math.isfinite(value) else None for value in spread]


def _rivals(run: Run, runs: list[Run]) -> list[Run]:
    return [
        other
        for other in runs
        if other["arm"] in BASELINES and (other["space"], other["seed"]) == (run["space"], run["seed"])
    ]


def _compare(own: list[Run], runs: list[Run], name: str) -> list[float | None] | None:
    """Return by how much a rate exceeds that of the best baseline with the same seed."""
    ratios = []
    for run in own:
        rates = [other[name] for other in _rivals(run, runs) if other[name]]
        if run[name] and rates:
            ratios.append(run[name] / max(rates))
    return _spread(ratios)


def _compare_times(own: list[Run], runs: list[Run]) -> dict[str, Any] | None:
    """Return how many times sooner the target was reached than by the faster baseline with the same seed."""
    ratios, n_bounds = [], 0
    for run in own:
        rivals = [other for other in _rivals(run, runs) if other["seconds_to_target"] or other["censored"]]
        if not rivals or (run["seconds_to_target"] is None and not run["censored"]):
            continue
        reached = [other["seconds_to_target"] for other in rivals if not other["censored"]]
        if run["censored"] and not reached:
            continue
        n_bounds += run["censored"] or not reached
        rival = min(reached) if reached else max(other["seconds"] for other in rivals)
        ratios.append(rival / (run["seconds"] if run["censored"] else run["seconds_to_target"]))
    spread = _spread(ratios)
    return {"ratio": spread, "n": len(ratios), "n_bounds": n_bounds} if spread else None


def describe_summary(result: dict[str, Any]) -> str:
    """Return the result as Markdown: a table with a row for each space and arm, and the floor of each space."""
    head = (
        "| space | arm | runs | trials/h | steady trials/h | epochs a trial | time to target | best | refit |"
        " trials/h against the best of A, B | time to target against it |"
    )
    lines = [head, "|" + "---|" * 11]
    for entry in result["summary"]:
        ratios = entry.get("ratios") or {}
        cells = [
            entry["space"],
            entry["arm"],
            str(entry["n_runs"]) + (f" ({entry['n_busy']} while others worked)" if entry["n_busy"] else ""),
            describe_spread(entry["trials_per_hour"], ".0f"),
            describe_spread(entry["steady_trials_per_hour"], ".0f"),
            describe_spread(entry["median_epochs"], ".1f"),
            describe_times(entry),
            describe_spread(entry["best"], ".4f"),
            describe_spread(entry["refit_best"], ".4f"),
            describe_spread(ratios.get("trials_per_hour"), ".2f", "x"),
            describe_ratio(ratios.get("time_to_target")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    floors = [
        f"floor of {run['arm']} on {run['space']}, seed {run['seed']}: "
        + ", ".join(f"{step} {seconds:.1f} s" for step, seconds in run["floor"].items())
        for run in result["runs"]
        if run["floor"] and run["space"] == "S1"
    ]
    return "\n".join([*lines, *floors[:1]])


def describe_spread(spread: list[float | None] | None, form: str, unit: str = "", *, n_censored: int = 0) -> str:
    """Return a median and its range as a cell of a table; nothing where there is none."""
    if spread is None:
        return ""
    middle, low, high = (">run" if value is None else f"{value:{form}}{unit}" for value in spread)
    censored = f", {n_censored} not reached" if n_censored else ""
    return middle + (f" ({low} to {high}{censored})" if low != high or censored else "")


def describe_times(entry: dict[str, Any]) -> str:
    """Return an arm's time to target as a cell of a table."""
    if entry["n_censored"] == entry["n_runs"]:
        return "not reached"
    return describe_spread(entry["seconds_to_target"], ".1f", " s", n_censored=entry["n_censored"])


def describe_ratio(compared: dict[str, Any] | None) -> str:
    """Return how many times sooner a target was reached as a cell of a table; nothing where nobody knows."""
    if not compared:
        return ""
    bounds = f", {compared['n_bounds']} of {compared['n']} as bounds" if compared["n_bounds"] else ""
    return describe_spread(compared["ratio"], ".2f", "x") + bounds
