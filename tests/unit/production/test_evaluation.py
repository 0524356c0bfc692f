"""Looking at test again: on the record, and only where the model has not been trained on it."""

from pathlib import Path
from typing import Any

import pytest

from tuner.errors import DataError, ExportError
from tuner.production.evaluation import evaluate_folder
from tuner.production.openings import list_openings
from tuner.production.retrain import train_best

from .builders import make_spec, store_example, store_study


@pytest.fixture(autouse=True)
def _use_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))


def train(folder: Path, **overrides: Any) -> str:
    """Store a study and train its model; return the storage's URL."""
    url = store_example(folder, **overrides)
    train_best("sides", folder / "model", storage=url, device="cpu")
    return url


def test_evaluation_repeats_the_first_look(tmp_path: Path) -> None:
    """The same weights on the same images; the study knows of both looks."""
    url = store_example(tmp_path)
    trained = train_best("sides", tmp_path / "model", storage=url, device="cpu")
    found = evaluate_folder(tmp_path / "model", storage=url, device="cpu")
    assert trained.test is not None
    assert found.to_json()["test"] == {
        **trained.to_json()["test"],
        "accuracies": [trained.test.accuracies[0]],
    }
    assert [opening["reason"].partition(":")[0] for opening in list_openings("sides", storage=url)] == [
        "train",
        "evaluate",
    ]


def test_evaluation_refuses_a_model_of_other_splits(tmp_path: Path) -> None:
    """Its training images may be among these test images; nothing is looked at."""
    url = train(tmp_path)
    store_study(tmp_path, make_spec(tmp_path, study={"name": "other", "seed": 7}))
    with pytest.raises(DataError, match=r"^study 'other': must have the images and splits that the model was trained"):
        evaluate_folder(tmp_path / "model", study="other", storage=url, device="cpu")
    assert list_openings("other", storage=url) == []


def test_evaluation_finds_a_bad_place_before_it_looks(tmp_path: Path) -> None:
    """A look whose numbers cannot be written would be wasted."""
    url = train(tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExportError, match="taken: must be a folder that can be written, got: File exists"):
        evaluate_folder(tmp_path / "model", storage=url, out=tmp_path / "taken", device="cpu")
    assert len(list_openings("sides", storage=url)) == 1


def test_evaluation_wants_a_test_split(tmp_path: Path) -> None:
    """There is nothing to look at without one."""
    url = train(tmp_path, test_fraction=None)
    with pytest.raises(DataError, match=r"^study 'sides': must have a test split, got none"):
        evaluate_folder(tmp_path / "model", storage=url, device="cpu")
