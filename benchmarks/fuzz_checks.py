"""Give broken inputs to what reads study files and images, and tell what came of them."""

import ctypes
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks.mutations import break_image, break_tables, break_text, make_images, read_base_tables

_SECONDS: dict[str, float] = {"study tables": 5, "study texts": 5, "image headers": 30}
_MEGABYTES: dict[str, float] = {"study tables": 64, "study texts": 64, "image headers": 2400}
_SLOW_SECONDS = 5
"""From here on an input is named, though it may be within its limit."""
_COMMAND_SECONDS = 120
_N_STORED = 50
"""Of each chunk of images these go through the store too."""


@dataclass(kw_only=True)
class Tally:
    """What came of inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    """Inputs that took long, but not longer than they may."""
    slowest_seconds: float = 0.0
    peak_megabytes: float = 0.0
    """Most that the resident memory grew for one input."""
    sees_every_peak: bool = True
    """Whether the kernel forgets a peak before each input; else a high one hides all lower ones after it."""

    def add(self, other: "Tally") -> None:
        """Take in what came of other inputs."""
        self.outcomes += other.outcomes
        self.findings += other.findings
        self.slow += other.slow
        self.slowest_seconds = max(self.slowest_seconds, other.slowest_seconds)
        self.peak_megabytes = max(self.peak_megabytes, other.peak_megabytes)
        self.sees_every_peak = self.sees_every_peak and other.sees_every_peak


class _WrongError(Exception):
    """An input ended in a way that it should not."""


@cache
def _images() -> dict[str, bytes]:
    return make_images()


def make_input(kind: str, seed: str) -> Any:
    """Return tables, the bytes of a study file, or the name and the bytes of an image."""
    source = random.Random(f"{kind} {seed}")
    match kind:
        case "study tables":
            return break_tables(read_base_tables(), source)
        case "image headers":
            return break_image(_images(), source)
        case _:
            return break_text(source)


def check_tables(tables: dict[str, Any], folder: Path) -> str:
    """Check the tables of a study file."""
    from tuner.spec.study import parse_spec

    return _check_spec(lambda: parse_spec(tables, folder))


def check_text(text: bytes, folder: Path) -> str:
    """Check the text of a study file."""
    from tuner.spec.study import load_spec

    path = folder / "study.toml"
    path.write_bytes(text)
    return _check_spec(lambda: load_spec(path))


def _check_spec(load: Callable[[], Any]) -> str:
    from tuner.errors import SpecError
    from tuner.spec.sections import StudySpec

    try:
        spec = load()
    except SpecError as error:
        for problem in error.problems:
            if not problem.isprintable() or not 10 < len(problem) < 850 or ": " not in problem:
                raise _WrongError(f"not a good line: {problem[:300]!r}") from error
        return f"refused: {len(error.problems)} problem" + "s" * (len(error.problems) > 1)
    if StudySpec.model_validate_json(spec.model_dump_json()) != spec:
        raise _WrongError("the spec does not survive JSON")
    return "accepted"


def check_image(named: tuple[str, bytes], _: Path) -> str:
    """Decode an image as the store does."""
    import numpy as np

    from tuner.data.decode import decode_image, identify_image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with identify_image(BytesIO(named[1])) as image:
                pixels = decode_image(image, size=16, resize="crop", interpolation="bicubic")
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001  # Pillow's formats raise nearly everything for broken files
            return f"bad image: {type(error).__name__}"
    if pixels.shape != (3, 16, 16) or pixels.dtype != np.uint8:
        raise _WrongError(f"pixels of {pixels.shape} {pixels.dtype}")
    return "decoded"


CHECKS: Mapping[str, Callable[[Any, Path], str]] = {
    "study tables": check_tables,
    "study texts": check_text,
    "image headers": check_image,
}


def check_chunk(kind: str, seeds: list[str]) -> Tally:
    """Check some inputs one after the other, in this process."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
        for seed in seeds:
            tally.add(_check_input(kind, seed, Path(name)))
        if kind == "image headers":
            tally.add(_check_store(seeds[:_N_STORED], Path(name)))
    return tally


def _check_input(kind: str, seed: str, folder: Path) -> Tally:
    given = make_input(kind, seed)
    tally = Tally(sees_every_peak=forget_peak())
    peak, started = _peak_megabytes(), time.process_time()
    try:
        with _time_limit(_SECONDS[kind]):
            outcome = CHECKS[kind](given, folder)
    except Exception as error:  # noqa: BLE001  # it is what is looked for
        outcome = "FINDING"
        tally.findings.append(f"{kind} {seed}: {type(error).__name__}: {str(error)[:300]}")
    seconds, grown = time.process_time() - started, _peak_megabytes() - peak
    if seconds > _SECONDS[kind]:
        # A decoder may take the limit's TimeoutError, an OSError, for its own.
        if not tally.findings:
            tally.findings.append(f"{kind} {seed}: took {seconds:.1f} s")
    elif seconds > _SLOW_SECONDS:
        tally.slow.append(f"{kind} {seed}: {seconds:.1f} s")
    if grown > _MEGABYTES[kind]:
        tally.findings.append(f"{kind} {seed}: took {grown:.0f} MB")
    tally.slowest_seconds, tally.peak_megabytes = seconds, grown
    tally.outcomes[outcome] += 1
    return tally


def forget_peak() -> bool:
    """Have the kernel forget the highest resident memory of this process; return whether it does, as Linux may.

    What has been freed is given back first: an input that takes the same pages again would seem to take nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _find_high_water() is not None
    except OSError:
        return False


def _find_high_water() -> float | None:
    """Return the highest resident memory since it was last forgotten, in MB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(found[1]) / 1024 if found else None


def _peak_megabytes() -> float:
    try:
        found = _find_high_water()
    except OSError:
        found = None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if found is None else found


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def end(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    # Of the process's own time: others may be busy too. One that sleeps for ever is found by its chunk's limit.
    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _check_store(seeds: list[str], folder: Path) -> Tally:
    """Put broken images into a store: each is in it, or on its list of bad ones with a line."""
    from tuner.data.source_folder import read_image_folder
    from tuner.data.store import open_store
    from tuner.spec.sections import DataSection

    for number, seed in enumerate(seeds):
        name, data = make_input("image headers", seed)
        place = folder / "images" / "ab"[number % 2] / f"{number}{Path(name).suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    os.environ["TUNER_CACHE_DIR"] = str(folder / "cache")
    section = DataSection(source="image_folder", path=str(folder / "images"), image_size=16, max_bad_fraction=0.999)
    tally = Tally()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            index = read_image_folder(section)
            store = open_store(index, range(len(seeds)), section, interpolation="bilinear")
        _check_account(store, len(seeds))
        tally.outcomes.update({"in the store": len(store.rows), "on its list of bad images": len(store.bad)})
    except Exception as error:  # noqa: BLE001  # it is what is looked for
        tally.findings.append(f"store of {seeds[0]} and the next: {type(error).__name__}: {str(error)[:300]}")
    return tally


def _check_account(store: Any, n_images: int) -> None:
    if len(store.rows) + len(store.bad) != n_images or len(store.pixels) != len(store.rows):
        raise _WrongError(f"{len(store.rows)} images and {len(store.bad)} bad ones of {n_images}")
    for bad in store.bad:
        if len(bad.reason.splitlines()) != 1:
            raise _WrongError(f"not a good line: {bad.reason!r}")


def check_command(seed: str) -> Tally:
    """Give a broken study file to ``tuner check``."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
        Path(name, "study.toml").write_bytes(make_input("command line", seed))
        started = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "tuner", "check", "study.toml"],
                cwd=name,
                env={**os.environ, "TUNER_CACHE_DIR": f"{name}/cache", "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                timeout=_COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Tally(outcomes=Counter({"FINDING": 1}), findings=[f"command line {seed}: no end"])
    said = done.stderr.decode(errors="replace")
    is_clear = done.returncode == 0 or re.fullmatch(r"(error: [^\n]+\n(  [^\n]+\n)*)+", said)
    is_good = is_clear and done.returncode in {0, *range(3, 11)} and "Traceback" not in said
    return Tally(
        outcomes=Counter({f"exit {done.returncode}" if is_good else "FINDING": 1}),
        findings=[] if is_good else [f"command line {seed}: exit {done.returncode}: {said[-500:]}"],
        slowest_seconds=time.perf_counter() - started,
    )
