"""Trials that were asked and wait for a worker: heads that can be trained together, and the others."""

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


class Backlog:
    """Sorts what the sampler proposed; it never asks for anything in particular, which would mislead the sampler."""

    def __init__(self, max_ahead: int) -> None:
        self._max_ahead = max_ahead
        self._heads: dict[int, TrialParams] = {}  # in the order in which they were asked
        self._others: dict[int, TrialParams] = {}
        self._repeats: dict[int, tuple[Repeat, ...]] = {}
        self._uncached: set[str] = set()

    def __len__(self) -> int:
        return len(self._heads) + len(self._others)

    @property
    def is_sated(self) -> bool:
        """Whether asking further ahead would only make the sampler's knowledge older."""
        return bool(self._others) or len(self._heads) >= self._max_ahead

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
        (self._heads if may_use_features else self._others)[number] = params

    def take(self, max_cohort: int, busy_backbones: Collection[str] = ()) -> Batch | None:
        """Return what is trained next: heads first, since they take seconds and the sampler learns from them.

        Args:
            max_cohort: Most trials of a cohort.
            busy_backbones: Whose heads other workers train now; others go first, since two workers would wait for
                one to compute the features that both need.
        """
        if self._heads:
            free = (params for params in self._heads.values() if params.backbone not in busy_backbones)
            key = _share(next(free, next(iter(self._heads.values()))))
            numbers = [number for number, params in self._heads.items() if _share(params) == key][:max_cohort]
            return Batch(members=tuple((number, self._heads.pop(number)) for number in numbers), uses_features=True)
        if self._others:
            number = next(iter(self._others))
            members = ((number, self._others.pop(number)),)
            return Batch(members=members, uses_features=False, repeats=self._repeats.pop(number, ()))
        return None

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
