"""How much sooner does a worker train on a CPU that asks for pages of 2 MB?

Each arm is a process of its own with a worker's environment, with or without what ``ask_for_huge_pages`` adds, that
trains as ``step_overhead`` does: full fine-tuning by tuner's loop on resident, augmented images. Where the system
grants no huge pages, or the C library is not glibc from 2.35, the arms are the same. A regression: slower with them.
"""

import os
import subprocess
import sys
from functools import partial

from benchmarks.harness import Case

_TRAIN = "from benchmarks.cases.step_overhead import run_trial; run_trial({0}, {1}); print(run_trial({0}, {1}))"


def run_process(seed: int, smoke: bool, *, has_huge_pages: bool) -> float:
    """Return images a second of the second training in a new process."""
    from tuner.service.slots import ask_for_huge_pages

    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment = ask_for_huge_pages(plain) if has_huge_pages else plain
    command = [sys.executable, "-c", _TRAIN.format(seed, smoke)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout)


CASE = Case(
    name="huge_pages",
    question="how many images a second does a worker train on a CPU with pages of 2 MB, against pages of 4 KB?",
    unit="images/s",
    baseline="pages of 4 KB",
    regression="fewer with pages of 2 MB",
    arms={
        "pages of 4 KB": partial(run_process, has_huge_pages=False),
        "pages of 2 MB": partial(run_process, has_huge_pages=True),
    },
    n_repeats=7,
    warms_up=False,
)
"""The same training in two environments."""
