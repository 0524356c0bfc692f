"""A model folder in use: image files in, classes with probabilities out."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tuner.data.decode import decode_image, explain_bad_image, open_image
from tuner.data.image_set import ImageSet
from tuner.data.source_folder import IMAGE_SUFFIXES
from tuner.errors import DataError
from tuner.production.calibration import softmax
from tuner.production.machine import choose_device, find_own_code, reporting_memory, using_cores
from tuner.training.batches import predict_logits
from tuner.training.device import MEMORY_FORMAT
from tuner.training.package import Manifest, read_package


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one image file, or why it could not be read."""

    path: Path
    label: str | None = None
    """The most probable class; None if the file could not be read, as is the next one."""
    probability: float | None = None
    """Of the label, as the model sees it; in (0, 1]."""
    probabilities: dict[str, float] = field(default_factory=dict)
    """Of every class; they sum to 1."""
    error: str | None = None
    """One line for a person, if the file could not be read."""

    def to_json(self) -> dict[str, Any]:
        """Return the prediction as a JSON object."""
        if self.error is not None:
            return {"path": str(self.path), "error": self.error}
        return {
            "path": str(self.path),
            "label": self.label,
            "probability": self.probability,
            "probabilities": self.probabilities,
        }


def load(folder: str | Path, *, device: str = "auto", allow_code: bool = False) -> "Predictor":
    """Load a model folder.

    Args:
        folder: What ``tuner train`` wrote, or a study kept.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        allow_code: Whether a backbone that is a user's function may be imported and called.

    Raises:
        ExportError: If there is no model folder.
        ModelError: If it is broken, or would run code that was not allowed.
        DeviceError: If there is no such device.
    """
    chosen = choose_device(device)
    if allow_code:
        find_own_code()
    model, manifest = read_package(Path(folder), allow_code=allow_code)
    return Predictor(model, manifest, chosen)


class Predictor:
    """A trained model with the way in which its images are prepared.

    Args:
        model: In eval mode.
        manifest: Of its model folder.
        device: Where it is to run.
    """

    def __init__(self, model: nn.Module, manifest: Manifest, device: torch.device) -> None:
        self._model = model.to(device).to(memory_format=MEMORY_FORMAT)
        self._device = device
        self.manifest = manifest

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, in the order of the model's outputs."""
        return self.manifest.classes

    def predict(self, paths: Iterable[str | Path], *, batch_size: int = 32) -> list[Prediction]:
        """Classify image files; those that cannot be read get a prediction with an error.

        Args:
            paths: Files; ``find_images`` lists those of folders.
            batch_size: Images decoded and classified at a time.

        Returns:
            One prediction per path, in their order.

        Raises:
            ValueError: If the batch size is less than 1.
            DeviceError: If the device runs out of memory.
        """
        return list(self.stream(paths, batch_size=batch_size))

    def stream(self, paths: Iterable[str | Path], *, batch_size: int = 32) -> Iterator[Prediction]:
        """Classify image files as ``predict`` does, and yield each batch as soon as it is done."""
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
        rest = iter(paths)
        while batch := [Path(path) for path in islice(rest, batch_size)]:
            yield from self._predict_batch(batch)

    def _predict_batch(self, paths: list[Path]) -> list[Prediction]:
        with using_cores() as n_threads:
            decoded = self._decode(paths, n_threads)
            images = [pixels for pixels in decoded if not isinstance(pixels, str)]
            rows = iter(self._compute_probabilities(images))
        return [
            Prediction(path=path, error=found) if isinstance(found, str) else self._describe(path, next(rows))
            for path, found in zip(paths, decoded, strict=True)
        ]

    def _decode(self, paths: list[Path], n_threads: int) -> list[NDArray[np.uint8] | str]:
        """Return the pixels of each file, or why there are none."""
        # Pillow warns about odd metadata and large images, which are no reason to refuse an image.
        with warnings.catch_warnings(), ThreadPoolExecutor(n_threads) as pool:
            warnings.simplefilter("ignore")
            return list(pool.map(self._read_image, paths))

    def _read_image(self, path: Path) -> NDArray[np.uint8] | str:
        manifest = self.manifest
        interpolation = manifest.preprocessing.interpolation
        try:
            with open_image(path) as image:
                return decode_image(
                    image, size=manifest.image_size, resize=manifest.resize, interpolation=interpolation
                )
        except Exception as error:  # noqa: BLE001 - Pillow's formats raise nearly everything for broken files
            return explain_bad_image(error)

    def _compute_probabilities(self, images: list[NDArray[np.uint8]]) -> list[list[float]]:
        """Return the probability of each class for each image."""
        if not images:
            return []
        batch = ImageSet(
            pixels=torch.from_numpy(np.stack(images)).to(self._device),  # (n_images, 3, size, size)
            labels=torch.zeros(len(images), dtype=torch.int64, device=self._device),
            n_classes=len(self.classes),
            rows=torch.arange(len(images)),
        )
        preprocessing = self.manifest.preprocessing
        with reporting_memory(
            self._device, n_images=len(images), advice="choose a smaller batch_size or another device"
        ):
            logits = predict_logits(
                self._model,
                batch,
                preprocessing,
                self._device,
                precision=self.manifest.params.precision,
                batch_size=len(images),
            )
        probabilities: list[list[float]] = softmax(logits, self.manifest.temperature).tolist()
        return probabilities

    def _describe(self, path: Path, probabilities: list[float]) -> Prediction:
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return Prediction(
            path=path,
            label=self.classes[best],
            probability=probabilities[best],
            probabilities=dict(zip(self.classes, probabilities, strict=True)),
        )


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Return files as they are given, and the images in folders, at any depth, sorted.

    A path that does not exist is kept: its prediction says so. Hidden files and folders inside a folder are left out.

    Raises:
        DataError: If there is nothing to predict, or a folder cannot be read.
    """
    found = [image for path in map(Path, paths) for image in (_list_folder(path) if _is_folder(path) else [path])]
    if not found:
        given = ", ".join(f"'{path}'" for path in paths) or "no path"
        raise DataError(
            f"images: must be image files or folders that hold some, got {given}; images end in .jpg, .png or the like"
        )
    return found


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises for names that are too long, or in closed folders


def _list_folder(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"images: must be readable folders, got '{error.filename}' ({error.strerror})") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if _is_image(name)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
