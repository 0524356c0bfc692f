"""Tests of tuner.search.studies."""

import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from tuner.errors import StudyError
from tuner.search.storage import open_storage
from tuner.search.studies import (
    FACTS_ATTR,
    SPEC_ATTR,
    count_wanted,
    delete_stored,
    find_best,
    find_changes,
    load_stored,
    open_study,
)
from tuner.search.study_facts import StudyFacts, find_changed_facts
from tuner.search.summaries import list_studies
from tuner.search.trial_book import TrialBook

from .builders import (
    SPACE,
    close_storages,
    keep,
    make_facts,
    make_spec,
    make_storage,
    make_url,
    open_small,
    read_plainly,
    run_trial,
)


def test_open_study_stores_all_that_reading_needs(tmp_path: Path) -> None:
    """A new process finds spec and facts in the storage alone."""
    spec = make_spec(study={"objective": "val_loss"})
    open_small(tmp_path, spec)
    stored = load_stored(make_storage(tmp_path), "small")
    assert stored.name == "small"
    assert stored.spec == spec
    assert stored.facts == make_facts()


@pytest.mark.parametrize(
    ("objective", "direction"),
    [("val_accuracy", "MAXIMIZE"), ("val_macro_f1", "MAXIMIZE"), ("val_loss", "MINIMIZE")],
)
def test_open_study_sets_direction_and_metric_name(tmp_path: Path, objective: str, direction: str) -> None:
    """Plain Optuna sees which way is better, and what the value is."""
    open_small(tmp_path, make_spec(study={"objective": objective}))
    study = read_plainly(tmp_path)
    assert study.direction.name == direction
    assert study.metric_names == [objective]


def test_open_study_makes_again_what_was_cut_off(tmp_path: Path) -> None:
    """A study whose making was killed holds no spec and no trial; it is no obstacle."""
    optuna.create_study(storage=make_storage(tmp_path), study_name="small")
    assert open_small(tmp_path).spec == make_spec()


def test_open_study_refuses_a_study_of_another_program(tmp_path: Path) -> None:
    """Trials that are not ours are left alone."""
    optuna.create_study(storage=make_storage(tmp_path), study_name="small").enqueue_trial({"x": 1})
    with pytest.raises(StudyError, match=r"must be free, got 'small' of another program; choose another name"):
        open_small(tmp_path)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"data": {"val_fraction": 0.3}}, "data.val_fraction: 0.2 in the study, 0.3 in the study file"),
        ({"data": {"test_fraction": 0.2}}, "data.test_fraction: absent in the study, 0.2 in the study file"),
        ({"data": {"image_size": 32}}, "data.image_size: 224 in the study, 32 in the study file"),
        ({"data": {"classes": ["1", "2"]}}, "data.classes: absent in the study, ['1', '2'] in the study file"),
        ({"study": {"seed": 1}}, "study.seed: 0 in the study, 1 in the study file"),
        (
            {"study": {"objective": "val_loss"}},
            "study.objective: 'val_accuracy' in the study, 'val_loss' in the study file",
        ),
        ({"training": {"epochs": 4}}, "training.epochs: 3 in the study, 4 in the study file"),
        ({"training": {"dropout": 0.1}}, "training.dropout: absent in the study, 0.1 in the study file"),
        (
            {"space": {**SPACE, "lr": {"low": 1e-4, "high": 0.2, "log": True}}},
            "space.lr.high: 0.1 in the study, 0.2 in the study file",
        ),
        (
            {"space": {**SPACE, "backbone": {"choices": ["test_vit", "a"]}}},
            "space.backbone.choices: ['test_resnet', 'test_vit'] in the study, ['test_vit', 'a'] in the study file",
        ),
        (
            {"backbones": {"test_vit": {"kwargs": {"a": 1}}}},
            "backbones.test_vit.kwargs.a: absent in the study, 1 in the study file",
        ),
        (
            {"backbones": {"test_vit": {"mean": [0.1, 0.2, 0.3]}}},
            "backbones.test_vit.mean: absent in the study, [0.1, 0.2, 0.3] in the study file",
        ),
        (
            {"pretraining": {"epochs": 2, "data": {"source": "digits"}}},
            "pretraining.epochs: absent in the study, 2 in the study file",
        ),
    ],
)
def test_open_study_refuses_another_recipe(tmp_path: Path, sections: dict[str, Any], line: str) -> None:
    """What decides a trial's value may not change under a study; each changed key is named with both values."""
    open_small(tmp_path)
    with pytest.raises(StudyError, match="study 'small': the stored study must be the study file's") as caught:
        open_small(tmp_path, make_spec(**sections))
    assert f"  {line}" in str(caught.value).splitlines()
    assert "restore them, choose another study.name, or 'tuner delete' the old study" in str(caught.value)
    assert load_stored(make_storage(tmp_path), "small").spec == make_spec()


def test_open_study_names_a_param_that_left_the_space(tmp_path: Path) -> None:
    """A param that was searched and is now fixed is two changes."""
    open_small(tmp_path)
    space = {name: table for name, table in SPACE.items() if name != "lr"}
    with pytest.raises(
        StudyError, match=re.escape("training.lr: absent in the study, 0.1 in the study file")
    ) as caught:
        open_small(tmp_path, make_spec(space=space, training={"lr": 0.1}))
    assert "space.lr.low: 0.0001 in the study, absent in the study file" in str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"search": {"n_trials": 99}},
        {"search": {"timeout": "1h"}},
        {"search": {"sampler": "qmc"}},
        {"search": {"pruner": "asha"}},
        {"workers": {"devices": "cpu", "per_device": 2}},
        {"study": {"storage": "sqlite:///elsewhere@here.db"}},
        {"enqueue": [{"lr": 0.01}]},
        {"data": {"source": "digits", "max_bad_fraction": 0.01}},
    ],
)
def test_open_study_lets_the_search_change(tmp_path: Path, sections: dict[str, Any]) -> None:
    """How much is searched, with what and where may change; the new spec is stored."""
    open_small(tmp_path)
    spec = make_spec(**sections)
    assert open_small(tmp_path, spec).spec == spec
    assert load_stored(make_storage(tmp_path), "small").spec == spec


def test_find_changes_lets_paths_move() -> None:
    """A moved folder is the same data, a weights file elsewhere the same weights; their content is compared."""
    data = {"source": "csv", "path": "a.csv"}
    before = make_spec(data=data, backbones={"test_vit": {"weights": "w.pth"}})
    after = make_spec(data={**data, "path": "b.csv"}, backbones={"test_vit": {"weights": "v.pth"}})
    assert find_changes(before, after) == []


def test_find_changed_facts_names_other_data() -> None:
    """Images lie outside the study file and are compared by content."""
    now = make_facts(data_hash="other", split_counts={"train": 81, "val": 20, "test": 0})
    counts = "(100 images of 2 classes then, 101 images of 2 classes now)"
    assert find_changed_facts(make_facts(), now) == [f"data: other images, labels or splits than in the study {counts}"]


def test_find_changed_facts_names_other_weights() -> None:
    """So do weights, backbone by backbone."""
    now = make_facts(weights={"test_resnet": "w1", "test_vit": "w3"})
    assert find_changed_facts(make_facts(), now) == ['backbones."test_vit".weights: other weights than in the study']


def test_find_changed_facts_lets_versions_change() -> None:
    """An update of a package does not end a study."""
    assert find_changed_facts(make_facts(), make_facts(versions={"torch": "3"})) == []


def test_open_study_refuses_other_data(tmp_path: Path) -> None:
    """The same file with other images is another study."""
    open_small(tmp_path)
    with pytest.raises(StudyError, match="data: other images, labels or splits than in the study"):
        open_study(make_storage(tmp_path), make_spec(), make_facts(data_hash="other"))


def test_study_facts_survive_json() -> None:
    """Facts come back from the storage as they went in."""
    assert StudyFacts.from_json(make_facts().to_json()) == make_facts()


def test_load_stored_suggests_a_near_name(tmp_path: Path) -> None:
    """A typing error in a study's name is met with the name."""
    open_small(tmp_path)
    with pytest.raises(StudyError, match=r"study 'smal': must be in the storage; did you mean 'small'\?"):
        load_stored(make_storage(tmp_path), "smal")
    with pytest.raises(StudyError, match="study 'zzz': must be in the storage; the storage holds small"):
        load_stored(make_storage(tmp_path), "zzz")


def test_load_stored_says_that_a_storage_is_empty(tmp_path: Path) -> None:
    """There is nothing to suggest."""
    with pytest.raises(StudyError, match="study 'a': must be in the storage; the storage holds no study"):
        load_stored(make_storage(tmp_path), "a")


def test_load_stored_refuses_a_study_of_another_program(tmp_path: Path) -> None:
    """A study without our spec cannot be read as ours."""
    optuna.create_study(storage=make_storage(tmp_path), study_name="theirs")
    with pytest.raises(StudyError, match="study 'theirs': must be a study made by 'tuner run'"):
        load_stored(make_storage(tmp_path), "theirs")


def test_list_studies_lists_ours_and_others(tmp_path: Path) -> None:
    """Every study of a storage has its line, by name; of another program's we know the counts."""
    optuna.create_study(storage=make_storage(tmp_path), study_name="a theirs")
    run_trial(TrialBook(open_small(tmp_path)), (0.1, 0.2, 0.7))
    theirs, ours = list_studies(make_storage(tmp_path))
    assert (theirs.name, theirs.objective, theirs.n_trials, theirs.n_finished) == ("a theirs", "?", None, 0)
    assert (ours.name, ours.objective, ours.n_trials, ours.n_finished) == ("small", "val_accuracy", 10, 1)
    assert ours.best_value == 0.7


@pytest.mark.parametrize(("objective", "best"), [("val_accuracy", 1), ("val_loss", 0)])
def test_find_best_follows_the_objective(tmp_path: Path, objective: str, best: int) -> None:
    """The best has the highest accuracy or the lowest loss, the earliest of equals; FAIL and PRUNED have no say."""
    stored = open_small(tmp_path, make_spec(study={"objective": objective}))
    book = TrialBook(stored)
    assert find_best(stored.study) is None
    values = {"val_accuracy": (0.5, 0.8, 0.8, 0.2), "val_loss": (0.8, 0.5, 0.2, 0.8)}[objective]
    for value in values:
        run_trial(book, (0.1, 0.1, value))
    found = find_best(stored.study)
    assert found is not None
    assert found.number == best


def test_delete_stored_deletes_one_study(tmp_path: Path) -> None:
    """The others stay, and deleting twice is an error."""
    open_small(tmp_path)
    open_small(tmp_path, make_spec(study={"name": "other"}))
    delete_stored(make_storage(tmp_path), "small")
    assert [summary.name for summary in list_studies(make_storage(tmp_path))] == ["other"]
    with pytest.raises(StudyError, match="study 'small': must be in the storage"):
        delete_stored(make_storage(tmp_path), "small")


def test_attributes_are_text_that_plain_optuna_shows(tmp_path: Path) -> None:
    """Spec and facts are JSON text under names of ours."""
    open_small(tmp_path)
    attrs = read_plainly(tmp_path).user_attrs
    assert sorted(attrs) == sorted([SPEC_ATTR, FACTS_ATTR])
    assert all(isinstance(value, str) for value in attrs.values())


def test_list_studies_survives_studies_of_others(tmp_path: Path) -> None:
    """A multi-objective study, or one of another version of ours, hides nothing."""
    run_trial(TrialBook(open_small(tmp_path)))
    storage = make_storage(tmp_path)
    optuna.create_study(storage=storage, study_name="pareto", directions=["maximize", "minimize"])
    newer = optuna.create_study(storage=storage, study_name="newer")
    newer.set_user_attr(SPEC_ATTR, '{"key": "of a later version"}')
    newer.set_user_attr(FACTS_ATTR, '{"format": 99}')
    summaries = {summary.name: summary for summary in list_studies(storage)}
    assert summaries["small"].best_value == 0.3
    assert (summaries["pareto"].n_trials, summaries["pareto"].best_value) == (None, None)
    assert summaries["newer"].n_trials is None
    with pytest.raises(StudyError, match=r"must be in format 1, got 99; another version of tuner made it"):
        load_stored(storage, "newer")


def test_count_wanted_is_capped_by_the_grid(tmp_path: Path) -> None:
    """A grid is finished when its points are."""
    space = {"backbone": {"choices": ["test_resnet", "test_vit"]}, "dropout": {"low": 0.0, "high": 0.3, "step": 0.1}}
    stored = open_small(tmp_path, make_spec(space=space, search={"sampler": "grid", "n_trials": 50}))
    assert count_wanted(stored) == 8


def test_open_study_stores_no_url_that_may_hold_a_secret(tmp_path: Path) -> None:
    """The command line's storage may be used instead of the file's; the file's password stays in the file."""
    for url in ("postgresql://u:secret@h/db", "sqlite:///x.db?password=secret", "secret"):  # made, then resumed
        open_small(tmp_path, make_spec(study={"storage": url}))
        stored = load_stored(make_storage(tmp_path), "small")
        assert stored.spec.study.storage is None
        assert "secret" not in str(stored.study.user_attrs)


def damage(text: str, **changes: Any) -> str:
    """Return JSON with other values; None removes one."""
    values = json.loads(text) | changes
    return json.dumps({key: value for key, value in values.items() if value is not None})


DAMAGES: list[tuple[str, Any]] = [
    (SPEC_ATTR, "{"),
    (SPEC_ATTR, "[]"),
    (SPEC_ATTR, '{"study": "secret"}'),
    (SPEC_ATTR, ["secret"]),
    (FACTS_ATTR, "secret"),
    (FACTS_ATTR, "[" * 100_000),
    (FACTS_ATTR, 7),
    (FACTS_ATTR, None),
    (FACTS_ATTR, "7"),
    (FACTS_ATTR, "[]"),
    (FACTS_ATTR, damage(make_facts().to_json(), classes=None)),
    (FACTS_ATTR, damage(make_facts().to_json(), secret=1)),
    (FACTS_ATTR, damage(make_facts().to_json(), group_counts="secret")),
    (FACTS_ATTR, damage(make_facts().to_json(), group_counts={"test_resnet": "secret"})),
    (FACTS_ATTR, damage(make_facts().to_json(), splits=3)),
]


@pytest.fixture(scope="module")
def two_studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a database of the studies "other" and "small"."""
    folder = tmp_path_factory.mktemp("two")
    open_small(folder)
    open_small(folder, make_spec(study={"name": "other"}))
    close_storages()
    return folder / "studies.db"


# Where the stack is spent, finalisers of whatever else is collected then cannot run either.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("name", "value"), DAMAGES)
def test_damaged_attribute_is_one_line_and_hides_no_other_study(
    tmp_path: Path, two_studies: Path, name: str, value: Any
) -> None:
    """Another program, or a disk, may write anything into a database; what stands there is not repeated."""
    shutil.copy(two_studies, tmp_path)
    storage = keep(open_storage(make_url(tmp_path)))
    optuna.load_study(storage=storage, study_name="small").set_user_attr(name, value)
    with pytest.raises(StudyError, match=r"study 'small': must be as 'tuner run' stored it, got something") as caught:
        load_stored(storage, "small")
    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    other, small = list_studies(storage)
    assert (small.name, small.objective, small.n_trials) == ("small", "?", None)
    assert (other.name, other.objective, other.n_trials) == ("other", "val_accuracy", 10)


def test_attribute_that_is_no_json_is_one_line(tmp_path: Path, two_studies: Path) -> None:
    """Optuna reads all studies to list one, and so cannot go on; that is no bug of ours either."""
    shutil.copy(two_studies, tmp_path)
    with closing(sqlite3.connect(tmp_path / "studies.db")) as connection, connection:
        connection.execute("UPDATE study_user_attributes SET value_json = '{' WHERE key = ?", (SPEC_ATTR,))
    storage = keep(open_storage(make_url(tmp_path)))
    for read in (list_studies, lambda storage: load_stored(storage, "small")):
        with pytest.raises(StudyError, match=r"storage: must be as 'tuner run' stored it, .*\(JSONDecodeError\)"):
            read(storage)
