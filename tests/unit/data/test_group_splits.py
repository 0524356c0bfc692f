"""Groups stay whole, and classes stay as even as whole groups allow."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.data.test_splits import make_index, make_section
from tuner.data.index import ImageIndex, Split, join_indexes, select_classes
from tuner.data.splits import cut_splits, hash_data
from tuner.errors import DataError
from tuner.service.study_data import read_study_data
from tuner.spec.study import parse_spec

TRAIN, VAL, TEST = Split.TRAIN, Split.VAL, Split.TEST


def group(index: ImageIndex, groups: Sequence[str]) -> ImageIndex:
    """Return the index with the group of each image."""
    return replace(index, groups=tuple(groups))


def list_torn(index: ImageIndex, splits: np.ndarray) -> set[str]:
    """Return the groups that stand in more than one split."""
    homes: dict[str, set[int]] = {}
    for name, split in zip(index.groups or (), splits.tolist(), strict=True):
        homes.setdefault(name, set()).add(split)
    return {name for name, where in homes.items() if len(where) > 1}


@given(st.data())
def test_cut_splits_tears_no_group_and_empties_no_class(data: st.DataObject) -> None:
    """Whatever the groups are like, as long as each class has one of its own for every split."""
    n_classes = data.draw(st.integers(2, 4))
    sizes = data.draw(
        st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=12), min_size=n_classes, max_size=n_classes)
    )
    index = make_index(*(sum(each) for each in sizes))
    names = [f"{label}-{number}" for label, each in enumerate(sizes) for number, n in enumerate(each) for _ in range(n)]
    index = group(index, names)
    test_fraction = data.draw(st.sampled_from([None, 0.1, 0.3]))
    seed = data.draw(st.integers(0, 1000))
    splits = cut_splits(index, make_section(0.2, test_fraction), seed=seed)
    assert not list_torn(index, splits)
    wanted = {TRAIN, VAL} if test_fraction is None else {TRAIN, VAL, TEST}
    assert all(set(splits[index.labels == label].tolist()) == wanted for label in range(n_classes))
    assert (splits == cut_splits(index, make_section(0.2, test_fraction), seed=seed)).all()


@pytest.mark.parametrize("seed", range(5))
def test_cut_splits_keeps_classes_even_over_mixed_groups(seed: int) -> None:
    """60 patients with 1 to 12 images of any class: each class's shares are within 4 % of what was asked for."""
    generator = np.random.default_rng(seed)
    index = make_index(200, 100, 40)
    patients = generator.choice(60, len(index.labels), p=generator.dirichlet(np.full(60, 3.0)))
    index = group(index, [str(patient) for patient in patients])
    splits = cut_splits(index, make_section(0.25, 0.15), seed=seed)
    assert not list_torn(index, splits)
    for label in range(3):
        shares = np.bincount(splits[index.labels == label], minlength=3) / np.count_nonzero(index.labels == label)
        assert shares == pytest.approx([0.6, 0.25, 0.15], abs=0.04)


def test_cut_splits_of_groups_follows_the_seed() -> None:
    """Another seed draws other groups of the same size."""
    index = group(make_index(40, 40), [str(row // 2) for row in range(80)])
    cuts = [cut_splits(index, make_section(), seed=seed).tolist() for seed in (3, 3, 4)]
    assert cuts[0] == cuts[1] != cuts[2]


def test_cut_splits_fills_every_split_from_a_rare_class() -> None:
    """Two groups of a class, one of them in a large group of another class: one goes to val."""
    index = make_index(30, 4)
    index = group(index, [*["big"] * 15, *(str(row) for row in range(15)), "big", "big", "rare", "rare"])
    for seed in range(10):
        splits = cut_splits(index, make_section(), seed=seed)
        assert set(splits[30:].tolist()) == {TRAIN, VAL}


def test_cut_splits_cuts_val_from_the_groups_of_train_alone() -> None:
    """A given test split stays as it is."""
    given_splits = [*[TRAIN] * 8, *[TEST] * 4, *[TRAIN] * 8, *[TEST] * 4]
    index = group(make_index(12, 12, given=given_splits), [str(row // 2) for row in range(24)])
    splits = cut_splits(index, make_section(), seed=0)
    assert (splits == TEST).tolist() == [split == TEST for split in given_splits]
    assert not list_torn(index, splits)
    assert (splits == VAL).sum() == 4


def test_cut_splits_refuses_given_splits_that_tear_a_group() -> None:
    """The line names the first such group, its splits, and what to do."""
    index = make_index(4, 4, given=[TRAIN, TRAIN, VAL, VAL, TRAIN, TRAIN, VAL, TEST])
    with pytest.raises(
        DataError, match=r"^data\.group: each group must stand in one split, got 'p2' in train and val; "
    ):
        cut_splits(group(index, ["p1", "p2", "p2", "p3", "p4", "p4", "p5", "p6"]), make_section(), seed=0)
    with pytest.raises(
        DataError, match=r"got 'p' in train and val and test; correct the split column, or leave it out"
    ):
        cut_splits(group(index, ["p", "1", "p", "3", "4", "5", "6", "p"]), make_section(), seed=0)
    whole = group(index, ["p1", "p1", "p3", "p3", "p4", "p4", "p5", "p6"])
    assert (cut_splits(whole, make_section(), seed=0) == index.given_splits).all()


def test_cut_splits_refuses_a_class_with_too_few_groups() -> None:
    """One patient cannot be in train and in val."""
    index = group(make_index(4, 4), ["1", "2", "3", "4", "5", "5", "5", "5"])
    with pytest.raises(DataError, match=r"^data\.group: each class .* for each of train, val, got 1 of 'b'$"):
        cut_splits(index, make_section(), seed=0)


def test_hash_data_knows_groups_by_the_splits_that_they_make() -> None:
    """A study whose splits are given is the same study with a group column."""
    index = make_index(4, 4, given=[TRAIN, TRAIN, VAL, VAL] * 2)
    grouped = group(index, ["1", "1", "2", "2"] * 2)
    plain, cut = (cut_splits(each, make_section(), seed=0) for each in (index, grouped))
    assert hash_data(index, plain) == hash_data(grouped, cut)


def test_groups_follow_the_images_of_chosen_classes() -> None:
    """They are dropped with the other rows, and where two indexes without them are joined."""
    index = group(make_index(2, 2, 2), ["1", "1", "2", "2", "3", "3"])
    assert select_classes(index, ["c", "a"]).groups == ("1", "1", "3", "3")
    assert join_indexes(make_index(1, 1), make_index(1, 1)).groups is None


def test_read_study_data_keeps_groups_of_a_table_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the key in the study file to the splits; with splits that happen to be the same the study is the same."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    names = [f"{label}{number}.png" for label in "ab" for number in range(6)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    lines = [f"{name},{name[0]},{max(int(name[1]), 3)}" for name in names]
    (tmp_path / "table.csv").write_text("\n".join(["path,label,patient", *lines]))
    tables = {
        "study": {"name": "x"},
        "data": {"source": "csv", "path": "table.csv", "group": "patient"},
        "training": {"backbone": "test_resnet"},
    }
    data = read_study_data(parse_spec(tables, tmp_path))
    assert not list_torn(data.index, data.splits)
    assert data.splits[[0, 1, 2, 3, 6, 7, 8, 9]].tolist() == [TRAIN] * 8
    assert np.bincount(data.splits).tolist() == [10, 2]
    given_lines = [f"{line},{Split(split).name}" for line, split in zip(lines, data.splits, strict=True)]
    (tmp_path / "table.csv").write_text("\n".join(["path,label,patient,split", *given_lines]))
    assert read_study_data(parse_spec(tables, tmp_path)).hash == data.hash
    del tables["data"]["group"]
    assert read_study_data(parse_spec(tables, tmp_path)).hash == data.hash
