"""Layers that train in faster ways on a CPU give the numbers that they gave before."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.training.compiling import Compiler
from tuner.training.cpu_layers import faster_layers
from tuner.training.device import autocast
from tuner.training.loop import take_steps
from tuner.trial import Precision

from .builders import CPU, make_job

LAYOUT = torch.channels_last
BACKBONES = ["mobilenetv2_050", "mobilenetv3_small_050", "regnety_002", "test_convnext", "test_resnet"]


class Layers(nn.Module):
    """One layer of each kind that has a faster way, an activation, and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pixel = nn.Conv2d(3, 6, 1)
        self.strided = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6)
        self.act = nn.ReLU()
        self.fc = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.fc(self.act(self.strided(self.pixel(images))).mean((2, 3)))
        return logits


class Centred(nn.Conv2d):
    """A convolution of one pixel whose kernel has no mean: a forward pass of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the convolution with the centred kernel."""
        return nn.functional.conv2d(inputs, self.weight - self.weight.mean(), self.bias)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the convolutions and matrix products that are computed, each with the type of its input."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"convolution", "convolution_backward", "mm", "addmm"}:
            self.seen.append((name, args[name == "addmm"].dtype))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        """Return how often something was computed."""
        return sum(each == name for each, _ in self.seen)


def make_images(n_images: int = 6, size: int = 32) -> Tensor:
    """Return noise, channels last."""
    return torch.randn(n_images, 3, size, size, generator=torch.Generator().manual_seed(0)).to(memory_format=LAYOUT)


def take_step(model: nn.Module, images: Tensor, precision: Precision = "float32", *, fast: bool) -> list[Tensor]:
    """Return logits, gradients and buffers of a copy of a model after one step."""
    twin = copy.deepcopy(model).to(memory_format=LAYOUT)
    torch.manual_seed(0)
    with faster_layers(twin, CPU, precision) if fast else nullcontext():
        with autocast(CPU, precision):
            logits = twin(images)
        logits.float().square().mean().backward()
    return [logits.detach(), *(each.grad for each in twin.parameters() if each.grad is not None), *twin.buffers()]


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Compute as validation does."""
    model.eval()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", BACKBONES)
def test_a_step_of_faster_layers_is_the_plain_step(name: str) -> None:
    """Logits, all gradients and the statistics of BatchNorms, in double precision."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).double().train()
    fast, plain = (take_step(model, make_images().double(), fast=fast) for fast in (True, False))
    assert len(fast) == len(plain)
    for found, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_steps_in_bfloat16_are_no_further_off_than_plain_ones() -> None:
    """Measured by the gradients of float32."""
    torch.manual_seed(0)
    model, images = timm.create_model("mobilenetv2_050", num_classes=3).train(), make_images()
    exact = torch.cat([each.flatten() for each in take_step(model, images, fast=False)[1:]])

    def measure_error(*, fast: bool) -> float:
        found = torch.cat([each.float().flatten() for each in take_step(model, images, "bfloat16", fast=fast)[1:]])
        return float((found - exact).norm() / exact.norm())

    assert 0 < measure_error(fast=True) < 1.2 * measure_error(fast=False)


def test_pixels_are_multiplied_and_strided_depthwise_kernels_stay_in_float32() -> None:
    """Without the faster layers there is no product but the classifier's, and all is computed in bfloat16."""
    model, images = Layers().train(), make_images().requires_grad_()
    with Watch() as watch:
        take_step(model, images, "bfloat16", fast=False)
    assert (watch.count("convolution"), watch.count("convolution_backward")) == (2, 2)
    assert {dtype for _, dtype in watch.seen} == {torch.bfloat16}
    with Watch() as watch:
        logits = take_step(model, images, "bfloat16", fast=True)[0]
    assert [dtype for name, dtype in watch.seen if name.startswith("convolution")] == [torch.float32] * 2
    assert {dtype for name, dtype in watch.seen if name.endswith("mm")} == {torch.bfloat16}
    assert logits.dtype == torch.bfloat16


def test_gradients_come_down_with_their_channels_last() -> None:
    """Below the pool, which hands them down with the channels first."""
    for fast in (True, False):
        model, seen = Layers().to(memory_format=LAYOUT), list[Tensor]()
        with faster_layers(model, CPU, "float32") if fast else nullcontext():
            # Registered later, this hook sees what the others have made of the gradient.
            model.act.register_forward_hook(lambda _, __, output, seen=seen: output.register_hook(seen.append) and None)
            model(make_images()).square().mean().backward()
        (gradient,) = seen
        assert gradient.is_contiguous(memory_format=LAYOUT) is fast


def test_validation_computes_as_ever() -> None:
    """What is printed is what the model gives in production, to the bit."""
    model, images = timm.create_model("mobilenetv2_050", num_classes=3).to(memory_format=LAYOUT), make_images()
    with without_gradients(model):
        expected = model(images)
        with faster_layers(model, CPU, "bfloat16"), Watch() as watch:
            found = model(images)
    assert torch.equal(found, expected)
    assert watch.count("addmm") + watch.count("mm") == 1  # its classifier


def test_what_is_frozen_computes_as_ever() -> None:
    """Its maps are kept, and a trial without them is to be the same."""
    model = Layers().to(memory_format=LAYOUT)
    model.pixel.requires_grad_(False)
    with faster_layers(model, CPU, "float32"), Watch() as watch:
        model(make_images()).sum().backward()
    assert watch.count("convolution") == 2


def test_a_layer_may_be_called_as_torchs_own() -> None:
    """By name, with an image that is no batch, and with the channels first."""
    pixel, strided = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 3, 3, stride=2, groups=3)
    for layer, precision in ((pixel, "float32"), (strided, "bfloat16")):
        for images in (make_images(), make_images()[0], make_images().contiguous()):
            expected = layer(images)
            with faster_layers(layer, CPU, precision):  # type: ignore[arg-type]
                assert torch.allclose(layer(input=images), expected, atol=1e-6)


def test_what_comes_of_float32_is_in_the_type_of_autocast() -> None:
    """A residual stream is in float32, and so is what a suffix is fed."""
    layer = nn.Conv2d(3, 3, 3, stride=2, groups=3)
    with faster_layers(layer, CPU, "bfloat16"), autocast(CPU, "bfloat16"), Watch() as watch:
        assert layer(make_images()).dtype == torch.bfloat16
    assert watch.seen == [("convolution", torch.float32)]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is")  # a user's backbone may be
def test_layers_that_bear_no_hooks_are_left_alone() -> None:
    """Scripted ones, which raise where they are given any."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.script(nn.ReLU()), nn.ReLU6())
    with faster_layers(model, CPU, "float32"):
        model(make_images()).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("fails", [True, False])
def test_layers_are_put_back(fails: bool) -> None:
    """Also after an error; a copy made meanwhile computes with weights of its own."""
    model, images = Layers().to(memory_format=LAYOUT), make_images()
    with pytest.raises(ValueError, match="now") if fails else nullcontext(), faster_layers(model, CPU, "bfloat16"):
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            nn.init.zeros_(parameter)
        assert not twin(images).any()
        assert model(images).any()
        if fails:
            raise ValueError("now")
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_other_layers_are_left_alone() -> None:
    """A class with a forward pass of its own, a forward pass that somebody has set, larger kernels, groups, padding."""
    changed = nn.Conv2d(3, 3, 1)
    vars(changed)["forward"] = own = lambda inputs: inputs
    for layer in (
        Centred(3, 3, 1),
        torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)),
        changed,
        nn.Conv2d(3, 3, 3),
        nn.Conv2d(3, 3, 1, stride=2),
        nn.Conv2d(3, 3, 1, groups=3),
        nn.Conv2d(3, 3, 1, padding=1),
    ):
        with faster_layers(layer, CPU, "float32"):
            assert vars(layer).get("forward") is (own if layer is changed else None)
    assert vars(changed)["forward"] is own


def test_another_device_trains_as_ever() -> None:
    """These are ways for a CPU."""
    model = Layers()
    with faster_layers(model, torch.device("meta"), "bfloat16"):
        assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_trials_train_so() -> None:
    """Each step has the gradient of the strided convolution, and products for all the rest."""
    model = Layers()
    steps = take_steps(make_job(model))
    with Watch() as watch:
        next(steps)
    steps.close()
    assert watch.count("convolution_backward") == 1
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_compiled_trials_keep_their_layers() -> None:
    """Compiled code is made of what they are."""
    model = Layers()
    steps = take_steps(replace(make_job(model), compiler=Compiler(print, lambda run: run)))
    with Watch() as watch:
        next(steps)
    steps.close()
    assert watch.count("convolution_backward") > 1
