"""A copy of a training image in val is named before the search; test stays locked until ``tuner train``."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.mistakes import write_study
from tuner.cli.main import run_command


@pytest.fixture
def images(folder: Path) -> Path:
    """Eight noisy images of each class in given splits, test among them."""
    shutil.rmtree(folder / "images")
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{number}.png")
    return folder / "images"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run a command that must succeed; return the lines that speak of duplicates."""
    code = run_command(list(arguments))
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert code == 0, text
    return [line for line in text.splitlines() if "duplicates" in line]


def test_copies_in_val_are_named_and_those_in_test_only_by_train(
    folder: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exact ones before a run decodes, near ones as it does, and both by check afterwards; each kind in one line."""
    shutil.copy(images / "train/cat/2.png", images / "val/dog/1.png")
    shutil.copy(images / "train/cat/1.png", images / "test/cat/0.png")
    for old, new in (("train/dog/3.png", "val/dog/0.png"), ("val/cat/2.png", "test/dog/3.png")):
        with Image.open(images / old) as image:
            image.save(images / new, "BMP")
    exact = "exact duplicates: 1 image of {0} in {1} too, which makes {0} too easy: "
    near = "near duplicates (the same picture saved again): 1 image of {0} in {1} too, which makes {0} too easy: "
    of_val = [
        f"{exact.format('val', 'train')}'val/dog/1.png' is 'train/cat/2.png'",
        f"{near.format('val', 'train')}'val/dog/0.png' is 'train/dog/3.png'",
    ]
    study = write_study(folder)
    assert call(capsys, "run", study) == of_val
    assert call(capsys, "check", study) == of_val
    assert call(capsys, "train", "bad", "--out", "model", "--device", "cpu") == [
        f"{exact.format('test', 'train + val')}'test/cat/0.png' is 'train/cat/1.png'",
        f"{near.format('test', 'train + val')}'test/dog/3.png' is 'val/cat/2.png'",
    ]
