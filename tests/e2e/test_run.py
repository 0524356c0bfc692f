"""``tuner run``, killed and resumed as nights do."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from tests.e2e.harness import Place, kill, make_place, wait_until


def make_slow_place(folder: Path, *, n_trials: int = 6, sampler: str = "random") -> Place:
    """Write a study whose trials take seconds without needing the CPU, so that a kill meets them running."""
    return make_place(folder, backbones=("own:slow",), epochs=10, n_trials=n_trials, sampler=sampler)


def read_study(place: Place, name: str = "digits") -> optuna.Study:
    """Read a study as any Optuna client does, and let go of its database."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{place.folder / 'studies.db'}")
    copied = optuna.storages.InMemoryStorage()
    optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=copied)
    storage.engine.dispose()
    return optuna.load_study(study_name=name, storage=copied)


def assert_is_whole(place: Place, n_trials: int) -> None:
    """The study has its exact number of trials, no zombie, and no point twice."""
    trials = read_study(place).get_trials(deepcopy=False)
    counted = [trial for trial in trials if trial.state.name in {"COMPLETE", "PRUNED"}]
    assert len(counted) == n_trials
    assert not [trial for trial in trials if trial.state.name in {"RUNNING", "WAITING"}]
    points = {tuple(sorted(trial.params.items())) for trial in counted}
    assert len(points) == n_trials


def test_run_reaches_the_exact_count_and_prints_what_to_do_next(tmp_path: Path) -> None:
    """Two workers, one study, all trials accounted for, readable by plain Optuna."""
    place = make_place(tmp_path, n_trials=6)
    code, output = place.run()
    assert code == 0, output
    assert "study digits: 6 of 6 trials" in output
    assert "tuner train digits --out model" in output
    assert_is_whole(place, 6)
    best = read_study(place).best_trial
    assert len(best.intermediate_values) == 3
    assert best.value == best.intermediate_values[3]
    assert {"unfrozen_layers_resolved", "seconds", "images_per_second", "epochs", "class_report"} <= set(
        best.user_attrs
    )
    assert (tmp_path / "studies.db.models" / "digits" / f"trial-{best.number}" / "model.safetensors").is_file()
    assert place.list_workers() == []


def test_finished_study_prints_its_result_again_without_a_worker(tmp_path: Path) -> None:
    """Running a finished study is harmless; --trials raises its total."""
    place = make_place(tmp_path, n_trials=2, epochs=1)
    assert place.run()[0] == 0
    code, output = place.run()
    assert code == 0
    assert "worker" not in output
    code, output = place.run("--trials", "3", "--json")
    assert code == 0
    assert json.loads(output)["counts"]["COMPLETE"] == 3


def test_killed_coordinator_leaves_no_process_and_resumes_to_the_exact_count(tmp_path: Path) -> None:
    """Five seconds after SIGKILL of the coordinator alone none of our processes lives, and nothing is lost."""
    place = make_slow_place(tmp_path)
    process = place.start_run()
    wait_until(lambda: place.count_trials("RUNNING") == 2 and place.count_trials("COMPLETE", "PRUNED") >= 1)
    kill(process.pid)
    process.communicate()
    wait_until(lambda: place.list_workers() == [], timeout=5)
    assert place.count_trials("RUNNING") > 0
    code, output = place.run()
    assert code == 0, output
    assert "queued again" in output
    assert_is_whole(place, 6)


def test_killed_worker_is_replaced_and_its_trial_queued_again_once(tmp_path: Path) -> None:
    """A lost worker costs its trial's time, not the study."""
    place = make_slow_place(tmp_path)
    process = place.start_run()
    wait_until(lambda: place.count_trials("RUNNING") == 2)
    kill(place.list_workers()[0])
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "killed by signal 9" in output
    assert_is_whole(place, 6)
    (lost,) = [trial for trial in read_study(place).trials if trial.state.name == "FAIL"]
    assert lost.user_attrs["reason"] == "worker_lost"
    (again,) = [trial for trial in read_study(place).trials if trial.user_attrs.get("retry_of") == lost.number]
    assert again.params == lost.params


def test_killed_everything_resumes_to_the_exact_count_with_tpe(tmp_path: Path) -> None:
    """Coordinator and workers killed at once: the same command goes on, and tpe repeats no point."""
    place = make_slow_place(tmp_path, sampler="tpe")
    process = place.start_run()
    wait_until(lambda: place.count_trials("RUNNING") == 2)
    for pid in [*place.list_workers(), process.pid]:
        kill(pid)
    process.communicate()
    assert place.run()[0] == 0
    assert_is_whole(place, 6)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_bookkeeping_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Ctrl-C and SIGTERM leave no running trial behind."""
    place = make_slow_place(tmp_path)
    process = place.start_run()
    wait_until(lambda: place.count_trials("RUNNING") == 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == code, output
    assert place.count_trials("RUNNING") == 0
    assert place.count_trials("WAITING") == place.count_trials("FAIL") > 0
    assert place.list_workers() == []
    assert place.run()[0] == 0
    assert_is_whole(place, 6)


def test_second_run_of_the_same_study_is_refused(tmp_path: Path) -> None:
    """Two coordinators on one study would tell its trials twice."""
    place = make_slow_place(tmp_path)
    process = place.start_run()
    wait_until(lambda: place.count_trials("RUNNING") == 2)
    code, output = place.run()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert code == 4
    assert "must not be running already" in output


def test_timeout_starts_no_trial_after_it(tmp_path: Path) -> None:
    """A timeout ends a run with exit 0 and says how to go on."""
    place = make_slow_place(tmp_path, n_trials=500)
    code, output = place.run("--timeout", "20s")
    assert code == 0, output
    assert "stopped by the timeout; go on: tuner run " in output
    assert "--workers 2 --timeout 20s" in output.replace("--timeout 20s --workers 2", "--workers 2 --timeout 20s")
    assert 0 < place.count_trials("COMPLETE", "PRUNED") < 500
    assert place.count_trials("RUNNING", "WAITING") == 0


def test_failing_trials_are_recorded_and_five_in_a_row_end_the_run(tmp_path: Path) -> None:
    """A bug in the user's backbone is the trial's failure, with its traceback; five of them are enough."""
    place = make_place(tmp_path, backbones=("own:raising",), n_trials=9)
    code, output = place.run()
    assert code == 10, output
    assert "5 trials failed in a row; the last one: ValueError: the user's own bug" in output
    assert "Traceback" not in output
    code, output = place.call("show", "digits", "0")
    assert code == 0
    assert 'raise ValueError("the user\'s own bug")' in output
    assert place.count_trials("RUNNING") == 0


def test_out_of_memory_is_pruned_infeasible_and_the_search_goes_on(tmp_path: Path) -> None:
    """A point that does not fit counts, and samplers and the dashboard see that it is infeasible."""
    place = make_place(tmp_path, backbones=("own:good", "own:hungry"), n_trials=8, epochs=2)
    code, output = place.run()
    assert code == 0, output
    assert "out of memory" in output
    assert_is_whole(place, 8)
    infeasible = [trial for trial in read_study(place).trials if trial.user_attrs["feasible"] is False]
    assert infeasible
    assert all(trial.params["backbone"] == "own:hungry" for trial in infeasible)
    assert all(max(trial.constraints.values()) > 0 for trial in infeasible)
    assert read_study(place).best_trial.params["backbone"] == "own:good"


def test_diverged_trial_is_pruned_infeasible(tmp_path: Path) -> None:
    """A loss that is not finite ends the trial, not the study."""
    place = make_place(tmp_path, n_trials=2)
    text = place.study_file.read_text().replace("low = 1e-4, high = 1e-2, log = true", "low = 1e37, high = 1e38")
    place.study_file.write_text(text.replace("batch_size = 64", 'batch_size = 64\noptimizer = "sgd"'))
    code, output = place.run()
    assert code == 10, output
    assert "at least one trial must complete, got 2 pruned and 0 failed" in output
    assert {trial.user_attrs["reason"] for trial in read_study(place).trials} == {"diverged"}


COORDINATOR_SCRIPT = """
import sys
from tuner import load_spec, run_study
status = run_study(load_spec(sys.argv[1]), n_workers=1)
assert status.best is not None
heavy = ("torch", "timm", "torchvision", "tuner.training", "tuner.models", "tuner.data")
print(sorted(name for name in heavy if name in sys.modules))
print(sys.modules["torch"].cuda.is_available() if "torch" in sys.modules else "no torch")
"""


@pytest.mark.parametrize(("sampler", "loaded"), [("tpe", "[]\nno torch\n"), ("gp", "['torch']\nFalse\n")])
def test_coordinator_loads_nothing_of_training(tmp_path: Path, sampler: str, loaded: str) -> None:
    """From a plain script, without a main guard: the coordinator stays free of torch; gp may load it, without CUDA."""
    place = make_place(tmp_path, n_trials=12, epochs=1, sampler=sampler, pruner="none")
    script = tmp_path / "script.py"
    script.write_text(COORDINATOR_SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(place.study_file)],
        cwd=tmp_path,
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == loaded
