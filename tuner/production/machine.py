"""What retraining and predicting take from this machine: a device, its threads and memory, the user's own code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tuner.errors import DeviceError
from tuner.service.slots import usable_cores
from tuner.training.device import as_device, is_out_of_memory


def choose_device(text: str) -> torch.device:
    """Return the device of a name; ``auto`` is the first CUDA device, or the CPU where torch sees none.

    Raises:
        DeviceError: If there is no such device here.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    return as_device(text)


@contextmanager
def using_cores() -> Iterator[int]:
    """Let torch use the cores that this process may use, and no more than OMP_NUM_THREADS says.

    A worker has one thread because its neighbours have the other cores; here there are no neighbours. Torch's own
    choice does not know of a container's quota, and threads beyond it stand in each other's way. The same number of
    threads gives the same bits again on a CPU.

    Yields:
        The number of threads.
    """
    n_before = torch.get_num_threads()
    n_threads = min(n_before, usable_cores())
    torch.set_num_threads(n_threads)
    try:
        yield n_threads
    finally:
        torch.set_num_threads(n_before)


@contextmanager
def reporting_memory(device: torch.device, *, n_images: int, advice: str) -> Iterator[None]:
    """Turn "out of memory" into a ``DeviceError``.

    Args:
        device: Where the model runs.
        n_images: Images in a batch.
        advice: What the user can do.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(
            f"device: must have memory for batches of {n_images}, got none left on {device}; {advice}"
        ) from error


def find_own_code() -> None:
    """Let a user's function in the working directory be imported, as workers do; last, so that it shadows nothing."""
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
