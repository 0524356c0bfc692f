"""A trial that is killed in the middle goes on from there, and ends as if nothing had happened."""

import re
import sqlite3
from pathlib import Path
from typing import Any

from tests.e2e.harness import Place, kill, make_place, wait_until
from tests.e2e.test_run import read_study


def make_long_place(folder: Path) -> Place:
    """Write a study of one trial that takes seconds, draws from every generator, and is saved after every epoch."""
    place = make_place(folder, backbones=("own:slow",), epochs=14, n_trials=1)
    text = place.study_file.read_text().replace("[training]", "[training]\ndropout = 0.2")
    place.study_file.write_text(text + "checkpoint_every = 0.001\n")
    return place


def read_curve(place: Place) -> tuple[dict[int, float], list[dict[str, Any]]]:
    """Return what the one complete trial reported, and its epochs without their times."""
    (trial,) = [trial for trial in read_study(place).trials if trial.state.name == "COMPLETE"]
    timed = {"seconds", "val_seconds", "images_per_second"}
    epochs = [{key: value for key, value in epoch.items() if key not in timed} for epoch in trial.user_attrs["epochs"]]
    return trial.intermediate_values, epochs


def count_epochs(place: Place, number: int) -> int:
    """Return how many epochs of a trial are stored."""
    database = place.folder / "studies.db"
    if not database.exists():
        return 0
    query = "SELECT count(*) FROM trial_intermediate_values JOIN trials USING (trial_id) WHERE number = ?"
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)
    try:
        return int(connection.execute(query, (number,)).fetchone()[0])
    except sqlite3.OperationalError:  # the schema is being made
        return 0
    finally:
        connection.close()


def test_killed_trial_goes_on_and_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    """First its worker is killed, then the coordinator: the curve is complete, and equal to the bit."""
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    whole, killed = map(make_long_place, folders)
    assert whole.run("--workers", "1")[0] == 0
    checkpoint = killed.folder / "studies.db.checkpoints" / "digits" / "trial-0.pt"
    process = killed.start_run("--workers", "1")
    wait_until(lambda: count_epochs(killed, 0) >= 3 and checkpoint.exists())
    (worker,) = killed.list_workers()
    kill(worker)
    wait_until(lambda: count_epochs(killed, 1) >= 6)
    kill(process.pid)
    first, _ = process.communicate(timeout=60)
    assert checkpoint.exists()
    code, second = killed.run("--workers", "1")
    assert code == 0, second
    assert [trial.state.name for trial in read_study(killed).trials] == ["FAIL", "FAIL", "COMPLETE"]
    assert re.search(r"^trial 1 goes on after epoch [2-9] of trial 0$", first, re.MULTILINE), first
    assert re.search(r"^trial 2 goes on after epoch ([4-9]|1\d) of trial [01]$", second, re.MULTILINE), second
    assert read_curve(killed) == read_curve(whole)
    assert len(read_curve(killed)[1]) == 14
    assert not (killed.folder / "studies.db.checkpoints").exists()
