"""The model folder: what is written is read again, and what is broken is said."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from tuner.errors import ExportError, ModelError
from tuner.models.backbone import create_backbone
from tuner.spec.sections import BackboneSection
from tuner.training.package import Manifest, check_replaceable, read_manifest, read_package, write_package

from .builders import PREPROCESSING, make_params


def make_manifest(**overrides: Any) -> Manifest:
    """Return the manifest of a small net of two classes."""
    manifest = Manifest(
        backbone="tuner:small_cnn",
        preprocessing=PREPROCESSING,
        classes=("cat", "dög"),
        image_size=16,
        resize="squash",
        params=make_params(backbone="tuner:small_cnn"),
        provenance={"study": "pets", "trial": 3, "value": 0.5},
    )
    return replace(manifest, **overrides)


def make_model(manifest: Manifest, seed: int = 0) -> nn.Module:
    """Return a model that fits a manifest."""
    torch.manual_seed(seed)
    section = BackboneSection(weights="random", kwargs=manifest.kwargs)
    return create_backbone(manifest.backbone, section, n_classes=len(manifest.classes), image_size=manifest.image_size)


def write_example(folder: Path, seed: int = 0, **overrides: Any) -> nn.Module:
    """Write a model folder and return its model."""
    manifest = make_manifest(**overrides)
    model = make_model(manifest, seed)
    write_package(folder, model, manifest)
    return model


@pytest.mark.parametrize(
    ("backbone", "kwargs"), [("tuner:small_cnn", {}), ("test_resnet", {"drop_rate": 0.1}), ("test_vit", {})]
)
def test_read_package_gives_the_logits_of_the_written_model(
    tmp_path: Path, backbone: str, kwargs: dict[str, Any]
) -> None:
    """Weights, buffers and keyword arguments come back, whatever the seed of the moment."""
    model = write_example(tmp_path / "out", backbone=backbone, kwargs=kwargs, image_size=32).eval()
    torch.manual_seed(99)
    loaded, manifest = read_package(tmp_path / "out")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert manifest == make_manifest(backbone=backbone, kwargs=kwargs, image_size=32)


def test_write_package_leaves_two_files_and_nothing_beside(tmp_path: Path) -> None:
    """Safetensors and JSON, no pickle, no temporary folder."""
    write_example(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_write_package_replaces_an_older_model_folder(tmp_path: Path) -> None:
    """The second model is what is read, with the files that were added."""
    write_example(tmp_path / "out", seed=1)
    manifest = make_manifest()
    model = make_model(manifest, seed=2)
    write_package(tmp_path / "out", model, manifest, lambda folder: (folder / "metrics.json").touch())
    loaded, _ = read_package(tmp_path / "out")
    assert torch.equal(next(loaded.parameters()), next(model.parameters()))
    assert (tmp_path / "out" / "metrics.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_write_package_keeps_the_older_folder_when_writing_fails(tmp_path: Path) -> None:
    """A full disk, say, costs nothing that was there."""
    older = write_example(tmp_path / "out", seed=1)

    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    manifest = make_manifest()
    with pytest.raises(ExportError, match=r"out: must be a folder that can be written, got: No space left on device$"):
        write_package(tmp_path / "out", make_model(manifest, seed=2), manifest, fail)
    loaded, _ = read_package(tmp_path / "out")
    assert torch.equal(next(loaded.parameters()), next(older.parameters()))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["thesis.tex"], r"got a folder with thesis\.tex$"),
        (["model.json", "thesis.tex", ".git"], r"got a folder with \.git, thesis\.tex$"),
        (["model.safetensors"], r"must be a model folder with a model\.json, got none"),
    ],
)
def test_write_package_never_replaces_other_files(tmp_path: Path, names: list[str], problem: str) -> None:
    """Only what holds nothing but a model of ours is replaced; model.json is a common name."""
    for name in names:
        (tmp_path / name).write_text("precious")
    manifest = make_manifest()
    with pytest.raises(ExportError, match=problem):
        write_package(tmp_path, make_model(manifest), manifest)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "precious")


def test_write_package_does_not_replace_a_file(tmp_path: Path) -> None:
    """The user's photo stays."""
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(ExportError, match=r"must be new, empty or an older model folder, got a file$"):
        write_example(tmp_path / "photo.jpg")
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_write_package_does_not_replace_another_programs_model_json(tmp_path: Path) -> None:
    """TensorFlow.js calls its file model.json, too."""
    (tmp_path / "model.json").write_text('{"modelTopology": 1}')
    manifest = make_manifest()
    with pytest.raises(ModelError, match="must be a manifest that 'tuner train' wrote"):
        write_package(tmp_path, make_model(manifest), manifest)
    assert (tmp_path / "model.json").read_text() == '{"modelTopology": 1}'


def test_write_package_takes_class_names_that_are_no_utf8(tmp_path: Path) -> None:
    """A folder unpacked from an old zip may be named in another encoding."""
    write_example(tmp_path / "out", classes=("caf\udce9", "tea"))
    assert read_manifest(tmp_path / "out").classes == ("caf\udce9", "tea")


def test_write_package_says_when_safetensors_cannot_write(tmp_path: Path) -> None:
    """Safetensors' own error is the folder's problem, not the trial's."""
    manifest = make_manifest()

    def vanish(temporary: Path) -> None:
        raise SafetensorError(f"I/O error: {temporary}")

    with pytest.raises(ExportError, match="must be a folder that can be written, got: I/O error"):
        write_package(tmp_path / "out", make_model(manifest), manifest, vanish)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_closed_folders_are_no_model_folders(tmp_path: Path) -> None:
    """Neither to read from nor to write to: one line, before anything is trained."""
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ExportError, match=r"must be a model folder with a model\.json, got none"):
        read_manifest(tmp_path / "closed/model")
    with pytest.raises(ExportError, match=r"must be a folder that can be written, got: Permission denied$"):
        check_replaceable(tmp_path / "closed/model")


def test_check_replaceable_refuses_a_name_that_no_disk_takes(tmp_path: Path) -> None:
    """It is said before the training, and not after it."""
    with pytest.raises(ExportError, match=r"must be a folder that can be written, got: File name too long$"):
        check_replaceable(tmp_path / ("x" * 256))


def test_read_package_wants_a_model_folder(tmp_path: Path) -> None:
    """An empty folder and none at all are told alike."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            ExportError, match=r"must be a model folder with a model\.json, got none; 'tuner train' writes"
        ):
            read_package(folder)


def test_read_package_wants_the_weights(tmp_path: Path) -> None:
    """A manifest alone is no model."""
    write_example(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"model\.safetensors: must be a file, got nothing"):
        read_package(tmp_path / "out")


def test_read_package_tells_cut_weights(tmp_path: Path) -> None:
    """Half a file is no model."""
    write_example(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: must hold whole safetensors, got: "):
        read_package(tmp_path / "out")


def test_read_package_tells_weights_of_another_model(tmp_path: Path) -> None:
    """A manifest that does not fit its weights is an error, head included."""
    write_example(tmp_path / "out")
    path = tmp_path / "out" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": ["a", "b", "c"]}))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_package(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, r"ValueError: format must be 1, got 2"),
        ({"params": {}}, r"TypeError: .*missing"),
        ({"backbone_section": {"kwargs": {}}}, r"ValueError: backbone_section must hold mean, std and interpolation"),
        ({"backbone_section": {"kwargs": 3}}, r"ValidationError: "),
        ({"classes": 5}, r"TypeError: "),
        ({"image_size": float("inf")}, r"OverflowError: "),
        ({"image_size": 2049}, r"ValueError: image_size must lie in \[8, 2048\], got 2049"),
        ({"image_size": -8}, r"ValueError: image_size must lie in \[8, 2048\], got -8"),
        ({"params": []}, r"[A-Z]\w+Error: "),
        ({"provenance": 5}, r"TypeError: "),
    ],
)
def test_read_manifest_tells_what_is_broken(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    """One line, with the file and the reason."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps(make_manifest().to_json() | change))
    with pytest.raises(ModelError, match=rf"model\.json: must be a manifest that 'tuner train' wrote, got {reason}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", pytest.param("[" * 100_000, id="deep"), "3"])
def test_read_manifest_tells_other_json(tmp_path: Path, text: str) -> None:
    """What is no manifest at all is told in the same words."""
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.json: must be a manifest that 'tuner train' wrote, got "):
        read_manifest(tmp_path)


def test_read_package_runs_no_code_unasked(tmp_path: Path) -> None:
    """A folder from somewhere names a function; importing it takes the user's word."""
    backbone = "tests.unit.training.test_package:build_linear"
    write_example(tmp_path / "out", backbone=backbone)
    with pytest.raises(
        ModelError, match=rf"must have a backbone of timm or tuner, got the function '{backbone}'; allow"
    ):
        read_package(tmp_path / "out")
    loaded, _ = read_package(tmp_path / "out", allow_code=True)
    assert isinstance(loaded, nn.Sequential)


def build_linear(num_classes: int, **_: Any) -> nn.Module:
    """Return a user's own backbone."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))
