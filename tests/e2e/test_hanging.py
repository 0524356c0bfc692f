"""Workers that hang, and trials that take too long."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.harness import Place, kill, make_place, wait_until
from tests.e2e.test_run import assert_is_whole, read_study


def add_keys(place: Place, *, search: str = "", workers: str = "") -> None:
    """Put lines into the sections of a study file."""
    text = place.study_file.read_text()
    text = text.replace("[search]", f"[search]\n{search}").replace("[workers]", f"[workers]\n{workers}")
    place.study_file.write_text(text)


def list_reasons(place: Place) -> list[str]:
    """Return why trials did not complete."""
    trials = read_study(place).get_trials(deepcopy=False)
    return [trial.user_attrs["reason"] for trial in trials if trial.user_attrs.get("reason")]


@pytest.mark.parametrize("how", ["stopped", "holding the interpreter"])
def test_hanging_worker_is_ended_and_its_trial_queued_again(tmp_path: Path, how: str) -> None:
    """Neither a stopped process nor a C loop that never lets Python run keeps a night waiting."""
    backbone = "own:slow" if how == "stopped" else "own:holding"
    place = make_place(tmp_path, backbones=(backbone,), epochs=6, n_trials=4, pruner="none")
    add_keys(place, workers='stall_limit = "6s"')
    process = place.start_run()
    if how == "stopped":
        wait_until(lambda: place.count_trials("RUNNING") == 2)
        os.kill(place.list_workers()[0], signal.SIGSTOP)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "said nothing for 6 s (workers.stall_limit) and was ended; another one takes its place" in output
    assert list_reasons(place) == ["stalled"]
    assert_is_whole(place, 4)
    assert place.list_workers() == []


def test_stopped_worker_does_not_outlive_the_coordinator(tmp_path: Path) -> None:
    """A stopped process cannot see that its socket has ended; the kernel ends it."""
    place = make_place(tmp_path, backbones=("own:slow",), epochs=50)
    process = place.start_run()
    wait_until(lambda: place.count_trials("RUNNING") == 2)
    os.kill(place.list_workers()[0], signal.SIGSTOP)
    kill(process.pid)
    process.communicate()
    wait_until(lambda: place.list_workers() == [], timeout=5)


def test_trial_over_its_time_is_pruned_infeasible(tmp_path: Path) -> None:
    """It counts, is never tried again, and samplers avoid its like."""
    place = make_place(tmp_path, backbones=("own:slow", "own:good"), epochs=40, n_trials=4, sampler="grid")
    text = place.study_file.read_text().replace("lr = { low = 1e-4, high = 1e-2, log = true }", "")
    text = text.replace("{ low = 0.0, high = 1.0 }", "{ choices = [0.0, 1.0] }")
    place.study_file.write_text(text + '\n[backbones."own:slow"]\nkwargs = { seconds = 0.2 }\n')
    add_keys(place, search='trial_timeout = "10s"')
    code, output = place.run()
    assert code == 0, output
    assert "trained longer than 10 s and was ended" in output
    trials = read_study(place).get_trials(deepcopy=False)
    slow = [trial for trial in trials if trial.params["backbone"] == "own:slow"]
    good = [trial for trial in trials if trial.params["backbone"] == "own:good"]
    assert [trial.user_attrs["reason"] for trial in slow] == ["time_limit"] * 2
    assert [trial.state.name for trial in slow] == ["PRUNED"] * 2
    assert all(max(trial.constraints.values()) > 0 for trial in slow)
    assert {trial.user_attrs.get("reason", "") for trial in good} <= {"", "pruner"}


def test_time_in_which_nobody_watches_is_not_the_trials(tmp_path: Path) -> None:
    """A coordinator that is stopped, or waits for its database, answers no worker; no trial pays for it."""
    place = make_place(tmp_path, backbones=("own:slow",), epochs=20, n_trials=2)
    add_keys(place, search='trial_timeout = "8s"')
    process = place.start_run()
    wait_until(lambda: len(place.list_reporting()) == 2)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(9)
    os.kill(process.pid, signal.SIGCONT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert set(list_reasons(place)) <= {"pruner"}
    assert_is_whole(place, 2)


def test_trial_whose_files_cannot_be_read_is_queued_again(tmp_path: Path) -> None:
    """A disk that was away for a moment costs no point of the search."""
    place = make_place(tmp_path, backbones=("own:forgetful",), n_trials=2)
    code, output = place.run()
    assert code == 0, output
    assert list_reasons(place) == ["unreadable"]
    assert_is_whole(place, 2)
