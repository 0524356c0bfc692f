"""CUDA graphs on request: a short training step recorded once and launched as one, where that is measured to pay."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter

import torch
from torch import Tensor, nn

from tuner.errors import first_line
from tuner.training.compiling import keeping_draws
from tuner.training.device import release_memory, wait_for
from tuner.training.head_features import keeping_buffers
from tuner.training.rounding import repeats
from tuner.trial import Precision, TrialParams

Step = Callable[[Tensor, Tensor], Tensor]
"""From a batch's inputs and labels to its mean loss. It makes gradients where there are none: they are None before."""
Record = Callable[[nn.Module, Step, Tensor, Tensor], Step]
"""From a model, a step of it and a batch to what does the same with batches of that shape."""

_LEAST_STEPS = 100
"""Trials with fewer are not recorded: recording and comparing take as long as several steps, timing as long as 20."""
_LEAST_RETURN = 2.0
"""How many times what recording takes a trial must be expected to save: it may be pruned before its end."""
_N_TIMED = 10
_LOST = "CUDA error: the device does not answer after a step that could not be recorded"
"""Told as a lost device is, whatever the error said: a recording that fails may take the allocator with it."""
_NOISE = 1e-3
"""Share of the largest gradient: smaller ones may be nothing but rounding, as those of biases under a BatchNorm are."""


@dataclass(frozen=True, kw_only=True)
class _Gain:
    """What recording the steps of one trial brought, as others of its shape may expect it."""

    record_seconds: float
    """What recording and comparing took."""
    saved_seconds: float
    """In each step; below 0 where recorded ones are slower."""


class StepGraphs:
    """Records the steps of a worker's trials. Mutable: it knows what that brought, and what it has given up.

    A step of a few small layers is hundreds of kernels of some microseconds each, which the host launches more slowly
    than the device computes them. Forward pass, loss and backward pass are recorded; batches are chosen and weights
    moved outside. A graph holds the addresses of one trial's weights, so each trial is recorded anew.
    """

    def __init__(self, note: Callable[[str], None], record: Record | None = None) -> None:
        """Record nothing yet.

        Args:
            note: Told in one line which backbone's steps are not recorded, and why.
            record: Default: ``record_graph``.
        """
        self._note, self._record = note, record or record_graph
        self._given_up: set[str] = set()
        self._gains: dict[tuple[str, int, int, Precision], _Gain] = {}

    def find(
        self, model: nn.Module, step: Step, inputs: Tensor, labels: Tensor, params: TrialParams, *, n_steps: int
    ) -> Step | None:
        """Return a trial's step as it is recorded, if that does the same and is expected to save time.

        Nothing but time is spent: buffers and generators are as before, gradients are None.

        Args:
            model: In train mode, frozen as the trial asks; on the inputs' device.
            step: Of the model.
            inputs: Of a whole batch.
            labels: The batch's.
            params: The trial's.
            n_steps: That it has.

        Raises:
            RuntimeError: If the device is lost.
        """
        if params.backbone in self._given_up or not self._may_pay(params, n_steps):
            return None
        device, reason = inputs.device, ""
        try:
            with keeping_buffers(model), keeping_draws(device):
                if (recorded := self._find(model, step, inputs, labels, params)) is not None:
                    return recorded
        except Exception as error:  # a user's backbone may do anything in its step, and only so much can be recorded
            if not _answers(device):
                raise RuntimeError(_LOST) from error
            if not isinstance(error, torch.OutOfMemoryError):  # the next trial may have the room
                reason = first_line(error)
        finally:
            model.zero_grad(set_to_none=True)
        release_memory(device)  # out of the except block: its traceback held on to tensors
        if reason:
            self._given_up.add(params.backbone)
            self._note(f"{params.backbone} trains without CUDA graphs: {reason}")
        return None

    def _may_pay(self, params: TrialParams, n_steps: int) -> bool:
        gain = self._gains.get(_describe(params))
        if gain is None:
            return n_steps >= _LEAST_STEPS
        return gain.saved_seconds * n_steps > _LEAST_RETURN * gain.record_seconds

    def _find(self, model: nn.Module, step: Step, inputs: Tensor, labels: Tensor, params: TrialParams) -> Step | None:
        """Return the recorded step; None if it is not faster.

        Raises:
            ValueError: If it is another one.
        """
        key, started = _describe(params), perf_counter()
        recorded = self._record(model, step, inputs, labels)
        other = inputs.roll(1, dims=0)  # not the batch that was recorded
        found, expected = (_try_step(each, model, other, labels) for each in (recorded, step))
        if not _agree(found, expected, inputs.device):
            raise ValueError("its recorded steps are not those that it takes")
        record_seconds = perf_counter() - started
        if key not in self._gains:
            plain, faster = (_time(each, model, inputs, labels) for each in (step, recorded))
            self._gains[key] = _Gain(record_seconds=record_seconds, saved_seconds=plain - faster)
        return recorded if self._gains[key].saved_seconds > 0 else None


def record_graph(model: nn.Module, step: Step, inputs: Tensor, labels: Tensor) -> Step:
    """Record a step as a CUDA graph, whose loss and gradients lie in the same place each time.

    Args:
        model: On a CUDA device. Its buffers and generators move as by two steps.
        step: Of the model; it never waits for the device.
        inputs: Of a whole batch.
        labels: The batch's.

    Returns:
        The step, for batches of the same shape. Its loss is overwritten by the next.
    """
    device, kept_inputs, kept_labels = inputs.device, inputs.clone(), labels.clone()
    stream, graph = _find_stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):  # also around the recording, which when it fails does not go back by itself
            step(kept_inputs, kept_labels)  # what libraries set up when they are called first cannot be recorded
            model.zero_grad(set_to_none=True)
            with _refusing_to_wait():  # a step that fails costs nothing, a recording that fails may cost the worker
                step(kept_inputs, kept_labels)
            model.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                loss = step(kept_inputs, kept_labels)
    finally:  # what is put back on the current stream must come after what the steps have moved
        torch.cuda.current_stream(device).wait_stream(stream)
    gradients = [(each, each.grad) for each in model.parameters() if each.grad is not None]

    def replay(inputs: Tensor, labels: Tensor) -> Tensor:
        kept_inputs.copy_(inputs)
        kept_labels.copy_(labels)
        graph.replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient  # a step that was not recorded may have put others there
        return loss

    return replay


@cache  # libraries keep memory for each stream that they have seen
def _find_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that a device's steps are recorded on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's own


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Have torch raise where the host would wait for the device."""
    try:
        set_sync_debug_mode("error")
        yield
    finally:
        set_sync_debug_mode("default")


def set_sync_debug_mode(mode: str) -> None:
    """Say what torch does where the host waits for the device, without its warning that this does not see all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode(mode)


def _describe(params: TrialParams) -> tuple[str, int, int, Precision]:
    """Return what trials have in common whose steps take the same time."""
    return params.backbone, params.unfrozen_layers, params.batch_size, params.precision


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """What a step did."""

    loss: Tensor
    gradients: list[Tensor]
    buffers: list[Tensor]


def _try_step(step: Step, model: nn.Module, inputs: Tensor, labels: Tensor) -> _Tried:
    """Take a step; leave buffers and generators as they were."""
    model.zero_grad(set_to_none=True)
    with keeping_buffers(model), keeping_draws(inputs.device):
        loss = step(inputs.clone(), labels).clone()  # activations may write into what they are given
        buffers = [buffer.clone() for buffer in model.buffers()]
    gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    return _Tried(loss=loss, gradients=gradients, buffers=buffers)


def _agree(found: _Tried, expected: _Tried, device: torch.device) -> bool:
    """Whether two steps did the same, tensor by tensor: a large one hides no small one."""
    if len(found.gradients) != len(expected.gradients):
        return False
    noise = _NOISE * max(float(each.abs().max()) for each in expected.gradients)
    gradients = zip(found.gradients, expected.gradients, strict=True)
    others = zip([found.loss, *found.buffers], [expected.loss, *expected.buffers], strict=True)
    return all(repeats(*pair, device, floor=noise) for pair in gradients) and all(
        repeats(*pair, device) for pair in others
    )


def _time(step: Step, model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Return the mean time of a step, in seconds."""
    inputs = inputs.clone()
    wait_for(inputs.device)
    started = perf_counter()
    for _ in range(_N_TIMED):
        model.zero_grad(set_to_none=True)
        step(inputs, labels)
    wait_for(inputs.device)
    return (perf_counter() - started) / _N_TIMED


def _answers(device: torch.device) -> bool:
    """Whether a device still computes and its memory can be had: a recording that fails may cost both."""
    try:
        release_memory(device)
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False
