"""A worker's deeper trials really start from the trained head, wherever that comes from."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.test_feature_banks import VIEWS, Worker
from tests.integration.test_head_training import HEAD, OWN
from tuner.service import head_starts
from tuner.service.feature_banks import FeatureBanks
from tuner.service.messages import Train, Verdict
from tuner.training.cohort import train_cohort
from tuner.training.head_start import train_head
from tuner.training.package import read_package
from tuner.trial import HeadStart, Repeat, TrialParams

PROBE = replace(HEAD, lr=0.2, dropout=0.0, label_smoothing=0.0, epochs=8, seed=77)
DEEPER = replace(HEAD, unfrozen_layers=2, lr=1e-5, dropout=0.0, head_start=HeadStart.take_from(PROBE))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))


def train(worker: Worker, params: TrialParams, *, number: int = 0, **request: Any) -> list[tuple[float, float]]:
    """Train one recipe on images; return the loss and the accuracy after each epoch."""
    request = {"uses_features": False} | request
    worker.session.train(Train(data_hash="", members=((number, params),), **request))
    assert worker.desk.ends()[number].outcome.state == "COMPLETE", worker.desk.ends()[number].outcome
    return [(each.val_loss, each.val_accuracy) for each in worker.desk.curve(number)]


def test_deeper_trial_starts_where_the_head_has_ended(tmp_path: Path) -> None:
    """At a rate that hardly moves anything its first epoch is as good as the head's last, and far from a new head."""
    worker = Worker(folder=tmp_path, backbone=f"{OWN}:normless")
    probe, deeper = (replace(params, backbone=worker.backbone) for params in (PROBE, DEEPER))
    *_, (head_loss, head_accuracy) = train(worker, probe, uses_features=True)
    (loss, accuracy), *_ = train(worker, deeper, number=1)
    (new_loss, new_accuracy), *_ = train(worker, replace(deeper, head_start=None), number=2)
    assert accuracy >= head_accuracy - 0.01 > new_accuracy
    assert loss == pytest.approx(head_loss, rel=1e-3)
    assert new_loss > head_loss * 1.1


def test_recipe_without_a_head_start_trains_as_before(tmp_path: Path) -> None:
    """Bit for bit what a worker that has trained no head gives, also after one that has."""
    plain = replace(DEEPER, head_start=None)
    expected = train(Worker(folder=tmp_path), plain)
    worker = Worker(folder=tmp_path)
    train(worker, DEEPER)
    assert train(worker, plain, number=1) == expected


@pytest.mark.parametrize("overrides", [{}, VIEWS])
def test_head_on_features_and_on_images_start_the_same_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any]
) -> None:
    """The worker's head is the one that production trains, to what float32 rounds."""
    strength = overrides.get("augmentation_strength", 0.0)
    start = replace(HeadStart.take_from(PROBE), augmentation_strength=strength)
    params = replace(DEEPER, head_start=start, **overrides)
    on_features = train(Worker(folder=tmp_path), params)
    worker = Worker(folder=tmp_path)
    worker.session._head_starts._uncached.add(params.backbone)
    on_images = train(worker, params)
    assert [loss for loss, _ in on_features] == pytest.approx([loss for loss, _ in on_images], rel=1e-3)


def test_head_is_trained_once_for_all_trials_that_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second trial has it at once; another recipe of the head is another head."""
    trained: list[TrialParams] = []

    def note(job: Any) -> Any:
        trained.extend(job.params)
        return train_cohort(job)

    monkeypatch.setattr("tuner.service.head_starts.train_cohort", note)
    worker = Worker(folder=tmp_path)
    train(worker, DEEPER)
    train(worker, replace(DEEPER, lr=1e-4, seed=3, layer_decay=0.5, batch_size=7), number=1)
    assert trained == [replace(PROBE, layer_decay=1.0)]
    start = replace(HeadStart.take_from(PROBE), seed=78)
    train(worker, replace(DEEPER, head_start=start), number=2)
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("backbone", "strength", "reason"),
    [
        (f"{OWN}:dropping", 0.0, "it has 2 classifiers|its classifier"),
        (f"{OWN}:normless", 0.0, "no room"),
        (f"{OWN}:normless", 0.5, "every epoch augments its images anew"),
    ],
)
def test_head_trains_on_images_where_features_do_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str, strength: float, reason: str
) -> None:
    """The trial starts from a trained head all the same, and the run says once why it takes longer."""
    if "no room" in reason:
        monkeypatch.setattr(FeatureBanks, "open_val", _fail)
    start = replace(HeadStart.take_from(PROBE), augmentation_strength=strength)
    params = replace(DEEPER, backbone=backbone, head_start=start)
    worker = Worker(folder=tmp_path, backbone=backbone)
    (loss, _), *_ = train(worker, params)
    (new_loss, _), *_ = train(worker, replace(params, head_start=None), number=1)
    assert loss < new_loss
    assert train(worker, params, number=2)[0] == (loss, worker.desk.curve(0)[0].val_accuracy)
    (note,) = worker.notes
    assert re.match(f"{backbone}: the heads that its trials start from train on images: .*({reason})", note), note


def _fail(*_: object) -> None:
    raise ValueError("no room")


@pytest.mark.parametrize("n_folds", [0, 3])
def test_repeated_trial_trains_its_head_on_its_own_images(tmp_path: Path, n_folds: int) -> None:
    """A head of the study's train has seen what a fold validates; a fresh seed draws the head afresh."""
    repeat = Repeat(seed=5, n_folds=n_folds, fold=1, cut_seed=9)
    worker = Worker(folder=tmp_path)
    found = train(worker, DEEPER, repeats=(repeat,))
    own = DEEPER.with_seed(5)
    job = worker.session._make_job(own, repeat)
    train_head(job)
    expected = job.model.get_parameter("fc.weight").detach().clone()
    other = worker.session._make_job(replace(own, head_start=DEEPER.head_start), repeat)
    train_head(other)
    assert not torch.equal(other.model.get_parameter("fc.weight"), expected)
    folder = tmp_path / "model"
    keep = Verdict(keep=1, folder=str(folder))
    worker.desk.answer = lambda done: keep if done.results[0][1].epoch == 2 else Verdict()
    assert train(worker, replace(DEEPER, lr=1e-12), number=1, repeats=(repeat,)) != found
    kept, manifest = read_package(folder, allow_code=True)
    assert manifest.provenance == {"device": "cpu", "computed_in": "float32"}  # of itself; the rest is the study's
    torch.testing.assert_close(kept.get_parameter("fc.weight").detach(), expected, rtol=1e-4, atol=1e-5)


def test_resumed_trial_does_not_train_its_head_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it goes on from holds the head as it was, and the trial ends in the same bits."""
    params = replace(DEEPER, lr=0.01, epochs=3)
    expected = train(Worker(folder=tmp_path), params)
    first = Worker(folder=tmp_path)
    first.bench.spec = first.session._spec = first.bench.spec.model_copy(
        update={"workers": first.bench.spec.workers.model_copy(update={"checkpoint_every": 0.0})}
    )
    place = str(tmp_path / "checkpoint.pt")

    def stop_in_third(done: Any) -> Verdict:
        if done.results[0][1].epoch == 3:
            raise KeyboardInterrupt
        return Verdict()

    first.desk.answer = stop_in_third
    with pytest.raises(KeyboardInterrupt):
        first.session.train(Train(data_hash="", members=((0, params),), uses_features=False, checkpoint=place))
    monkeypatch.setattr(head_starts.HeadStarts, "give", None)
    assert train(Worker(folder=tmp_path), params, checkpoint=place) == expected


def test_diverged_head_is_the_trials_own_fault(tmp_path: Path) -> None:
    """As any loss of its own that is not finite."""
    start = replace(HeadStart.take_from(PROBE), lr=1e38, optimizer="sgd", warmup_fraction=0.0)
    worker = Worker(folder=tmp_path)
    params = replace(DEEPER, head_start=start)
    worker.session.train(Train(data_hash="", members=((0, params),), uses_features=False))
    assert worker.desk.ends()[0].outcome.reason == "diverged"
    assert worker.desk.epochs == []
