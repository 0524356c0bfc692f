"""Tests of tuner.data.decode: what counts as a normal image, and what does not."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tuner.data.decode import MAX_PIXELS, RESAMPLING, decode_image, to_rgb


def reopen(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """Save an image and open what was saved."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(BytesIO(buffer.getvalue()))


def decode(image: Image.Image, *, size: int = 8, resize: str = "squash") -> np.ndarray:
    """Decode with the nearest pixel, so that values stay as they are."""
    return decode_image(image, size=size, resize=resize, interpolation="nearest")


def make_palette(transparency: bytes | int | None = None) -> Image.Image:
    """Return a palette image, all of colour 1: green."""
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    return reopen(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


def make_grey16(value: int) -> Image.Image:
    """Return a 16-bit image of one value."""
    return Image.fromarray(np.full((8, 8), value, dtype=np.uint16))


def make_animation(kind: str) -> Image.Image:
    """Return two frames, red and then blue."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return reopen(frames[0], kind, save_all=True, append_images=frames[1:])


NORMAL = {
    "rgb": (Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3)),
    "grey": (Image.new("L", (8, 8), 77), (77, 77, 77)),
    "bilevel": (Image.new("1", (8, 8), 1), (255, 255, 255)),
    "grey with alpha": (Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)),
    "rgba clear": (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), (255, 255, 255)),
    "rgba half": (Image.new("RGBA", (8, 8), (255, 0, 0, 128)), (255, 127, 127)),
    "cmyk": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
    "cmyk jpeg": (reopen(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG", quality=95), (0, 0, 0)),
    "ycbcr": (Image.new("RGB", (8, 8), (9, 9, 9)).convert("YCbCr"), (9, 9, 9)),
    "16 bit": (make_grey16(65535), (255, 255, 255)),
    "16 bit png": (reopen(make_grey16(257 * 100), "PNG"), (100, 100, 100)),
    "16 bit tiff": (reopen(make_grey16(257 * 100), "TIFF"), (100, 100, 100)),
    "32 bit": (Image.new("I", (8, 8), 257 * 50), (50, 50, 50)),
    "float to 1": (Image.new("F", (8, 8), 0.2), (51, 51, 51)),
    "float to 255": (Image.new("F", (8, 8), 200.0), (200, 200, 200)),
    "palette": (make_palette(), (0, 255, 0)),
    "palette with a clear colour": (make_palette(1), (255, 255, 255)),
    "palette with alpha": (make_palette(bytes([255, 0])), (255, 255, 255)),
    "grey with a clear value": (reopen(Image.new("L", (8, 8), 5), "PNG", transparency=5), (255, 255, 255)),
    "gif": (make_animation("GIF"), (254, 0, 0)),
    "animated png": (make_animation("PNG"), (255, 0, 0)),
}


@pytest.mark.parametrize(("image", "colour"), NORMAL.values(), ids=NORMAL)
def test_decode_image_converts_every_mode(image: Image.Image, colour: tuple[int, int, int]) -> None:
    """Each kind of image becomes three channels of 8 bit."""
    pixels = decode(image)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert np.abs(pixels[:, 4, 4].astype(int) - colour).max() <= 1


def test_decode_image_applies_exif_rotation() -> None:
    """Orientation 6 means: turn clockwise, so that the left side comes to the top."""
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    picture[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode(reopen(Image.fromarray(picture), "PNG", exif=exif))
    assert pixels[:, :4].min() == 255
    assert pixels[:, 4:].max() == 0


def test_decode_image_squashes_or_crops() -> None:
    """Squash keeps the sides of a wide picture; crop keeps its centre square."""
    picture = np.zeros((8, 24, 3), dtype=np.uint8)
    picture[:, :8, 0] = picture[:, 8:16, 1] = picture[:, 16:, 2] = 255
    image = Image.fromarray(picture)
    cropped = decode(image, resize="crop")
    assert cropped[1].min() == 255
    assert cropped[[0, 2]].max() == 0
    squashed = decode(image, size=6)
    assert squashed[:, 0].argmax(axis=0).tolist() == [0, 0, 1, 1, 2, 2]
    assert decode(image.transpose(Image.Transpose.ROTATE_90), resize="crop")[1].min() == 255


@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_decode_image_shrinks_a_large_jpeg_well(interpolation: str) -> None:
    """Decoding at a fraction of the size gives the picture that decoding in full would."""
    ramp = np.linspace(0, 255, 800).astype(np.uint8)
    image = reopen(Image.fromarray(np.tile(ramp, (600, 1))), "JPEG", quality=95)
    pixels = decode_image(image, size=16, resize="squash", interpolation=interpolation)
    expected = ramp.reshape(16, 50).mean(axis=1)
    assert np.abs(pixels[0] - expected).max() <= 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_decode_image_refuses_a_truncated_file(kind: str) -> None:
    """Half a file is no image, in any format."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    data = buffer.getvalue()
    with pytest.raises(Exception, match=r"."):  # noqa: PT012, PT011, B017, RUF100  # each format has its own error
        decode(Image.open(BytesIO(data[: len(data) // 2])))


def make_png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a grey PNG whose pixels are missing, with further chunks before where they would be."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536)])
def test_decode_image_refuses_long_strips(size: tuple[int, int]) -> None:
    """Few pixels, and yet seconds for a broken animation of them."""
    with pytest.raises(ValueError, match=rf"must be at most 65535 px wide and high, got {size[0]} x {size[1]} px"):
        decode_image(Image.new("1", size), size=8, resize="squash", interpolation="bilinear")


@pytest.mark.parametrize("size", [(12_500, 12_500), (MAX_PIXELS + 1, 1), (1, MAX_PIXELS + 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decode_image_refuses_a_bomb_by_its_header(size: tuple[int, int]) -> None:
    """Too many pixels are refused before any is decoded, with the dimensions that the file claims."""
    with pytest.raises(ValueError, match=rf"must have at most 150 megapixels, got {size[0]} x {size[1]} px"):
        decode(Image.open(BytesIO(make_png(*size))))


def test_decode_image_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own code that lifts Pillow's limit does not lift ours."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="must have at most 150 megapixels, got 60000 x 4000 px"):
        decode(Image.open(BytesIO(make_png(60_000, 4_000))))


def make_text_bomb() -> bytes:
    """Return a PNG with a few kilobytes of compressed text that unpack to 64 MB."""
    bomb = b"Comment\x00\x00" + zlib.compress(bytes(64 << 20), 9)
    return make_png(8, 8, (b"zTXt", bomb))


def test_decode_image_refuses_a_text_bomb() -> None:
    """Few bytes in the file, many in the memory."""
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        decode(Image.open(BytesIO(make_text_bomb())))


def test_decode_image_reads_one_frame_of_many() -> None:
    """What follows the first frame of an animation is not even looked at."""
    buffer = BytesIO()
    make_animation("GIF").save(buffer, "GIF", save_all=True)
    data = buffer.getvalue()
    assert Image.open(BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    first = decode(Image.open(BytesIO(data)))
    second = data.index(b"\x21\xf9", data.index(b"\x2c"))
    broken = decode(Image.open(BytesIO(data[:second] + b"\x21\xf9" + b"\xff" * 100_000)))
    assert (first == broken).all()


def test_decode_image_starts_no_other_program() -> None:
    """A picture that Pillow would hand to Ghostscript is refused, whoever opened it."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch x) (w) file\n%%EOF\n"
    with pytest.raises(ValueError, match=r"must be one of AVIF, .*, WEBP, got EPS"):
        decode(Image.open(BytesIO(script)))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_to_rgb_is_the_same_in_bands(dtype: type) -> None:
    """Tall images are converted piece by piece, to what the whole would give."""
    values = np.random.default_rng(0).uniform(-300, 70_000, (600, 5)).astype(np.int64) % 65_536
    values = values.astype(dtype)
    expected = np.rint(values.astype(np.float64) * (1 if dtype == np.float32 else 255 / 65_535)).clip(0, 255)
    assert (np.asarray(to_rgb(Image.fromarray(values)))[..., 1] == expected).all()
