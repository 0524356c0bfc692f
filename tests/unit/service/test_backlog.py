"""Which trials train together."""

import math
from dataclasses import replace

from tests.unit.service.test_wire import PARAMS
from tuner.service.backlog import Backlog, Batch
from tuner.trial import Repeat, TrialParams

HEAD = replace(PARAMS, unfrozen_layers=1, augmentation_strength=0.0)


def take_numbers(backlog: Backlog, max_cohort: int = 8) -> list[int]:
    """Return the numbers of the next batch."""
    batch = backlog.take(max_cohort)
    return [] if batch is None else [number for number, _ in batch.members]


def make_backlog(*recipes: TrialParams, max_ahead: int = 8, n_kinds: float = math.inf) -> Backlog:
    """Return a backlog of trials that are numbered from 0."""
    backlog = Backlog(max_ahead, n_kinds)
    for number, params in enumerate(recipes):
        backlog.add(number, params)
    return backlog


def test_backlog_gives_heads_that_share_their_features_as_one_cohort() -> None:
    """Own learning rate, decay, momentum, smoothing, dropout, schedule and seed do not part a cohort."""
    other = replace(HEAD, lr=1.0, weight_decay=0.5, momentum=0.0, label_smoothing=0.0, dropout=0.0, seed=3)
    backlog = make_backlog(HEAD, other, replace(HEAD, warmup_fraction=0.5))
    assert backlog.take(8) == Batch(
        members=((0, HEAD), (1, other), (2, replace(HEAD, warmup_fraction=0.5))), uses_features=True
    )
    assert backlog.take(8) is None


def test_backlog_parts_heads_that_differ_in_what_a_cohort_shares() -> None:
    """Backbone, batch size, strength, views and optimizer are one for all."""
    different = (
        replace(HEAD, backbone="test_vit"),
        replace(HEAD, batch_size=8),
        replace(HEAD, augmentation_strength=0.5, views=2),
        replace(HEAD, views=2),
        replace(HEAD, optimizer="adam"),
    )
    backlog = make_backlog(HEAD, *different, HEAD)
    assert [take_numbers(backlog) for _ in range(6)] == [[0, 6], [1], [2], [3], [4], [5]]


def test_backlog_gives_no_larger_cohort_than_allowed() -> None:
    """What does not fit waits for the next worker."""
    backlog = make_backlog(*[HEAD] * 5)
    assert [take_numbers(backlog, 2) for _ in range(4)] == [[0, 1], [2, 3], [4], []]


def test_backlog_gives_a_trial_that_cannot_use_features_alone_and_after_the_heads() -> None:
    """Deeper trials, and fresh augmentation, need the images."""
    deeper = replace(HEAD, unfrozen_layers=2)
    fresh = replace(HEAD, augmentation_strength=0.5, views="fresh")
    backlog = make_backlog(deeper, HEAD, fresh)
    assert take_numbers(backlog) == [1]
    assert backlog.take(8) == Batch(members=((0, deeper),), uses_features=False)
    assert backlog.take(8) == Batch(members=((2, fresh),), uses_features=False)


def test_backlog_is_sated_by_one_deeper_trial_or_by_enough_heads() -> None:
    """Asking further ahead would only make proposals older."""
    assert not make_backlog(HEAD, HEAD, max_ahead=3).is_sated()
    assert make_backlog(HEAD, HEAD, HEAD, max_ahead=3).is_sated()
    assert make_backlog(HEAD, replace(HEAD, unfrozen_layers=2)).is_sated()
    assert not make_backlog(HEAD, replace(HEAD, unfrozen_layers=2)).is_sated(2)


def test_backlog_trains_what_is_given_back_one_by_one_on_images() -> None:
    """Once for these trials, or for every trial of the backbone."""
    backlog = make_backlog(HEAD, HEAD, replace(HEAD, backbone="test_vit"))
    batch = backlog.take(1)
    assert batch is not None
    backlog.give_back(batch.members, uncached_backbone=HEAD.backbone)
    backlog.add(3, HEAD)
    assert len(backlog) == 4
    assert [take_numbers(backlog) for _ in range(4)] == [[2], [0], [1], [3]]
    backlog.give_back(((4, replace(HEAD, backbone="test_vit")),), uncached_backbone=None)
    backlog.add(5, replace(HEAD, backbone="test_vit"))
    assert [take_numbers(backlog) for _ in range(2)] == [[5], [4]]


DEEP = replace(PARAMS, unfrozen_layers=2, augmentation_strength=0.0)
DEEPER = replace(DEEP, unfrozen_layers=3)
FRESH = replace(DEEP, augmentation_strength=0.5, views="fresh")


def test_backlog_gives_trials_with_kept_maps_first() -> None:
    """Among those that were asked; then the others in the order in which they were."""
    backlog = make_backlog(DEEP, FRESH, DEEPER, replace(DEEPER, lr=1.0))
    backlog.mark_warm(replace(DEEPER, batch_size=8))
    assert [take_numbers(backlog) for _ in range(4)] == [[2], [3], [0], [1]]


def test_backlog_gives_trials_last_whose_maps_another_worker_computes() -> None:
    """Two workers would wait for one; but rather that than nothing, and what is kept is no reason to wait."""
    backlog = make_backlog(DEEP, FRESH, DEEPER)
    assert [batch.members[0][0] for _ in range(2) if (batch := backlog.take(8, [DEEP]))] == [1, 2]
    batch = backlog.take(8, [DEEP])
    assert batch is not None
    assert batch.members[0][0] == 0
    backlog.add(4, DEEP)
    backlog.add(5, DEEPER)
    backlog.mark_warm(DEEP)
    assert take_numbers(backlog) == [4]


def test_backlog_expects_what_comes_to_be_like_what_was_asked() -> None:
    """Those that wait, and of those to come the share that was asked besides; none for repeats and new images."""
    backlog = make_backlog(DEEP, DEEP, DEEPER, FRESH, n_kinds=4)
    first = backlog.take(8, n_left=10)
    assert first is not None
    assert first.n_sharing == 1 + 10 * (2 / 7)
    shares = [batch.n_sharing for _ in range(3) if (batch := backlog.take(8, n_left=10))]
    assert shares == [10 * (2 / 7), 10 * (1 / 7), 0.0]
    backlog.add(4, DEEP, repeats=(Repeat(seed=1),))
    repeated = backlog.take(8, n_left=10)
    assert repeated is not None
    assert repeated.n_sharing == 0.0


def test_backlog_expects_nothing_alike_of_a_continuous_strength() -> None:
    """But for what waits already, as another attempt at the same trial does."""
    backlog = make_backlog(DEEP, DEEP)
    shares = [batch.n_sharing for _ in range(2) if (batch := backlog.take(8, n_left=10))]
    assert shares == [1.0, 0.0]
