"""Workers and runs that are lost at the edges: before the first trial, after the last, and with their device."""

from contextlib import suppress
from pathlib import Path

from tests.e2e.harness import kill, make_place, read_parent, wait_until
from tests.e2e.test_run import assert_is_whole, read_study


def test_worker_killed_before_the_first_trial_is_replaced(tmp_path: Path) -> None:
    """It may be the one that looks at the data, which soon ends by itself: then the next one is killed."""
    place = make_place(tmp_path, n_trials=2)
    process = place.start_run()

    def kill_one() -> bool:
        for pid in place.list_workers():
            with suppress(ProcessLookupError):
                kill(pid)
                return True
        return False

    wait_until(kill_one)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert_is_whole(place, 2)
    assert place.list_workers() == []


def test_workers_that_end_with_the_process_that_forks_them_are_replaced(tmp_path: Path) -> None:
    """Both trials are queued again, by one run that goes on with another such process."""
    place = make_place(tmp_path, backbones=("own:slow",), n_trials=3, pruner="none")
    process = place.start_run()
    wait_until(lambda: place.count_trials("RUNNING") == 2)
    (server,) = {read_parent(pid) for pid in place.list_workers()}
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1, "no thread may hold a lock while it forks"
    kill(server)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("the process that forks workers ended: killed by signal 9") >= 2
    reasons = [trial.user_attrs.get("reason") for trial in read_study(place).get_trials(deepcopy=False)]
    assert sorted(map(str, reasons)) == ["None", "None", "None", "interrupted", "interrupted"]
    assert_is_whole(place, 3)
    assert place.list_workers() == []


def test_worker_whose_device_is_lost_is_replaced(tmp_path: Path) -> None:
    """After a CUDA error every trial of that process would fail; in another one this trial completes."""
    place = make_place(tmp_path, backbones=("own:cursed",), n_trials=2, pruner="none")
    code, output = place.run()
    assert code == 0, output
    assert "CUDA error: device-side assert triggered; another one takes its place" in output
    reasons = [trial.user_attrs.get("reason") for trial in read_study(place).get_trials(deepcopy=False)]
    assert sorted(map(str, reasons)) == ["None", "None", "worker_lost"]
    assert_is_whole(place, 2)


def test_killed_run_that_needs_no_more_trials_leaves_nothing_running(tmp_path: Path) -> None:
    """With fewer trials wanted there is nothing left to run, but what the killed run left is put in order."""
    place = make_place(tmp_path, backbones=("own:slow",), epochs=10, n_trials=50, pruner="none")
    process = place.start_run()
    wait_until(lambda: place.count_trials("COMPLETE") >= 2 and place.count_trials("RUNNING") == 2)
    kill(process.pid)
    process.communicate()
    half = tmp_path / "studies.db.models" / "digits" / ".trial-7.1.tmp"
    half.mkdir(parents=True, exist_ok=True)
    code, output = place.run("--trials", "2")
    assert code == 0, output
    assert place.count_trials("RUNNING") == 0
    assert not half.exists()
