"""The data sets of ``torchvision.datasets`` that classify images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuner.data.decode import open_image
from tuner.data.index import NO_SPLIT, ImageIndex, Split, join_indexes, preview
from tuner.data.source_files import file_version
from tuner.errors import DataError
from tuner.spec.sections import DataSection
from tuner.spec.suggestions import did_you_mean

_Arguments = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How a data set's constructor names its splits, and where its files lie."""

    files: str
    """Under ``data.path``."""
    splits: Mapping[Split, _Arguments] = field(default_factory=dict)
    """Arguments by given split; empty: the data set has no splits."""
    arguments: _Arguments = field(default_factory=dict)
    """Besides those of the split."""


def _name_splits(*names: str) -> dict[Split, _Arguments]:
    """Return the arguments of a data set with ``split=``, for (train, test) or (train, val, test)."""
    splits = (Split.TRAIN, Split.TEST) if len(names) == 2 else tuple(Split)
    return {split: {"split": name} for split, name in zip(splits, names, strict=True)}


_FLAG = {Split.TRAIN: {"train": True}, Split.TEST: {"train": False}}
_TWO = _name_splits("train", "test")
_THREE = _name_splits("train", "val", "test")

DATASETS: dict[str, _Layout] = {
    "CIFAR10": _Layout(files="cifar-10-batches-py/", splits=_FLAG),
    "CIFAR100": _Layout(files="cifar-100-python/", splits=_FLAG),
    "Caltech101": _Layout(files="caltech101/101_ObjectCategories/"),
    "Caltech256": _Layout(files="caltech256/256_ObjectCategories/"),
    "Country211": _Layout(files="country211/", splits=_name_splits("train", "valid", "test")),
    "DTD": _Layout(files="dtd/dtd/", splits=_THREE),
    "EMNIST": _Layout(files="EMNIST/raw/", splits=_FLAG, arguments={"split": "balanced"}),
    "EuroSAT": _Layout(files="eurosat/2750/"),
    "FGVCAircraft": _Layout(files="fgvc-aircraft-2013b/data/", splits=_THREE),
    "FashionMNIST": _Layout(files="FashionMNIST/raw/", splits=_FLAG),
    "Flowers102": _Layout(files="flowers-102/", splits=_THREE),
    "Food101": _Layout(files="food-101/", splits=_TWO),
    "GTSRB": _Layout(files="gtsrb/", splits=_TWO),
    "Imagenette": _Layout(files="imagenette2/", splits={Split.TRAIN: {"split": "train"}, Split.VAL: {"split": "val"}}),
    "KMNIST": _Layout(files="KMNIST/raw/", splits=_FLAG),
    "MNIST": _Layout(files="MNIST/raw/", splits=_FLAG),
    "OxfordIIITPet": _Layout(files="oxford-iiit-pet/", splits=_name_splits("trainval", "test")),
    "PCAM": _Layout(files="pcam/", splits=_THREE),
    "RenderedSST2": _Layout(files="rendered-sst2/", splits=_THREE),
    "STL10": _Layout(files="stl10_binary/", splits=_TWO),
    "SUN397": _Layout(files="SUN397/"),
    "SVHN": _Layout(files="*_32x32.mat", splits=_TWO),
    "USPS": _Layout(files="usps*.bz2", splits=_FLAG),
}
"""The classes of ``torchvision.datasets`` that ``data.dataset`` may name."""


def read_torchvision(section: DataSection) -> ImageIndex:
    """Return the images of a torchvision data set under ``data.path``; it is downloaded there if it is absent.

    A given test split is neither read nor listed here: see ``ImageIndex.read_test``.

    Raises:
        DataError: If the data set is unknown, or neither present nor to be downloaded.
    """
    name = str(section.dataset)
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS)
        raise DataError(f"data.dataset: must be one of {', '.join(DATASETS)}, got {name!r}{hint}")
    root, splits = Path(str(section.path)), DATASETS[name].splits
    train = _open_dataset(name, root, Split.TRAIN)
    classes = tuple(sorted(set(_read_class_names(train))))
    if len(classes) == 1:
        raise DataError(f"data.path: must hold at least two classes, got one: {classes[0]!r}")
    index = _index_dataset(train, classes, Split.TRAIN if splits else None)
    if Split.VAL in splits:
        index = join_indexes(index, _index_dataset(_open_dataset(name, root, Split.VAL), classes, Split.VAL))
    if Split.TEST not in splits:
        return index
    return _with_test(index, lambda: _index_dataset(_open_dataset(name, root, Split.TEST), classes, Split.TEST))


def _with_test(index: ImageIndex, read_test: Callable[[], ImageIndex]) -> ImageIndex:
    return ImageIndex(**{**vars(index), "read_test": read_test})


def _open_dataset(name: str, root: Path, split: Split) -> Any:
    """Construct a data set; if its files are absent, download them."""
    layout = DATASETS[name]
    create = _find_class(name, split)
    arguments = {"root": str(root), **layout.arguments, **layout.splits.get(split, {})}
    try:
        return create(**arguments)
    except Exception:  # noqa: BLE001  # each data set has its own way to say that files are absent
        try:
            root.mkdir(parents=True, exist_ok=True)
            return create(**arguments, download=True)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"data.path: must hold torchvision's {name}, got neither its files nor a download ({reason[-1]}); "
                f"put its extracted files at '{root / layout.files}'"
            ) from error


def _find_class(name: str, split: Split) -> Any:
    """Return the class of a data set; for train and val, one that does not look at the files of test."""
    from torchvision import datasets

    found = getattr(datasets, name)
    own: dict[str, Any] = {}
    if split is not Split.TEST and hasattr(found, "resources"):  # the MNIST family checks for all four files
        own["resources"] = [resource for resource in found.resources if not resource[0].startswith("t10k")]
    if split is not Split.TEST and hasattr(found, "test_list"):  # CIFAR and STL10 checksum both splits
        own["test_list"] = []
    return type(name, (found,), own) if own else found  # the name is part of the folder that the class reads


def _read_class_names(dataset: Any) -> list[str]:
    """Return the class name of each image."""
    labels = _read_labels(dataset)
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if names is None:
        width = len(str(labels.max()))
        return [f"{label:0{width}d}" for label in labels]
    texts = [str(name[0] if isinstance(name, tuple) else name) for name in names]  # Imagenette: tuples of synonyms
    return [texts[label] for label in labels]


def _read_labels(dataset: Any) -> NDArray[np.int64]:
    for name in ("targets", "_labels", "labels", "y"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name), dtype=np.int64)
    if hasattr(dataset, "h5py"):  # PCAM opens its file anew for each image: 262,144 times
        with dataset.h5py.File(dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]) as file:  # noqa: SLF001
            return np.asarray(file["y"], dtype=np.int64).reshape(-1)
    return np.array([label for _, label in dataset._samples], dtype=np.int64)  # noqa: SLF001


def _index_dataset(dataset: Any, classes: tuple[str, ...], split: Split | None) -> ImageIndex:
    names = _read_class_names(dataset)
    positions = {name: label for label, name in enumerate(classes)}
    if lacking := sorted(set(names).difference(classes)):
        where = "" if split is None else f"{split.name.lower()} "
        raise DataError(f"data.path: {where}must hold classes of train only, got {preview(lacking)}")
    folder = "train" if split is None else split.name.lower()
    files = _list_files(dataset)
    return ImageIndex(
        classes=classes,
        names=tuple(f"{folder}/{row:06d}" for row in range(len(names))),
        labels=np.array([positions[name] for name in names], dtype=np.int64),
        given_splits=np.full(len(names), NO_SPLIT if split is None else split, dtype=np.int8),
        stamps=_stamp_images(dataset, files),
        open_image=(lambda row: open_image(files[row])) if files else (lambda row: dataset[row][0]),
        read_version=(lambda row: file_version(files[row])) if files else None,
        find_file=(lambda row: Path(files[row])) if files else None,
    )


def _list_files(dataset: Any) -> list[str]:
    """Return the image files in order, or an empty list where the data set keeps arrays."""
    for name in ("_image_files", "_images", "_samples", "samples"):
        entries = getattr(dataset, name, None)
        if isinstance(entries, list):
            return [str(entry[0] if isinstance(entry, tuple) else entry) for entry in entries]
    return []


def _stamp_images(dataset: Any, files: list[str]) -> tuple[str, ...]:
    """Return the size of each file, a hash of each array, or nothing where neither is at hand."""
    if files:
        return tuple(file_version(path).split("-")[0] for path in files)
    if (data := getattr(dataset, "data", None)) is None:
        return ("",) * len(dataset)
    return tuple(blake2b(image.tobytes(), digest_size=8).hexdigest() for image in np.asarray(data))
