"""A good study of twelve images, what turns it into a wrong one, and how a command must fail then.

Commands run in this process, which saves a second each; their workers are real ones. Mistakes in the study file need
no worker, mistakes in the data meet one before it has loaded torch.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tuner.cli.main import run_command

STUDY = """
[study]
name = "bad"
[data]
source = "image_folder"
path = "images"
image_size = 16
[space]
lr = { low = 1e-4, high = 1e-2, log = true }
[training]
backbone = "test_resnet"
batch_size = 4
epochs = 1
[backbones.test_resnet]
weights = "random"
[search]
n_trials = 1
[workers]
devices = "cpu"
"""

Edit = tuple[str, str]
Prepare = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """What is wrong in a folder, and the one line that says so."""

    what: str
    problem: str
    """FOLDER stands for the folder."""
    edits: tuple[Edit, ...] = ()
    """Texts of the study file and what replaces them."""
    prepare: Prepare = bool  # does nothing
    """Changes the folder."""


def write_images(root: Path, *names: str) -> None:
    """Write one small image per name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)


def replace_images(*names: str) -> Prepare:
    """Return what puts other images in the place of the twelve."""

    def prepare(folder: Path) -> None:
        shutil.rmtree(folder / "images")
        write_images(folder / "images", *names)

    return prepare


def write(name: str, content: str | bytes) -> Prepare:
    """Return what writes a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def write_study(folder: Path, *edits: Edit) -> str:
    """Write the good study file with some of its text replaced; return its path."""
    text = STUDY
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def use_backbone(name: str) -> tuple[Edit, ...]:
    """Return the edits that put another backbone, without a section, in the place of the study's."""
    return ('backbone = "test_resnet"', f'backbone = "{name}"'), ('[backbones.test_resnet]\nweights = "random"\n', "")


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command that must fail without a traceback; return its exit code and what it said on stderr."""
    code = run_command(list(arguments))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert code != 0, captured.out
    return code, captured.err


def expect(folder: Path, *problems: str) -> str:
    """Return the lines on stderr for some problems."""
    return "".join(f"error: {problem}\n" for problem in problems).replace("FOLDER", str(folder))
