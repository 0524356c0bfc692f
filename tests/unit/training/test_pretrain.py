"""Pretraining on real digits, and its cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner.errors import ModelError
from tuner.spec.sections import (
    BackboneSection,
    DataSection,
    PretrainingSection,
    StudySection,
    StudySpec,
    TrainingSection,
)
from tuner.spec.space import Choices
from tuner.training.prepare import prepare_model
from tuner.training.pretrain import find_pretrained, identify_pretraining, pretrain_backbone
from tuner.trial import EpochResult

from .builders import CPU, make_params

NAME = "tuner:small_cnn"


def make_spec(*, seed: int = 0, std: tuple[float, ...] | None = None, **pretraining: Any) -> StudySpec:
    """Return a study that pretrains on two digits."""
    source = DataSection(source="digits", classes=("0", "1"), image_size=8)
    values: dict[str, Any] = {"data": source, "epochs": 2} | pretraining
    return StudySpec(
        study=StudySection(name="s", seed=seed),
        data=DataSection(source="digits", classes=("2", "3", "4"), image_size=8),
        space={"backbone": Choices(choices=(NAME,))},
        backbones={NAME: BackboneSection(std=std)},
        training=TrainingSection(horizontal_flip=False),
        pretraining=PretrainingSection(**values),
    )


def pretrain(spec: StudySpec) -> tuple[Path, list[EpochResult]]:
    """Pretrain; return the file and the epochs that were trained."""
    epochs: list[EpochResult] = []
    return pretrain_backbone(NAME, spec, CPU, epochs.append), epochs


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path))


def test_pretrain_backbone_learns_once_and_is_reused() -> None:
    """The second call trains nothing and gives the same file."""
    path, epochs = pretrain(make_spec())
    again, no_epochs = pretrain(make_spec())
    assert epochs[-1].val_accuracy > 0.9
    assert again == path
    assert no_epochs == []


def test_pretrain_backbone_saves_the_body_and_a_log() -> None:
    """No tensor of the head; the JSON beside it has every epoch and what decided the key."""
    path, epochs = pretrain(make_spec())
    assert not [name for name in load_file(path) if name.startswith("classifier")]
    log = json.loads(path.with_suffix(".json").read_text())
    assert [epoch["val_accuracy"] for epoch in log["epochs"]] == [epoch.val_accuracy for epoch in epochs]
    assert log["facts"]["backbone"] == NAME


def test_pretrain_backbone_feeds_prepare_model() -> None:
    """A trial of three other classes starts from the pretrained body under its own head."""
    spec = make_spec(epochs=1)
    path, _ = pretrain(spec)
    model = prepare_model(make_params(backbone=NAME), spec, 3, path)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(path).items())
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 2e-3}, {"epochs": 1}, {"batch_size": 32}])
def test_pretrain_backbone_trains_anew_for_another_recipe(change: dict[str, Any]) -> None:
    """Whatever decides the weights decides the file."""
    path, _ = pretrain(make_spec())
    other, epochs = pretrain(make_spec(**change))
    assert other != path
    assert epochs


def test_pretrain_backbone_trains_anew_in_another_precision() -> None:
    """Of a study that names none the file is the one from before there was a choice."""
    spec = make_spec()
    training = spec.training.model_copy(update={"precision": "bfloat16"})
    other = spec.model_copy(update={"training": training})
    (rounded, in_bfloat16), (exact, in_float32) = pretrain(other), pretrain(spec)
    assert rounded != exact
    assert in_bfloat16[0].train_loss != in_float32[0].train_loss
    assert identify_pretraining(NAME, other) != identify_pretraining(NAME, spec)


def flip_bit(data: bytes) -> bytes:
    """Return bytes of which the last differs in one bit."""
    return data[:-1] + bytes([data[-1] ^ 1])


def cut(data: bytes) -> bytes:
    """Return bytes without the last ten."""
    return data[:-10]


@pytest.mark.parametrize("damage", [cut, flip_bit])
def test_pretrain_backbone_trains_anew_when_the_file_is_damaged(damage: Callable[[bytes], bytes]) -> None:
    """A broken cache is rebuilt, to the same bits."""
    path, _ = pretrain(make_spec(epochs=1))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert find_pretrained(NAME, make_spec(epochs=1)) == (path, False)
    again, epochs = pretrain(make_spec(epochs=1))
    assert (again, len(epochs)) == (path, 1)
    assert path.read_bytes() == whole
    assert find_pretrained(NAME, make_spec(epochs=1)) == (path, True)


@pytest.mark.parametrize("log", [None, "", "[]", "{}", '{"sha256": []}'])
def test_pretrain_backbone_trains_anew_without_a_digest(log: str | None) -> None:
    """Weights that nothing vouches for are not used."""
    path, _ = pretrain(make_spec(epochs=1))
    path.with_suffix(".json").unlink()
    if log is not None:
        path.with_suffix(".json").write_text(log)
    assert find_pretrained(NAME, make_spec(epochs=1)) == (path, False)


def test_identify_pretraining_knows_groups_by_their_splits_alone() -> None:
    """The key of groups is younger than stored studies: without it their pretraining is the same as before."""
    source = DataSection(source="digits", classes=("0", "1"), image_size=8)
    grouped = make_spec(data=source.model_copy(update={"group": "patient"}))
    assert identify_pretraining(NAME, grouped) == identify_pretraining(NAME, make_spec())


def test_pretrain_backbone_tells_that_it_diverged() -> None:
    """The line names the key to change; nothing is kept."""
    with pytest.raises(
        ModelError, match=rf"^pretraining\.lr: must let {NAME} converge, got 0\.001; training loss is nan in epoch 1"
    ):
        pretrain(make_spec(std=(1e-40, 1e-40, 1e-40)))


def test_pretrain_backbone_needs_its_section() -> None:
    """Without [pretraining] there is nothing to do."""
    spec = make_spec().model_copy(update={"pretraining": None})
    with pytest.raises(ValueError, match=r"^spec\.pretraining: must be given, got None$"):
        pretrain(spec)
