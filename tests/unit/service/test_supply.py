"""What workers get next, from a real book: exact counts, the screen first, suspects alone."""

import math
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.search.builders import make_epoch, make_facts, make_spec, make_storage
from tuner.search.studies import open_study
from tuner.search.trial_book import TrialBook
from tuner.service.backlog import Batch
from tuner.service.supply import Supply
from tuner.trial import Reason, TrialOutcome, TrialParams, TrialState

BACKBONES = ("test_resnet", "test_vit")
SPACE: dict[str, Any] = {
    "backbone": {"choices": list(BACKBONES)},
    "lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "unfrozen_layers": {"choices": [1, 2]},
}
LOST = TrialOutcome(state=TrialState.FAIL, reason=Reason.WORKER_LOST)


def open_supply(
    folder: Path, *, n_trials: int = 8, screen: int = 0, deadline: float = math.inf, **sections: Any
) -> tuple[Supply, TrialBook]:
    """Return the supply of a new study, and its book."""
    search = {"sampler": "random", "n_trials": n_trials, "screen": screen}
    spec = make_spec(SPACE, search=search, training={"epochs": 1}, **sections)
    facts = make_facts(group_counts=dict.fromkeys(BACKBONES, 4))
    book = TrialBook(open_study(make_storage(folder), spec, facts))
    book.prepare()
    return Supply(book, n_trials=n_trials, deadline=deadline), book


def take(supply: Supply, *busy: TrialParams) -> Batch:
    """Return what a worker gets; there must be something."""
    batch = supply.take(busy)
    assert batch is not None
    return batch


def complete(book: TrialBook, batch: Batch) -> None:
    """Complete all trials of a batch."""
    for number, _ in batch.members:
        book.report(number, make_epoch(1, 0.5))
        book.tell(number, TrialOutcome(state=TrialState.COMPLETE))


def test_supply_gives_exactly_the_wanted_trials(tmp_path: Path) -> None:
    """However far it asks ahead; then it is dry."""
    supply, book = open_supply(tmp_path, n_trials=7)
    n_given = 0
    while (batch := supply.take(())) is not None:
        n_given += len(batch.members)
    assert (n_given, supply.n_missing, supply.is_dry) == (7, 7, True)
    for number in book.running_numbers[:6]:
        complete(book, Batch(members=((number, None),), uses_features=False))  # type: ignore[arg-type]
    book.tell(book.running_numbers[0], LOST)
    assert (supply.n_missing, supply.is_dry) == (1, False)
    complete(book, take(supply))
    assert (supply.n_missing, supply.is_dry) == (0, True)


def test_supply_gives_nothing_after_the_deadline(tmp_path: Path) -> None:
    """What was asked ahead waits for the next run."""
    supply, _ = open_supply(tmp_path, deadline=time.monotonic() - 1)
    assert supply.take(()) is None
    assert (supply.is_late, supply.is_dry) == (True, True)


def test_supply_gives_the_screen_in_cohorts_and_nothing_new_until_it_ends(tmp_path: Path) -> None:
    """Then come what it proposes, and what the sampler does."""
    supply, book = open_supply(tmp_path, n_trials=4, screen=3)
    first = take(supply)
    second = take(supply, first.members[0][1])
    assert [len(first.members), len(second.members)] == [3, 3]
    assert {batch.members[0][1].backbone for batch in (first, second)} == set(BACKBONES)
    complete(book, first)
    assert supply.take(()) is None
    assert not supply.is_dry
    complete(book, second)
    assert (book.count_finished(), supply.n_missing) == (0, 4)
    after = take(supply)
    assert after.members[0][1].unfrozen_layers == 2
    assert not after.uses_features


def test_supply_never_exceeds_n_trials_when_a_screen_trial_is_lost(tmp_path: Path) -> None:
    """Its retry stands behind the user's points, which count."""
    points = [{"lr": lr, "backbone": "test_vit", "unfrozen_layers": 2} for lr in (1e-3, 2e-3, 3e-3)]
    supply, book = open_supply(tmp_path, n_trials=1, screen=1, enqueue=points)
    screened = [take(supply), take(supply)]
    complete(book, screened[0])
    book.tell(screened[1].members[0][0], LOST)
    while supply.take(()) is not None:
        pass
    assert book.count_running() == 1


def test_supply_gives_a_trial_that_was_lost_with_its_cohort_alone(tmp_path: Path) -> None:
    """What killed the worker may be one of them; it must not kill the others again."""
    supply, book = open_supply(tmp_path, n_trials=4, screen=3)
    cohort = take(supply)
    for number, _ in cohort.members:
        book.tell(number, LOST)
    complete(book, take(supply))
    retries = [take(supply) for _ in cohort.members]
    assert [(len(batch.members), batch.uses_features) for batch in retries] == [(1, False)] * 3


@pytest.mark.parametrize(("is_lasting", "n_given_back"), [(True, 1), (False, 2)])
def test_supply_trains_heads_on_images_once_their_backbone_cannot(
    tmp_path: Path, is_lasting: bool, n_given_back: int
) -> None:
    """At once if that is known to last, else after the second cohort."""
    supply, book = open_supply(tmp_path, n_trials=40, screen=1)
    backbone = ""
    for _ in range(n_given_back):
        while not (batch := take(supply)).uses_features or (backbone and batch.members[0][1].backbone != backbone):
            complete(book, batch)
        backbone = batch.members[0][1].backbone
        supply.take_back(batch.members, is_lasting=is_lasting)
    for _ in range(20):
        batch = take(supply)
        assert not (batch.uses_features and batch.members[0][1].backbone == backbone)
        complete(book, batch)


def test_supply_lets_idle_workers_choose_among_what_they_would_be_given_anyway(tmp_path: Path) -> None:
    """Two idle workers: two trials are asked, and the one whose maps are kept goes first, whatever the order."""
    space = SPACE | {"unfrozen_layers": {"choices": [2, 3]}, "backbone": {"choices": ["test_resnet", "test_vit"]}}
    asked = [ask_alone(tmp_path / name, space, n_idle=1) for name in ("a", "b")]
    first, second = asked[0]
    assert asked[1] == [first, second]  # what the sampler proposes
    assert ask_alone(tmp_path / "c", space, n_idle=2) == [first, second]
    assert ask_alone(tmp_path / "d", space, n_idle=2, warm=second) == [second, first]


def ask_alone(
    folder: Path, space: dict[str, Any], *, n_idle: int, warm: TrialParams | None = None
) -> list[TrialParams]:
    """Return the recipes that two idle workers of a new study get, one after the other."""
    folder.mkdir()
    spec = make_spec(space, search={"sampler": "random", "n_trials": 8}, training={"epochs": 1, "views": 2})
    book = TrialBook(open_study(make_storage(folder), spec, make_facts(group_counts=dict.fromkeys(BACKBONES, 4))))
    book.prepare()
    supply = Supply(book, n_trials=8, deadline=math.inf, n_kinds=4)
    if warm is not None:
        supply.mark_warm(warm)
    batches = [supply.take((), n_idle), supply.take((), 1)]
    assert all(batch is not None and batch.n_sharing > 0 for batch in batches)
    return [batch.members[0][1] for batch in batches if batch is not None]
