"""Before the first trial: one worker looks at the data, the backbones and the devices, while the others start."""

from collections.abc import Callable
from dataclasses import dataclass

from tuner.errors import SearchError, SpecError
from tuner.search.distributions import check_group_counts
from tuner.search.studies import StudyFacts
from tuner.service.messages import Describe, Description, Hello, Setup
from tuner.service.pool import Pool, Worker
from tuner.service.slots import Slot, list_slots, usable_cores
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
    scout = pool.start(None)
    set_up(scout, spec, Slot(device="none", n_threads=usable_cores()))
    scout.send(Describe(timed=timed))
    slots: tuple[Slot, ...] = ()
    ready: set[int] = set()
    description: Description | None = None
    while description is None:
        if must_stop():
            return None
        for worker, reply in pool.wait(TICK_SECONDS):
            match reply:
                case None:
                    raise explain_loss(worker.describe_end())
                case Hello() if worker is scout:
                    slots = list_slots(spec.workers, reply.cuda_devices, n_workers=n_workers)[: spec.search.n_trials]
                    if starts_workers:
                        _start_workers(pool, spec, slots)
                case Hello():
                    ready.add(worker.number)
                case Description():
                    description = reply
    _dismiss(pool, scout, slots, ready)
    check_description(spec, description)
    return Scouted(description=description, slots=slots, ready=frozenset(ready))


def set_up(worker: Worker, spec: StudySpec, slot: Slot) -> None:
    """Send a worker its first message."""
    kind = slot.device.partition(":")[0]
    worker.send(Setup(spec=spec.model_dump_json(), device=kind, n_threads=slot.n_threads))


def start_worker(pool: Pool, spec: StudySpec, slot: Slot) -> None:
    """Start a worker that is bound to a slot's device."""
    set_up(pool.start(slot), spec, slot)


def _start_workers(pool: Pool, spec: StudySpec, slots: tuple[Slot, ...]) -> None:
    first = 1 if slots[0].device == "cpu" else 0  # the scout takes the first slot of the CPU
    for slot in slots[first:]:
        start_worker(pool, spec, slot)


def _dismiss(pool: Pool, scout: Worker, slots: tuple[Slot, ...], ready: set[int]) -> None:
    """Make the scout a worker of the CPU, which needs no binding; else end it, for it is bound to no device."""
    if slots[0].device == "cpu":
        scout.slot = slots[0]
        ready.add(scout.number)
    else:
        pool.stop(scout)


def explain_loss(message: str) -> SearchError:
    """Return the error for workers that end without a trial to blame."""
    return SearchError(f"workers: must be able to start and prepare the study, but {message}")


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
    )
