"""``python -m benchmarks [CASE…] [--smoke]``: measure, print, and keep what was measured."""

import sys

from benchmarks.cases import trial_book
from benchmarks.harness import describe, measure, save

CASES = {case.name: case for case in (trial_book.CASE,)}
N_REPEATS = 5


def main(arguments: list[str]) -> int:
    """Run the named cases, or all. Smoke mode is small, and keeps nothing."""
    smoke = "--smoke" in arguments
    names = [argument for argument in arguments if argument != "--smoke"] or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        print(f"unknown case {unknown[0]!r}; the cases are {', '.join(CASES)}", file=sys.stderr)
        return 2
    for name in names:
        result = measure(CASES[name], n_repeats=1 if smoke else N_REPEATS, smoke=smoke)
        print(describe(result))
        if not smoke:
            print(f"kept in {save(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
