"""Tests of tuner.spec.study."""

import re
from pathlib import Path

import pytest

from tuner.errors import SpecError
from tuner.spec.sections import StudySpec
from tuner.spec.study import load_spec

from .builders import MINIMAL, parse

ISSUE_EXAMPLE = """
[study]
name = "pets"
storage = "sqlite:///studies.db"
objective = "val_accuracy"
seed = 0
[data]
source = "image_folder"
path = "data/pets"
image_size = 224
resize = "squash"
val_fraction = 0.2
test_fraction = 0.2
max_bad_fraction = 0.01
[space]
backbone = { choices = ["resnet50.a1_in1k", "mobilenetv2_100"] }
lr = { low = 1e-5, high = 1e-1, log = true }
batch_size = { choices = [16, 32, 64, 128] }
unfrozen_layers = { low = 1, high = "all" }
augmentation_strength = { low = 0.0, high = 1.0, step = 0.25 }
[backbones."mobilenetv2_100"]
weights = "weights/mobilenetv2_100.safetensors"
kwargs = { pad_type = "same", bn_eps = 1e-3 }
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
[training]
epochs = 12
optimizer = "adamw"
horizontal_flip = true
class_weights = "none"
[search]
sampler = "tpe"
pruner = "median"
n_trials = 60
timeout = "2h"
[workers]
devices = "auto"
per_device = 1
"""


def load(folder: Path, text: str) -> StudySpec:
    """Write a study file and load it."""
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return load_spec(path)


def test_load_spec_reads_every_documented_key(tmp_path: Path) -> None:
    """The whole documented study file is accepted, and its values arrive."""
    spec = load(tmp_path, ISSUE_EXAMPLE)
    assert list(spec.space) == ["backbone", "lr", "batch_size", "unfrozen_layers", "augmentation_strength"]
    assert spec.search.timeout == 7200
    assert spec.training.epochs == 12
    assert spec.backbones["mobilenetv2_100"].kwargs == {"pad_type": "same", "bn_eps": 1e-3}


def test_load_spec_makes_paths_absolute_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the study file, wherever the command runs."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "study.toml").write_text(
        ISSUE_EXAMPLE + '[pretraining.data]\nsource = "csv"\npath = "../images.csv"\n', encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = load_spec("../study.toml")
    assert spec.data.path == str(tmp_path / "data/pets")
    assert spec.backbones["mobilenetv2_100"].weights == str(tmp_path / "weights/mobilenetv2_100.safetensors")
    assert spec.pretraining is not None
    assert spec.pretraining.data.path == str(tmp_path.parent / "images.csv")


def test_load_spec_leaves_random_weights_alone(tmp_path: Path) -> None:
    """The word "random" is no path."""
    spec = load(tmp_path, MINIMAL + '[backbones.test_vit]\nweights = "random"\n')
    assert spec.backbones["test_vit"].weights == "random"


def test_load_spec_takes_a_byte_order_mark(tmp_path: Path) -> None:
    """What some editors put in front of a text file is no mistake of the user's."""
    assert load(tmp_path, "\ufeff" + MINIMAL).study.name == "small"


def test_load_spec_reports_all_problems_at_once(tmp_path: Path) -> None:
    """Nobody repairs a file one message at a time; problems come in the order of checking, each on its line."""
    text = (
        MINIMAL.replace('"digits"', '"digit"') + "lr = { low = 2, high = 1 }\n[serch]\n[training]\nepoch = 3\nlr = 0\n"
    )
    with pytest.raises(SpecError) as caught:
        load(tmp_path, text)
    assert caught.value.problems == (
        "serch: unknown key; did you mean 'search'?",
        "data.source: must be one of digits, image_folder, csv, torchvision, got 'digit'; did you mean 'digits'?",
        "training.epoch: unknown key; did you mean 'epochs'?",
        "space.lr: low must not exceed high, got low = 2, high = 1",
        "training.lr: must stand in [space] or in [training], not in both",
        "training.lr: must be greater than 0, got 0",
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[study", "must be TOML, got: Expected ']' at the end of a table declaration"),
        (b"[study]\nname = \xff", "must be a readable study file, got: it is not UTF-8 text"),
    ],
)
def test_load_spec_says_why_a_file_is_none(tmp_path: Path, content: bytes, problem: str) -> None:
    """Broken TOML and other encodings are told apart."""
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=re.escape(f"{path}: {problem}")):
        load_spec(path)


def test_load_spec_points_from_a_folder_to_init(tmp_path: Path) -> None:
    """A folder in place of the file is what ``tuner init`` takes."""
    with pytest.raises(SpecError, match=r"must be a readable study file, got: Is a directory; 'tuner init FOLDER'"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("path", "reason"), [("~nobody-here/x", "Could not determine home directory."), ("a\\u0000b", "embedded null")]
)
def test_load_spec_refuses_impossible_paths(tmp_path: Path, path: str, reason: str) -> None:
    """A home that does not exist and a NUL are problems of the file."""
    text = MINIMAL.replace('source = "digits"', f'source = "csv"\npath = "{path}"')
    with pytest.raises(SpecError, match=re.escape("data.path: must be a path, got")) as caught:
        load(tmp_path, text)
    assert reason in str(caught.value)


def test_parse_spec_keeps_the_order_of_the_space() -> None:
    """Optuna's distributions come in the order of the file."""
    assert list(parse("lr = { low = 0.1, high = 0.2 }\ndropout = { choices = [0.1] }").space) == [
        "backbone",
        "lr",
        "dropout",
    ]
