"""``per_device = "auto"`` with real worker processes, on cores that stand in for a GPU that several of them share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuner.search.ledger import read_runs
from tuner.search.storage import use_storage
from tuner.search.studies import load_stored
from tuner.service import probing, scouting
from tuner.service.coordinator import run_study
from tuner.service.messages import Probe, Train
from tuner.service.plan import describe_plan, make_plan
from tuner.service.progress import Event, Noted, SilentDisplay
from tuner.spec.sections import StudySpec
from tuner.spec.study import parse_spec

from .test_head_training import HEAD, OWN, Desk, make_session


class Shown(SilentDisplay):
    """Keeps what the user would read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def show(self, event: Event) -> None:
        """Keep a note."""
        if isinstance(event, Noted):
            self.notes.append(event.text)


@pytest.fixture(autouse=True)
def _shared_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU's slots for those of one device."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(scouting, "probes_sharing", lambda workers, *_: workers.per_device == "auto")
    monkeypatch.setattr(probing, "PROBE_SECONDS", 0.3)


def make_spec(folder: Path, **training: Any) -> StudySpec:
    """Return a study of three trials of one epoch on three digits."""
    tables: dict[str, Any] = {
        "study": {"name": "shared"},
        "data": {"source": "digits", "classes": ["7", "8", "9"], "image_size": 16},
        "space": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "batch_size": {"choices": [16, 32]}},
        "training": {"backbone": "tuner:small_cnn", "epochs": 1, "augmentation_strength": 0.5, **training},
        "search": {"n_trials": 3},
        "workers": {"devices": "cpu", "per_device": "auto"},
    }
    return parse_spec(tables, folder)


@pytest.mark.slow
def test_run_probes_and_searches_with_what_the_probe_leaves(tmp_path: Path) -> None:
    """Workers train steps alone and together, the decision is told and kept, and the trials run as ever."""
    url, shown = f"sqlite:///{tmp_path / 'studies.db'}", Shown()
    status = run_study(make_spec(tmp_path), storage=url, n_workers=2, display=shown)
    assert status.counts["COMPLETE"] + status.counts["PRUNED"] == 3
    with use_storage(url) as opened:
        run = read_runs(load_stored(opened, "shared").study.user_attrs)[-1]
    assert len(run.probed_speeds) == 2
    assert all(speed > 0 for speed in run.probed_speeds)
    assert run.per_device in {1, 2}
    (note,) = [note for note in shown.notes if note.startswith("per_device")]
    assert note.startswith(f'per_device = "auto": {run.per_device} worker')
    assert f"cpu trained {run.probed_speeds[0]:.0f} images/s with 1, {run.probed_speeds[1]:.0f} images/s with 2" in note


def test_worker_answers_a_probe_and_trains_as_if_there_had_been_none(tmp_path: Path) -> None:
    """Steps that count are timed, those that make ready are not; the trial after them has the same bits."""
    recipe = replace(HEAD, unfrozen_layers=2, dropout=0.3, augmentation_strength=0.5)
    request = Train(data_hash="", members=((0, recipe),), uses_features=False)
    probed, alone = Desk(), Desk()
    session = make_session(tmp_path, probed)
    ready, timed = (session.probe(Probe(data_hash="", params=recipe, seconds=seconds)) for seconds in (0.0, 0.2))
    assert (ready.problem, timed.problem) == (None, None)
    assert ready.images_per_second == 0 < timed.images_per_second
    assert all(held > 0 and free > 0 for held, free in timed.memory)
    session.train(request)
    make_session(tmp_path, alone).train(request)
    losses = [[(each.train_loss, each.val_loss) for each in desk.curve(0)] for desk in (probed, alone)]
    assert losses[0] == losses[1]


def test_worker_says_why_a_recipe_cannot_be_probed(tmp_path: Path) -> None:
    """In one line; the next probe is answered."""
    session = make_session(tmp_path, Desk())
    failing = replace(HEAD, backbone=f"{OWN}:raising", unfrozen_layers=2)
    assert session.probe(Probe(data_hash="", params=failing, seconds=0.1)).problem == "the user's own bug"
    assert session.probe(Probe(data_hash="", params=HEAD, seconds=0.1)).problem is None


def test_check_says_that_a_probe_decides(tmp_path: Path) -> None:
    """The number of workers is not known yet."""
    plan = make_plan(make_spec(tmp_path), storage=f"sqlite:///{tmp_path / 'studies.db'}", n_workers=2)
    assert plan.probes_sharing
    assert "workers: auto: a probe says how many share each device (cpu)" in describe_plan(plan).splitlines()
