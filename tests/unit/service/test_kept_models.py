"""Only the models that are wanted stay."""

from pathlib import Path

from tuner.service.kept_models import model_folder, remove_models


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


def test_model_folder_stays_inside_whatever_the_study_is_called(tmp_path: Path) -> None:
    """Study names are data."""
    url = f"sqlite:///{tmp_path}/studies.db"
    for name in ("../../etc", "..", ".", "a" * 300, "x\\y"):
        folder = model_folder(url, name, 0).resolve()
        assert folder.is_relative_to(tmp_path / "studies.db.models")
        assert len(folder.parent.name) < 100
