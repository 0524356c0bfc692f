"""Tests of tuner.data.store."""

import os
import re
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tuner.data.cache import list_entries
from tuner.data.index import ImageIndex
from tuner.data.source_folder import read_image_folder
from tuner.data.store import PixelStore, check_room, open_store
from tuner.errors import DataError, StorageError
from tuner.spec.sections import DataSection


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache in the test's folder."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_data(root: Path, n_images: int = 5) -> Path:
    """Write images of two classes; image ``i`` of a class is all of value ``10 * i``."""
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(n_images):
            Image.new("RGB", (16, 16), (10 * number,) * 3).save(root / name / f"{number}.png")
    return root


def make_section(root: Path, **fields: Any) -> DataSection:
    """Return a section that reads ``root``."""
    return DataSection.model_validate({"source": "image_folder", "path": str(root), "image_size": 8, **fields})


def open_all(section: DataSection, index: ImageIndex | None = None, **options: Any) -> PixelStore:
    """Open a store with every image of the section."""
    index = index or read_image_folder(section)
    return open_store(index, range(len(index.names)), section, interpolation="bilinear", **options)


def forbid_opening(index: ImageIndex) -> ImageIndex:
    """Return the index with images that cannot be opened."""

    def refuse(row: int) -> AbstractContextManager[Image.Image]:
        raise AssertionError(f"opened image {row}")

    return ImageIndex(**{**vars(index), "open_image": refuse})


def test_open_store_decodes_the_rows_asked_for(tmp_path: Path) -> None:
    """Pixels follow the order of the rows; other images stay closed."""
    section = make_section(write_data(tmp_path / "data"))
    store = open_store(read_image_folder(section), [7, 1], section, interpolation="bilinear", n_threads=3)
    assert store.rows.tolist() == [7, 1]
    assert store.pixels.shape == (2, 3, 8, 8)
    assert store.pixels[:, 0, 0, 0].tolist() == [20, 10]
    assert store.bad == ()


def test_open_store_decodes_once(tmp_path: Path) -> None:
    """The second time, no image is opened."""
    section = make_section(write_data(tmp_path / "data"))
    index = read_image_folder(section)
    first = open_all(section, index)
    second = open_all(section, forbid_opening(index))
    assert np.shares_memory(second.pixels, second.pixels.base)
    assert (first.pixels == second.pixels).all()


def test_open_store_decodes_anew_what_changed(tmp_path: Path) -> None:
    """A changed image, size, way of resizing or interpolation has its own pixels."""
    root = write_data(tmp_path / "data")
    section = make_section(root)
    open_all(section)
    Image.new("RGB", (16, 16), (99, 99, 99)).save(root / "ant/0.png")
    assert open_all(section).pixels[0, 0, 0, 0] == 99
    assert open_all(make_section(root, image_size=12)).pixels.shape == (10, 3, 12, 12)
    open_all(make_section(root, resize="crop"))
    assert len(list((tmp_path / "cache/pixels").glob("*.npy"))) == 4


def test_open_store_rebuilds_a_broken_cache(tmp_path: Path, cache: Path) -> None:
    """A store that was cut short or lost its list of bad images is made again."""
    section = make_section(write_data(tmp_path / "data"))
    expected = open_all(section).pixels.copy()
    (path,) = (cache / "pixels").glob("*.npy")
    for damage in (path.read_bytes()[:300], b"", b"x" * 500):
        path.write_bytes(damage)
        assert (open_all(section).pixels == expected).all()
    path.with_suffix(".json").unlink()
    assert (open_all(section).pixels == expected).all()
    path.with_suffix(".json").write_text('{"0": "not an image"}')
    assert len(open_all(section).rows) == 10


@pytest.mark.parametrize("verify", [True, False])
def test_open_store_decodes_anew_what_a_disk_has_changed(tmp_path: Path, cache: Path, verify: bool) -> None:
    """One flipped bit among the pixels; looking for it costs a read, which one worker does for all."""
    section = make_section(write_data(tmp_path / "data"))
    expected = open_all(section).pixels.copy()
    (path,) = (cache / "pixels").glob("*.npy")
    flipped = bytearray(path.read_bytes())
    flipped[-5] ^= 4
    path.write_bytes(flipped)
    assert (open_all(section, verify=verify).pixels == expected).all() == verify


def test_open_store_decodes_anew_under_another_list_of_bad_images(tmp_path: Path, cache: Path) -> None:
    """As many, but others: every label behind the first of them would belong to the image before."""
    folder = write_data(tmp_path / "data")
    sorted(folder.rglob("*.png"))[3].write_bytes(b"no image")
    section = make_section(folder, max_bad_fraction=0.5)
    expected = open_all(section).rows.tolist()
    (sidecar,) = (cache / "pixels").glob("*.json")
    sidecar.write_text(sidecar.read_text().replace('"3":', '"7":'))
    assert open_all(section).rows.tolist() == expected


def test_open_store_sweeps_what_killed_processes_left(tmp_path: Path, cache: Path) -> None:
    """A worker killed while it decodes leaves a file as large as the whole store; it is not left for ever."""
    section = make_section(write_data(tmp_path / "data"))
    open_all(section)
    (made,) = cache.rglob("*.npy")
    half = made.with_name(f".{made.name}.4242.tmp")
    made.rename(half)
    other = made.with_name(".another-store.npy.4242.tmp")
    other.write_bytes(b"being written")
    open_all(section)
    assert made.is_file()
    assert not half.exists()
    assert other.exists()


def test_open_store_leaves_bad_images_out(tmp_path: Path) -> None:
    """Bad images up to the allowance are listed, and the rows of the others stay right, from the cache too."""
    root = write_data(tmp_path / "data")
    (root / "ant/1.png").write_bytes(b"")
    (root / "bee/3.png").write_text("no image")
    (root / "bee/4.png").unlink()
    (root / "bee/4.png").symlink_to("nowhere")
    section = make_section(root, max_bad_fraction=0.3)
    for store in (open_all(section, n_threads=2), open_all(section)):
        assert store.rows.tolist() == [0, 2, 3, 4, 5, 6, 7]
        assert store.pixels[:, 0, 0, 0].tolist() == [0, 20, 30, 40, 0, 10, 20]
        reasons = {image.name: image.reason for image in store.bad}
        assert reasons == {
            "ant/1.png": "not an image",
            "bee/3.png": "not an image",
            "bee/4.png": "No such file or directory",
        }


def test_open_store_refuses_too_many_bad_images(tmp_path: Path) -> None:
    """More than the allowance is an error that names the first five, also when a larger one filled the cache."""
    root = write_data(tmp_path / "data")
    data = (root / "ant/0.png").read_bytes()
    for number in range(3):
        (root / f"ant/{number}.png").write_bytes(data[:50])
        (root / f"bee/{number}.png").write_bytes(b"GIF89a")
    message = re.compile(
        r"^data.max_bad_fraction: at most 0.01 of the images may fail to decode, got 6 of 10: "
        r"ant/0.png \(.+\), ant/1.png .* bee/1.png \(not an image\) and 1 more$"
    )
    section = make_section(root)
    with pytest.raises(DataError, match=message):
        open_all(section)
    assert not list((tmp_path / "cache/pixels").glob("*.npy"))
    assert len(open_all(make_section(root, max_bad_fraction=0.6)).rows) == 4
    with pytest.raises(DataError, match=message):
        open_all(section)


def test_open_store_counts_a_decompression_bomb_as_bad(tmp_path: Path) -> None:
    """A file that claims more pixels than Pillow allows is a bad image, and a large one is not."""
    root = write_data(tmp_path / "data")
    for name, height in (("ant/0.pgm", 100_000), ("bee/0.pgm", 6_000)):
        (root / name).write_bytes(f"P5 20000 {height} 255\n".encode())
    store = open_all(make_section(root, max_bad_fraction=0.5))
    reasons = {image.name: image.reason for image in store.bad}
    assert "decompression bomb" in reasons["ant/0.pgm"]
    assert "decompression bomb" not in reasons["bee/0.pgm"]


def test_open_store_reports_progress(tmp_path: Path) -> None:
    """Progress counts every image, bad ones included."""
    seen: list[tuple[int, int]] = []
    open_all(
        make_section(write_data(tmp_path / "data")), on_progress=lambda n_done, n_all: seen.append((n_done, n_all))
    )
    assert seen == [(number, 10) for number in range(1, 11)]


def test_open_store_is_safe_for_two_at_once(tmp_path: Path) -> None:
    """Two who want the same images get the same pixels, decoded once."""
    section = make_section(write_data(tmp_path / "data"))
    n_opened: list[int] = []
    index = read_image_folder(section)

    def count_and_open(row: int) -> AbstractContextManager[Image.Image]:
        n_opened.append(row)
        return index.open_image(row)

    counting = ImageIndex(**{**vars(index), "open_image": count_and_open})
    stores: list[PixelStore] = []
    threads = [threading.Thread(target=lambda: stores.append(open_all(section, counting))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(n_opened) == 10
    assert all((store.pixels == stores[0].pixels).all() for store in stores)
    assert not list((tmp_path / "cache/pixels").glob(".*.tmp"))


def test_open_store_refuses_a_disk_that_is_too_small(tmp_path: Path) -> None:
    """Room is checked before anything is decoded."""
    section = make_section(write_data(tmp_path / "data")).model_copy(update={"image_size": 10_000_000})
    message = r"^TUNER_CACHE_DIR: must have 3000000.0 GB free for the decoded images, got [\d.]+ GB in .*; set TUNER_CA"
    with pytest.raises(StorageError, match=message):
        open_all(section, forbid_opening(read_image_folder(section)))


def test_open_store_refuses_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    """A cache folder that cannot be made is the user's to change."""
    cache.touch()
    message = r"^TUNER_CACHE_DIR: must be a folder that can be written, got '.*pixels' \(.+\); set TUNER_CACHE_DIR to"
    with pytest.raises(StorageError, match=message):
        open_all(make_section(write_data(tmp_path / "data")))


def test_open_store_is_built_over_budget(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training needs the pixels: what else can be evicted makes room for them, and they are there all the same."""
    monkeypatch.setenv("TUNER_CACHE_GB", "0")
    features = cache / "features" / f"{'a' * 64}.npy"
    features.parent.mkdir(parents=True)
    features.write_bytes(b"features")
    section = make_section(write_data(tmp_path / "data"))
    index = read_image_folder(section)
    assert open_all(section, index).pixels.shape == (10, 3, 8, 8)
    assert not features.exists()
    assert len(open_all(section, forbid_opening(index)).rows) == 10


def test_open_store_marks_its_use(tmp_path: Path, cache: Path) -> None:
    """What a study opens is evicted after what nobody has used for longer; the list says what it is."""
    section = make_section(write_data(tmp_path / "data"))
    open_all(section)
    (path,) = (cache / "pixels").glob("*.npy")
    os.utime(path, (0, 0))
    open_all(section)
    assert path.stat().st_mtime > 0
    (entry,) = list_entries()
    assert entry.text == f"10 images of {tmp_path / 'data'}, 8 px, squash, bilinear"


def test_open_store_evicts_no_store_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study with two interpolations over budget does not decode them in turns."""
    monkeypatch.setenv("TUNER_CACHE_GB", "0")
    section = make_section(write_data(tmp_path / "data"))
    index = read_image_folder(section)
    first = open_all(section, index)
    open_store(index, range(10), section, interpolation="nearest")
    again = open_all(section, forbid_opening(index))
    assert (first.pixels == again.pixels).all()


def test_check_room_refuses_a_bad_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run learns it before it decodes."""
    monkeypatch.setenv("TUNER_CACHE_GB", "much")
    section = make_section(write_data(tmp_path / "data"))
    with pytest.raises(StorageError, match=r"^TUNER_CACHE_GB: must be a number of gigabytes, 0 or more, got 'much'$"):
        check_room(read_image_folder(section), np.arange(10), section, interpolations=["bilinear"])


def test_check_room_counts_what_can_be_evicted(tmp_path: Path, cache: Path) -> None:
    """A disk that is full of old features has room for new pixels."""
    section = make_section(write_data(tmp_path / "data")).model_copy(update={"image_size": 300_000})
    index = read_image_folder(section)
    with pytest.raises(StorageError, match=r"^TUNER_CACHE_DIR: must have 2700.0 GB free for the decoded images, got"):
        check_room(index, np.arange(10), section, interpolations=["bilinear"])
    features = cache / "features" / f"{'a' * 64}.npy"
    features.parent.mkdir()
    features.touch()
    os.truncate(features, 3 * 10**12)  # a hole
    assert check_room(index, np.arange(10), section, interpolations=["bilinear"]) == 27 * 10**11


def test_open_store_takes_no_rows(tmp_path: Path) -> None:
    """No images are no error."""
    section = make_section(write_data(tmp_path / "data"))
    store = open_store(read_image_folder(section), [], section, interpolation="bilinear")
    assert store.pixels.shape == (0, 3, 8, 8)
