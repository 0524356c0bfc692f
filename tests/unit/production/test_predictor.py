"""Tests of tuner.production.predictor."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tuner.data.decode import decode_image
from tuner.errors import DataError, DeviceError, ExportError, ModelError
from tuner.models.backbone import Preprocessing, create_backbone
from tuner.production.predictor import Predictor, find_images, load
from tuner.spec.sections import BackboneSection
from tuner.training.package import Manifest, read_package, write_package
from tuner.trial import TrialParams

from .builders import CLASSES, SMALL_CNN, write_images

PREPROCESSING = Preprocessing(mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7), interpolation="bicubic")


def build_own(num_classes: int) -> nn.Module:
    """Return a user's own backbone."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def write_model(folder: Path, *, backbone: str = SMALL_CNN, resize: str = "crop", image_size: int = 16) -> Path:
    """Write a model folder of random weights; return it."""
    params = TrialParams(
        backbone=backbone,
        lr=0.01,
        batch_size=8,
        unfrozen_layers=1,
        augmentation_strength=0.0,
        optimizer="adamw",
        weight_decay=0.0,
        layer_decay=1.0,
        label_smoothing=0.0,
        dropout=0.0,
        warmup_fraction=0.0,
        momentum=0.9,
        epochs=1,
        horizontal_flip=False,
        class_weights="none",
        seed=0,
    )
    manifest = Manifest(
        backbone=backbone,
        preprocessing=PREPROCESSING,
        classes=CLASSES,
        image_size=image_size,
        resize=resize,
        params=params,
    )
    torch.manual_seed(0)
    section = BackboneSection(weights="random")
    model = create_backbone(backbone, section, n_classes=len(CLASSES), image_size=image_size)
    write_package(folder, model, manifest)
    return folder


def load_example(tmp_path: Path) -> Predictor:
    """Return the predictor of a random model on the CPU."""
    return load(write_model(tmp_path / "model"), device="cpu")


@pytest.mark.parametrize("backbone", [SMALL_CNN, "test_resnet"])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_predict_gives_the_models_probabilities(tmp_path: Path, backbone: str, resize: str) -> None:
    """Each image alone, decoded and normalised by hand, gives the same as the batch."""
    folder = write_model(tmp_path / "model", backbone=backbone, resize=resize)
    write_images(tmp_path / "images", n_per_class=5, size=30)
    Image.new("L", (50, 20), 200).save(tmp_path / "images" / "wide.png")
    paths = find_images([tmp_path / "images"])
    predictions = load(folder, device="cpu").predict(paths, batch_size=4)
    model, _ = read_package(folder)
    assert [prediction.path for prediction in predictions] == paths
    for prediction in predictions:
        with Image.open(prediction.path) as image:
            pixels = decode_image(image, size=16, resize=resize, interpolation="bicubic")
        scaled = pixels.astype(np.float32) / 255
        normalised = (scaled - np.reshape((0.2, 0.3, 0.4), (3, 1, 1))) / np.reshape((0.5, 0.6, 0.7), (3, 1, 1))
        with torch.no_grad():
            expected = model(torch.tensor(normalised[None], dtype=torch.float32))[0].softmax(dim=0)
        assert list(prediction.probabilities) == list(CLASSES)
        assert list(prediction.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert prediction.label == CLASSES[int(expected.argmax())]
        assert prediction.probability == max(prediction.probabilities.values())


def test_predict_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """One at a time or all at once."""
    predictor = load_example(tmp_path)
    write_images(tmp_path / "images", n_per_class=4)
    paths = find_images([tmp_path / "images"])
    one, all_at_once = (predictor.predict(paths, batch_size=size) for size in (1, 100))
    for first, second in zip(one, all_at_once, strict=True):
        assert first.label == second.label
        assert first.probability == pytest.approx(second.probability, abs=1e-5)


def test_predict_tells_what_cannot_be_read(tmp_path: Path) -> None:
    """A bad file is an entry in its place, with one line on why; the others are classified."""
    predictor = load_example(tmp_path)
    good, text, empty, cut, absent = (
        tmp_path / name for name in ("good.png", "text.png", "empty.jpg", "cut.png", "no.png")
    )
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(good)
    text.write_text("hello")
    empty.write_bytes(b"")
    cut.write_bytes(good.read_bytes()[:2000])
    predictions = predictor.predict([text, good, empty, cut, absent, tmp_path], batch_size=2)
    errors = [prediction.error for prediction in predictions]
    assert errors[:3] == ["not an image", None, "not an image"]
    assert errors[3] is not None
    assert "truncated" in errors[3]
    assert errors[4:] == ["No such file or directory", "Is a directory"]
    assert predictions[1].label in CLASSES
    assert (predictions[0].label, predictions[0].probability, predictions[0].probabilities) == (None, None, {})


def test_predict_refuses_bombs_and_pipes(tmp_path: Path) -> None:
    """What would fill the memory or never end is a bad file like others."""
    (tmp_path / "bomb.pgm").write_bytes(b"P5 15000 10001 255\n")
    os.mkfifo(tmp_path / "pipe.png")
    bomb, pipe = load_example(tmp_path).predict([tmp_path / "bomb.pgm", tmp_path / "pipe.png"])
    assert bomb.error == "must have at most 150 megapixels, got 15000 x 10001 px"
    assert pipe.error == "must be a file, got a pipe"


def test_predict_survives_names_that_no_disk_takes(tmp_path: Path) -> None:
    """They are bad files among others, from the command line's paths on."""
    paths = find_images([tmp_path / ("x" * 256), "a\0b.png"])
    predictions = load_example(tmp_path).predict(paths)
    assert [prediction.error for prediction in predictions] == ["File name too long", "embedded null byte"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_predict_survives_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    """What is in it can be neither a folder nor a file."""
    (tmp_path / "closed").mkdir(mode=0)
    (prediction,) = load_example(tmp_path).predict(find_images([tmp_path / "closed/a.png"]))
    assert prediction.error == "Permission denied"


def test_predict_of_nothing_is_nothing(tmp_path: Path) -> None:
    """No paths and only bad paths need no model run."""
    predictor = load_example(tmp_path)
    assert predictor.predict([]) == []
    assert len(predictor.predict(["nowhere.png"])) == 1


def test_stream_reads_no_further_than_a_batch(tmp_path: Path) -> None:
    """Thousands of files are never in memory at once: paths are taken as they are needed."""
    predictor = load_example(tmp_path)
    taken: list[int] = []

    def list_paths() -> Iterator[Path]:
        for number in range(1000):
            taken.append(number)
            yield tmp_path / f"{number}.png"

    next(iter(predictor.stream(list_paths(), batch_size=10)))
    assert len(taken) == 10


def test_predict_refuses_a_batch_of_none(tmp_path: Path) -> None:
    """A batch size of 0 would never end."""
    with pytest.raises(ValueError, match=r"^batch_size: must be at least 1, got 0$"):
        load_example(tmp_path).predict(["a.png"], batch_size=0)


def test_prediction_to_json_is_json(tmp_path: Path) -> None:
    """Both kinds of prediction, as the command prints them."""
    predictor = load_example(tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    good, bad = predictor.predict([tmp_path / "a.png", tmp_path / "b.png"])
    assert json.loads(json.dumps(good.to_json())) == {
        "path": str(tmp_path / "a.png"),
        "label": good.label,
        "probability": good.probability,
        "probabilities": good.probabilities,
    }
    assert bad.to_json() == {"path": str(tmp_path / "b.png"), "error": "No such file or directory"}


def test_load_wants_a_model_folder(tmp_path: Path) -> None:
    """A folder of something else is told, and so is none."""
    for folder in (tmp_path, str(tmp_path / "nowhere")):
        with pytest.raises(ExportError, match=r"must be a model folder with a model\.json, got none"):
            load(folder, device="cpu")


def test_load_refuses_a_device_that_is_not_there(tmp_path: Path) -> None:
    """Nothing falls back to the CPU."""
    with pytest.raises(DeviceError, match=r"^device: must .* got 'cuda:99'"):
        load(write_model(tmp_path / "model"), device="cuda:99")


def test_load_imports_a_users_function_only_if_allowed(tmp_path: Path) -> None:
    """A model folder from somewhere runs no code unasked."""
    backbone = "tests.unit.production.test_predictor:build_own"
    folder = write_model(tmp_path / "model", backbone=backbone)
    with pytest.raises(ModelError, match=rf"must have a backbone of timm or tuner, got the function '{backbone}'"):
        load(folder, device="cpu")
    assert load(folder, device="cpu", allow_code=True).classes == CLASSES


def touch(root: Path, *names: str) -> None:
    """Make empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_find_images_lists_folders_and_keeps_files(tmp_path: Path) -> None:
    """Images at any depth, sorted, without hidden ones and other files; files and missing paths as they are given."""
    touch(tmp_path, "f/b.PNG", "f/a/z.jpg", "f/.hidden.png", "f/.cache/x.png", "f/notes.txt", "odd.xyz")
    given: list[str | Path] = [tmp_path / "odd.xyz", str(tmp_path / "f"), tmp_path / "missing.png"]
    assert find_images(given) == [
        tmp_path / "odd.xyz",
        tmp_path / "f/a/z.jpg",
        tmp_path / "f/b.PNG",
        tmp_path / "missing.png",
    ]


def test_find_images_wants_something_to_predict(tmp_path: Path) -> None:
    """Folders without images and no paths at all are mistakes."""
    touch(tmp_path, "notes.txt")
    with pytest.raises(DataError, match=rf"^images: must be image files or folders that hold some, got '{tmp_path}'; "):
        find_images([tmp_path])
    with pytest.raises(DataError, match=r"got no path; "):
        find_images([])
