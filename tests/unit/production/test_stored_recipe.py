"""What retraining starts from, where a database or a path is not what it should be."""

import base64
import json
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from tuner.data.splits import pack_splits, unpack_splits
from tuner.errors import ModelError, StudyError
from tuner.models.weights import find_weights
from tuner.production.stored_recipe import compare_weights, read_data, read_recipe
from tuner.search.storage import find_database, use_storage
from tuner.search.studies import FACTS_ATTR
from tuner.search.study_facts import StudyFacts
from tuner.search.trial_attrs import PARAMS_ATTR
from tuner.spec.sections import BackboneSection

from .builders import store_example

_SET_PARAMS = "UPDATE trial_user_attributes SET value_json = ? WHERE key = ?"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Store a study; each test changes what is stored, and puts it back."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNER_CACHE_DIR", str(folder / "cache"))
        yield store_example(folder)


def change_facts(url: str, **changes: Any) -> str:
    """Change stored facts; return what was stored."""
    with use_storage(url) as storage:
        study = optuna.load_study(storage=storage, study_name="sides")
        before: str = study.user_attrs[FACTS_ATTR]
        facts = vars(StudyFacts.from_json(before)) | changes
        study.set_user_attr(FACTS_ATTR, StudyFacts(**facts).to_json())
    return before


def pack_zeros(n_images: int) -> str:
    """Return packed splits of many images, in few characters."""
    return base64.b64encode(zlib.compress(bytes(n_images), 9)).decode()


@pytest.mark.parametrize("n_images", [0, 1, 1000])
def test_unpack_splits_takes_as_many_as_there_are(n_images: int) -> None:
    """The bound is exact."""
    splits = np.arange(n_images, dtype=np.int8) % 3
    assert np.array_equal(unpack_splits(pack_splits(splits), n_images), splits)


@pytest.mark.parametrize("text", [pack_zeros(101), pack_zeros(10**7), pack_zeros(50)[:-8], "no base64!", "QUJD", ""])
def test_unpack_splits_refuses_more_images_than_there_are_and_what_is_not_packed(text: str) -> None:
    """A few characters from a database cannot fill the memory."""
    with pytest.raises(ValueError, match=r"splits must be|base64|[Pp]adding"):
        unpack_splits(text, 100)


@pytest.mark.parametrize("splits", ["", "no base64", pack_zeros(10**7)])
def test_read_data_says_that_stored_splits_cannot_be_read(url: str, splits: str) -> None:
    """The images are the study's; it is the database that is damaged."""
    before = change_facts(url, splits=splits)
    try:
        with pytest.raises(StudyError, match=r"study 'sides': must be as 'tuner run' stored it, got something"):
            read_data(read_recipe("sides", url))
    finally:
        change_facts(url, **vars(StudyFacts.from_json(before)))


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({"preprocessing": {}}, lambda recipe: recipe),
        ({"group_counts": {}}, lambda recipe: recipe),
        ({"weights": {}}, compare_weights),
    ],
)
def test_read_recipe_says_that_a_backbone_has_no_facts(
    url: str, changes: dict[str, Any], read: Callable[[Any], object]
) -> None:
    """One line, not a KeyError."""
    before = change_facts(url, **changes)
    try:
        with pytest.raises(StudyError, match=r"study 'sides': must be as 'tuner run' stored it, .*\(KeyError\)"):
            read(read_recipe("sides", url))
    finally:
        change_facts(url, **vars(StudyFacts.from_json(before)))


@pytest.mark.parametrize("params", ["secret", {"secret": 1}, None])
def test_read_recipe_says_that_a_stored_recipe_is_none(url: str, params: Any, tmp_path: Path) -> None:
    """Its trial is named, what is stored is not repeated."""
    database = shutil.copy(find_database(url), tmp_path)
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(_SET_PARAMS, (json.dumps(params), PARAMS_ATTR))
    with pytest.raises(StudyError, match="trial 0: must be as 'tuner run' stored it") as caught:
        read_recipe("sides", f"sqlite:///{database}")
    assert "secret" not in str(caught.value)


def test_find_weights_refuses_a_name_that_is_too_long() -> None:
    """The file system's own limit is no bug of ours."""
    section = BackboneSection(weights="x" * 300 + ".safetensors")
    with pytest.raises(ModelError, match="must be a file that exists"):
        find_weights("test_resnet", section)
