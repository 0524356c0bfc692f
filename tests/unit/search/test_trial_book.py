"""Tests of tuner.search.trial_book."""

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState as OptunaState
from optuna_dashboard._serializer import serialize_frozen_trial

from tuner.search.studies import StoredStudy
from tuner.search.trial_attrs import EPOCHS_ATTR, PARAMS_ATTR, REASON_ATTR, count_reasons
from tuner.search.trial_book import TrialBook
from tuner.trial import ClassReport, Reason, TrialOutcome, TrialParams, TrialState

from .builders import (
    GROUP_COUNTS,
    PRUNED,
    make_epoch,
    make_spec,
    open_small,
    read_plainly,
    run_trial,
)

LOST = TrialOutcome(state=TrialState.FAIL, reason=Reason.WORKER_LOST, message="killed by signal 9")
INTERRUPTED = TrialOutcome(state=TrialState.FAIL, reason=Reason.INTERRUPTED, message="the run was stopped")
OUT_OF_MEMORY = TrialOutcome(state=TrialState.PRUNED, reason=Reason.OUT_OF_MEMORY, message="CUDA out of memory")
GRID = {
    "backbone": {"choices": ["test_resnet", "test_vit"]},
    "dropout": {"low": 0.0, "high": 0.3, "step": 0.1},
}


def open_book(folder: Path, **sections: Any) -> tuple[TrialBook, StoredStudy]:
    """Open the small study as a new run does."""
    stored = open_small(folder, make_spec(**sections))
    return TrialBook(stored), stored


def ask(book: TrialBook) -> tuple[int, TrialParams]:
    """Ask for a trial that is there."""
    asked = book.ask()
    assert asked is not None
    return asked


def list_trials(stored: StoredStudy) -> list[optuna.trial.FrozenTrial]:
    """Return all trials of a study."""
    return stored.study.get_trials(deepcopy=False)


def count(stored: StoredStudy, state: OptunaState) -> int:
    """Return how many trials are in a state."""
    return sum(trial.state == state for trial in list_trials(stored))


# --- asking ---


def test_prepare_queues_the_default_recipe_first(tmp_path: Path) -> None:
    """Where the user queues nothing, trial 0 is a sane recipe; a resumed study gets no second one."""
    book, _ = open_book(tmp_path)
    assert book.prepare() == 0
    number, params = ask(book)
    assert (number, params.backbone, params.lr, params.unfrozen_layers) == (0, "test_resnet", 3e-4, 6)
    book.tell(number, PRUNED)
    book.flush()
    again, stored = open_book(tmp_path)
    assert again.prepare() == 0
    assert count(stored, OptunaState.WAITING) == 0


def test_prepare_queues_the_users_points(tmp_path: Path) -> None:
    """Entries of the study file come first, in order; what they leave open is sampled."""
    book, _ = open_book(tmp_path, enqueue=[{"lr": 0.05}, {"lr": 0.06, "backbone": "test_vit", "unfrozen_layers": 1}])
    book.prepare()
    assert ask(book)[1].lr == 0.05
    _, params = ask(book)
    assert (params.lr, params.backbone, params.unfrozen_layers) == (0.06, "test_vit", 1)
    assert ask(book)[1].lr not in {0.05, 0.06}


def test_prepare_queues_a_point_once(tmp_path: Path) -> None:
    """A run that starts again does not queue the same entries again, but takes a new one."""
    first = {"lr": 0.05, "backbone": "test_vit", "unfrozen_layers": 1}
    book, _ = open_book(tmp_path, enqueue=[first])
    book.prepare()
    run_trial(book)
    again, stored = open_book(tmp_path, enqueue=[first, {**first, "lr": 0.06}])
    again.prepare()
    assert count(stored, OptunaState.WAITING) == 1
    assert ask(again)[1].lr == 0.06


def test_ask_resolves_and_stores_the_recipe(tmp_path: Path) -> None:
    """Optuna keeps the level, our attributes the count of unfrozen layers and the whole recipe."""
    book, stored = open_book(tmp_path, enqueue=[{"backbone": "test_resnet", "unfrozen_layers": 2, "lr": 0.01}])
    book.prepare()
    number, params = ask(book)
    trial = list_trials(stored)[number]
    assert trial.params == {"backbone": "test_resnet", "unfrozen_layers": 2, "lr": 0.01}
    assert params.unfrozen_layers == trial.user_attrs["unfrozen_layers_resolved"] == 3
    assert TrialParams.from_json(trial.user_attrs[PARAMS_ATTR]) == params


def test_ask_seeds_each_trial_by_its_number(tmp_path: Path) -> None:
    """Seeds differ between trials and between study seeds, and a trial's own is always the same."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    seeds = []
    for folder, study_seed in (("a", 0), ("b", 0), ("b", 1)):
        book, _ = open_book(tmp_path / folder, study={"name": f"s{study_seed}", "seed": study_seed})
        seeds.append([ask(book)[1].seed for _ in range(3)])
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 6


# --- reporting and telling ---


def test_tell_completes_with_the_last_epochs_value(tmp_path: Path) -> None:
    """The value is the last epoch's; the best epoch is an attribute."""
    book, stored = open_book(tmp_path)
    number = run_trial(book, (0.2, 0.9, 0.6))
    trial = list_trials(stored)[number]
    assert (trial.state, trial.value) == (OptunaState.COMPLETE, 0.6)
    assert trial.intermediate_values == {1: 0.2, 2: 0.9, 3: 0.6}
    assert (trial.user_attrs["best_epoch"], trial.user_attrs["best_epoch_value"]) == (2, 0.9)
    assert book.running_numbers == ()


def test_tell_takes_the_lowest_loss_as_best_epoch(tmp_path: Path) -> None:
    """With val_loss the best epoch is the lowest."""
    book, stored = open_book(tmp_path, study={"objective": "val_loss"})
    number = run_trial(book, (0.2, 0.9, 0.6))
    trial = list_trials(stored)[number]
    assert trial.value == pytest.approx(0.4)
    assert trial.user_attrs["best_epoch"] == 2


def test_tell_stores_what_a_person_wants_to_see(tmp_path: Path) -> None:
    """Seconds, speed, every epoch's metrics and the class report are attributes."""
    book, stored = open_book(tmp_path)
    number, _ = ask(book)
    for epoch in (1, 2, 3):
        book.report(number, make_epoch(epoch, 0.1 * epoch))
    report = ClassReport(confusion_matrix=((3, 1), (0, 4)), precision=(1.0, 0.8), recall=(0.75, 1.0), f1=(0.86, 0.89))
    value = book.tell(number, TrialOutcome(state=TrialState.COMPLETE, report=report))
    attrs = list_trials(stored)[number].user_attrs
    assert value == pytest.approx(0.3)
    assert (attrs["seconds"], attrs["images_per_second"], attrs["feasible"]) == (1.5, 100.0, True)
    assert [epoch["val_macro_recall"] for epoch in attrs[EPOCHS_ATTR]] == pytest.approx([0.1, 0.2, 0.3])
    assert ClassReport.from_json(attrs["class_report"]) == report


def test_tell_keeps_reason_message_and_traceback(tmp_path: Path) -> None:
    """A failed trial can be understood from the storage alone."""
    book, stored = open_book(tmp_path)
    number, _ = ask(book)
    outcome = TrialOutcome(state=TrialState.FAIL, reason=Reason.ERROR, message="ValueError: x", traceback="Traceback …")
    assert book.tell(number, outcome) is None
    trial = list_trials(stored)[number]
    assert trial.state == OptunaState.FAIL
    assert trial.user_attrs[REASON_ATTR] == "error"
    assert trial.user_attrs["message"] == "ValueError: x"
    assert trial.user_attrs["traceback"] == "Traceback …"
    assert count(stored, OptunaState.WAITING) == 0
    assert count_reasons(stored.study) == {("FAIL", "error"): 1}


def test_report_never_prunes_after_the_last_epoch(tmp_path: Path) -> None:
    """A trial that has done all its epochs is complete, however bad."""
    book, _ = open_book(tmp_path, search={"pruner": "median"}, training={"epochs": 4})
    for _ in range(6):
        run_trial(book, (0.9, 0.9, 0.9, 0.9))
    number, _ = ask(book)
    assert [book.report(number, make_epoch(epoch, 0.1)) for epoch in (1, 2, 3, 4)] == [False, True, True, False]


def test_find_new_best_compares_with_the_objective(tmp_path: Path) -> None:
    """Accuracy goes up, loss goes down; of equals the earlier trial is the best, as ``best`` has it."""
    book, _ = open_book(tmp_path)
    assert book.best is None
    assert book.find_new_best({0: 0.0}) == 0
    first, _ = ask(book)
    best = run_trial(book, (0.1, 0.2, 0.5))
    assert book.best == (best, 0.5)
    assert [book.find_new_best({best + 1: value}) for value in (0.5, 0.51)] == [None, best + 1]
    assert book.find_new_best({best + 2: 0.6, best + 1: 0.6, best + 3: 0.1}) == best + 1
    assert book.find_new_best({first: 0.5}) == first
    for epoch, value in enumerate((0.1, 0.2, 0.5), start=1):
        book.report(first, make_epoch(epoch, value))
    book.tell(first, TrialOutcome(state=TrialState.COMPLETE))
    assert book.best == (first, 0.5)
    minimising, _ = open_book(tmp_path, study={"name": "loss", "objective": "val_loss"})
    best = run_trial(minimising, (0.1, 0.2, 0.5))
    assert [minimising.find_new_best({best + 1: value}) for value in (0.5, 0.49)] == [None, best + 1]


# --- the exact count ---


def test_count_finished_counts_complete_and_pruned_only(tmp_path: Path) -> None:
    """FAIL, RUNNING and WAITING do not count."""
    book, stored = open_book(tmp_path)
    run_trial(book)
    for outcome in (PRUNED, OUT_OF_MEMORY, INTERRUPTED, TrialOutcome(state=TrialState.FAIL, reason=Reason.ERROR)):
        book.tell(ask(book)[0], outcome)
    ask(book)
    assert book.count_finished() == 3
    assert [count(stored, state) for state in OptunaState] == [1, 1, 2, 2, 0]


@pytest.mark.parametrize("outcome", [LOST, INTERRUPTED])
def test_tell_queues_a_lost_trial_again(tmp_path: Path, outcome: TrialOutcome) -> None:
    """Its point comes next, under a new number, with a mark of where it comes from."""
    book, stored = open_book(tmp_path)
    number, params = ask(book)
    book.tell(number, outcome)
    again, same = ask(book)
    assert again == number + 1
    assert same == params
    assert list_trials(stored)[again].user_attrs["retry_of"] == number


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason.may_pass])
def test_tell_queues_a_lost_trial_twice(tmp_path: Path, reason: Reason) -> None:
    """A point that costs three workers is not tried a fourth time."""
    book, stored = open_book(tmp_path)
    for _ in range(3):
        book.tell(ask(book)[0], TrialOutcome(state=TrialState.FAIL, reason=reason))
    lost = list_trials(stored)
    assert len({trial.params["lr"] for trial in lost}) == 1
    assert count(stored, OptunaState.WAITING) == 0
    assert ask(book)[1].lr != lost[0].params["lr"]


def test_tell_queues_an_interrupted_trial_every_time(tmp_path: Path) -> None:
    """Ctrl-C says nothing about a point."""
    book, stored = open_book(tmp_path)
    for _ in range(3):
        book.tell(ask(book)[0], INTERRUPTED)
    assert count(stored, OptunaState.WAITING) == 1
    assert len({trial.params["lr"] for trial in list_trials(stored)[:3]}) == 1


def test_tell_remembers_a_lost_worker_over_an_interruption(tmp_path: Path) -> None:
    """Lost, queued, interrupted, queued, lost twice more: that is three times."""
    book, stored = open_book(tmp_path)
    for outcome in (LOST, INTERRUPTED, LOST, LOST):
        book.tell(ask(book)[0], outcome)
    assert count(stored, OptunaState.WAITING) == 0


def test_retries_are_the_trial_that_was_lost(tmp_path: Path) -> None:
    """Through kills and stops it keeps its recipe, seed included, and the number that its checkpoint is named by."""
    book, _ = open_book(tmp_path)
    run_trial(book)
    first, params = ask(book)
    book.tell(first, LOST)
    second, again = ask(book)
    book.flush()
    resumed, _ = open_book(tmp_path)
    resumed.prepare()
    third, once_more = ask(resumed)
    assert (first, second, third) == (1, 2, 3)
    assert params == again == once_more
    assert [book.origin(number) for number in (0, first, second)] == [0, first, first]
    assert resumed.origin(third) == first


def test_open_origins_are_those_that_may_go_on(tmp_path: Path) -> None:
    """What runs or waits to go on; not what has ended for good, nor what waits to be started."""
    book, _ = open_book(tmp_path)
    book.prepare()
    assert book.open_origins == frozenset()
    run_trial(book)
    assert book.open_origins == frozenset()
    lost, other = ask(book)[0], ask(book)[0]
    assert book.open_origins == {lost, other}
    book.tell(lost, INTERRUPTED)
    book.tell(other, PRUNED)
    assert book.open_origins == {lost}
    again, _ = ask(book)
    assert book.open_origins == {lost}
    book.tell(again, TrialOutcome(state=TrialState.FAIL, reason=Reason.ERROR))
    assert book.open_origins == frozenset()


# --- what a killed run leaves ---


def test_prepare_adopts_running_trials(tmp_path: Path) -> None:
    """After a crash each running trial is told once as interrupted and queued once, and none is left running."""
    book, _ = open_book(tmp_path)
    run_trial(book)
    killed = [ask(book) for _ in range(2)]
    book.report(killed[0][0], make_epoch(1, 0.4))
    book.flush()
    resumed, stored = open_book(tmp_path)
    assert resumed.prepare() == 2
    states = [trial.state.name for trial in list_trials(stored)]
    assert states == ["COMPLETE", "FAIL", "FAIL", "WAITING", "WAITING"]
    assert count_reasons(stored.study) == {("FAIL", "interrupted"): 2}
    assert [ask(resumed)[1].lr for _ in range(2)] == [params.lr for _, params in killed]
    assert resumed.count_finished() == 1


def test_prepare_adopts_only_once(tmp_path: Path) -> None:
    """A start that is killed itself adds nothing: the next one finds nothing left running."""
    book, _ = open_book(tmp_path)
    ask(book)
    book.flush()
    for expected in (1, 0, 0):
        resumed, stored = open_book(tmp_path)
        assert resumed.prepare() == expected
    assert count(stored, OptunaState.WAITING) == 1
    assert count(stored, OptunaState.FAIL) == 1


def test_prepare_stores_what_it_adopted(tmp_path: Path) -> None:
    """A start that is killed at once leaves nothing half done: each trial is both ended and queued, once."""
    book, _ = open_book(tmp_path)
    lost, _ = ask(book)
    book.flush()
    open_book(tmp_path)[0].prepare()
    trials = read_plainly(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "WAITING"]
    assert trials[1].user_attrs["retry_of"] == lost


# --- what reaches the file ---


def test_flush_stores_what_happened(tmp_path: Path) -> None:
    """Before it the file knows nothing of a trial, after it everything."""
    book, stored = open_book(tmp_path)
    book.prepare()
    number, _ = ask(book)
    book.report(number, make_epoch(1, 0.4))
    assert [trial.state.name for trial in read_plainly(tmp_path).trials] == ["WAITING"]
    book.flush()
    (trial,) = read_plainly(tmp_path).trials
    assert (trial.state.name, trial.intermediate_values) == ("RUNNING", {1: 0.4})
    assert trial.user_attrs == list_trials(stored)[number].user_attrs


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_kill_before_a_flush_keeps_the_queue(tmp_path: Path, sampler: str) -> None:
    """A point that was taken from the queue is in it until the trial that it became is stored with its params."""
    point = {"backbone": "test_vit", "dropout": 0.2}
    book, stored = open_book(tmp_path, space=GRID, search={"sampler": sampler})
    stored.study.enqueue_trial(point)
    book.flush()
    ask(book)
    resumed, again = open_book(tmp_path, space=GRID, search={"sampler": sampler})
    assert resumed.prepare() == 0
    number, _ = ask(resumed)
    assert (number, list_trials(again)[number].params) == (0, point)


def test_tell_reaches_the_file_as_a_whole(tmp_path: Path) -> None:
    """The end of a trial, its attributes and its place in the queue reach the file together or not at all."""
    book, _ = open_book(tmp_path)
    number, _ = ask(book)
    book.flush()
    book.tell(number, LOST)
    (before,) = read_plainly(tmp_path).trials
    assert (before.state.name, before.user_attrs.get(REASON_ATTR)) == ("RUNNING", None)
    book.flush()
    ended, queued = read_plainly(tmp_path).trials
    assert (ended.state.name, ended.user_attrs[REASON_ATTR]) == ("FAIL", "worker_lost")
    history = {"first_attempt": number, "retry_of": number, "attempt": 1}
    assert (queued.state.name, queued.user_attrs) == ("WAITING", history)


def test_trial_book_refuses_a_study_that_is_only_read(tmp_path: Path) -> None:
    """What such a book wrote would reach the file trial by trial."""
    stored = open_small(tmp_path)
    with pytest.raises(ValueError, match="needs a study that was opened to run, got one that is only read"):
        TrialBook(dataclasses.replace(stored, mirror=None))


# --- infeasible points ---


def test_infeasible_trials_are_told_pruned_and_marked(tmp_path: Path) -> None:
    """Plain Optuna reads the mark as a violated constraint."""
    book, _ = open_book(tmp_path)
    run_trial(book, (0.1, 0.2, 0.3))
    number, _ = ask(book)
    book.report(number, make_epoch(1, 0.99))
    book.tell(number, OUT_OF_MEMORY)
    book.flush()
    study = read_plainly(tmp_path)
    trial = study.trials[number]
    assert trial.state == OptunaState.PRUNED
    assert list(trial.constraints.values()) == [1.0]
    assert trial.user_attrs["feasible"] is False
    assert trial.user_attrs[REASON_ATTR] == "out_of_memory"
    assert study.best_trial.number == 0


def test_infeasible_trials_show_in_the_dashboard(tmp_path: Path) -> None:
    """The mark is in the form that optuna-dashboard 0.21 reads; Optuna's own set_constraint is not."""
    book, _ = open_book(tmp_path)
    run_trial(book)
    book.tell(ask(book)[0], OUT_OF_MEMORY)
    book.flush()
    feasible, infeasible = (serialize_frozen_trial(1, trial, {}) for trial in read_plainly(tmp_path).trials)
    assert infeasible["constraints"] == [1.0]
    assert feasible["constraints"] == []


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_samplers_go_on_after_infeasible_trials(tmp_path: Path, sampler: str) -> None:
    """The mark gives no sampler an error or a warning."""
    book, _ = open_book(tmp_path, search={"sampler": sampler})
    for _ in range(12):
        run_trial(book)
        book.tell(ask(book)[0], OUT_OF_MEMORY)
    assert book.count_finished() == 24


def test_constraints_key_is_optuna_5s() -> None:
    """The contract behind the mark: revisit it when the pinned major version changes."""
    assert optuna.__version__.split(".")[0] == "5"


# --- grid ---


def open_grid(folder: Path, **search: Any) -> tuple[TrialBook, StoredStudy]:
    """Open a grid of 2 * 4 points."""
    return open_book(folder, space=GRID, search={"sampler": "grid", **search})


def list_points(stored: StoredStudy) -> list[tuple[Any, ...]]:
    """Return the points of all trials that were asked, rounded."""
    return [
        (trial.params["backbone"], round(trial.params["dropout"], 9))
        for trial in list_trials(stored)
        if trial.state != OptunaState.WAITING
    ]


def test_grid_asks_each_point_once(tmp_path: Path) -> None:
    """Every point comes once and then nothing; the size of the grid is known before."""
    book, stored = open_grid(tmp_path, n_trials=100)
    assert book.prepare() == 0
    assert book.queue.max_trials == 8
    for _ in range(8):
        assert not book.queue.is_exhausted
        run_trial(book)
    assert book.ask() is None
    assert book.queue.is_exhausted
    points = list_points(stored)
    assert sorted(points) == sorted((name, d) for name in GROUP_COUNTS for d in (0.0, 0.1, 0.2, 0.3))


def test_grid_asks_points_side_by_side(tmp_path: Path) -> None:
    """Workers that ask at the same time get different points."""
    book, stored = open_grid(tmp_path)
    for _ in range(8):
        ask(book)
    assert len(set(list_points(stored))) == 8


def test_grid_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A resumed grid repeats no finished point, and tries a killed one again."""
    book, _ = open_grid(tmp_path)
    for _ in range(3):
        run_trial(book)
    ask(book)
    book.flush()
    resumed, stored = open_grid(tmp_path)
    assert resumed.prepare() == 1
    while resumed.ask() is not None:
        pass
    points = list_points(stored)
    assert len(points) == 9
    assert len(set(points)) == 8
    assert points[3] == points[4]


def test_grid_order_depends_on_the_seed(tmp_path: Path) -> None:
    """A part of a grid is a fair sample of it, not its first corner."""
    orders = []
    for seed in (0, 1):
        book, stored = open_book(
            tmp_path, study={"name": f"s{seed}", "seed": seed}, space=GRID, search={"sampler": "grid"}
        )
        for _ in range(8):
            ask(book)
        orders.append(list_points(stored))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_max_trials_is_unbounded_without_a_grid(tmp_path: Path) -> None:
    """Only a grid ends by itself."""
    book, _ = open_book(tmp_path)
    assert book.queue.max_trials > 10**9


def test_report_of_many_classes_is_stored_by_its_cells(tmp_path: Path) -> None:
    """A thousand classes must not put a million numbers into every trial."""
    n_classes = 101
    matrix = tuple(tuple(int(true == predicted) for predicted in range(n_classes)) for true in range(n_classes))
    ones = (1.0,) * n_classes
    book, stored = open_book(tmp_path)
    number, _ = ask(book)
    for epoch in range(1, 4):
        book.report(number, make_epoch(epoch, 1.0))
    report = ClassReport(confusion_matrix=matrix, precision=ones, recall=ones, f1=ones)
    book.tell(number, TrialOutcome(state=TrialState.COMPLETE, report=report))
    described = list_trials(stored)[number].user_attrs["class_report"]
    assert "confusion_matrix" not in described
    assert described["confusion_cells"] == [[true, true, 1] for true in range(n_classes)]
