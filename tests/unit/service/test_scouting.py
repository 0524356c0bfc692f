"""Which workers start, and when."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tuner.errors import SearchError
from tuner.service import scouting
from tuner.service.messages import DataRead, Describe, Description, Hello, Reply, Request, Setup
from tuner.service.scouting import Scouted, scout_study
from tuner.service.slots import Slot
from tuner.spec.sections import StudySpec
from tuner.spec.study import parse_spec

DESCRIPTION = Description(
    data_hash="",
    classes=("a", "b"),
    splits="",
    split_counts={"train": 100, "val": 20, "test": 0},
    group_counts={"test_resnet": 6},
    fingerprints={},
    preprocessing={},
    versions={},
    weights={},
    n_params={},
    store_bytes=0,
    free_bytes=0,
    seconds_per_image={},
)


class StandIn:
    """A worker that keeps what it was sent."""

    def __init__(self, number: int, slot: Slot | None) -> None:
        self.number, self.slot = number, slot
        self.sent: list[Request] = []

    def send(self, request: Request) -> None:
        """Keep a request."""
        self.sent.append(request)

    @property
    def cause_of_end(self) -> object:
        """What ended it: itself."""
        return self

    def describe_end(self) -> str:
        """Return how it ended."""
        return f"worker {self.number} ended: killed by signal 9"


class StandInPool:
    """A pool whose first worker describes the study, on a machine with some CUDA devices. A reader's number is 100."""

    def __init__(self, *cuda_devices: str, lost: Sequence[int] = (), reads: bool = True) -> None:
        self.workers: dict[int, StandIn] = {}
        self.started: list[StandIn] = []
        self.n_before_hello = 0
        self._cuda_devices, self._lost = cuda_devices, list(lost)
        self._reads = reads
        self.readers: list[StandIn] = []
        self._is_asked = False

    def start(self, slot: Slot | None) -> StandIn:
        """Start a worker."""
        worker = StandIn(len(self.started), slot)
        self.workers[worker.number] = worker
        self.started.append(worker)
        return worker

    def start_at_once(self) -> StandIn:
        """Start a worker that reads the data."""
        reader = StandIn(100 + len(self.readers), None)
        self.readers.append(reader)
        self.workers[reader.number] = reader
        return reader

    def stop(self, worker: StandIn) -> None:
        """End a worker."""
        del self.workers[worker.number]

    def wait(self, _: float) -> Iterator[tuple[StandIn, Reply | None]]:
        """Yield the loss of a worker that is to be lost; else the greetings of all, and the scout's description."""
        if self._lost:
            yield self.workers.pop(self._lost.pop(0)), None
            return
        scout = next(worker for worker in self.workers.values() if isinstance(worker.sent[-1], Describe))
        reader = self.readers[-1]
        assert [type(request) for request in reader.sent] == [Setup]
        if self._reads and reader.number in self.workers:
            yield reader, DataRead()
            assert reader.number not in self.workers
        self.n_before_hello = len(self.started)
        for worker in reversed(list(self.workers.values())):  # the first one is the last to be up
            if worker is not reader:
                yield worker, Hello(cuda_devices=self._cuda_devices)
        yield scout, DataRead()
        yield scout, DESCRIPTION


def make_spec(**workers: object) -> StudySpec:
    """Return a study of one backbone."""
    tables = {
        "study": {"name": "s"},
        "data": {"source": "digits"},
        "space": {"lr": {"low": 1e-4, "high": 1e-2}},
        "training": {"backbone": "test_resnet", "batch_size": 16},
        "workers": workers,
    }
    return parse_spec(tables, Path("/studies"))


def scout(pool: Any, spec: StudySpec, *, n_workers: int | None = None) -> Scouted:
    """Scout a study with a pool that stands in for one."""
    scouted = scout_study(pool, spec, n_workers=n_workers)
    assert scouted is not None
    return scouted


def test_workers_of_the_cpu_start_with_the_first() -> None:
    """Nobody has to say first what devices there are."""
    pool = StandInPool()
    scouted = scout(pool, make_spec(devices="cpu"), n_workers=3)
    assert pool.n_before_hello == len(pool.started) == 3
    assert scouted.ready == {0, 1, 2}


def test_workers_that_started_for_the_wrong_device_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose driver shows in an unknown way is used all the same, by workers that are bound to it."""
    monkeypatch.setattr(scouting, "expects_cpu", lambda _: True)
    pool = StandInPool("A", "B")
    scouted = scout(pool, make_spec(devices="auto"))
    assert pool.n_before_hello > 1
    assert [slot.device for slot in scouted.slots] == ["cuda:0", "cuda:1"]
    assert [worker.slot and worker.slot.device for worker in pool.workers.values()] == ["cuda:0", "cuda:1"]
    assert scouted.ready == frozenset()


def test_workers_that_a_probe_needs_start_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that may share the first device, and one on each other device; no more than there are trials."""
    monkeypatch.setattr("tuner.service.slots.usable_cores", lambda: 16)
    scouted = scout(StandInPool("A", "B"), make_spec(devices="auto", per_device="auto"))
    assert scouted.probes_sharing
    assert [slot.device for slot in scouted.slots] == ["cuda:0", "cuda:1", "cuda:0", "cuda:0", "cuda:0"]
    told = scout(StandInPool("A", "B"), make_spec(devices="auto", per_device="auto"), n_workers=2)
    assert not told.probes_sharing
    assert [slot.device for slot in told.slots] == ["cuda:0", "cuda:1"]


def test_reader_ends_with_the_scouting_whoever_is_first() -> None:
    """It is no worker that could train."""
    for pool in (StandInPool(), StandInPool(reads=False), StandInPool("A", reads=False)):
        scouted = scout(pool, make_spec(devices="auto"), n_workers=2)
        assert len(pool.readers) == 1
        assert 100 not in pool.workers
        assert 100 not in scouted.ready


def test_reader_that_is_lost_is_replaced() -> None:
    """Its loss is one like any other."""
    pool = StandInPool(lost=[100])
    scout(pool, make_spec(devices="cpu"), n_workers=2)
    assert [reader.number for reader in pool.readers] == [100, 101]
    assert sorted(pool.workers) == [0, 1]
    with pytest.raises(SearchError, match="worker 102 ended"):
        scout(StandInPool(lost=[100, 101, 102]), make_spec(devices="cpu"), n_workers=2)


@pytest.mark.parametrize("lost", [[0], [1], [0, 2]])
def test_workers_that_are_lost_are_replaced(lost: list[int]) -> None:
    """The scout by another scout, the others by others in their slots."""
    pool = StandInPool(lost=lost)
    scouted = scout(pool, make_spec(devices="cpu"), n_workers=2)
    assert len(pool.started) == 2 + len(lost)
    assert scouted.ready == set(range(2 + len(lost))) - set(lost)
    assert all(worker.slot in scouted.slots for worker in pool.workers.values())


def test_scouting_gives_up_when_a_third_worker_is_lost() -> None:
    """What kills every worker is no accident."""
    with pytest.raises(SearchError, match="workers: must be able to start and prepare the study, but worker 3 ended"):
        scout(StandInPool(lost=[0, 2, 3]), make_spec(devices="cpu"), n_workers=2)
