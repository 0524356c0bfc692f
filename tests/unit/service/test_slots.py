"""Devices and cores become slots."""

import os
from pathlib import Path

import pytest

from tuner.errors import DeviceError
from tuner.service.slots import (
    Slot,
    ask_for_huge_pages,
    bind,
    expects_cpu,
    list_slots,
    probes_sharing,
    share_slots,
    usable_cores,
)
from tuner.spec.sections import WorkersSection


def make_workers(**values: object) -> WorkersSection:
    """Return a checked section."""
    return WorkersSection.model_validate(values)


def test_auto_takes_every_cuda_device() -> None:
    """One worker for each device, the cores shared out."""
    slots = list_slots(make_workers(), ("A", "B"), n_cores=8)
    assert [slot.device for slot in slots] == ["cuda:0", "cuda:1"]
    assert {slot.n_threads for slot in slots} == {4}


def test_auto_without_cuda_takes_every_core_with_one_thread() -> None:
    """On the CPU a worker is a core."""
    slots = list_slots(make_workers(), (), n_cores=3)
    assert [(slot.device, slot.n_threads) for slot in slots] == [("cpu", 1)] * 3


def test_per_device_multiplies_the_workers_of_cuda() -> None:
    """Several workers may share a device."""
    slots = list_slots(make_workers(per_device=2), ("A", "B"), n_cores=2)
    assert [slot.device for slot in slots] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert {slot.n_threads for slot in slots} == {1}


@pytest.mark.parametrize(
    ("n_devices", "n_cores", "devices"),
    [
        (1, 16, ["cuda:0"] * 4),
        (1, 2, ["cuda:0"] * 2),
        (2, 6, ["cuda:0", "cuda:1", "cuda:0", "cuda:0"]),
        (2, 1, ["cuda:0", "cuda:1"]),
    ],
)
def test_auto_starts_what_a_probe_of_the_first_device_needs(n_devices: int, n_cores: int, devices: list[str]) -> None:
    """Up to four, as far as the cores go; the other devices first get one each."""
    workers = make_workers(per_device="auto")
    slots = list_slots(workers, ("A",) * n_devices, n_cores=n_cores)
    assert [slot.device for slot in slots] == devices
    assert probes_sharing(workers, slots, None)


def test_auto_probes_neither_the_cpu_nor_what_the_command_line_says() -> None:
    """A core is a worker, and --workers is a decision."""
    workers = make_workers(per_device="auto")
    assert [slot.device for slot in list_slots(workers, (), n_cores=3)] == ["cpu"] * 3
    assert not probes_sharing(workers, list_slots(workers, (), n_cores=3), None)
    dealt = list_slots(workers, ("A", "B"), n_workers=3, n_cores=8)
    assert [slot.device for slot in dealt] == ["cuda:0", "cuda:1", "cuda:0"]
    assert not probes_sharing(workers, dealt, 3)
    assert not probes_sharing(make_workers(per_device=4), dealt, None)


def test_share_slots_gives_every_device_as_many_workers() -> None:
    """Each device of the probe's slots, however many workers tried it; the cores are dealt anew."""
    tried = [Slot(device=device, n_threads=1) for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:0")]
    shared = share_slots(tried, 2, n_cores=8)
    assert [(slot.device, slot.n_threads) for slot in shared] == [("cuda:0", 2), ("cuda:1", 2)] * 2


def test_n_workers_of_the_command_line_is_dealt_to_the_devices() -> None:
    """--workers counts workers, whatever the file says."""
    assert [slot.device for slot in list_slots(make_workers(), ("A", "B"), n_workers=3, n_cores=4)] == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
    ]
    assert len(list_slots(make_workers(devices="cpu"), ("A",), n_workers=5, n_cores=2)) == 5


def test_device_that_does_not_exist_is_refused() -> None:
    """No silent fallback to the CPU."""
    expected = r"workers.devices: must name devices that exist, got 'cuda:2'; this machine shows 1 CUDA device$"
    with pytest.raises(DeviceError, match=expected):
        list_slots(make_workers(devices=["cuda:0", "cuda:2"]), ("A",), n_cores=2)


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        (None, "cuda:1", "1"),
        ("2,3", "cuda:1", "3"),
        ("GPU-a, GPU-b", "cuda:0", "GPU-a"),
        ("", "cuda:0", "0"),
        ("2,3", "cpu", ""),
    ],
)
def test_bind_counts_in_what_the_user_made_visible(visible: str | None, device: str, expected: str) -> None:
    """cuda:N is the N-th of the user's CUDA_VISIBLE_DEVICES."""
    environment = {"HOME": "/"} if visible is None else {"HOME": "/", "CUDA_VISIBLE_DEVICES": visible}
    assert bind(device, environment) == {"CUDA_VISIBLE_DEVICES": expected}


def test_huge_pages_are_asked_for_unless_the_user_tunes_glibc() -> None:
    """The user's own word counts."""
    assert ask_for_huge_pages({"HOME": "/"}) == {"HOME": "/", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert ask_for_huge_pages({"GLIBC_TUNABLES": "own"}) == {"GLIBC_TUNABLES": "own"}


@pytest.mark.parametrize(
    ("devices", "has_driver", "visible", "expected"),
    [
        ("auto", False, None, True),
        ("auto", True, None, False),
        ("auto", True, "1", False),
        ("auto", True, "", True),
        ("auto", True, "-1", True),
        ("cpu", True, None, True),
        (["cuda:0"], False, None, False),
    ],
)
def test_expects_cpu_only_where_nothing_speaks_for_a_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    devices: object,
    has_driver: bool,
    visible: str | None,
    expected: bool,
) -> None:
    """Workers that start before torch was asked would be bound to the wrong device."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver = tmp_path / "driver"
    if has_driver:
        driver.touch()
    assert expects_cpu(make_workers(devices=devices), [driver]) is expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
        ({"cpu.max": "nonsense"}, None),
    ],
)
def test_usable_cores_obeys_the_quota(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    """A container's quota counts, not the machine's cores."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == (expected or len(os.sched_getaffinity(0)))
