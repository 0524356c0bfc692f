"""Trials that were asked and wait for a worker: heads that can be trained together, and the others."""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from tuner.trial import Repeat, TrialParams

_HEAD_ALONE = 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one worker gets next."""

    members: tuple[tuple[int, TrialParams], ...]
    """Number and recipe of each trial; more than one is a cohort."""
    uses_features: bool
    repeats: tuple[Repeat, ...] = ()
    """Trainings of a trial that is trained more than once, or elsewhere than on the study's train; it is alone."""
    n_sharing: float = 0.0
    """Further trials that are expected to need what the frozen layers of this one make of the images."""


_MapsKey = tuple[str, int, float, int | str]


class Backlog:
    """Sorts what the sampler proposed; it never asks for anything in particular, which would mislead the sampler."""

    def __init__(self, max_ahead: int, n_kinds: float = math.inf) -> None:
        """Take what bounds it.

        Args:
            max_ahead: Heads that wait at most.
            n_kinds: Of maps, that trials of the study may need; infinity: hardly two need the same.
        """
        self._max_ahead, self._n_kinds = max_ahead, n_kinds
        self._heads: dict[int, TrialParams] = {}  # in the order in which they were asked
        self._others: dict[int, TrialParams] = {}
        self._repeats: dict[int, tuple[Repeat, ...]] = {}
        self._uncached: set[str] = set()
        self._n_asked: Counter[_MapsKey | None] = Counter()  # of the others
        self._warm: set[_MapsKey] = set()

    def __len__(self) -> int:
        return len(self._heads) + len(self._others)

    def is_sated(self, n_idle: int = 1) -> bool:
        """Whether asking further ahead would only make the sampler's knowledge older.

        Args:
            n_idle: Workers that wait: as many trials would be asked for anyway before the next one ends.
        """
        return len(self._others) >= n_idle or len(self._heads) >= self._max_ahead

    def add(
        self, number: int, params: TrialParams, *, is_suspect: bool = False, repeats: tuple[Repeat, ...] = ()
    ) -> None:
        """Put an asked trial where it belongs.

        Args:
            number: Of the trial.
            params: Its recipe.
            is_suspect: It trains by itself, so that it can harm no other.
            repeats: Its trainings; on other cuts than the study's there are no features.
        """
        may_use_features = (
            params.unfrozen_layers == _HEAD_ALONE
            and params.shows_known_images
            and params.backbone not in self._uncached
            and not is_suspect
            and not repeats
        )
        if repeats:
            self._repeats[number] = repeats
        if not may_use_features:
            self._n_asked[None if repeats else _find_maps(params)] += 1
        (self._heads if may_use_features else self._others)[number] = params

    def take(self, max_cohort: int, busy: Collection[TrialParams] = (), *, n_left: int = 0) -> Batch | None:
        """Return what is trained next: heads first, since they take seconds and the sampler learns from them.

        Args:
            max_cohort: Most trials of a cohort.
            busy: What other workers train now. Trials that need other features or maps go first, since two workers
                would wait for one to compute what both need.
            n_left: Trials that are still to be asked for.
        """
        if self._heads:
            backbones = {params.backbone for params in busy}
            free = (params for params in self._heads.values() if params.backbone not in backbones)
            key = _share(next(free, next(iter(self._heads.values()))))
            numbers = [number for number, params in self._heads.items() if _share(params) == key][:max_cohort]
            return Batch(members=tuple((number, self._heads.pop(number)) for number in numbers), uses_features=True)
        if not self._others:
            return None
        wanted = {_find_maps(params) for params in busy} - self._warm
        number = min(self._others, key=lambda each: self._rank(each, wanted))  # the first asked among equals
        params, repeats = self._others.pop(number), self._repeats.pop(number, ())
        n_sharing = 0.0 if repeats else self._expect_sharing(params, n_left)
        return Batch(members=((number, params),), uses_features=False, repeats=repeats, n_sharing=n_sharing)

    def _rank(self, number: int, wanted: Collection[_MapsKey | None]) -> int:
        """Return 0 for a trial whose maps are kept, 2 if another worker computes them just now, 1 for all others."""
        key = None if number in self._repeats else _find_maps(self._others[number])
        if key in self._warm:
            return 0
        return 2 if key is not None and key in wanted else 1

    def _expect_sharing(self, params: TrialParams, n_left: int) -> float:
        """Return how many more trials will need a trial's maps, if what comes is like what was asked besides it.

        Each kind of maps counts as asked once beforehand (Laplace's rule), so that the first trials expect something.
        """
        if (key := _find_maps(params)) is None:
            return 0.0
        n_waiting = sum(_find_maps(other) == key for other in self._others.values())
        share = self._n_asked[key] / (self._n_asked.total() - 1 + self._n_kinds)
        return n_waiting + n_left * share

    def mark_warm(self, params: TrialParams) -> None:
        """Remember that what a trial's frozen layers make of the images is kept now."""
        if (key := _find_maps(params)) is not None:
            self._warm.add(key)

    def give_back(self, members: tuple[tuple[int, TrialParams], ...], *, uncached_backbone: str | None) -> None:
        """Take back trials that cannot use features: they train one by one.

        Args:
            members: Number and recipe of each.
            uncached_backbone: Of which no trial can; None if it holds for these trials alone.
        """
        self._others = dict(members) | self._others
        if uncached_backbone is not None:
            self._uncached.add(uncached_backbone)
            moved = {number: params for number, params in self._heads.items() if params.backbone == uncached_backbone}
            self._heads = {number: params for number, params in self._heads.items() if number not in moved}
            self._others |= moved


def _share(params: TrialParams) -> tuple[object, ...]:
    """Return what the trials of a cohort have in common; the rest each has for itself."""
    return (params.backbone, params.batch_size, params.augmentation_strength, params.views, params.optimizer)


def _find_maps(params: TrialParams) -> _MapsKey | None:
    """Return what the maps of a trial's frozen layers depend on; None if every epoch shows new images."""
    if not params.shows_known_images:
        return None
    return params.backbone, params.unfrozen_layers, params.augmentation_strength, params.views
