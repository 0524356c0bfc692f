"""Decoded once: images as one memory-mapped array in the cache, shared by all workers and studies."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import PIL
from numpy.typing import NDArray

from tuner.data.array_file import compute_checksum, create_array, map_array
from tuner.data.cache import budget_bytes, make_room, reclaimable_bytes, reporting_storage, touch
from tuner.data.decode_pool import decode_files, decode_in_threads
from tuner.data.decode_process import Target
from tuner.data.index import ImageIndex
from tuner.data.locks import locked
from tuner.errors import DataError, StorageError
from tuner.paths import cache_root, replacing
from tuner.spec.sections import DataSection

_FORMAT = 1
"""Raised when the same images would give other pixels."""
MIN_FILES_FOR_PROCESSES = 1500
"""Fewer do not repay the 0.2 s that processes take to start: measured with photographs on two cores."""
_N_NAMED = 5
_GIGABYTE = 1e9

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class BadImage:
    """An image that could not be decoded."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PixelStore:
    """Decoded images."""

    pixels: NDArray[np.uint8]
    """Memory-mapped, copy on write; shape ``(n_rows, 3, size, size)``."""
    rows: NDArray[np.int64]
    """Rows of the index that ``pixels`` holds, in order; bad ones are left out."""
    bad: tuple[BadImage, ...]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What to decode, and how."""

    index: ImageIndex
    rows: NDArray[np.int64]
    size: int
    resize: str
    interpolation: str
    max_bad_fraction: float
    source: str
    """Where the images are, for a person."""

    def hash_key(self) -> str:
        """Return a SHA-256 of everything that the pixels depend on."""
        settings = [_FORMAT, PIL.__version__, self.size, self.resize, self.interpolation]
        images = [(self.index.names[row], self.index.image_version(row)) for row in self.rows]
        return sha256(json.dumps([settings, images]).encode()).hexdigest()

    @property
    def n_bytes(self) -> int:
        """Return the size of the pixels if all images can be decoded."""
        return int(np.prod(self.shape(0), dtype=object))

    @property
    def text(self) -> str:
        """Return what the store holds, for a person."""
        return f"{len(self.rows)} images of {self.source}, {self.size} px, {self.resize}, {self.interpolation}"

    def shape(self, n_bad: int) -> tuple[int, int, int, int]:
        """Return the shape of the pixels without the bad images."""
        return len(self.rows) - n_bad, 3, self.size, self.size


@dataclass(frozen=True, kw_only=True)
class _Crew:
    """Who decodes, and whom it tells."""

    n_threads: int
    min_files_for_processes: int
    on_progress: Progress | None


def open_store(
    index: ImageIndex,
    rows: Sequence[int] | NDArray[np.int64],
    section: DataSection,
    *,
    interpolation: str,
    n_threads: int = 1,
    min_files_for_processes: int = MIN_FILES_FOR_PROCESSES,
    verify: bool = True,
    on_progress: Progress | None = None,
) -> PixelStore:
    """Return decoded images, from the cache if they are there.

    Training needs them, so they are kept even if they exceed the cache's budget; all else makes room for them.

    Args:
        index: The images.
        rows: Which of them, in which order. Only these are opened.
        section: Image size, way of resizing and allowance for bad images.
        interpolation: A key of ``decode.RESAMPLING``.
        n_threads: Images decoded at a time.
        min_files_for_processes: So many files are decoded in processes instead of threads, which finish sooner.
        verify: Compare what is there with its checksum, about a second per GB, and decode anew what is damaged.
        on_progress: Called with the number of decoded images and of all.

    Raises:
        DataError: If more images than ``max_bad_fraction`` allows cannot be decoded.
        StorageError: If the cache folder cannot be written or has too little room, or its budget is no number.
    """
    job = _make_job(index, rows, section, interpolation)
    if not len(job.rows):
        return PixelStore(pixels=np.empty(job.shape(0), dtype=np.uint8), rows=job.rows, bad=())
    crew = _Crew(n_threads=n_threads, min_files_for_processes=min_files_for_processes, on_progress=on_progress)
    path = _place(job)
    store = _read_store(path, job, verify=verify)
    if store is None:
        with reporting_storage(path.parent), locked(path):
            store = _read_store(path, job, verify=verify)  # another process may have been faster
            if store is None:
                _build_store(path, job, crew)
                store = _read_store(path, job)
    if store is None:
        raise StorageError(f"TUNER_CACHE_DIR: must keep what is written to it, got other bytes back from '{path}'")
    touch(path)
    _check_allowance(job, store.bad)
    return store


def find_store(
    index: ImageIndex, rows: NDArray[np.int64], section: DataSection, *, interpolation: str
) -> PixelStore | None:
    """Return decoded images if they are in the cache; nothing is decoded or compared with its checksum."""
    job = _make_job(index, rows, section, interpolation)
    return _read_store(_place(job), job)


def check_room(
    index: ImageIndex, rows: NDArray[np.int64], section: DataSection, *, interpolations: Iterable[str]
) -> int:
    """Check that what is not decoded yet fits the cache folder, before anything expensive.

    Args:
        index: The images.
        rows: Which of them will be decoded.
        section: Image size and way of resizing.
        interpolations: One store is made for each.

    Returns:
        Bytes that all the stores take, those included that are there already.

    Raises:
        StorageError: If the cache folder cannot be written or has too little room, or its budget is no number.
    """
    budget_bytes()
    jobs = [_make_job(index, rows, section, interpolation) for interpolation in interpolations]
    needed = sum(job.n_bytes for job in jobs if _read_store(_place(job), job) is None)
    folder = cache_root() / "pixels"
    with reporting_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # tried, since permission bits say nothing of a read-only disk
            pass
        _check_disk(folder, needed, reclaimable_bytes(spare=map(_place, jobs)))
    return sum(job.n_bytes for job in jobs)


def _make_job(
    index: ImageIndex, rows: Sequence[int] | NDArray[np.int64], section: DataSection, interpolation: str
) -> _Job:
    return _Job(
        index=index,
        rows=np.asarray(rows, dtype=np.int64),
        size=section.image_size,
        resize=section.resize,
        interpolation=interpolation,
        max_bad_fraction=section.max_bad_fraction,
        source=section.path or section.source,
    )


def _place(job: _Job) -> Path:
    return cache_root() / "pixels" / f"{job.hash_key()}.npy"


def _read_store(path: Path, job: _Job, *, verify: bool = False) -> PixelStore | None:
    """Return the store at ``path``, or None if there is none that fits the job and has the bytes that were written."""
    try:
        facts = json.loads(_sidecar(path).read_text(encoding="utf-8"))
        bad = {int(position): reason for position, reason in facts["bad"].items()}
        with path.open("rb") as file:
            pixels = map_array(file, np.uint8, job.shape(len(bad)))
            if verify and facts["checksum"] != _compute_checksum(file, bad):
                return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    good = np.delete(np.arange(len(job.rows)), list(bad))
    return PixelStore(pixels=pixels, rows=job.rows[good], bad=_name_bad(job, bad))


def _name_bad(job: _Job, bad: dict[int, str]) -> tuple[BadImage, ...]:
    names = job.index.names
    return tuple(BadImage(name=names[job.rows[position]], reason=reason) for position, reason in bad.items())


def _sidecar(path: Path) -> Path:
    """Return the file that lists the bad images and describes the others; it is written before the pixels."""
    return path.with_suffix(".json")


def _check_allowance(job: _Job, bad: tuple[BadImage, ...]) -> None:
    if len(bad) > job.max_bad_fraction * len(job.rows):
        shown = ", ".join(f"{image.name} ({image.reason})" for image in bad[:_N_NAMED])
        more = f" and {len(bad) - _N_NAMED} more" if len(bad) > _N_NAMED else ""
        raise DataError(
            f"data.max_bad_fraction: at most {job.max_bad_fraction:g} of the images may fail to decode, "
            f"got {len(bad)} of {len(job.rows)}: {shown}{more}"
        )


def _build_store(path: Path, job: _Job, crew: _Crew) -> None:
    path.unlink(missing_ok=True)
    make_room(job.n_bytes, force=True)
    _check_disk(path.parent, job.n_bytes)
    with replacing(path) as temporary:
        pixels = create_array(temporary, np.uint8, job.shape(0))
        bad = _decode_all(job, temporary, pixels, crew)
        _check_allowance(job, _name_bad(job, bad))
        if bad:
            _drop_rows(temporary, pixels, bad)
        pixels.flush()
        del pixels
        with temporary.open("rb") as file:
            facts = {"text": job.text, "bad": bad, "checksum": _compute_checksum(file, bad)}
        with replacing(_sidecar(path)) as sidecar:
            sidecar.write_text(json.dumps(facts), encoding="utf-8")


def _compute_checksum(file: IO[bytes], bad: dict[int, str]) -> int:
    """Return what neither other pixels nor other positions of bad images, which shift the rows, leave as it is."""
    return compute_checksum(file, start=zlib.crc32(json.dumps(bad).encode()))


def _check_disk(folder: Path, needed: int, reclaimable: int = 0) -> None:
    free = shutil.disk_usage(folder).free + reclaimable
    if needed > free:
        raise StorageError(
            f"TUNER_CACHE_DIR: must have {needed / _GIGABYTE:.1f} GB free for the decoded images, "
            f"got {free / _GIGABYTE:.1f} GB in '{folder}'; set TUNER_CACHE_DIR or lower data.image_size"
        )


def _decode_all(job: _Job, path: Path, pixels: NDArray[np.uint8], crew: _Crew) -> dict[int, str]:
    """Fill ``pixels``, which is ``path`` mapped; return why images failed, by their position."""
    reasons: dict[int, str] = {}

    def note(position: int, reason: str) -> None:
        reasons[position] = reason
        if crew.on_progress:
            crew.on_progress(len(reasons), len(job.rows))

    index, rows = job.index, [int(row) for row in job.rows]
    target = Target(path=str(path), size=job.size, resize=job.resize, interpolation=job.interpolation)
    if index.find_file and crew.n_threads > 1 and len(rows) >= crew.min_files_for_processes:
        decode_files(target, [index.find_file(row) for row in rows], n_processes=crew.n_threads, on_image=note)
    openers = {position: partial(index.open_image, row) for position, row in enumerate(rows) if position not in reasons}
    decode_in_threads(target, pixels, openers, n_threads=crew.n_threads, on_image=note)
    return {position: reason for position, reason in sorted(reasons.items()) if reason}


def _drop_rows(path: Path, pixels: np.memmap, bad: dict[int, str]) -> None:
    """Move the good images of a ``.npy`` together and shorten the file; copying it would need the disk twice."""
    good = np.delete(np.arange(len(pixels)), list(bad))
    for target, source in enumerate(good):
        pixels[target] = pixels[source]
    pixels.flush()
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(good), *pixels.shape[1:])}
    with path.open("r+b") as file:
        np.lib.format.write_array_header_1_0(file, header)  # as long as before: it reserves room for any first axis
        file.truncate(pixels.offset + pixels[0].nbytes * len(good))
