"""What benchmarks train on: real photographs and weights where the caller has them, else what can be made here.

``TUNER_BENCH_IMAGES`` names a folder with ``<data set>.zip`` files, which hold ``<data set>/<split>/<class>/<file>``;
``TUNER_BENCH_WEIGHTS`` one with ``<timm model>.safetensors`` and beside each ``<timm model>.json`` (``timm_kwargs``,
``mean``, ``std``). Without them: scikit-learn's digits as PNG files, and tiny timm models with random weights.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGES_VARIABLE = "TUNER_BENCH_IMAGES"
WEIGHTS_VARIABLE = "TUNER_BENCH_WEIGHTS"
MOBILENETS = ("mobilenetv1_100", "mobilenetv2_035", "mobilenetv2_100", "tf_mobilenetv3_large_minimal_100")
TINY_MODELS = ("test_resnet", "test_efficientnet")
_HALVES = [0.5, 0.5, 0.5]


@dataclass(frozen=True, kw_only=True)
class Material:
    """Images on disk and backbones with their weights."""

    name: str
    folder: Path
    """Holds ``train/<class>/`` and ``val/<class>/``."""
    image_size: int
    """In px."""
    horizontal_flip: bool
    backbones: dict[str, dict[str, Any]]
    """``weights`` (a path), ``kwargs``, ``mean`` and ``std`` of each."""


@contextmanager
def empty_cache() -> Iterator[None]:
    """Give tuner a new cache folder for a block."""
    before = os.environ.get("TUNER_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="cache_") as folder:
        os.environ["TUNER_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TUNER_CACHE_DIR"]
            if before is not None:
                os.environ["TUNER_CACHE_DIR"] = before


def find_folder(variable: str) -> Path | None:
    """Return the folder that an environment variable names, if it is set."""
    named = os.environ.get(variable)
    return Path(named).resolve() if named else None


def make_material(folder: Path, *, dataset: str, image_size: int, smoke: bool) -> Material:
    """Lay out images and weights in an empty folder.

    Args:
        folder: Where files are written.
        dataset: Name of the zip file, where images are given.
        image_size: For real images, in px.
        smoke: Take a few digits and tiny models, whatever is given.
    """
    images, weights = find_folder(IMAGES_VARIABLE), find_folder(WEIGHTS_VARIABLE)
    backbones = read_backbones(weights) if weights and not smoke else make_tiny_weights(folder)
    if images is None or smoke:
        write_digits(folder / "digits", n_per_class=20 if smoke else 150)
        return Material(
            name="digits", folder=folder / "digits", image_size=32, horizontal_flip=False, backbones=backbones
        )
    with zipfile.ZipFile(images / f"{dataset}.zip") as archive:
        archive.extractall(folder / "images")
    return Material(
        name=dataset,
        folder=folder / "images" / dataset,
        image_size=image_size,
        horizontal_flip=True,
        backbones=backbones,
    )


def lay_out_classes(images: Path, dataset: str, folder: Path, *, n_per_class: int) -> Path:
    """Write a data set's images into class folders without its splits, which would be the same ones in every study.

    Args:
        images: Holds ``<data set>.zip``.
        dataset: Its name.
        folder: Where the data set's own folder is made.
        n_per_class: Images of each class, at most; the first ones of the file.

    Returns:
        The folder of class folders.
    """
    place = folder / dataset
    with zipfile.ZipFile(images / f"{dataset}.zip") as archive:
        taken: dict[str, int] = {}
        for member in sorted(name for name in archive.namelist() if name.count("/") == 3 and not name.endswith("/")):
            _, split, label, file = member.split("/")
            taken[label] = taken.get(label, 0) + 1
            if taken[label] <= n_per_class:
                target = place / label / f"{split}_{file}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(member))
    return place


def read_backbones(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the four MobileNets of a folder of weights, all trained on ImageNet."""
    backbones = {}
    for name in MOBILENETS:
        facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        backbones[name] = {
            "weights": str(folder / f"{name}.safetensors"),
            "kwargs": facts["timm_kwargs"],
            "mean": facts["mean"],
            "std": facts["std"],
        }
    return backbones


def make_tiny_weights(folder: Path) -> dict[str, dict[str, Any]]:
    """Write random weights of tiny models to files, so that every trial starts from the same."""
    import timm
    import torch
    from safetensors.torch import save_file

    backbones = {}
    for name in TINY_MODELS:
        torch.manual_seed(0)
        path = folder / f"{name}.safetensors"
        save_file(timm.create_model(name, num_classes=10).state_dict(), path)
        backbones[name] = {"weights": str(path), "kwargs": {}, "mean": _HALVES, "std": _HALVES}
    return backbones


def write_digits(folder: Path, *, n_per_class: int) -> None:
    """Write scikit-learn's digits as PNG files; a fifth of each class is for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8); stored as 0…16
    for label in range(10):
        for position, row in enumerate(np.flatnonzero(digits.target == label)[:n_per_class]):
            write_image(folder, pixels[row], label=label, position=position)


def write_generated(folder: Path, *, n_images: int, n_classes: int, size: int, suffix: str = "png") -> None:
    """Write images of noise around one colour for each class, the same in every call; a fifth is for validation."""
    generator = np.random.default_rng(0)
    colours = generator.integers(40, 216, (n_classes, 3))
    for number in range(n_images):
        position, label = divmod(number, n_classes)
        coarse = colours[label] + generator.integers(-40, 41, (8, 8, 3))
        image = Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR)
        write_image(folder, np.asarray(image), label=label, position=position, suffix=suffix)


def write_image(folder: Path, pixels: NDArray[np.uint8], *, label: int, position: int, suffix: str = "png") -> None:
    """Write one image into its class folder."""
    place = folder / ("val" if position % 5 == 4 else "train") / f"class_{label:04d}"
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(place / f"{position:06d}.{suffix}")
