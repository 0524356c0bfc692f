"""``python -m benchmarks [CASE…] [--smoke]``: measure, print, and keep what was measured."""

import argparse
import os
import signal
import sys
from pathlib import Path

from benchmarks.cases import (
    cpu_layers,
    decode,
    faults,
    fuzz,
    growth,
    head_start,
    honesty,
    huge_pages,
    memory,
    memory_admission,
    precision,
    prefix_cost,
    search_speed,
    step_overhead,
    suffix_step,
    trial_book,
    views,
)
from benchmarks.harness import describe, measure, save
from benchmarks.material import IMAGES_VARIABLE, WEIGHTS_VARIABLE
from benchmarks.search_settings import NAME as SEARCH_SPEED
from benchmarks.search_settings import add_options
from benchmarks.tables import write_tables

CASES = {
    case.name: case
    for case in (
        trial_book.CASE,
        step_overhead.CASE,
        cpu_layers.CASE,
        huge_pages.CASE,
        suffix_step.CASE,
        prefix_cost.CASE,
        decode.CASE,
        memory.CASE,
        memory_admission.CASE,
        precision.CASE,
        growth.CASE,
        faults.CASE,
        fuzz.CASE,
    )
}
"""Those of one table."""
OWN_RESULTS = {
    SEARCH_SPEED: search_speed.main,
    honesty.NAME: honesty.main,
    views.NAME: views.main,
    head_start.NAME: head_start.main,
}
"""Those with a result of their own, which the same command goes on with."""


def main(arguments: list[str]) -> int:
    """Run the named cases, or all. Smoke mode is small, and keeps nothing."""
    known = (*CASES, *OWN_RESULTS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--smoke", action="store_true", help="seconds, with tiny data; keeps nothing")
    parser.add_argument(
        "--readme", action="store_true", help="write the tables of README.md and benchmarks/README.md, and do nothing"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="instead of the case's own number")
    parser.add_argument("--images", metavar="DIR", help=f"data sets as zip files [{IMAGES_VARIABLE}]")
    parser.add_argument("--weights", metavar="DIR", help=f"weights with a JSON file each [{WEIGHTS_VARIABLE}]")
    parser.add_argument("--studies", type=int, default=honesty.DEFAULT_STUDIES, metavar="N", help="of honesty, in all")
    add_options(parser)
    faults.add_options(parser)
    views.add_options(parser)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.cases if name not in known]:
        parser.error(f"unknown case {unknown[0]!r}; the cases are {', '.join(known)}")
    for variable, given in ((IMAGES_VARIABLE, options.images), (WEIGHTS_VARIABLE, options.weights)):
        if given:
            os.environ[variable] = given
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that arms are ended and folders removed
    if options.readme:
        write_tables(Path(__file__).parents[1], CASES)
        return 0
    cases = CASES | {faults.CASE.name: faults.read_options(options)}
    for name in options.cases or known:
        if name in OWN_RESULTS:
            OWN_RESULTS[name](options)
            continue
        case = cases[name]
        repeats = 1 if options.smoke else options.repeats or case.n_repeats
        result = measure(case, n_repeats=repeats, smoke=options.smoke)
        print(describe(result), flush=True)
        if not options.smoke:
            print(f"kept in {save(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
