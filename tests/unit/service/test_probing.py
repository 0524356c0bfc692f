"""The probe behind ``per_device = "auto"``, with workers that stand in for processes on a GPU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuner.service.messages import Alive, Hello, Probe, Probed, Reply, Request
from tuner.service.probing import SharingProbe, find_typical, list_largest
from tuner.service.progress import Event, Noted, SilentDisplay
from tuner.service.scouting import Scouted
from tuner.service.sharing import Sharing
from tuner.service.slots import Slot, list_slots
from tuner.spec.sections import StudySpec
from tuner.spec.study import parse_spec

from .test_scouting import DESCRIPTION, StandIn, make_spec

GIGABYTE = 10**9


class Shown(SilentDisplay):
    """Keeps what the user would read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def show(self, event: Event) -> None:
        """Keep a note."""
        if isinstance(event, Noted):
            self.notes.append(event.text)


class SharedDevice:
    """A pool of workers whose device trains, with n of them, so many images per second together."""

    def __init__(self, slots: Sequence[Slot], speeds: Sequence[float], **options: Any) -> None:
        self.workers: dict[int, StandIn] = {}
        self.n_started = 0
        self.asked: list[tuple[float, list[int]]] = []
        self._speeds = speeds
        self._memory: tuple[tuple[int, int], ...] = options.get("memory", ((GIGABYTE, 100 * GIGABYTE),))
        self._answer: Callable[[int, Probe], Probed | None] | None = options.get("answer")
        self._greeted: set[int] = set()
        for slot in slots:
            self.start(slot)

    def start(self, slot: Slot | None) -> StandIn:
        """Start a worker."""
        worker = StandIn(self.n_started, slot)
        self.n_started += 1
        self.workers[worker.number] = worker
        return worker

    def stop(self, worker: StandIn) -> None:
        """End a worker."""
        del self.workers[worker.number]

    def wait(self, _: float) -> Iterator[tuple[StandIn, Reply | None]]:
        """Yield greetings, a pulse, and the answers of all that were asked since the last call."""
        for worker in list(self.workers.values()):
            if worker.number not in self._greeted:
                self._greeted.add(worker.number)
                yield worker, Hello(cuda_devices=("A",))
        asked = [worker for worker in self.workers.values() if any(isinstance(one, Probe) for one in worker.sent)]
        if asked:
            self.asked.append((find_probe(asked[0].sent).seconds, [worker.number for worker in asked]))
        for worker in asked:
            yield worker, Alive()
            request = find_probe(worker.sent)
            worker.sent.clear()
            told = self._answer(worker.number, request) if self._answer else self._time(len(asked), request)
            if told is None:
                del self.workers[worker.number]
            yield worker, told

    def _time(self, n_together: int, request: Probe) -> Probed:
        speed = self._speeds[n_together - 1] / n_together if request.seconds else 0.0
        return Probed(images_per_second=speed, memory=self._memory)


def find_probe(sent: Sequence[Request]) -> Probe:
    """Return the probe among what a worker was sent."""
    return next(one for one in sent if isinstance(one, Probe))


def make_probe(pool: SharedDevice, spec: StudySpec, slots: tuple[Slot, ...], **options: Any) -> tuple[Any, Shown]:
    """Return a probe on a pool that stands in for one, and what the user is shown."""
    shown = Shown()
    description = replace(DESCRIPTION, n_params={"test_resnet": 1})
    scouted = Scouted(description=description, slots=slots, ready=frozenset(), probes_sharing=True)
    ready: set[int] = options.get("ready", set())
    must_stop = options.get("must_stop", lambda: False)
    return SharingProbe(pool, spec, scouted, ready=ready, display=shown, must_stop=must_stop), shown  # type: ignore[arg-type]


def decide(
    speeds: Sequence[float], *, n_devices: int = 1, n_cores: int = 16, **options: Any
) -> tuple[Sharing, tuple[Slot, ...], SharedDevice, list[str]]:
    """Let a probe decide; return what it found, the slots, the pool as it is left, and the notes."""
    spec = options.pop("spec", None) or make_spec(per_device="auto")
    slots = list_slots(spec.workers, ("A",) * n_devices, n_cores=n_cores)
    probe_options = {name: options.pop(name) for name in ("must_stop", "ready") if name in options}
    pool = SharedDevice(slots, speeds, **options)
    probe, shown = make_probe(pool, spec, slots, **probe_options)
    found, settled = probe.decide()
    return found, settled, pool, shown.notes


def test_probe_stops_where_one_more_gains_too_little_and_ends_the_surplus() -> None:
    """Four start, three are tried, two stay."""
    found, slots, pool, notes = decide([100.0, 150.0, 152.0, 999.0])
    assert (found.n_workers, found.speeds) == (2, (100.0, 150.0, 152.0))
    assert [slot.device for slot in slots] == ["cuda:0", "cuda:0"]
    assert sorted(pool.workers) == [0, 1]
    assert notes == [found.describe()]
    assert "one more gained less than 5 %" in notes[0]


def test_probe_has_each_new_worker_ready_before_all_count() -> None:
    """Else the others would train alone while it makes its model."""
    _, _, pool, _ = decide([100.0, 150.0, 152.0])
    assert pool.asked == [(0, [0]), (0, [0]), (3.0, [0]), (0, [1]), (3.0, [0, 1]), (0, [2]), (3.0, [0, 1, 2])]


def test_probe_keeps_all_where_each_one_gains() -> None:
    """Four is the limit."""
    found, _, pool, notes = decide([100.0, 190.0, 270.0, 340.0])
    assert found.n_workers == len(pool.workers) == 4
    assert "no more are ever tried" in notes[0]


def test_probe_tries_no_more_than_have_room() -> None:
    """A third worker with the largest batches would not fit, however fast it might be."""
    found, _, pool, notes = decide([100.0, 190.0, 270.0], memory=((1, 10**6), (40, 60)))
    assert found.speeds == (100.0, 190.0)
    assert len(pool.workers) == 2
    assert "memory has room for 2 that train the largest batches" in notes[0]


@pytest.mark.parametrize(("n_cores", "n_trials"), [(1, 40), (16, 1)])
def test_probe_measures_nothing_where_one_worker_is_all_there_can_be(n_cores: int, n_trials: int) -> None:
    """One core, or one trial."""
    spec = make_spec(per_device="auto")
    spec = spec.model_copy(update={"search": spec.search.model_copy(update={"n_trials": n_trials})})
    slots = list_slots(spec.workers, ("A",), n_cores=n_cores)[:n_trials]
    pool = SharedDevice(slots, [])
    probe, shown = make_probe(pool, spec, slots)
    found, _ = probe.decide()
    assert (found.n_workers, found.speeds, pool.asked) == (1, (), [])
    assert shown.notes == [
        'per_device = "auto": 1 worker on each device; nothing was measured; cores and trials allow no more'
    ]


def test_probe_of_one_device_decides_for_all() -> None:
    """The second device gets as many workers as the first was found to bear."""
    found, slots, pool, _ = decide([100.0, 150.0, 152.0], n_devices=2)
    assert found.n_workers == 2
    assert sorted(slot.device for slot in slots) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    kept = [worker.slot.device for worker in pool.workers.values() if worker.slot]
    assert sorted(kept) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert 1 in pool.workers  # the second device's first worker stays


def test_probe_takes_one_where_the_largest_recipe_has_no_room_even_alone() -> None:
    """The reason is the worker's."""
    found, _, pool, notes = decide([100.0, 150.0], answer=lambda *_: Probed(problem="CUDA out of memory"))
    assert (found.n_workers, found.speeds, len(pool.workers)) == (1, (), 1)
    assert notes[0].endswith("; CUDA out of memory")


def test_probe_decides_on_what_it_has_when_a_worker_is_lost() -> None:
    """The second worker dies in its first steps; the first one goes on alone."""

    def answer(number: int, request: Probe) -> Probed | None:
        return None if number == 1 else Probed(images_per_second=100.0, memory=((1, 10**6),))

    found, _, pool, notes = decide([], answer=answer)
    assert (found.n_workers, found.speeds, sorted(pool.workers)) == (1, (100.0,), [0])
    assert notes[0] == "worker 1 ended: killed by signal 9"
    assert notes[1].endswith("; worker 1 ended: killed by signal 9")


def test_probe_replaces_the_only_worker_that_is_lost() -> None:
    """Trials need one in any case."""
    _, _, pool, _ = decide([], answer=lambda number, _: None if number == 0 else Probed())
    assert sorted(pool.workers) == [1]


def test_probe_gives_up_when_the_run_is_to_stop() -> None:
    """Nothing is waited for."""
    found, _, pool, notes = decide([], must_stop=lambda: True)
    assert (found.n_workers, found.speeds, pool.asked) == (1, (), [])
    assert notes[0].endswith("; there was no time for more")


def test_probe_says_who_is_ready() -> None:
    """Those that said hello while it listened, less those that it ended."""
    ready: set[int] = set()
    decide([100.0, 150.0, 152.0], ready=ready)
    assert ready == {0, 1}


SIZES = {"test_resnet": 3, "test_vit": 1, "test_efficientnet": 2, "test_convnext": 4}
COUNTS = dict.fromkeys(SIZES, 6)


def make_broad_spec() -> StudySpec:
    """Return a study that searches backbones, batch sizes and layers."""
    tables = {
        "study": {"name": "s"},
        "data": {"source": "digits"},
        "space": {
            "backbone": {"choices": list(SIZES)},
            "lr": {"low": 1e-4, "high": 1e-2},
            "batch_size": {"choices": [16, 64, 32]},
            "unfrozen_layers": {"choices": [1, 4, 2]},
        },
    }
    return parse_spec(tables, Path("/studies"))


def test_find_typical_takes_the_backbone_in_the_middle() -> None:
    """Of four by size the second, with trial 0's recipe."""
    params = find_typical(make_broad_spec(), COUNTS, SIZES)
    assert (params.backbone, params.batch_size) == ("test_efficientnet", 32)


def test_list_largest_takes_the_largest_batch_and_all_layers_of_every_backbone() -> None:
    """Memory must hold whatever the search may try."""
    largest = list_largest(make_broad_spec(), COUNTS)
    assert [params.backbone for params in largest] == list(SIZES)
    assert {(params.batch_size, params.unfrozen_layers) for params in largest} == {(64, 4)}
