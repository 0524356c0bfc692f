"""Break study files and image files, the same way for the same seed."""

import copy
import random
import struct
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

STUDY = """\
[study]
name = "fuzz"
objective = "val_accuracy"
seed = 0
[data]
source = "digits"
classes = ["7", "8", "9"]
image_size = 16
resize = "squash"
val_fraction = 0.2
test_fraction = 0.2
max_bad_fraction = 0.01
[space]
backbone = { choices = ["tuner:small_cnn"] }
lr = { low = 1e-4, high = 1e-2, log = true }
augmentation_strength = { low = 0.0, high = 1.0, step = 0.25 }
unfrozen_layers = { low = 1, high = "all" }
batch_size = { choices = [16, 32] }
[backbones."tuner:small_cnn"]
weights = "random"
kwargs = {}
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
keep_head = false
[training]
epochs = 2
optimizer = "adamw"
horizontal_flip = false
class_weights = "none"
views = 2
[pretraining]
epochs = 1
lr = 1e-3
batch_size = 16
[pretraining.data]
source = "digits"
image_size = 16
[search]
sampler = "random"
pruner = "median"
n_trials = 4
screen = 2
timeout = "2h"
[workers]
devices = "cpu"
per_device = 1
[[enqueue]]
lr = 1e-3
"""
_WORDS = (
    *(b"[", b"[[", b"]", b"{", b"}", b'"', b"'''", b'"""', b"=", b".", b",", b"#", b"\n", b"\r", b"\0", b"\x1b[2J"),
    *(b"nan", b"-inf", b"1e999", b"0x" + b"f" * 5000, b"9" * 5000, b"-0", b"true", b"07:32:00", b"1979-05-27"),
    *(b"[" * 2000, b"{a=" * 500, b"a." * 1500, b"\xff\xfe", b"\xef\xbb\xbf", b"\\u0000", b"\\ud800", b"\xe2\x80\xa8"),
    *(b"[tuple]\n", b"nullable = 1\n", b"[space]\n", b"choices = []", b'high = "all"', b'"grid"', b'"../../etc"'),
)
_VALUES = (
    *("nan", "inf", "-1", "0", "1", "3", "0.5", "1e308", "9223372036854775807", "0x" + "f" * 5000, "true", "[]", "{}"),
    *('""', '"all"', '"fresh"', '"grid"', '"tpe"', '"csv"', '"image_folder"', '"no_such_model"', '"a.b:c"', '"../.."'),
    *('"\\u0000"', '"\\u001b[31m"', '"é\U0001f600"', "[[1, 2], 3]", "{ low = 1, high = 4 }", "{ choices = [1, 0.5] }"),
    *('{ low = 0.1, high = "all" }', "{ low = 1e-4, high = 1e-2, step = 1e-3 }", "07:32:00", "1979-05-27T07:32:00Z"),
    *("[" * 100 + "]" * 100, '["0", "1"]', '["cuda:7"]', "[0.1, 0.2, 0.3]", '"x' + "x" * 5000 + '"', "1e-400", "-0.0"),
)
_LINES = ("[tuple]", '["a\\nb"]', "[[study]]", "[space.lr.lr]", "[backbones.other]", "tuple = 1", '"" = 1', "a.b.c = 1")
_NESTED = 1500


def make_junk() -> list[Any]:
    """Return values of every kind that TOML has, most of them out of place anywhere."""
    deep_list: list[Any] = []
    deep_table: dict[str, Any] = {}
    for _ in range(_NESTED):
        deep_list, deep_table = [deep_list], {"a": deep_table}
    return [
        *(
            True,
            False,
            0,
            1,
            -1,
            2,
            2**31,
            2**63 - 1,
            2**63,
            -(2**63),
            10**400,
            16**6000,
            0.0,
            -0.0,
            0.5,
            1e308,
            5e-324,
        ),
        *(float("inf"), float("-inf"), float("nan"), "", " ", "all", "fresh", "random", "grid", "auto", "cuda:9", "1h"),
        *("\0", "\x1b[31m", "a\nb", "\u202e", "\U0001f600", "é" * 300, "x" * 20_000, "-x", "~x/y", "..", "val_loss"),
        *([], [[]], ["a", 1], [1, 1], ["a"] * 3, [0.5, 0.5, 0.5], {}, {"a": 1}, {"tuple": {}}, {"choices": []}),
        *({"low": 1, "high": 2}, {"low": 1, "high": 2**62, "step": 3}, {"low": 0.1, "high": 0.2, "log": True}),
        *({"choices": [1, "a", 0.5]}, {"low": float("nan"), "high": 1}, time(7, 32), date(1979, 5, 27)),
        *(datetime(1979, 5, 27, tzinfo=UTC), deep_list, deep_table, [{}], [{"lr": 1e-3}], [{"lr": []}]),
    ]


def break_tables(tables: Mapping[str, Any], source: random.Random) -> dict[str, Any]:
    """Return a study file's tables with one to four changes: values replaced, keys dropped, renamed or added."""
    broken: dict[str, Any] = copy.deepcopy(dict(tables))
    junk = make_junk()
    for _ in range(source.choice((1, 1, 2, 4))):
        place: Any = broken
        while isinstance(place, dict) and place and source.random() < 0.8:
            inner = place[source.choice(list(place))]
            if not isinstance(inner, dict) or not inner:
                break
            place = inner
        _change(place, junk, source)
    return broken


def _change(table: dict[str, Any], junk: Sequence[Any], source: random.Random) -> None:
    names = ["tuple", "nullable", "function-x", "literal[", "a\nb", "", "lr", "data", "low", "choices", "é", "x" * 5000]
    key = source.choice(list(table) or names)
    match source.randrange(6):
        case 0:
            table.pop(key, None)
        case 1:
            table[source.choice(names)] = table.pop(key, 1)
        case 2:
            table[source.choice(names)] = source.choice(junk)
        case 3:
            table[key] = [table.get(key)] if key in table else {}
        case _:
            table[key] = source.choice(junk)


def read_base_tables() -> dict[str, Any]:
    """Return the tables of the study that is broken."""
    return tomllib.loads(STUDY)


def break_text(source: random.Random) -> bytes:
    """Return the study file with changes to its bytes, or with other values and lines that mostly stay TOML."""
    if source.random() < 0.4:
        return break_bytes(STUDY.encode(), STUDY.encode(), source, words=_WORDS)
    lines = STUDY.splitlines()
    for _ in range(source.choice((1, 1, 2, 3))):
        number = source.randrange(len(lines))
        key, equals, _ = lines[number].partition(" = ")
        match source.randrange(5):
            case 0:
                lines[number] = ""
            case 1:
                lines.insert(number, source.choice(STUDY.splitlines()))
            case _:
                lines[number] = f"{key} = {source.choice(_VALUES)}" if equals else source.choice(_LINES)
    return "\n".join(lines).encode()


def break_bytes(
    data: bytes, other: bytes, source: random.Random, *, words: Sequence[bytes] = (), head: int = 0
) -> bytes:
    """Return bytes with one to eight changes.

    Args:
        data: What is changed.
        other: What is spliced in now and then.
        source: Of all chance.
        words: Inserted now and then.
        head: Half of the changes are made in that many first bytes; 0: anywhere.
    """
    broken = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 4, 8))):
        place = source.randrange((head if head and source.random() < 0.5 else len(broken)) + 1)
        place = min(place, len(broken))
        span = source.choice((1, 1, 2, 4, 16, 64))
        match source.randrange(8):
            case 0 | 1:
                broken[place : place + span] = source.randbytes(span)
            case 2:
                broken[place : place + span] = source.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * span
            case 3:
                del broken[place : place + span]
            case 4:
                broken[place:place] = broken[place : place + span]
            case 5:
                broken[place:place] = source.choice(words) if words else source.randbytes(span)
            case 6 if source.random() < 0.3:
                del broken[place:]
            case _:
                start = source.randrange(len(other))
                broken[place:place] = other[start : start + span]
    return bytes(broken)


def make_images() -> dict[str, bytes]:
    """Return small images in the formats and modes that people have, by a name with a suffix.

    A format that this Pillow cannot write is left out.
    """
    Image.init()
    images = {}
    for name, (image, kind, options) in _list_images().items():
        if kind in Image.SAVE:
            buffer = BytesIO()
            image.save(buffer, kind, **options)
            images[name] = buffer.getvalue()
    return images


def _list_images() -> dict[str, tuple[Image.Image, str, dict[str, Any]]]:
    """Return images with their format and how they are written."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100)
    palette = noise.convert("P")
    frames = {"save_all": True, "append_images": [noise.rotate(90)]}
    return {
        "rgb.png": (noise, "PNG", {"exif": exif}),
        "palette.png": (palette, "PNG", {"transparency": 1}),
        "grey16.png": (grey16, "PNG", {}),
        "alpha.png": (noise.convert("LA"), "PNG", {}),
        "apng.png": (noise, "PNG", frames),
        "plain.jpg": (noise, "JPEG", {"exif": exif}),
        "cmyk.jpg": (noise.convert("CMYK"), "JPEG", {}),
        "progressive.jpg": (noise, "JPEG", {"progressive": True}),
        "palette.gif": (palette, "GIF", {}),
        "frames.gif": (noise, "GIF", frames),
        "plain.bmp": (noise, "BMP", {}),
        "palette.bmp": (palette, "BMP", {}),
        "raw.tif": (noise, "TIFF", {}),
        "lzw.tif": (noise, "TIFF", {"compression": "tiff_lzw"}),
        "jpeg.tif": (noise, "TIFF", {"compression": "jpeg"}),
        "grey16.tif": (grey16, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "lossy.webp": (noise, "WEBP", {"exif": exif}),
        "lossless.webp": (noise.convert("RGBA"), "WEBP", {"lossless": True}),
        "frames.webp": (noise, "WEBP", frames),
        "plain.dib": (noise, "DIB", {}),
        "pair.jpg": (noise, "MPO", frames),
        "plain.ppm": (noise, "PPM", {}),
        "bits.pbm": (noise.convert("1"), "PPM", {}),
        "grey16.pgm": (grey16.convert("I"), "PPM", {}),
        "float.ppm": (noise.convert("F"), "PPM", {}),
        "plain.tga": (noise, "TGA", {}),
        "runs.tga": (palette, "TGA", {"compression": "tga_rle"}),
        "plain.jp2": (noise, "JPEG2000", {}),
        "grey16.j2k": (grey16, "JPEG2000", {"no_jp2": True, "irreversible": False}),
        "plain.avif": (noise, "AVIF", {"exif": exif}),
        "frames.avif": (noise, "AVIF", frames),
    }


def break_image(images: Mapping[str, bytes], source: random.Random) -> tuple[str, bytes]:
    """Return the name of an image and its broken bytes."""
    name, other = source.choice(list(images)), source.choice(list(images))
    data = break_bytes(images[name], images[other], source, head=64)
    # A decoder looks no further than a wrong checksum.
    return name, _repair_png(data) if name.endswith(".png") and source.random() < 0.8 else data


def _repair_png(data: bytes) -> bytes:
    """Return a PNG with the checksums of its chunks made right, as far as there are chunks."""
    repaired = bytearray(data)
    place = 8
    while place + 12 <= len(repaired):
        (length,) = struct.unpack(">I", repaired[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(repaired):
            break
        repaired[end : end + 4] = struct.pack(">I", zlib.crc32(repaired[place + 4 : end]))
        place = end + 4
    return bytes(repaired)
