"""The mirror against Optuna's own storage: the same calls leave the same trials and the same rows in SQLite."""

import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
from optuna.distributions import IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from .mirrors import (
    DISTRIBUTIONS,
    EPOCHS,
    NAME,
    describe,
    load,
    make_url,
    open_mirror,
    open_plainly,
    read_plainly,
    read_rows,
)

PARAMS = {"uniform": 0.5, "log": 1e-3, "stepped": 0.75, "int": 3, "int log": 16, "int stepped": 24, "choice": None}
SAMPLERS: dict[str, Callable[[], BaseSampler]] = {
    "tpe": lambda: TPESampler(seed=1, n_startup_trials=6),
    "random": lambda: RandomSampler(seed=1),
    "qmc": lambda: QMCSampler(seed=1, scramble=True, warn_independent_sampling=False),
}
PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "hyperband": lambda: HyperbandPruner(min_resource=1, max_resource=EPOCHS, reduction_factor=3),
    "asha": lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    "median": lambda: MedianPruner(n_startup_trials=2, n_warmup_steps=1),
}
PAIRS = [("tpe", "hyperband"), ("tpe", "asha"), ("random", "asha"), ("random", "median"), ("qmc", "median")]

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


# --- the script that both storages play ---


def play(study: optuna.Study, flush: Callable[[], None]) -> None:
    """Do to a study whatever trials meet, several trials at a time; leave one running and one waiting."""
    study.set_user_attr("spec", {"nested": [1, None]})
    study.enqueue_trial({"log": 0.01, "choice": "a"}, user_attrs={"retry_of": 3})
    study.enqueue_trial(PARAMS)
    for finished in make_finished():
        study.add_trial(finished)
    flush()
    for _ in range(5):
        trials = [study.ask(DISTRIBUTIONS) for _ in range(4)]
        flush()
        running = dict(enumerate(trials))
        for epoch in range(1, EPOCHS + 1):
            for position, trial in list(running.items()):
                if run_epoch(study, trial, epoch):
                    del running[position]
            flush()
    study.enqueue_trial({"int": 4}, user_attrs={"attempt": 0})
    study.ask(DISTRIBUTIONS).report(0.5, 1)
    study.enqueue_trial({"int": 5})
    flush()


def make_finished() -> list[FrozenTrial]:
    """Return trials of elsewhere, in each state that ends one."""
    return [
        create_trial(
            params=PARAMS,
            distributions=DISTRIBUTIONS,
            value=0.625,
            intermediate_values={1: 0.5, 2: math.nan, 3: math.inf, 4: -math.inf, 7: 0.625},
            user_attrs={"screen": True, "nested": {"curve": [0.5, None]}},
            system_attrs={"from": "elsewhere"},
        ),
        create_trial(
            state=TrialState.COMPLETE, params={"int": 2}, distributions={"int": IntDistribution(1, 5)}, value=-1.0
        ),
        create_trial(state=TrialState.PRUNED, value=0.25),
        create_trial(state=TrialState.FAIL, user_attrs={"message": "naïve “text”"}),
    ]


def run_epoch(study: optuna.Study, trial: Trial, epoch: int) -> bool:
    """Report an epoch of a trial whose fate its number decides; return whether it ended."""
    trial.set_user_attr("epochs", [{"epoch": done, "seconds": 0.1} for done in range(1, epoch + 1)])
    fate = trial.number % 10
    odd = {(1, 2): math.nan, (2, 3): math.inf, (3, 2): -math.inf}
    trial.report(odd.get((fate, epoch), trial.params["uniform"] * epoch / EPOCHS), epoch)
    if fate == 4 and epoch == 2:
        study.tell(trial, state=TrialState.FAIL)
        return True
    if fate == 5 and epoch == 3:
        study._storage.set_trial_system_attr(trial._trial_id, "constraints", [1.0])
        study.tell(trial, state=TrialState.PRUNED)
        return True
    if fate == 6 and epoch == 1:
        trial.set_constraint("memory", 2.5)
    if trial.should_prune():
        study.tell(trial, state=TrialState.PRUNED)
        return True
    if epoch < EPOCHS:
        return False
    study.tell(trial, math.inf if fate == 7 else trial.params["uniform"])
    return True


def play_plainly(folder: Path, sampler: str, pruner: str) -> None:
    """Play the script on Optuna's own storage."""
    with closing_new(folder) as storage:
        optuna.create_study(storage=storage, study_name=NAME, direction="maximize")
        play(
            optuna.load_study(storage=storage, study_name=NAME, sampler=SAMPLERS[sampler](), pruner=PRUNERS[pruner]()),
            lambda: None,
        )


@contextmanager
def closing_new(folder: Path) -> Iterator[RDBStorage]:
    """Make a database with Optuna alone."""
    folder.mkdir()
    storage = RDBStorage(make_url(folder))
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def play_mirrored(folder: Path, sampler: str, pruner: str) -> list[dict[str, Any]]:
    """Play the script on a mirror; return the trials that its process sees at the end."""
    folder.mkdir(exist_ok=True)
    with open_mirror(folder) as mirror:
        study = load(mirror, sampler=SAMPLERS[sampler](), pruner=PRUNERS[pruner]())
        play(study, mirror.flush)
        return describe(study.trials)


# --- the contract ---


@pytest.mark.parametrize(("sampler", "pruner"), PAIRS)
def test_mirror_leaves_what_optuna_leaves(tmp_path: Path, sampler: str, pruner: str) -> None:
    """Plain Optuna reads the same trials, and every table has the same rows in the same order."""
    play_plainly(tmp_path / "plain", sampler, pruner)
    play_mirrored(tmp_path / "mirrored", sampler, pruner)
    expected = read_plainly(tmp_path / "plain", times=False)
    assert {trial["state"] for trial in expected} == set(TrialState)
    assert read_plainly(tmp_path / "mirrored", times=False) == expected
    rows = read_rows(tmp_path / "plain")
    assert all(rows[table] for table in rows if table.startswith("trial") and table != "trial_heartbeats")
    assert read_rows(tmp_path / "mirrored") == rows


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_mirror_and_file_agree(tmp_path: Path, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that runs a study, the next one, and plain Optuna see the same trials, times included."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        seen = play_mirrored(tmp_path, "tpe", "hyperband")
        assert read_plainly(tmp_path) == seen
        with open_mirror(tmp_path) as mirror:
            assert describe(load(mirror).trials) == seen
        with closing(sqlite3.connect(tmp_path / "studies.db")) as connection:
            query = "SELECT julianday('now') - julianday(max(datetime_start)) FROM trials"
            (days,) = connection.execute(query).fetchone()
        assert 0 <= days * 86_400 < 600
    finally:
        monkeypatch.undo()
        time.tzset()


def test_mirror_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    """A mirror that is opened again gives the next numbers, ends what ran, takes what waits, and doubles nothing."""
    (tmp_path / "whole").mkdir()
    with open_mirror(tmp_path / "whole") as mirror:
        study = load(mirror, sampler=RandomSampler(seed=0))
        for turn in range(6):
            take_turn(study, turn)
        mirror.flush()
    for turn in range(6):
        with open_mirror(tmp_path) as mirror:
            take_turn(load(mirror, sampler=RandomSampler(seed=turn)), turn)
            mirror.flush()
    states = [(trial["_number"], trial["state"]) for trial in read_plainly(tmp_path)]
    assert states == [(trial["_number"], trial["state"]) for trial in read_plainly(tmp_path / "whole")]
    assert [number for number, _ in states] == list(range(len(states)))


def take_turn(study: optuna.Study, turn: int) -> None:
    """Queue one, start two, and end the oldest that runs."""
    study.enqueue_trial({"int": turn + 1})
    for _ in range(2):
        study.ask(DISTRIBUTIONS).report(0.5, 1)
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    study.tell(running[0].number, 0.5)


def test_mirrors_of_two_studies_share_a_file(tmp_path: Path) -> None:
    """Ids of the two are mixed in the file, numbers are not."""
    with open_mirror(tmp_path) as first, open_mirror(tmp_path, "other") as second:
        for _ in range(3):
            for mirror, name in ((first, NAME), (second, "other")):
                study = load(mirror, study_name=name, sampler=RandomSampler(seed=0))
                trial = study.ask(DISTRIBUTIONS)
                trial.set_user_attr("of", name)
                study.tell(trial, 0.5)
                study.ask(DISTRIBUTIONS)
                mirror.flush()
    for name in (NAME, "other"):
        with open_plainly(tmp_path, study_name=name) as study:
            trials = study.trials
        assert [trial.number for trial in trials] == list(range(6))
        assert [trial.user_attrs.get("of") for trial in trials] == [name, None] * 3
        assert [trial.state.name for trial in trials] == ["COMPLETE", "RUNNING"] * 3


def test_plain_optuna_and_the_dashboard_read_a_running_study(tmp_path: Path) -> None:
    """Between flushes any reader sees the last one."""
    with open_mirror(tmp_path) as mirror:
        study = load(mirror)
        trial = study.ask(DISTRIBUTIONS)
        trial.report(0.5, 1)
        mirror.flush()
        trial.report(0.75, 2)
        study.tell(trial, 0.75)
        with open_plainly(tmp_path) as plain:
            (seen,) = plain.trials
            study_id = plain._study_id
        assert (seen.state, seen.intermediate_values) == (TrialState.RUNNING, {1: 0.5})
        (shown,) = ask_dashboard(tmp_path, study_id)["trials"]
        assert (shown["state"], shown["number"]) == ("Running", 0)
        mirror.flush()
        (shown,) = ask_dashboard(tmp_path, study_id)["trials"]
        assert (shown["state"], shown["values"]) == ("Complete", [0.75])
        assert [value["value"] for value in shown["intermediate_values"]] == [0.5, 0.75]


def ask_dashboard(folder: Path, study_id: int) -> dict[str, Any]:
    """Return what optuna-dashboard tells its page about a study."""
    storage = RDBStorage(make_url(folder), skip_table_creation=True)
    try:
        request: dict[str, Any] = {"PATH_INFO": f"/api/studies/{study_id}", "QUERY_STRING": "after=0"}
        setup_testing_defaults(request)
        statuses: list[str] = []
        body = b"".join(optuna_dashboard.wsgi(storage)(request, lambda status, *_: statuses.append(status)))
        assert statuses == ["200 OK"]
        answer: dict[str, Any] = json.loads(body)
        return answer
    finally:
        storage.remove_session()
        storage.engine.dispose()


def test_mirror_is_pinned_to_optuna_5() -> None:
    """Another major version may have other tables: read its models before this is changed."""
    assert optuna.__version__.split(".")[0] == "5"
