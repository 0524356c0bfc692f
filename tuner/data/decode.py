"""From an image as stored to three channels of 8 bit in a square."""

import errno
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Names of interpolations, as in timm."""

MAX_PIXELS = 150_000_000
"""Width times height of an image as stored; decoding takes up to 16 bytes for each. Pillow's own limit is 179 million,
and says "decompression bomb"."""
MAX_SIDE = 65_535
"""What JPEG can hold. A broken animation of 7 million by 20 px was found to take 17 s."""
FORMATS = frozenset({"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"})
"""Pillow goes by a file's content and not by its name, and would start Ghostscript for an EPS. ICO is not among them:
Pillow decodes it as it opens it, before anything can be checked."""
_PLUGINS = tuple(
    name
    for name in ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF", "TGA")
    if find_spec("PIL.AvifImagePlugin") or name != "AVIF"  # new in Pillow 11.3
)
"""Of ``FORMATS``, in the order in which they are tried: the common ones first, last TGA, which has no signature. MPO is
opened as a JPEG."""
LARGE_PIXELS = 20_000_000
"""Images above are decoded one at a time, since each may take up to 16 bytes a pixel: 16 cores would need 38 GB."""
_large_turn = ThreadPoolExecutor(1)
"""A thread for them all and no lock, since the allocator keeps for each thread what that has freed."""
_ALPHA_MODES = {"RGBA", "LA", "PA", "RGBa", "La"}
_N_BAND_ROWS = 256


class LargeImageError(Exception):
    """The image has more than ``LARGE_PIXELS``, and others are being decoded beside it."""


def open_file(path: str | Path) -> BufferedReader:
    """Open a regular file for reading. Anything else might keep the reader waiting for ever.

    Raises:
        OSError: If it is something else, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(f"must be a file, got a {'pipe' if kind == stat.S_IFIFO else 'device'}")


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file; it is closed with the context. Nothing is decoded yet.

    Raises:
        OSError: If it cannot be opened or is no regular file.
        Exception: Whatever Pillow raises for a broken file; it has no common base.
    """
    with open_file(path) as file, identify_image(file) as image:
        yield image


def identify_image(file: IO[bytes]) -> Image.Image:
    """Return the image of an open file if it has one of ``FORMATS``. The code for other formats never sees it.

    Raises:
        Exception: Whatever Pillow raises for a broken file; it has no common base.
    """
    return Image.open(file, formats=_PLUGINS)


def decode_image(
    image: Image.Image, *, size: int, resize: str, interpolation: str, takes_turns: bool = True
) -> NDArray[np.uint8]:
    """Convert an image to RGB and resize it to a square.

    Args:
        image: As opened; animated images give their first frame, EXIF rotation is applied.
        size: Height and width of the result, in px.
        resize: ``squash`` to the square, or ``crop`` to the centre square first.
        interpolation: A key of ``RESAMPLING``.
        takes_turns: Whether a large image waits until no other thread of this process decodes one; otherwise it is not
            decoded.

    Returns:
        Shape ``(3, size, size)``.

    Raises:
        ValueError: If it has more than ``MAX_PIXELS``, a side over ``MAX_SIDE`` or a format not in ``FORMATS``.
            Nothing is decoded then.
        LargeImageError: If it is large and takes no turns.
        Exception: Whatever Pillow raises for a broken file; it has no common base.
    """
    _check_header(image)
    stored_size = image.size
    # JPEG can be decoded at 1/2, 1/4 or 1/8; twice the size leaves enough for a clean resize.
    image.draft(None, (2 * size, 2 * size))
    # Of a progressive JPEG all coefficients are in memory, whatever the scale.
    width, height = stored_size if "progressive" in image.info else image.size
    if width * height <= LARGE_PIXELS:
        return _convert(image, size, resize, interpolation)
    if not takes_turns:
        raise LargeImageError
    return _large_turn.submit(_convert, image, size, resize, interpolation).result()


def _convert(image: Image.Image, size: int, resize: str, interpolation: str) -> NDArray[np.uint8]:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    image = to_rgb(image)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Cropping first and resizing the square is the same as resizing the shorter side and cropping, and cheaper.
    box = (left, top, left + side, top + side) if resize == "crop" else None
    image = image.resize((size, size), RESAMPLING[interpolation], box=box, reducing_gap=3.0)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (3, size, size)


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"must have at most {MAX_PIXELS // 1_000_000} megapixels, got {width} x {height} px")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"must be at most {MAX_SIDE} px wide and high, got {width} x {height} px")
    if image.format is not None and image.format not in FORMATS:
        raise ValueError(f"must be one of {', '.join(sorted(FORMATS))}, got {image.format}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB: alpha over white, 16 bit scaled down."""
    if image.mode.startswith("I"):
        return _from_values(np.asarray(image), 255 / 65535)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        return _from_values(values, 255 if values.max() <= 1 else 1)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_values(values: NDArray[Any], factor: float) -> Image.Image:
    """Return grey values as an image: times a factor on the scale 0…255; what lies outside is clipped."""
    grey = np.empty(values.shape, dtype=np.uint8)
    for top in range(0, len(values), _N_BAND_ROWS):  # in bands: as float64, a whole large image would fill the memory
        band = slice(top, top + _N_BAND_ROWS)
        grey[band] = np.rint(values[band].astype(np.float64) * factor).clip(0, 255)
    return Image.fromarray(grey).convert("RGB")


def explain_bad_image(error: Exception) -> str:
    """Return one line on why an image could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
