"""One run of a study, as ``tuner run`` does it, with a worker module of the harness and its events as plain lines.

``python -m benchmarks.faults.one_run STUDY_FILE STORAGE_URL WORKER_MODULE [N_TRIALS]``.
"""

import os
import sys
from pathlib import Path
from typing import Self

from benchmarks.faults.worker_log import COORDINATOR_VARIABLE, describe_end
from tuner.errors import EXIT_SIGINT, EXIT_SIGTERM, TunerError
from tuner.service.coordinator import run_study
from tuner.service.pool import open_pool
from tuner.service.progress import Event, Noted, TrialFinished
from tuner.spec.study import load_spec

_EXIT_CODES = {"sigint": EXIT_SIGINT, "sigterm": EXIT_SIGTERM}
_N_WORKERS = 2


class Lines:
    """Shows the ends of trials, with all digits, and what is noted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        return

    def show(self, event: Event) -> None:
        """Print an event at once."""
        match event:
            case TrialFinished(number=number, outcome=outcome, value=value):
                print(describe_end(number, outcome.state, value), flush=True)
            case Noted(text=text):
                print(f"note: {text}", flush=True)


def main(study_file: str, url: str, worker_module: str, n_trials: str = "") -> int:
    """Run a study to its end; return the exit code that ``tuner run`` has."""
    os.environ[COORDINATOR_VARIABLE] = str(os.getpid())
    print("started", flush=True)
    try:
        spec = load_spec(Path(study_file))
        if n_trials:
            spec = spec.model_copy(update={"search": spec.search.model_copy(update={"n_trials": int(n_trials)})})
        status = run_study(
            spec, storage=url, n_workers=_N_WORKERS, display=Lines(), pool=open_pool(spec, worker_module)
        )
    except TunerError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    return _EXIT_CODES.get(status.stopped_by, 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
