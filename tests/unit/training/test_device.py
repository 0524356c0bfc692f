"""Devices by name, and how they say that memory is out."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tuner.errors import DeviceError
from tuner.training.device import (
    as_device,
    computes_in_bfloat16,
    has_bfloat16_kernels,
    is_out_of_memory,
    lacks_bfloat16,
    multiplies_in_bfloat16,
    seed_everything,
)
from tuner.trial import Precision

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def test_as_device_knows_the_cpu() -> None:
    """The CPU is always there."""
    assert as_device("cpu") == torch.device("cpu")


@without_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_as_device_never_falls_back_to_the_cpu(name: str) -> None:
    """A missing CUDA device is the user's to solve."""
    with pytest.raises(DeviceError, match=rf"^device: must exist, got '{name}'; torch sees no CUDA device here"):
        as_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", ""])
def test_as_device_refuses_other_names(name: str) -> None:
    """Only the names of the study file are names of devices."""
    with pytest.raises(DeviceError, match=rf"^device: must be cpu, cuda or cuda:<number>, got '{name}'$"):
        as_device(name)


def test_as_device_refuses_a_number_too_high() -> None:
    """A machine with CUDA says which devices it has, one without says that it has none."""
    with pytest.raises(DeviceError, match=r"^device: must (lie in cuda:0 to|exist, got 'cuda:99')"):
        as_device("cuda:99")


@pytest.mark.parametrize(("precision", "expected"), [("auto", False), ("float32", False), ("bfloat16", True)])
def test_computes_in_bfloat16_on_a_cpu_on_request_alone(precision: Precision, expected: bool) -> None:
    """It pays for some backbones on some CPUs, and all bits are promised of float32."""
    assert computes_in_bfloat16(torch.device("cpu"), precision) is expected


@pytest.mark.parametrize("has_kernels", [True, False])
def test_computes_in_bfloat16_by_itself_where_cuda_has_kernels_for_it(
    monkeypatch: pytest.MonkeyPatch, has_kernels: bool
) -> None:
    """Older devices only emulate it, and torch counts that as support unless it is told otherwise."""
    device = torch.device("cuda", 0)
    has_bfloat16_kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *, including_emulation: including_emulation or has_kernels
    )
    assert computes_in_bfloat16(device, "auto") is has_kernels
    assert computes_in_bfloat16(device, "bfloat16")
    assert not computes_in_bfloat16(device, "float32")
    has_bfloat16_kernels.cache_clear()


@pytest.mark.parametrize(
    ("flags", "lacks", "multiplies"),
    [
        ("flags : fpu sse4_2 avx512f amx_bf16", False, True),
        ("flags : avx512_bf16", False, False),
        ("Features : fp asimd bf16", False, False),
        ("flags : fpu sse4_2 avx512f", True, False),
    ],
)
def test_instructions_for_bfloat16_are_known_by_linux_names(
    tmp_path: Path, flags: str, *, lacks: bool, multiplies: bool
) -> None:
    """Where no file tells, nothing is known to be missing, nor to be there."""
    place = tmp_path / "cpuinfo"
    assert not lacks_bfloat16(place)
    assert not multiplies_in_bfloat16(place)
    place.write_text(f"processor : 0\n{flags}\n")
    assert lacks_bfloat16(place) is lacks
    assert multiplies_in_bfloat16(place) is multiplies


def test_seed_everything_repeats_the_global_draws() -> None:
    """Dropout and initialisation draw from the global generator."""
    seed_everything(2**63 - 1)
    first = torch.rand(3)
    seed_everything(2**63 - 1)
    assert torch.equal(torch.rand(3), first)


def test_is_out_of_memory_knows_what_torch_raises_on_this_machine() -> None:
    """The message of torch's CPU allocator is recognised as it really comes."""
    with pytest.raises(RuntimeError, match="memory") as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_is_out_of_memory_tells_memory_from_bugs(error: BaseException, expected: bool) -> None:
    """Only errors about memory make a trial infeasible."""
    assert is_out_of_memory(error) is expected
