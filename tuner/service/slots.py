"""Which devices train, and how a worker is bound to its own. No torch: bindings are fixed before it sees a device."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import DeviceError
from tuner.service.sharing import MAX_SHARING
from tuner.spec.sections import WorkersSection

_CGROUP = Path("/sys/fs/cgroup")
_GPU_DRIVERS = tuple(Path("/dev", name) for name in ("nvidiactl", "nvmap", "dxg", "kfd"))
"""What the drivers of GPUs show to programs: NVIDIA's, its boards', WSL's, AMD's."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A share of one device that runs one worker."""

    device: str
    """``cpu`` or ``cuda:N``, N counting the devices that the user made visible."""
    n_threads: int
    """CPU threads that the worker may use."""


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Return how many cores this process may use: its affinity, cut down to the cgroup's quota. At least 1."""
    cores = len(os.sched_getaffinity(0))
    quota = _read_quota(cgroup)
    return max(1, min(cores, math.floor(quota))) if quota else cores


def _read_quota(cgroup: Path) -> float | None:
    """Return the cores that cgroup v2 or v1 allows, or None for no limit."""
    try:
        if (unified := cgroup / "cpu.max").is_file():
            quota, period = unified.read_text().split()
        else:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if quota in {"max", "-1"} else int(quota) / int(period)


def list_slots(
    workers: WorkersSection, cuda_devices: Sequence[str], *, n_workers: int | None = None, n_cores: int | None = None
) -> tuple[Slot, ...]:
    """Return the slots of a run; of one that probes, those that the probe needs (``probes_sharing``).

    Args:
        workers: The study file's section.
        cuda_devices: Names of the CUDA devices that the user made visible.
        n_workers: Number of workers asked for on the command line; they are dealt to the devices in turn.
        n_cores: Usable cores; default: this machine's.

    Raises:
        DeviceError: If a device of the study file does not exist.
    """
    n_cores = n_cores or usable_cores()
    devices = _choose_devices(workers, len(cuda_devices))
    if devices == ("cpu",):
        return (Slot(device="cpu", n_threads=1),) * (n_workers or n_cores)
    if workers.per_device == "auto" and n_workers is None:
        # One device is tried with all that may share it; they start while the data and the backbones are looked at.
        n_tried = max(1, min(MAX_SHARING, n_cores // len(devices)))
        return _deal((*devices, *devices[:1] * (n_tried - 1)), n_cores)
    per_device = 1 if workers.per_device == "auto" else workers.per_device
    n_slots = n_workers or len(devices) * per_device
    return _deal([devices[number % len(devices)] for number in range(n_slots)], n_cores)


def _deal(devices: Sequence[str], n_cores: int) -> tuple[Slot, ...]:
    n_threads = max(1, n_cores // len(devices))
    return tuple(Slot(device=device, n_threads=n_threads) for device in devices)


def probes_sharing(workers: WorkersSection, slots: Sequence[Slot], n_workers: int | None) -> bool:
    """Whether a probe is to say how many workers share each device.

    Args:
        workers: The study file's section.
        slots: Of ``list_slots``.
        n_workers: Number of workers asked for on the command line, which decides.
    """
    return workers.per_device == "auto" and n_workers is None and slots[0].device != "cpu"


def share_slots(slots: Sequence[Slot], per_device: int, *, n_cores: int | None = None) -> tuple[Slot, ...]:
    """Return the slots with which each device of some slots is shared by as many workers."""
    return _deal([*dict.fromkeys(slot.device for slot in slots)] * per_device, n_cores or usable_cores())


def expects_cpu(workers: WorkersSection, drivers: Sequence[Path] = _GPU_DRIVERS) -> bool:
    """Whether the run's devices are the CPU as far as can be said before torch is there to ask."""
    if workers.devices == ("auto",):
        hides_all = os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}
        return hides_all or not any(driver.exists() for driver in drivers)
    return workers.devices == ("cpu",)


def _choose_devices(workers: WorkersSection, n_cuda: int) -> tuple[str, ...]:
    if workers.devices == ("auto",):
        return tuple(f"cuda:{number}" for number in range(n_cuda)) or ("cpu",)
    present = f"this machine shows {n_cuda} CUDA device{'' if n_cuda == 1 else 's'}"
    for device in workers.devices:
        if device.startswith("cuda") and int(device.partition(":")[2]) >= n_cuda:
            raise DeviceError(f"workers.devices: must name devices that exist, got {device!r}; {present}")
    return workers.devices


def bind(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what is to stand in a worker's environment for it to see its own device and no other.

    Args:
        device: A slot's device.
        environment: What it has. A ``CUDA_VISIBLE_DEVICES`` in it is what ``cuda:N`` counts in.
    """
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    number = int(device.partition(":")[2])
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[number].strip() if visible else str(number)}


def ask_for_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which the GNU C library asks Linux for pages of 2 MB, unless the user tunes it already.

    A training step on a CPU touches tens of thousands of the 4 KB that are usual. Other C libraries, and glibc before
    2.35, pass it over.
    """
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **environment}


def count_sharing(slots: Sequence[Slot], device: str) -> int:
    """Return how many workers share a device; each CPU core is one by itself."""
    return 1 if device == "cpu" else sum(slot.device == device for slot in slots)


def count_devices(slots: Sequence[Slot]) -> float:
    """Return how many devices workers hold: GPUs, or CPU cores."""
    return sum(1 / count_sharing(slots, slot.device) for slot in slots)
