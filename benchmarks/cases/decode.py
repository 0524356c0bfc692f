"""Does decoding a folder of JPEG files into the store run at the speed of a bare decode loop on all cores?

The bare loops open, decode at the draft size, convert and resize as the store does, and keep nothing; the baseline is
the faster of threads and processes. The goal is 0.85 of it.
"""

import os
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from benchmarks.harness import Case
from benchmarks.material import IMAGES_VARIABLE, empty_cache, find_folder, write_generated

SIZE = 128
_N_COPIES = 5
GOAL = 0.85


@contextmanager
def open_folder(*, smoke: bool) -> Iterator[Path]:
    """Yield a folder with train/ and val/: photographs where they are given, several copies of each, else made ones."""
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        folder, images = Path(name), find_folder(IMAGES_VARIABLE)
        if images is None or smoke:
            write_generated(folder, n_images=20 if smoke else 1000, n_classes=2, size=400, suffix="jpg")
            yield folder
            return
        with zipfile.ZipFile(images / "hymenoptera.zip") as archive:
            for member in archive.namelist():
                parts = Path(member).parts
                if len(parts) != 4:
                    continue
                for copy in range(_N_COPIES):  # few photographs decode too fast for a clock
                    place = folder.joinpath(*parts[1:-1], f"{copy}_{parts[-1]}")
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(archive.read(member))
        yield folder


def decode_bare(path: Path) -> int:
    """Decode one file as the store does, without it."""
    with Image.open(path) as image:
        image.draft(None, (2 * SIZE, 2 * SIZE))
        resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, reducing_gap=3.0)
        return resized.width


def run_bare(_: int, smoke: bool) -> float:
    """Return images a second of the faster of the bare loops."""
    cores = len(os.sched_getaffinity(0))
    with open_folder(smoke=smoke) as folder:
        paths = sorted(folder.rglob("*.jpg"))
        for path in paths:  # both arms find the files in memory
            path.read_bytes()
        pools = (
            ThreadPoolExecutor(cores),
            ProcessPoolExecutor(cores, mp_context=get_context("forkserver")),
        )
        return max(_time_pool(pool, paths) for pool in pools)


def _time_pool(pool: Executor, paths: list[Path]) -> float:
    with pool:
        list(pool.map(decode_bare, paths[:2]))  # the processes are there
        started = time.perf_counter()
        list(pool.map(decode_bare, paths, chunksize=8))
        return len(paths) / (time.perf_counter() - started)


def run_store(_: int, smoke: bool) -> float:
    """Return images a second of ``open_store`` with an empty cache, listing the folder not included."""
    from tuner.data.sources import read_index
    from tuner.data.splits import cut_splits, search_rows
    from tuner.data.store import open_store
    from tuner.spec.sections import DataSection

    with open_folder(smoke=smoke) as folder, empty_cache():
        section = DataSection(source="image_folder", path=str(folder), image_size=SIZE)
        index = read_index(section)
        rows = search_rows(cut_splits(index, section, 0))
        for row in rows:
            Path(folder, index.names[row]).read_bytes()
        open_all = partial(open_store, index, rows, section, interpolation="bicubic")
        started = time.perf_counter()
        store = open_all(n_threads=len(os.sched_getaffinity(0)))
        return len(store.rows) / (time.perf_counter() - started)


CASE = Case(
    name="decode",
    question="how many JPEG images a second go into the store, against a bare decode loop on all cores?",
    unit="images/s",
    baseline="bare decode loop",
    regression=f"less than {GOAL} of the bare loop",
    arms={"bare decode loop": run_bare, "tuner store": run_store},
)
