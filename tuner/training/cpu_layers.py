"""Layers that torch trains slowly on a CPU, computed in faster ways: the same numbers but for rounding."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional

from tuner.training.device import MEMORY_FORMAT, computes_in_bfloat16
from tuner.trial import Precision

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.ELU, nn.Mish)
"""One of them is usually the last layer before pooling."""


@contextmanager
def faster_layers(model: nn.Module, device: torch.device, precision: Precision) -> Iterator[None]:
    """Let layers of a model train in faster ways, on a CPU; what needs no gradient is computed as ever.

    - A convolution with a kernel of one pixel becomes the matrix product that it is: faster where maps are small and
      weights many, level elsewhere.
    - The gradient of a pooled map comes down with its channels first, in which the layers below would read it slowly.
    - In bfloat16 a depthwise convolution is computed in float32, but for the kind that oneDNN has a fast gradient for.

    Only torch's and timm's own classes are looked at: what else a layer does is its author's. Timed by
    ``python -m benchmarks cpu_layers``.

    Args:
        model: On the device, in its memory format. Its layers are put back afterwards.
        device: Nothing is done on another kind than the CPU.
        precision: The trial's.
    """
    with ExitStack() as changes:
        for module in model.modules() if device.type == "cpu" else ():
            compute = _find_faster(module, in_bfloat16=computes_in_bfloat16(device, precision))
            if compute is not None:
                module.forward = partial(compute, module)
                changes.callback(delattr, module, "forward")
            if isinstance(module, _ACTIVATIONS):
                changes.callback(module.register_forward_hook(_keep_layout).remove)
        yield


def _find_faster(module: nn.Module, *, in_bfloat16: bool) -> Callable[[Any, Tensor], Tensor] | None:
    """Return how a layer trains faster than by its own forward pass, if there is such a way."""
    if not isinstance(module, nn.Conv2d) or "forward" in vars(module):  # somebody has changed it already
        return None
    if "weight" not in dict(module.named_parameters(recurse=False)):  # it is made anew in each forward pass
        return None
    is_pixel = module.kernel_size == module.stride == (1, 1) and module.padding in ((0, 0), "same", "valid")
    if type(module) is nn.Conv2d and is_pixel and module.groups == 1:
        return _multiply
    is_depthwise = type(module) in {nn.Conv2d, Conv2dSame} and module.groups == module.in_channels > 1
    has_gradient = module.kernel_size == (3, 3) and module.stride == (1, 1)
    is_float32 = module.weight.dtype == torch.float32
    return _convolve_in_float32 if in_bfloat16 and is_depthwise and not has_gradient and is_float32 else None


def _multiply(convolution: nn.Conv2d, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
    """Compute a convolution with a kernel of one pixel as a product of matrices: pixels by channels."""
    has_layout = input.ndim == 4 and input.is_contiguous(memory_format=MEMORY_FORMAT)
    if not has_layout or not _needs_gradient(convolution, input):
        return type(convolution).forward(convolution, input)
    pixels = input.permute(0, 2, 3, 1)
    return functional.linear(pixels, convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def _convolve_in_float32(convolution: nn.Conv2d, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
    """Compute a convolution in float32, and return it in the type that autocast gives."""
    if not torch.is_autocast_enabled("cpu") or not _needs_gradient(convolution, input):
        return type(convolution).forward(convolution, input)
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        return type(convolution).forward(convolution, input.float()).to(dtype)


def _needs_gradient(convolution: nn.Conv2d, inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and (inputs.requires_grad or convolution.weight.requires_grad)


def _keep_layout(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    """Have the gradient of a layer's output lie in memory as the output does."""
    is_map = isinstance(output, Tensor) and output.ndim == 4 and output.grad_fn is not None
    if is_map and output.is_contiguous(memory_format=MEMORY_FORMAT):
        output.register_hook(_lay_channels_last)


def _lay_channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=MEMORY_FORMAT)
