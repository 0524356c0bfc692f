"""Image files from strangers, over the command line: bombs, pipes and names that no disk takes."""

import os
from pathlib import Path

import pytest

from tests.e2e.mistakes import fail
from tests.unit.data.test_decode import make_png, make_text_bomb
from tests.unit.production.test_predictor import write_model
from tuner.cli.main import run_command
from tuner.errors import EXIT_SKIPPED, SpecError


@pytest.fixture
def images(folder: Path) -> Path:
    """Return a folder of twelve images, among them two bombs, a pipe and a device."""
    (folder / "images/cat/0.png").write_bytes(make_png(60_000, 4_000))
    (folder / "images/cat/1.png").write_bytes(make_text_bomb())
    for name in ("0", "1"):
        (folder / f"images/dog/{name}.png").unlink()
    os.mkfifo(folder / "images/dog/0.png")
    (folder / "images/dog/1.png").symlink_to("/dev/zero")
    return folder / "images"


def test_init_looks_at_the_other_images(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be opened has no size; the study file is written all the same."""
    assert run_command(["init", str(images)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "12 images in 2 classes" in captured.out
    assert "the images' shorter side is 8 px (median)" in Path("images.toml").read_text()


def test_predict_skips_them(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is named with its reason; the others are classified."""
    write_model(images.parent / "model")
    code, said = fail(capsys, "predict", "model", "images", "--device", "cpu")
    assert code == EXIT_SKIPPED
    reasons = dict(line.removeprefix("skipped ").split(": ", 1) for line in said.splitlines())
    assert sorted(reasons) == [f"images/{name}.png" for name in ("cat/0", "cat/1", "dog/0", "dog/1")]
    assert "exceeds limit" in reasons["images/cat/0.png"]
    assert "MAX_TEXT_CHUNK" in reasons["images/cat/1.png"]
    assert reasons["images/dog/0.png"] == "must be a file, got a pipe"
    assert reasons["images/dog/1.png"] == "must be a file, got a device"


def test_init_refuses_a_name_that_no_disk_takes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder may have a longer name than the file that is named after it."""
    name = "\u00e9" * 127
    (folder / "images").rename(folder / name)
    code, said = fail(capsys, "init", name)
    assert code == SpecError.exit_code
    assert said == f"error: {name}.toml: must be a file that can be written, got: File name too long\n"


def test_init_writes_through_no_link(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link that leads nowhere is there, too."""
    (folder / "images.toml").symlink_to(folder / "elsewhere")
    code, said = fail(capsys, "init", "images")
    assert code == SpecError.exit_code
    assert said == "error: images.toml: must not exist yet; --out names another file\n"
    assert not (folder / "elsewhere").exists()
