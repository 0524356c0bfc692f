"""Tests of tuner.data.feature_store."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tuner.data.cache import list_entries
from tuner.data.feature_store import FeatureBank, open_bank
from tuner.errors import StorageError

KEY = {"data": "abc", "backbone": "resnet18", "view": [0, 4], "strength": 0.5}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache in the test's folder."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TUNER_CACHE_GB", raising=False)
    return tmp_path / "cache"


class Counter:
    """Fills banks with a value and counts how often."""

    def __init__(self, value: float = 1.5) -> None:
        self.value = value
        self.n_calls = 0

    def fill(self, features: NDArray[np.float32]) -> None:
        """Fill one bank."""
        self.n_calls += 1
        features[:] = self.value


def open_counted(
    counter: Counter, key: dict[str, Any] | None = None, *, n_images: int = 6, width: int = 4
) -> FeatureBank:
    """Open a bank of one value."""
    return open_bank(key or KEY, shape=(n_images, width), fill=counter.fill, text="a bank")


def find_bank(cache: Path) -> Path:
    """Return the only data file."""
    (path,) = (cache / "features").glob("*.npy")
    return path


def replace_bytes(path: Path, content: bytes) -> None:
    """Put another file in the place of one, as a disk or another program would; this process has not seen it."""
    other = path.with_name("other")
    other.write_bytes(content)
    other.replace(path)


def flip(content: bytes, position: int) -> bytes:
    """Return bytes with one bit changed."""
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


def test_open_bank_computes_once(cache: Path) -> None:
    """The second time the features come from the cache, with the seconds that they took."""
    counter = Counter()
    first = open_counted(counter)
    second = open_counted(counter)
    assert counter.n_calls == 1
    assert (first.was_there, first.is_kept) == (False, True)
    assert (second.was_there, second.is_kept) == (True, True)
    assert second.seconds == first.seconds > 0
    assert first.features.dtype == second.features.dtype == np.float32
    assert first.features.shape == second.features.shape == (6, 4)
    assert (second.features == 1.5).all()


def test_open_bank_keeps_a_bank_for_each_key(cache: Path) -> None:
    """Whatever differs in the key, other features come back; the order of its names does not matter."""
    keys = [KEY, KEY | {"backbone": "vgg16"}, KEY | {"view": [1, 4]}, KEY | {"strength": 0.6}, KEY | {"new": None}]
    for value, key in enumerate(keys):
        open_counted(Counter(value), key)
    for value, key in enumerate(keys):
        assert (open_counted(Counter(99), dict(reversed(key.items()))).features == value).all()


def test_open_bank_describes_itself(cache: Path) -> None:
    """The sidecar holds the key, and the list of entries the text."""
    open_counted(Counter())
    assert json.loads(find_bank(cache).with_suffix(".json").read_text())["key"] == KEY
    (entry,) = list_entries()
    assert (entry.kind, entry.text) == ("features", "a bank")


def test_open_bank_gives_a_writable_array(cache: Path) -> None:
    """A write by mistake neither crashes nor reaches the cache."""
    open_counted(Counter()).features.fill(9)
    assert (open_counted(Counter(2)).features == 1.5).all()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:0],
        lambda content: content + b"\0",
        lambda content: flip(content, len(content) - 3),
        lambda content: flip(content, 70),  # in the header's padding
        lambda content: content.replace(b"<f4", b"<i4"),
        lambda content: content.replace(b"(6, 4)", b"(4, 6)"),
        lambda content: b"x" * len(content),
    ],
)
def test_open_bank_rebuilds_what_is_not_whole(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    """A file that is torn, cut short, changed by a bit or of another format is made again, never used."""
    open_counted(Counter())
    path = find_bank(cache)
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    replace_bytes(path, damaged)
    bank = open_counted(Counter(2))
    assert (bank.was_there, bank.is_kept) == (False, True)
    assert (bank.features == 2).all()
    assert (open_counted(Counter(3)).features == 2).all()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"checksum": 1, "seconds": 1.0}', '{"checksum": null}'])
def test_open_bank_rebuilds_a_bank_with_a_torn_sidecar(cache: Path, content: str) -> None:
    """Without the sidecar that belongs to it, a data file is not trusted."""
    open_counted(Counter())
    find_bank(cache).with_suffix(".json").write_text(content)
    assert (open_counted(Counter(2)).features == 2).all()
    find_bank(cache).with_suffix(".json").unlink()
    assert (open_counted(Counter(3)).features == 3).all()


def test_open_bank_rebuilds_a_sidecar_of_another_bank(cache: Path) -> None:
    """A process killed between the two files leaves a pair that does not match."""
    open_counted(Counter())
    path = find_bank(cache)
    old = path.read_bytes()
    path.unlink()
    open_counted(Counter(2))
    replace_bytes(path, old)
    assert (open_counted(Counter(3)).features == 3).all()


def test_open_bank_never_uses_another_shape(cache: Path) -> None:
    """A key that forgets what decides the shape gives no wrong features."""
    open_counted(Counter())
    bank = open_counted(Counter(2), n_images=5)
    assert bank.features.shape == (5, 4)
    assert (bank.features == 2).all()


def test_open_bank_computes_into_memory_over_budget(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit the budget is not kept, and drives nothing out."""
    open_counted(Counter())
    monkeypatch.setenv("TUNER_CACHE_GB", "0.000001")
    counter = Counter(2)
    for _ in range(2):
        bank = open_counted(counter, {"large": True}, n_images=1000)
        assert (bank.was_there, bank.is_kept) == (False, False)
        assert (bank.features == 2).all()
    assert counter.n_calls == 2
    assert open_counted(Counter(3)).was_there


def test_open_bank_refuses_what_fits_neither_the_cache_nor_the_memory() -> None:
    """It says so before it asks the system for memory, and before anything is computed."""
    counter = Counter()
    with pytest.raises(MemoryError, match=r"^features of 40000\.0 GB fit neither the cache nor the memory$"):
        open_counted(counter, n_images=10**12, width=10)
    assert counter.n_calls == 0


def test_open_bank_rebuilds_what_is_not_accepted(cache: Path) -> None:
    """Only features that were there are asked about, never those that were computed just now."""
    asked: list[float] = []

    def accept(features: NDArray[np.float32]) -> bool:
        asked.append(float(features[0, 0]))
        return asked[-1] != 1.5

    first, second = Counter(), Counter(2)
    assert not open_bank(KEY, shape=(6, 4), fill=first.fill, accept=accept).was_there
    assert asked == []
    for was_there in (False, True):
        bank = open_bank(KEY, shape=(6, 4), fill=second.fill, accept=accept)
        assert (bank.was_there, bank.is_kept) == (was_there, True)
        assert (bank.features == 2).all()
    assert second.n_calls == 1
    assert set(asked) == {1.5, 2.0}


def test_open_bank_evicts_older_banks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank that fits the budget takes the place of the least recently used one that nobody has open."""
    monkeypatch.setenv("TUNER_CACHE_GB", "0.00001")
    held = open_counted(Counter(), {"bank": 0}, n_images=200)
    open_counted(Counter(), {"bank": 1}, n_images=200)
    assert open_counted(Counter(), {"bank": 2}, n_images=200).is_kept
    assert not open_counted(Counter(), {"bank": 1}, n_images=200).was_there
    assert open_counted(Counter(), {"bank": 0}, n_images=200).was_there
    assert (held.features == 1.5).all()


def test_open_bank_marks_its_use(cache: Path) -> None:
    """A bank that trials use again outlives those that none does."""
    open_counted(Counter())
    os.utime(find_bank(cache), (0, 0))
    open_counted(Counter())
    assert find_bank(cache).stat().st_mtime > 0


def test_open_bank_computes_into_memory_if_nothing_can_be_written(cache: Path) -> None:
    """A folder that cannot be written costs time, and no trial."""
    cache.touch()
    counter = Counter()
    bank = open_counted(counter)
    assert (bank.was_there, bank.is_kept, counter.n_calls) == (False, False, 1)
    assert (bank.features == 1.5).all()


def test_open_bank_takes_no_images(cache: Path) -> None:
    """No images are no error."""
    assert open_counted(Counter(), n_images=0).features.shape == (0, 4)


def test_open_bank_refuses_a_bad_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that is no number is the user's to change."""
    monkeypatch.setenv("TUNER_CACHE_GB", "much")
    with pytest.raises(StorageError, match=r"^TUNER_CACHE_GB: must be a number of gigabytes, 0 or more, got 'much'$"):
        open_counted(Counter())


def test_open_bank_leaves_nothing_of_a_computation_that_failed(cache: Path) -> None:
    """An error of the computation reaches the caller, and the next one computes anew."""

    def fail(features: NDArray[np.float32]) -> None:
        features[:] = 9
        raise ValueError("no features")

    with pytest.raises(ValueError, match="no features"):
        open_bank(KEY, shape=(6, 4), fill=fail)
    assert list_entries() == ()
    assert (open_counted(Counter(2)).features == 2).all()


_BUILD = """
import sys, time
from pathlib import Path
from tuner.data.feature_store import open_bank

def fill(features):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    features[:] = 7

bank = open_bank({"key": 1}, shape=(50, 8), fill=fill)
assert (bank.features == 7).all()
print(bank.was_there, bank.is_kept)
"""


def test_open_bank_is_built_by_one_of_several_processes(tmp_path: Path) -> None:
    """Three workers that want the same bank at once compute it once."""
    command = [sys.executable, "-c", _BUILD, str(tmp_path / "log")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = sorted(worker.communicate(timeout=60)[0].strip() for worker in workers)
    assert answers == ["False True", "True True", "True True"]
    assert (tmp_path / "log").read_text() == "built\n"


def test_open_bank_survives_a_killed_builder(tmp_path: Path, cache: Path) -> None:
    """The lock of a killed worker is free at once, and its half-written file goes."""
    script = _BUILD.replace("time.sleep(0.5)", "import os; os.kill(os.getpid(), 9)")
    worker = subprocess.run([sys.executable, "-c", script, str(tmp_path / "log")], check=False)
    assert worker.returncode == -9
    assert list((cache / "features").glob(".*.tmp"))
    counter = Counter(7)
    assert open_counted(counter, {"key": 1}, n_images=50, width=8).is_kept
    assert counter.n_calls == 1
    assert not list((cache / "features").glob(".*.tmp"))
