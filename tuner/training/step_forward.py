"""The model as a training step calls it: compiled if that was asked for, with batches of one shape where it pays."""

import torch
from torch import Tensor, nn

from tuner.training.compiling import Compiler, Run, keeping_draws
from tuner.training.device import MEMORY_FORMAT
from tuner.training.head_features import keeping_buffers
from tuner.training.rounding import agree
from tuner.trial import Precision


class StepForward:
    """Gives a training step its logits. Mutable: the first batch says which shape is usual.

    An epoch's last, smaller batch is filled up with repeated rows, whose logits are cut off again: they have no part in
    the loss, and no gradient comes from them. So kernels, plans and compiled code for one shape are enough. It is done
    on CUDA and with compiled models, and only where it changes nothing but rounding, which is tried once:

    - never where a row's logits depend on the other rows: a BatchNorm that trains would count the repeated rows twice;
    - never where training draws random numbers (dropout, drop-path): the rows would be given other draws than without
      the filling, and so would all later steps;
    - never with a plain model on a CPU, where a smaller batch is cheaper, and all bits are promised.

    Elsewhere the smaller batch goes through the plain model as it is: nothing is compiled for it.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        backbone: str,
        device: torch.device,
        *,
        precision: Precision,
        dropout: torch.Generator,
        compiler: Compiler | None,
    ) -> None:
        """Take the model.

        Args:
            model: On the device, frozen as the trial asks.
            run: From a batch to its logits: the model, or the part of it that trains.
            backbone: Its name in the study file.
            device: Where it trains.
            precision: The trial's.
            dropout: The generator of the head's dropout.
            compiler: None calls the model as it is.
        """
        self._model, self._plain, self._backbone = model, run, backbone
        self._precision, self._dropout, self._compiler = precision, dropout, compiler
        self._is_cuda = device.type == "cuda"
        self._n_rows: int | None = None
        self._run: Run = run
        self._fills: bool | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return a batch's logits, in train mode and under the training's autocast.

        Args:
            inputs: Shape ``(n, …)``; the first batch is as large as any.
        """
        n_rows = len(inputs)
        if self._n_rows is None:
            self._n_rows = n_rows
            self._compile(inputs)
        if n_rows >= self._n_rows:
            return self._run(inputs)
        if self._fills is None:
            self._fills = (self._is_cuda or self._run is not self._plain) and self._may_fill(inputs)
        return self._run(fill_rows(inputs, self._n_rows))[:n_rows] if self._fills else self._plain(inputs)

    def _compile(self, inputs: Tensor) -> None:
        if self._compiler is not None:
            compiled = self._compiler.compile_checked(
                self._model, self._plain, inputs, self._backbone, self._dropout, precision=self._precision
            )
            self._run = self._plain if compiled is None else compiled

    def _may_fill(self, inputs: Tensor) -> bool:
        """Whether filling up this batch changes nothing but rounding; leave the model as it was."""
        assert self._n_rows is not None  # noqa: S101 - the usual batch comes before the smaller one
        if any(_mixes_rows(module) for module in self._model.modules()):
            return False
        draws = _list_draws(inputs.device, self._dropout)
        buffers = [buffer.clone() for buffer in self._model.buffers()]
        try:
            with keeping_buffers(self._model), keeping_draws(inputs.device, self._dropout), torch.no_grad():
                expected = self._plain(inputs.clone())
                if any(map(_differ, draws, _list_draws(inputs.device, self._dropout))):
                    return False
                if any(map(_differ, buffers, self._model.buffers())):
                    return False
                # Not the compiled model: it has been compared, and would be compiled once more for use without
                # gradients.
                found = self._plain(fill_rows(inputs, self._n_rows))[: len(inputs)]
                return agree(found, expected, inputs.device, self._precision)
        finally:
            torch.clear_autocast_cache()  # of casts without gradients, which some versions of torch would use again


def fill_rows(inputs: Tensor, n_rows: int) -> Tensor:
    """Return a batch with its rows repeated until they are enough; images stay in the device's memory format.

    Args:
        inputs: Shape ``(n, …)``, n >= 1.
        n_rows: At least n.
    """
    n_whole, n_more = divmod(n_rows, len(inputs))
    filled = torch.cat([*[inputs] * n_whole, inputs[:n_more]])
    return filled.contiguous(memory_format=MEMORY_FORMAT) if filled.ndim == 4 else filled


def _mixes_rows(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that takes its statistics from the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (  # noqa: SLF001 - what all BatchNorms are
        module.training or module.running_mean is None
    )


def _list_draws(device: torch.device, dropout: torch.Generator) -> list[Tensor]:
    """Return the states of all that training may draw from."""
    states = [torch.get_rng_state(), dropout.get_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _differ(before: Tensor, now: Tensor) -> bool:
    return not torch.equal(before, now)
