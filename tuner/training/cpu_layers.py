"""Layers that torch trains slowly on a CPU, computed in faster ways: the same numbers but for rounding."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner.training.device import MEMORY_FORMAT, computes_in_bfloat16
from tuner.trial import Precision


@contextmanager
def faster_layers(model: nn.Module, device: torch.device, precision: Precision) -> Iterator[None]:
    """Let layers of a model train in faster ways, on a CPU; what needs no gradient is computed as ever.

    - A convolution with a kernel of one pixel becomes a matrix product: oneDNN lays its weights out anew in every step,
      which takes much of its time where maps are small.
    - The gradient of a pooled map comes down with its channels first, in which the layers below would read it slowly.
    - In bfloat16 a depthwise convolution is computed in float32, but for the kind that oneDNN has a fast gradient for.

    Timed by ``python -m benchmarks cpu_layers``.

    Args:
        model: On the device, in its memory format. Its layers are put back afterwards.
        device: Nothing is done on another kind than the CPU.
        precision: The trial's.
    """
    if device.type != "cpu":
        yield
        return
    in_bfloat16 = computes_in_bfloat16(device, precision)
    faster = {module: _find_faster(module, in_bfloat16=in_bfloat16) for module in model.modules()}
    changed = {module: compute for module, compute in faster.items() if compute is not None}
    for module, compute in changed.items():
        module.forward = partial(compute, module)
    handles = [module.register_forward_hook(_keep_layout) for module in faster if _is_plain(module)]
    try:
        yield
    finally:
        for module in changed:
            del module.forward
        for handle in handles:
            handle.remove()


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer has neither parts nor weights: like an activation, the last layer before pooling."""
    return not [*module.children(), *module.parameters()]


def _find_faster(module: nn.Module, *, in_bfloat16: bool) -> Callable[[Any, Tensor], Tensor] | None:
    """Return how a layer trains faster than by its own forward pass, if there is such a way."""
    if not isinstance(module, nn.Conv2d) or "forward" in vars(module):  # somebody has changed it already
        return None
    is_pixel = module.kernel_size == module.stride == (1, 1) and module.padding in {(0, 0), "same", "valid"}
    if type(module) is nn.Conv2d and is_pixel and module.groups == 1:
        return _multiply
    is_depthwise = module.groups == module.in_channels > 1
    has_gradient = module.kernel_size == (3, 3) and module.stride == (1, 1)
    is_float32 = module.weight.dtype == torch.float32
    return _convolve_in_float32 if in_bfloat16 and is_depthwise and not has_gradient and is_float32 else None


def _multiply(convolution: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Compute a convolution with a kernel of one pixel as a product of matrices: pixels by channels."""
    has_layout = inputs.ndim == 4 and inputs.is_contiguous(memory_format=MEMORY_FORMAT)
    if not has_layout or not _needs_gradient(convolution, inputs):
        return type(convolution).forward(convolution, inputs)
    pixels = inputs.permute(0, 2, 3, 1)
    return functional.linear(pixels, convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def _convolve_in_float32(convolution: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Compute a convolution in float32, whatever the autocast: its gradient in bfloat16 took 10 to 40 times as long."""
    if not _needs_gradient(convolution, inputs):
        return type(convolution).forward(convolution, inputs)
    with torch.autocast("cpu", enabled=False):
        return type(convolution).forward(convolution, inputs.float()).to(inputs.dtype)


def _needs_gradient(convolution: nn.Conv2d, inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and (inputs.requires_grad or convolution.weight.requires_grad)


def _keep_layout(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    """Have the gradient of a layer's output lie in memory as the output does."""
    is_map = isinstance(output, Tensor) and output.ndim == 4 and output.requires_grad
    if is_map and output.is_contiguous(memory_format=MEMORY_FORMAT):
        output.register_hook(_lay_channels_last)


def _lay_channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=MEMORY_FORMAT)
