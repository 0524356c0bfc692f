"""A worker's probe: training steps that are timed and forgotten, to find how many workers suit a device."""

from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import torch

from tuner.data.memory import available_memory
from tuner.errors import first_line
from tuner.service.messages import Probe, Probed
from tuner.service.outcomes import comes_from_lost_device
from tuner.training.device import release_memory, wait_for
from tuner.training.loop import TrainingJob, take_steps
from tuner.trial import TrialParams

_N_WARM_STEPS = 3
"""Steps that do not count: the first ones load kernels, make the optimizer's state and find memory."""
_CONTEXT_BYTES = 600 << 20
"""What a process takes of a CUDA device besides its tensors, which torch does not count; not measured."""
_KIBIBYTE = 1024


class StepProbe:
    """Takes training steps of one recipe at a time. Mutable: they stay ready for the next probe of that recipe."""

    def __init__(self, device: torch.device, make_job: Callable[[TrialParams], TrainingJob]) -> None:
        """Take no step yet.

        Args:
            device: Where the steps are taken.
            make_job: Makes a trial's images and model ready.
        """
        self._device, self._make_job = device, make_job
        self._params: TrialParams | None = None
        self._steps: Iterator[int] | None = None

    def measure(self, request: Probe) -> Probed:
        """Take steps for as long as the request says, and say how fast they were and what memory they took.

        Raises:
            Exception: If the device is lost.
        """
        try:
            return self._measure(request)
        except Exception as error:  # a user's backbone may raise anything
            if comes_from_lost_device(error):
                raise
            problem = first_line(error)
        self.forget()  # out of the except block: its traceback held on to tensors
        return Probed(problem=problem)

    def forget(self) -> None:
        """Give back what the steps hold."""
        if self._steps is not None or self._params is not None:
            self._steps = self._params = None
            release_memory(self._device)

    def _measure(self, request: Probe) -> Probed:
        steps = self._make_ready(request.params)
        n_images, started = 0, perf_counter()
        while perf_counter() - started < request.seconds:
            n_images += next(steps)
        wait_for(self._device)
        speed = n_images / (perf_counter() - started)
        return Probed(images_per_second=speed, memory=tuple(self._list_memory()))

    def _make_ready(self, params: TrialParams) -> Iterator[int]:
        if self._steps is None or self._params != params:
            self.forget()
            self._params = params
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
            self._steps = take_steps(self._make_job(params))
            for _ in range(_N_WARM_STEPS):
                next(self._steps)
            wait_for(self._device)
        return self._steps

    def _list_memory(self) -> Iterator[tuple[int, int]]:
        """Yield what this process holds of the host's memory and of the device's, with what is free there."""
        yield _read_own_memory(), available_memory()
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            yield torch.cuda.max_memory_reserved(self._device) + _CONTEXT_BYTES, free


def _read_own_memory() -> int:
    """Return the bytes that this process shares with no file: mapped images are the same for all workers."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "RssAnon":
            return int(value.split()[0]) * _KIBIBYTE
    return 0
