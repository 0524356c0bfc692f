"""Does every study file and every image header, however broken, end as it should?

A study file gives a spec that survives JSON, or problems of one printable line each. An image gives pixels or an
exception, which the store counts as a bad image. Through the command line no broken study file gives exit code 1 or a
traceback. Whatever else happens is a finding: another exception, the death of the process, more than 5 s of its time or
64 MB for a study file, more than 30 s or 2.4 GB for an image (16 bytes for each pixel of the largest one allowed). Each
input is made from its seed alone: ``fuzz_checks.make_input(kind, seed)`` gives it again. Images that take more than 5 s
of their 30 s are named as slow.
"""

import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any

from benchmarks.fuzz_checks import Tally, check_chunk, check_command
from benchmarks.harness import Case

N_INPUTS = {"study tables": 50_000, "study texts": 50_000, "image headers": 100_000, "command line": 200}
N_SMOKE = {"study tables": 150, "study texts": 150, "image headers": 150, "command line": 2}
_CHUNK = 500
_CHUNK_SECONDS = 600


def run_fuzz(tallies: dict[str, Tally], repeat: int, smoke: bool, *, kind: str) -> float:
    """Return how many inputs of a kind ended as they should.

    Raises:
        RuntimeError: In smoke mode, if one did not.
    """
    seeds = [f"{repeat}:{number}" for number in range((N_SMOKE if smoke else N_INPUTS)[kind])]
    print(f"{kind}: seeds {seeds[0]} to {seeds[-1]}", flush=True)
    tally = Tally()
    if kind == "command line":
        with ThreadPoolExecutor(2) as threads:
            for found in threads.map(check_command, seeds):
                tally.add(found)
    else:
        _check_in_processes(kind, seeds, tally)
    tallies.setdefault(kind, Tally()).add(tally)
    if smoke and tally.findings:
        raise RuntimeError(f"fuzz found {tally.findings}")
    return float(len(seeds) - len(tally.findings))


def _check_in_processes(kind: str, seeds: list[str], tally: Tally) -> None:
    """Check inputs in two processes, so that one that kills its process is found too."""
    chunks = [seeds[start : start + _CHUNK] for start in range(0, len(seeds), _CHUNK)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_silence_libtiff) as pool:
        running: list[tuple[list[str], Future[Tally]]] = [
            (chunk, pool.submit(check_chunk, kind, chunk)) for chunk in chunks
        ]
        for chunk, future in running:
            try:
                tally.add(future.result(_CHUNK_SECONDS))
            except (BrokenProcessPool, TimeoutError) as error:
                tally.findings.append(f"{kind} {chunk[0]} to {chunk[-1]}: the process died or hung ({error!r})")
                break


def _silence_libtiff() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def describe_tallies(tallies: dict[str, Tally], _: Mapping[str, list[float]], __: bool) -> dict[str, Any]:
    """Return what came of the inputs, kind by kind."""
    return {
        kind: {
            "outcomes": dict(tally.outcomes.most_common()),
            "findings": tally.findings,
            "slow, not over the limit": tally.slow,
            "slowest_seconds": round(tally.slowest_seconds, 3),
            "peak_megabytes": round(tally.peak_megabytes, 1),
            "sees_every_peak": tally.sees_every_peak,
        }
        for kind, tally in tallies.items()
    }


def make_case() -> Case:
    """Return the case, with tallies of its own."""
    tallies: dict[str, Tally] = {}
    return Case(
        name="fuzz",
        question=(__doc__ or "").splitlines()[0],
        unit="inputs that ended as they should",
        baseline="study tables",
        regression="one input did not",
        arms={kind: partial(run_fuzz, tallies, kind=kind) for kind in N_INPUTS},
        n_repeats=1,
        warms_up=False,
        conclude=partial(describe_tallies, tallies),
    )


CASE = make_case()
