"""Where images come from. A new source is one function and one line in ``SOURCES``."""

from collections.abc import Callable
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from tuner.data.index import NO_SPLIT, ImageIndex, select_classes
from tuner.data.source_csv import read_csv
from tuner.data.source_folder import read_image_folder
from tuner.data.source_torchvision import read_torchvision
from tuner.spec.sections import DataSection


def read_digits(section: DataSection) -> ImageIndex:  # noqa: ARG001  # every source takes the section
    """Return scikit-learn's 1,797 hand-written digits, 8 by 8 px, grey. They come with scikit-learn."""
    installed = find_spec("sklearn")
    assert installed is not None and installed.origin is not None  # noqa: S101, PT018 - tuner depends on it
    # Not load_digits, which reads this file: each worker would load scikit-learn and SciPy for it, a second.
    table = np.loadtxt(Path(installed.origin).with_name("datasets") / "data" / "digits.csv.gz", delimiter=",")
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # (1797, 8, 8); stored as 0…16
    return ImageIndex(
        classes=tuple(str(name) for name in range(10)),
        names=tuple(f"digits/{row:04d}" for row in range(len(pixels))),
        labels=table[:, -1].astype(np.int64),
        given_splits=np.full(len(pixels), NO_SPLIT, dtype=np.int8),
        stamps=tuple(blake2b(image.tobytes(), digest_size=8).hexdigest() for image in pixels),
        open_image=lambda row: Image.fromarray(pixels[row]),
    )


SOURCES: dict[str, Callable[[DataSection], ImageIndex]] = {
    "digits": read_digits,
    "image_folder": read_image_folder,
    "csv": read_csv,
    "torchvision": read_torchvision,
}


def read_index(section: DataSection) -> ImageIndex:
    """List the images of a ``[data]`` section and keep its ``classes``. No image is opened.

    Raises:
        DataError: If the data cannot be used.
    """
    index = SOURCES[section.source](section)
    return select_classes(index, section.classes) if section.classes else index
