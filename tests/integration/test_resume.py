"""A worker that is given the checkpoint of an interrupted trial."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_head_training import HEAD, Desk
from tuner.service.messages import EpochDone, Train, Verdict
from tuner.service.study_data import read_study_data
from tuner.service.training_session import TrainingSession
from tuner.service.workbench import Workbench
from tuner.spec.study import parse_spec
from tuner.trial import EpochResult, TrialParams, TrialState

DEEP = replace(HEAD, unfrozen_layers=2, augmentation_strength=0.5, dropout=0.3, epochs=4)


class Killed(BaseException):
    """Ends a worker in the middle of a trial."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))


def train(folder: Path, number: int, desk: Desk, *, params: TrialParams = DEEP, checkpoint: str = "t.pt") -> list[str]:
    """Have a new worker train a trial; return the lines for the user."""
    tables: dict[str, Any] = {
        "study": {"name": "deep", "seed": 5},
        "data": {"source": "digits", "classes": ["7", "8", "9"], "image_size": 16},
        "space": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}},
        "training": {"backbone": params.backbone, "epochs": params.epochs, "horizontal_flip": False},
        "workers": {"checkpoint_every": 1e-9},
    }
    spec, notes = parse_spec(tables, folder), list[str]()
    session = TrainingSession(
        Workbench(spec, read_study_data(spec), device="cpu", n_threads=1, note=notes.append), desk
    )
    path = str(folder / checkpoint) if checkpoint else ""
    session.train(Train(data_hash="", members=((number, params),), uses_features=False, checkpoint=path))
    return notes


def kill_in(epoch: int) -> Desk:
    """Return a coordinator whose worker dies when it has trained an epoch."""

    def answer(done: EpochDone) -> Verdict:
        if done.results[0][1].epoch == epoch:
            raise Killed
        return Verdict()

    return Desk(answer=answer)


def interrupt(folder: Path, number: int, *, epoch: int) -> Desk:
    """Train a trial until its worker dies; return what the coordinator heard."""
    desk = kill_in(epoch)
    with pytest.raises(Killed):
        train(folder, number, desk)
    return desk


def strip(desk: Desk, number: int) -> list[EpochResult]:
    """Return a trial's curve without its times."""
    return [replace(each, seconds=0.0, val_seconds=0.0, images_per_second=0.0) for each in desk.curve(number)]


def test_session_reports_the_epochs_of_the_lost_trial_again(tmp_path: Path) -> None:
    """The new trial has the whole curve, the old one's epochs to the bit, and completes."""
    whole = Desk()
    assert train(tmp_path, 3, whole, checkpoint="") == []
    first = interrupt(tmp_path, 3, epoch=3)
    again = Desk()
    assert train(tmp_path, 7, again) == ["trial 7 goes on after epoch 2 of trial 3"]
    assert again.curve(7)[:2] == first.curve(3)[:2]
    assert strip(again, 7) == strip(whole, 3)
    assert [done.outcome.state for done in again.ends().values()] == [TrialState.COMPLETE]
    assert again.ends()[7].outcome.report == whole.ends()[3].outcome.report


def test_session_prunes_a_trial_while_its_epochs_are_reported_again(tmp_path: Path) -> None:
    """What other trials showed meanwhile counts; nothing more is trained."""
    interrupt(tmp_path, 3, epoch=4)
    desk = Desk(answer=lambda done: Verdict(stop=(7,)) if done.results[0][1].epoch == 2 else Verdict())
    train(tmp_path, 7, desk)
    assert len(desk.curve(7)) == 2
    assert [done.outcome.state for done in desk.ends().values()] == [TrialState.PRUNED]


def test_session_starts_anew_without_a_checkpoint_that_fits(tmp_path: Path) -> None:
    """A torn one costs the time that it would have saved."""
    interrupt(tmp_path, 3, epoch=3)
    path = tmp_path / "t.pt"
    path.write_bytes(path.read_bytes()[:-100])
    desk = Desk()
    (note,) = train(tmp_path, 7, desk)
    assert note.startswith("trial 7 starts at epoch 1, its checkpoint cannot be used: ")
    whole = Desk()
    train(tmp_path, 3, whole, checkpoint="")
    assert strip(desk, 7) == strip(whole, 3)
