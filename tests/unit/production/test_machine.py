"""Tests of tuner.production.machine."""

import sys
from pathlib import Path

import pytest
import torch

from tuner.errors import DeviceError
from tuner.production.machine import choose_device, find_own_code, reporting_memory, using_cores
from tuner.service.slots import usable_cores


def test_choose_device_takes_cuda_where_there_is_one() -> None:
    """Auto never fails; a name is taken at its word."""
    expected = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    assert choose_device("auto") == expected
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match=r"^device: must be cpu, cuda or cuda:<number>, got 'gpu'$"):
        choose_device("gpu")


def test_using_cores_gives_the_threads_back() -> None:
    """A notebook's own setting is never exceeded, and is there again afterwards."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with using_cores() as n_threads:
            assert n_threads == torch.get_num_threads() == 1
        torch.set_num_threads(64)
        with using_cores() as n_threads:
            assert n_threads == torch.get_num_threads() == min(64, usable_cores())
        assert torch.get_num_threads() == 64
    finally:
        torch.set_num_threads(before)


def test_reporting_memory_tells_out_of_memory_and_nothing_else() -> None:
    """A user can do something about memory, but not about a bug."""
    cpu = torch.device("cpu")
    with (
        pytest.raises(
            DeviceError, match=r"^device: must have memory for batches of 8, got none left on cpu; buy some$"
        ),
        reporting_memory(cpu, n_images=8, advice="buy some"),
    ):
        raise torch.OutOfMemoryError
    with pytest.raises(ZeroDivisionError), reporting_memory(cpu, n_images=8, advice="buy some"):
        _ = 1 / 0


def test_find_own_code_adds_the_working_directory_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and behind everything, so that a file of the user's shadows no module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    find_own_code()
    find_own_code()
    assert sys.path[-1] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1
