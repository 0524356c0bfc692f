"""From an image as stored to three channels of 8 bit in a square."""

from typing import Any

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
FORMATS = frozenset(
    {"AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
)
"""Pillow goes by a file's content and not by its name, and would start Ghostscript for an EPS."""
_ALPHA_MODES = {"RGBA", "LA", "PA", "RGBa", "La"}
_N_BAND_ROWS = 256


def decode_image(image: Image.Image, *, size: int, resize: str, interpolation: str) -> NDArray[np.uint8]:
    """Convert an image to RGB and resize it to a square.

    Args:
        image: As opened; animated images give their first frame, EXIF rotation is applied.
        size: Height and width of the result, in px.
        resize: ``squash`` to the square, or ``crop`` to the centre square first.
        interpolation: A key of ``RESAMPLING``.

    Returns:
        Shape ``(3, size, size)``.

    Raises:
        ValueError: If it has more than ``MAX_PIXELS``, a side over ``MAX_SIDE`` or a format not in ``FORMATS``.
            Nothing is decoded then.
        Exception: Whatever Pillow raises for a broken file; it has no common base.
    """
    _check_header(image)
    # JPEG can be decoded at 1/2, 1/4 or 1/8; twice the size leaves enough for a clean resize.
    image.draft(None, (2 * size, 2 * size))
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
