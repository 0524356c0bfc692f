"""The tables of the documents, from the result files: the newest of each case, and of each arm of a search."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Case
from benchmarks.search_settings import NAME as SEARCH_SPEED
from benchmarks.search_spaces import SEARCH_SPACES
from benchmarks.search_summary import BASELINES, describe_ratio, describe_spread, describe_times

Result = Mapping[str, Any]
BEGIN, END = "<!-- Written by: python -m benchmarks --readme -->\n", "<!-- End of what it writes. -->\n"
ELSEWHERE = ("faults", "fuzz")
"""Cases that count what went wrong; the README's table of promises has them."""
README_ARMS = (*BASELINES, "D")


def write_tables(root: Path, cases: Mapping[str, Case]) -> None:
    """Write each table between the marks of its document.

    Args:
        root: Of the project.
        cases: Those that give a result of one table.

    Raises:
        ValueError: If a document lacks a mark.
    """
    for name, table in make_tables(cases).items():
        document = root / name
        before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{document}: must have {BEGIN.strip()!r} and {END.strip()!r} around its table")
        document.write_text(before + begin + table + end + after, encoding="utf-8")


def make_tables(cases: Mapping[str, Case], results: Path = RESULTS) -> dict[str, str]:
    """Return the Markdown tables by the document that has them."""
    return {
        "README.md": f"\n{_make_search_table(results / SEARCH_SPEED)}\n",
        "benchmarks/README.md": f"\n{_make_case_table(cases, results)}\n",
    }


def _make_search_table(folder: Path) -> str:
    """Return a row for each space, precision and arm: as it was measured last, and compared last."""
    head = (
        "| space | arm | seeds | trials/h | time to target | best val accuracy | trained again by A |"
        " trials/h, times those of | to the target, times sooner than | commit |"
    )
    rows = [head, "|" + "---|" * 10]
    results = _read_all(folder)
    kinds = sorted({(entry["space"], _name_precision(result)) for result in results for entry in result["summary"]})
    for space, precision in kinds:
        for arm in README_ARMS:
            found = [
                (entry, result)
                for result in results
                for entry in result["summary"]
                if (entry["space"], entry["arm"], _name_precision(result)) == (space, arm, precision)
            ]
            if found:
                rows.append(_make_search_row(f"{space}{precision}", found))
    return "\n".join(rows) + "\n"


def _make_search_row(space: str, found: list[tuple[dict[str, Any], Result]]) -> str:
    """Return the row of an arm from its entries, the oldest first."""
    entry, result = found[-1]
    compared = [(entry, result) for entry, result in found if (entry.get("ratios") or {}).get("trials_per_hour")]
    ratios, told = (compared[-1][0]["ratios"], _name_rivals(*compared[-1], newest=result)) if compared else ({}, "")
    cells = [
        space,
        entry["arm"],
        str(entry["n_runs"]),
        describe_spread(entry["trials_per_hour"], ",.0f"),
        describe_times(entry),
        describe_spread(entry["best"], ".3f"),
        describe_spread(entry["refit_best"], ".3f"),
        told + describe_spread(ratios.get("trials_per_hour"), ".2f", "x"),
        told * bool(ratios.get("time_to_target")) + describe_ratio(ratios.get("time_to_target")),
        _list_commits(result, entry["space"]),
    ]
    return f"| {' | '.join(cells)} |"


def _name_rivals(entry: Result, result: Result, *, newest: Result) -> str:
    """Return which baselines an arm was compared with in a result, and when, if that is not the row's."""
    rivals = [other["arm"] for other in result["summary"] if other["space"] == entry["space"]]
    commits = f" ({_list_commits(result, entry['space'])})" if result is not newest else ""
    return f"{' and '.join(arm for arm in BASELINES if arm in rivals)}{commits}: "


def _name_precision(result: Result) -> str:
    """Return what to add to a space's name where all arms computed in another type than torch's own."""
    precision = result["settings"].get("precision", "auto")
    return "" if precision == "auto" else f", {precision}"


def _list_commits(result: Result, space: str) -> str:
    """Return the commits of the commands that measured a space, in their order."""
    told = [each for each in result["provenance"] if "--pilot" not in each["command"]]
    return ", ".join(dict.fromkeys(each["commit"] for each in told if space in _list_spaces(each["command"])))


def _list_spaces(command: str) -> list[str]:
    words = command.split()
    return words[words.index("--spaces") + 1].split(",") if "--spaces" in words else list(SEARCH_SPACES)


def _make_case_table(cases: Mapping[str, Case], results: Path) -> str:
    rows = ["| case | arm | median, range | against the first arm | a step back is | commit |", "|" + "---|" * 6]
    for name, case in cases.items():
        if name not in ELSEWHERE and (found := _read_all(results / name)):
            rows += _make_case_rows(case, found[-1])
    return "\n".join(rows) + "\n"


def _make_case_rows(case: Case, result: Result) -> Iterable[str]:
    baseline, told = result["baseline"], result["provenance"]
    names = sorted(result["arms"], key=lambda arm: arm != baseline)  # the order of the others stays
    for arm in names:
        numbers, is_first = result["arms"][arm], arm == baseline
        ratio = [numbers["ratio_to_baseline"], *numbers["ratio_spread"]]
        cells = [
            f"`{case.name}`: {result['question']}" if is_first else "",
            arm,
            _describe_numbers([numbers["median"], *numbers["spread"]]) + f" {result['unit']}" * is_first,
            "" if is_first else describe_spread(ratio, ".2f", "x"),
            case.regression if is_first else "",
            f"{told['commit']}, {told['date'][:10]}" if is_first else "",
        ]
        yield f"| {' | '.join(cells)} |"


def _describe_numbers(spread: list[float | None]) -> str:
    """Return a median and its range with three digits, or all that stand before the point."""
    return describe_spread(spread, ",.0f" if abs(spread[0] or 0) >= 100 else ".3g")


def _read_all(folder: Path) -> list[Result]:
    """Return a case's results, the oldest first."""
    results: list[Result] = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(results, key=_find_date)


def _find_date(result: Result) -> str:
    provenance = result["provenance"]
    last = provenance[-1] if isinstance(provenance, list) else provenance
    return str(last["date"])
