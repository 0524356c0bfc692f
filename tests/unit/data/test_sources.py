"""Contract tests over every data source, and of the digits."""

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tuner.data.sources import SOURCES, read_digits, read_index
from tuner.spec.sections import DataSection


def write_source(folder: Path, source: str) -> DataSection:
    """Write four images for a source that reads files and return its section."""
    names = [f"{name}/{number}.jpg" for name in ("ant", "bee") for number in (1, 2)]
    root = folder / "eurosat" / "2750"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    lines = ["path,label", *(f"{name},{name.split('/')[0]}" for name in names)]
    (root / "table.csv").write_text("\n".join(lines))
    sections: dict[str, dict[str, Any]] = {
        "digits": {},
        "image_folder": {"path": str(root)},
        "csv": {"path": str(root / "table.csv")},
        "torchvision": {"path": str(folder), "dataset": "EuroSAT"},
    }
    return DataSection.model_validate({"source": source, **sections[source]})


def test_sources_are_those_of_the_study_file() -> None:
    """Each name that the study file allows has a source, and no other."""
    assert set(SOURCES) == set(get_args(DataSection.model_fields["source"].annotation))


@pytest.mark.parametrize("source", SOURCES)
def test_sources_keep_the_contract(tmp_path: Path, source: str) -> None:
    """Every source gives unique sorted names, valid labels, and stamps that stay the same."""
    section = write_source(tmp_path, source)
    index = read_index(section)
    n_images = len(index.names)
    assert list(index.names) == sorted(set(index.names))
    assert list(index.classes) == sorted(index.classes)
    assert index.labels.shape == index.given_splits.shape == (n_images,)
    assert index.labels.dtype == np.int64
    assert set(index.labels) == set(range(len(index.classes)))
    assert index.stamps == read_index(section).stamps
    assert all(index.image_version(row) for row in range(n_images))
    with index.open_image(n_images - 1) as image:
        assert image.size in {(4, 4), (8, 8)}


def test_read_index_filters_classes(tmp_path: Path) -> None:
    """``data.classes`` names the classes to keep, in its order."""
    section = write_source(tmp_path, "digits").model_copy(update={"classes": ("9", "5")})
    index = read_index(section)
    assert index.classes == ("9", "5")
    assert np.bincount(index.labels).tolist() == [180, 182]


def test_read_digits_scales_pixels_to_8_bit(tmp_path: Path) -> None:
    """All 1,797 digits are there, grey, with values up to 255."""
    index = read_digits(write_source(tmp_path, "digits"))
    assert len(index.names) == 1797
    assert index.names[17] == "digits/0017"
    with index.open_image(0) as image:
        assert image.mode == "L"
        assert image.getextrema() == (0, 239)  # 15 of 16


def test_read_digits_reads_what_scikit_learn_does(tmp_path: Path) -> None:
    """It reads the file that comes with scikit-learn, without loading scikit-learn."""
    digits = load_digits()
    index = read_digits(write_source(tmp_path, "digits"))
    assert index.classes == tuple(map(str, digits.target_names))
    np.testing.assert_array_equal(index.labels, digits.target)
    for row in range(len(digits.images)):
        np.testing.assert_array_equal(
            np.asarray(index.open_image(row)), np.rint(digits.images[row] * (255 / 16)).astype(np.uint8)
        )


def test_sources_load_no_torch() -> None:
    """Listing, cutting and decoding images needs no torch."""
    code = "import sys, tuner.data.sources, tuner.data.splits, tuner.data.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
