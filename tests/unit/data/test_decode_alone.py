"""Tests of tuner.data.decode_pool: processes that hang, and images that must be decoded alone."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.data.test_decode_pool import is_alive, list_children, use_codec, write_data
from tuner.data.array_file import create_array
from tuner.data.decode_pool import decode_files
from tuner.data.decode_process import Target

LOOPING_CODEC = """
def act(*_):
    while True:
        pass
"""


def decode_all(
    root: Path, place: Path, *, act: Callable[[list[int]], None] = lambda _: None, silence_limit: float = 60.0
) -> dict[int, str]:
    """Decode the images of a folder in two processes; return why each failed.

    Acts on the processes when the first image is done. The order is that in which the images were done.
    """
    files = sorted(root.rglob("*.*"))
    create_array(place, np.uint8, (len(files), 3, 8, 8)).flush()
    reasons: dict[int, str] = {}

    def note(position: int, reason: str) -> None:
        if not reasons:
            act(list_children())
        reasons[position] = reason

    target = Target(path=str(place), size=8, resize="squash", interpolation="bicubic")
    decode_files(target, files, n_processes=2, on_image=note, silence_limit=silence_limit)
    return reasons


def test_hanging_processes_cost_no_other_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped and one whose codec loops are ended; only the file that makes it loop is bad, alone too."""
    root = write_data(tmp_path / "data", n_images=100)
    (root / "bee/007.jpg").write_bytes(b"KILL" * 10)
    use_codec(tmp_path / "codec", LOOPING_CODEC, monkeypatch)
    stopped: list[int] = []

    def stop(children: list[int]) -> None:
        # One that has begun: a process that is stopped while it starts may be silent for a minute.
        begun = next(pid for pid in children if b"pixels.npy" in Path(f"/proc/{pid}/maps").read_bytes())
        stopped.append(begun)
        os.kill(begun, signal.SIGSTOP)

    reasons = decode_all(root, tmp_path / "pixels.npy", act=stop, silence_limit=2.0)
    assert reasons == dict.fromkeys(range(200), "") | {107: "took longer than 2 s"}
    assert np.load(tmp_path / "pixels.npy").any(axis=(1, 2, 3)).sum() == 199
    assert not is_alive(stopped[0])


def test_large_images_are_decoded_alone(tmp_path: Path) -> None:
    """Processes put them aside until all others are done: together they would fill the memory."""
    root = write_data(tmp_path / "data", n_images=20)
    for name in ("ant/000.jpg", "ant/002.jpg"):
        Image.new("1", (5000, 4001), 1).save(root / name, "PNG")
    reasons = decode_all(root, tmp_path / "pixels.npy")
    assert reasons == dict.fromkeys(range(40), "")
    assert list(reasons)[-2:] == [0, 2]
    assert (np.load(tmp_path / "pixels.npy")[[0, 2]] == 255).all()
