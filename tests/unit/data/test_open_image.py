"""Tests of tuner.data.decode: how image files are opened, and how many large ones are in memory at a time."""

import os
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from benchmarks.mutations import make_images
from tests.unit.data.test_decode import make_png, reopen
from tuner.data.decode import FORMATS, LargeImageError, decode_image, identify_image, open_file, open_image

IMAGES = make_images()
SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch x) (w) file\n%%EOF\n"


def count_open() -> int:
    """Return how many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def decode(image: Image.Image, *, takes_turns: bool = True) -> np.ndarray:
    """Decode to 8 px."""
    return decode_image(image, size=8, resize="squash", interpolation="bilinear", takes_turns=takes_turns)


def make_icon(width: int, height: int) -> bytes:
    """Return an icon that holds a PNG, which Pillow decodes as soon as it opens it."""
    png = make_png(width, height)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png


@pytest.mark.parametrize("data", [SCRIPT, make_icon(60_000, 4_000)], ids=["EPS", "ICO"])
def test_identify_image_leaves_other_formats_alone(data: bytes) -> None:
    """Their code would run before anything can be checked."""
    with pytest.raises(UnidentifiedImageError, match="cannot identify image file"):
        identify_image(BytesIO(data))


@pytest.mark.parametrize("name", IMAGES)
def test_open_image_opens_every_format(tmp_path: Path, name: str) -> None:
    """By what is in the file: its name may say something else. The file is closed in the end."""
    path = tmp_path / "image.unknown"
    path.write_bytes(IMAGES[name])
    before = count_open()
    with open_image(path) as image:
        assert image.format in FORMATS
        assert decode(image).shape == (3, 8, 8)
    assert count_open() == before


def test_images_of_every_format_are_tried() -> None:
    """What Pillow can write here is among the images that are opened, and broken, by the tests."""
    kinds = {Image.open(BytesIO(data)).format for data in IMAGES.values()}
    assert kinds >= FORMATS.intersection(Image.SAVE)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (os.mkfifo, "must be a file, got a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "must be a file, got a device"),
        (os.mkdir, "Is a directory"),
    ],
)
def test_open_file_opens_regular_files_alone(tmp_path: Path, make: Callable[[Path], None], problem: str) -> None:
    """A pipe would keep the reader waiting, a device might have no end; no descriptor is left."""
    make(tmp_path / "x.png")
    before = count_open()
    with pytest.raises(OSError, match=problem):
        open_file(tmp_path / "x.png")
    assert count_open() == before


class Loading:
    """Counts the images that are loaded at a time."""

    def __init__(self, n_expected: int) -> None:
        self.n_now = self.n_most = 0
        self._lock = threading.Lock()
        self._all_here = threading.Barrier(n_expected)

    def make_image(self) -> Image.Image:
        """Return an image that waits, as it is loaded, for the others that are expected."""
        image = Image.new("RGB", (8, 8))

        def load() -> None:
            with self._lock:
                self.n_now += 1
                self.n_most = max(self.n_most, self.n_now)
            self._all_here.wait(20)
            time.sleep(0.01)  # long enough for the others to come in, if they may
            with self._lock:
                self.n_now -= 1

        image.load = load  # type: ignore[method-assign]
        return image


@pytest.mark.parametrize(("large_pixels", "n_expected"), [(63, 1), (64, 3)])
def test_decode_image_decodes_large_images_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, large_pixels: int, n_expected: int
) -> None:
    """On many cores they would fill the memory together; others do not wait."""
    monkeypatch.setattr("tuner.data.decode.LARGE_PIXELS", large_pixels)
    loading = Loading(n_expected)
    with ThreadPoolExecutor(3) as pool:
        shapes = list(pool.map(lambda _: decode(loading.make_image()).shape, range(3)))
    assert shapes == [(3, 8, 8)] * 3
    assert loading.n_most == n_expected


def test_decode_image_leaves_large_images_that_take_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a JPEG has in memory counts: it can be decoded smaller, unless it is progressive."""
    monkeypatch.setattr("tuner.data.decode.LARGE_PIXELS", 1000)
    image = Image.new("RGB", (64, 64))
    assert decode(reopen(image, "JPEG"), takes_turns=False).shape == (3, 8, 8)
    for large in (reopen(image, "JPEG", progressive=True), reopen(image, "PNG")):
        with pytest.raises(LargeImageError, match=r"^$"):
            decode(large, takes_turns=False)
