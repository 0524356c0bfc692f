"""What depends on the device: its name, its number formats, its seeds, and how it says that memory is out."""

import gc
import random
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tuner.errors import DeviceError
from tuner.trial import Precision

_OUT_OF_MEMORY_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "cannot allocate memory",
    "alloc_failed",  # cuBLAS and cuDNN
    "cublas_status_not_initialized",  # cuBLAS, whose handle found no room
    "unable to find an engine",  # cuDNN, whose kernels found none
    "could not create a primitive",  # oneDNN, whose scratch memory was refused
    "could not create a memory",
)


def as_device(text: str) -> torch.device:
    """Return the device of a name such as ``cpu`` or ``cuda:1``; ``cuda`` is ``cuda:0``.

    Raises:
        DeviceError: If there is no such device here. Nothing falls back to the CPU.
    """
    kind, _, number = text.partition(":")
    if text == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or not (number or "0").isdecimal() or text.endswith(":"):
        raise DeviceError(f"device: must be cpu, cuda or cuda:<number>, got {text!r}")
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_devices == 0:
        raise DeviceError(f"device: must exist, got {text!r}; torch sees no CUDA device here, use 'cpu'")
    if int(number or 0) >= n_devices:
        raise DeviceError(f"device: must lie in cuda:0 to cuda:{n_devices - 1}, got {text!r}")
    return torch.device("cuda", int(number or 0))


def computes_in_bfloat16(device: torch.device, precision: Precision) -> bool:
    """Whether forward passes are to be computed in bfloat16, which needs no loss scaling.

    By itself only where kernels have it. torch also runs it on older CUDA devices, at a fraction of float32's speed
    (T4, V100); and on a CPU it pays for some backbones alone, and on few CPUs.
    """
    if precision != "auto":
        return precision == "bfloat16"
    return device.type == "cuda" and has_bfloat16_kernels(device)


def describe_computing(device: torch.device, precision: Precision) -> dict[str, str]:
    """Return where a model is trained and in what, as model folders tell it."""
    return {
        "device": str(device),
        "computed_in": "bfloat16" if computes_in_bfloat16(device, precision) else "float32",
    }


@cache  # every step asks
def has_bfloat16_kernels(device: torch.device) -> bool:
    """Whether a CUDA device computes in bfloat16 by itself."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def lacks_bfloat16(cpu: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU is known to have no instructions for bfloat16: of those that Linux tells of."""
    flags = _read_flags(cpu)
    return bool(flags) and flags.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})  # the last is ARM's


def multiplies_in_bfloat16(cpu: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU is known to have matrix units for bfloat16 (Intel's AMX)."""
    return "amx_bf16" in _read_flags(cpu)


def _read_flags(cpu: Path) -> set[str]:
    """Return what a CPU can do by Linux's names, among other words; nothing where no file tells."""
    try:
        return set(cpu.read_text(encoding="utf-8").split())
    except OSError:
        return set()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context of a forward pass."""
    if computes_in_bfloat16(device, precision):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


MEMORY_FORMAT = torch.channels_last
"""How images and convolutions lie in memory. Tensor cores want the channels last; on a CPU a training step of a
MobileNet took 0.69 to 0.76 of the time that it took with the channels first; other backbones were level or, resnet18
in one of two measurements, up to a third slower.

cuDNN chooses its kernels by its heuristics: ``torch.backends.cudnn.benchmark`` stays off. It times kernels anew for
each shape in each process, which trials of seconds, each with its own batch size and last batch, would pay again and
again; and which kernel computes a trial, and so its rounding, would depend on what else ran on the device meanwhile."""


def send_ahead(values: Tensor, device: torch.device) -> Tensor:
    """Return values on a device without waiting for it: CUDA copies pinned memory while the host goes on.

    torch's pinned allocator keeps the buffer until the copy is done. From memory that is not pinned torch would wait
    until the device has done all that it was asked for before.
    """
    if device.type == "cpu":
        return values.to(device)  # to the host one has to wait: whoever reads it would read what is not there yet
    return (values.pin_memory() if device.type == "cuda" and not values.is_cuda else values).to(
        device, non_blocking=True
    )


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was asked for: a clock that is read before shows nothing of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seed_everything(seed: int) -> None:
    """Seed the global generators: torch's, which dropout and drop-path draw from, and those that a user's code may use.

    Args:
        seed: In ``[0, 2**63)``.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - a user's backbone may draw from it, we do not


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine has no memory left.

    On the CPU torch raises a plain RuntimeError, so that only its text tells (c10/core/impl/alloc_cpu.cpp:
    ``DefaultCPUAllocator: can't allocate memory`` on Linux, ``not enough memory`` elsewhere).
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY_WORDS)


def is_device_lost(error: BaseException) -> bool:
    """Whether an error says that CUDA failed: after most such errors every call of this process fails as well."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not is_out_of_memory(error)


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more.

    Raises:
        RuntimeError: If the device is lost.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
