"""Checkpoints lie inside their folder, and only those that somebody may go on from stay."""

from pathlib import Path

import pytest

from tuner.errors import StorageError
from tuner.service.checkpoints import checkpoint_file, remove_checkpoints


def make_url(folder: Path) -> str:
    """Return the URL of a database in a folder."""
    return f"sqlite:///{folder}/studies.db"


def make_files(url: str, name: str, *origins: int) -> list[Path]:
    """Make checkpoints of some trials."""
    paths = [checkpoint_file(url, name, origin) for origin in origins]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def test_remove_checkpoints_spares_the_trials_that_may_go_on(tmp_path: Path) -> None:
    """Those of ended trials go; those that are kept, other studies' and foreign files stay."""
    url = make_url(tmp_path)
    ended, running = make_files(url, "a/b", 1, 12)
    (other,) = make_files(url, "a_b", 1)
    foreign = ended.with_name("notes-1.pt")
    foreign.touch()
    remove_checkpoints(url, "a/b", keep=(12,))
    assert [path.exists() for path in (ended, running, foreign, other)] == [False, True, True, True]


def test_remove_checkpoints_removes_halves_of_ended_trials_only(tmp_path: Path) -> None:
    """What a killed worker was writing goes with its trial, and all of it where no worker lives to write."""
    url = make_url(tmp_path)
    (path,) = make_files(url, "a", 2)
    halves = [path.with_name(f".trial-{number}.pt.77.tmp") for number in (2, 3)]
    for half in halves:
        half.touch()
    remove_checkpoints(url, "a", keep=(3,), may_write=True)
    assert [each.exists() for each in (path, *halves)] == [False, False, True]
    remove_checkpoints(url, "a", keep=(3,))
    assert not halves[1].exists()


def test_remove_checkpoints_leaves_no_empty_folder(tmp_path: Path) -> None:
    """When no trial is left the folders go as well; that there is nothing is no error."""
    url = make_url(tmp_path)
    make_files(url, "a", 1)
    for _ in range(2):
        remove_checkpoints(url, "a")
        assert list(tmp_path.iterdir()) == []


def test_remove_checkpoints_refuses_a_link(tmp_path: Path) -> None:
    """What lies where it leads is nobody's to remove."""
    url, elsewhere = make_url(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "trial-1.pt").touch()
    folder = checkpoint_file(url, "a", 1).parent
    folder.parent.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(StorageError, match=r"must keep its checkpoints in a folder, got the link '.*/a'; remove it"):
        remove_checkpoints(url, "a")
    assert (elsewhere / "trial-1.pt").exists()


def test_remove_checkpoints_refuses_a_link_that_leads_all_studies_elsewhere(tmp_path: Path) -> None:
    """The folder around the study's own may be one too."""
    url, elsewhere = make_url(tmp_path), tmp_path / "elsewhere"
    (elsewhere / "a").mkdir(parents=True)
    (elsewhere / "a" / "trial-1.pt").touch()
    checkpoint_file(url, "a", 1).parent.parent.symlink_to(elsewhere)
    with pytest.raises(StorageError, match=r"got the link '.*/studies\.db\.checkpoints'; remove it"):
        remove_checkpoints(url, "a")
    assert (elsewhere / "a" / "trial-1.pt").exists()


@pytest.mark.parametrize("name", ["../../etc", "..", ".", "a" * 300, "x\\y", "-", "\u202e"])
def test_checkpoint_file_stays_inside_whatever_the_study_is_called(tmp_path: Path, name: str) -> None:
    """Study names are data."""
    path = checkpoint_file(make_url(tmp_path), name, 3)
    assert path.resolve().parent.parent == tmp_path / "studies.db.checkpoints"
    assert len(path.parent.name) < 100
