"""Which head a deeper trial of a real book starts from, over retries and resumes."""

from pathlib import Path
from typing import Any

import pytest

from tuner.search.studies import StoredStudy
from tuner.search.trial_attrs import PARAMS_ATTR, SCREEN_ATTR
from tuner.search.trial_book import TrialBook
from tuner.trial import HeadStart, Reason, TrialOutcome, TrialParams, TrialState

from .builders import COMPLETE, PRUNED, SPACE, make_epoch, make_spec, open_small

LOST = TrialOutcome(state=TrialState.FAIL, reason=Reason.WORKER_LOST, message="killed by signal 9")


def open_screened(
    folder: Path, *, screen: int = 3, head_start: str = "screen", **sections: Any
) -> tuple[TrialBook, StoredStudy]:
    """Open a study of two backbones with a screen, as a new run does."""
    search, training = {"screen": screen, "sampler": "tpe"}, {"head_start": head_start}
    spec = make_spec({**SPACE, "dropout": {"low": 0.0, "high": 0.5}}, search=search, training=training, **sections)
    stored = open_small(folder, spec)
    book = TrialBook(stored)
    book.prepare()
    return book, stored


def ask(book: TrialBook) -> tuple[int, TrialParams]:
    """Ask for a trial that is there."""
    asked = book.ask()
    assert asked is not None
    return asked


def run_screen(book: TrialBook, stored: StoredStudy, *, broken: tuple[str, ...] = ()) -> dict[str, TrialParams]:
    """Train the heads, the better the nearer their dropout is to 0.3; return the best of all of each backbone."""
    while book.queue.has_screen:
        number, params = ask(book)
        value = 0.9 - abs(params.dropout - 0.3)
        for epoch in (1, 2, 3):
            book.report(number, make_epoch(epoch, value))
        book.tell(number, PRUNED if params.backbone in broken else COMPLETE)
    book.flush()
    trials = [each for each in stored.study.trials if SCREEN_ATTR in each.user_attrs and each.value is not None]
    trials.sort(key=lambda each: -abs(each.params["dropout"] - 0.3))  # the best last
    return {each.params["backbone"]: TrialParams.from_json(each.user_attrs[PARAMS_ATTR]) for each in trials}


def ask_deeper(book: TrialBook, n_trials: int = 12) -> list[TrialParams]:
    """Ask for trials, and tell them PRUNED."""
    found = []
    for _ in range(n_trials):
        number, params = ask(book)
        book.tell(number, PRUNED)
        found.append(params)
    book.flush()
    return found


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_deeper_trials_start_from_their_backbones_best_head(tmp_path: Path, objective: str) -> None:
    """The recipe of the best screen trial by the objective, its seed included; heads alone start from no other head."""
    book, stored = open_screened(tmp_path, study={"objective": objective})
    best = run_screen(book, stored)
    asked = ask_deeper(book)
    deeper = [params for params in asked if params.unfrozen_layers > 1]
    assert {params.backbone for params in deeper} == set(best)
    for params in deeper:
        assert params.head_start == HeadStart.take_from(best[params.backbone])
        assert params.head_recipe == best[params.backbone]
        assert params.head_start.seed != params.seed
    assert all(params.head_start is None for params in asked if params.unfrozen_layers == 1)
    trial = stored.study.trials[-1]
    assert TrialParams.from_json(trial.user_attrs[PARAMS_ATTR]) == asked[-1]


def test_trials_start_as_before_unless_a_head_start_is_asked_for(tmp_path: Path) -> None:
    """The same recipes as a study whose file knows no such key."""
    book, stored = open_screened(tmp_path, head_start="none")
    run_screen(book, stored)
    assert all(params.head_start is None for params in ask_deeper(book))


def test_backbone_without_a_finished_head_starts_without(tmp_path: Path) -> None:
    """Its screen failed, but the search may try it all the same."""
    book, stored = open_screened(tmp_path)
    run_screen(book, stored, broken=("test_vit",))
    stored.study.enqueue_trial({"backbone": "test_vit", "unfrozen_layers": 3})
    deeper = [params for params in ask_deeper(book) if params.unfrozen_layers > 1]
    assert {(params.backbone, params.head_start is not None) for params in deeper} == {
        ("test_resnet", True),
        ("test_vit", False),
    }


def test_trials_that_were_asked_during_the_screen_start_without(tmp_path: Path) -> None:
    """A point of the user's that waits behind the screen knows nothing of heads that still train."""
    book, stored = open_screened(tmp_path, enqueue=[{"backbone": "test_resnet", "unfrozen_layers": 3}])
    running = []
    while book.queue.next_is_screen:
        running.append(ask(book)[0])
    for head in running[:2]:  # one of each backbone
        book.report(head, make_epoch(1, 0.1))
        book.tell(head, COMPLETE)
    number, params = ask(book)
    assert params.unfrozen_layers > 1
    assert params.head_start is None
    for head in running[2:]:
        book.report(head, make_epoch(1, 0.5))
        book.tell(head, COMPLETE)
    book.tell(number, LOST)
    asked = ask_deeper(book)
    assert [each.head_start for each in asked if each.seed == stored_seed(stored, number)] == [None]
    bad = {stored_seed(stored, head) for head in running[:2]}
    later = [each.head_start for each in asked if each.unfrozen_layers > 1 and each.seed != stored_seed(stored, number)]
    assert later
    assert all(head is not None and head.seed not in bad for head in later)


def stored_seed(stored: StoredStudy, number: int) -> int:
    """Return the seed of a stored trial."""
    return int(stored.study.trials[number].user_attrs[PARAMS_ATTR]["seed"])


def test_retried_trial_starts_from_the_head_of_its_first_attempt(tmp_path: Path) -> None:
    """Also in a later run whose larger screen has found a better one: seed and checkpoint are of the first as well."""
    book, stored = open_screened(tmp_path, screen=1)
    first_best = run_screen(book, stored)
    number, lost = ask(book)
    while lost.unfrozen_layers == 1:
        book.tell(number, PRUNED)
        number, lost = ask(book)
    book.flush()  # and killed
    again, stored = open_screened(tmp_path, screen=8)
    best = run_screen(again, stored)
    stored.study.enqueue_trial({"backbone": lost.backbone, "unfrozen_layers": 3})
    new = [params for params in ask_deeper(again, 6) if params.backbone == lost.backbone]
    (retried,) = [trial for trial in stored.study.trials if trial.user_attrs.get("retry_of") == number]
    assert TrialParams.from_json(retried.user_attrs[PARAMS_ATTR]) == lost
    assert lost.head_recipe == first_best[lost.backbone]
    assert best[lost.backbone] != first_best[lost.backbone]  # the larger screen found another
    assert {params.head_recipe for params in new if params.unfrozen_layers > 1} == {best[lost.backbone]}


def test_screen_trials_start_from_no_other_head(tmp_path: Path) -> None:
    """They are what others start from."""
    book, stored = open_screened(tmp_path)
    run_screen(book, stored)
    heads = [trial for trial in stored.study.trials if SCREEN_ATTR in trial.user_attrs]
    assert len(heads) == 6
    assert all("head_start" not in trial.user_attrs[PARAMS_ATTR] for trial in heads)
