"""Tests of tuner.production.export: what each program that is exported for makes of the folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from tuner.cli.main import run_command
from tuner.data.decode import decode_image
from tuner.data.image_set import ImageSet
from tuner.errors import ExportError, ModelError
from tuner.production.export import Exported, export_model
from tuner.training.batches import predict_logits
from tuner.training.package import read_package

from .builders import CLASSES, SMALL_CNN
from .test_predictor import PREPROCESSING, write_model

DATA: Any = timm.data
"""Any, since timm has types but does not say which of its names are public."""
SIDE = 32
OWN = f"{__name__}:build_own"


def build_own(num_classes: int) -> nn.Module:
    """Return a user's own backbone."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, num_classes))


class FixedBatch(nn.Module):
    """Takes two images at a time and no other number."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * SIDE * SIDE, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.fc(images.reshape(2, 3 * SIDE * SIDE))
        return logits


def build_fixed(num_classes: int) -> nn.Module:
    """Return a backbone that cannot be traced for any number of images."""
    return FixedBatch(num_classes)


def export(
    tmp_path: Path, form: str, *, backbone: str = "test_resnet", resize: str = "squash", **options: Any
) -> Exported:
    """Export a random model of ``tmp_path/model`` to ``tmp_path/out``."""
    write_model(tmp_path / "model", backbone=backbone, resize=resize, image_size=SIDE)
    return export_model(tmp_path / "model", tmp_path / "out", form=form, **options)


@pytest.mark.parametrize("form", ["onnx", "torch"])
@pytest.mark.parametrize("told", [("bfloat16", {}), ("auto", {"device": "cuda:0", "computed_in": "bfloat16"})])
def test_graph_of_a_model_that_computes_in_bfloat16_says_that_it_does_not(
    tmp_path: Path, form: str, told: tuple[str, dict[str, str]]
) -> None:
    """Its probabilities are not to the last digit those of ``tuner predict``."""
    place = write_model(tmp_path / "model", backbone="test_resnet", image_size=SIDE)
    manifest = json.loads((place / "model.json").read_text())
    manifest["params"]["precision"] = told[0]
    manifest["provenance"] |= told[1]
    (place / "model.json").write_text(json.dumps(manifest))
    (note,) = export_model(place, tmp_path / "out", form=form).notes
    assert "computes in float32" in note
    assert export(tmp_path / "other", form).notes == ()


def draw_image(width: int = 96, height: int = 64) -> Image.Image:
    """Return noise that is not square, and is resized to whole pixels."""
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def compute_own_logits(tmp_path: Path, image: Image.Image) -> Tensor:
    """Return what this tool makes of an image, shape ``(1, n_classes)``: what its predictor takes the softmax of."""
    model, manifest = read_package(tmp_path / "model", allow_code=True)
    given = manifest.preprocessing
    pixels = decode_image(
        image.copy(), size=manifest.image_size, resize=manifest.resize, interpolation=given.interpolation
    )
    batch = ImageSet(
        pixels=torch.from_numpy(pixels[None]),
        labels=torch.zeros(1, dtype=torch.int64),
        n_classes=2,
        rows=torch.arange(1),
    )
    return predict_logits(model, batch, given, torch.device("cpu"), precision="auto")


def normalise(image: Image.Image, description: dict[str, Any]) -> Tensor:
    """Prepare an image by ``preprocessing.json`` alone, as a stranger would."""
    told = description["image"]
    image = image.convert(told["mode"])
    width, height = image.size
    side, kernel = told["size"], {"bicubic": Image.Resampling.BICUBIC}[told["interpolation"]]
    if told["resize"] == "squash":
        image = image.resize((side, side), kernel)
    else:
        scale = side / min(width, height)
        image = image.resize((round(width * scale), round(height * scale)), kernel)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    values = (np.asarray(image) / 255 - told["mean"]) / told["std"]
    return torch.tensor(values.transpose(2, 0, 1)[None], dtype=getattr(torch, description["input"]["dtype"]))


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Compare logits to 1e-4; they differ between the classes, so that a model that says nothing would not pass."""
    assert float((wanted[0, 0] - wanted[0, 1]).abs()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_timm_loads_the_weights_of_its_own_model(tmp_path: Path, resize: str) -> None:
    """``timm.create_model`` with ``checkpoint_path`` and the args' mean, std and size gives our logits."""
    exported = export(tmp_path, "timm", resize=resize)
    path = str(exported.folder / "model.safetensors")
    model = timm.create_model("test_resnet", num_classes=2, checkpoint_path=path).eval()
    transform = DATA.create_transform(
        input_size=(3, SIDE, SIDE),
        mean=PREPROCESSING.mean,
        std=PREPROCESSING.std,
        interpolation=PREPROCESSING.interpolation,
        crop_pct=1.0,
        crop_mode="squash" if resize == "squash" else "center",
    )
    with torch.no_grad():
        found = model(transform(draw_image())[None])
    assert_same(found, compute_own_logits(tmp_path, draw_image()))


@pytest.mark.parametrize(("backbone", "resize"), [("test_resnet", "squash"), ("test_vit", "crop")])
def test_hf_folder_is_loaded_by_timm(tmp_path: Path, backbone: str, resize: str) -> None:
    """``local-dir:`` brings the weights, the image size of fixed-size models, and the preprocessing."""
    exported = export(tmp_path, "hf", backbone=backbone, resize=resize)
    model: Any = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    transform = DATA.create_transform(**DATA.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        found = model(transform(draw_image())[None])
    assert_same(found, compute_own_logits(tmp_path, draw_image()))
    assert list(model.pretrained_cfg["label_names"]) == list(CLASSES)
    assert bool(exported.notes) is (resize == "crop")


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_hf_folder_is_loaded_by_transformers(tmp_path: Path, resize: str) -> None:
    """Its image processor and its model give our logits, and its labels are our classes."""
    import transformers

    exported = export(tmp_path, "hf", resize=resize)
    package: Any = transformers
    processor = package.AutoImageProcessor.from_pretrained(exported.folder)
    model = package.AutoModelForImageClassification.from_pretrained(exported.folder).eval()
    assert type(model).__name__ == "TimmWrapperForImageClassification"
    with torch.no_grad():
        found = model(**processor(draw_image())).logits
    assert_same(found, compute_own_logits(tmp_path, draw_image()))
    assert model.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize(("backbone", "resize"), [("test_resnet", "crop"), (SMALL_CNN, "squash")])
def test_onnx_runs_in_onnxruntime(tmp_path: Path, backbone: str, resize: str) -> None:
    """Any number of images; what the file says of its preprocessing is all that one needs."""
    exported = export(tmp_path, "onnx", backbone=backbone, resize=resize, allow_code=True)
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx", providers=["CPUExecutionProvider"])
    inside = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    assert inside == json.loads((exported.folder / "preprocessing.json").read_text(encoding="utf-8"))
    assert (session.get_inputs()[0].name, session.get_inputs()[0].shape) == ("pixel_values", ["batch", 3, SIDE, SIDE])
    assert inside["classes"] == list(CLASSES)
    images = normalise(draw_image(), inside).repeat(3, 1, 1, 1)
    found = session.run([inside["output"]["name"]], {inside["input"]["name"]: images.numpy()})[0]
    wanted = compute_own_logits(tmp_path, draw_image())
    for row in range(3):
        assert_same(torch.from_numpy(found[row : row + 1]), wanted)


@pytest.mark.parametrize(("backbone", "resize"), [("test_resnet", "squash"), ("test_vit", "crop"), (OWN, "squash")])
def test_torch_loads_the_program(tmp_path: Path, backbone: str, resize: str) -> None:
    """``torch.export.load`` gives a module for any number of images, and the preprocessing as an extra file."""
    exported = export(tmp_path, "torch", backbone=backbone, resize=resize, allow_code=True)
    inside = {"preprocessing.json": ""}
    program = torch.export.load(exported.folder / "model.pt2", extra_files=inside)
    images = normalise(draw_image(), json.loads(inside["preprocessing.json"]))
    for n_images in (1, 5):
        found = program.module()(images.repeat(n_images, 1, 1, 1))
        assert found.shape == (n_images, 2)
        assert_same(found[-1:].detach(), compute_own_logits(tmp_path, draw_image()))


@pytest.mark.parametrize("form", ["timm", "hf"])
@pytest.mark.parametrize("backbone", [SMALL_CNN, OWN])
def test_what_is_not_timms_is_refused_by_its_formats(tmp_path: Path, form: str, backbone: str) -> None:
    """One line that says what works instead; nothing is written, no code is run."""
    what = f"--format {form}: must be given a backbone of timm, got .*; --format onnx or torch takes any$"
    with pytest.raises(ExportError, match=what):
        export(tmp_path, form, backbone=backbone)
    assert not (tmp_path / "out").exists()


def test_code_is_run_only_if_it_is_allowed(tmp_path: Path) -> None:
    """A model folder of a stranger's imports nothing."""
    with pytest.raises(ModelError, match=r"allow code \(--allow-code\) only if you trust"):
        export(tmp_path, "torch", backbone=OWN)


def test_model_for_one_number_of_images_is_refused(tmp_path: Path) -> None:
    """A graph that served two images only would fail in production."""
    with pytest.raises(ExportError, match=r"must be a model that torch\.export can trace for any number of images"):
        export(tmp_path, "onnx", backbone=f"{__name__}:build_fixed", allow_code=True)
    assert not (tmp_path / "out").exists()


def test_export_replaces_an_older_one_and_nothing_else(tmp_path: Path) -> None:
    """Another form takes its place whole; a folder with anything else stays as it is."""
    export(tmp_path, "torch")
    exported = export_model(tmp_path / "model", tmp_path / "out", form="timm")
    assert exported.files == ("args.yaml", "class_map.txt", "model.safetensors", "preprocessing.json")
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(
        ExportError, match=r"must be new, empty or an older exported folder, got a folder with mine\.txt"
    ):
        export_model(tmp_path / "model", tmp_path / "out", form="torch")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    with pytest.raises(ExportError, match=r"got a folder with model\.json"):
        export_model(tmp_path / "model", tmp_path / "model", form="torch")
    read_package(tmp_path / "model")


@pytest.mark.parametrize("named", ["config.json", "preprocessing.json"])
def test_names_alone_do_not_make_a_folder_ours(tmp_path: Path, named: str) -> None:
    """Another program's config.json is not deleted."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / named).write_text("{}")
    with pytest.raises(ExportError, match=f"got a folder with {named}"):
        export(tmp_path, "torch")
    assert (tmp_path / "out" / named).read_text() == "{}"


def test_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A file in the way is the user's mistake."""
    (tmp_path / "file").write_text("")
    write_model(tmp_path / "model", image_size=SIDE)
    for out in ("file", "file/below"):
        with pytest.raises(ExportError, match="must be a folder that can be written"):
            export_model(tmp_path / "model", tmp_path / out, form="torch")


def test_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the extra, exit code 7 and the command that installs it."""
    present = {"onnx": None, "onnxscript": None, "onnxruntime": object()}
    monkeypatch.setattr("tuner.production.export.find_spec", present.__getitem__)
    write_model(tmp_path / "model", image_size=SIDE)
    code = run_command(["export", str(tmp_path / "model"), "--format", "onnx", "--out", str(tmp_path / "out")])
    assert code == 7
    error = capsys.readouterr().err
    assert error == "error: --format onnx: must have onnx, onnxscript, got none; pip install 'tuner[export]'\n"


def test_command_says_what_it_wrote_and_what_is_different(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Notes go to stderr, the rest to stdout."""
    write_model(tmp_path / "model", backbone="test_resnet", image_size=SIDE)
    out = tmp_path / "out"
    assert run_command(["export", str(tmp_path / "model"), "--format", "timm", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"wrote {out}: args.yaml, class_map.txt, model.safetensors, preprocessing.json"
    assert "note: timm's train.py cannot express unfrozen_layers = 1 of 6" in said.err
    assert (out / "class_map.txt").read_text(encoding="utf-8").split() == list(CLASSES)
