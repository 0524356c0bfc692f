"""How errors become exit codes."""

import errno
import re
from pathlib import Path

import click
import pytest

from tuner.cli.main import cli, run_command

LONG = "x" * 300


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNER_STORAGE", "sqlite:///studies.db")
    return tmp_path


def add_failure(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """Add the command ``fail``, which raises an error."""

    def fail() -> None:
        raise error

    monkeypatch.setitem(cli.commands, "fail", click.Command("fail", callback=fail))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.ENOSPC, errno.EROFS, errno.EIO])
def test_run_command_says_which_place_failed(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path or a disk that refuses is no bug, wherever it is met."""
    add_failure(monkeypatch, OSError(number, "it refuses", "/data/a\nb"))
    assert run_command(["fail"]) == 8
    expected = "error: /data/a?b: must be a place that can be read and written, got: it refuses\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no file"), OSError(errno.ENOENT, "not there", "/data/x")])
def test_run_command_lets_a_bug_keep_its_traceback(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error without a place, or over a file that we should have made, is ours."""
    add_failure(monkeypatch, error)
    with pytest.raises(OSError, match=re.escape(str(error))):
        run_command(["fail"])


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["check", f"{LONG}.toml"], 3, "must be a readable study file, got: File name too long"),
        (["backup", LONG], 8, "backup: must lie in a writable folder, got .*: File name too long"),
    ],
)
def test_place_out_of_reach_is_one_line(
    arguments: list[str], code: int, reason: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the file system refuses to look at is a mistake of the user's, with the exit code of what it was for."""
    (place / "studies.db").touch()
    assert run_command(arguments) == code
    complaint = capsys.readouterr().err
    assert len(complaint.splitlines()) == 1
    assert re.search(reason, complaint)
