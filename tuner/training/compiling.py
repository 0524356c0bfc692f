"""torch.compile on request: a compiled model is compared with the plain one first, and given up with one note."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tuner.errors import first_line
from tuner.training.device import is_device_lost, release_memory
from tuner.training.head_features import keeping_buffers
from tuner.training.rounding import agree, find_rounding
from tuner.trial import Precision

Run = Callable[[Tensor], Tensor]
"""From a backbone's input to its logits."""

_MAX_VARIANTS = 64
"""Numbers of unfrozen layers, batch sizes and backbones that one process keeps compiled. With torch's own 8 a search
would soon train uncompiled, and nobody would be told."""
_GRADIENT_TOLERANCES = {torch.float64: 1e-6, torch.float32: 3e-2, torch.bfloat16: 3e-1}
"""Norm of the difference over the norm of the plain model's. This is to find wrong kernels, not rounding, which by
turning a ReLU over put the plain float32 gradients of a MobileNet 2e-3 off those of float64."""


class Compiler:
    """Compiles the models of a worker's trials. Mutable: it knows which backbones it has given up.

    A whole model is compiled for one batch shape, not its repeated blocks (torch's regional compilation), because which
    those are would have to be known for each family. Trials with the same backbone, number of unfrozen layers and
    batch size share what was compiled, since torch compiles a class's code and not an instance; between processes the
    compiled kernels lie in torch's own cache. Nothing of the model changes: the compiled one is another way to call the
    same modules, and is never saved.
    """

    def __init__(self, note: Callable[[str], None], compile_model: Callable[[Run], Run] | None = None) -> None:
        """Compile nothing yet.

        Args:
            note: Told in one line which backbone trains uncompiled, and why.
            compile_model: Default: ``torch.compile`` for static shapes.
        """
        self._note = note
        self._compile_model = compile_model or _compile_static
        self._given_up: set[str] = set()

    def compile_checked(
        self,
        model: nn.Module,
        run: Run,
        inputs: Tensor,
        backbone: str,
        dropout: torch.Generator,
        *,
        precision: Precision,
    ) -> Run | None:
        """Return the compiled model, if its logits and gradients for a batch are those of the model.

        Nothing but time is spent: weights, buffers and generators are as before.

        Args:
            model: In train mode, frozen as the trial asks; on the inputs' device.
            run: What is compiled: the model, or the part of it that trains.
            inputs: A whole batch, under the autocast of the training.
            backbone: Its name in the study file.
            dropout: The generator of the head's dropout.
            precision: The trial's, that of the autocast.

        Raises:
            RuntimeError: If the device is lost, or has no memory for the plain model.
        """
        if backbone in self._given_up:
            return None
        expected = _try_step(run, model, inputs, dropout)
        try:
            compiled = self._compile_model(run)
            reason = _compare(_try_step(compiled, model, inputs, dropout), expected, inputs.device, precision)
        except Exception as error:  # there is no end to what a compiler may raise
            if is_device_lost(error):
                raise
            compiled, reason = run, first_line(error)
        if reason is None:
            return compiled
        release_memory(inputs.device)
        self._given_up.add(backbone)
        self._note(f"{backbone} trains uncompiled: {reason}")
        return None


def _compile_static(run: Run) -> Run:
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _MAX_VARIANTS)
    # By default a trial with dropout in front of its head, which is a hook, would run the code of one without.
    config.skip_nnmodule_hook_guards = False
    # The generator's own draws, so that dropouts drop what they would drop uncompiled, and can be compared.
    compiled: Run = torch.compile(run, dynamic=False, options={"fallback_random": True})
    return compiled


def _try_step(run: Run, model: nn.Module, inputs: Tensor, dropout: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the logits of a batch, and all gradients of a loss in one row; leave the model as it was."""
    with keeping_buffers(model), keeping_draws(inputs.device, dropout):
        logits = run(inputs.clone())  # a suffix may begin with an activation that writes into its input
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(logits.float().square().mean(), trained, allow_unused=True)
    return logits.detach(), torch.cat([each.flatten() for each in found if each is not None])


def _compare(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], device: torch.device, precision: Precision
) -> str | None:
    """Return in which way two steps differ by more than rounding; None if they do not."""
    if not agree(found[0], expected[0], device, precision):
        return "the compiled model gives other logits"
    dtype = find_rounding(device, precision, found[1].dtype)
    difference = (found[1] - expected[1]).norm() / expected[1].norm().clamp(min=torch.finfo(dtype).tiny)
    return None if difference <= _GRADIENT_TOLERANCES[dtype] else "the compiled model gives other gradients"


@contextmanager
def keeping_draws(device: torch.device, *generators: torch.Generator) -> Iterator[None]:
    """Put torch's global generators and some others back to where they are now."""
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
