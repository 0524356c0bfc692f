"""Only the models that are wanted stay."""

from pathlib import Path

import pytest

from tuner.errors import StorageError
from tuner.service.kept_models import model_folder, models_folder, remove_halves, remove_models


def test_remove_models_spares_what_is_named(tmp_path: Path) -> None:
    """Old bests go; the best and those being written stay, and so do other studies."""
    url = f"sqlite:///{tmp_path}/studies.db"
    for number in range(4):
        model_folder(url, "a/b", number).mkdir(parents=True)
    model_folder(url, "a_b", 0).mkdir(parents=True)
    remove_models(url, "a/b", keep=(1, 3))
    assert [number for number in range(4) if model_folder(url, "a/b", number).is_dir()] == [1, 3]
    remove_models(url, "a/b")
    assert not model_folder(url, "a/b", 1).parent.exists()
    assert model_folder(url, "a_b", 0).is_dir()


def test_models_being_written_are_spared_until_no_run_is_under_way(tmp_path: Path) -> None:
    """Another worker's half-written model is not deleted under it; what a kill left is swept at the next start."""
    url = f"sqlite:///{tmp_path}/studies.db"
    half = models_folder(url, "a") / ".trial-9.123.tmp"
    half.mkdir(parents=True)
    model_folder(url, "a", 1).mkdir()
    remove_models(url, "a", keep=(1,))
    assert half.is_dir()
    remove_halves(url, "a")
    assert not half.exists()
    assert model_folder(url, "a", 1).is_dir()


def test_databases_with_one_stem_keep_their_models_apart(tmp_path: Path) -> None:
    """a.db and a.sqlite3 are two databases."""
    urls = [f"sqlite:///{tmp_path}/a.{ending}" for ending in ("db", "sqlite3")]
    assert len({model_folder(url, "x", 0) for url in urls}) == 2


def test_model_folder_stays_inside_whatever_the_study_is_called(tmp_path: Path) -> None:
    """Study names are data."""
    url = f"sqlite:///{tmp_path}/studies.db"
    for name in ("../../etc", "..", ".", "a" * 300, "x\\y"):
        folder = model_folder(url, name, 0).resolve()
        assert folder.is_relative_to(tmp_path / "studies.db.models")
        assert len(folder.parent.name) < 100


def test_remove_models_follows_no_link_and_spares_what_is_not_its_own(tmp_path: Path) -> None:
    """What a link leads to stays, and so does what somebody put beside the models."""
    url = f"sqlite:///{tmp_path}/studies.db"
    outside = tmp_path / "outside"
    (outside / "trial-1").mkdir(parents=True)
    (outside / "trial-1" / "mine.txt").touch()
    folder = models_folder(url, "a")
    (folder / "notes").mkdir(parents=True)
    (folder / "trial-1").symlink_to(outside / "trial-1")
    (folder / ".trial-2.7.tmp").symlink_to(outside)
    remove_halves(url, "a")
    remove_models(url, "a")
    assert [path.name for path in folder.iterdir()] == ["notes"]
    models_folder(url, "b").symlink_to(outside)
    for remove in (remove_halves, remove_models):
        with pytest.raises(
            StorageError, match=r"storage: must keep its models in a folder, got the link '.*/b'; remove"
        ):
            remove(url, "b")
    assert (outside / "trial-1" / "mine.txt").is_file()


def test_remove_models_refuses_a_link_that_leads_all_studies_elsewhere(tmp_path: Path) -> None:
    """A folder that somebody sent may come with a link to where the user keeps other models of the same names."""
    url = f"sqlite:///{tmp_path}/studies.db"
    mine = tmp_path / "outside" / "a" / "trial-1"
    half = mine.with_name(".trial-2.7.tmp")
    mine.mkdir(parents=True)
    half.mkdir()
    models_folder(url, "a").parent.symlink_to(tmp_path / "outside")
    for remove in (remove_halves, remove_models):
        with pytest.raises(StorageError, match=r"got the link '.*/studies\.db\.models'; remove it"):
            remove(url, "a")
    assert mine.is_dir()
    assert half.is_dir()


def test_remove_models_says_in_one_line_that_a_folder_is_out_of_reach(tmp_path: Path) -> None:
    """As of a disk that fails."""
    for remove in (remove_halves, remove_models):
        with pytest.raises(StorageError, match=r"storage: must lie where it can be read and written, got .*/a: "):
            remove(f"sqlite:///{tmp_path}/{'a' * 300}.db", "a")
