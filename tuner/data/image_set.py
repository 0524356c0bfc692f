"""The images of a split as tensors, and where they lie while a trial trains."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.data.index import ImageIndex, Split
from tuner.data.memory import available_memory
from tuner.data.splits import check_classes, search_rows, unlock_test
from tuner.data.store import PixelStore, open_store
from tuner.spec.sections import DataSection

_MEMORY_FRACTION = 0.4
"""Share of what is free, of a CUDA device or of the host, that images may take; the rest is for training and for other
workers."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images and labels."""

    pixels: Tensor
    """uint8, shape ``(n_images, 3, size, size)``, on any device. Not to be changed: it may be the cache itself. With
    ``positions`` there may be more."""
    labels: Tensor
    """int64, shape ``(n_images,)``, on the same device."""
    n_classes: int
    rows: Tensor
    """Their rows in the data index, int64, shape ``(n_images,)``, on the CPU: fixed views are drawn for them."""
    positions: Tensor | None = None
    """Where in ``pixels`` each image lies, int64, shape ``(n_images,)``, beside the labels; None: in their order."""


def load_image_set(
    index: ImageIndex,
    splits: NDArray[np.int8],
    section: DataSection,
    which: tuple[Split, ...],
    *,
    interpolation: str,
    n_threads: int = 1,
    verify: bool = True,
) -> ImageSet:
    """Return the images of some splits, decoded. TEST images are opened only if ``which`` names them.

    Args:
        index: The images.
        splits: Their splits, shape ``(n_images,)``.
        section: Image size, way of resizing and allowance for bad images.
        which: Splits, in the order wanted. Naming ``Split.TEST`` unlocks it.
        interpolation: A key of ``decode.RESAMPLING``.
        n_threads: Images decoded at a time, if they are not in the cache.
        verify: Compare images that are in the cache with their checksum.

    Raises:
        DataError: If too many images cannot be decoded, or train or val is left without a class.
        StorageError: If the cache folder cannot be used.
    """
    if Split.TEST in which:
        index, splits = unlock_test(index, splits)
    parts: list[tuple[Tensor, NDArray[np.int64]]] = []
    if searchable := tuple(split for split in which if split is not Split.TEST):
        rows = search_rows(splits)
        store = open_store(index, rows, section, interpolation=interpolation, n_threads=n_threads, verify=verify)
        _check_store(index, splits, store)
        parts += [_take_split(store, splits, split) for split in searchable]
        if searchable == (Split.TRAIN, Split.VAL):
            parts = [(torch.from_numpy(store.pixels), store.rows)]
    if Split.TEST in which:
        rows = np.flatnonzero(splits == Split.TEST)
        store = open_store(index, rows, section, interpolation=interpolation, n_threads=n_threads, verify=verify)
        parts.insert(which.index(Split.TEST), (torch.from_numpy(store.pixels), store.rows))
    pixels = parts[0][0] if len(parts) == 1 else torch.cat([part for part, _ in parts])
    rows = np.concatenate([rows for _, rows in parts])
    labels = torch.from_numpy(index.labels[rows])
    return ImageSet(pixels=pixels, labels=labels, n_classes=len(index.classes), rows=torch.from_numpy(rows))


def _take_split(store: PixelStore, splits: NDArray[np.int8], split: Split) -> tuple[Tensor, NDArray[np.int64]]:
    positions = np.flatnonzero(splits[store.rows] == split)
    stretch = slice(positions[0], positions[-1] + 1)
    return torch.from_numpy(store.pixels[stretch]), store.rows[stretch]


def _check_store(index: ImageIndex, splits: NDArray[np.int8], store: PixelStore) -> None:
    """Check that train and val still hold every class without the bad images."""
    usable = np.full_like(splits, -1)
    usable[store.rows] = splits[store.rows]
    check_classes(index, usable)


Residence = Literal["device", "pinned", "mapped"]


def choose_residence(n_bytes: int, *, device_bytes: int, host_bytes: int) -> Residence:
    """Return where images lie while they train a model on CUDA.

    Args:
        n_bytes: Size of the images.
        device_bytes: Free memory of the device.
        host_bytes: Memory that this process may still use.

    Returns:
        On the device if they take 40 % of its free memory at most, else pinned by the same rule, else where they are:
        memory-mapped, and each batch travels through a pinned buffer.
    """
    if n_bytes <= _MEMORY_FRACTION * device_bytes:
        return "device"
    return "pinned" if n_bytes <= _MEMORY_FRACTION * host_bytes else "mapped"


def move_to(images: ImageSet, device: torch.device) -> ImageSet:
    """Return the images where training on a device reads them best; on the CPU that is where they are.

    Args:
        images: The images.
        device: Where training happens.
    """
    if device.type == images.pixels.device.type == "cpu" or device == images.pixels.device:
        return images
    if device.type == "cuda":
        device_bytes, _ = torch.cuda.mem_get_info(device)
        match choose_residence(images.pixels.nbytes, device_bytes=device_bytes, host_bytes=available_memory()):
            case "mapped":
                return images
            case "pinned":
                return replace(images, pixels=images.pixels.pin_memory(), labels=images.labels.pin_memory())
            case "device":
                pass
    positions = None if images.positions is None else images.positions.to(device)
    return replace(images, pixels=images.pixels.to(device), labels=images.labels.to(device), positions=positions)
