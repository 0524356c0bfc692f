"""Tests of tuner.data.decode_pool and the processes that it starts, through the store."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tuner.data.index import ImageIndex
from tuner.data.source_folder import read_image_folder
from tuner.data.sources import read_digits
from tuner.data.store import PixelStore, open_store
from tuner.spec.sections import DataSection

ALWAYS, NEVER = 1, 10**9
"""Numbers of files from which on processes decode."""

KILLING_CODEC = """
import os, resource, signal
def act(*_):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.SIGSEGV)
"""
REGISTRATION = """
from PIL import Image
Image.preinit()
Image.register_open("BMP", act, lambda prefix: prefix.startswith(b"KILL"))
"""

DOOMED = """
import os, signal, sys
from pathlib import Path
from tests.unit.data.test_decode_pool import ALWAYS, list_children, make_section, open_all
def report(n_done, n_all):
    print(*list_children(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
open_all(make_section(Path(sys.argv[1])), min_files_for_processes=ALWAYS, on_progress=report)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache in the test's folder."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_data(root: Path, n_images: int = 40) -> Path:
    """Write images of noise of two classes."""
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(n_images):
            noise = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / name / f"{number:03}.jpg")
    return root


def make_section(root: Path, **fields: Any) -> DataSection:
    """Return a section that reads ``root``."""
    return DataSection.model_validate({"source": "image_folder", "path": str(root), "image_size": 8, **fields})


def open_all(section: DataSection, index: ImageIndex | None = None, **options: Any) -> PixelStore:
    """Open a store with every image of the section."""
    index = index or read_image_folder(section)
    return open_store(
        index, range(len(index.names)), section, **{"interpolation": "bicubic", "n_threads": 2, **options}
    )


def list_children() -> list[int]:
    """Return the decoding processes of this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == os.getpid() and b"tuner.data.decode_process" in command:
            found.append(int(folder.name))
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def watch_children(seen: set[int], act: Callable[[list[int]], None] = lambda _: None) -> Callable[[int, int], None]:
    """Return a progress callback that collects the decoding processes, and acts on the first ones."""

    def report(n_done: int, n_all: int) -> None:
        if n_done % 10 != 1:  # looking for them takes milliseconds
            return
        is_first = not seen
        seen.update(children := list_children())
        if is_first and children:
            act(children)

    return report


def use_codec(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new processes run code for files that begin with KILL."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code + REGISTRATION)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_processes_decode_what_threads_decode(tmp_path: Path, cache: Path) -> None:
    """Pixels, rows and bad images are the same, for broken files, odd modes and odd names too."""
    root = write_data(tmp_path / "data")
    Image.new("RGBA", (30, 20), (1, 2, 3, 4)).save(root / "ant/alpha.png")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(root / "ant/deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.linear_gradient("L").save(root / "ant/turned.jpg", exif=turned)
    (root / "ant/000.jpg").rename(root / "ant" / os.fsdecode(b"\xff\n\xe4.jpg"))
    (root / "bee/bomb.pgm").write_bytes(b"P5 20000 100000 255\n")
    (root / "bee/cut.jpg").write_bytes((root / "bee/001.jpg").read_bytes()[:700])
    (root / "bee/empty.jpg").touch()
    os.mkfifo(root / "bee/pipe.jpg")
    (root / "bee/gone.jpg").symlink_to("nowhere")
    seen: set[int] = set()
    for section in (make_section(root, max_bad_fraction=0.1, resize=way) for way in ("squash", "crop")):
        threads = open_all(section, min_files_for_processes=NEVER, on_progress=watch_children(seen))
        assert not seen
        for path in (cache / "pixels").iterdir():
            path.unlink()
        processes = open_all(section, min_files_for_processes=ALWAYS, on_progress=watch_children(seen))
        assert len(seen) == 2
        seen.clear()
        assert (processes.pixels == threads.pixels).all()
        assert processes.rows.tolist() == threads.rows.tolist()
        assert processes.bad == threads.bad
        assert [image.name for image in processes.bad] == [f"bee/{name}" for name in BAD_NAMES]


BAD_NAMES = ("bomb.pgm", "cut.jpg", "empty.jpg", "gone.jpg", "pipe.jpg")


def test_progress_of_processes_counts_every_image(tmp_path: Path) -> None:
    """Each image counts once."""
    seen: list[tuple[int, int]] = []
    section = make_section(write_data(tmp_path / "data"))
    open_all(section, min_files_for_processes=ALWAYS, on_progress=lambda *counts: seen.append(counts))
    assert seen == [(number, 80) for number in range(1, 81)]


@pytest.mark.parametrize(
    "options", [{"min_files_for_processes": 81}, {"n_threads": 1, "min_files_for_processes": ALWAYS}]
)
def test_small_work_starts_no_process(tmp_path: Path, options: dict[str, Any]) -> None:
    """Few files, or a single core, stay in threads."""
    seen: set[int] = set()
    open_all(make_section(write_data(tmp_path / "data")), on_progress=watch_children(seen), **options)
    assert not seen


def test_arrays_start_no_process() -> None:
    """Images in memory would have to be sent."""
    seen: set[int] = set()
    section = DataSection(source="digits", image_size=8)
    open_all(section, read_digits(section), min_files_for_processes=ALWAYS, on_progress=watch_children(seen))
    assert not seen


def test_killed_process_costs_no_image(tmp_path: Path, cache: Path) -> None:
    """What a process had in hand when it was killed is decoded again, in another process."""

    def kill(children: list[int]) -> None:
        os.kill(children[0], signal.SIGKILL)

    section = make_section(write_data(tmp_path / "data", n_images=200))
    expected = open_all(section, min_files_for_processes=NEVER).pixels.copy()
    for path in (cache / "pixels").iterdir():
        path.unlink()
    seen: set[int] = set()
    store = open_all(section, min_files_for_processes=ALWAYS, on_progress=watch_children(seen, kill))
    assert len(seen) == 3
    assert store.bad == ()
    assert (store.pixels == expected).all()


def test_image_that_kills_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file on which the codec crashes is named, and its neighbours are not lost with it."""
    root = write_data(tmp_path / "data")
    for name in ("ant/007.jpg", "bee/039.jpg"):
        (root / name).write_bytes(b"KILL" * 10)
    use_codec(tmp_path / "codec", KILLING_CODEC, monkeypatch)
    store = open_all(make_section(root, max_bad_fraction=0.1), min_files_for_processes=ALWAYS)
    reason = "killed the process that decoded it: signal 11"
    assert {image.name: image.reason for image in store.bad} == {"ant/007.jpg": reason, "bee/039.jpg": reason}
    assert store.pixels.any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("interpreter", ["/nowhere/python", "/bin/false"])
def test_processes_that_do_not_start_leave_the_work_to_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interpreter: str
) -> None:
    """Where no process can be had, the store is made all the same."""
    monkeypatch.setattr(sys, "executable", interpreter)
    store = open_all(make_section(write_data(tmp_path / "data")), min_files_for_processes=ALWAYS)
    assert len(store.rows) == 80
    assert store.pixels.any(axis=(1, 2, 3)).all()


def test_interrupt_ends_the_processes(tmp_path: Path, cache: Path) -> None:
    """Ctrl-C leaves no process and no half file."""

    def interrupt(_: list[int]) -> None:
        raise KeyboardInterrupt

    seen: set[int] = set()
    section = make_section(write_data(tmp_path / "data"))
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        open_all(section, min_files_for_processes=ALWAYS, on_progress=watch_children(seen, interrupt))
    assert seen
    assert list_children() == []
    assert not list((cache / "pixels").glob("*.npy*"))


def test_death_of_the_caller_ends_the_processes(tmp_path: Path) -> None:
    """Whoever is killed while it decodes leaves no process behind."""
    root = write_data(tmp_path / "data", n_images=500)
    done = subprocess.run(
        [sys.executable, "-c", DOOMED, str(root)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_alive(pid) for pid in pids)


def test_decode_process_imports_little() -> None:
    """It is started per data set, so its start has to cost little."""
    heavy = ("torch", "optuna", "pydantic", "scipy", "tuner.data.store", "tuner.data.index", "tuner.spec", "asyncio")
    code = f"import tuner.data.decode_process, sys\nprint([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
