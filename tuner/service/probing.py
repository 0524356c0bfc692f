"""The probe behind ``per_device = "auto"``: workers of one device train the same steps, first alone, then together."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from tuner.search.distributions import make_distributions, project_default_recipe, project_value, resolve_params
from tuner.service.messages import Hello, Note, Probe, Probed
from tuner.service.pool import Pool
from tuner.service.progress import ActivityChanged, Display, Noted
from tuner.service.scouting import TICK_SECONDS, Scouted, limit_slots, start_worker
from tuner.service.sharing import MAX_SHARING, Sharing, choose_n_workers, count_fitting, has_gained
from tuner.service.slots import Slot, share_slots
from tuner.service.worker_process import Worker
from tuner.spec.sections import StudySpec
from tuner.trial import TrialParams

PROBE_SECONDS = 3.0
"""How long each number of workers trains: long against a step, short against a trial."""
_LARGEST = 1 << 40
"""More than any value of a space, and few enough bits for a float to tell its distances to them apart."""


class SharingProbe:
    """Asks the workers of the first device, and leaves each device with as many as pay. Mutable.

    Workers of other devices wait meanwhile. Which recipe is timed: the default one of the search with the backbone in
    the middle by size. What must have room: the largest batch of every backbone, with all layers that may train.
    """

    def __init__(
        self,
        pool: Pool,
        spec: StudySpec,
        scouted: Scouted,
        *,
        ready: set[int],
        display: Display,
        must_stop: Callable[[], bool],
    ) -> None:
        """Ask nothing yet.

        Args:
            pool: Its workers are idle, or still start.
            spec: The study's.
            scouted: Its slots are those of the workers.
            ready: Numbers of the workers that have said hello; kept up to date.
            display: Told what is done.
            must_stop: Asked now and then; whether to decide on what is known.
        """
        self._pool, self._spec, self._scouted = pool, spec, scouted
        self._ready, self._display, self._must_stop = ready, display, must_stop
        self._device = scouted.slots[0].device
        self._problem: str | None = None

    def decide(self) -> tuple[Sharing, tuple[Slot, ...]]:
        """Probe the first device, end and start workers accordingly, and return what was found, and the slots."""
        workers = sorted(self._list_workers(self._device), key=lambda worker: worker.number)
        speeds: list[float] = []
        n_max, reason = self._count_fitting(workers)
        while n_max > 1 and len(speeds) < n_max and has_gained(speeds):
            speed = self._time(workers[: len(speeds) + 1])
            if speed is None:
                reason = self._problem or "there was no time for more"
                break
            speeds.append(speed)
        if not has_gained(speeds):
            reason = "one more gained less than 5 %"
        found = Sharing(device=self._device, n_workers=choose_n_workers(speeds), speeds=tuple(speeds), reason=reason)
        slots = limit_slots(self._spec, share_slots(self._scouted.slots, found.n_workers))
        self._fit_workers(slots)
        self._display.show(Noted(text=found.describe()))
        return found, slots

    def _list_workers(self, device: str) -> list[Worker]:
        return [worker for worker in self._pool.workers.values() if worker.slot and worker.slot.device == device]

    def _count_fitting(self, workers: Sequence[Worker]) -> tuple[int, str]:
        """Return how many workers may share the device, and why no more."""
        n_max = len(workers)
        reason = "no more are ever tried" if n_max == MAX_SHARING else "cores and trials allow no more"
        if n_max < 2:
            return 1, reason
        for params in list_largest(self._spec, self._scouted.description.group_counts):
            found = self._ask(workers[:1], params, 0)
            if found is None:
                return 1, self._problem or "there was no time for more"
            if (n_fitting := count_fitting(found[0].memory)) < n_max:
                n_max, reason = n_fitting, f"memory has room for {n_fitting} that train the largest batches"
        return n_max, reason

    def _time(self, workers: Sequence[Worker]) -> float | None:
        """Return how many images per second some workers train together; None if that cannot be had."""
        typical = find_typical(self._spec, self._scouted.description.group_counts, self._scouted.description.n_params)
        # The new one gets ready first, so that all begin to count at the same time.
        if self._ask(workers[-1:], typical, 0) is None:
            return None
        found = self._ask(workers, typical, PROBE_SECONDS)
        return None if found is None else sum(each.images_per_second for each in found)

    def _ask(self, workers: Sequence[Worker], params: TrialParams, seconds: float) -> list[Probed] | None:
        """Send workers the same probe, and return all their answers; None if one could not."""
        if self._problem is not None:
            return None
        request = Probe(data_hash=self._scouted.description.data_hash, params=params, seconds=seconds)
        unasked = {worker.number: worker for worker in workers}
        found: dict[int, Probed | None] = {}
        text = f"probing how many workers share {self._device}"
        while len(found) < len(workers) and not self._must_stop():
            # At once: a worker that came later would find the others alone for a while.
            if unasked and unasked.keys() <= self._ready:
                for worker in unasked.values():
                    worker.send(request)
                    self._display.show(ActivityChanged(worker=worker.number, text=text))
                unasked.clear()
            found |= self._listen({worker.number for worker in workers})
            if None in found.values():
                break
        for worker in workers:
            self._display.show(ActivityChanged(worker=worker.number, text=""))
        answers = [answer for answer in found.values() if answer is not None]
        self._problem = next((each.problem for each in answers if each.problem), self._problem)
        return answers if len(answers) == len(workers) and self._problem is None else None

    def _listen(self, asked: set[int]) -> dict[int, Probed | None]:
        """Wait for the next replies; return the answers, and None for a worker that is gone."""
        found: dict[int, Probed | None] = {}
        for worker, reply in self._pool.wait(TICK_SECONDS):
            match reply:
                case None:
                    self._ready.discard(worker.number)
                    text = worker.describe_end()
                    self._display.show(Noted(text=text))
                    if worker.number in asked:
                        self._problem, found[worker.number] = text, None
                case Hello():
                    self._ready.add(worker.number)
                case Note():
                    self._display.show(Noted(text=reply.text))
                case Probed():
                    found[worker.number] = reply
        return found

    def _fit_workers(self, slots: Sequence[Slot]) -> None:
        """End the workers that have no slot, and start those that are missing."""
        wanted = Counter(slot.device for slot in slots)
        for worker in sorted(self._pool.workers.values(), key=lambda worker: worker.number):
            device = worker.slot.device if worker.slot else ""
            wanted[device] -= 1
            if wanted[device] < 0:
                self._pool.stop(worker)
                self._ready.discard(worker.number)
        for slot in slots:
            wanted[slot.device] -= 1
            if wanted[slot.device] >= 0:
                start_worker(self._pool, self._spec, slot)


def find_typical(spec: StudySpec, group_counts: Mapping[str, int], n_params: Mapping[str, int]) -> TrialParams:
    """Return the recipe that stands for a study's trials: trial 0's, with the backbone in the middle by size.

    Args:
        spec: The checked study file.
        group_counts: Layer groups of each backbone.
        n_params: Weights of each backbone.
    """
    names = sorted(spec.backbone_names(), key=lambda name: n_params[name])
    return _resolve(spec, group_counts, names[(len(names) - 1) // 2])


def list_largest(spec: StudySpec, group_counts: Mapping[str, int]) -> list[TrialParams]:
    """Return the recipe of each backbone that takes the most memory."""
    wishes = {"batch_size": _LARGEST, "unfrozen_layers": _LARGEST}
    return [_resolve(spec, group_counts, name, **wishes) for name in spec.backbone_names()]


def _resolve(spec: StudySpec, group_counts: Mapping[str, int], backbone: str, **wanted: int) -> TrialParams:
    distributions = make_distributions(spec, group_counts)
    point = project_default_recipe(spec, distributions)
    wishes = {"backbone": backbone, **wanted}
    point |= {name: project_value(wish, distributions[name]) for name, wish in wishes.items() if name in distributions}
    return resolve_params(spec, point, group_counts, seed=spec.study.seed)
