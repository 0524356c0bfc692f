"""A stored study, or a model folder, imports no code of anyone's unless it is allowed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuner.cli.main import cli, run_command

from .builders import store_example

_MODULE = "backbone_of_a_stranger"
_CODE = """
from pathlib import Path

from torch import nn

Path(__file__).with_name("imported").touch()


def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4), nn.Linear(4, num_classes))
"""
_ARGUMENTS: dict[str, list[str]] = {
    "list": [],
    "status": ["sides"],
    "trials": ["sides"],
    "show": ["sides", "0"],
    "best": ["sides"],
    "confirm": ["sides"],
    "train": ["sides", "--out", "again"],
    "evaluate": ["model"],
    "verify": ["model"],
    "predict": ["model", "images"],
    "export": ["model", "--format", "torch", "--out", "exported"],
    "report": ["sides"],
    "cache": [],
    "backup": ["copy.db"],
    "delete": ["sides", "--yes"],
}
_BY_STUDY_FILE = {"init", "check", "run"}
"""Commands that read what the command line names and no stored study."""
_SERVERS = {"dashboard"}
"""Tested over HTTP, in tests/e2e."""
_REFUSED = {"confirm", "train", "evaluate", "verify", "predict", "export"}


def forget(folder: Path) -> Path:
    """Return the marker of an import, after removing it and the module."""
    marker = folder / "imported"
    marker.unlink(missing_ok=True)
    sys.modules.pop(_MODULE, None)
    return marker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a study of a stranger's backbone, its model folder and the module that both name."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / f"{_MODULE}.py").write_text(_CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("TUNER_CACHE_DIR", str(folder / "cache"))
        url = store_example(folder, backbone=f"{_MODULE}:make")
        patch.setenv("TUNER_STORAGE", url)
        marker = forget(folder)
        assert run_command(["train", "sides", "--out", "model", "--allow-code"]) == 0
        assert marker.exists()  # the marker works
        yield folder
    sys.modules.pop(_MODULE, None)


@pytest.mark.parametrize("command", _ARGUMENTS)
def test_command_imports_no_stored_code(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Looking at what somebody else stored is safe; training, predicting and exporting say what would allow it."""
    if command not in cli.commands:
        pytest.skip("there is no such command")
    marker = forget(folder)
    code = run_command([command, *_ARGUMENTS[command]])
    assert not marker.exists()
    assert _MODULE not in sys.modules
    assert code == (6 if command in _REFUSED else 0), capsys.readouterr().err
    assert ("allow code" in capsys.readouterr().err) is (command in _REFUSED)


def test_no_command_is_forgotten() -> None:
    """A new command is put to the test above."""
    assert set(cli.commands) <= set(_ARGUMENTS) | _BY_STUDY_FILE | _SERVERS
