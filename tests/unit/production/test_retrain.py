"""Tests of tuner.production.retrain, with what it is made of: real training of tiny nets on tiny images."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from tuner.data.duplicates import Duplicates
from tuner.data.index import Split
from tuner.errors import DataError, DeviceError, ExportError, ModelError, StudyError
from tuner.models.small_cnn import SmallCNN
from tuner.production.best import best_params
from tuner.production.evaluate import describe_scores
from tuner.production.openings import OPENINGS_ATTR, list_openings
from tuner.production.retrain import check_place, train_best
from tuner.production.train_result import describe_result
from tuner.service.study_data import read_study_data
from tuner.training.metrics import score_predictions
from tuner.training.package import read_manifest
from tuner.training.pretrain import find_pretrained

from .builders import (
    CLASSES,
    SMALL_CNN,
    make_spec,
    read_attrs,
    set_trial_attr,
    store_example,
    store_study,
    write_images,
)


@pytest.fixture(autouse=True)
def _use_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))


def build_own(num_classes: int) -> nn.Module:
    """Return a user's own backbone."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, num_classes))


def read_metrics(folder: Path) -> dict[str, object]:
    """Return what metrics.json holds."""
    metrics: dict[str, object] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def test_train_best_writes_the_model_folder(tmp_path: Path) -> None:
    """Weights, manifest, metrics, picture and recipe; nothing else, and nothing beside it."""
    url = store_example(tmp_path, accuracies=(0.5, 0.75, 0.6))
    result = train_best("sides", tmp_path / "models" / "out", storage=url, device="cpu")
    out = tmp_path / "models" / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.png",
        "confusion_matrix.png",
        "metrics.json",
        "model.json",
        "model.safetensors",
        "model_card.json",
        "model_card.md",
        "params.toml",
        "scores.png",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (result.number, result.search_value, result.n_trained_images) == (1, 0.75, 30)
    assert tomllib.loads((out / "params.toml").read_text()) == best_params("sides", storage=url)
    for name in ("calibration", "confusion_matrix", "scores"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 200


def test_train_best_says_where_the_model_comes_from(tmp_path: Path) -> None:
    """The manifest holds what predicting needs and what a person may ask."""
    url = store_example(tmp_path)
    train_best("sides", tmp_path / "out", storage=url, device="cpu")
    manifest = read_manifest(tmp_path / "out")
    provenance = manifest.provenance
    assert manifest.classes == CLASSES
    assert manifest.params.to_json() == best_params("sides", storage=url)["params"]
    assert {key: provenance[key] for key in ("study", "trial", "objective", "value", "trained_on")} == {
        "study": "sides",
        "trial": 0,
        "objective": "val_accuracy",
        "value": 0.75,
        "trained_on": "train+val",
    }
    assert provenance["data_hash"] == read_study_data(make_spec(tmp_path)).hash
    assert provenance["split_counts"] == {"train": 22, "val": 8, "test": 10}
    assert provenance["versions"].keys() == {"python", "torch"}


def test_train_best_metrics_follow_from_the_confusion_matrix(tmp_path: Path) -> None:
    """What metrics.json says of test is one matrix seen from all sides, over every test image."""
    url = store_example(tmp_path)
    result = train_best("sides", tmp_path / "out", storage=url, device="cpu")
    metrics = read_metrics(tmp_path / "out")
    assert metrics == result.to_json()
    test = result.to_json()["test"]
    matrix = np.array(test["confusion_matrix"])
    true, predicted = np.repeat(np.indices(matrix.shape).reshape(2, -1), matrix.flatten(), axis=1)
    scores = describe_scores(score_predictions(true, predicted, len(CLASSES), loss=test["loss"]), CLASSES)
    assert scores == {key: test[key] for key in scores}
    assert set(test) - set(scores) == {"accuracies", "temperature", "calibration"}
    assert test["n_images"] == len(true) == 10
    assert [one["name"] for one in test["classes"]] == list(CLASSES)
    assert [one["support"] for one in test["classes"]] == [5, 5]
    assert test["accuracy_interval_95"][0] <= test["accuracy"] <= test["accuracy_interval_95"][1]


def test_train_best_learns_from_train_and_val(tmp_path: Path) -> None:
    """The sides are easy to tell, so that a training that reaches its images must do it."""
    url = store_example(tmp_path)
    result = train_best("sides", tmp_path / "out", storage=url, device="cpu")
    assert result.test is not None
    assert result.test.scores.accuracy >= 0.9


def test_train_best_gives_the_same_weights_again(tmp_path: Path) -> None:
    """The seed of the trial decides everything, whatever torch drew before; an older folder is replaced."""
    url = store_example(tmp_path)
    weights = []
    for _ in range(2):
        torch.rand(3)
        train_best("sides", tmp_path / "out", storage=url, device="cpu")
        weights.append(load_file(tmp_path / "out" / "model.safetensors"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


SEEN: list[int] = []


def build_counting(num_classes: int) -> nn.Module:
    """Return a backbone that notes how many images it trains on at a time."""
    model = build_own(num_classes)
    model.register_forward_pre_hook(lambda _, inputs: SEEN.append(len(inputs[0])) if model.training else None)
    return model


def test_train_best_takes_batches_in_the_parts_that_fitted_the_search(tmp_path: Path) -> None:
    """A batch of eight that went through in parts of three does so again, and the model is that of whole batches."""
    own = f"{__name__}:build_counting"
    training = {"backbone": own, "batch_size": 8, "unfrozen_layers": 1, "augmentation_strength": 0.0, "epochs": 2}
    url = store_example(tmp_path, backbone=own, training=training)
    lines: list[str] = []
    weights = []
    for name in ("whole", "parts"):
        SEEN.clear()
        train_best("sides", tmp_path / name, storage=url, device="cpu", allow_code=True, announce=lines.append)
        assert max(SEEN) == (8 if name == "whole" else 3)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
        set_trial_attr(url, "micro_batch", 3)
    assert ["3 images at a time" in line for line in lines if "retraining trial" in line] == [False, False, True, True]
    assert json.loads((tmp_path / "parts" / "model_card.json").read_text())["search"]["micro_batch"] == 3
    for whole, parts in zip(*(each.values() for each in weights), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    set_trial_attr(url, "micro_batch", 9)
    with pytest.raises(StudyError, match="must be as 'tuner run' stored it"):
        best_params("sides", storage=url)


def test_train_best_starts_from_the_weights_of_the_search(tmp_path: Path) -> None:
    """Frozen layers still hold what the file gave them, and another file in its place is refused."""
    torch.manual_seed(1)
    save_file(SmallCNN(num_classes=5, image_size=12).state_dict(), tmp_path / "start.safetensors")
    url = store_example(tmp_path, backbones={SMALL_CNN: {"weights": "start.safetensors"}})
    train_best("sides", tmp_path / "out", storage=url, device="cpu")
    start, end = (load_file(path) for path in (tmp_path / "start.safetensors", tmp_path / "out" / "model.safetensors"))
    assert torch.equal(end["conv2.weight"], start["conv2.weight"])
    assert not torch.equal(end["fc1.weight"], start["fc1.weight"])
    torch.manual_seed(2)
    save_file(SmallCNN(num_classes=5, image_size=12).state_dict(), tmp_path / "start.safetensors")
    with pytest.raises(ModelError, match=rf'^backbones\."{SMALL_CNN}"\.weights: must be the weights of the study, got'):
        train_best("sides", tmp_path / "out", storage=url, device="cpu")


def test_train_best_pretrains_as_the_search_did(tmp_path: Path) -> None:
    """Frozen layers hold what pretraining gave them; it runs again only where the cache has lost it."""
    source = {"source": "image_folder", "path": "images", "image_size": 12}
    url = store_example(tmp_path, pretraining={"data": source, "epochs": 1})
    announced: list[list[str]] = [[], []]
    for lines in announced:
        train_best("sides", tmp_path / "out", storage=url, device="cpu", announce=lines.append)
    path, _ = find_pretrained(SMALL_CNN, make_spec(tmp_path, pretraining={"data": source, "epochs": 1}))
    assert [line for line in announced[0] if line.startswith(f"pretraining {SMALL_CNN}, epoch 1: ")]
    assert not any(line.startswith("pretraining") for line in announced[1])
    end = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(end["conv2.weight"], load_file(path)["conv2.weight"])


def test_train_best_tells_a_recipe_that_diverges(tmp_path: Path) -> None:
    """A loss that is no number ends the command in one line; the test split was not looked at."""
    url = store_example(tmp_path, space={"lr": {"low": 1e20, "high": 1e21, "log": True}})
    with pytest.raises(ModelError, match=r"^trial 0: its recipe must converge on train too, got: training loss"):
        train_best("sides", tmp_path / "out", storage=url, device="cpu")
    assert list_openings("sides", storage=url) == []
    assert not (tmp_path / "out").exists()


def test_train_best_records_every_look_at_test(tmp_path: Path) -> None:
    """The study remembers when and why, and the second look is told of the first."""
    url = store_example(tmp_path)
    lines: list[str] = []
    for name in ("first", "second"):
        train_best("sides", tmp_path / name, storage=url, device="cpu", announce=lines.append)
    openings = list_openings("sides", storage=url)
    assert [opening["reason"] for opening in openings] == [
        f"train: trial 0 to {tmp_path / name}" for name in ("first", "second")
    ]
    assert read_attrs(url)[OPENINGS_ATTR] == openings
    looks = [line for line in lines if line.startswith("looking at test")]
    assert looks[0] == "looking at test once: 10 images"
    assert looks[1].startswith("looking at test once: 10 images; earlier looks: 1, ")


def test_train_best_names_test_images_that_the_model_has_seen(tmp_path: Path) -> None:
    """Before it trains: the same file, and one that was saved again; both are in metrics.json."""
    write_images(tmp_path / "images")
    spec = make_spec(tmp_path)
    before = read_study_data(spec)
    tests, trains, (seen, *_) = (
        [before.index.names[row] for row in np.flatnonzero(before.splits == split)]
        for split in (Split.TEST, Split.TRAIN, Split.VAL)
    )
    (tmp_path / "images" / tests[3]).write_bytes((tmp_path / "images" / seen).read_bytes())
    with Image.open(tmp_path / "images" / trains[2]) as image:
        image.save(tmp_path / "images" / tests[1], "BMP")
    url = store_study(tmp_path, spec)
    lines: list[str] = []
    result = train_best("sides", tmp_path / "out", storage=url, device="cpu", announce=lines.append)
    assert result.test_duplicates == Duplicates(exact=((tests[3], seen),), near=((tests[1], trains[2]),))
    assert [line.split(" of test")[0] for line in lines[:2]] == [
        "exact duplicates: 1 image",
        "near duplicates (the same picture saved again): 1 image",
    ]
    assert lines[2].startswith("retraining")
    expected = {"exact": [[tests[3], seen]], "near": [[tests[1], trains[2]]]}
    assert read_metrics(tmp_path / "out")["test_duplicates"] == expected


def test_train_best_without_a_test_split_has_no_unbiased_number(tmp_path: Path) -> None:
    """Test is null, there is no picture, nothing is recorded, and it is said."""
    url = store_example(tmp_path, test_fraction=None)
    lines: list[str] = []
    result = train_best("sides", tmp_path / "out", storage=url, device="cpu", announce=lines.append)
    assert result.test is None
    assert read_metrics(tmp_path / "out")["test"] is None
    assert not (tmp_path / "out" / "confusion_matrix.png").exists()
    assert list_openings("sides", storage=url) == []
    assert lines[0].startswith("no test split: no unbiased number")
    assert describe_result(result).splitlines()[1] == "no test split: no unbiased number"


@pytest.mark.parametrize("change", ["added", "removed", "resized"])
def test_train_best_refuses_changed_data(tmp_path: Path, change: str) -> None:
    """Images that came, went or changed since the search make it another study."""
    url = store_example(tmp_path)
    folder = tmp_path / "images" / CLASSES[0]
    data = read_study_data(make_spec(tmp_path))
    searched = next(row for row in np.flatnonzero(data.splits != Split.TEST))
    match change:
        case "added":
            Image.new("RGB", (12, 12)).save(folder / "new.png")
        case "removed":
            (folder / "00.png").unlink()
        case "resized":
            Image.new("RGB", (30, 30)).save(tmp_path / "images" / data.index.names[searched])
    with pytest.raises(DataError, match=r"^data: must be the images of the study, got other images, labels or splits"):
        train_best("sides", tmp_path / "out", storage=url, device="cpu")
    assert not (tmp_path / "out").exists()


def test_train_best_shows_unreadable_test_images_before_training(tmp_path: Path) -> None:
    """A broken test split costs no training, and no number was seen."""
    url = store_example(tmp_path)
    data = read_study_data(make_spec(tmp_path))
    for row in np.flatnonzero(data.splits == Split.TEST):
        (tmp_path / "images" / data.index.names[row]).write_bytes(b"broken")
    lines: list[str] = []
    with pytest.raises(DataError, match=r"^data\.max_bad_fraction: at most 0\.01 .* got 10 of 10: "):
        train_best("sides", tmp_path / "out", storage=url, device="cpu", announce=lines.append)
    assert lines == []
    assert list_openings("sides", storage=url) == []


def test_train_best_wants_a_completed_trial(tmp_path: Path) -> None:
    """A study whose trials were all pruned has no recipe."""
    url = store_example(tmp_path, accuracies=())
    with pytest.raises(ExportError, match=r"^study 'sides': at least one trial must have completed, got none"):
        train_best("sides", tmp_path / "out", storage=url, device="cpu")


def test_train_best_wants_a_stored_study(tmp_path: Path) -> None:
    """A name that is nearly right is recognised."""
    url = store_example(tmp_path)
    with pytest.raises(StudyError, match=r"^study 'side': must be in the storage; did you mean 'sides'\?$"):
        train_best("side", tmp_path / "out", storage=url, device="cpu")


def test_train_best_refuses_the_place_first(tmp_path: Path) -> None:
    """A folder of the user's own is refused before even the study is read, and left as it was."""
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(ExportError, match=r"must be new, empty or an older model folder, got a folder with photo"):
        train_best("nothing", tmp_path, storage=f"sqlite:///{tmp_path}/none.db", device="cpu")
    with pytest.raises(
        ExportError, match=r"must lie in a folder that can be written, got '.*photo\.jpg' \(Not a directory\)$"
    ):
        train_best("nothing", tmp_path / "photo.jpg" / "out", storage=f"sqlite:///{tmp_path}/none.db", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_train_best_imports_a_users_function_only_if_allowed(tmp_path: Path) -> None:
    """A stored study alone never makes a command import code."""
    backbone = "tests.unit.production.test_retrain:build_own"
    training = {"backbone": backbone, "batch_size": 8, "unfrozen_layers": 1, "epochs": 2}
    url = store_example(tmp_path, training=training)
    with pytest.raises(ModelError, match=rf"^study 'sides': must have a backbone of timm or tuner.*'{backbone}'"):
        train_best("sides", tmp_path / "out", storage=url, device="cpu")
    result = train_best("sides", tmp_path / "out", storage=url, device="cpu", allow_code=True)
    assert result.test is not None


def test_train_best_refuses_a_device_that_is_not_there(tmp_path: Path) -> None:
    """Nothing falls back to the CPU."""
    url = store_example(tmp_path)
    with pytest.raises(DeviceError, match=r"^device: must .* got 'cuda:99'"):
        train_best("sides", tmp_path / "out", storage=url, device="cuda:99")


def test_describe_result_says_what_to_type_next(tmp_path: Path) -> None:
    """The number with its interval, and a command that can be pasted."""
    url = store_example(tmp_path)
    result = train_best("sides", tmp_path / "my model", storage=url, device="cpu")
    lines = describe_result(result).splitlines()
    assert lines[1].startswith(f"test accuracy {result.to_json()['test']['accuracy']:.4f} (95 % interval ")
    assert lines[-1] == f"next: tuner predict '{tmp_path}/my model' IMAGES…"


def test_check_place_refuses_a_name_that_is_too_long(tmp_path: Path) -> None:
    """The file system's own limit is no bug of ours."""
    with pytest.raises(ExportError, match="File name too long"):
        check_place(tmp_path / ("x" * 300))
