"""What all tests share: one torch thread each, and the runs of ``tuner`` one after the other beside all else."""

import os

import pytest

# Before torch is there: two threads on two busy cores took up to ten times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the end-to-end tests in one process: each of them starts processes for all cores."""
    for item in items:
        if "tests/e2e/" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("e2e"))
