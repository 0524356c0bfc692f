"""A worker of tuner as it is, with a log of what it sends."""

from typing import Never

from benchmarks.faults.worker_log import watch_line
from tuner.service import worker

preload = worker.preload


def main() -> Never:
    """Run a worker that logs what it sends."""
    watch_line()
    worker.main()


if __name__ == "__main__":
    main()
