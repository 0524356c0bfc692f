"""What the cache folder holds, and its budget. All can be made again: pixels, features, weights, hashes, memory needs.

A folder per kind. The files of an entry share a name, a SHA-256: data, sidecar (JSON), lock, and half-written ones.
Only pixels and features make room for others, the least recently used first, and never while a process has them mapped:
on Linux such a file may be unlinked safely, but its bytes would be freed only when the last map is gone.
"""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from tuner.data.locks import claimed, find_lock, is_mapped
from tuner.errors import StorageError
from tuner.paths import cache_root

Kind = Literal["pixels", "features", "pretrained", "content", "memory"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SUFFIXES: dict[Kind, str] = {
    "pixels": ".npy",
    "features": ".npy",
    "pretrained": ".safetensors",
    "content": ".txt",
    "memory": ".json",
}
_JOINED: dict[Kind, str] = {
    "content": "hashes of {} data sets",
    "memory": "memory that training takes, {} times measured",
}
"""Kinds of many small files, which are listed as one."""
_EVICTABLE: tuple[Kind, ...] = ("pixels", "features")
"""Their writers hold a lock; the others' write within seconds."""
_NAME = re.compile(r"\.?(?P<stem>[0-9a-f]{64})\..+")
_DEFAULT_GIGABYTES = "50"
_GIGABYTE = 1e9
_STALE_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """Something in the cache."""

    kind: Kind
    path: Path
    """The data file; the folder for kinds of many small ones."""
    n_bytes: int
    """Of all its files."""
    last_used: datetime
    """UTC."""
    text: str
    """What it holds, for a person."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The files of an entry."""

    kind: Kind
    path: Path
    """The data file, which may be missing."""
    files: dict[Path, os.stat_result]

    @property
    def n_bytes(self) -> int:
        return sum(status.st_size for status in self.files.values())

    @property
    def used(self) -> float:
        """Seconds since the epoch."""
        if self.path in self.files:
            return self.files[self.path].st_mtime
        return max(status.st_mtime for status in self.files.values())

    @property
    def halves(self) -> list[Path]:
        return [path for path in self.files if path.suffix == ".tmp"]


def list_entries() -> tuple[CacheEntry, ...]:
    """Return what the cache holds, kind by kind, the most recently used first.

    Raises:
        StorageError: If the cache folder cannot be read.
    """
    entries: list[CacheEntry] = []
    with reporting_storage(cache_root()):
        for kind in KINDS:
            stored = [each for each in _scan(kind) if each.n_bytes]
            if kind in _JOINED and stored:
                entries.append(_join(kind, stored))
                continue
            for each in sorted(stored, key=lambda each: each.used, reverse=True):
                last_used = datetime.fromtimestamp(each.used, UTC)
                text = _describe(each)
                entries.append(
                    CacheEntry(kind=kind, path=each.path, n_bytes=each.n_bytes, last_used=last_used, text=text)
                )
    return tuple(entries)


def clear_cache(kinds: Iterable[Kind] | None = None) -> int:
    """Remove everything of some kinds, of all if none are given, but what is being written just now.

    A running study loses nothing: what it has mapped stays until it is done, the rest is made again.

    Returns:
        Bytes removed.

    Raises:
        StorageError: If the cache folder cannot be written.
    """
    with reporting_storage(cache_root()):
        return sum(_remove(stored) for kind in (KINDS if kinds is None else kinds) for stored in _scan(kind))


def budget_bytes() -> int:
    """Return how much pixels and features may take together: ``TUNER_CACHE_GB`` gigabytes, 50 unless it is set.

    Raises:
        StorageError: If it is no such number.
    """
    chosen = os.environ.get("TUNER_CACHE_GB") or _DEFAULT_GIGABYTES
    try:
        gigabytes = float(chosen)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise StorageError(f"TUNER_CACHE_GB: must be a number of gigabytes, 0 or more, got '{chosen}'")
    return int(gigabytes * _GIGABYTE)


def touch(path: Path) -> None:
    """Mark a data file of the cache as used now."""
    with suppress(OSError):  # evicted, or another user's
        os.utime(path)


def make_room(n_bytes: int, *, spare: Iterable[Path] = (), force: bool = False) -> bool:
    """Evict the least recently used pixels and features until more bytes fit the budget and the disk.

    The budget is for what can be evicted: pretrained weights and hashes do not count. Nothing is evicted in vain: if
    the bytes cannot fit, all stays as it is. Two processes that make room at once may together end above the budget,
    by what one of them adds.

    Args:
        n_bytes: What will be written.
        spare: Data files that must stay.
        force: They are written in any case, so evict all there is if that is not enough.

    Returns:
        Whether they fit now.

    Raises:
        StorageError: If ``TUNER_CACHE_GB`` is no number.
        OSError: If the cache folder cannot be read.
    """
    budget = budget_bytes()
    _sweep()
    n_held = sum(stored.n_bytes for kind in _EVICTABLE for stored in _scan(kind))
    lacking = max(n_held + n_bytes - budget, n_bytes - _free_bytes())
    if lacking <= 0:
        return True
    victims = _list_evictable(spare)
    if not force and sum(victim.n_bytes for victim in victims) < lacking:
        return False
    for victim in victims:
        with suppress(OSError):  # another user's
            lacking -= _remove(victim)
        if lacking <= 0:
            return True
    return False


def reclaimable_bytes(*, spare: Iterable[Path] = ()) -> int:
    """Return how many bytes ``make_room`` could evict.

    Raises:
        OSError: If the cache folder cannot be read.
    """
    return sum(stored.n_bytes for stored in _list_evictable(spare))


@contextmanager
def reporting_storage(folder: Path) -> Iterator[None]:
    """Turn what the system says about the cache folder into a ``StorageError``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"TUNER_CACHE_DIR: must be a folder that can be written, got '{folder}' ({reason}); "
            f"set TUNER_CACHE_DIR to another folder"
        ) from error


def _scan(kind: Kind) -> list[_Stored]:
    """Return what a kind's folder holds; files that are not the cache's own do not count."""
    folder = cache_root() / kind
    groups: dict[str, dict[Path, os.stat_result]] = {}
    try:
        found = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in found:
        if (match := _NAME.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
            with suppress(FileNotFoundError):  # another process removed it
                groups.setdefault(match["stem"], {})[folder / entry.name] = entry.stat(follow_symlinks=False)
    return [_Stored(kind=kind, path=folder / f"{stem}{_SUFFIXES[kind]}", files=files) for stem, files in groups.items()]


def _list_evictable(spare: Iterable[Path]) -> list[_Stored]:
    """Return what may be evicted, the least recently used first."""
    names = {path.name for path in spare}
    stored = [each for kind in _EVICTABLE for each in _scan(kind)]
    idle = [each for each in stored if each.path.name not in names and not is_mapped(each.path)]
    return sorted(idle, key=lambda each: each.used)


def _remove(stored: _Stored) -> int:
    """Remove an entry unless it is being written; return the bytes of what was removed."""
    if stored.kind not in _EVICTABLE:
        return _unlink(stored, [path for path in stored.files if path.suffix != ".tmp" or _is_stale(stored, path)])
    try:
        with claimed(stored.path) as is_free:
            if not is_free:
                return 0
            lock = find_lock(stored.path)
            freed = _unlink(stored, [path for path in stored.files if path != lock])
            lock.unlink(missing_ok=True)  # last: until then nobody else writes
            return freed
    except FileNotFoundError:  # the whole folder is gone
        return 0


def _unlink(stored: _Stored, paths: Iterable[Path]) -> int:
    freed = 0
    for path in paths:
        with suppress(FileNotFoundError):  # another process was faster, and counts it
            path.unlink()
            freed += stored.files[path].st_size
    return freed


def _sweep() -> None:
    """Remove half-written files whose writers are dead."""
    for stored in (stored for kind in KINDS for stored in _scan(kind) if stored.halves):
        with suppress(OSError):
            if stored.kind not in _EVICTABLE:
                _unlink(stored, [path for path in stored.halves if _is_stale(stored, path)])
                continue
            with claimed(stored.path) as is_free:
                _unlink(stored, stored.halves if is_free else [])


def _is_stale(stored: _Stored, path: Path) -> bool:
    return time.time() - stored.files[path].st_mtime > _STALE_SECONDS


def _free_bytes() -> int:
    root = cache_root().absolute()
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    return shutil.disk_usage(there).free


def _join(kind: Kind, stored: list[_Stored]) -> CacheEntry:
    return CacheEntry(
        kind=kind,
        path=cache_root() / kind,
        n_bytes=sum(each.n_bytes for each in stored),
        last_used=datetime.fromtimestamp(max(each.used for each in stored), UTC),
        text=_JOINED[kind].format(len(stored)),
    )


def _describe(stored: _Stored) -> str:
    if stored.path not in stored.files:
        return "incomplete"
    try:
        facts = json.loads(stored.path.with_suffix(".json").read_text(encoding="utf-8"))
        text = _describe_weights(facts) if stored.kind == "pretrained" else str(facts["text"])
    except (OSError, ValueError, LookupError, TypeError):
        return "not described"
    return "".join(character if character.isprintable() else "?" for character in text)


def _describe_weights(facts: Any) -> str:
    made_from = facts["facts"]
    return f"{made_from['backbone']}, {len(facts['epochs'])} epochs on {made_from['pretraining']['data']['source']}"
