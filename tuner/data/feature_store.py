"""Features once: what a frozen backbone makes of images, as memory-mapped arrays shared by all workers and studies."""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tuner.data.array_file import compute_checksum, create_array, map_array
from tuner.data.cache import make_room, touch
from tuner.data.locks import find_lock, locked
from tuner.data.memory import available_memory
from tuner.paths import cache_root, replacing

_FORMAT = 1
"""Raised when the files look different."""
_MEMORY_FRACTION = 0.25
"""Share of the free memory that a bank may take if it cannot be kept."""
_GIGABYTE = 1e9
_N_TIMED_BYTES = 1 << 22
_verified: set[tuple[int, int, int, int]] = set()
"""Files whose bytes this process has compared with their checksum: device, inode, size and checksum."""

Values = NDArray[Any]
"""Shape ``(n_images, width)``, of the type that was asked for."""
Fill = Callable[[Values], None]
"""Writes every element of the array that it is given."""
Accept = Callable[[Values], bool]
"""Whether features that the cache holds are still what would be computed."""


@dataclass(frozen=True, kw_only=True)
class FeatureBank:
    """Features of images, one row each."""

    features: Values
    """Memory-mapped, copy on write, or in memory if it could not be kept. A mapped bank is
    never evicted, so let go of one that is no longer needed."""
    seconds: float
    """What computing it took when it was computed."""
    was_there: bool
    is_kept: bool
    """Whether the cache holds it now."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What to compute, and where it is kept."""

    path: Path
    key: Mapping[str, Any]
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    fill: Fill
    accept: Accept | None
    text: str

    @property
    def n_bytes(self) -> int:
        """Return the size of the features."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    @property
    def sidecar(self) -> Path:
        """The file that tells a whole bank from a torn one."""
        return self.path.with_suffix(".json")


def open_bank(
    key: Mapping[str, Any],
    *,
    shape: tuple[int, int],
    fill: Fill,
    accept: Accept | None = None,
    text: str = "",
    dtype: type[np.generic] = np.float32,
) -> FeatureBank:
    """Return features, from the cache if they are there.

    One process computes them, the others wait for it. A file that is torn, cut short, changed or of another shape is
    made again. What does not fit the budget or the disk, or cannot be written, is computed into memory instead.

    Args:
        key: Everything that decides the features, as plain JSON; equal keys mean equal features.
        shape: Number of images and width.
        fill: Computes them. Called again, for memory, if the disk fails after the first time.
        accept: Asked of features that were there; if it says no, they are made again. None takes them as they are.
        text: What they are, for a person who lists the cache.
        dtype: Of the features; types that NumPy lacks travel as whole numbers of their size.

    Raises:
        StorageError: If ``TUNER_CACHE_GB`` is no number.
        MemoryError: If they cannot be kept and would take more than a quarter of the free memory.
    """
    job = _Job(path=_find_path(key), key=key, shape=shape, dtype=np.dtype(dtype), fill=fill, accept=accept, text=text)
    kept = None
    if all(shape):
        with suppress(OSError):  # a cache that cannot be used costs time, never the trial
            kept = _find_bank(job) or _keep_bank(job)
    if kept is not None:
        return kept
    if job.n_bytes > _MEMORY_FRACTION * available_memory():
        raise MemoryError(f"features of {job.n_bytes / _GIGABYTE:.1f} GB fit neither the cache nor the memory")
    # Not under the lock: those who waited for it compute theirs at the same time.
    features = np.empty(shape, dtype=job.dtype)
    return FeatureBank(features=features, seconds=_time_fill(fill, features), was_there=False, is_kept=False)


def holds_bank(key: Mapping[str, Any]) -> bool:
    """Whether the cache seems to hold the features of a key; they may turn out torn or stale when they are opened."""
    path = _find_path(key)
    return path.is_file() and path.with_suffix(".json").is_file()


@cache
def time_keeping() -> tuple[float, float]:
    """Return what keeping a bank costs beside computing it, in seconds: any bank, and each of its bytes. Timed once.

    Finding that it is not there, writing, checking and reading it back. A cache that cannot be written costs little:
    what it should keep stays in memory.
    """
    small, large = (_time_bank(n_bytes) for n_bytes in (_N_TIMED_BYTES // 1024, _N_TIMED_BYTES))
    return small, max(0.0, large - small) / _N_TIMED_BYTES


def _time_bank(n_bytes: int) -> float:
    key = {"timed": n_bytes, "process": os.getpid(), "moment": time.time_ns()}
    start = time.perf_counter()
    bank = open_bank(key, shape=(1, n_bytes), fill=lambda out: out.fill(1), text="a test of speed", dtype=np.uint8)
    bank.features.max()
    seconds = time.perf_counter() - start
    path = _find_path(key)
    with suppress(OSError):
        for each in (path, path.with_suffix(".json"), find_lock(path)):
            each.unlink(missing_ok=True)
    return seconds


def _find_path(key: Mapping[str, Any]) -> Path:
    name = sha256(json.dumps({"format": _FORMAT, "key": key}, sort_keys=True).encode()).hexdigest()
    return cache_root() / "features" / f"{name}.npy"


def _find_bank(job: _Job) -> FeatureBank | None:
    """Return the bank if it is there, whole and accepted."""
    bank = _read_bank(job)
    return bank if bank and (job.accept is None or job.accept(bank.features)) else None


def _read_bank(job: _Job) -> FeatureBank | None:
    """Return the bank if it is there and whole."""
    try:
        facts = json.loads(job.sidecar.read_text(encoding="utf-8"))
        with job.path.open("rb") as file:
            features = map_array(file, job.dtype, job.shape)
            if not _is_whole(file, facts["checksum"]):
                return None
        seconds = float(facts["seconds"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    touch(job.path)
    return FeatureBank(features=features, seconds=seconds, was_there=True, is_kept=True)


def _keep_bank(job: _Job) -> FeatureBank | None:
    """Compute the bank into the cache, or wait for who does; None if it cannot be kept."""
    with locked(job.path):
        if bank := _find_bank(job):  # another process was faster
            return bank
        job.path.unlink(missing_ok=True)
        if not make_room(job.n_bytes):
            return None
        seconds = _build_bank(job)
        bank = _read_bank(job)
    return bank and FeatureBank(features=bank.features, seconds=seconds, was_there=False, is_kept=True)


def _build_bank(job: _Job) -> float:
    with replacing(job.path) as temporary:
        features = create_array(temporary, job.dtype, job.shape)
        seconds = _time_fill(job.fill, features)
        features.flush()
        del features
        with temporary.open("rb") as file:
            checksum = compute_checksum(file)
        facts = {"text": job.text, "key": job.key, "shape": job.shape, "seconds": seconds, "checksum": checksum}
        with replacing(job.sidecar) as sidecar:
            sidecar.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return seconds


def _time_fill(fill: Fill, features: Values) -> float:
    start = time.perf_counter()
    fill(features)
    return time.perf_counter() - start


def _is_whole(file: IO[bytes], checksum: int) -> bool:
    """Compare a file with its checksum, once per process."""
    status = os.fstat(file.fileno())
    identity = (status.st_dev, status.st_ino, status.st_size, checksum)
    if identity not in _verified:
        if compute_checksum(file) != checksum:
            return False
        _verified.add(identity)
    return True
