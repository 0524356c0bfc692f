"""Tests of tuner.data.cache."""

import json
import os
import time
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuner.data.array_file import create_array, map_array
from tuner.data.cache import KINDS, Kind, budget_bytes, clear_cache, list_entries, make_room, reclaimable_bytes, touch
from tuner.data.locks import locked
from tuner.errors import StorageError

SUFFIXES = {"pixels": ".npy", "features": ".npy", "pretrained": ".safetensors", "content": ".txt", "memory": ".json"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache in the test's folder, with room for 1000 bytes."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    set_budget(monkeypatch, 1000)
    return tmp_path / "cache"


def set_budget(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """Give the cache another budget."""
    monkeypatch.setenv("TUNER_CACHE_GB", f"{n_bytes / 1e9:.9f}")


def write_entry(
    cache: Path, kind: str = "features", name: str = "a", *, n_bytes: int = 300, age: float = 0, facts: Any = None
) -> Path:
    """Write a data file that was last used some seconds ago, with a sidecar if there are facts."""
    path = cache / kind / f"{sha256(name.encode()).hexdigest()}{SUFFIXES[kind]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if facts is not None:
        path.with_suffix(".json").write_text(json.dumps(facts))
    path.write_bytes(b"x" * n_bytes)
    os.utime(path, (time.time() - age,) * 2)
    return path


def list_files(cache: Path) -> set[str]:
    """Return the names of all files but locks."""
    return {path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_list_entries_says_what_the_cache_holds(cache: Path) -> None:
    """One entry per data file, all its files counted, the most recently used first; hashes are one entry."""
    write_entry(cache, "pixels", "old", age=100, facts={"text": "40 images"})
    new = write_entry(cache, "pixels", "new", facts={"text": "50 images\n\x1b"})
    write_entry(cache, "content", "a", n_bytes=64)
    write_entry(cache, "content", "b", n_bytes=64)
    write_entry(cache, "memory", "a", n_bytes=32)
    weights = {"backbone": "net", "pretraining": {"data": {"source": "digits"}}}
    write_entry(cache, "pretrained", facts={"facts": weights, "epochs": [{}, {}]})
    write_entry(cache, "features", facts={"other": "format"})
    entries = list_entries()
    assert [(entry.kind, entry.text) for entry in entries] == [
        ("pixels", "50 images??"),
        ("pixels", "40 images"),
        ("features", "not described"),
        ("pretrained", "net, 2 epochs on digits"),
        ("content", "hashes of 2 data sets"),
        ("memory", "memory that training takes, 1 times measured"),
    ]
    assert entries[0].path == new
    assert entries[0].n_bytes == 300 + new.with_suffix(".json").stat().st_size
    assert [entry.n_bytes for entry in entries[-2:]] == [128, 32]
    assert 90 < (datetime.now(UTC) - entries[1].last_used).total_seconds() < 200


def test_list_entries_is_empty_without_a_cache() -> None:
    """A cache that nobody has written yet is no error."""
    assert list_entries() == ()
    assert clear_cache() == 0
    assert make_room(1000)


def test_list_entries_names_half_written_files_as_such(cache: Path) -> None:
    """What is being written counts with its bytes."""
    path = write_entry(cache)
    path.rename(path.with_name(f".{path.name}.42.tmp"))
    (entry,) = list_entries()
    assert (entry.text, entry.n_bytes) == ("incomplete", 300)


def test_cache_leaves_alone_what_is_not_its_own(cache: Path) -> None:
    """Files of other names in the folder are neither listed nor removed."""
    (cache / "pixels").mkdir(parents=True)
    for name in ("notes.txt", "abc.npy", f"{'z' * 64}.npy"):
        (cache / "pixels" / name).write_text("mine")
    assert list_entries() == ()
    clear_cache()
    make_room(10_000, force=True)
    assert list_files(cache) == {"notes.txt", "abc.npy", f"{'z' * 64}.npy"}


@pytest.mark.parametrize("kind", KINDS)
def test_clear_cache_removes_the_kinds_asked_for(cache: Path, kind: Kind) -> None:
    """Data, sidecar and lock go together, and the bytes are counted."""
    for each in KINDS:
        path = write_entry(cache, each, facts={})
        if each in {"pixels", "features"}:
            path.with_suffix(".lock").touch()
    assert clear_cache([kind]) == (300 if kind == "memory" else 302)  # whose data file is its own sidecar
    assert not list((cache / kind).iterdir())
    assert {entry.kind for entry in list_entries()} == set(KINDS) - {kind}
    left = [each for each in KINDS if each != kind]
    assert clear_cache() == sum(300 if each == "memory" else 302 for each in left)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_clear_cache_spares_what_is_being_written(cache: Path) -> None:
    """A writer keeps its file: by its lock, or because the file is fresh where there are no locks."""
    written = write_entry(cache)
    half = write_entry(cache, "pretrained")
    half = half.rename(half.with_name(f".{half.name}.42.tmp"))
    with locked(written):
        assert clear_cache() == 0
    assert written.exists()
    os.utime(half, (time.time() - 7200,) * 2)
    assert clear_cache() == 600


def test_clear_cache_removes_what_is_mapped_without_harm(cache: Path) -> None:
    """The user's word counts; a running worker still reads its map."""
    path = write_entry(cache)
    create_array(path, np.uint8, (100,))[:] = 7
    with path.open("rb") as file:
        mapped = map_array(file, np.uint8, (100,))
    assert clear_cache() > 0
    assert not path.exists()
    assert (mapped == 7).all()


def test_clear_cache_reports_a_folder_that_cannot_be_changed(cache: Path) -> None:
    """What the system says becomes one line."""
    (cache / "pixels" / f"{'a' * 64}.lock").mkdir(parents=True)
    write_entry(cache, "pixels", "a").rename(cache / "pixels" / f"{'a' * 64}.npy")
    with pytest.raises(StorageError, match=r"^TUNER_CACHE_DIR: must be a folder that can be written, got '.*' \(Is a"):
        clear_cache()


@pytest.mark.parametrize(("value", "expected"), [("2.5", 2_500_000_000), ("0", 0), ("", 50e9), (None, 50e9)])
def test_budget_bytes_reads_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: float
) -> None:
    """A number of gigabytes; 50 without one."""
    monkeypatch.delenv("TUNER_CACHE_GB")
    if value is not None:
        monkeypatch.setenv("TUNER_CACHE_GB", value)
    assert budget_bytes() == expected


@pytest.mark.parametrize("value", ["many", "-1", "nan", "inf", "50GB"])
def test_budget_bytes_refuses_what_is_no_budget(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A bad value is the user's to change, before anything is evicted by it."""
    monkeypatch.setenv("TUNER_CACHE_GB", value)
    message = f"^TUNER_CACHE_GB: must be a number of gigabytes, 0 or more, got '{value}'$"
    with pytest.raises(StorageError, match=message):
        make_room(1)


def test_make_room_evicts_the_least_recently_used_first(cache: Path) -> None:
    """Only as many as needed go, by when they were used and not by when they were made."""
    paths = [write_entry(cache, "features", name, age=100 - number) for number, name in enumerate("abc")]
    assert make_room(100)
    assert all(path.exists() for path in paths)
    touch(paths[0])
    assert make_room(300)
    assert [path.exists() for path in paths] == [True, False, True]
    assert make_room(700)
    assert [path.exists() for path in paths] == [True, False, False]


def test_make_room_takes_sidecar_and_lock_along(cache: Path) -> None:
    """An evicted entry leaves nothing behind."""
    path = write_entry(cache, n_bytes=900, facts={"text": "features"})
    path.with_suffix(".lock").touch()
    assert make_room(900)
    assert not list(path.parent.iterdir())


def test_make_room_never_evicts_weights_and_hashes(cache: Path) -> None:
    """They cost hours, or nothing; and they take no room from what can be evicted."""
    kept = [write_entry(cache, "pretrained", age=999), write_entry(cache, "content", age=999)]
    pixels = write_entry(cache, "pixels")
    assert make_room(700)
    assert pixels.exists()
    assert make_room(1000)
    assert not pixels.exists()
    assert not make_room(1001, force=True)
    assert all(path.exists() for path in kept)


def test_make_room_evicts_nothing_in_vain(cache: Path) -> None:
    """What cannot fit drives nothing out, unless it is written all the same."""
    paths = [write_entry(cache, "features", name) for name in "abc"]
    assert not make_room(1001)
    assert all(path.exists() for path in paths)
    assert not make_room(1001, force=True)
    assert not list_files(cache)


def test_make_room_counts_the_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget larger than the disk does not make room on it."""
    set_budget(monkeypatch, 10**24)
    write_entry(cache)
    assert not make_room(10**20)
    assert list_files(cache)


def test_make_room_spares_what_it_is_told_to(cache: Path) -> None:
    """What the new features are computed from stays, even if it was used longest ago."""
    pixels = write_entry(cache, "pixels", "a", age=100)
    features = write_entry(cache, "features", "b")
    assert reclaimable_bytes() == 600
    assert reclaimable_bytes(spare=[pixels]) == 300
    assert make_room(700, spare=[pixels])
    assert pixels.exists()
    assert not features.exists()
    assert not make_room(800, spare=[pixels])


def test_make_room_spares_what_is_mapped(cache: Path) -> None:
    """Unlinking a mapped file would free nothing; it can go once the map is gone."""
    path = write_entry(cache, age=100)
    create_array(path, np.uint8, (500,))
    with path.open("rb") as file:
        mapped = map_array(file, np.uint8, (500,))
    assert not make_room(900, force=True)
    assert path.exists()
    assert mapped.nbytes == 500
    del mapped
    assert make_room(900)
    assert not path.exists()


def test_make_room_spares_what_is_being_written(cache: Path) -> None:
    """A writer's half-written file stays."""
    path = write_entry(cache)
    half = path.rename(path.with_name(f".{path.name}.42.tmp"))
    with locked(path):  # which sweeps what was there before
        assert not half.exists()
        half.write_bytes(b"x" * 300)
        assert not make_room(900, force=True)
        assert half.exists()


def test_make_room_sweeps_what_dead_writers_left(cache: Path) -> None:
    """Half-written files without a writer go first, and nothing that is whole goes for them."""
    whole = write_entry(cache, name="whole", age=999)
    path = write_entry(cache, name="half", n_bytes=600)
    half = path.rename(path.with_name(f".{path.name}.42.tmp"))
    assert make_room(600)
    assert whole.exists()
    assert not half.exists()


def test_touch_of_a_missing_file_is_no_error(cache: Path) -> None:
    """Another process may have evicted it."""
    touch(cache / "nowhere.npy")
    assert not cache.exists()


def test_kinds_have_a_folder_each(cache: Path) -> None:
    """Every kind can be listed and cleared by its name."""
    for kind in KINDS:
        write_entry(cache, kind)
    assert [entry.kind for entry in list_entries()] == list(KINDS)
