"""The place where mistakes are made."""

from pathlib import Path

import pytest

from tests.e2e.mistakes import write_images


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own that holds twelve images, offline and without CUDA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    write_images(tmp_path / "images", *(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(6)))
    return tmp_path
