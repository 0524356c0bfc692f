"""Look at a folder of images and write a study file for it: ``tuner init``."""

import os
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import tomli_w

from tuner.data.index import ImageIndex, Split
from tuner.data.sources import read_index
from tuner.data.splits import cut_splits
from tuner.errors import DataError, SpecError
from tuner.spec.printable import as_printable
from tuner.spec.sections import DataSection
from tuner.spec.study import load_spec

_N_SIZED = 200
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

_TEMPLATE = """\
# Question: which pretrained backbone and which fine-tuning recipe classify {folder_name} best?
# Command:  tuner run {file_name}
# Expected: not yet measured

[study]
{name_line}
objective = "{objective}"{imbalance}
seed = 0

[data]
source = "image_folder"
{path_line}
image_size = {image_size}                # the images' shorter side is {typical_px} px (median)
resize = "squash"                # or "crop": shorter side, then centre crop
{val_line}
{test_line}

[space]
backbone = {{ choices = ["resnet50.a1_in1k", "convnext_tiny.in12k_ft_in1k", "mobilenetv3_large_100.ra_in1k"] }}
lr = {{ low = 1e-5, high = 1e-2, log = true }}
batch_size = {{ choices = {batch_sizes} }}
unfrozen_layers = {{ low = 1, high = "all" }}
augmentation_strength = {{ low = 0.0, high = 1.0, step = 0.25 }}

# no hub in reach? Say where each backbone's weights are:
# [backbones."resnet50.a1_in1k"]
# weights = "weights/resnet50.a1_in1k.safetensors"

[training]
epochs = 12
optimizer = "adamw"
horizontal_flip = true           # false for digits, text and other things with a handedness

[search]
sampler = "tpe"
pruner = "median"
n_trials = 60
budget = "2h"                     # of all runs together; or device time, such as "4 gpu-hours"
confirm_fraction = 0.2            # of it, to train the best few again on fresh seeds

[workers]
devices = "auto"                 # every CUDA device, else CPU
"""


def write_initial_study(folder: Path, out: Path | None = None) -> tuple[Path, str]:
    """Write a study file for a folder of images.

    Args:
        folder: Class folders, or train/ val/ test/ of class folders.
        out: The file to write; default: the folder's name with ``.toml``, in the working directory.

    Returns:
        The file, and one line on what was seen.

    Raises:
        DataError: If the folder cannot be used.
        SpecError: If the file exists or cannot be written, or the folder's path is no text.
    """
    out = out or Path(f"{_choose_name(folder)}.toml")
    if os.path.lexists(out):  # a link that leads nowhere too; Path.exists raises for names that are too long
        raise SpecError(f"{out}: must not exist yet; --out names another file")
    section = DataSection(source="image_folder", path=str(folder.resolve()))
    index = read_index(section)
    cut_splits(index, section, seed=0)
    try:
        text = _fill_template(folder, out, index).encode()
    except UnicodeEncodeError as error:
        raise SpecError(
            f"{as_printable(str(folder))}: its path must be UTF-8, as study files are; rename it"
        ) from error
    try:
        out.write_bytes(text)
    except OSError as error:
        raise SpecError(f"{out}: must be a file that can be written, got: {error.strerror}") from error
    load_spec(out)
    return out, f"{len(index.names)} images in {len(index.classes)} classes, {_describe_splits(index)}"


def _fill_template(folder: Path, out: Path, index: ImageIndex) -> str:
    counts = Counter(index.labels.tolist())
    is_unbalanced = max(counts.values()) > 2 * min(counts.values())
    has_val = bool((index.given_splits == Split.VAL).any())
    has_test = bool((index.given_splits == Split.TEST).any())
    typical_px = _measure_typical_px(index)
    n_train = int(np.count_nonzero(index.given_splits != Split.TEST) * 0.6)
    largest = max(1, n_train // 4)
    batch_sizes = [size for size in _BATCH_SIZES if size <= largest][-4:]
    return _TEMPLATE.format(
        folder_name=as_printable(folder.resolve().name),
        file_name=as_printable(out.name),
        name_line=_write_line("name", _choose_name(folder)),
        objective="val_balanced_accuracy" if is_unbalanced else "val_accuracy",
        imbalance="  # the classes differ in size" if is_unbalanced else "",
        path_line=_write_line("path", _choose_path(folder, out)),
        image_size=_choose_size(typical_px),
        typical_px=typical_px,
        val_line="# val is given by the folder" if has_val else "val_fraction = 0.2",
        test_line="# test is given by the folder; locked until 'tuner train'"
        if has_test
        else "test_fraction = 0.2              # locked until 'tuner train' looks at it once",
        batch_sizes=batch_sizes,
    )


def _write_line(key: str, value: str) -> str:
    return tomli_w.dumps({key: value}).strip()


def _choose_name(folder: Path) -> str:
    """Return a study's name like the folder's: no option, not blank, not too long."""
    name = as_printable(folder.resolve().name).lstrip("-")[:200]
    return name if name.strip() else "study"


def _choose_path(folder: Path, out: Path) -> str:
    """Return the folder as seen from the study file, if it lies below and does not look like a home; else absolute."""
    home = out.resolve().parent
    target = folder.resolve()
    relative = str(target.relative_to(home)) if target.is_relative_to(home) else "~"
    return str(target) if relative.startswith("~") else relative


def _measure_typical_px(index: ImageIndex) -> int:
    """Return the median shorter side of some images that the search may open."""
    rows = np.flatnonzero(index.given_splits != Split.TEST)
    sides = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata and large images
        for row in np.random.default_rng(0).permutation(rows)[:_N_SIZED]:
            with suppress(Exception), index.open_image(int(row)) as image:  # Pillow raises nearly everything
                sides.append(min(image.size))
    if not sides:
        raise DataError("data.path: must hold images that can be opened, got none")
    return int(np.median(sides))


def _choose_size(typical_px: int) -> int:
    """Return the size that pretrained backbones expect, or a smaller multiple of 32 for smaller images."""
    return min(224, max(32, round(typical_px / 32) * 32))


def _describe_splits(index: ImageIndex) -> str:
    given = [split.name.lower() for split in Split if (index.given_splits == split).any()]
    return f"splits given: {', '.join(given)}" if given else "no splits given"
