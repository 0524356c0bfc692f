"""Benchmarks run, so that they cannot rot."""

from benchmarks.__main__ import CASES
from benchmarks.harness import describe, measure


def test_every_case_runs_in_smoke_mode() -> None:
    """Every arm of every case gives a number."""
    for case in CASES.values():
        result = measure(case, n_repeats=1, smoke=True)
        assert all(numbers["median"] > 0 for numbers in result["arms"].values())
        assert case.baseline in describe(result)
