"""A worker of tuner as it is, with a log of what it sends."""

from benchmarks.faults.worker_log import watch_line
from tuner.service.worker import main

if __name__ == "__main__":
    watch_line()
    main()
