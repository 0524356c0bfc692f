"""How much memory a piece of training takes: tensors counted as they live and die, and what the device says besides."""

import ctypes
import gc
import os
import resource
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PROCESS = Path("/proc/self")
_KIBIBYTE = 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BLOCK_BYTES = 1 << 20


class TensorCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of a device's tensors that are alive, after every operation inside the block.

    It sees each storage that an operator returns, and when Python's last reference and autograd's are gone. So it is
    exact for tensors and the same in every run; what kernels take and give back within one operation it does not see.
    Follows ``torch.distributed._tools.mem_tracker``.
    """

    def __init__(self, device: torch.device, held: Sequence[Tensor] = ()) -> None:
        """Begin to count.

        Args:
            device: Whose tensors count.
            held: Tensors that exist already and count; others that were made before do not.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind = device.type
        self._sizes: dict[int, int] = {}
        self._n_bytes = 0
        self.trace: list[int] = []
        """Bytes after each operation."""
        for tensor in held:
            self._add(tensor)

    @property
    def peak(self) -> int:
        """The highest count after an operation; 0 before the first."""
        return max(self.trace, default=0)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it returns."""
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result)
        self.trace.append(self._n_bytes)
        return results

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type != self._kind or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        # A storage keeps its Python object, and so its id, until the last tensor is gone that lies in it.
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = storage.nbytes()
            self._n_bytes += storage.nbytes()
            weakref.finalize(storage, self._drop, id(storage)).atexit = False

    def _drop(self, key: int) -> None:
        self._n_bytes -= self._sizes.pop(key)


class Growth:
    """What a process takes of a device from now on, at its highest: kernels' own memory and what allocators lose too.

    On CUDA the allocator says so. On the CPU it is the highest resident size of the process, which Linux counts anew
    for whoever asks; the pages of mapped files are left out as far as they still lie in memory at the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_reserved(device)
            return
        give_back_heap()
        self._can_tell = _restart_peak()
        status = _read_status()
        self._before, self._before_files = status.get("VmRSS", 0), status.get("RssFile", 0)

    def read(self) -> int | None:
        """Return the bytes so far, at least 0; None if the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) - self._before
        status = _read_status()
        if not self._can_tell or "VmHWM" not in status:
            return None
        return max(0, status["VmHWM"] - self._before - max(0, status.get("RssFile", 0) - self._before_files))


def _restart_peak() -> bool:
    """Have Linux forget the highest resident size so far; return whether it did (proc(5), ``clear_refs``)."""
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def _read_status() -> dict[str, int]:
    """Return the sizes of this process in bytes, by the names of proc(5)."""
    with suppress(OSError):
        words = [line.split() for line in (_PROCESS / "status").read_text(encoding="utf-8").splitlines()]
        return {name[0].rstrip(":"): int(name[1]) * _KIBIBYTE for name in words if name[2:] == ["kB"]}
    return {}


def keep_heap_tight() -> None:
    """Have the C library give back large blocks when they are freed, from now on, so that holes take no memory.

    Without it the process grew by 5 to 69 % more than torch had allocated (13 steps of four backbones), with it by 2 to
    20 %, but for one of 25 MB that took 16 more. It costs 10 to 25 % of a training step's time, for new pages: only
    where memory is short.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BLOCK_BYTES)


def give_back_heap() -> None:
    """Have the C library give back what has been freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def find_ceiling(n_bytes: int) -> int:
    """Return how large this process's data may become if it is to grow by so many bytes."""
    gc.collect()
    give_back_heap()
    return _read_status().get("VmData", 0) + n_bytes


@contextmanager
def below(ceiling: int | None) -> Iterator[None]:
    """Refuse this process memory above a ceiling of ``find_ceiling`` during a block; None refuses nothing.

    An allocation beyond it fails, and torch says that it cannot allocate memory. Files that are mapped for reading do
    not count (setrlimit(2), ``RLIMIT_DATA``).
    """
    if ceiling is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [bound for bound in (soft, hard, ceiling) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers."""
    storages = {id(each.untyped_storage()): each.untyped_storage() for each in list_tensors(model)}
    return sum(storage.nbytes() for storage in storages.values())


def list_tensors(model: nn.Module) -> list[Tensor]:
    """Return a model's parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def name_processor(device: torch.device) -> str:
    """Return what decides how much memory a device's kernels take."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"
