"""Images in class folders, directly or under ``train/``, ``val/`` and ``test/``."""

import os
from collections.abc import Iterator
from pathlib import Path

from tuner.data.index import SPLIT_NAMES, ImageIndex, Split, preview
from tuner.data.source_files import FileEntry, index_files
from tuner.errors import DataError
from tuner.spec.sections import DataSection

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
)
"""Other files are ignored, and so are hidden files and folders."""


def read_image_folder(section: DataSection) -> ImageIndex:
    """Return the images of ``data.path``; sub-folders of a class folder are searched too.

    Raises:
        DataError: If the path is no readable folder of at least two class folders that all hold images.
    """
    try:
        return index_files(_list_entries(Path(str(section.path))))
    except OSError as error:
        raise DataError(f"data.path: must be a readable folder, got '{error.filename}' ({error.strerror})") from error


def _list_entries(root: Path) -> list[FileEntry]:
    """Return the images in no particular order."""
    folders = _list_folders(root)
    split_folders = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    if not split_folders:
        return list(_read_classes(root, folders, root, None))
    _check_layout(folders, split_folders)
    entries: list[FileEntry] = []
    for folder in split_folders:
        split = SPLIT_NAMES[folder.name.lower()]
        entries += _read_classes(folder, _list_folders(folder), root, split)
    return entries


def _list_folders(root: Path) -> list[Path]:
    """Return the visible sub-folders of a folder, sorted by name."""
    if not root.exists():
        raise DataError(f"data.path: must be an existing folder, got '{root}'")
    if not root.is_dir():
        hint = "; source = 'csv' reads tables" if root.suffix.lower() == ".csv" else ""
        raise DataError(f"data.path: must be a folder, got the file '{root}'{hint}")
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _check_layout(folders: list[Path], split_folders: list[Path]) -> None:
    """Check that split folders stand alone, each once, with a train folder among them."""
    others = [folder.name for folder in folders if folder not in split_folders]
    names = [folder.name for folder in split_folders]
    if others:
        raise DataError(
            f"data.path: must hold either class folders or train/, val/ and test/, got both: "
            f"{preview(names)} beside {preview(others)}"
        )
    splits = [SPLIT_NAMES[name.lower()] for name in names]
    if len(set(splits)) < len(splits):
        raise DataError(f"data.path: must hold one folder per split, got {preview(names)}")
    if Split.TRAIN not in splits:
        raise DataError(f"data.path: must hold a folder train/ beside the other splits, got only {preview(names)}")


def _read_classes(folder: Path, class_folders: list[Path], root: Path, split: Split | None) -> Iterator[FileEntry]:
    """Yield the images of the class folders in ``folder``."""
    _check_depth(folder, class_folders)
    found = {class_folder: list(_find_images(class_folder)) for class_folder in class_folders}
    if empty := [path.relative_to(root).as_posix() for path, images in found.items() if not images]:
        raise DataError(
            f"data.path: every class folder must hold images, got none in {preview(empty)}; "
            f"images end in .jpg, .png, .bmp, .gif, .tif, .webp or the like"
        )
    if split in {Split.TRAIN, None} and len(class_folders) == 1:
        raise DataError(
            f"data.path: must hold at least two class folders, got one in '{folder}': {class_folders[0].name!r}"
        )
    for class_folder, images in found.items():
        for path in images:
            name = path.relative_to(root).as_posix()
            yield FileEntry(name=name, path=path, class_name=class_folder.name, split=split)


def _check_depth(folder: Path, class_folders: list[Path]) -> None:
    """Recognise a path that is one folder too high or too low, and say which one to set."""
    if not class_folders:
        images = sum(1 for _ in _find_images(folder))
        hint = f"; if this folder is one class, set path to '{folder.parent}'" if images else ""
        raise DataError(
            f"data.path: must hold one folder per class, got '{folder}' with {images} images and no folder{hint}"
        )
    for child in class_folders:
        if any(path.name.lower() in SPLIT_NAMES for path in _list_folders(child)):
            raise DataError(
                f"data.path: must hold class folders or train/, val/ and test/, got '{folder}', where "
                f"{child.name!r} holds them; set path to '{child}'"
            )
    inner = folder
    below = class_folders
    while len(below) == 1 and not _holds_image(below[0]) and (deeper := _list_folders(below[0])):
        inner, below = below[0], deeper
    if inner is not folder:
        raise DataError(
            f"data.path: must hold at least two class folders, got '{folder}', where the only folder "
            f"{class_folders[0].name!r} wraps {preview([path.name for path in below])}; set path to '{inner}'"
        )


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122  # ten times faster than a Path


def _holds_image(folder: Path) -> bool:
    return any(_is_image(path.name) for path in folder.iterdir())


def _find_images(folder: Path) -> Iterator[Path]:
    """Yield the image files at any depth, without looking into them. Links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if _is_image(name))
