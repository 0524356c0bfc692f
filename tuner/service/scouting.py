"""Before the first trial: one worker looks at the data while torch loads, one at the backbones and the devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuner.errors import SpecError
from tuner.search.distributions import check_group_counts
from tuner.search.study_facts import StudyFacts
from tuner.service.failures import FailureCount
from tuner.service.messages import DataRead, Describe, Description, Hello, Setup
from tuner.service.pool import Pool
from tuner.service.slots import Slot, expects_cpu, list_slots, probes_sharing, usable_cores
from tuner.service.worker_process import Worker
from tuner.spec.sections import StudySpec
from tuner.spec.space import Choices, IntRange

TICK_SECONDS = 0.25
"""How long the coordinator waits at most before it looks at signals and the clock."""


@dataclass(frozen=True, kw_only=True)
class Scouted:
    """What the scout found, and the workers that are up."""

    description: Description
    slots: tuple[Slot, ...]
    ready: frozenset[int]
    """Numbers of the workers that have said hello and may train."""
    probes_sharing: bool = False
    """Whether the slots are those of a probe that is to say how many workers share each device."""


def scout_study(
    pool: Pool,
    spec: StudySpec,
    *,
    n_workers: int | None = None,
    timed: bool = False,
    starts_workers: bool = True,
    must_stop: Callable[[], bool] = lambda: False,
) -> Scouted | None:
    """Describe a study and check its spec against the description.

    Args:
        pool: Where the workers run.
        spec: The checked study file.
        n_workers: As for ``run_study``.
        timed: Also time a training step of every backbone.
        starts_workers: Start the workers that will train; their start hides behind the description.
        must_stop: Asked every now and then; whether to give up.

    Returns:
        What was found; None if it was given up.

    Raises:
        TunerError: If the data, a backbone or a device cannot be used, or does not fit the spec.
    """
    scouting = _Scouting(pool, spec, n_workers=n_workers, timed=timed, starts_workers=starts_workers)
    while (description := scouting.description) is None:
        if must_stop():
            return None
        scouting.listen()
    scouting.dismiss()
    check_description(spec, description)
    return Scouted(
        description=description,
        slots=scouting.slots,
        ready=frozenset(scouting.ready),
        probes_sharing=probes_sharing(spec.workers, scouting.slots, n_workers),
    )


class _Scouting:
    """What has been heard until the description is there. Mutable."""

    def __init__(
        self, pool: Pool, spec: StudySpec, *, n_workers: int | None, timed: bool, starts_workers: bool
    ) -> None:
        self._pool, self._spec = pool, spec
        self._n_workers, self._timed, self._starts_workers = n_workers, timed, starts_workers
        self._failures = FailureCount(spec.study.name)
        self._scout = self._start_scout()
        self.slots: tuple[Slot, ...] = ()
        self.ready: set[int] = set()
        self.description: Description | None = None
        if expects_cpu(spec.workers):
            self._start_workers(())  # nobody need say what devices there are
        self._reader: Worker | None = self._start_reader()

    def _start_reader(self) -> Worker:
        """Have the data looked at before torch is there: a mistake in it is said seconds sooner."""
        reader = self._pool.start_at_once()
        set_up(reader, self._spec, Slot(device="none", n_threads=usable_cores()))
        return reader

    def _start_scout(self) -> Worker:
        scout = self._pool.start(None)
        set_up(scout, self._spec, Slot(device="none", n_threads=usable_cores()))
        scout.send(Describe(timed=self._timed))
        return scout

    def listen(self) -> None:
        """Wait for the next replies."""
        for worker, reply in self._pool.wait(TICK_SECONDS):
            match reply:
                case None:
                    self._replace(worker)
                case DataRead() if worker is self._reader:
                    self._dismiss_reader()
                case Hello() if worker is self._scout:
                    self._start_workers(reply.cuda_devices)
                case Hello():
                    self.ready.add(worker.number)
                case Description():
                    self.description = reply

    def _replace(self, worker: Worker) -> None:
        """Start another worker in a lost one's place; who kills three of them means it."""
        message = worker.describe_end()
        self._failures.count_idle_loss(worker.cause_of_end, message)
        self.ready.discard(worker.number)
        if worker.slot is not None:
            start_worker(self._pool, self._spec, worker.slot)
        elif worker is self._reader:
            self._reader = self._start_reader()
        else:
            self._scout = self._start_scout()

    def _start_workers(self, cuda_devices: Sequence[str]) -> None:
        """Start the workers that will train, unless they have started on these devices."""
        slots = limit_slots(self._spec, list_slots(self._spec.workers, cuda_devices, n_workers=self._n_workers))
        if slots == self.slots:
            return
        for worker in [worker for worker in self._pool.workers.values() if worker.slot is not None]:
            self.ready.discard(worker.number)
            self._pool.stop(worker)
        self.slots = slots
        first = 1 if slots[0].device == "cpu" else 0  # the scout takes the first slot of the CPU
        for slot in slots[first:] if self._starts_workers else ():
            start_worker(self._pool, self._spec, slot)

    def _dismiss_reader(self) -> None:
        if self._reader is not None:
            self._pool.stop(self._reader)
            self._reader = None

    def dismiss(self) -> None:
        """Make the scout a worker of the CPU, which needs no binding; else end it, for it is bound to no device."""
        self._dismiss_reader()
        if self.slots[0].device == "cpu":
            self._scout.slot = self.slots[0]
            self.ready.add(self._scout.number)
        else:
            self._pool.stop(self._scout)


def limit_slots(spec: StudySpec, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """Return as many slots as the study has trials, at most."""
    return slots[: spec.search.n_trials + spec.search.screen * len(spec.backbone_names())]


def set_up(worker: Worker, spec: StudySpec, slot: Slot) -> None:
    """Send a worker its first message."""
    kind = slot.device.partition(":")[0]
    worker.send(Setup(spec=spec.model_dump_json(), device=kind, n_threads=slot.n_threads))


def start_worker(pool: Pool, spec: StudySpec, slot: Slot) -> None:
    """Start a worker that is bound to a slot's device."""
    set_up(pool.start(slot), spec, slot)


def check_description(spec: StudySpec, description: Description) -> None:
    """Check the numbers of a spec against what the data and the backbones allow.

    Raises:
        SpecError: If a number is too large.
    """
    check_group_counts(spec, description.group_counts)
    n_train = description.split_counts["train"]
    match spec.space.get("batch_size"):
        case Choices() as searched:
            where, largest = "space.batch_size.choices", max(int(choice) for choice in searched.choices)
        case IntRange(high=int(high)):
            where, largest = "space.batch_size.high", high
        case _:
            where, largest = "training.batch_size", int(spec.training.batch_size or 1)
    if largest > n_train:
        raise SpecError(f"{where}: must not exceed {n_train}, the number of training images, got {largest}")


def collect_facts(description: Description) -> StudyFacts:
    """Return what is stored with a study of what its first worker found."""
    return StudyFacts(
        data_hash=description.data_hash,
        classes=description.classes,
        splits=description.splits,
        split_counts=description.split_counts,
        group_counts=description.group_counts,
        weights=description.fingerprints,
        preprocessing=description.preprocessing,
        versions=description.versions,
        max_folds=description.max_folds,
    )
