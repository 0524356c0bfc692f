"""Properties of names: a study, a class or a file may have any name of printable characters, and it stays data."""

import contextlib
import io
import json
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.storages import RDBStorage
from PIL import Image

from tests.properties import reduced
from tests.unit.search.builders import make_facts, make_spec
from tuner.cli.main import run_command
from tuner.data.index import SPLIT_NAMES
from tuner.data.source_folder import read_image_folder
from tuner.errors import SpecError, StudyError
from tuner.search.storage import find_database, study_lock_path, study_slug, use_storage
from tuner.search.studies import delete_stored, load_stored, open_study
from tuner.service.kept_models import model_folder, models_folder
from tuner.spec.study import load_spec

URL = "sqlite:////data/studies.db"
NAME_MAX = 255
"""Bytes of a file name, on all file systems in use."""
printable = st.characters(exclude_categories=["Cs"]).filter(str.isprintable)
study_names = st.text(printable, min_size=1, max_size=200).filter(
    lambda name: bool(name.strip()) and not name.startswith("-")
)
# Beside its name a folder must not be hidden; names of splits and "~" mean something else.
folder_names = st.text(printable.filter(lambda character: character not in "/\0"), min_size=1, max_size=60).filter(
    lambda name: bool(name.strip()) and name[0] not in ".-~" and name.lower() not in SPLIT_NAMES
)


def run(*arguments: str) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code, what it printed, and what it complained of."""
    out, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaint):
        code = run_command(list(arguments))
    return code, out.getvalue(), complaint.getvalue()


def read(*arguments: str) -> str:
    """Run a command that must succeed; return what it printed."""
    code, shown, complaint = run(*arguments)
    assert (code, complaint) == (0, "")
    return shown


def fold(name: str) -> str:
    """Return what is the same for file names that some file system takes for one: case and composition aside."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


# --- files that belong to a study ---


@given(study_names)
@example("\U00020000" * 60)
def test_study_files_stay_in_their_folder(name: str) -> None:
    """Lock and kept models of a study lie where those of every study lie, under a name that a disk takes."""
    lock, model = study_lock_path(URL, name), model_folder(URL, name, 3)
    assert lock.parent == find_database(URL).parent
    assert model.parent.parent == models_folder(URL, "x").parent
    for part in (lock.name, model.parent.name):
        assert "/" not in part
        assert "\0" not in part
        assert part not in {"", ".", ".."}
        assert len(part.encode()) <= NAME_MAX


def write_alike(names: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, str]]:
    """Return pairs of names, most of which look alike to some file system, or have one's slug as the other."""
    return names.flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.sampled_from(
                [name.upper(), name.lower(), name.swapcase(), f"{name} ", name.replace("_", "-"), study_slug(name)]
                + [unicodedata.normalize(form, name) for form in ("NFC", "NFD", "NFKC")]
            )
            | names,
        )
    )


@given(write_alike(study_names | st.text("aA\u00e5\u00c5\u212bsS\u017f\u00df_- é\u0301", min_size=1).filter(str.strip)))
def test_study_files_of_two_studies_never_meet(names: tuple[str, str]) -> None:
    """Different names have different files, also on a disk that knows no upper case and no composed letters."""
    first, second = names
    if first != second:
        assert fold(study_slug(first)) != fold(study_slug(second))


# --- what reads and shows names ---


@pytest.fixture(scope="module")
def storage() -> Iterator[tuple[RDBStorage, str]]:
    """Open a database for all examples of this file."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/studies.db"
        with use_storage(url, create=True) as opened:
            yield opened, url


@settings(max_examples=3)
@given(names=st.lists(study_names, min_size=3, max_size=3, unique=True))
def test_studies_are_found_by_their_names(storage: tuple[RDBStorage, str], names: list[str]) -> None:
    """Studies are stored, listed and shown under exactly their names."""
    opened, url = storage
    for name in names:
        open_study(opened, make_spec(study={"name": name}), make_facts())
    try:
        assert [load_stored(opened, name).name for name in names] == names
        assert [each["name"] for each in json.loads(read("list", "--json", "--storage", url))] == sorted(names)
        assert json.loads(read("status", names[0], "--json", "--storage", url))["name"] == names[0]
        assert names[1] in read("status", names[1], "--storage", url)
        assert names[2] in read("list", "--storage", url)
    finally:
        for name in names:
            delete_stored(opened, name)


@given(name=study_names)
def test_study_that_is_missing_is_one_line(storage: tuple[RDBStorage, str], name: str) -> None:
    """A name that is not stored is repeated in one line, whatever it holds."""
    missing = name[:150] + "\u2603 missing"
    with pytest.raises(StudyError, match="must be in the storage") as caught:
        load_stored(storage[0], missing)
    assert len(str(caught.value).splitlines()) == 1
    assert repr(missing) in str(caught.value)


def write_images(root: Path, classes: list[str], file_name: str) -> None:
    """Write three images for each class."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(root / name / f"{number}{file_name}.png")


def fits(name: str) -> bool:
    """Whether a name leaves room for a number and a suffix."""
    return len(name.encode()) < NAME_MAX - 10


names_of_files = folder_names.filter(fits)


@settings(max_examples=reduced(5))
@given(
    folder=names_of_files, classes=st.lists(names_of_files, min_size=2, max_size=3, unique=True), file=names_of_files
)
def test_init_writes_a_study_file_for_folders_of_any_name(folder: str, classes: list[str], file: str) -> None:
    """The study file that ``tuner init`` writes loads, and means the folder it was written for."""
    with tempfile.TemporaryDirectory() as place:
        root, out = Path(place, folder), Path(place, "study.toml")
        write_images(root, classes, file)
        code, _, complaint = run("init", str(root), "--out", str(out))
        assert (code, complaint) == (0, "")
        spec = load_spec(out)
        index = read_image_folder(spec.data)
        assert spec.study.name == folder
        assert spec.data.path == str(root.resolve())
        assert list(index.classes) == sorted(classes)
        assert len(index.names) == 3 * len(classes)


@pytest.mark.parametrize("folder", ["~x", "~", "-x", "--", " ", "x" * 201, "a\x7fb", "a\nb", "a#b", '"', "\\"])
def test_init_finds_a_name_where_the_folders_cannot_be_a_studys(folder: str) -> None:
    """A name that is an option, a home, blank or too long for a study is changed; the path stays what it is."""
    with tempfile.TemporaryDirectory() as place:
        root, out = Path(place, folder), Path(place, "study.toml")
        write_images(root, ["a", "b"], "")
        read("init", str(root), "--out", str(out))
        assert load_spec(out).data.path == str(root.resolve())


def test_init_refuses_a_path_that_is_no_text() -> None:
    """A study file is UTF-8: bytes of a folder's name that are not cannot be written, and nothing is left."""
    with tempfile.TemporaryDirectory() as place:
        root, out = Path(place, "caf\udce9"), Path(place, "study.toml")
        write_images(root, ["a", "b"], "")
        code, _, complaint = run("init", str(root), "--out", str(out))
        assert code == SpecError.exit_code
        assert "its path must be UTF-8" in complaint
        assert not out.exists()
