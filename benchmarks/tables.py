"""The tables of the documents, from the result files: the newest of each case, and of each arm of a search."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Case
from benchmarks.search_settings import NAME as SEARCH_SPEED
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
    """
    for name, table in make_tables(cases).items():
        document = root / name
        before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
        document.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


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
        " trials/h, times those of the better of A and B | to the target, times sooner than they | commit |"
    )
    rows = [head, "|" + "---|" * 10]
    results = _read_all(folder)
    kinds = sorted({(entry["space"], _precision(result)) for result in results for entry in result["summary"]})
    for space, precision in kinds:
        for arm in README_ARMS:
            found = [
                (entry, result)
                for result in results
                for entry in result["summary"]
                if (entry["space"], entry["arm"], _precision(result)) == (space, arm, precision)
            ]
            if found:
                rows.append(_make_search_row(f"{space}{precision}", found))
    return "\n".join(rows) + "\n"


def _make_search_row(space: str, found: list[tuple[dict[str, Any], Result]]) -> str:
    """Return the row of an arm from its entries, the oldest first."""
    entry, result = found[-1]
    compared = [(entry, result) for entry, result in found if (entry.get("ratios") or {}).get("trials_per_hour")]
    ratios, origin = (compared[-1][0]["ratios"], _commit(compared[-1][1])) if compared else ({}, "")
    told = f", {origin}" if origin not in {"", _commit(result)} else ""
    cells = [
        space,
        entry["arm"],
        str(entry["n_runs"]),
        describe_spread(entry["trials_per_hour"], ",.0f"),
        describe_times(entry),
        describe_spread(entry["best"], ".3f"),
        describe_spread(entry["refit_best"], ".3f"),
        describe_spread(ratios.get("trials_per_hour"), ".2f", "x") + (told if ratios else ""),
        describe_ratio(ratios.get("time_to_target")) + (told if ratios.get("time_to_target") else ""),
        _commit(result),
    ]
    return f"| {' | '.join(cells)} |"


def _precision(result: Result) -> str:
    """Return what to add to a space's name where all arms computed in another type than torch's own."""
    precision = result["settings"].get("precision", "auto")
    return "" if precision == "auto" else f", {precision}"


def _commit(result: Result) -> str:
    """Return the commit of the last command that added to a search's result."""
    return str(result["provenance"][-1]["commit"])


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
    return sorted(results, key=_date)


def _date(result: Result) -> str:
    provenance = result["provenance"]
    last = provenance[-1] if isinstance(provenance, list) else provenance
    return str(last["date"])
